"""Which verdicts hang on the machine? `python tests/tools/compare_machines.py HERE.json THERE.json`

Both files come from `requant run --json` (or `pytest -k paper --claims-json`), from two machines and one state of the
code. Processors add floats in different orders, so that learned or nearly tied roundings end apart. Listed are

moved    claims that one machine reproduces and the other contradicts
near     orderings and findings that agree, but whose smallest gap lies nearer to the margin than the machines are apart

A claim of either kind needs a margin above the spread of its draws, more draws, or an effect that is larger. The exit
status is 1 if a verdict moved.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from requant.catalog.loader import load_catalog
from requant.catalog.measurement import NOT_RUN

Records = Mapping[tuple[str, str], dict]


def read(file: Path) -> Records:
    """Records by entry and claim, of what was measured."""
    found = json.loads(file.read_text(encoding="utf-8"))
    return {(r["paper"], r["claim"]): r for r in found if r["state"] != NOT_RUN}


def gap(record: dict) -> float | None:
    """The smallest gap between neighbours of the relation, nats or whatever is measured; None without a relation."""
    gaps = [float(value) for value in record["details"].get("gaps", {}).values()]  # inf and nan are strings
    return min(gaps) if gaps else None


def findings(
    here: Records, there: Records, margins: Mapping[tuple[str, str], float]
) -> Iterator[tuple[str, ...]]:
    """Rows (kind, claim, here, there) of claims in `margins` that both machines measured."""
    for key in sorted(here.keys() & there.keys() & margins.keys()):
        both = here[key], there[key]
        name, gaps = "-".join(key), [gap(record) for record in both]
        shown = [str(r["measured"]) if g is None else f"by {g:.4f}" for r, g in zip(both, gaps, strict=True)]
        if both[0]["state"] != both[1]["state"]:
            yield "moved", name, *(f"{r['state']} {text}" for r, text in zip(both, shown, strict=True))
        elif None not in gaps:
            margin = margins[key]
            if min(abs(g - margin) for g in gaps) < abs(gaps[0] - gaps[1]):
                yield "near", name, *shown, f"margin {margin:g}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs=2, type=Path, metavar="FILE")
    here, there = map(read, parser.parse_args().files)
    claims = {(p.id, c.id): c for p in load_catalog().papers.values() for c in p.claims}
    margins = {key: getattr(claim, "margin", None) or 0.0 for key, claim in claims.items()}
    rows = list(findings(here, there, margins))
    moved, n_both = sum(row[0] == "moved" for row in rows), len(here.keys() & there.keys() & margins.keys())
    lines = ["  ".join(row) for row in rows]
    sys.stdout.write(
        "\n".join([*lines, f"{n_both} claims in both: {moved} moved, {len(rows) - moved} near\n"])
    )
    return int(moved > 0)


if __name__ == "__main__":
    raise SystemExit(main())
