"""Drawings of the charts: Altair to SVG, in a light and a dark version, shapes and labels beside colours."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import altair as alt
import vl_convert

from requant.catalog.charts import Point
from requant.catalog.render.escape import slug

WIDTH, HEIGHT = 640, 400
FAR = 4.0  # values beyond this multiple of the lowest are not drawn
MOST_BITS = 9  # nor are points of models that are hardly quantized
LIMIT = 8  # Pareto charts drawn: the (model, protocol) pairs with most points
SHAPES = [
    "circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left",
    "M0,-1L.28,-.38L.95,-.31L.46,.15L.59,.81L0,.47L-.59,.81L-.46,.15L-.95,-.31L-.28,-.38Z",  # star
    "M-.9,-.7L.9,.7L.9,-.7L-.9,.7Z",  # bow tie
    "M-.7,-.9L.7,-.9L-.7,.9L.7,.9Z",  # hourglass
    "M-1,0L-.5,-.87L.5,-.87L1,0L.5,.87L-.5,.87Z",  # hexagon
    "M-.95,-.3L.95,-.3L.95,.3L-.95,.3Z",  # bar
    "M-.3,-.95L.3,-.95L.3,.95L-.3,.95Z",  # post
    "M-.9,-.9L.9,-.9L0,0L.9,.9L-.9,.9Z",  # flag
    "M-.7,-1L0,-.3L.7,-1L1,-.7L.3,0L1,.7L.7,1L0,.3L-.7,1L-1,.7L-.3,0L-1,-.7Z",  # x
    "M-.9,.9L-.9,-.9L-.3,-.9L-.3,.3L.9,.3L.9,.9Z",  # corner
]  # fmt: skip
# Okabe and Ito's colours, those that keep 3:1 against their background
LIGHT = ("#0072b2", "#b34700", "#00785a", "#a3478a", "#56657a", "#8a6d00", "#333333")
DARK = ("#56b4e9", "#ff9a4d", "#3cc9a3", "#e39ac9", "#b8c4d6", "#f0e442", "#eeeeee")
INK, DARK_INK, GRID = "#222222", "#dddddd", "#8884"
_DARKER = {INK: DARK_INK} | dict(zip(LIGHT, DARK, strict=True))
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}\b")


@dataclass(frozen=True)
class Chart:
    """A drawn chart and everything a page says about it."""

    name: str
    title: str
    alt: str
    caption: str
    points: tuple[Point, ...]
    pareto: bool
    light: str
    dark: str
    width: int
    height: int


def pareto_charts(points: Iterable[Point]) -> dict[str, Chart]:
    """Perplexity against bits, one chart for each model and protocol with at least three methods."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.model, point.protocol), []).append(point)
    useful = {key: rows for key, rows in groups.items() if len({row.method for row in rows}) >= 3}
    ranked = sorted(useful, key=lambda key: (-len(useful[key]), key))
    charts = {}
    for model, protocol in ranked[:LIMIT]:
        rows = sorted(useful[model, protocol], key=lambda row: (row.method, row.bits, row.value))
        name = slug(f"pareto {model} {protocol}")
        title = f"{model.split('/')[-1]}: perplexity against bits per weight"
        caption = f"{model}, protocol {protocol}. Lower and further left is better. {_marks(rows)}"
        charts[name] = _chart(name, title, caption, rows, pareto=True)
    return charts


def list_charts(charts: Mapping[str, Sequence[Point]]) -> dict[str, Chart]:
    """The charts that the original list printed, each number traced to a claim where one prints it."""
    found = {}
    for key, rows in charts.items():
        if rows:
            name, title = slug(f"list {key}"), f"Chart of the original list: {key.replace('_', ' ')}"
            caption = (
                f"As the original list draws it, every number traced to where it is printed. {_marks(rows)}"
            )
            found[name] = _chart(name, title, caption, list(rows), pareto=False)
    return found


def _marks(rows: Sequence[Point]) -> str:
    hollow = sum(not row.seen for row in rows)
    return (
        f"Hollow marks ({hollow} of {len(rows)}) are numbers whose source nobody has seen." if hollow else ""
    )


def _chart(name: str, title: str, caption: str, rows: list[Point], pareto: bool) -> Chart:
    drawn = _on_scale(rows) if pareto else [row for row in rows if row.drawn]
    left_out = len(rows) - len(drawn)
    methods = [method for method, _ in Counter(row.method for row in drawn).most_common()]
    lowest = min(drawn, key=lambda row: row.value)
    text = (
        f"{title}. {len(drawn)} points of {len(methods)} methods: {', '.join(methods)}. "
        f"The lowest value is {lowest.value:g} by {lowest.method} at {lowest.bits:.3g} bits. All numbers stand below."
    )
    if left_out:
        caption += f" {left_out} of {len(rows)} values lie off the scale and stand in the table only."
    draw = _pareto_spec if pareto else _model_spec
    light = _svg(draw(drawn, sorted(methods)))
    dark = _COLOUR.sub(lambda found: _DARKER.get(found[0].lower(), found[0]), light)
    width, height = _size(light)
    return Chart(name, title, text, caption.strip(), tuple(rows), pareto, light, dark, width, height)


