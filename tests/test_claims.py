"""The claims runner, its verdicts and the ledger, on claims made up here."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from compare_machines import findings
from rich.console import Console

from requant.catalog import claims, ledger
from requant.catalog.claims import Options, measure, without_method
from requant.catalog.entry import (
    BitsClaim,
    Expected,
    FindingClaim,
    InvariantClaim,
    MeasuredClaim,
    OrderingClaim,
    Paper,
    Run,
    Source,
    Tolerance,
)
from requant.catalog.loader import load_catalog
from requant.catalog.measurement import CONTRADICTED, NOT_RUN, REPRODUCED, Measurement
from requant.catalog.reference.models import load_reference
from requant.catalog.report import print_report, summary_line

SOURCE = Source(where="nowhere", seen_at="a test", evidence="primary")
SHORT = "reference-kjv-256-short/1"
COMMON = {"statement": "made up", "source": SOURCE}


@pytest.fixture(scope="module")
def rtn() -> Paper:
    return load_catalog().papers["rtn"]


def ordering(relation: str, margin: float = 0.0, **runs: Run) -> OrderingClaim:
    first, last = relation.split(" < ")[0], relation.split(" < ")[-1]
    return OrderingClaim(
        id="made_up", kind="ordering", model="reference", protocol=SHORT, runs=MappingProxyType(runs),
        relation=relation, margin=margin, seeds=(0,), baseline=MappingProxyType({first: last}), **COMMON,
    )  # fmt: skip


def rounded(bits: int) -> Run:
    return Run(impl="rtn", config=MappingProxyType({"w_bits": bits}), model="reference")


def published(**changes) -> MeasuredClaim:
    base = MeasuredClaim(
        id="made_up", kind="perplexity", model="toy/reference", dataset="kjv", setting=MappingProxyType({"w_bits": 2}),
        metric="token_perplexity", value=1.0, baselines=MappingProxyType({}), protocol=SHORT,
        config=MappingProxyType({"w_bits": 2}), tolerance=Tolerance(why="a test", rel=0.001), **COMMON,
    )  # fmt: skip
    return replace(base, **changes)


def test_ordering_holds_fails_and_has_power(rtn: Paper) -> None:
    claim = ordering("w4 < w2", margin=0.01, w4=rounded(4), w2=rounded(2))
    assert measure(rtn, claim).state == REPRODUCED
    assert measure(rtn, replace(claim, relation="w2 < w4")).state == CONTRADICTED
    assert measure(rtn, replace(claim, margin=9.0)).state == CONTRADICTED
    assert measure(rtn, without_method(claim)).state == CONTRADICTED


def test_equal_losses_are_no_order_even_without_a_margin(rtn: Paper) -> None:
    assert measure(rtn, ordering("a < b", a=rounded(3), b=rounded(3))).state == CONTRADICTED


def test_a_claim_about_one_number_has_no_baseline() -> None:
    with pytest.raises(TypeError, match="invariant"):
        without_method(
            InvariantClaim(id="made_up", kind="invariant", function="half_step_error", bound=1.0, **COMMON)
        )


@pytest.mark.parametrize(("bound", "state"), [(1.25, REPRODUCED), (0.1, CONTRADICTED)])
def test_invariant_is_judged_by_its_bound(rtn: Paper, bound: float, state: str) -> None:
    claim = InvariantClaim(id="made_up", kind="invariant", function="half_step_error", bound=bound, **COMMON)
    assert measure(rtn, claim).state == state


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_invariant_that_is_not_finite_is_contradicted(
    rtn: Paper, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims.load_impl("rtn"), "half_step_error", lambda ctx: value)
    claim = InvariantClaim(
        id="made_up", kind="invariant", function="half_step_error", bound=math.inf, **COMMON
    )
    result = measure(rtn, claim)
    assert result.state == CONTRADICTED
    json.dumps(ledger.record(result), allow_nan=False)


@pytest.mark.parametrize("name", ["rtn", "quip"])
def test_functions_come_from_the_evidence_where_there_is_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "requant.reference_impls." + {"rtn": "rtn", "quip": "evidence.quip"}[name]
    monkeypatch.setattr(f"{place}.made_up", lambda ctx: 0.5, raising=False)
    claim = InvariantClaim(id="made_up", kind="invariant", function="made_up", bound=1.0, **COMMON)
    assert measure(load_catalog().papers[name], claim).measured == 0.5


def test_finding_is_judged_by_its_rows(rtn: Paper, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"name": "a", "value": 1.0}, {"name": "b", "value": 2.0}]
    monkeypatch.setattr(claims.load_impl("rtn"), "made_up_rows", lambda ctx: rows, raising=False)
    claim = FindingClaim(
        id="made_up",
        kind="finding",
        function="made_up_rows",
        relation="a < b",
        margin=0.5,
        baseline=MappingProxyType({"a": "b"}),
        **COMMON,
    )
    assert measure(rtn, claim).state == REPRODUCED
    assert measure(rtn, replace(claim, relation="b < a")).state == CONTRADICTED
    assert measure(rtn, without_method(claim)).state == CONTRADICTED


def test_bits_are_counted_in_stored_tensors(rtn: Paper) -> None:
    claim = BitsClaim(
        id="made_up", kind="bits", config=MappingProxyType({"w_bits": 3, "group_size": 64}), layer=(32, 128),
        value=3.296875, tolerance=Tolerance(why="exact", abs=1e-9), **COMMON,
    )  # fmt: skip
    assert measure(rtn, claim).state == REPRODUCED
    assert measure(rtn, replace(claim, value=3.0)).state == CONTRADICTED


def test_an_error_is_kept_and_makes_the_run_fail(rtn: Paper) -> None:
    result = measure(
        rtn,
        ordering(
            "a < b", a=Run(impl="rtn", config=MappingProxyType({"bits": 3}), model="reference"), b=rounded(2)
        ),
    )
    assert (result.state, result.failed, result.ok) == (NOT_RUN, True, False)
    assert "no field 'bits'" in result.reason
    assert "w_bits" in result.reason


@pytest.mark.parametrize(
    ("state", "expected", "ok"),
    [
        (REPRODUCED, False, True),
        (CONTRADICTED, False, False),
        (NOT_RUN, False, True),
        (CONTRADICTED, True, True),
        (REPRODUCED, True, False),
    ],
)
def test_what_counts_as_success(state: str, expected: bool, ok: bool) -> None:
    assert Measurement("p", "c", "bits", 1.0, 1.0, state, "", None, expected=expected).ok is ok


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of checkpoints that holds the reference model as toy/reference."""
    folder = tmp_path_factory.mktemp("models")
    reference = load_reference()
    reference.model.save_pretrained(folder / "toy" / "reference")
    reference.tokenizer.save_pretrained(folder / "toy" / "reference")
    return str(folder)


