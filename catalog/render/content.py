"""What is rendered: entries, vocabularies and ledger of one catalog, prepared once for all pages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.catalog import ledger as ledger_files
from requant.catalog.loader import Catalog
from requant.catalog.protocols import Protocol, load_protocols
from requant.catalog.render.verdicts import Ledger, current, tally
from requant.catalog.render.view import PaperView, paper_view
from requant.catalog.vocabulary import Vocab

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Content:
    """The input of every page; `views` by id, in the order of ids.

    Attributes:
        ledger: saved verdicts of claims as they stand now.
        kernels: folder of the kernels; card: Markdown of the reference model's card.
        bench: the record of the kernels' speed on a GPU, or None where there is none.
    """

    views: Mapping[str, PaperView]
    ledger: Ledger
    vocab: Vocab
    protocols: Mapping[str, Protocol]
    impls: Path
    kernels: Path
    card: Path
    bench: Mapping[str, Any] | None = None

    @property
    def titles(self) -> dict[str, str]:
        """Title of every entry by id."""
        return {name: view.paper.title for name, view in self.views.items()}

    def counts(self) -> dict[str, int]:
        """Claims by state, over all entries."""
        return tally(claim.verdict.state for view in self.views.values() for claim in view.claims)


def prepare(catalog: Catalog, measured: Path | None = None) -> Content:
    """Read the ledger of a loaded catalog and build the view of every entry.

    Raises: LedgerError for a ledger file that cannot be read.
    """
    papers = catalog.papers
    saved = {name: ledger_files.read(name, measured) for name in papers}
    ledger = current(papers.values(), saved)
    replaced: dict[str, list[str]] = {}
    for paper in papers.values():
        if paper.superseded_by:
            replaced.setdefault(paper.superseded_by, []).append(paper.id)
    views = {
        name: paper_view(paper, catalog.vocab, ledger, tuple(replaced.get(name, ())))
        for name, paper in papers.items()
    }
    return Content(
        views=views,
        ledger=ledger,
        vocab=catalog.vocab,
        protocols=load_protocols(catalog.folders.vocab / "protocols.yaml"),
        impls=catalog.folders.impls,
        kernels=ROOT / "kernels",
        card=ROOT / "catalog" / "reference" / "card.md",
        bench=_bench((measured or ledger_files.MEASURED) / "kernels.json"),
    )


def _bench(path: Path) -> Mapping[str, Any] | None:
    """What `python -m requant.kernels.bench` wrote. Raises: LedgerError for a file that is not such a record."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(record["results"], list) and isinstance(record["device"]["name"], str)):
            raise TypeError("it has no device and results")
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise ledger_files.LedgerError(f"{path} is not a record of kernel speeds: {problem}") from problem
    return record
