"""`requant eval`, and accuracy claims: offline, on task files made from the reference text."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from typer.testing import CliRunner

from requant.catalog import harness
from requant.catalog.claims import Options, measure
from requant.catalog.cli import app
from requant.catalog.corpus import documents
from requant.catalog.entry import MeasuredClaim, Source, Tolerance
from requant.catalog.evaluate import evaluate
from requant.catalog.harness import _accuracy
from requant.catalog.loader import load_catalog
from requant.catalog.measurement import CONTRADICTED, NOT_RUN, REPRODUCED
from requant.catalog.protocols import get_protocol
from requant.catalog.quantize import Job, quantize_to_folder
from requant.catalog.reference.models import load_reference
from requant.catalog.tasks import tasks_of
from requant.catalog.vocabulary import load_vocab
from requant.catalog.weights import NotHere
from requant.reference_impls import rtn

TASKS = Path(__file__).parent / "data" / "lm_eval"
ROLLING = "reference-kjv-rolling-256/1"
ACCURACY = "lm-eval-accuracy/1"
pytest.importorskip("lm_eval")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """datasets keeps what it converts; keep it out of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def chapters() -> list[str]:
    return sorted(documents(get_protocol(ROLLING)), key=len)[::24]


@pytest.fixture(scope="module")
def questions(chapters) -> list[dict]:
    """Which two words end a verse: its own, or those of the next verse."""
    verses = [verse.split() for verse in chapters[-1].split("\n") if 8 < len(verse.split()) < 40][:12]
    ends = [" ".join(verse[-2:]) for verse in verses]
    return [
        {"start": " ".join(verse[:-2]), "endings": [own, other], "label": 0}
        for verse, own, other in zip(verses, ends, ends[1:] + ends[:1], strict=True)
    ]


def write_task(folder: Path, name: str, rows: list[dict]) -> Path:
    data, task = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task.write_text((TASKS / f"{name}.yaml").read_text("utf-8").replace("DATA_FILE", str(data)), "utf-8")
    return task


def run(*arguments: object):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def own_accuracy(model, tokenizer, questions: list[dict]) -> float:
    """Percent of questions whose right ending is the likelier one, by a plain forward pass each."""
    right = 0
    for row in questions:
        sums = []
        for ending in row["endings"]:
            context = tokenizer(row["start"])["input_ids"]
            whole = tokenizer(f"{row['start']} {ending}")["input_ids"]
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(float(logits[i - 1, whole[i]]) for i in range(len(context), len(whole))))
        right += sums.index(max(sums)) == row["label"]
    return 100 * right / len(questions)


@torch.no_grad()
def test_tasks_agree_with_our_own_evaluator(chapters, questions, tmp_path) -> None:
    files = (
        write_task(tmp_path, "kjv", [{"page": chapter} for chapter in chapters]),
        write_task(tmp_path, "choice", questions),
    )
    target = tmp_path / "rows.json"
    arguments = ["--model", "reference", "--method", "rtn", "--config", "w_bits=3", "--max-length", 256]
    result = run(*arguments, "--tasks", ",".join(map(str, files)), "--json", target)
    assert result.exit_code == 0, result.output + result.stderr
    rows = {(row["method"], row["name"], row["metric"]): row for row in json.loads(target.read_text())}
    n_words = sum(len(re.split(r"\s+", chapter)) for chapter in chapters)
    reference = load_reference()
    quantized = rtn.quantize(reference.model, None, rtn.Config(w_bits=3))
    for method, model in (("none", reference.model), ("rtn", quantized)):
        ours = evaluate(model, reference.tokenizer, ROLLING, documents=chapters)
        theirs = rows[method, "kjv_rolling", "word_perplexity"]
        assert math.log(theirs["value"]) * n_words == pytest.approx(ours.nll * ours.n_tokens, rel=1e-4)
        assert theirs["version"] == 1.0 and theirs["n"] == len(chapters)
        share = 100 * rows[method, "kjv_choice", "acc"]["value"]
        assert share == pytest.approx(own_accuracy(model, reference.tokenizer, questions), abs=1e-6)
    assert "unquantized" in result.output and "kjv_choice" in result.output


