"""The verbs `check`, `new` and `models`: what they print and write, and how they fail."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from requant.catalog import cli, inventory
from requant.catalog.loader import load_catalog
from requant.catalog.schemas import validator

DATA = Path(__file__).parent / "data"


@pytest.fixture
def toy_folder(tmp_path):
    """A copy of the toy catalog that a test may change; returns its folder of entries."""
    for name in ("catalog", "reference_impls"):
        shutil.copytree(DATA / name, tmp_path / name)
    return shutil.copytree(DATA / "valid", tmp_path / "entries")


def run(*args: object):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def test_orphans_fail_both_ways(toy_folder):
    (toy_folder.parent / "reference_impls" / "toy_lonely.py").write_text("", encoding="utf-8")
    (toy_folder.parent / "reference_impls" / "toy_nearest.py").unlink()
    result = run("check", "--papers", toy_folder)
    assert result.exit_code == 1
    assert "toy_nearest.yaml:10: impl = 'toy_nearest': is not a module" in result.stdout
    assert "reference_impls/toy_lonely.py: no entry names this module" in result.stdout


def test_evidence_on_no_method_is_an_error(toy_folder):
    (toy_folder.parent / "reference_impls" / "evidence" / "toy_gone.py").write_text("", encoding="utf-8")
    result = run("check", "--papers", toy_folder)
    assert result.exit_code == 1
    assert "evidence/toy_gone.py: there is no method toy_gone.py beside this folder" in result.stdout


def test_check_writes_records(toy_folder, tmp_path):
    target = tmp_path / "records.json"
    assert run("check", "--papers", toy_folder, "--json", target).exit_code == 0
    (toy_folder / "toy_survey.yaml").write_text("title: 3", encoding="utf-8")
    result = run("check", "toy_survey", "toy_nearest", "--papers", toy_folder, "--json", target)
    records = json.loads(target.read_text(encoding="utf-8"))
    assert result.exit_code == 1 and "2 checked, 1 claims, 1 error" in result.stdout
    assert list(validator("check").iter_errors(records)) == []
    assert [(record["id"], record["ok"], record["n_claims"]) for record in records] == [
        ("toy_nearest", True, 1),
        ("toy_survey", False, None),
    ]
    assert records[1]["error"]["line"] == 1
    assert not list(tmp_path.glob(".*"))


def test_new_then_check(toy_folder):
    assert (
        run(
            "new", "toy_new", "--arxiv", "2401.00002", "--title", 'A "new" toy: #1', "--papers", toy_folder
        ).exit_code
        == 0
    )
    result = run("check", "toy_new", "--papers", toy_folder)
    assert result.exit_code == 1
    assert "still say TODO(you): authors[0], venue.name, venue.year" in result.stdout
    assert "claims[1].protocol" in result.stdout and "title" not in result.stdout.partition("TODO")[2]
    before = (toy_folder / "toy_new.yaml").read_text(encoding="utf-8")
    again = subprocess.run(
        [sys.executable, "-m", "requant.catalog.cli", "new", "toy_new", "--papers", toy_folder],
        capture_output=True,
        text=True,
    )
    assert again.returncode == 2 and "exists already" in again.stderr and "Traceback" not in again.stderr
    assert (toy_folder / "toy_new.yaml").read_text(encoding="utf-8") == before
    assert 'title: "A \\"new\\" toy: #1"' in before


def test_filled_in_template_passes_but_for_the_module(toy_folder):
    run("new", "toy_new", "--papers", toy_folder)
    path = toy_folder / "toy_new.yaml"
    text = (
        path.read_text(encoding="utf-8")
        .replace("arxiv: TODO(you)", "arxiv: null")
        .replace("impl: rtn", "impl: toy_nearest")
    )
    text = text.replace("reference-kjv-256-spread/1", "reference-toy-short/1").replace(
        "dataset: wikitext2", "dataset: toytext"
    )
    names = {"name": "arXiv", "year": "2024", "url": '"https://toys.example"', "tags": "[analysis]"}
    names |= {"w_bits": "4", "value": "1.5", "fp16": "1.0", "protocol": "toy-2048/1", "requires": "[none]"}
    names |= {"model": "toys/toy-7b"}
    for key, value in names.items():
        text = re.sub(rf"\b{key}: \[?TODO\(you\)\]?", f"{key}: {value}", text)
    for index in range(text.count("- id: TODO(you)")):
        text = text.replace("- id: TODO(you)", f"- id: claim_{index}", 1)
    path.write_text(text.replace("TODO(you)", "something"), encoding="utf-8")
    error = load_catalog(toy_folder).failed["toy_new"]
    assert (error.field, error.message) == (
        "impl",
        "reference_impls/toy_new.py still says TODO(you) on line 1",
    )


@pytest.mark.parametrize(
    "name",
    ["../x", "/tmp/x", "Upper", "1st", "a-b", "", "none", "evidence", "parts", "a" * 65, "a\n", "über"],
)
def test_new_refuses_bad_ids(toy_folder, name):
    before = sorted(toy_folder.parent.rglob("*"))
    assert run("new", "--papers", toy_folder, "--", name).exit_code == 2
    assert sorted(toy_folder.parent.rglob("*")) == before


def test_unknown_id_and_missing_folder(toy_folder, tmp_path):
    result = run("check", "toy_roundin", "--papers", toy_folder)
    assert result.exit_code == 2 and "did you mean toy_rounding?" in result.stderr
    gone = subprocess.run(
        [sys.executable, "-m", "requant.catalog.cli", "check", "--papers", tmp_path / "gone"],
        capture_output=True,
        text=True,
    )
    assert gone.returncode == 2 and "is not a folder" in gone.stderr and "Traceback" not in gone.stderr


def test_models_lists_checkpoints(toy_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(inventory, "cached_models", lambda cache_dir=None: frozenset({"toys/toy-7b"}))
    target = tmp_path / "models.json"
    result = run("models", "--papers", toy_folder, "--json", target)
    rows = json.loads(target.read_text(encoding="utf-8"))
    assert result.exit_code == 0 and "1 of 2 claims unlocked" in result.stdout
    assert list(validator("inventory").iter_errors(rows)) == []
    assert {row["id"]: row["cached"] for row in rows} == {"toys/toy-125m": False, "toys/toy-7b": True}


def test_models_says_where_a_checkpoint_is_and_what_it_takes(toy_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(inventory, "cached_models", lambda cache_dir=None: frozenset())
    small, large = tmp_path / "all" / "toys" / "toy-125m", tmp_path / "elsewhere"
    for folder, weights in ((small, "pytorch_model.bin"), (large, "model.safetensors")):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}", encoding="utf-8")
        (folder / weights).write_bytes(b"12345")
    target = tmp_path / "models.json"
    arguments = ("--models-dir", tmp_path / "all", "--model-path", f"toys/toy-7b={large}")
    result = run("models", "--papers", toy_folder, "--json", target, *arguments)
    assert result.exit_code == 0, result.stderr
    rows = {row["id"]: row for row in json.loads(target.read_text(encoding="utf-8"))}
    assert list(validator("inventory").iter_errors(list(rows.values()))) == []
    pickled, row = rows["toys/toy-125m"], rows["toys/toy-7b"]
    assert (pickled["here"], pickled["form"]) == ("models-dir", "pickle")
    assert (row["here"], row["form"], row["size_bytes"]) == ("model-path", "safetensors", 5)
    assert row["cpu_bytes"] == 2 * row["params"] * 4 and row["gpu_bytes"] == 2 * row["params"] * 2
    assert "refused" in result.stdout and "1 of 2 claims unlocked" in result.stdout


def test_check_never_imports_torch():
    code = "import sys, requant.catalog.cli as c; c.load_catalog(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
