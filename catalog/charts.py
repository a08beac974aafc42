"""The points of the charts, taken from claims: what is drawn, from which claim, and whether its source was seen."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from requant.catalog.bits import effective_bits
from requant.catalog.entry import MeasuredClaim, Paper, Source
from requant.catalog.schemas import check_schema
from requant.catalog.strict_yaml import read_yaml
from requant.catalog.vocabulary import VOCAB_DIR, Model

PERPLEXITY = "token_perplexity"
Printed = tuple[Paper, MeasuredClaim, float]


@dataclass(frozen=True)
class Point:
    """One number in a chart.

    Attributes:
        method: id of the entry whose method it is, which need not be the entry that prints it.
        bits: bits per weight; `bits_known` says how: stated, formula or nominal.
        entry, claim: where it is printed; None for a number of the seed list that no claim holds.
        seen: the source was read (evidence primary or secondary); False is drawn hollow.
        drawn: False for a number that the seed list's picture leaves out because it is far off the scale.
    """

    method: str
    model: str
    bits: float
    value: float
    entry: str | None
    claim: str | None
    seen: bool
    source: str
    protocol: str
    bits_known: str = "nominal"
    drawn: bool = True


@dataclass(frozen=True)
class SeedRow:
    """One row of the seed list, as printed there."""

    row: int
    id: str
    venue: str | None
    title: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class SeedChart:
    """One chart of the seed list: for each (method, model) the printed perplexity, and whether it is drawn."""

    id: str
    w_bits: int
    models: tuple[str, ...]
    values: Mapping[tuple[str, str], tuple[float, bool]]


@dataclass(frozen=True)
class SeedList:
    source: str
    rows: tuple[SeedRow, ...]
    charts: tuple[SeedChart, ...]


def load_seed_list(folder: Path | None = None) -> SeedList:
    """The seed list as printed. Raises: CatalogError if the file is missing or wrong."""
    doc = read_yaml((folder or VOCAB_DIR) / "seed_list.yaml")
    check_schema(doc, "seed_list")
    rows = tuple(SeedRow(**{**row, "tags": tuple(row["tags"])}) for row in doc.value["rows"])
    charts = []
    for chart in doc.value["charts"]:
        values = {
            (line["method"], model): (value, line.get("drawn", True))
            for line in chart["series"]
            for model, value in zip(chart["models"], line["values"], strict=True)
            if value is not None
        }
        charts.append(SeedChart(chart["id"], chart["w_bits"], tuple(chart["models"]), values))
    return SeedList(doc.value["source"], rows, tuple(charts))


def pareto_points(papers: Iterable[Paper], models: Mapping[str, Model]) -> list[Point]:
    """Weight-only perplexities of the entries' own methods against bits per weight, all models and protocols.

    Compare points of one model under one protocol only.
    """
    points = []
    for paper in papers:
        for claim in paper.claims:
            if not _weight_only_perplexity(claim) or paper.method is None:
                continue
            bits = effective_bits(paper, claim, models)
            if bits is not None:
                points.append(_point(paper, claim, paper.id, claim.value, *bits))
    return points


def seed_charts(papers: Iterable[Paper], seed: SeedList | None = None) -> dict[str, list[Point]]:
    """The seed list's charts, each number traced to a claim that prints it.

    A number whose claim was only recalled, or which no claim prints, is not `seen`.
    """
    known = _printed(papers)
    charts = {}
    for chart in (seed or load_seed_list()).charts:
        points = []
        for (method, model), (value, drawn) in chart.values.items():
            matches = [item for item in known.get((method, model), ()) if same_number(item[2], value)]
            points.append(_traced(chart, method, model, value, drawn, matches))
        charts[chart.id] = points
    return charts


def same_number(claimed: float, printed: float) -> bool:
    """Whether a claim's number is the one a chart prints, which may be rounded to two or three digits."""
    return abs(claimed - printed) <= max(0.0051, 0.03 * printed if printed >= 1000 else 0.0)


def _traced(
    chart: SeedChart, method: str, model: str, value: float, drawn: bool, matches: list[Printed]
) -> Point:
    if not matches:
        source = "the seed list's own plotting script; no publication was seen to print it"
        return Point(
            method, model, chart.w_bits, value, None, None, False, source, "unstated", "nominal", drawn
        )
    paper, claim, _ = min(matches, key=lambda item: _trust(item[1].source, item[0].id == method))
    seen = claim.source.evidence != "recalled"
    source = _where(claim.source)
    return Point(
        method, model, chart.w_bits, value, paper.id, claim.id, seen, source, claim.protocol, "nominal", drawn
    )


def _printed(papers: Iterable[Paper]) -> dict[tuple[str, str], list[Printed]]:
    """Every perplexity on WikiText-2 by (method, model): the entries' own values and the baselines they print."""
    papers = tuple(papers)
    known = {paper.id for paper in papers}
    found: dict[tuple[str, str], list[Printed]] = {}
    for paper in papers:
        for claim in paper.claims:
            if not _weight_only_perplexity(claim) or claim.dataset != "wikitext2":
                continue
            named = [(paper.id, claim.value)]
            named += [(_method_of(name, known), value) for name, value in claim.baselines.items()]
            for method, value in named:
                found.setdefault((method, claim.model), []).append((paper, claim, value))
    return found


def _method_of(baseline: str, known: Collection[str]) -> str:
    """`gptq_g128` is a number of gptq: the longest id the name begins with, or the name itself."""
    parts = baseline.split("_")
    heads = ("_".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((head for head in heads if head in known), baseline)


def _weight_only_perplexity(claim: object) -> bool:
    return (
        isinstance(claim, MeasuredClaim)
        and claim.metric == PERPLEXITY
        and claim.model is not None
        and claim.setting.get("a_bits", 16) == 16
        and claim.setting.get("kv_bits", 16) == 16
    )


def _point(paper: Paper, claim: MeasuredClaim, method: str, value: float, bits: float, known: str) -> Point:
    seen, source = claim.source.evidence != "recalled", _where(claim.source)
    return Point(method, claim.model, bits, value, paper.id, claim.id, seen, source, claim.protocol, known)


def _where(source: Source) -> str:
    return source.where if source.seen_at is None else f"{source.where} ({source.seen_at})"


def _trust(source: Source, own: bool) -> tuple[int, bool]:
    return ("primary", "secondary", "recalled").index(source.evidence), not own
