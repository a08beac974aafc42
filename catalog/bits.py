"""Bits per weight of a claim: as its source states them, by the method's formula, or nominal.

`bits_formula` of an entry is arithmetic over the keys of a claim's `setting`, like `w_bits + 16 / group_size`.
It is parsed and walked here, never executed: numbers, names, + - * / **, unary minus, log2.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from requant.catalog.entry import FindingClaim, MeasuredClaim, Paper

TOLERANCE = 0.01  # stated and computed bits may differ by this fraction without a note
_LIMIT = 1e6  # no operand of a power or result may be larger
_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


class FormulaError(ValueError):
    """A bits formula that cannot be read or computed; the message says why."""


class MissingName(FormulaError):
    """The formula needs a setting that the claim does not have as a number."""


@dataclass(frozen=True)
class BitsMismatch:
    """A claim whose stated bits are not what the method's formula gives for its setting."""

    paper: str
    claim: str
    stated: float
    computed: float
    note: str | None


def names_of(formula: str) -> set[str]:
    """The settings a formula needs. Raises: FormulaError if it is not a formula."""
    return {node.id for node in ast.walk(_parse(formula)) if isinstance(node, ast.Name)} - {"log2"}


def evaluate(formula: str, setting: Mapping[str, object]) -> float:
    """The value of a formula with the numbers of a setting.

    Raises: MissingName where the setting has no number for a name; FormulaError for anything else wrong.
    """
    try:
        value = _value(_parse(formula).body, setting)
    except (ArithmeticError, ValueError) as problem:
        if isinstance(problem, FormulaError):
            raise
        raise FormulaError(f"{formula!r} cannot be computed: {problem}") from problem
    if isinstance(value, complex) or not math.isfinite(value) or abs(value) > _LIMIT:
        raise FormulaError(f"{formula!r} gives {value}, which is no number of bits")
    return float(value)


def _parse(formula: str) -> ast.Expression:
    try:
        tree = ast.parse(formula, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as problem:
        raise FormulaError(f"{formula!r} is not arithmetic: {problem}") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not (
            isinstance(node.func, ast.Name) and node.func.id == "log2" and len(node.args) == 1
        ):
            raise FormulaError(f"{formula!r} calls something other than log2(x)")
        allowed = (
            ast.Expression,
            ast.BinOp,
            ast.UnaryOp,
            ast.USub,
            ast.Call,
            ast.Name,
            ast.Load,
            ast.Constant,
        )
        if not isinstance(node, (*allowed, *_BINARY)) or (
            isinstance(node, ast.Constant) and type(node.value) not in (int, float)
        ):
            raise FormulaError(f"{formula!r} holds more than numbers, names, + - * / ** and log2")
    return tree


def _value(node: ast.expr, setting: Mapping[str, object]) -> float:
    if isinstance(node, ast.Constant):
        return float(node.value)
    if isinstance(node, ast.Name):
        found = setting.get(node.id)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise MissingName(f"the setting has no number for {node.id}")
        return float(found)
    if isinstance(node, ast.Call):
        return math.log2(_value(node.args[0], setting))
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand, setting)
    return _BINARY[type(node.op)](_value(node.left, setting), _value(node.right, setting))


def effective_bits(paper: Paper, claim: MeasuredClaim | FindingClaim) -> tuple[float, str] | None:
    """Bits per weight of a claim, and how they are known: `stated`, `formula` or `nominal`; None if unknown."""
    stated = claim.setting.get("effective_bits")
    if isinstance(stated, int | float):
        return float(stated), "stated"
    formula = paper.method.bits_formula if paper.method else None
    if formula:
        try:
            return evaluate(formula, claim.setting), "formula"
        except MissingName:
            pass
    nominal = claim.setting.get("w_bits")
    return (float(nominal), "nominal") if isinstance(nominal, int | float) else None


def mismatch(formula: str, setting: Mapping[str, object]) -> tuple[float, float] | None:
    """Stated and computed bits of one setting if they differ by more than TOLERANCE; None if all is well or unknown."""
    stated = setting.get("effective_bits")
    if isinstance(stated, bool) or not isinstance(stated, int | float):
        return None
    try:
        computed = evaluate(formula, setting)
    except MissingName:
        return None
    return (stated, computed) if abs(computed - stated) > TOLERANCE * abs(stated) else None


def mismatches(papers: Iterable[Paper]) -> Iterator[BitsMismatch]:
    """Claims whose stated bits are not what the method's formula gives, with the notes that explain them."""
    for paper in papers:
        formula = paper.method.bits_formula if paper.method else None
        for claim in paper.claims if formula else ():
            off = mismatch(formula, getattr(claim, "setting", {}))
            if off is not None:
                yield BitsMismatch(paper.id, claim.id, *off, claim.bits_note)
