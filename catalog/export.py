"""The catalog for other programs: BibTeX, CSV, and the JSON documents of the API.

`verdicts` everywhere is the ledger: for each entry its saved records by claim id (see `saved_verdicts`).
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pybtex.database import BibliographyData, Entry, Person

from requant.catalog import ledger
from requant.catalog.bits import effective_bits
from requant.catalog.entry import NO_IMPLEMENTATION, Claim, FindingClaim, MeasuredClaim, Paper, as_plain
from requant.catalog.files import write_atomic
from requant.catalog.loader import Catalog
from requant.catalog.vocabulary import Vocab

API_VERSION = 1
NOT_MEASURED = "not measured yet"
Verdicts = Mapping[str, Mapping[str, Mapping[str, Any]]]
_JOURNALS = frozenset(("JMLR", "TMLR"))
_BRACES = str.maketrans({"{": r"\textbraceleft", "}": r"\textbraceright"})
CSV_COLUMNS = (
    "entry", "claim", "kind", "statement", "model", "dataset", "protocol", "metric", "value", "effective_bits",
    "bits_known", "setting", "baselines", "source", "seen_at", "evidence", "state", "reason", "measured",
)  # fmt: skip


def saved_verdicts(papers: Iterable[Paper], folder: Path | None = None) -> dict[str, dict[str, dict]]:
    """The ledger of every entry. Raises: LedgerError naming a file that cannot be read."""
    return {paper.id: ledger.read(paper.id, folder) for paper in papers}


def verdict(paper: Paper, claim: Claim, verdicts: Verdicts) -> dict[str, Any]:
    """State, reason, measured value and circumstances of a claim; `not run` with its reason without a record."""
    record = verdicts.get(paper.id, {}).get(claim.id)
    if record is None:
        reason = NO_IMPLEMENTATION if paper.impl is None else NOT_MEASURED
        return {
            "state": "not run",
            "reason": reason,
            "measured": None,
            "expected": claim.expected is not None,
        }
    kept = ("state", "reason", "measured", "expected", "seconds", "details", "environment")
    return {key: record[key] for key in kept if key in record}


# --- BibTeX


def bibtex(papers: Iterable[Paper]) -> str:
    """All entries that were published, as one BibTeX file; the ids are the keys."""
    entries = {paper.id: _bib_entry(paper) for paper in papers if paper.venue is not None}
    return BibliographyData(entries=entries).to_string("bibtex") if entries else ""


def bibtex_entry(paper: Paper) -> str:
    """One entry as BibTeX, or an empty text for a baseline that nobody published."""
    return bibtex([paper])


def _bib_entry(paper: Paper) -> Entry:
    venue, ids = paper.venue, paper.ids
    fields = {"title": "{" + _tex(paper.title) + "}", "year": str(venue.year)}
    if venue.name == "arXiv":
        kind = "misc"
    elif venue.name in _JOURNALS:
        kind, fields["journal"] = "article", _tex(venue.name)
    else:
        kind, fields["booktitle"] = "inproceedings", _tex(venue.name)
    if ids.arxiv:
        fields |= {"eprint": ids.arxiv, "archiveprefix": "arXiv"}
    if ids.doi:
        fields["doi"] = ids.doi
    url = venue.url or (f"https://arxiv.org/abs/{ids.arxiv}" if ids.arxiv else None)
    if url:
        fields["url"] = url
    people = [Person("{" + _tex(name) + "}") if "," in name else Person(_tex(name)) for name in paper.authors]
    return Entry(kind, fields=fields, persons={"author": people})


def _tex(text: str) -> str:
    """Braces would have to balance; pybtex escapes everything else."""
    return text.translate(_BRACES)


# --- JSON


def paper_document(paper: Paper, vocab: Vocab, verdicts: Verdicts) -> dict[str, Any]:
    """Everything about one entry as plain JSON data (schema/api_entry.schema.json)."""
    plain = as_plain(paper)
    plain["claims"] = [_claim_document(paper, claim, vocab, verdicts) for claim in paper.claims]
    return {"api": API_VERSION, **plain, "bibtex": bibtex_entry(paper)}


def _claim_document(paper: Paper, claim: Claim, vocab: Vocab, verdicts: Verdicts) -> dict[str, Any]:
    plain = {key: value for key, value in as_plain(claim).items() if value is not None}
    if isinstance(claim, MeasuredClaim | FindingClaim):
        bits = effective_bits(paper, claim, vocab.models)
        plain["bits"] = None if bits is None else {"value": bits[0], "known": bits[1]}
    plain["calibrated_on_test_corpus"] = vocab.leaks(claim)
    others = [as_plain(item) for item in paper.independent_results if item.claim == claim.id]
    return {**plain, "independent": others, "verdict": verdict(paper, claim, verdicts)}


def index_document(papers: Iterable[Paper], verdicts: Verdicts) -> dict[str, Any]:
    """The list of entries with what a table needs (schema/api_index.schema.json)."""
    rows = []
    for paper in papers:
        states: dict[str, int] = {}
        for claim in paper.claims:
            state = verdict(paper, claim, verdicts)["state"]
            states[state] = states.get(state, 0) + 1
        rows.append(
            {
                "id": paper.id, "title": paper.title, "authors": list(paper.authors), "kind": paper.kind,
                "venue": as_plain(paper.venue), "ids": as_plain(paper.ids), "tags": list(paper.tags),
                "impl": paper.impl, "planned": paper.planned, "seed_row": paper.seed_row,
                "n_claims": len(paper.claims), "states": dict(sorted(states.items())),
                "document": f"entries/{paper.id}.json",
            }
        )  # fmt: skip
    return {"api": API_VERSION, "entries": rows}


# --- CSV


def claims_csv(papers: Iterable[Paper], vocab: Vocab, verdicts: Verdicts) -> str:
    """One line a claim, columns CSV_COLUMNS; cells that a spreadsheet would run as a formula are quoted."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for paper in papers:
        for claim in paper.claims:
            row = _row(paper, claim, vocab, verdicts)
            writer.writerow({key: _cell(value) for key, value in row.items()})
    return text.getvalue()


