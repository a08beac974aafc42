"""What the templates show of an entry: texts in the order of reading, links already checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from requant.catalog.bits import effective_bits
from requant.catalog.entry import (
    Claim,
    FindingClaim,
    IndependentResult,
    InvariantClaim,
    MeasuredClaim,
    OrderingClaim,
    Paper,
    Source,
    reported,
)
from requant.catalog.render.escape import number, slug
from requant.catalog.render.verdicts import NOT_RUN, STATES, Ledger, Verdict, tally, verdict
from requant.catalog.vocabulary import Vocab

Facts = tuple[tuple[str, str], ...]  # name and value
KIND_NAMES = {
    "perplexity": "Perplexity",
    "accuracy": "Accuracy",
    "speed": "Speed",
    "memory": "Memory",
    "ordering": "Orderings on the reference model",
    "invariant": "Invariants",
    "bits": "Bits per weight",
    "finding": "Findings",
}

NO_PROTOCOL = {
    "bits": "counted in the stored tensors",
    "invariant": "measured by a function of the implementation",
}


@dataclass(frozen=True)
class Other:
    """A measurement by others."""

    value: str
    about: str | None
    cause: str | None
    cause_text: str | None
    note: str | None
    url: str | None
    seen_at: str | None


@dataclass(frozen=True)
class ClaimView:
    """One claim with everything that stands beside its number."""

    claim: Claim
    reported: str
    unit: str | None
    model: str | None
    setting: tuple[str, ...]
    bits: str | None
    baselines: tuple[tuple[str, str], ...]
    tolerance: str | None
    tolerance_why: str | None
    protocol: str | None
    protocol_url: str | None
    protocol_note: str | None
    calibration: str | None
    leak: bool
    source: Source
    setup: tuple[str, ...]
    notes: tuple[str, ...]
    others: tuple[Other, ...]
    verdict: Verdict
    facts: Facts
    run: int | None
    command: str | None

    @property
    def expected(self) -> bool:
        """Whether the entry says beforehand that this claim does not hold here."""
        return self.claim.expected is not None


@dataclass(frozen=True)
class Group:
    """Claims that share a table: one kind, one protocol, one unit."""

    kind: str
    protocol: str
    unit: str | None
    claims: tuple[ClaimView, ...]

    @property
    def name(self) -> str:
        return KIND_NAMES[self.kind]

    @property
    def title(self) -> str:
        """Name of the table in the list of tables."""
        if self.url is None:
            return f"{self.name}, {self.unit.replace('_', ' ')}" if self.unit else self.name
        return f"{self.name}, {self.protocol}"

    @property
    def url(self) -> str | None:
        return self.claims[0].protocol_url

    @property
    def anchor(self) -> str:
        return "claims-" + slug(f"{self.kind} {self.protocol} {self.unit or ''}")


@dataclass(frozen=True)
class PaperView:
    """One entry as its page and its row in the table show it."""

    paper: Paper
    claims: tuple[ClaimView, ...]
    others: tuple[Other, ...]
    counts: Mapping[str, int]
    bits: tuple[str, ...]
    quantizes: tuple[str, ...]
    supersedes: tuple[str, ...]
    runs: tuple[Facts, ...]

    @property
    def groups(self) -> list[Group]:
        """Claims by kind, protocol and unit, in the order in which they first occur."""
        found: dict[tuple[str, str, str | None], list[ClaimView]] = {}
        for view in self.claims:
            protocol = view.protocol or NO_PROTOCOL.get(view.claim.kind, "experiment of the implementation")
            found.setdefault((view.claim.kind, protocol, view.unit), []).append(view)
        return [
            Group(kind, protocol, unit, tuple(claims)) for (kind, protocol, unit), claims in found.items()
        ]

    @property
    def surnames(self) -> str:
        """Last words of the authors' names: what a reader filters by."""
        return " ".join(name.split()[-1] for name in self.paper.authors if name.split())

    @property
    def states(self) -> tuple[str, ...]:
        """States that at least one claim is in."""
        return tuple(state for state in STATES if self.counts[state])


