"""How long the site takes, and how much memory, for many invented entries. Run: python tests/tools/site_scale.py 1000

The invented entries are the real ones again under other ids and titles, each with at most 15 claims.
"""

from __future__ import annotations

import gzip
import resource
import sys
import tempfile
import time
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from types import MappingProxyType

from requant.catalog.entry import Paper
from requant.catalog.loader import load_catalog
from requant.catalog.render import builder

MOST_CLAIMS = 15


def invented(paper: Paper, number: int) -> Paper:
    """The entry again, under another id and title."""
    claims = paper.claims[:MOST_CLAIMS]
    kept = {claim.id for claim in claims} | {None}
    others = tuple(row for row in paper.independent_results if row.claim in kept)
    title = f"{paper.title} ({number})"
    return replace(
        paper, id=f"{paper.id}_{number}", title=title, claims=claims, independent_results=others, related=()
    )


def main(n: int) -> None:
    """Build a site of `n` entries in a temporary folder and print what it took."""
    began = time.perf_counter()
    catalog = load_catalog()
    papers = {}
    for number, paper in enumerate(islice(cycle(catalog.papers.values()), n)):
        one = invented(paper, number)
        papers[one.id] = replace(one, superseded_by=None)
    many = replace(catalog, papers=MappingProxyType(papers), errors=())
    with tempfile.TemporaryDirectory() as folder:
        site = builder.build(many, out=Path(folder))
        pages = sorted(site.rglob("*.html"), key=lambda path: -path.stat().st_size)
        sizes = [
            (path.relative_to(site), path.stat().st_size, len(gzip.compress(path.read_bytes())))
            for path in pages[:5]
        ]
    usage = [
        resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    lines = [
        f"{n} entries, {len(pages)} pages: {time.perf_counter() - began:.0f} s, memory {usage[0]} + {usage[1]} MB"
    ]
    lines += [
        f"  {path}: {size / 1000:.0f} kB, {packed / 1000:.0f} kB compressed" for path, size, packed in sizes
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
