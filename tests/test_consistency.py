"""Numbers that should agree: between entries, and between stated and computed bits."""

from __future__ import annotations

import contextlib
import dataclasses
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant.catalog import bits, consistency
from requant.catalog.entry import MeasuredClaim
from requant.catalog.loader import load_catalog

CATALOG = load_catalog()
MODELS = CATALOG.vocab.models
LINEARS = ((4, 8, 2), (16, 4, 1))  # two matrices of 4 x 8 and one of 16 x 4: 64 weights each


@pytest.fixture
def pair():
    """Two method entries with one perplexity claim each, equal but for their ids."""
    source = CATALOG.papers["awq"]
    claim = next(claim for claim in source.claims if isinstance(claim, MeasuredClaim))
    return [dataclasses.replace(source, id=name, claims=(claim,)) for name in ("first", "second")]


def test_entries_that_print_the_same_agree(pair) -> None:
    assert consistency.disagreements(pair) == []


def test_a_baseline_more_than_a_percent_apart_is_found(pair) -> None:
    (claim,) = pair[1].claims
    fp16 = claim.baselines["fp16"]
    for factor, found in ((1.009, 0), (1.011, 1)):
        off = dataclasses.replace(
            claim, baselines=MappingProxyType({**claim.baselines, "fp16": fp16 * factor})
        )
        result = consistency.disagreements([pair[0], dataclasses.replace(pair[1], claims=(off,))])
        assert len(result) == found
    assert result[0].name == "fp16"
    assert result[0].spread == pytest.approx(0.011, abs=2e-4)
    assert {row.entry for row in result[0].rows} == {"first", "second"}


def test_a_method_as_baseline_is_compared_with_its_own_number(pair) -> None:
    (claim,) = pair[1].claims
    other = dataclasses.replace(claim, baselines=MappingProxyType({"first": claim.value * 1.5}))
    (found,) = consistency.disagreements([pair[0], dataclasses.replace(pair[1], claims=(other,))])
    assert found.name == "first"
    wider = dataclasses.replace(other, setting=MappingProxyType({**claim.setting, "w_bits": 8}))
    assert consistency.disagreements([pair[0], dataclasses.replace(pair[1], claims=(wider,))]) == []


def test_other_protocols_are_other_numbers(pair) -> None:
    (claim,) = pair[1].claims
    moved = dataclasses.replace(claim, value=2 * claim.value, protocol="gptq-wikitext2-4096/1")
    assert consistency.disagreements([pair[0], dataclasses.replace(pair[1], claims=(moved,))]) == []


def test_every_disagreement_of_the_catalog_carries_a_note() -> None:
    silent = [item for item in consistency.disagreements(CATALOG.papers.values()) if not item.explained]
    lines = [
        f"{item.model} {item.protocol} {item.name} {item.setting}: "
        + ", ".join(f"{row.value} in {row.entry}-{row.claim}" for row in item.rows)
        for item in silent
    ]
    assert not lines, "add baselines_note to the claim that prints the odd number:\n" + "\n".join(lines)


def test_stated_bits_that_the_formula_does_not_give_carry_a_note() -> None:
    silent = [item for item in bits.mismatches(CATALOG.papers.values(), MODELS) if not item.note]
    assert silent == []


def test_most_stated_bits_are_recomputed() -> None:
    """Formulas and shapes are there to check what sources state; a renamed setting would silently switch that off."""
    stated, computed = 0, 0
    for entry in CATALOG.papers.values():
        for claim in entry.claims:
            if "effective_bits" in getattr(claim, "setting", {}):
                stated += 1
                formula = bits.formula_of(entry, claim)
                linears = bits.linears_of(claim.model, MODELS)
                computed += bool(formula and bits.stated_and_computed(formula, claim.setting, linears))
    assert computed >= 0.8 * stated


@pytest.mark.parametrize("entry", CATALOG.papers.values(), ids=lambda entry: entry.id)
def test_bibliography_is_whole(entry) -> None:
    assert entry.authors and all(name.strip() for name in entry.authors)
    if entry.ids.arxiv and entry.venue:
        assert entry.venue.note or entry.venue.year >= 2000 + int(entry.ids.arxiv[:2])


@pytest.mark.parametrize(
    "model", [model for model in MODELS.values() if model.linears], ids=lambda model: model.id
)
def test_linears_add_up_to_the_model(model) -> None:
    """Names count with embeddings and head or, like that of Llama-3.2-1B, without."""
    block = sum(d_out * d_in * count for d_out, d_in, count in model.linears)
    assert model.n_blocks and model.embeddings
    if model.params is not None:
        counts = (block * model.n_blocks, block * model.n_blocks + model.embeddings)
        assert min(abs(count - model.params) for count in counts) < 0.1 * model.params


