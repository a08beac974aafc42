"""The page of one entry."""

from __future__ import annotations

from collections.abc import Iterator

from requant.catalog.checks import EVIDENCE
from requant.catalog.entry import Paper
from requant.catalog.export import bibtex_entry
from requant.catalog.render.content import Content
from requant.catalog.render.escape import number
from requant.catalog.render.page import Page, heading, html
from requant.catalog.render.sources import module_source
from requant.catalog.render.view import PaperView

ROOT = "../"


def entry_page(view: PaperView, content: Content) -> Page:
    """Everything about one entry: claims first, then what explains and repeats them."""
    paper = view.paper
    return Page(
        path=f"papers/{paper.id}",
        title=paper.title,
        description=paper.summary,
        parts=tuple(_parts(view, content)),
        meta={"card": f"cards/{paper.id}.png"},
    )


def external_links(paper: Paper) -> list[tuple[str, str]]:
    """Where the publication can be read, by name."""
    ids = paper.ids
    return [
        (name, url)
        for name, url in (
            ("arXiv " + (ids.arxiv or ""), f"https://arxiv.org/abs/{ids.arxiv}" if ids.arxiv else None),
            ("OpenReview", f"https://openreview.net/forum?id={ids.openreview}" if ids.openreview else None),
            ("ACL Anthology", f"https://aclanthology.org/{ids.acl}/" if ids.acl else None),
            ("DOI", f"https://doi.org/{ids.doi}" if ids.doi else None),
            ("venue", paper.venue.url if paper.venue else None),
        )
        if url
    ]


def _parts(view: PaperView, content: Content) -> Iterator[str]:
    paper, method, titles = view.paper, view.paper.method, content.titles
    yield html("entry_head.html", ROOT, view=view, paper=paper, links=external_links(paper), titles=titles)
    yield heading("Claims", "claims")
    sets = dict.fromkeys(claim.calibration for claim in view.claims if claim.calibration)
    used = [content.vocab.calibrations[name] for name in sets]
    yield html("entry_claims.html", ROOT, view=view, groups=view.groups, calibrations=used)
    if view.others:
        yield heading("Other measurements by others", "others")
        yield html("entry_others.html", others=view.others)
    if method:
        yield heading("Method", "method")
        yield html("entry_method.html", view=view, method=method, hyperparameters=_defaults(view))
        if method.pitfalls:
            yield heading("Pitfalls", "pitfalls")
            yield html("entry_lists.html", items=method.pitfalls)
        if method.paper_vs_code:
            yield heading("Text against code", "text-against-code")
            yield html("entry_code_differences.html", rows=method.paper_vs_code)
    yield from _implementation(paper, content)
    if paper.corrections:
        yield heading("Corrections", "corrections")
        yield html("entry_corrections.html", rows=paper.corrections)
    if bibtex := bibtex_entry(paper):
        yield heading("BibTeX", "bibtex")
        yield html("entry_bibtex.html", ROOT, paper=paper, bibtex=bibtex)
    if paper.related or paper.superseded_by or view.supersedes:
        yield heading("Related", "related")
        yield html("entry_related.html", view=view, paper=paper, titles=titles)


def _implementation(paper: Paper, content: Content) -> Iterator[str]:
    source = module_source(content.impls / f"{paper.impl}.py") if paper.impl else None
    if source is None:
        return
    yield heading("Implementation", "implementation")
    borrowed = content.titles.get(paper.impl) if paper.impl != paper.id else None
    yield html(
        "entry_code.html",
        paper=paper,
        module=paper.impl,
        borrowed=borrowed,
        docstring=source.docstring,
        source=source.html,
        lines=source.lines,
        evidence=module_source(content.impls / EVIDENCE / f"{paper.impl}.py", colours=False),
    )


def _defaults(view: PaperView) -> list[tuple[str, str]]:
    def text(value: object) -> str:
        return ", ".join(map(number, value)) if isinstance(value, tuple) else number(value)

    return [(name, text(value)) for name, value in view.paper.method.hyperparameters.items()]
