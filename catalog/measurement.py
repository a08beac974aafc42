"""What measuring a claim gives: a verdict and the figures behind it. Needs no torch, so that reading one is quick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

REPRODUCED, CONTRADICTED, NOT_RUN = "reproduced", "contradicted", "not run"


@dataclass(frozen=True)
class Measurement:
    """The outcome of one claim.

    Attributes:
        reported: what the claim says, as a number or a short text.
        measured: what was found, as a number, or name -> number for orderings and findings; None if not run.
        reason: why it was not run, or what was compared; empty only for a plain number within its bound.
        seconds: wall time of this claim, runs shared with earlier claims not counted again.
        failed: an error ended the measurement.
        expected: the entry expects this claim to be contradicted.
        details: further figures: standard error, KL divergence, versions of the protocol, seeds.
    """

    paper: str
    claim: str
    kind: str
    reported: float | str | None
    measured: float | Mapping[str, float] | None
    state: str
    reason: str
    protocol: str | None
    seconds: float = 0.0
    failed: bool = False
    expected: bool = False
    details: Mapping[str, object] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """False where the run must fail: an error, an unexpected contradiction or an unexpected success."""
        if self.failed:
            return False
        return self.state != (REPRODUCED if self.expected else CONTRADICTED)
