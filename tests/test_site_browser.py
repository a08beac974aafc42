"""The site in a real browser: a reader's walk at two widths, in two colour schemes, with and without JavaScript.

Needs Playwright and a Chromium; `.ci/run` installs both. No request may leave the machine.
"""

# ruff: noqa: E402 -- what is missing is said before it is imported
from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

for needed in ("mkdocs", "material", "altair", "axe_playwright_python"):
    pytest.importorskip(needed, reason='needs the extra "site": pip install -e ".[site]"')
api = pytest.importorskip("playwright.sync_api", reason='needs the extra "site": pip install -e ".[site]"')

from axe_playwright_python.sync_playwright import Axe

from requant.catalog.entry import IndependentResult, Paper, Source, Venue, reported
from requant.catalog.loader import load_catalog
from requant.catalog.render import builder

CHROMIUM = os.environ.get("REQUANT_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
KINDS = [
    "index.html", "papers/index.html", "papers/gptq.html", "papers/evil.html", "charts.html", "disagreements.html",
    "others.html",
    "tags/index.html", "tags/weight-only.html", "venues/index.html", "venues/iclr.html", "protocols/index.html",
    "protocols/gptq-wikitext2-2048/1.html", "reference-model.html", "kernels.html", "contributing.html", "about.html",
    "404.html",
]  # fmt: skip
EVIL = "</title><script>window.hit=1</script><img src=x onerror=window.hit=1> [a](javascript:window.hit=1) {{ 7*7 }}"
URL = "javascript:window.hit=1"


def evil_entry(base: Paper) -> Paper:
    """An entry whose texts and addresses are attacks."""
    claims = tuple(
        replace(claim, statement=EVIL, note=EVIL, source=Source(where=EVIL, seen_at=URL, evidence="recalled"))
        for claim in base.claims[:3]
    )
    return replace(
        base, id="evil", title=EVIL, authors=(EVIL,), summary=EVIL, tags=(EVIL, "weight-only"), claims=claims,
        venue=Venue(name="ICLR", year=2024, track=EVIL, url=URL), related=(), impl=None, method=None,
        independent_results=(IndependentResult(claim=base.claims[0].id, value=EVIL, note=EVIL, url=URL),),
    )  # fmt: skip


def _shortened(paper: Paper) -> Paper:
    """The entry with three published numbers and what runs on the reference model."""
    published = [claim for claim in paper.claims if not claim.runs_on_reference][:3]
    claims = (*published, *(claim for claim in paper.claims if claim.runs_on_reference))
    kept = {claim.id for claim in claims} | {None}
    others = tuple(row for row in paper.independent_results if row.claim in kept)
    return replace(paper, claims=claims, independent_results=others)


def _ledger(folder: Path, paper: Paper) -> None:
    """Verdicts of all three states."""
    records = []
    for index, claim in enumerate(claim for claim in paper.claims if claim.runs_on_reference):
        measured = {name: 3.0 + index for name in claim.order} if claim.kind == "ordering" else 0.5
        state = "contradicted" if index == 1 else "reproduced"
        records.append(
            {
                "claim": claim.id,
                "reported": reported(claim),
                "measured": measured,
                "state": state,
                "reason": "",
            }
        )
    folder.mkdir()
    (folder / f"{paper.id}.json").write_text(json.dumps({"paper": paper.id, "claims": records}))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small site with verdicts of every state and a hostile entry."""
    folder = tmp_path_factory.mktemp("site")
    catalog = load_catalog()
    names = [name for name in ("awq", "gptq", "rtn", "smoothquant", "quip") if name in catalog.papers]
    papers = {name: _shortened(catalog.papers[name]) for name in names}
    papers["evil"] = evil_entry(papers["gptq"])
    _ledger(folder / "measured", papers["gptq"])
    vocab = replace(catalog.vocab, independent=catalog.vocab.independent[:10])
    small = replace(catalog, papers=MappingProxyType(papers), errors=(), vocab=vocab)
    return builder.build(small, measured=folder / "measured", out=folder)


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield found
        found.close()


@pytest.fixture
def visit(browser, address: str) -> Iterator[Callable]:
    """Opens a page; at the end, no script may have failed and nothing may have left the machine."""
    contexts, problems = [], []

    def watch(message) -> None:
        if message.type in ("error", "warning"):
            problems.append(f"console: {message.text}")

    def opened(path: str, size: str = "desktop", scheme: str = "light", script: bool = True, root: str = ""):
        context = browser.new_context(
            viewport=SIZES[size], color_scheme=scheme, java_script_enabled=script,
            permissions=["clipboard-read", "clipboard-write"] if not root else [],
        )  # fmt: skip
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", watch)
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("request", lambda request: left(request.url))
        page.goto((root or address) + path)
        return page

    def left(url: str) -> None:
        if not url.startswith((address, "file:", "data:")):
            problems.append(f"request to {url}")

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def _shown(page) -> list[str]:
    script = (
        "rows => rows.filter(r => !r.hidden).map(r => r.querySelector('a').getAttribute('href').slice(0, -5))"
    )
    return page.eval_on_selector_all("#rq-papers tbody tr", script)


@pytest.mark.parametrize("size", SIZES)
def test_a_reader_filters_sorts_follows_an_entry_and_copies_bibtex(visit: Callable, size: str) -> None:
    page = visit("index.html", size)
    page.locator(".rq-links a", has_text="All papers").click()
    page.wait_for_url("**/papers/index.html")
    everything = _shown(page)
    assert len(everything) > 1
    page.get_by_label("Tag").select_option("weight-only")
    page.get_by_label("Text").fill("frantar")
    assert _shown(page) == ["gptq"]
    assert "1 of" in page.locator("#rq-count").inner_text()
    assert "tag=weight-only" in page.url
    assert "text=frantar" in page.url
    page.reload()
    assert _shown(page) == ["gptq"]
    page.get_by_role("button", name="Clear filters").click()
    api.expect(page).to_have_url(re.compile(r"index\.html$"))
    assert _shown(page) == everything
    page.get_by_role("button", name="Year", exact=True).click()
    page.get_by_role("button", name="Year", exact=True).click()
    years = page.eval_on_selector_all(
        "#rq-papers tbody td:nth-child(3)", "cells => cells.map(c => Number(c.textContent))"
    )
    assert years == sorted(years, reverse=True)
    assert "sort=-year" in page.url
    page.get_by_role("link", name=re.compile("^GPTQ")).click()
    page.wait_for_url("**/papers/gptq.html")
    assert page.locator("h1").inner_text().startswith("GPTQ")
    page.locator("#bibtex ~ .rq pre").first.hover()
    page.locator("#bibtex ~ .rq pre button, #bibtex ~ .rq pre .md-code__button").first.click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("@inproceedings{gptq")


def test_filters_work_together_and_the_address_restores_them(visit: Callable) -> None:
    page = visit("papers/index.html?state=reproduced&sort=-reproduced")
    assert _shown(page) == ["gptq"]
    assert page.locator('th[aria-sort="descending"]').inner_text().startswith("Reproduced")
    page.get_by_label("State").select_option("no-implementation")
    assert _shown(page) == ["evil"]
    page.get_by_label("State").select_option("")
    page.get_by_label("Quantized").select_option("activations")
    assert "smoothquant" in _shown(page)
    assert "gptq" not in _shown(page)
    page.goto(page.url.split("?")[0] + "?tag=no-such-tag&venue=nowhere&sort=nothing")
    assert len(_shown(page)) == page.locator("#rq-papers tbody tr").count()


def test_the_colour_scheme_follows_the_system_and_the_reader(visit: Callable) -> None:
    page = visit("papers/gptq.html", scheme="dark")
    assert page.locator("body").get_attribute("data-md-color-scheme") == "slate"
    page = visit("charts.html")
    assert page.locator("body").get_attribute("data-md-color-scheme") == "default"
    page.locator("label[title='Switch to dark mode']").click()
    assert page.locator("body").get_attribute("data-md-color-scheme") == "slate"
    assert page.locator(".rq-chart img[src$='#only-dark']").first.is_visible()
    assert not page.locator(".rq-chart img[src$='#only-light']").first.is_visible()
    page.reload()
    assert page.locator("body").get_attribute("data-md-color-scheme") == "slate"


@pytest.mark.parametrize("size", SIZES)
def test_everything_reads_without_javascript(visit: Callable, size: str) -> None:
    page = visit("papers/index.html", size, script=False)
    assert not page.locator("#rq-filters").is_visible()
    page.get_by_role("link", name=re.compile("^GPTQ")).click()
    page.wait_for_url("**/papers/gptq.html")
    for text in (
        "Reported",
        "31.12",
        "not run",
        "reproduced",
        "contradicted",
        "requant run gptq",
        "@inproceedings{gptq",
    ):
        assert text in page.locator("article").text_content()
    page.goto(page.url.replace("papers/gptq.html", "charts.html"))
    assert page.locator(".rq-chart img").first.is_visible()
    assert page.locator(".rq-data table").first.text_content()


@pytest.mark.parametrize("size", SIZES)
def test_no_page_is_wider_than_the_screen(visit: Callable, address: str, size: str) -> None:
    page = visit("index.html", size)
    for path in KINDS:
        page.goto(address + path)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", KINDS, ids=lambda path: path.replace("papers", "entries"))
def test_axe_finds_nothing_serious(visit: Callable, path: str, scheme: str) -> None:
    page = visit(path, scheme=scheme)
    found = Axe().run(page).response["violations"]
    serious = [
        (item["id"], [node["html"][:150] for node in item["nodes"][:3]])
        for item in found
        if item["impact"] in ("serious", "critical")
    ]
    assert serious == []


def test_the_hostile_entry_runs_nothing_anywhere(visit: Callable, address: str) -> None:
    page = visit("papers/evil.html")
    assert page.locator("h1").inner_text() == EVIL
    for path in (
        "index.html",
        "papers/index.html",
        "papers/evil.html",
        "tags/weight-only.html",
        "disagreements.html",
    ):
        page.goto(address + path)
        assert page.evaluate("window.hit") is None, path
        assert page.locator("a[href^='javascript' i]").count() == 0, path
    page.goto(address + "index.html")
    page.keyboard.press("/")
    page.keyboard.type("onerror", delay=20)
    page.locator(".md-search-result__item").first.wait_for()
    page.wait_for_timeout(200)
    assert page.evaluate("window.hit") is None


def test_the_search_finds_an_entry(visit: Callable) -> None:
    page = visit("index.html")
    page.keyboard.press("/")
    page.keyboard.type("smoothquant", delay=20)
    result = page.locator(".md-search-result__item").first
    result.wait_for()
    assert "SmoothQuant" in result.inner_text()


def test_pages_open_from_a_folder_without_a_server(visit: Callable, site: Path) -> None:
    page = visit("papers/index.html", root=f"{site.as_uri()}/")
    page.get_by_label("Text").fill("gptq")
    assert "gptq" in _shown(page)
    page.get_by_role("link", name=re.compile("^GPTQ")).click()
    page.wait_for_url("**/papers/gptq.html")
    page.keyboard.press("/")
    page.keyboard.type("smoothquant", delay=20)
    page.locator(".md-search-result__item").first.wait_for()


def test_a_thousand_rows_filter_in_a_tenth_of_a_second(visit: Callable, site: Path) -> None:
    text = (site / "papers/index.html").read_text()
    head, rows, tail = re.fullmatch(r"(.*<tbody>)(.*)(</tbody>.*)", text, re.DOTALL).groups()
    n = rows.count("<tr ")
    (site / "papers/thousand.html").write_text(head + rows * (1000 // n + 1) + tail)
    page = visit("papers/thousand.html")
    (site / "papers/thousand.html").unlink()
    assert page.locator("#rq-papers tbody tr").count() >= 1000
    took = page.evaluate(
        """async () => {
          const input = document.querySelector("#rq-filters [name=text]"), times = [];
          for (const word of ["g", "gp", "gpt", "gptq", "gpt", "", "hessian", ""]) {
            input.value = word;
            const began = performance.now();
            input.dispatchEvent(new Event("input", {bubbles: true}));
            document.body.offsetHeight; // the new layout, too
            times.push(performance.now() - began);
            await new Promise(done => setTimeout(done, 0));
          }
          return times.sort((a, b) => a - b)[Math.floor(times.length / 2)];
        }"""
    )
    assert took < 100, f"{took:.0f} ms"
    page.wait_for_function(  # rows off the screen may appear later
        "() => !document.querySelector('#rq-papers tbody tr[hidden]')"
    )
