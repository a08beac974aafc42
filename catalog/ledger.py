"""Records of measurements: JSON for machines, and the ledger catalog/measured/<id>.json that the site reads."""

from __future__ import annotations

import datetime as dt
import functools
import json
import math
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from requant.catalog.files import write_atomic

if TYPE_CHECKING:  # reading a ledger needs no torch
    from requant.catalog.measurement import Measurement

MEASURED = Path(__file__).parent / "measured"
PACKAGES = ("requant", "torch", "transformers", "tokenizers", "triton", "lm-eval")


class LedgerError(ValueError):
    """A ledger file cannot be read; the message names it."""


def record(measurement: Measurement) -> dict[str, object]:
    """One measurement as plain JSON data: numbers that JSON cannot hold (inf, nan) become strings."""
    names = ("paper", "claim", "kind", "reported", "measured", "state", "reason", "seconds", "protocol")
    plain = {name: _plain(getattr(measurement, name)) for name in names}
    return plain | {
        "failed": measurement.failed,
        "expected": measurement.expected,
        "details": _plain(measurement.details),
    }


def records_json(measurements: Iterable[Measurement]) -> str:
    """The file that `requant run --json` and `pytest --claims-json` write: one record a claim."""
    return json.dumps([record(item) for item in measurements], indent=1, allow_nan=False) + "\n"


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else str(value)
    return value


def environment(device: str = "cpu") -> dict[str, object]:
    """Versions, machine and commit a measurement was made with: perplexities depend on them."""
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "commit": _commit(),
        "device": device,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": versions(),
    }


@functools.cache
def versions() -> dict[str, str | None]:
    """Versions of the packages a number may depend on; None for one that is not installed. Treat as read-only."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


@functools.cache
def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def read(paper: str, folder: Path | None = None) -> dict[str, dict]:
    """Saved records of one entry, by claim id; empty if there is no file.

    Raises: LedgerError for a file that is not a ledger.
    """
    path = (folder or MEASURED) / f"{paper}.json"
    if not path.exists():
        return {}
    try:
        return {item["claim"]: item for item in json.loads(path.read_text())["claims"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LedgerError(
            f"{path} is not a ledger of {paper}: {error}; delete it and run `requant run {paper} --save`"
        ) from error


def save(
    measurements: Iterable[Measurement],
    folder: Path | None = None,
    device: str = "cpu",
    keys: Mapping[tuple[str, str], str] | None = None,
) -> list[Path]:
    """Add measurements to their entries' ledgers; each file is replaced in one step, so a crash loses nothing saved.

    A claim that was not run keeps the record of its last run, if there is one.

    Args:
        keys: (entry, claim) -> the key by which a later run tells that it need not measure again (resume.py).
    """
    folder = folder or MEASURED
    by_paper: dict[str, list[Measurement]] = {}
    for measurement in measurements:
        by_paper.setdefault(measurement.paper, []).append(measurement)
    stamp, paths = environment(device), []
    for paper, items in by_paper.items():
        known = read(paper, folder)
        for item in items:
            if item.state != "not run" or item.claim not in known:
                key = (keys or {}).get((paper, item.claim))
                known[item.claim] = record(item) | {"environment": stamp} | ({"key": key} if key else {})
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{paper}.json"
        content = {"paper": paper, "claims": [known[claim] for claim in sorted(known)]}
        write_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        paths.append(path)
    return paths