def paper_view(paper: Paper, vocab: Vocab, ledger: Ledger, supersedes: tuple[str, ...] = ()) -> PaperView:
    """Everything that is shown of an entry."""
    verdicts = {claim.id: verdict(paper, claim, ledger) for claim in paper.claims}
    runs = tuple(dict.fromkeys(run for found in verdicts.values() if (run := _run(found))))
    claims = tuple(_claim_view(paper, claim, vocab, verdicts[claim.id], runs) for claim in paper.claims)
    return PaperView(
        paper=paper,
        claims=claims,
        others=tuple(_other(row, vocab) for row in paper.independent_results if row.claim is None),
        counts=tally(view.verdict.state for view in claims),
        bits=_bit_widths(paper),
        quantizes=_quantizes(paper),
        supersedes=supersedes,
        runs=runs,
    )


def _claim_view(
    paper: Paper, claim: Claim, vocab: Vocab, found: Verdict, runs: tuple[Facts, ...]
) -> ClaimView:
    protocol = getattr(claim, "protocol", None)
    tolerance, run = getattr(claim, "tolerance", None), _run(found)
    notes = (claim.note, getattr(claim, "bits_note", None), getattr(claim, "baselines_note", None))
    return ClaimView(
        claim=claim,
        reported=number(reported(claim)),
        unit=getattr(claim, "metric", None) or {"bits": "bits per weight"}.get(claim.kind),
        model=getattr(claim, "model", None),
        setting=_settings(getattr(claim, "setting", None) or getattr(claim, "config", None) or {}),
        bits=_bits(paper, claim, vocab),
        baselines=tuple((name, number(value)) for name, value in _baselines(claim).items()),
        tolerance=_tolerance(tolerance),
        tolerance_why=tolerance.why if tolerance else None,
        protocol=protocol,
        protocol_url=protocol_url(protocol) if protocol in vocab.protocols else None,
        protocol_note=getattr(claim, "protocol_note", None),
        calibration=getattr(claim, "calibration", None),
        leak=vocab.leaks(claim),
        source=claim.source,
        setup=tuple(_setup(claim)),
        notes=tuple(note for note in notes if note),
        others=tuple(_other(row, vocab) for row in paper.independent_results if row.claim == claim.id),
        verdict=found,
        facts=_facts(found),
        run=runs.index(run) + 1 if run else None,
        command=_command(paper, claim),
    )


def protocol_url(protocol: str) -> str:
    """Path of a protocol's page, from the root of the site."""
    return f"protocols/{protocol}.html"


def _baselines(claim: Claim) -> Mapping[str, float]:
    values = getattr(claim, "baselines", None)
    return values if isinstance(values, Mapping) else {}


def _settings(values: Mapping[str, Any]) -> tuple[str, ...]:
    """What was run, in the field's short forms where there are some: W4A16, g128, per row."""

    def text(value: Any) -> str:
        return ", ".join(map(number, value)) if isinstance(value, tuple) else number(value)

    rest = dict(values)
    short = []
    if isinstance(rest.get("w_bits"), int | float) and isinstance(rest.get("a_bits", 16), int | float):
        short.append(f"W{number(rest.pop('w_bits'))}A{number(rest.pop('a_bits', 16))}")
        if isinstance(rest.get("kv_bits"), int | float):
            cache = rest.pop("kv_bits")
            short += [f"KV{number(cache)}"] if cache != 16 else []
    if "group_size" in rest:
        size = rest.pop("group_size")
        short.append(
            "per row"
            if size is None
            else f"g{number(size)}"
            if isinstance(size, int)
            else f"group size {size}"
        )
    if isinstance(rest.get("symmetric"), bool):
        short.append("symmetric" if rest.pop("symmetric") else "asymmetric")
    return (*short, *(f"{name}\u00a0{text(value)}" for name, value in rest.items()))


