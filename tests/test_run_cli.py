"""`requant run` as a person uses it: what it prints, writes and returns."""

from __future__ import annotations

import json
import multiprocessing
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from requant.catalog import ledger, parallel, plan
from requant.catalog.claims import measure
from requant.catalog.cli import app
from requant.catalog.loader import load_catalog
from requant.catalog.measurement import Measurement
from requant.catalog.terminal import max_memory

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


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_a_process_that_dies_costs_the_claim_it_was_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry's other claims are measured by a new process, those of other entries by theirs."""
    catalog = load_catalog()
    entries = [catalog.papers[name] for name in ("gptq", "rtn")]
    give, killed = parallel._Worker.give, []

    def give_and_kill(worker, task) -> None:
        give(worker, task)
        if not killed:
            worker.process.kill()
            killed.append(worker)

    monkeypatch.setattr(parallel._Worker, "give", give_and_kill)
    bits = [(p.id, c.id) for p in entries for c in p.claims if c.kind == "bits"]
    found = list(
        parallel.measure_many(entries, catalog.folders.papers, only=lambda p, c: c.kind == "bits", jobs=2)
    )
    assert sorted((item.paper, item.claim) for item in found) == sorted(bits)
    (bad,) = [item for item in found if not item.ok]
    assert "process died" in bad.reason
    assert not multiprocessing.active_children()


def test_a_plan_measures_nothing_and_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "flop_rate", lambda device: 1e9)
    monkeypatch.setattr(parallel, "measure_many", None)
    target = tmp_path / "plan.json"
    result = run("rtn", "--dry-run", "--measured", str(tmp_path), "--json", str(target))
    assert result.exit_code == 0, result.output
    rows = {row["claim"]: row for row in json.loads(target.read_text())}
    assert set(rows) == {claim.id for claim in load_catalog().papers["rtn"].claims}
    assert rows["bits_w4_g128"]["runs"] and not rows["bits_w4_g128"]["seconds"]
    absent = [row for row in rows.values() if row["model"] == "facebook/opt-125m"]
    assert absent and all("no checkpoint of facebook/opt-125m" in row["reason"] for row in absent)
    assert {row["memory_bytes"] for row in absent} == {2 * 125_000_000 * 4}
    timed = [row for row in rows.values() if row["kind"] == "ordering"]
    assert timed and all(row["basis"] == "formula" and row["seconds"] > 1 for row in timed)
    assert "memory: 2 models x parameters x 4 bytes" in result.output


def test_a_plan_names_what_takes_a_device_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models of 125 million parameters take 1 GB in float32."""
    monkeypatch.setattr(plan, "flop_rate", lambda device: 1e9)
    folder = tmp_path / "facebook" / "opt-125m"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    wiki = tmp_path / "wiki.parquet"
    wiki.touch()
    usual = ("rtn", "--dry-run", "--models-dir", str(tmp_path), "--json", str(tmp_path / "plan.json"))
    usual += ("--data", f"Salesforce/wikitext:test={wiki}")

    def planned(free: int, *more: str) -> tuple[str, list[dict]]:
        monkeypatch.setattr(plan, "free_memory", lambda device: free)
        result = run(*usual, *more)
        assert result.exit_code == 0, result.output
        rows = json.loads((tmp_path / "plan.json").read_text())
        return " ".join(result.output.split()), [row for row in rows if row["model"] == "facebook/opt-125m"]

    output, rows = planned(2 * 10**9)
    assert all(row["fits"] for row in rows) and any(row["runs"] for row in rows)
    assert "device map" not in output
    output, rows = planned(10**9 - 1)
    assert not any(row["fits"] for row in rows) and any(row["runs"] for row in rows)
    assert "more than the memory of cpu: facebook/opt-125m" in output and "--device auto" in output
    output, rows = planned(10**9 - 1, "--device", "auto")
    assert not any(row["runs"] for row in rows) and any("--offload-dir" in row["reason"] for row in rows)
    output, rows = planned(
        10**10, "--device", "auto", "--max-memory", "cpu=0.9GB", "--offload-dir", str(tmp_path)
    )
    assert any(row["runs"] for row in rows) and "loaded by accelerate's device map" in output


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--max-memory", "cpu=1GB"), "--device auto"),
        (("--device", "auto", "--max-memory", "gpu=1GB"), "DEVICE=SIZE"),
        (("--device", "auto", "--max-memory", "cpu=much"), "DEVICE=SIZE"),
    ],
)
def test_a_wrong_limit_of_memory_is_one_line(arguments: tuple[str, ...], hint: str) -> None:
    result = run("rtn", *arguments)
    assert result.exit_code == 2 and hint in result.output + result.stderr


def test_limits_of_memory_are_read_as_accelerate_reads_them() -> None:
    accelerate = pytest.importorskip("accelerate")
    sizes = ("20GiB", "1.5GB", "300MB", "7KiB")
    found = max_memory([f"{index}={size}" for index, size in enumerate(sizes)], "auto")
    assert found == accelerate.utils.get_max_memory(dict(enumerate(sizes)))
    assert max_memory(["cpu=64GiB"], "auto") == {"cpu": 64 * 2**30}


def test_time_left_comes_from_what_was_measured() -> None:
    def row(claim: str, seconds: float | None) -> plan.Planned:
        return plan.Planned("toy", claim, "bits", True, "", None, None, seconds, "ledger" if seconds else "")

    def done(claim: str) -> Measurement:
        return Measurement("toy", claim, "bits", 1.0, 1.0, "reproduced", "", None, seconds=4.0)

    eta = plan.Eta([row("a", None), row("b", 10.0), row("c", None)])
    assert eta.after(done("a")) == 14.0  # b as the ledger says, c as a took
    assert eta.after(done("b")) == 4.0
    assert eta.after(done("c")) == 0.0
    assert plan.Eta([row("a", None), row("b", None)]).after(done("elsewhere")) is None


@pytest.mark.parametrize("given", ["no-equals", "toys/toy=nowhere", "=x"])
def test_a_wrong_model_path_is_one_line(given: str) -> None:
    result = run("rtn", "--model-path", given)
    assert result.exit_code == 2 and "--model-path" in result.output + result.stderr


def test_an_entry_without_implementation_says_so() -> None:
    planned = next(entry for entry in load_catalog().papers.values() if entry.impl is None)
    assert {measure(planned, claim).reason for claim in planned.claims} == {"no implementation yet"}
