"""What a validated entry becomes: frozen dataclasses, tuples for lists, read-only mappings for mappings.

The JSON Schema under `schema/` is the contract and `loader.py` the only maker of these objects, so nothing is
checked again here. An entry cannot be changed after it is loaded: corrections are made in the YAML file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from types import MappingProxyType
from typing import Any

Scalar = str | int | float | bool | None
Settings = Mapping[str, Any]  # name -> scalar, or a tuple of scalars

MEASURED_KINDS = ("perplexity", "accuracy", "speed", "memory")
CLAIM_KINDS = (*MEASURED_KINDS, "ordering", "invariant", "bits", "finding")
NO_IMPL = "none"  # the implementation that leaves a model as it is
UNSTATED = "unstated"  # the protocol of a number whose protocol nobody wrote down
NO_IMPLEMENTATION = "no implementation yet"  # why claims of an entry with impl: null are not run


def _nothing() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Venue:
    """Where it was published. A year before that of the arXiv id needs a `note`."""

    name: str
    year: int
    track: str | None = None
    url: str | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Ids:
    arxiv: str | None
    openreview: str | None
    acl: str | None
    doi: str | None


@dataclass(frozen=True, kw_only=True)
class Code:
    url: str
    license: str | None
    commit: str | None
    official: bool


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Something the seed list has wrong."""

    field: str
    seed: str | None
    correct: str | None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A place where text and released code disagree, and which of them the implementation follows."""

    paper: str
    code: str
    we: str


@dataclass(frozen=True, kw_only=True)
class Method:
    requires: tuple[str, ...]
    bits: str | None = None
    bits_formula: str | None = None
    hyperparameters: Settings
    pitfalls: tuple[str, ...] = ()
    paper_vs_code: tuple[Difference, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a number stands and where it was read: `evidence` is primary, secondary or recalled."""

    where: str
    seen_at: str | None
    evidence: str


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A failure that is known, with its reason."""

    state: str
    reason: str
    url: str | None = None


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Allowed distance from the value: `abs` in its unit or `rel` as a fraction of it; the other is None."""

    why: str
    abs: float | None = None
    rel: float | None = None

    def allows(self, value: float, measured: float) -> bool:
        """Whether `measured` is close enough to `value`, the claimed one."""
        limit = self.abs if self.abs is not None else (self.rel or 0.0) * abs(value)
        return abs(measured - value) <= limit


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of an ordering: which implementation, with which Config overrides, on which reference model."""

    impl: str
    config: Settings
    model: str


@dataclass(frozen=True, kw_only=True)
class CalibSize:
    n_samples: int = 64
    seqlen: int = 256


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What every kind of claim has."""

    id: str
    kind: str
    statement: str
    source: Source
    note: str | None = None
    expected: Expected | None = None

    @property
    def runs_on_reference(self) -> bool:
        """Whether the claim needs nothing but the reference model."""
        return self.kind in ("ordering", "invariant", "bits")

    @property
    def group(self) -> str:
        """Claims of an entry with the same group share what takes long, so one process should measure them."""
        return self.id if self.runs_on_reference else ""  # checkpoints, each loaded once


@dataclass(frozen=True, kw_only=True)
class MeasuredClaim(Claim):
    """perplexity, accuracy, speed, memory: a number on a public checkpoint."""

    model: str | None
    dataset: str | None
    setting: Settings
    metric: str
    value: float
    baselines: Mapping[str, float]
    protocol: str
    protocol_note: str | None = None
    calibration: str | None = None
    config: Settings | None = None
    tolerance: Tolerance | None = None
    bits_formula: str | None = None
    bits_note: str | None = None
    baselines_note: str | None = None


@dataclass(frozen=True, kw_only=True)
class OrderingClaim(Claim):
    """Runs on the reference model and the order of their losses (mean next-token loss, nats)."""

    model: str
    protocol: str
    runs: Mapping[str, Run]
    relation: str
    margin: float
    seeds: tuple[int, ...]
    baseline: Mapping[str, str | Run]
    calib: CalibSize = CalibSize()

    @property
    def order(self) -> tuple[str, ...]:
        """Run names of the relation, smallest loss first."""
        return split_relation(self.relation)


