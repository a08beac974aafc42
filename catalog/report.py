"""The table that ends `pytest -k paper` and `requant run`: one row a claim."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from requant.catalog.entry import NO_IMPLEMENTATION
from requant.catalog.measurement import CONTRADICTED, NOT_RUN, REPRODUCED, Measurement

_STYLE = {REPRODUCED: "green", CONTRADICTED: "red", NOT_RUN: "yellow"}
_MARK = {REPRODUCED: "=", CONTRADICTED: "x", NOT_RUN: "-"}  # states stay apart without colour


def number(value: float | str | None) -> str:
    """A measured or reported value in at most seven characters, or as it stands if it is text."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.1e}"


def measured_text(measurement: Measurement) -> str:
    """What was measured: one number, or name and number of each run in ascending order."""
    if not isinstance(measurement.measured, Mapping):
        return number(measurement.measured)
    ranked = sorted(measurement.measured.items(), key=lambda item: item[1])
    return ", ".join(f"{name} {value:.3f}" for name, value in ranked)


def state_text(measurement: Measurement, note: str = "") -> Text:
    """The state with its mark, in colour where there is colour; `note` goes behind it in brackets."""
    if measurement.expected:
        note = "*" if measurement.state == CONTRADICTED else f"expected: {CONTRADICTED} {note}".strip()
    style = "bold red" if not measurement.ok else _STYLE[measurement.state]
    return Text(
        f"{_MARK[measurement.state]} {measurement.state}" + (f" ({note})" if note else ""), style=style
    )


def claims_table(measurements: Sequence[Measurement]) -> tuple[Table, list[str]]:
    """Rows in the order measured, grouped by paper, and the reasons that the numbers in brackets stand for.

    An entry without an implementation takes one row.
    """
    table = Table(header_style="bold", pad_edge=False, box=None)
    for name, options in (
        ("paper, claim", {"no_wrap": True}), ("reported", {}), ("measured", {}), ("state", {"no_wrap": True}),
        ("s", {"justify": "right", "no_wrap": True}),
    ):  # fmt: skip
        table.add_column(name, **options)
    reasons: list[str] = []

    def note(item: Measurement) -> str:
        if item.state != NOT_RUN:
            return ""
        if item.reason not in reasons:
            reasons.append(item.reason)
        return str(reasons.index(item.reason) + 1)

    for paper, group in groupby(measurements, key=lambda item: item.paper):
        items = list(group)
        if all(item.state == NOT_RUN and item.reason == NO_IMPLEMENTATION for item in items):
            name = Text.assemble((paper, "bold"), f" ({len(items)} claims)")
            table.add_row(name, "", "", state_text(items[0], note(items[0])), "")
            continue
        table.add_row(Text(paper, style="bold"))
        for item in items:
            cells = (f"  {item.claim}", number(item.reported), measured_text(item))
            table.add_row(
                *(Text(cell) for cell in cells), state_text(item, note(item)), f"{item.seconds:.1f}"
            )
    return table, reasons


def progress_text(item: Measurement, done: int, total: int, left: float | None = None) -> Text:
    """One line for a claim that was just measured, shown while the others run; `left`: seconds until the end."""
    text = Text(f"[{done}/{total}] {item.paper}-{item.claim} ")
    reason = item.reason if item.state == NOT_RUN else ""
    text.append_text(state_text(item, reason)).append(f" {item.seconds:.1f} s")
    return text.append(f", {duration(left)} left", style="dim") if left and done < total else text


def duration(seconds: float | None) -> str:
    """`45 s`, `12 min`, `3.5 h`, `2 d`; `?` for None."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.0f} d"


def summary_line(measurements: Iterable[Measurement]) -> str:
    """Counts by state, the unexpected ones named."""
    items = list(measurements)
    counts = Counter(item.state for item in items)
    parts = [f"{counts[state]} {state}" for state in (REPRODUCED, CONTRADICTED, NOT_RUN) if counts[state]]
    bad = [f"{item.paper}-{item.claim}" for item in items if not item.ok]
    seconds = sum(item.seconds for item in items)
    text = f"{len(items)} claims: {', '.join(parts) or 'none'} in {seconds:.0f} s"
    return text + (f"; not as expected: {', '.join(bad)}" if bad else "")


def print_report(measurements: Sequence[Measurement], console: Console) -> None:
    """Print the table, why some claims were not run, and the counts."""
    table, reasons = claims_table(measurements)
    console.print(table)
    for number_, reason in enumerate(reasons, 1):
        console.print(Text(f"({number_}) {reason}", style="dim"))
    if any(item.expected and item.state == CONTRADICTED for item in measurements):
        console.print(Text("(*) expected: the entry says why", style="dim"))
    console.print(Text(summary_line(measurements), style="bold"))
