"""Numbers that should agree: one model, one protocol, one method and setting, printed by several entries.

Papers copy each other's baselines, or rerun them. Where two entries print numbers more than 1 % apart, the
claim that prints the odd one carries a `baselines_note`; all such places are listed on the site.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from requant.catalog.entry import UNSTATED, MeasuredClaim, Paper, Source

TOLERANCE = 0.01
_WIDTHS = {"w_bits": None, "a_bits": 16, "kv_bits": 16, "group_size": None}  # absent means this


@dataclass(frozen=True)
class Row:
    """One printed number: the claim that prints it, and the note that explains why it is odd."""

    entry: str
    claim: str
    value: float
    source: Source
    note: str | None


@dataclass(frozen=True)
class Disagreement:
    """One number printed differently: `name` is `fp16` or the id of a method, `setting` its widths as text.

    spread: the largest of the smallest relative differences between two entries' numbers.
    """

    model: str
    dataset: str | None
    protocol: str
    metric: str
    name: str
    setting: str
    spread: float
    rows: tuple[Row, ...]

    @property
    def explained(self) -> bool:
        return any(row.note for row in self.rows)


def disagreements(papers: Iterable[Paper]) -> list[Disagreement]:
    """All numbers that entries print more than 1 % apart, the widest first."""
    papers = tuple(papers)
    groups: dict[tuple, list[Row]] = {}
    for paper in papers:
        for key, row in _rows(paper, {other.id for other in papers}):
            groups.setdefault(key, []).append(row)
    found = []
    for key, rows in groups.items():
        spread = _spread(rows)
        if spread > TOLERANCE:
            found.append(Disagreement(*key, spread, tuple(sorted(set(rows), key=_reading_order))))
    return sorted(found, key=lambda item: (-item.spread, item.model, item.name, item.setting))


def _rows(paper: Paper, known: set[str]) -> Iterator[tuple[tuple, Row]]:
    for claim in paper.claims:
        if not isinstance(claim, MeasuredClaim) or claim.model is None or claim.protocol == UNSTATED:
            continue
        place = (claim.model, claim.dataset, claim.protocol, claim.metric)
        widths = _widths(claim.setting)
        own = Row(paper.id, claim.id, claim.value, claim.source, claim.baselines_note)
        if widths is not None and paper.method is not None:
            yield (*place, paper.id, widths), own
        for name, value in claim.baselines.items():
            row = Row(paper.id, claim.id, value, claim.source, claim.baselines_note)
            if name == "fp16":
                yield (*place, name, "unquantized"), row
            elif name in known and name != paper.id and widths is not None:
                yield (*place, name, widths), row


def _widths(setting: Mapping[str, object]) -> str | None:
    """The bit widths as text, or None where one of them is unknown."""
    values = {key: setting.get(key, default) for key, default in _WIDTHS.items()}
    if "unknown" in values.values() or values["w_bits"] is None:
        return None
    text = f"W{values['w_bits']}A{values['a_bits']}"
    if values["kv_bits"] != 16:
        text += f"KV{values['kv_bits']}"
    return text if values["group_size"] is None else f"{text} g{values['group_size']}"


def _spread(rows: list[Row]) -> float:
    """How far two entries are apart at most, each pair of entries taken where they come closest."""
    by_entry: dict[str, list[float]] = {}
    for row in rows:
        by_entry.setdefault(row.entry, []).append(row.value)
    entries = list(by_entry.values())
    gaps = [
        min(abs(a - b) / max(abs(b), 1e-12) for a in first for b in second)
        for index, first in enumerate(entries)
        for second in entries[index + 1 :]
    ]
    return max(gaps, default=0.0)


def _reading_order(row: Row) -> tuple[float, str, str]:
    return row.value, row.entry, row.claim
