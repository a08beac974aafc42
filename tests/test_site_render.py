"""Rendering without a site builder: one escape path, honest states, the same bytes for the same input."""

from __future__ import annotations

import html.parser
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType
from xml.etree import ElementTree as ET

import pytest

pytest.importorskip("jinja2", reason='needs the extra "site": pip install -e ".[site]"')
pytest.importorskip("altair", reason='needs the extra "site": pip install -e ".[site]"')

from requant.catalog.entry import (
    Code,
    Correction,
    Difference,
    Ids,
    IndependentResult,
    Method,
    Paper,
    Source,
    Venue,
    reported,
)
from requant.catalog.loader import load_catalog
from requant.catalog.render.content import Content, prepare
from requant.catalog.render.escape import clean, embed, environment, number, plain, safe_url, slug
from requant.catalog.render.feeds import feed, llms_txt
from requant.catalog.render.page import heading
from requant.catalog.render.pages import all_pages
from requant.catalog.render.site import draw_charts, files
from requant.catalog.render.verdicts import OUTDATED
from requant.catalog.render.view import paper_view

SITE_URL = "https://requant.example/"
EVIL = (
    "</title><script>window.hit=1</script><img src=x onerror=window.hit=1>\"'&lt;b&gt; "
    "[x](javascript:window.hit=1) `code` **bold** {{ 7*7 }} {% raw %} \u202e\u0000\n\n"
    "```html\n<script>window.hit=1</script>\n```\n\n# heading\n\n[TOC]\n"
    '--8<-- "x"\n<!-- --> ]]> </div></pre></table> {: onclick=x } &#x3c;script&#x3e;'
)
URL = "javascript:window.hit=1//https://x.example/"