def _setup(claim: Claim) -> Iterator[str]:
    """What is run for an ordering, an invariant or a finding, as lines of text."""
    if isinstance(claim, OrderingClaim):
        for name, run in claim.runs.items():
            config = ", ".join(_settings(run.config)) or "as published"
            model = "" if run.model == claim.model else f", on {run.model}"
            yield f"Run {name}: {run.impl}, {config}{model}"
        seeds = ", ".join(map(str, claim.seeds))
        yield f"Calibration: {claim.calib.n_samples} sequences of {claim.calib.seqlen} tokens; seeds {seeds}"
        swapped = (
            f"{name} by {by if isinstance(by, str) else by.impl}" for name, by in claim.baseline.items()
        )
        yield f"Must fail with {', '.join(swapped)} in its place"
    elif isinstance(claim, InvariantClaim | FindingClaim) and claim.function:
        yield f"Function: {claim.function}"


def _bits(paper: Paper, claim: Claim, vocab: Vocab) -> str | None:
    """Effective bits of a perplexity or accuracy, and how they are known."""
    known = isinstance(claim, MeasuredClaim | FindingClaim)
    found = effective_bits(paper, claim, vocab.models) if known else None
    if found is None or found[1] == "nominal":
        return None
    return f"{found[0]:.4g} bits per weight ({found[1]})"


def _tolerance(tolerance: Any) -> str | None:
    if tolerance is None:
        return None
    if tolerance.abs is not None:
        return f"\u00b1 {number(tolerance.abs)}"
    return f"\u00b1 {100 * tolerance.rel:.4g} %"


def _other(row: IndependentResult, vocab: Vocab) -> Other:
    cause = vocab.causes.get(row.cause) if row.cause else None
    return Other(
        value=number(row.value) if row.value is not None else "no number",
        about=row.about,
        cause=row.cause,
        cause_text=cause.description if cause else None,
        note=row.note,
        url=row.url,
        seen_at=row.seen_at,
    )


def _facts(found: Verdict) -> Facts:
    """What was measured beside the value: standard error, divergence, tokens."""
    return tuple(
        (name.replace("_", " "), number(value)) for name, value in found.details.items() if _scalar(value)
    )


def _run(found: Verdict) -> Facts:
    """When, where and with which versions a value was measured; empty where nothing was."""
    environment = found.environment
    if not environment or found.state == NOT_RUN:
        return ()
    facts = [(name, str(environment[name])) for name in ("date", "device", "commit") if environment.get(name)]
    versions = environment.get("versions") or {}
    named = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    return tuple(facts + ([("versions", named)] if named else []))


def _scalar(value: object) -> bool:
    return isinstance(value, int | float | str) and value != ""


def _command(paper: Paper, claim: Claim) -> str | None:
    """What measures this claim again; None where nothing can."""
    if paper.impl is None:
        return None
    command = f"requant run {paper.id} --claim {claim.id}"
    if isinstance(claim, MeasuredClaim):
        return f"{command} --download" if claim.model and claim.config is not None else None
    return command if isinstance(claim, OrderingClaim) or claim.runs_on_reference else None


def _bit_widths(paper: Paper) -> tuple[str, ...]:
    """Weight bit-widths that tags or claims name, rounded to whole bits."""
    found = {tag.removesuffix("-bit") for tag in paper.tags if tag.endswith("-bit") and tag[0].isdigit()}
    found |= {tag[1] for tag in paper.tags if len(tag) >= 4 and tag[0] == "w" and tag[1].isdigit()}
    for claim in paper.claims:
        bits = (getattr(claim, "setting", None) or {}).get("w_bits")
        if isinstance(bits, int | float) and not isinstance(bits, bool) and 0 < bits < 16:
            found.add(f"{max(1, round(bits))}")
    return tuple(sorted(found, key=int))


def _quantizes(paper: Paper) -> tuple[str, ...]:
    """What is quantized: weights, activations, KV cache, as tags and settings of claims say."""
    settings = [getattr(claim, "setting", None) or {} for claim in paper.claims]
    tags = set(paper.tags)

    def low(name: str) -> bool:
        values = [setting.get(name) for setting in settings]
        return any(isinstance(value, int | float) and 0 < value < 16 for value in values)

    found = {
        "weights": bool(tags & {"weight-only", "weight-activation"}) or low("w_bits"),
        "activations": "weight-activation" in tags or low("a_bits"),
        "KV cache": "kv-cache" in tags or low("kv_bits"),
    }
    return tuple(name for name, present in found.items() if present)