@dataclass(frozen=True, kw_only=True)
class InvariantClaim(Claim):
    """A function of the implementation returns an error or ratio that may not exceed `bound`."""

    function: str
    bound: float


@dataclass(frozen=True, kw_only=True)
class BitsClaim(Claim):
    """Bits per weight of one layer [d_out, d_in], counted in what is really stored."""

    config: Settings
    layer: tuple[int, int]
    value: float
    tolerance: Tolerance


@dataclass(frozen=True, kw_only=True)
class FindingClaim(Claim):
    """An observation: rows of name and value that `function` measures or, without one, a published number."""

    function: str | None
    relation: str | None = None
    margin: float | None = None
    baseline: Mapping[str, str] = field(default_factory=_nothing)
    model: str | None = None
    dataset: str | None = None
    setting: Settings = field(default_factory=_nothing)
    metric: str | None = None
    value: float | None = None
    baselines: Mapping[str, float] = field(default_factory=_nothing)
    protocol: str | None = None
    protocol_note: str | None = None
    bits_formula: str | None = None
    bits_note: str | None = None
    baselines_note: str | None = None

    @property
    def order(self) -> tuple[str, ...]:
        """Row names of the relation, smallest value first; empty without a relation."""
        return split_relation(self.relation) if self.relation else ()

    @property
    def runs_on_reference(self) -> bool:
        return self.function is not None

    @property
    def group(self) -> str:
        return self.function or ""


@dataclass(frozen=True, kw_only=True)
class IndependentResult:
    """A measurement by others, of a claim here (`claim`) or of something else (`about`)."""

    claim: str | None
    about: str | None = None
    value: float | str | None = None
    cause: str | None = None
    note: str | None = None
    url: str | None = None
    seen_at: str | None = None


@dataclass(frozen=True, kw_only=True)
class Paper:
    """One entry of the catalog; `id` is the stem of its file."""

    id: str
    title: str
    authors: tuple[str, ...]
    venue: Venue | None
    ids: Ids
    code: Code | None
    kind: str
    tags: tuple[str, ...]
    summary: str
    method: Method | None
    impl: str | None
    claims: tuple[Claim, ...]
    seed_row: int | None = None
    corrections: tuple[Correction, ...] = ()
    planned: bool = False
    independent_results: tuple[IndependentResult, ...] = ()
    superseded_by: str | None = None
    related: tuple[str, ...] = ()
    maintainers: tuple[str, ...] = ()

    def claim(self, claim_id: str) -> Claim:
        """The claim with this id. Raises: KeyError naming the ids there are."""
        for claim in self.claims:
            if claim.id == claim_id:
                return claim
        raise KeyError(f"{self.id} has no claim {claim_id!r}; it has {', '.join(c.id for c in self.claims)}")


def reported(claim: Claim) -> float | str | None:
    """What the claim says, short enough for a table cell."""
    if isinstance(claim, OrderingClaim):
        return f"{claim.relation} by {claim.margin:g} nats"
    if isinstance(claim, InvariantClaim):
        return f"<= {claim.bound:g}"
    if isinstance(claim, FindingClaim) and claim.function:
        return f"{claim.relation} by {claim.margin or 0:g}"
    return claim.value


def split_relation(relation: str) -> tuple[str, ...]:
    """Names of "a < b < c" from left to right."""
    return tuple(name.strip() for name in relation.split("<"))


def freeze(value: Any) -> Any:
    """Lists to tuples and dicts to read-only mappings, all the way down."""
    if isinstance(value, dict):
        return MappingProxyType({key: freeze(item) for key, item in value.items()})
    return tuple(freeze(item) for item in value) if isinstance(value, list) else value


def as_plain(value: Any) -> Any:
    """The reverse of loading: dicts, lists, scalars for JSON (`dataclasses.asdict` cannot copy proxies)."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: as_plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: as_plain(item) for key, item in value.items()}
    return [as_plain(item) for item in value] if isinstance(value, tuple | list) else value
