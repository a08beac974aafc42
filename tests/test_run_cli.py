"""`requant run` as a person uses it: what it prints, writes and returns."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from typer.testing import CliRunner

from requant.catalog import ledger, parallel
from requant.catalog.claims import measure
from requant.catalog.cli import app
from requant.catalog.loader import load_catalog

RUNNER = CliRunner()
KEYS = {"paper", "claim", "kind", "reported", "measured", "state", "reason", "seconds", "protocol"}


def run(*arguments: str):
    return RUNNER.invoke(app, ["run", *arguments])


def test_one_record_a_claim(tmp_path: Path) -> None:
    target = tmp_path / "claims.json"
    result = run("rtn", "--claim", "*_w4_g128", "--json", str(target))
    assert result.exit_code == 0, result.output
    records = json.loads(target.read_text())
    claims = [claim for claim in load_catalog().papers["rtn"].claims if claim.id.endswith("_w4_g128")]
    assert [item["claim"] for item in records] == [claim.id for claim in claims]
    assert all(set(item) >= KEYS for item in records)
    states = {item["claim"]: item["state"] for item in records}
    assert states.pop("bits_w4_g128") == "reproduced"
    assert set(states.values()) == {"not run"}
    assert "no checkpoint of facebook/opt-125m here" in result.output
    assert f"{len(claims)} claims: 1 reproduced, {len(claims) - 1} not run" in result.output


def test_save_adds_to_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MEASURED", tmp_path)
    assert run("rtn", "--claim", "bits_*", "--save").exit_code == 0
    saved = ledger.read("rtn", tmp_path)
    assert saved["bits_w4_g128"]["measured"] == pytest.approx(4.15625)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [(("gptqq",), "gptq"), (("rtn", "--claim", "nothing*"), "no claim of rtn matches")],
)
def test_what_does_not_exist_is_one_line(arguments: tuple[str, ...], hint: str, capsys) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert hint in result.output + (result.stderr if result.stderr_bytes else "")


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    def measured(jobs: int) -> dict[tuple[str, str], object]:
        target = tmp_path / f"{jobs}.json"
        result = run("rtn", "gptq", "--claim", "*w3_g128", "--jobs", str(jobs), "--json", str(target))
        assert result.exit_code == 0, result.output
        return {(item["paper"], item["claim"]): item["measured"] for item in json.loads(target.read_text())}

    assert measured(2) == measured(1)


def test_a_process_that_dies_is_an_error_of_its_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [load_catalog().papers[name] for name in ("gptq", "rtn")]

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers: int, **_how: object) -> None:
            super().__init__(workers)

    def die(*_arguments: object) -> None:
        raise BrokenProcessPool("killed")

    monkeypatch.setattr(parallel, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(parallel, "_measure_entry", die)
    found = list(parallel.measure_many(entries, Path("unused"), only=lambda c: c.kind == "bits", jobs=2))
    assert found and not any(item.ok for item in found)
    assert all("process died" in item.reason for item in found)


def test_an_entry_without_implementation_says_so() -> None:
    planned = next(entry for entry in load_catalog().papers.values() if entry.impl is None)
    assert {measure(planned, claim).reason for claim in planned.claims} == {"no implementation yet"}
