"""All pages but those of entries: home, table, tags, venues, protocols, disagreements, charts, kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from urllib.parse import urlencode

from requant.catalog.consistency import disagreements
from requant.catalog.entry import as_plain
from requant.catalog.protocols import Protocol
from requant.catalog.render.charts import Chart
from requant.catalog.render.content import Content
from requant.catalog.render.entry_page import entry_page
from requant.catalog.render.escape import front_matter, number, plain, slug
from requant.catalog.render.page import Page, heading, html
from requant.catalog.render.sources import kernels
from requant.catalog.render.verdicts import ICONS, STATES, tally
from requant.catalog.render.view import Group, PaperView

MOST = 100  # disagreements on their page, the widest first; the file beside it has all
MOST_ROWS = 100  # numbers below a chart; the file beside it has all
WHOLE_WIDTH = ("navigation", "toc")
KNOWLEDGE = ("id", "title", "summary", "expected", "baselines", "notes", "superseded_by")


def all_pages(content: Content, charts: Mapping[str, Chart]) -> Iterator[Page]:
    """Every generated page, entries last."""
    yield _home(content, charts)
    yield _table(content)
    yield _charts(charts)
    yield _disagreements(content)
    yield _others(content)
    yield _kernels(content)
    yield from _tags(content)
    yield from _venues(content)
    yield from _protocols(content)
    for view in content.views.values():
        yield entry_page(view, content)


def reference_card(content: Content) -> str:
    """The reference model's card, which the project writes as Markdown, as a page."""
    head = {
        "title": "The reference model",
        "description": plain("What the embedded model is and what it cannot show."),
    }
    return front_matter(head | {"hide": ["navigation"]}) + "\n" + content.card.read_text(encoding="utf-8")


def _home(content: Content, charts: Mapping[str, Chart]) -> Page:
    views, counts = content.views.values(), content.counts()
    totals = {
        "papers": len(views),
        "claims": sum(len(view.claims) for view in views),
        "others": sum(len(view.paper.independent_results) for view in views),
        "measured": counts[STATES[0]] + counts[STATES[1]],
    }
    parts = [html("home_counts.html", title="requant", totals=totals, counts=counts)]
    first = next((chart for chart in charts.values() if chart.pareto), None)
    if first:
        parts += [heading("Perplexity against bits", "pareto"), _chart(first, "")]
    parts += [heading("Where to go", "where-to-go"), html("home_more.html")]
    text = "Every paper on LLM quantization with its claims, who measured what, and how to run them again."
    return Page("index", "requant", text, tuple(parts), WHOLE_WIDTH)


def _chart(chart: Chart, root: str) -> str:
    rows = chart.points[:MOST_ROWS]
    values = vars(chart) | {"points": rows, "left": len(chart.points) - len(rows)}
    return html("chart.html", root, **values)


def _charts(charts: Mapping[str, Chart]) -> Page:
    intro = (
        '<h1 id="charts">Charts</h1><p>Points of one chart share model and protocol. A hollow mark is a number '
        "whose source nobody has seen; shapes and labels carry what colours do.</p>"
    )
    parts = [f'<div class="rq">{intro}</div>']
    for chart in charts.values():
        parts += [html("chart_title.html", title=chart.title, name=chart.name), _chart(chart, "")]
    return Page("charts", "Charts", "Perplexity against bits per weight, with the numbers.", tuple(parts))


