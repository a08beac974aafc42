"""What must hold before a quantized number is judged: check integers, and the value without quantization."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol as Interface

from requant.catalog.corpus import Checks
from requant.catalog.protocols import Protocol, get_protocol

GATE_ABS, GATE_REL = 0.02, 0.001  # agreement of an unquantized model across machines
GATE_POINTS = 0.5  # the same for accuracies: near-ties among the answers flip with dtype and kernels
_FAMILIES = (
    ("llama-3", r"llama-3"),
    ("llama-2", r"llama-2-|(^|/)llama-\d+b|tinyllama"),  # LLaMA and Llama 2 share their tokenizer
    ("opt", r"(^|/)opt-\d"),
    ("reference", r"^reference(-|$)"),
)


class HasChecks(Interface):
    """An Evaluation, or Windows."""

    @property
    def checks(self) -> Checks: ...


@dataclass(frozen=True)
class CheckMismatch:
    """A check integer that is off. A `recalled` expectation is a hint, not proof."""

    check: str
    expected: float
    found: float
    evidence: str

    def __str__(self) -> str:
        return f"{self.check} {self.found:g}, expected {self.expected:g} ({self.evidence})"


def tokenizer_family(model_id: str) -> str | None:
    """The tokenizer family of a Hugging Face model id, as `expected` names it; None where none is known."""
    return next((family for family, pattern in _FAMILIES if re.search(pattern, model_id.casefold())), None)


def verify_checks(
    found: HasChecks, protocol: Protocol | str, family: str | None = None
) -> list[CheckMismatch]:
    """The check integers that differ from what the protocol expects for this tokenizer family."""
    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    mismatches = []
    for expected in protocol.expected:
        value = getattr(found.checks, expected.check)
        applies = value is not None and expected.family in (None, family)
        if applies and not abs(value - expected.value) <= expected.tolerance:
            mismatches.append(CheckMismatch(expected.check, expected.value, value, expected.evidence))
    return mismatches


def fp16_gate(
    value: float, protocol: Protocol | str, model_id: str, *, stated: float | None = None
) -> str | None:
    """Whether the unquantized model gives what it should; judge a quantized number only if it does.

    Args:
        value: measured on the unquantized model.
        stated: the claim's own baseline, used where the protocol knows none that was read or measured.
    Returns: None, or the reason why not, for `not run (baseline off: ...)`.
    """
    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    known = protocol.baseline(model_id)
    if known is not None and known.evidence != "recalled":
        target, tolerance, source = known.value, known.tolerance, known.source
    elif stated is not None:
        tolerance = GATE_POINTS if protocol.metric.unit == "percent" else max(GATE_ABS, GATE_REL * stated)
        target, source = stated, "the claim"
    else:
        return None
    if abs(value - target) <= tolerance:
        return None
    wanted = f"{target:g} +- {tolerance:g} ({source})"
    return f"{model_id} unquantized gives {value:.5g} under {protocol.id}, not {wanted}"
