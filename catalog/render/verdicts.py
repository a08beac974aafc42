"""What the ledger says about each claim, and the reason where it says nothing. A missing record is never a success."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from requant.catalog import export
from requant.catalog.entry import Claim, Paper, reported

REPRODUCED, CONTRADICTED, NOT_RUN = STATES = ("reproduced", "contradicted", "not run")
ICONS = {REPRODUCED: "\u2713", CONTRADICTED: "\u2717", NOT_RUN: "\u2013"}
OUTDATED = "the claim changed after it was measured"
Ledger = Mapping[str, Mapping[str, Mapping[str, Any]]]  # entry id -> claim id -> record


@dataclass(frozen=True)
class Verdict:
    """State and measured values of one claim, as the ledger has them."""

    state: str
    reason: str = ""
    measured: float | str | None = None
    rows: tuple[tuple[str, float | str], ...] = ()
    seconds: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def icon(self) -> str:
        """A mark that tells states apart without colour."""
        return ICONS[self.state]


def current(papers: Iterable[Paper], ledger: Ledger) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The ledger without records of claims that have changed since: those count as not run, and say so."""
    kept: dict[str, dict[str, Mapping[str, Any]]] = {}
    for paper in papers:
        saved, known = ledger.get(paper.id, {}), {claim.id: claim for claim in paper.claims}
        kept[paper.id] = {
            name: record if _same(record.get("reported"), reported(known[name])) else _outdated(record)
            for name, record in saved.items()
            if name in known
        }
    return kept


def verdict(paper: Paper, claim: Claim, ledger: Ledger) -> Verdict:
    """The saved verdict on a claim, or `not run` with the reason."""
    record = export.verdict(paper, claim, ledger)
    measured, rows, state = record.get("measured"), (), record["state"]
    if isinstance(measured, Mapping):
        rows = tuple(sorted(measured.items(), key=lambda item: (isinstance(item[1], str), item[1])))
        measured = None
    reason = (record.get("reason") or "").partition("; use --")[0]  # the page shows the whole command
    return Verdict(
        state=state if state in STATES else NOT_RUN,
        reason=reason or ("" if state in (REPRODUCED, CONTRADICTED) else "no reason was recorded"),
        measured=measured,
        rows=rows,
        seconds=record.get("seconds"),
        details=record.get("details") or {},
        environment=record.get("environment") or {},
    )


def _outdated(record: Mapping[str, Any]) -> dict[str, Any]:
    return {**record, "state": NOT_RUN, "reason": OUTDATED, "measured": None, "details": {}}


def tally(states: Iterable[str]) -> dict[str, int]:
    """How often each state occurs, in the fixed order of states, zeros included."""
    counts = Counter(states)
    return {state: counts[state] for state in STATES}


def _same(saved: object, claimed_now: object) -> bool:
    if isinstance(saved, int | float) and isinstance(claimed_now, int | float):
        return abs(saved - claimed_now) <= 1e-6
    return saved == claimed_now
