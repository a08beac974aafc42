"""Bits per weight of a claim: as its source states them, by the formula for what is stored, or nominal.

`bits_formula` of a method, or of a claim that needs its own, is arithmetic over the keys of the claim's `setting`, like
`w_bits + 16 / group_size`. It is parsed and walked here, never executed: numbers, names, + - * / **, unary minus, log2
and ceil.

d_out and d_in are those of a linear. Unless the setting has both, the value is the mean over the linears of the claim's
model, each weighted by its number of weights. Where the setting says `group_size: null`, a whole row, it is d_in.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from requant.catalog.entry import FindingClaim, MeasuredClaim, Paper
from requant.catalog.vocabulary import Model

TOLERANCE = 0.01  # stated and computed bits may differ by this fraction without a note
Linears = Sequence[tuple[int, int, int]]  # (d_out, d_in, how many)
Setting = Mapping[str, object]
_LIMIT = 1e6  # no operand of a power or result may be larger
_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_CALLS: dict[str, Callable[[float], float]] = {"log2": math.log2, "ceil": math.ceil}
_SHAPE = frozenset(("d_out", "d_in"))


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
    return {node.id for node in ast.walk(_parse(formula)) if isinstance(node, ast.Name)} - _CALLS.keys()


def evaluate(formula: str, setting: Setting, linears: Linears = ()) -> float:
    """The value of a formula with the numbers of a setting, over the linears of a model where it needs their shapes.

    Raises: MissingName where nothing has a number for a name; FormulaError for anything else wrong.
    """
    tree = _parse(formula).body
    try:
        cases = [(size, _value(tree, case)) for size, case in _cases(names_of(formula), setting, linears)]
        value = cases[0][1]
        if len(cases) > 1:
            value = sum(size * bits for size, bits in cases) / sum(size for size, _ in cases)
    except (ArithmeticError, TypeError, ValueError) as problem:  # a power of a negative number may be complex
        if isinstance(problem, FormulaError):
            raise
        raise FormulaError(f"{formula!r} cannot be computed: {problem}") from problem
    if isinstance(value, complex) or not math.isfinite(value) or abs(value) > _LIMIT:
        raise FormulaError(f"{formula!r} gives {value}, which is no number of bits")
    return float(value)


def _cases(names: set[str], setting: Setting, linears: Linears) -> Iterator[tuple[int, Setting]]:
    """The settings to average over, one a linear, with their weights; the setting itself where no shape is needed."""
    by_row = "group_size" in names and "group_size" in setting and setting["group_size"] is None
    own = [setting.get(name) for name in ("d_out", "d_in")]
    if all(isinstance(size, int) for size in own):
        linears = [(*own, 1)]
    if not linears or not (by_row or names & _SHAPE):
        yield 1, setting
        return
    for d_out, d_in, count in linears:
        shape = {"d_out": d_out, "d_in": d_in} | ({"group_size": d_in} if by_row else {})
        yield d_out * d_in * count, {**setting, **shape}


def linears_of(model: str | None, models: Mapping[str, Model]) -> Linears:
    """The linears of one block of a model; none if it is not known, or its shapes are not."""
    return models[model].linears if model in models else ()


def _parse(formula: str) -> ast.Expression:
    try:
        tree = ast.parse(formula, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as problem:
        raise FormulaError(f"{formula!r} is not arithmetic: {problem}") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not (
            isinstance(node.func, ast.Name) and node.func.id in _CALLS and len(node.args) == 1
        ):
            raise FormulaError(f"{formula!r} calls something other than log2(x) and ceil(x)")
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
            raise FormulaError(f"{formula!r} holds more than numbers, names, + - * / **, log2 and ceil")
    return tree


def _value(node: ast.expr, setting: Setting) -> float:
    if isinstance(node, ast.Constant):
        return float(node.value)
    if isinstance(node, ast.Name):
        found = setting.get(node.id)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise MissingName(f"neither setting nor model has a number for {node.id}")
        return float(found)
    if isinstance(node, ast.Call):
        return _CALLS[node.func.id](_value(node.args[0], setting))
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand, setting)
    return _BINARY[type(node.op)](_value(node.left, setting), _value(node.right, setting))


def formula_of(paper: Paper, claim: MeasuredClaim | FindingClaim) -> str | None:
    """The claim's own formula, or else that of the method."""
    return claim.bits_formula or (paper.method.bits_formula if paper.method else None)


def effective_bits(
    paper: Paper, claim: MeasuredClaim | FindingClaim, models: Mapping[str, Model]
) -> tuple[float, str] | None:
    """Bits per weight of a claim, and how they are known: `stated`, `formula` or `nominal`; None if unknown.

    Where the stated bits leave out what is stored, the formula's count stands for the claim. A formula is for
    coded weights, so it says nothing of a claim whose weights keep 16 bits.
    """
    stated, nominal = claim.setting.get("effective_bits"), claim.setting.get("w_bits")
    formula, linears = formula_of(paper, claim), linears_of(claim.model, models)
    known = isinstance(stated, int | float)
    if formula and nominal != 16 and not (known and mismatch(formula, claim.setting, linears) is None):
        try:
            return evaluate(formula, claim.setting, linears), "formula"
        except MissingName:
            pass
    if known:
        return float(stated), "stated"
    return (float(nominal), "nominal") if isinstance(nominal, int | float) else None


def mismatch(formula: str, setting: Setting, linears: Linears = ()) -> tuple[float, float] | None:
    """Stated and computed bits of one setting if they differ by more than TOLERANCE; None if all is well or unknown."""
    both = stated_and_computed(formula, setting, linears)
    return both if both is not None and abs(both[1] - both[0]) > TOLERANCE * abs(both[0]) else None


def stated_and_computed(formula: str, setting: Setting, linears: Linears = ()) -> tuple[float, float] | None:
    """Both counts of one setting, or None where one of them is not known."""
    stated = setting.get("effective_bits")
    if isinstance(stated, bool) or not isinstance(stated, int | float):
        return None
    try:
        return stated, evaluate(formula, setting, linears)
    except MissingName:
        return None


def mismatches(papers: Iterable[Paper], models: Mapping[str, Model]) -> Iterator[BitsMismatch]:
    """Claims whose stated bits are not what the formula gives, with the notes that explain them."""
    for paper in papers:
        for claim in paper.claims:
            if not isinstance(claim, MeasuredClaim | FindingClaim):
                continue
            formula = formula_of(paper, claim)
            off = formula and mismatch(formula, claim.setting, linears_of(claim.model, models))
            if off:
                yield BitsMismatch(paper.id, claim.id, *off, claim.bits_note)