def _facets(content: Content) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Filters of the table: parameter name, label, and its values with their texts."""
    views = content.views.values()
    venues = sorted({view.paper.venue.name for view in views if view.paper.venue})
    years = sorted({view.paper.venue.year for view in views if view.paper.venue}, reverse=True)
    bits = sorted({bit for view in views for bit in view.bits}, key=int)
    states = [(name.replace(" ", "-"), f"{ICONS[name]} {name}: at least one") for name in STATES]
    tags = sorted({tag for view in views for tag in view.paper.tags})
    quantized = ("weights", "activations", "KV cache")
    return [
        ("tag", "Tag", [(tag, tag) for tag in tags]),
        ("venue", "Venue", [(name, name) for name in venues]),
        ("year", "Year", [(str(year), str(year)) for year in years]),
        ("bits", "Bits", [(bit, bit) for bit in bits]),
        ("quantizes", "Quantized", [(name, name) for name in quantized]),
        ("state", "State", [*states, ("no-implementation", "no implementation yet")]),
    ]


def _table(content: Content) -> Page:
    rows = list(content.views.values())
    part = html("table.html", "../", rows=rows, facets=_facets(content))
    text = "All papers of the catalog; filter by tag, venue, year, bits, what is quantized and state."
    return Page("papers/index", "All papers", text, (part,), WHOLE_WIDTH)


def _disagreements(content: Content) -> Page:
    found = disagreements(view.paper for view in content.views.values())
    anchors = [slug(f"{item.name} {item.model} {item.protocol} {item.setting}") for item in found]
    others = [
        (view, claim, other)
        for view in content.views.values()
        for claim in view.claims
        for other in claim.others
        if other.cause != "none" and other.value != claim.reported
    ]
    part = html(
        "disagreements.html",
        found=found[:MOST],
        anchors=anchors,
        others=others[: 2 * MOST],
        left=max(0, len(found) - MOST),
        left_others=max(0, len(others) - 2 * MOST),
    )
    text = "One quantity, several printed numbers: where publications contradict each other."
    return Page("disagreements", "Numbers that disagree", text, (part,))


def _others(content: Content) -> Page:
    part = html("others.html", rows=content.vocab.independent)
    text = "Measurements of methods without an entry and of unquantized models, by whoever published them."
    return Page("others", "Measured by others", text, (part,), WHOLE_WIDTH)


def _kernels(content: Content) -> Page:
    part = html("kernels.html", kernels=kernels(content.kernels), bench=content.bench)
    return Page("kernels", "Kernels", "Triton kernels of the formats, each with its reference.", (part,))


def _term_pages(
    folder: str,
    title: str,
    lead: str,
    terms: list[tuple[str, str, tuple[str, ...]]],
    rows: Mapping[str, list[PaperView]],
) -> Iterator[Page]:
    """A list of terms, and for each term a page of its entries."""
    used = [term for term in terms if rows.get(term[0])]
    listed = [(name, f"{slug(name)}.html", text, len(rows[name])) for name, text, _ in used]
    head = html(
        "terms.html", "../", anchor=folder, title=title, lead=lead, column=title, count="Papers", terms=listed
    )
    yield Page(f"{folder}/index", title, lead, (head,), WHOLE_WIDTH)
    for name, text, aliases in used:
        query = urlencode({folder[:-1]: name})
        first = html(
            "term_head.html", "../", name=name, anchor=slug(name), text=text, aliases=aliases, query=query
        )
        body = html("list.html", "../", rows=rows[name])
        yield Page(f"{folder}/{slug(name)}", name, text, (first, body))


def _tags(content: Content) -> Iterator[Page]:
    rows: dict[str, list[PaperView]] = {}
    for view in content.views.values():
        for tag in view.paper.tags:
            rows.setdefault(tag, []).append(view)
    terms = [(term.id, term.description, term.aliases) for term in content.vocab.tags.values()]
    lead = "What an entry is about. Each tag is defined once; an entry uses these words and no others."
    yield from _term_pages("tags", "Tags", lead, terms, rows)


def _venues(content: Content) -> Iterator[Page]:
    rows: dict[str, list[PaperView]] = {}
    for view in sorted(
        content.views.values(), key=lambda view: -(view.paper.venue.year if view.paper.venue else 0)
    ):
        if view.paper.venue:
            rows.setdefault(view.paper.venue.name, []).append(view)
    terms = [(term.id, term.description, ()) for term in content.vocab.venues.values()]
    yield from _term_pages("venues", "Venues", "Where entries were published.", terms, rows)


def _protocols(content: Content) -> Iterator[Page]:
    groups: dict[str, list[dict]] = {}
    for view in content.views.values():
        for group in view.groups:
            groups.setdefault(group.protocol, []).append(_group_row(view, group))
    listed = [
        (
            protocol.id,
            f"{protocol.id}.html",
            protocol.title,
            sum(row["n"] for row in groups.get(protocol.id, ())),
        )
        for protocol in content.protocols.values()
    ]
    lead = "Every choice that decides a number. Two protocols are two quantities, and none is converted into another."
    head = html(
        "terms.html",
        "../",
        anchor="protocols",
        title="Protocols",
        lead=lead,
        column="Protocol",
        count="Claims",
        terms=listed,
    )
    yield Page("protocols/index", "Protocols", lead, (head,), WHOLE_WIDTH)
    for protocol in content.protocols.values():
        yield _protocol(protocol, groups.get(protocol.id, []))


def _group_row(view: PaperView, group: Group) -> dict:
    """A table of claims on an entry's page, as one line of the protocol's page."""
    return {
        "entry": view.paper.id,
        "title": view.paper.title,
        "anchor": group.anchor,
        "name": group.name.lower(),
        "n": len(group.claims),
        "models": sorted({claim.model for claim in group.claims if claim.model}),
        "counts": tally(claim.verdict.state for claim in group.claims),
    }


def _protocol(protocol: Protocol, groups: list[dict]) -> Page:
    root = "../../"
    parts = [
        html("protocol_head.html", root, p=protocol),
        heading("Definition", "definition"),
        html("protocol_definition.html", p=protocol, definition=_flat(protocol.definition())),
    ]
    if protocol.expected or protocol.baselines:
        parts += [heading("Known values", "known-values"), html("protocol_known.html", p=protocol)]
    if protocol.notes:
        parts += [heading("Notes", "notes"), html("entry_lists.html", items=protocol.notes)]
    if groups:
        parts += [heading("Claims", "claims"), html("protocol_claims.html", root, groups=groups)]
    return Page(f"protocols/{protocol.id}", protocol.title, protocol.summary, tuple(parts))


def _flat(definition: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in definition.items():
        if key in KNOWLEDGE and not prefix:
            continue
        plain_value = as_plain(value)
        if isinstance(plain_value, dict):
            rows += _flat(plain_value, f"{prefix}{key}.")
        elif plain_value is not None:
            text = plain_value if not isinstance(plain_value, str) else _visible(plain_value)
            rows.append((f"{prefix}{key}", number(text)))
    return rows


def _visible(text: str) -> str:
    """A text made of white space as Python writes it."""
    return repr(text) if not text.strip() else text