def test_a_protocol_gives_errors_and_divergence(tmp_path) -> None:
    target = tmp_path / "rows.json"
    protocol = "reference-kjv-256-short/1"
    result = run("--model", "reference", "--method", "gptq", "--config", "w_bits=3", "--protocol", protocol,
                 "--json", target)  # fmt: skip
    assert result.exit_code == 0, result.output + result.stderr
    plain, quantized = json.loads(target.read_text())
    assert (plain["method"], plain["kl"], quantized["method"]) == ("none", None, "gptq")
    assert plain["value"] < quantized["value"] and quantized["kl"] > 0 and plain["standard_error"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "nothing to evaluate on"),
        (("--protocol", "reference-kjv-256-short/2"), "reference-kjv-256-short"),
        (("--protocol", ACCURACY), "name the lm-eval tasks"),
        (("--tasks", "no_such.yaml"), "no_such.yaml does not exist"),
        (("--tasks", "x.yaml", "--method", "gtpq"), "did you mean gptq?"),
        (("--tasks", "x.yaml", "--method", "rtn", "--config", "wbits=3"), "no setting 'wbits'"),
        (("--tasks", "x.yaml", "--method", "rtn", "--config", "3"), "is not of the form key=value"),
        (("--tasks", "x.yaml", "--method", "gptq", "--calibration", "c5"), "no calibration set 'c5'"),
        (("--protocol", ACCURACY, "--max-length", 8), "fixes shots and window length"),
    ],
)
def test_wrong_use_is_one_line(arguments: tuple, words: str) -> None:
    result = run("--model", "reference", *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_task_that_lm_eval_does_not_have_is_named(monkeypatch) -> None:
    folder = Path(harness.__file__).parent  # indexing all of lm-eval's own would take half a minute
    monkeypatch.setattr(
        harness, "_index", lambda *_: {"include_defaults": False, "include_path": str(folder / "vocab")}
    )
    result = run("--model", "reference", "--tasks", "piqua")
    assert result.exit_code == 2 and "has no task 'piqua'" in result.stderr


def test_an_absent_checkpoint_is_named(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run("--model", "toy/absent", "--tasks", "x.yaml")
    assert result.exit_code == 2 and "no checkpoint of toy/absent here" in result.stderr


def test_a_packed_folder_is_evaluated_as_it_was_quantized(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    quantize_to_folder(Job("rtn", "reference", folder, ("w_bits=3",), layout="requant"))
    where = ("--protocol", "reference-kjv-256-spread/1", "--json")
    method = ("--method", "rtn", "--config", "w_bits=3")
    assert run("--model", folder, *where, tmp_path / "a.json").exit_code == 0
    assert run("--model", "reference", *method, *where, tmp_path / "b.json").exit_code == 0
    (packed,), (_, direct) = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert packed["value"] == direct["value"]


def accuracy(**changes) -> MeasuredClaim:
    base = MeasuredClaim(
        id="made_up", kind="accuracy", statement="made up", model="toy/reference", dataset="several",
        source=Source(where="nowhere", seen_at="a test", evidence="primary"), setting=MappingProxyType({}),
        metric="mean_accuracy", value=50.0, baselines=MappingProxyType({}), protocol=ACCURACY,
        config=MappingProxyType({"w_bits": 4}), tolerance=Tolerance(why="a test", abs=0.01),
    )  # fmt: skip
    return replace(base, **changes)


def test_an_accuracy_claim_is_the_mean_over_its_tasks(questions, tmp_path) -> None:
    paper = load_catalog(ids={"rtn"}).papers["rtn"]
    reference = load_reference()
    reference.model.save_pretrained(tmp_path / "toy" / "reference")
    reference.tokenizer.save_pretrained(tmp_path / "toy" / "reference")
    first = write_task(tmp_path, "choice", questions[:8])
    second = tmp_path / "second.yaml"
    data = tmp_path / "second.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in questions[8:]), encoding="utf-8")
    text = (
        first.read_text("utf-8").replace("choice.jsonl", "second.jsonl").replace("kjv_choice", "kjv_second")
    )
    second.write_text(text, "utf-8")
    setting = MappingProxyType({"tasks": f"{first}, {second}"})
    found = measure(paper, accuracy(setting=setting), Options(models_dir=str(tmp_path)))
    assert found.state in (CONTRADICTED, REPRODUCED), found.reason
    tasks = found.details["tasks"]
    assert {name: part["version"] for name, part in tasks.items()} == {"kjv_choice": 1.0, "kjv_second": 1.0}
    assert found.measured == pytest.approx(sum(part["value"] for part in tasks.values()) / 2)
    assert [part["n_documents"] for part in tasks.values()] == [8, len(questions) - 8]
    agreed = accuracy(setting=setting, value=found.measured)
    assert measure(paper, agreed, Options(models_dir=str(tmp_path))).state == REPRODUCED
    off = accuracy(setting=setting, baselines=MappingProxyType({"fp16": 1.0}))
    gated = measure(paper, off, Options(models_dir=str(tmp_path)))
    assert gated.state == NOT_RUN and gated.reason.startswith("baseline off:")


def test_names_of_tasks_lead_to_those_of_lm_eval() -> None:
    vocab = load_vocab()

    def tasks(names: str | None, dataset: str = "several") -> tuple[str, ...]:
        setting = MappingProxyType({} if names is None else {"tasks": names})
        return tasks_of(accuracy(setting=setting, dataset=dataset), vocab)

    names = "BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC-e, arc_challenge, OBQA, LAMBADA, local.yaml, sciq"
    assert tasks(names) == (
        "boolq", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
        "lambada_openai", "local.yaml", "sciq",
    )  # fmt: skip
    assert tasks(None, "arc-easy") == ("arc_easy",)
    for wrong, words in (
        ("unknown", "does not name"),
        ("piqa, gqa", "gqa"),
        ("eight tasks", "'eight tasks'"),
    ):
        with pytest.raises(NotHere, match=words):
            tasks(wrong)
    with pytest.raises(NotHere, match=r"setting\.tasks"):
        tasks(None)


def test_known_tasks_exist_in_lm_eval() -> None:
    """By the name of a file or of a `task:` or `group:` line; importing all of them would take half a minute."""
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks"
    wanted = {item.lm_eval_task for item in load_vocab().datasets.values()} - {None}
    line = re.compile(r"^\s*(?:- )?(?:task|group|tag): *[\"']?([a-z][a-z0-9_]*)[\"']?\s*$", re.MULTILINE)
    found = {name for path in folder.rglob("*.yaml") for name in line.findall(path.read_text("utf-8"))}
    assert wanted - found == set()


def test_a_group_of_tasks_counts_once() -> None:
    results = {
        "results": {"mmlu": {"acc,none": 0.4}, "mmlu_a": {"acc,none": 0.1}, "mmlu_b": {"acc,none": 0.9},
                    "piqa": {"acc,none": 0.8}},
        "group_subtasks": {"mmlu": ["mmlu_a", "mmlu_b"]}, "versions": {"mmlu": 2, "piqa": 1.0},
        "n-samples": {"mmlu_a": {"effective": 5}, "mmlu_b": {"effective": 3}, "piqa": {"effective": 10}},
    }  # fmt: skip
    found = _accuracy(results, get_protocol(ACCURACY), "lm-eval")
    assert found.value == pytest.approx(60.0) and found.n_windows == 18
    assert found.tasks["mmlu"] == {"version": 2, "value": 40.0, "n_documents": 8}
