"""`requant doctor`: what it says about this machine, and when it says that numbers cannot be trusted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from requant.catalog import doctor
from requant.catalog.cli import app
from requant.catalog.doctor import BAD, NOTE, OK, canary, compare, read_constraints, versions
from requant.catalog.protocols import get_protocol

VERSIONS = json.loads(doctor.CANARY.read_text(encoding="utf-8"))["versions"]
PINNED = read_constraints() or {}


def run(*arguments: str):
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_this_machine_gives_the_recorded_perplexity() -> None:
    found = canary()
    assert found.state == OK, found.text


def test_the_recorded_value_says_how_it_was_measured() -> None:
    recorded = json.loads(doctor.CANARY.read_text(encoding="utf-8"))
    assert get_protocol(recorded["protocol"]).metric.name == "token_perplexity"
    assert set(recorded["versions"]) == set(doctor.DECISIVE)
    assert not PINNED or recorded["versions"] == {name: PINNED[name] for name in recorded["versions"]}, (
        "constraints.txt changed: run python -m requant.catalog.doctor --write"
    )


@pytest.mark.parametrize(
    ("factor", "state", "text"),
    [
        (1.0, OK, "four digits"),
        (1 + 4e-5, OK, "four digits"),
        (1 + 6e-5, NOTE, "nearly all"),
        (1 - 9e-4, NOTE, "nearly all"),
        (1.002, BAD, "do not trust"),
        (0.5, BAD, "do not trust"),
        (float("inf"), BAD, "do not trust"),
        (float("nan"), BAD, "not a number"),
    ],
)
def test_how_far_off_matters(factor: float, state: str, text: str) -> None:
    found = compare(13.8 * factor, 13.8, VERSIONS, 1.0)
    assert found.state == state
    assert text in found.text


def test_a_wrong_perplexity_names_the_suspect() -> None:
    assert "torch" in compare(20.0, 13.8, VERSIONS | {"torch": "1.0"}, 1.0).text
    assert "(not 1.0)" in compare(20.0, 13.8, VERSIONS | {"torch": "1.0"}, 1.0).text


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"perplexity": "x", "versions": {}}'])
def test_a_broken_record_is_a_finding(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "canary.json"
    if content is not None:
        path.write_text(content)
    found = canary(path)
    assert found.state == BAD
    assert "canary.json" in found.text


def test_versions_that_differ_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.13.0", "transformers": "5.0.0", "rich": "14.0", "numpy": "2.4.6"}
    monkeypatch.setattr(doctor, "installed", installed.get)
    pinned = {"torch": "2.13.0", "transformers": "5.23.0", "rich": "15.0.0", "numpy": "2.4.6", "absent": "1"}
    found = {item.name: item for item in versions(pinned)}
    assert set(found) == {"transformers", "versions"}
    assert "5.0.0, pinned 5.23.0" in found["transformers"].text
    assert "rich 14.0 (pinned 15.0.0)" in found["versions"].text
    assert {item.state for item in found.values()} == {NOTE}
    assert [item.state for item in versions({"torch": "2.13.0+cpu", "numpy": "2.4.6"})] == [OK], (
        "builds do not count"
    )


def test_without_constraints_it_says_so_and_uses_the_recorded_versions(tmp_path: Path) -> None:
    assert read_constraints(tmp_path / "constraints.txt") is None
    found = list(versions(None))
    assert found[0].state == NOTE
    assert "no constraints.txt" in found[0].text
    assert len(found) > 1


def test_constraints_are_read_without_comments(tmp_path: Path) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text("# a==1\nb==2  # why\n\nc>=3\n")
    assert read_constraints(path) == {"b": "2"}


def test_the_command_shows_every_finding_and_returns_its_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = tmp_path / "doctor.json"
    monkeypatch.setattr(doctor, "measure", lambda: (99.0, 0.1))
    result = run("--json", str(target))
    assert result.exit_code == 1, result.output
    assert "cannot be trusted" in result.output
    findings = {item["name"]: item for item in json.loads(target.read_text())}
    assert findings["perplexity"]["state"] == BAD
    assert {"python", "threads", "denormals", "cpu", "cuda", "triton", "checkpoints"} <= set(findings)
    assert re.search(r"\d+ of \d+ cores", findings["threads"]["text"])


def test_notes_alone_do_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    value = json.loads(doctor.CANARY.read_text(encoding="utf-8"))["perplexity"]
    monkeypatch.setattr(doctor, "measure", lambda: (value * 1.0005, 0.1))
    monkeypatch.setattr(doctor, "CONSTRAINTS", Path("nowhere") / "constraints.txt")
    result = run()
    assert result.exit_code == 0, result.output
    assert "can be trusted" in result.output


def test_a_model_that_cannot_run_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no weights")

    monkeypatch.setattr(doctor, "measure", fail)
    found = canary()
    assert found.state == BAD
    assert "no weights" in found.text
