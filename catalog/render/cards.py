"""Preview pictures for links to the site, drawn without a network: title, venue and counts on one ground."""

from __future__ import annotations

import textwrap
from xml.sax.saxutils import escape

import vl_convert

from requant.catalog.render.escape import clean
from requant.catalog.render.verdicts import ICONS
from requant.catalog.render.view import PaperView

WIDTH, HEIGHT = 1200, 630
_LINE, _LINES = 40, 4


def card(title: str, lines: tuple[str, ...]) -> bytes:
    """A PNG with a title and up to three lines below it."""
    wrapped = textwrap.wrap(clean(title), _LINE, max_lines=_LINES, placeholder=" \u2026") or [""]
    rows = [
        f'<text x="80" y="{200 + 72 * n}" font-size="56" font-weight="bold" fill="#fff">{escape(row)}</text>'
        for n, row in enumerate(wrapped)
    ]
    rows += [
        f'<text x="80" y="{510 + 44 * n}" font-size="32" fill="#c7d2e5">{escape(clean(row)[:70])}</text>'
        for n, row in enumerate(lines)
    ]
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#16263f"/>'
        '<text x="80" y="110" font-size="34" fill="#8fb8ff">requant</text>' + "".join(rows) + "</svg>"
    )
    return vl_convert.svg_to_png(svg, scale=1)


def entry_card(view: PaperView) -> bytes:
    """The card of an entry: title, venue, and its claims by state."""
    venue = view.paper.venue
    counts = ", ".join(f"{ICONS[name]} {n} {name}" for name, n in view.counts.items() if n)
    return card(view.paper.title, (f"{venue.name} {venue.year}" if venue else "baseline", counts))
