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
    silent = [item for item in bits.mismatches(CATALOG.papers.values()) if not item.note]
    assert silent == []


@pytest.mark.parametrize("entry", CATALOG.papers.values(), ids=lambda entry: entry.id)
def test_bibliography_is_whole(entry) -> None:
    assert entry.authors and all(name.strip() for name in entry.authors)
    if entry.ids.arxiv and entry.venue:
        assert entry.venue.year >= 2000 + int(entry.ids.arxiv[:2]) - 1


def test_formula_of_grouped_codes() -> None:
    assert bits.evaluate("w_bits + (16 + w_bits) / group_size", {"w_bits": 4, "group_size": 128}) == 4.15625


@pytest.mark.parametrize(
    "formula",
    ["__import__('os')", "a.b", "x[0]", "9**9**9", "1/0", "(1", "log2(0)", "log2(1, 2)", "True", "'a'", "x if 1 else 2"]
)  # fmt: skip
def test_what_is_no_formula_is_refused(formula: str) -> None:
    with pytest.raises(bits.FormulaError):
        bits.evaluate(formula, {"x": 1, "a": 1})


@given(st.text(max_size=60))
def test_any_text_is_refused_or_a_number(text: str) -> None:
    with contextlib.suppress(bits.FormulaError):
        assert isinstance(bits.evaluate(text, {"w_bits": 2}), float)


def test_bits_are_stated_computed_or_nominal() -> None:
    entry = CATALOG.papers["awq"]
    claim = next(claim for claim in entry.claims if isinstance(claim, MeasuredClaim))
    stated = dataclasses.replace(claim, setting=MappingProxyType({"w_bits": 3, "effective_bits": 3.25}))
    plain = dataclasses.replace(claim, setting=MappingProxyType({"w_bits": 3}))
    method = dataclasses.replace(entry.method, bits_formula="w_bits + 1")
    assert bits.effective_bits(entry, stated) == (3.25, "stated")
    assert bits.effective_bits(dataclasses.replace(entry, method=method), plain) == (4.0, "formula")
    assert bits.effective_bits(
        dataclasses.replace(entry, method=dataclasses.replace(method, bits_formula=None)), plain
    ) == (3.0, "nominal")
