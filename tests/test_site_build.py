"""The built site as files: complete, linked, self-contained, small, and at addresses that never change."""

# ruff: noqa: E402 -- what is missing is said before it is imported
from __future__ import annotations

import gzip
import html.parser
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree as ET

import pytest
from typer.testing import CliRunner

for needed in ("mkdocs", "material", "altair"):
    pytest.importorskip(needed, reason='needs the extra "site": pip install -e ".[site]"')

from requant.catalog.cli import app
from requant.catalog.loader import Catalog, load_catalog
from requant.catalog.render import builder

URLS = Path(__file__).parent / "data" / "site_urls.txt"
LIMIT = 300_000  # bytes of a page
CODE = (".js", ".css", ".svg", ".png", ".json", ".xml", ".txt", ".bib", ".csv")


class Page(html.parser.HTMLParser):
    """Links, ids, scripts and loaded files of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.inline: list[str] = []
        self.policy = ""
        self._script: str | None = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if found.get("id"):
            self.ids.append(found["id"])
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("script", "img", "iframe") and found.get("src"):
            self.loaded.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon"):
            self.loaded.append(found["href"])
        if tag == "meta" and found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""
        if tag == "script" and not found.get("src") and found.get("type") != "application/json":
            self._script = ""
        self.inline += [f"{tag} {name}" for name in found if name.startswith("on") or name == "style"]

    def handle_data(self, data: str) -> None:
        if self._script is not None and data.strip():
            self.inline.append(data[:80])

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog()


@pytest.fixture(scope="module")
def site(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site, built as `requant site build` builds it."""
    return builder.build(catalog, out=tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {str(path.relative_to(site)): Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_entry_has_its_files(site: Path, catalog: Catalog) -> None:
    for name, entry in catalog.papers.items():
        wanted = [f"papers/{name}.html", f"api/v1/entries/{name}.json", f"cards/{name}.png"]
        wanted += [f"papers/{name}.bib"] if entry.venue else []
        assert [path for path in wanted if not (site / path).is_file()] == []


def test_every_claim_has_its_anchor(pages: dict[str, Page], catalog: Catalog) -> None:
    for name, entry in catalog.papers.items():
        anchors = set(pages[f"papers/{name}.html"].ids)
        assert [claim.id for claim in entry.claims if f"claim-{claim.id}" not in anchors] == []


def test_addresses_that_were_public_stay(site: Path) -> None:
    """Never remove a line of the list: an address that moves keeps a page that leads on."""
    listed = URLS.read_text().split()
    assert listed == sorted(set(listed))
    assert [url for url in listed if not (site / url).is_file()] == []


def _targets(site: Path, page: str, links: Iterator[str] | list[str]) -> Iterator[tuple[str, Path, str]]:
    for link in links:
        parts = urlsplit(link)
        if not parts.scheme and not parts.netloc:
            path = (site / page).parent / unquote(parts.path) if parts.path else site / page
            yield link, Path(path).resolve(), parts.fragment


def test_every_link_inside_the_site_leads_somewhere(site: Path, pages: dict[str, Page]) -> None:
    root, broken = site.resolve(), []
    for name, page in pages.items():
        if name == "404.html":  # its addresses begin at the root of the host
            continue
        for link, path, fragment in _targets(site, name, page.links + page.loaded):
            relative = str(path.relative_to(root)) if path.is_relative_to(root) else ""
            known = set(pages[relative].ids) if relative in pages else set()
            if not path.is_file() or (fragment and relative in pages and fragment not in known):
                broken.append((name, link))
    assert broken == []


def test_no_id_occurs_twice_on_a_page(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        assert sorted({one for one in page.ids if page.ids.count(one) > 1}) == [], name


def test_no_page_runs_inline_script_or_loads_from_elsewhere(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        assert page.inline == [], name
        assert [url for url in page.loaded if urlsplit(url).scheme or url.startswith("//")] == [], name
        assert "script-src 'self';" in page.policy, name
        assert "unsafe" not in page.policy, name


def test_vendored_files_load_nothing(site: Path) -> None:
    for path in (site / "assets").glob("*.*"):
        assert not re.search(r"(url\(|@import|import\(|src=)[\"' ]*(https?:)?//", path.read_text()), path.name


def test_pages_are_small(site: Path, pages: dict[str, Page]) -> None:
    """A page itself, and compressed with all it loads but the search index, which is read when a reader searches."""
    for name, page in pages.items():
        own = (site / name).read_bytes()
        loaded = {path for _, path, _ in _targets(site, name, page.loaded) if path.is_file()}
        sent = len(gzip.compress(own)) + sum(len(gzip.compress(path.read_bytes())) for path in loaded)
        if name != "charts.html":  # its pictures are loaded as they come into view
            assert sent < LIMIT, f"{name} takes {sent} bytes"
        assert len(own) < LIMIT, f"{name} has {len(own)} bytes"


def test_the_sitemap_lists_every_page(site: Path, pages: dict[str, Page]) -> None:
    space = "{http://www.sitemaps.org/schemas/sitemap/0.9}"
    found = {
        item.text.removeprefix(builder.DEFAULT_URL)
        for item in ET.parse(site / "sitemap.xml").iter(f"{space}loc")
    }
    assert {name for name in pages if name != "404.html"} <= {name or "index.html" for name in found}


def test_the_api_is_json_and_names_what_exists(site: Path) -> None:
    index = json.loads((site / "api/v1/index.json").read_text())
    for row in index["entries"]:
        document = json.loads((site / "api/v1" / row["document"]).read_text())
        assert (document["id"], document["title"]) == (row["id"], row["title"])


def test_a_wrong_entry_stops_the_build_and_is_named(tmp_path: Path) -> None:
    papers = tmp_path / "papers"
    papers.mkdir()
    (papers / "broken.yaml").write_text("title: x\n")
    found = CliRunner().invoke(
        app, ["site", "build", "--papers", str(papers), "--out", str(tmp_path / "build")]
    )
    assert found.exit_code == 1
    assert "broken.yaml" in found.output
    assert not (tmp_path / "build").exists()


def test_two_builds_give_the_same_bytes(catalog: Catalog, tmp_path: Path) -> None:
    few = MappingProxyType({name: catalog.papers[name] for name in ("gptq", "rtn")})
    small = Catalog(few, (), catalog.vocab, catalog.folders, catalog.files, MappingProxyType({}))
    first, second = (builder.build(small, out=tmp_path / name) for name in ("a", "b"))
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    assert [str(name) for name in names if (first / name).read_bytes() != (second / name).read_bytes()] == []