def _on_scale(rows: Sequence[Point]) -> list[Point]:
    """The points that are drawn: a collapsed model would press all others into one line."""
    drawn = [row for row in rows if row.drawn and row.bits <= MOST_BITS] or list(rows)
    limit = FAR * min(row.value for row in drawn)
    return [row for row in drawn if row.value <= limit]


def _front(rows: Sequence[Point]) -> list[Point]:
    """The points that no other beats in bits and value at once, from few bits to many."""
    front: list[Point] = []
    for row in sorted(rows, key=lambda row: (row.bits, row.value)):
        if not front or row.value < front[-1].value:
            front.append(row)
    return front


def _data(rows: Sequence[Point]) -> alt.Data:
    return alt.Data(
        values=[
            {"method": row.method, "model": row.model.split("/")[-1], "bits": round(row.bits, 4),
             "value": row.value, "seen": row.seen}
            for row in rows
        ]
    )  # fmt: skip


def _points(rows: Sequence[Point], methods: list[str], x: alt.X) -> alt.Chart:
    """Marks whose colour and shape repeat with different periods, so that pairs stay apart for 119 methods."""
    color = alt.Scale(domain=methods, range=[LIGHT[i % len(LIGHT)] for i in range(len(methods))])
    shape = alt.Scale(domain=methods, range=[SHAPES[i % len(SHAPES)] for i in range(len(methods))])
    legend = alt.Legend(title=None, columns=1 + len(methods) // 18, symbolSize=90)
    marks = alt.Chart(_data(rows)).mark_point(size=75, filled=True, strokeWidth=1.5, opacity=1)
    return marks.encode(
        x=x,
        y=alt.Y("value:Q", title="perplexity (log scale)", scale=_value_scale(rows)),
        color=alt.Color("method:N", scale=color, legend=legend),
        stroke=alt.Stroke("method:N", scale=color, legend=legend),
        shape=alt.Shape("method:N", scale=shape, legend=legend),
        fillOpacity=alt.condition("datum.seen", alt.value(1), alt.value(0)),
    )


def _pareto_spec(rows: Sequence[Point], methods: list[str]) -> alt.LayerChart:
    """Points, the front as a dashed line, and a label at each method's first point on it."""
    x = alt.X(
        "bits:Q",
        title="bits per weight",
        axis=alt.Axis(tickMinStep=0.5, format="~g"),
        scale=alt.Scale(zero=False, nice=False, padding=16),
    )
    y = alt.Y("value:Q", scale=_value_scale(rows))
    front = _front(rows)
    first = list({row.method: row for row in reversed(front)}.values())
    line = alt.Chart(_data(front)).mark_line(
        strokeDash=[4, 4], color=INK, opacity=0.6, interpolate="step-after"
    )
    names = alt.Chart(_data(first)).mark_text(align="left", dx=8, dy=-8, color=INK, fontSize=11)
    layers = alt.layer(
        line.encode(x=x, y=y),
        _points(rows, methods, x),
        names.encode(x=x, y=y, text="method:N"),
    )
    return layers.properties(width=WIDTH, height=HEIGHT)


def _model_spec(rows: Sequence[Point], methods: list[str]) -> alt.Chart:
    order = list(dict.fromkeys(row.model.split("/")[-1] for row in rows))
    x = alt.X("model:N", title=None, sort=order, axis=alt.Axis(labelAngle=-30))
    return _points(rows, methods, x).properties(width=WIDTH, height=HEIGHT)


def _value_scale(rows: Sequence[Point]) -> alt.Scale:
    values = [row.value for row in rows]
    return alt.Scale(type="log", domain=[min(values) * 0.96, max(values) * 1.06], nice=False)


def _svg(chart: alt.Chart | alt.LayerChart) -> str:
    """The chart as SVG on a transparent ground; the same input gives the same text."""
    axis = {name: INK for name in ("labelColor", "titleColor", "domainColor", "tickColor")}
    chart = (
        chart.configure(background="transparent", font="sans-serif")
        .configure_axis(**axis, gridColor=GRID, labelFontSize=12, titleFontSize=13)
        .configure_legend(labelColor=INK, labelFontSize=12)
        .configure_view(strokeOpacity=0)
    )
    return vl_convert.vegalite_to_svg(chart.to_json(validate=False), vl_version="6.4")


def _size(svg: str) -> tuple[int, int]:
    found = re.search(r'width="([\d.]+)" height="([\d.]+)"', svg)
    return (round(float(found[1])), round(float(found[2]))) if found else (WIDTH, HEIGHT)
