"""The Atom feed of verdicts and entries, llms.txt, and the files of the JSON API."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from xml.etree import ElementTree as ET

from requant.catalog.charts import Point
from requant.catalog.consistency import disagreements
from requant.catalog.entry import Paper, as_plain
from requant.catalog.export import bibtex, bibtex_entry, claims_csv, index_document, paper_document
from requant.catalog.render.content import Content
from requant.catalog.render.escape import clean, number

ATOM = "http://www.w3.org/2005/Atom"
MAX_ITEMS = 100
_EPOCH = "1970-01-01"


def api_files(content: Content) -> Iterator[tuple[str, str]]:
    """Path and text of the JSON documents, the BibTeX files and the CSV."""
    papers = [view.paper for view in content.views.values()]
    yield "api/v1/index.json", _json(index_document(papers, content.ledger))
    for paper in papers:
        yield f"api/v1/entries/{paper.id}.json", _json(paper_document(paper, content.vocab, content.ledger))
        if text := bibtex_entry(paper):
            yield f"papers/{paper.id}.bib", text
    yield "api/v1/claims.csv", claims_csv(papers, content.vocab, content.ledger)
    yield "requant.bib", bibtex(papers)
    yield "api/v1/disagreements.json", _json([as_plain(item) for item in disagreements(papers)])


def chart_csv(points: Iterable[Point]) -> str:
    """The numbers of a chart, one line a point."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [item.name for item in fields(Point)]
    writer.writerow(names)
    for point in points:
        cells = (getattr(point, name) for name in names)
        writer.writerow(
            f"'{cell}" if isinstance(cell, str) and cell[:1] in tuple("=+-@") else cell for cell in cells
        )
    return text.getvalue()


def feed(content: Content, site_url: str) -> str:
    """Verdicts by the day they were measured and entries by the month of their publication, newest first.

    The dates come from ledger and entries, so the same catalog gives the same feed.
    """
    items = sorted(
        [*_verdicts(content), *_entries(content)], key=lambda item: (item[0], item[1]), reverse=True
    )
    root = ET.Element("feed", xmlns=ATOM)
    updated = items[0][0] if items else _EPOCH
    for tag, text in (("title", "requant"), ("id", site_url), ("updated", _time(updated))):
        ET.SubElement(root, tag).text = text
    ET.SubElement(root, "link", rel="self", href=f"{site_url}feed.xml")
    ET.SubElement(ET.SubElement(root, "author"), "name").text = "The requant maintainers"
    for date, path, title, summary in items[:MAX_ITEMS]:
        item = ET.SubElement(root, "entry")
        ET.SubElement(item, "title").text = clean(title)
        ET.SubElement(item, "link", href=site_url + path)
        ET.SubElement(item, "id").text = site_url + path
        ET.SubElement(item, "updated").text = _time(date)
        ET.SubElement(item, "summary").text = clean(summary)
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def llms_txt(content: Content, site_url: str) -> str:
    """What this is and where each entry's JSON lies, for language models (llmstxt.org)."""
    lines = [
        "# requant", "",
        "> LLM-quantization papers as entries with claims: value, protocol, source, what others measured, "
        "what was measured here.", "",
        "A state is reproduced, contradicted or not run (with the reason). Numbers of different protocols are "
        "different quantities.", "",
        f"- [Index as JSON]({site_url}api/v1/index.json)", f"- [All claims as CSV]({site_url}api/v1/claims.csv)",
        "", "## Entries", "",
    ]  # fmt: skip
    for view in content.views.values():
        title = re.sub(r"([\[\]()<>\\`*_])", r"\\\1", " ".join(clean(view.paper.title).split()))
        states = ", ".join(f"{n} {name}" for name, n in view.counts.items() if n)
        lines.append(f"- [{title}]({site_url}api/v1/entries/{view.paper.id}.json): {states}")
    return "\n".join(lines) + "\n"


def _verdicts(content: Content) -> Iterator[tuple[str, str, str, str]]:
    for view in content.views.values():
        for claim in view.claims:
            date = claim.verdict.environment.get("date")
            if date and claim.verdict.state != "not run":
                measured = claim.verdict.measured
                value = number(measured) if measured is not None else "several values"
                title = f"{view.paper.id} {claim.claim.id}: {claim.verdict.state}"
                text = f"{claim.claim.statement} Reported {claim.reported}, measured {value}"
                text += f", under {claim.protocol}." if claim.protocol else "."
                yield str(date), f"papers/{view.paper.id}.html#claim-{claim.claim.id}", title, text


def _entries(content: Content) -> Iterator[tuple[str, str, str, str]]:
    for view in content.views.values():
        yield published(view.paper), f"papers/{view.paper.id}.html", view.paper.title, view.paper.summary


def published(paper: Paper) -> str:
    """First day of the month of the arXiv id, else of the year of the venue."""
    if paper.ids.arxiv:
        return f"20{paper.ids.arxiv[:2]}-{paper.ids.arxiv[2:4]}-01"
    return f"{paper.venue.year}-01-01" if paper.venue else _EPOCH


def _time(date: str) -> str:
    return f"{date}T00:00:00Z"


def _json(document: object) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