def _row(paper: Paper, claim: Claim, vocab: Vocab, verdicts: Verdicts) -> dict[str, Any]:
    found = verdict(paper, claim, verdicts)
    weighed = isinstance(claim, MeasuredClaim | FindingClaim)
    bits = effective_bits(paper, claim, vocab.models) if weighed else None
    direct = ("kind", "statement", "model", "dataset", "protocol", "metric", "value")
    return {
        "entry": paper.id, "claim": claim.id, **{key: getattr(claim, key, None) for key in direct},
        "effective_bits": bits and bits[0], "bits_known": bits and bits[1],
        "setting": _pairs(getattr(claim, "setting", {})), "baselines": _pairs(_numbers(claim)),
        "source": claim.source.where, "seen_at": claim.source.seen_at, "evidence": claim.source.evidence,
        "state": found["state"], "reason": found["reason"], "measured": _pairs(found["measured"]),
    }  # fmt: skip


def _numbers(claim: Claim) -> Mapping[str, Any]:
    """The baselines that are numbers; those of orderings are runs."""
    return claim.baselines if isinstance(claim, MeasuredClaim | FindingClaim) else {}


def _pairs(value: Any) -> Any:
    return "; ".join(f"{key}={item}" for key, item in value.items()) if isinstance(value, Mapping) else value


def _cell(value: Any) -> Any:
    risky = isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r")
    return f"'{value}" if risky else value


# --- files


def write_export(form: str, catalog: Catalog, out: Path | None) -> list[Path]:
    """Write one form of the catalog to `out`, or print it; returns the files written."""
    papers = list(catalog.papers.values())
    verdicts = saved_verdicts(papers)
    if form != "json":
        text = bibtex(papers) if form == "bibtex" else claims_csv(papers, catalog.vocab, verdicts)
        return _deliver({"": text}, out)
    documents = {"index.json": index_document(papers, verdicts)}
    documents |= {
        f"entries/{paper.id}.json": paper_document(paper, catalog.vocab, verdicts) for paper in papers
    }
    if out is None:
        return _deliver({"": _json([*documents.values()][1:])}, None)
    return _deliver({name: _json(document) for name, document in documents.items()}, out)


def _json(document: object) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _deliver(texts: Mapping[str, str], out: Path | None) -> list[Path]:
    if out is None:
        sys.stdout.write("".join(texts.values()))
        return []
    paths = []
    for name, text in texts.items():
        path = out / name if name else out
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
        paths.append(path)
    return paths
