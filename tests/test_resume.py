"""`requant run --save` stopped in any way, then resumed: at most the claim in flight is lost, nothing runs twice."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from requant.catalog import code_hash as code_hash_module
from requant.catalog import ledger, parallel, resume
from requant.catalog.cli import app
from requant.catalog.code_hash import code_hash
from requant.catalog.entry import Tolerance
from requant.catalog.loader import load_catalog
from requant.catalog.measurement import NOT_RUN, Measurement

COMMAND = [sys.executable, "-m", "requant.catalog.cli", "run"]
LINE = re.compile(r"\[\d+/\d+\] (\w+)-(\w+) ")


def run(*arguments: object):
    return CliRunner().invoke(app, ["run", *map(str, arguments)])


def saved(folder: Path) -> dict[tuple[str, str], dict]:
    """All records of a ledger; reading fails if a file is not whole."""
    return {(p.stem, c): row for p in folder.glob("*.json") for c, row in ledger.read(p.stem, folder).items()}


def _hears_interrupts() -> None:
    """Undo what a shell does to jobs in its background, where these tests may run: they ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
@pytest.mark.parametrize(("jobs", "how"), [(1, "SIGKILL"), (2, "SIGKILL"), (1, "SIGINT")])
def test_a_run_that_is_killed_keeps_what_it_reported(tmp_path: Path, jobs: int, how: str) -> None:
    """A line is printed after its claim is saved, so whatever was printed has to be there."""
    names = [
        "billm",
        "rtn",
        "--claim",
        "[bn]*",
    ]  # two counts of bits, then orderings of some seconds; one count
    call = [*COMMAND, *names, "--save", "--measured", tmp_path, "--jobs", str(jobs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    with subprocess.Popen(
        call, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=_hears_interrupts
    ) as process:
        printed = []
        for line in process.stdout:
            printed += LINE.findall(line)
            if printed and "not run" not in line:
                break
        workers = children(process.pid) if jobs > 1 else []
        process.send_signal(getattr(signal, how))
        printed += LINE.findall(process.stdout.read())
    assert process.returncode == (1 if how == "SIGINT" else -signal.SIGKILL)
    records = saved(tmp_path)
    assert set(printed) <= set(records)
    assert len(set(records) - set(printed)) <= 1  # saved, and killed before its line was out
    assert all(row["key"] for row in records.values())
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def test_going_on_measures_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("rtn", "gptq", "--claim", "bits_*", "--save", "--measured", tmp_path)
    assert first.exit_code == 0, first.output
    before = saved(tmp_path)
    gone = next(iter(sorted(before)))
    path = tmp_path / f"{gone[0]}.json"
    content = json.loads(path.read_text())
    content["claims"] = [row for row in content["claims"] if row["claim"] != gone[1]]
    path.write_text(json.dumps(content))
    asked, measure_all = [], parallel.measure_all

    def spy(papers, options, only):
        for item in measure_all(papers, options, only):
            asked.append((item.paper, item.claim))
            yield item

    monkeypatch.setattr(parallel, "measure_all", spy)
    second = run("rtn", "gptq", "--claim", "bits_*", "--save", "--resume", "--measured", tmp_path)
    assert second.exit_code == 0, second.output
    assert asked == [gone]
    assert f"{len(before) - 1} of {len(before)} claims kept from the ledger" in second.output
    assert f"{len(before)} claims: {len(before)} reproduced" in second.output
    strip = ("seconds", "environment")
    after = saved(tmp_path)
    assert {name: {k: v for k, v in row.items() if k not in strip} for name, row in after.items()} == {
        name: {k: v for k, v in row.items() if k not in strip} for name, row in before.items()
    }


def test_the_key_depends_on_what_decides_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = load_catalog()
    paper = catalog.papers["gptq"]
    claim = next(claim for claim in paper.claims if claim.kind == "ordering")
    bits = next(claim for claim in paper.claims if claim.kind == "bits")

    def key(claim=claim, device: str = "cpu") -> str:
        return resume.record_key(paper, claim, catalog.vocab, device)

    assert key() == key() == key(replace(claim, statement="In other words.", note="And a note."))
    assert key() != key(replace(claim, margin=claim.margin + 1))
    assert key() != key(replace(claim, protocol="reference-kjv-256/1"))
    assert key() != key(device="xpu")
    assert key(bits) != key(replace(bits, tolerance=Tolerance(why="looser", rel=0.5)))
    monkeypatch.setattr(resume, "code_hash", lambda modules: "other code")
    other_code = key()
    monkeypatch.undo()
    assert key() != other_code
    monkeypatch.setattr(ledger, "versions", lambda: {"torch": "0.1"})
    assert key() not in (other_code, resume.record_key(paper, bits, catalog.vocab))
    assert key() != other_code


def test_evidence_decides_the_claims_that_name_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    catalog, real = load_catalog(), resume.code_hash
    paper = catalog.papers["quip"]
    claims = {claim.kind: claim for claim in paper.claims}

    def keys() -> dict[str, str]:
        return {kind: resume.record_key(paper, claim, catalog.vocab) for kind, claim in claims.items()}

    before = keys()
    monkeypatch.setattr(resume, "code_hash", lambda names: "new" if "evidence/quip" in names else real(names))
    after = keys()
    assert {"invariant", "finding", "ordering", "bits"} <= set(before)
    assert {kind for kind in before if before[kind] != after[kind]} == {"invariant", "finding"}


def test_code_counts_as_far_as_a_module_reaches(tmp_path: Path) -> None:
    """`a` imports `_b`, which imports a name from `c`; evidence/a names `d` in a string; nobody reaches `e`."""
    (tmp_path / "evidence").mkdir()
    sources = {
        "a": "from requant.reference_impls import _b",
        "_b": "from requant.reference_impls.c import f",
        "c": "def f(): pass",
        "evidence/a": "from requant.reference_impls.a import x\nrun('d')",
        "d": "",
        "e": "",
    }
    for name, text in sources.items():
        (tmp_path / f"{name}.py").write_text(text)

    def hashes() -> list[str]:
        code_hash_module._neighbours.cache_clear()
        code_hash_module._reached.cache_clear()
        return [code_hash(names, tmp_path) for names in (["a"], ["a", "evidence/a"], None)]

    moved = {}
    for name, text in sources.items():
        before = hashes()
        (tmp_path / f"{name}.py").write_text(text + "\n# changed")
        moved[name] = "".join("*" if old != new else "." for old, new in zip(before, hashes(), strict=True))
    assert moved == {"a": "***", "_b": "***", "c": "***", "evidence/a": ".**", "d": ".**", "e": "..*"}


def test_real_methods_reach_the_ones_they_build_on() -> None:
    folder = Path(code_hash_module.__file__).parents[1] / "reference_impls"
    reached = code_hash_module._reached(frozenset({"awq"}), folder)
    assert {"awq", "gptq", "_quant", "_walk"} <= set(reached) and "i_llm" not in reached


def test_what_was_not_run_or_has_another_key_is_measured_again(tmp_path: Path) -> None:
    paper = load_catalog().papers["rtn"]
    names = [claim.id for claim in paper.claims][:4]
    keys = {("rtn", name): name for name in names}
    items = [
        Measurement("rtn", names[0], "bits", 1.0, 1.0, "reproduced", "", None),
        Measurement("rtn", names[1], "bits", 1.0, None, NOT_RUN, "no checkpoint", None),
        Measurement("rtn", names[2], "bits", 1.0, None, NOT_RUN, "error: x", None, failed=True),
        Measurement("rtn", names[3], "bits", 1.0, 1.0, "contradicted", "", None),
    ]
    ledger.save(items, tmp_path, keys=keys)
    keys["rtn", names[3]] = "changed"
    known = {**{("rtn", claim.id): "" for claim in paper.claims}, **keys}
    assert resume.measured_before([paper], known, lambda p, c: True, tmp_path) == [items[0]]
    assert resume.measured_before([paper], known, lambda p, c: False, tmp_path) == []


def test_wrong_use_is_one_line(tmp_path: Path) -> None:
    alone = run("rtn", "--resume")
    assert alone.exit_code == 2 and "--resume goes with --save" in alone.output + alone.stderr
    (tmp_path / "rtn.json").write_text("{")
    broken = run("rtn", "--claim", "bits_*", "--save", "--resume", "--measured", tmp_path)
    assert broken.exit_code == 2 and "rtn.json is not a ledger" in broken.output + broken.stderr
