"""Fill a folder with everything the site builder needs: pages, API, feed, charts, cards, hand-written files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from requant.catalog.charts import pareto_points, seed_charts
from requant.catalog.render.cards import card, entry_card
from requant.catalog.render.charts import Chart, list_charts, pareto_charts
from requant.catalog.render.content import Content
from requant.catalog.render.feeds import api_files, chart_csv, feed, llms_txt
from requant.catalog.render.pages import all_pages, reference_card

MAX_CARDS = 300  # a card takes about 40 ms; larger catalogs share one


class SiteError(ValueError):
    """The site cannot be built; the message says what to do."""


def render(content: Content, out: Path, hand_written: Path, site_url: str, cards: bool = True) -> list[str]:
    """Write all files below `out`, which is emptied first; returns their paths, sorted.

    Args:
        hand_written: folder of pages and assets that are copied beside the generated ones.
        site_url: where the site will lie, with a slash at the end; for feed, llms.txt and link previews.
    Raises: SiteError if a generated file has the name of a hand-written one.
    """
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(hand_written, out)
    for path, data in files(content, site_url, cards):
        target = out / path
        if target.exists():
            raise SiteError(f"{path} is generated, but also lies in {hand_written}; rename the latter")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def files(content: Content, site_url: str, cards: bool = True) -> Iterator[tuple[str, bytes]]:
    """Every generated file as path and bytes: a pure function of the content."""
    charts = draw_charts(content)
    for page in all_pages(content, charts):
        yield f"{page.path}.md", page.markdown().encode()
    yield "reference-model.md", reference_card(content).encode()
    for chart in charts.values():
        yield f"charts/{chart.name}-light.svg", chart.light.encode()
        yield f"charts/{chart.name}-dark.svg", chart.dark.encode()
        yield f"charts/{chart.name}.csv", chart_csv(chart.points).encode()
    for path, text in api_files(content):
        yield path, text.encode()
    yield "feed.xml", feed(content, site_url).encode()
    yield "llms.txt", llms_txt(content, site_url).encode()
    yield "robots.txt", f"User-agent: *\nAllow: /\nSitemap: {site_url}sitemap.xml\n".encode()
    yield from _cards(content, cards)


def draw_charts(content: Content) -> dict[str, Chart]:
    """All charts by name, the Pareto charts first."""
    papers = [view.paper for view in content.views.values()]
    return pareto_charts(pareto_points(papers, content.vocab.models)) | list_charts(seed_charts(papers))


def _cards(content: Content, wanted: bool) -> Iterator[tuple[str, bytes]]:
    yield (
        "cards/site.png",
        card("LLM-quantization papers, executable", ("Claims with protocol, source and verdict",)),
    )
    if wanted and len(content.views) <= MAX_CARDS:
        for name, view in content.views.items():
            yield f"cards/{name}.png", entry_card(view)