def test_published_number_runs_once_its_checkpoint_is_here(rtn: Paper, checkpoints: str) -> None:
    options = Options(models_dir=checkpoints)
    found = measure(rtn, published(value=10.0), options)
    assert found.state == CONTRADICTED, found.reason
    assert found.details["kl"] > 0
    assert found.details["standard_error"] > 0
    agreed = measure(rtn, published(value=float(found.measured)), options)
    assert agreed.state == REPRODUCED
    assert agreed.measured == found.measured


def test_quantized_number_is_not_judged_if_the_unquantized_one_is_off(rtn: Paper, checkpoints: str) -> None:
    result = measure(
        rtn, published(baselines=MappingProxyType({"fp16": 5.0})), Options(models_dir=checkpoints)
    )
    assert result.state == NOT_RUN
    assert result.reason.startswith("baseline off:")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": None}, "no public checkpoint"),
        ({"model": "toy/absent"}, "no checkpoint of toy/absent here"),
        ({"protocol": "unstated", "protocol_note": "nobody says"}, "protocol unstated: nobody says"),
        ({"config": None}, "its setting is not one"),
        ({"kind": "speed"}, "speed claims need"),
    ],
)
def test_what_is_missing_is_said(
    rtn: Paper, checkpoints: str, changes: dict, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = measure(rtn, published(**changes), Options(models_dir=checkpoints))
    assert result.state == NOT_RUN
    assert reason in result.reason
    assert result.ok


def test_pickled_weights_are_refused(rtn: Paper, tmp_path: Path) -> None:
    folder = tmp_path / "toy" / "reference"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    result = measure(rtn, published(), Options(models_dir=str(tmp_path)))
    assert result.state == NOT_RUN
    assert "safetensors" in result.reason


def toy(claim: str, state: str = REPRODUCED, value: float = 1.0) -> Measurement:
    return Measurement("toy", claim, "bits", 1.0, value, state, "why", None, seconds=0.5)


def test_ledger_keeps_what_it_has(tmp_path: Path) -> None:
    ledger.save([toy("a"), toy("b", value=2.0)], tmp_path)
    ledger.save([toy("a", NOT_RUN), toy("b", value=3.0)], tmp_path)
    known = ledger.read("toy", tmp_path)
    assert known["a"]["state"] == REPRODUCED  # not running again does not erase a measurement
    assert known["b"]["measured"] == 3.0
    assert known["b"]["environment"]["versions"]["torch"]
    assert [path.name for path in tmp_path.iterdir()] == ["toy.json"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"claims": [1]}', "\0"])
def test_broken_ledger_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "toy.json").write_text(text)
    with pytest.raises(ledger.LedgerError, match=r"toy\.json"):
        ledger.read("toy", tmp_path)


def test_report_names_what_was_not_expected(rtn: Paper) -> None:
    items = [
        toy("good"),
        toy("bad", CONTRADICTED),
        replace(toy("known", CONTRADICTED), expected=True),
        toy("absent", NOT_RUN),
    ]
    assert (
        summary_line(items)
        == "4 claims: 1 reproduced, 2 contradicted, 1 not run in 2 s; not as expected: toy-bad"
    )
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    print_report(items, console)
    text = console.export_text()
    for word in ("reported", "measured", "contradicted (*)", "(*) expected", "not run (1)", "(1) why"):
        assert word in text


def test_expected_contradiction_is_carried(rtn: Paper) -> None:
    claim = replace(
        ordering("w2 < w4", w4=rounded(4), w2=rounded(2)),
        expected=Expected(state=CONTRADICTED, reason="of course"),
    )
    result = measure(rtn, claim)
    assert result.expected
    assert result.ok


def test_verdicts_that_hang_on_the_machine_are_found() -> None:
    def records(states: dict[str, tuple[str, float]]) -> dict:
        return {
            ("toy", claim): {
                "state": state,
                "measured": {},
                "details": {"gaps": {"a < b": gap, "b < c": 1.0}},
            }
            for claim, (state, gap) in states.items()
        }

    here = records(
        {
            "far": (REPRODUCED, 0.5),
            "tie": (REPRODUCED, 0.011),
            "odd": (REPRODUCED, 0.02),
            "here": (REPRODUCED, 1.0),
        }
    )
    there = records({"far": (REPRODUCED, 0.4), "tie": (REPRODUCED, 0.02), "odd": (CONTRADICTED, -0.1)})
    rows = list(findings(here, there, dict.fromkeys(here, 0.01)))
    assert [row[:2] for row in rows] == [("moved", "toy-odd"), ("near", "toy-tie")]