def evil_entry(base: Paper) -> Paper:
    """An entry that no loader would accept: every text is an attack, every address a script."""
    claims = tuple(
        replace(claim, statement=EVIL, note=EVIL, source=Source(where=EVIL, seen_at=URL, evidence="recalled"))
        for claim in base.claims
    )
    others = [
        IndependentResult(claim=base.claims[0].id, value=EVIL, cause=EVIL, note=EVIL, url=URL, seen_at=EVIL)
    ]
    others.append(IndependentResult(claim=None, about=EVIL, value=1.0, note=EVIL, url=URL))
    return replace(
        base,
        id="evil", title=EVIL, authors=(EVIL, "A. Nobody"), summary=EVIL, tags=(EVIL, *base.tags), claims=claims,
        venue=Venue(name=EVIL, year=2024, track=EVIL, url=URL),
        ids=Ids(arxiv=None, openreview=EVIL, acl=None, doi=EVIL),
        code=Code(url=URL, license=EVIL, commit=EVIL, official=True),
        method=Method(
            requires=(EVIL,), bits=EVIL, hyperparameters=MappingProxyType({EVIL: EVIL}), pitfalls=(EVIL,),
            paper_vs_code=(Difference(paper=EVIL, code=EVIL, we=EVIL),),
        ),
        corrections=(Correction(field=EVIL, seed=EVIL, correct=EVIL, note=EVIL),),
        independent_results=tuple(others), impl=None, related=(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def content() -> Content:
    """Three entries of the catalog and the hostile one."""
    catalog = load_catalog(ids={"rtn", "gptq", "awq"})
    if catalog.errors:
        pytest.fail(f"entries this test uses are wrong: {catalog.errors[0]}")
    papers = {**catalog.papers, "evil": evil_entry(catalog.papers["gptq"])}
    return prepare(replace(catalog, papers=MappingProxyType(papers)))


class Elements(html.parser.HTMLParser):
    """Tags, attributes and text of a piece of HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def inert(text: str) -> Iterator[str]:
    """What in the HTML could run or leave the page; nothing, if all is well."""
    for tag, attributes in Elements(text).found:
        if (
            tag in ("script", "iframe", "object", "embed", "style", "base", "form")
            and attributes.get("id") != "rq-filters"
        ):
            yield f"<{tag}>"
        for name, value in attributes.items():
            if name.startswith("on") or name == "style":
                yield f"{tag} {name}"
            if name in ("href", "src", "action") and re.match(
                r"\s*(javascript|data|vbscript):", value or "", re.I
            ):
                yield f"{tag} {name}={value}"


def test_a_hostile_entry_is_rendered_inert(content: Content) -> None:
    markdown = pytest.importorskip("markdown")
    for page in all_pages(content, {}):
        text = page.markdown().split("---\n", 2)[2]
        shown = markdown.markdown(text, extensions=["attr_list", "tables", "toc"])
        assert list(inert(shown)) == [], page.path
        assert shown.count("<h1") == 1, page.path
        ids = [attributes["id"] for _, attributes in Elements(shown).found if "id" in attributes]
        assert len(ids) == len(set(ids)), f"{page.path}: an id occurs twice"


def test_the_text_of_a_hostile_entry_is_still_there(content: Content) -> None:
    page = next(page for page in all_pages(content, {}) if page.path == "papers/evil")
    shown = "".join(Elements(page.markdown()).text)
    for part in (
        "</title><script>window.hit=1</script>",
        "**bold**",
        "{{ 7*7 }}",
        "[x](javascript:window.hit=1)",
    ):
        assert part in shown


def test_the_page_head_holds_no_markup(content: Content) -> None:
    page = next(page for page in all_pages(content, {}) if page.path == "papers/evil")
    head = page.markdown().split("---\n", 2)[1]
    assert not re.search(r"[<>&{}]", head.replace("hide:", "").replace('"', ""))
    assert json.loads(head.splitlines()[0].removeprefix("title: "))


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("https://arxiv.org/abs/2210.17323", True), ("http://x.example:80/a?b#c", True),
        ("javascript:alert(1)", False), ("JaVaScRiPt:alert(1)", False), ("java\nscript:alert(1)", False),
        ("data:text/html,x", False), ("//x.example/", False), ("https://", False), ("https://user@x.example/", False),
        (" https://x.example/", False), ("https://x.example/\u202e", False), ("https://[x/", False), ("", False),
        (None, False), ("tags/x.html", False),
    ],
)  # fmt: skip
def test_only_plain_web_addresses_become_links(url: str | None, allowed: bool) -> None:
    assert (safe_url(url) is not None) is allowed


def test_html_is_folded_onto_one_line_and_code_keeps_its_lines() -> None:
    assert embed("<p>a\n   b</p>\n<pre><code>x\n\n  y</code></pre>") == (
        '<div class="rq"><p>a b</p> <pre><code>x&#10;&#10;  y</code></pre></div>'
    )


def test_every_template_escapes_and_misses_no_name() -> None:
    found = environment().from_string("{{ a }}|{{ b }}").render(a="<b>\u0000\u202e", b=None)
    assert found == "&lt;b&gt;|"
    with pytest.raises(Exception, match="undefined"):
        environment().from_string("{{ nothing }}").render()


def test_a_page_shows_the_method_and_its_evidence(content: Content) -> None:
    shown = {page.path: page.markdown() for page in all_pages(content, {})}
    pages = {name: shown[f"papers/{name}"] for name in ("awq", "rtn")}
    assert all("Source of the implementation" in page for page in pages.values())
    assert "reference_impls/evidence/awq.py" in pages["awq"] and "salient_channels" in pages["awq"]
    assert "Source of the evidence" in pages["awq"] and "Source of the evidence" not in pages["rtn"]


def test_plain_text_and_slugs() -> None:
    assert plain('a <b> & "c"\n d') == "a \u2039b\u203a \uff06 \u201dc\u201d d"
    assert len(plain("x" * 500, 100)) == 100
    assert slug("Findings of ACL") == "findings-of-acl"
    assert slug("<>") == "x"
    assert clean("a\x00b\u2028c") == "ab\nc"
    with pytest.raises(ValueError, match="not a fixed heading"):
        heading("<b>", "b")


def test_without_a_ledger_every_claim_says_why_it_was_not_run(content: Content) -> None:
    bare = prepare(load_catalog(ids={"rtn", "gptq", "awq"}), measured=content.card.parent / "nowhere")
    for view in bare.views.values():
        for claim in view.claims:
            assert claim.verdict.state == "not run"
            assert claim.verdict.reason


def _ledger(tmp_path, name: str, claims: list[dict]) -> None:
    (tmp_path / f"{name}.json").write_text(json.dumps({"paper": name, "claims": claims}))


def test_the_ledger_decides_the_state_and_a_changed_claim_counts_as_not_run(tmp_path) -> None:
    catalog = load_catalog(ids={"gptq"})
    first, second = catalog.papers["gptq"].claims[:2]
    stamp = {"date": "2026-11-01", "commit": "0" * 40, "device": "cpu", "versions": {"torch": "2.13.0"}}
    record = {
        "state": "reproduced",
        "reason": "unquantized 27.66",
        "measured": 31.2,
        "environment": stamp,
        "details": {"kl": 0.1},
    }
    _ledger(
        tmp_path,
        "gptq",
        [
            {**record, "claim": first.id, "reported": reported(first)},
            {**record, "claim": second.id, "reported": "something else"},
        ],
    )
    found = prepare(catalog, measured=tmp_path)
    views = found.views["gptq"].claims
    assert (views[0].verdict.state, views[0].verdict.measured) == ("reproduced", 31.2)
    assert views[0].facts == (("kl", "0.1"),)
    assert ("date", "2026-11-01") in found.views["gptq"].runs[views[0].run - 1]
    assert (views[1].verdict.state, views[1].verdict.reason, views[1].verdict.measured) == (
        "not run",
        OUTDATED,
        None,
    )
    assert found.counts()["reproduced"] == 1
    entries = ET.fromstring(feed(found, SITE_URL).encode()).findall("{http://www.w3.org/2005/Atom}entry")
    assert entries[0].find("{http://www.w3.org/2005/Atom}updated").text == "2026-11-01T00:00:00Z"


def test_the_site_says_of_a_claim_what_the_terminal_says() -> None:
    from requant.catalog import claims

    catalog = load_catalog()
    for entry in catalog.papers.values():
        for shown in paper_view(entry, catalog.vocab, {}, ()).claims:
            assert shown.reported == number(claims.reported(shown.claim))


def test_the_same_input_gives_the_same_bytes(content: Content) -> None:
    first, second = (dict(files(content, SITE_URL, cards=False)) for _ in range(2))
    assert first == second


def test_a_hollow_mark_is_a_number_nobody_has_seen() -> None:
    charts = draw_charts(prepare(load_catalog()))
    assert charts
    for chart in charts.values():
        assert chart.light.startswith("<svg")
        assert "<script" not in chart.light
        assert ("fill-opacity" in chart.light) or all(row.seen for row in chart.points)


def test_feed_and_index_for_language_models(content: Content) -> None:
    root = ET.fromstring(feed(content, SITE_URL).encode())
    assert root.tag == "{http://www.w3.org/2005/Atom}feed"
    assert all(item.text for item in root.iter("{http://www.w3.org/2005/Atom}id"))
    lines = llms_txt(content, SITE_URL).splitlines()
    assert sum(line.startswith("- [") for line in lines) == 2 + len(content.views)
    assert not any("<script>" in line for line in lines)