def test_formula_of_grouped_codes() -> None:
    assert bits.evaluate("w_bits + (16 + w_bits) / group_size", {"w_bits": 4, "group_size": 128}) == 4.15625


@pytest.mark.parametrize(
    "formula",
    ["__import__('os')", "a.b", "x[0]", "9**9**9", "1/0", "(1", "log2(0)", "log2(1, 2)", "True", "'a'", "x if 1 else 2",
     "ceil(1, 2)", "ceil(x=1)", "ceil()", "floor(x)", "log2.real(x)", "ceil((0 - x) ** 0.5)", "ceil(9 ** 300)", "ceil"]
)  # fmt: skip
def test_what_is_no_formula_is_refused(formula: str) -> None:
    with pytest.raises(bits.FormulaError):
        bits.evaluate(formula, {"x": 1, "a": 1})


def test_formula_over_the_linears_of_a_model() -> None:
    """16 / d_in is 2 bits a weight in the first two matrices and 4 in the third; bits count by weights."""
    assert bits.evaluate("w_bits + 16 / d_in", {"w_bits": 2}, LINEARS) == pytest.approx(2 + (2 + 4) / 2)
    assert bits.evaluate("64 / (d_out * d_in)", {}, LINEARS) == pytest.approx((2 + 1) / 2)
    assert bits.evaluate("ceil(d_out / 3) * 3 / d_out", {}, LINEARS) == pytest.approx((1.5 + 18 / 16) / 2)


def test_whole_rows_are_groups_of_all_inputs() -> None:
    formula = "w_bits + 16 / group_size"
    assert bits.evaluate(formula, {"w_bits": 2, "group_size": None}, LINEARS) == pytest.approx(5)
    assert bits.evaluate(formula, {"w_bits": 2, "group_size": 8}, LINEARS) == 4
    for setting in ({"w_bits": 2}, {"w_bits": 2, "group_size": "unknown"}):
        with pytest.raises(bits.MissingName):
            bits.evaluate(formula, setting, LINEARS)


def test_shape_in_the_setting_comes_first() -> None:
    assert bits.evaluate("16 / d_in", {"d_out": 4, "d_in": 2}, LINEARS) == 8
    with pytest.raises(bits.MissingName):
        bits.evaluate("16 / d_in", {"d_out": 4})


@given(st.text(max_size=60))
def test_any_text_is_refused_or_a_number(text: str) -> None:
    with contextlib.suppress(bits.FormulaError):
        assert isinstance(bits.evaluate(text, {"w_bits": 2}), float)


def test_bits_are_stated_computed_or_nominal() -> None:
    entry = CATALOG.papers["awq"]
    claim = next(claim for claim in entry.claims if isinstance(claim, MeasuredClaim))

    def known(formula: str | None, own: str | None = None, **setting) -> tuple[float, str] | None:
        method = dataclasses.replace(entry.method, bits_formula=formula)
        changed = dataclasses.replace(claim, setting=MappingProxyType(setting), bits_formula=own)
        return bits.effective_bits(dataclasses.replace(entry, method=method), changed, MODELS)

    assert known("w_bits + 1", w_bits=3, effective_bits=4.01) == (4.01, "stated")
    assert known("w_bits + 1", w_bits=3, effective_bits=3.25) == (4.0, "formula"), "what is stored counts"
    assert known(None, w_bits=3, effective_bits=3.25) == (3.25, "stated")
    assert known("w_bits + 1", w_bits=3) == (4.0, "formula")
    assert known("w_bits + 1", "w_bits + 2", w_bits=3) == (5.0, "formula")
    assert known("w_bits + 1", w_bits=16) == (16.0, "nominal")
    assert known(None, w_bits=3) == (3.0, "nominal")
    assert known("w_bits + 1", "w_bits + n_odd", w_bits=3) == (3.0, "nominal")


def test_a_model_without_shapes_is_left_out() -> None:
    assert bits.linears_of(None, MODELS) == bits.linears_of("nobody/nothing", MODELS) == ()
    assert bits.mismatch("w_bits + 16 / d_in", {"w_bits": 2, "effective_bits": 3}, ()) is None
    assert bits.mismatch("w_bits + 16 / d_in", {"w_bits": 2, "effective_bits": 3}, LINEARS) == (
        3,
        pytest.approx(5),
    )
