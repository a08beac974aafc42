"""Run the protocols that belong to lm-eval by calling lm-eval, offline unless told otherwise.

lm-eval is imported when first needed (some seconds). It sets the pad token of the tokenizer it gets, ties the
model's weights and seeds three random generators; here it gets a copy of the tokenizer, may not tie, and the
generators are put back.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import nn

from requant.catalog.corpus import Checks, DatasetUnavailable, EvaluationError, local_file
from requant.catalog.errors import nearest
from requant.catalog.evaluate import Evaluation, eval_mode, ratio
from requant.catalog.protocols import Protocol


def run_harness(
    model: nn.Module,
    tokenizer: Any,
    protocol: Protocol,
    *,
    tasks: Sequence[str | Path] | None = None,
    paths: Mapping[str, str | Path] | None = None,
    download: bool = False,
    batch_size: int = 1,
) -> Evaluation:
    """Evaluate a protocol with lm_eval.simple_evaluate.

    Args:
        tokenizer: a Hugging Face tokenizer; left as it was.
        tasks: names or YAML files, required where the protocol names none and refused where it does.
        paths: dataset id -> local .parquet or .jsonl file that replaces the data of the protocol's own task.
    Raises: EvaluationError if lm-eval is missing or gives no such metric; DatasetUnavailable; ValueError.
    """
    chosen, data = _tasks(protocol, tasks), _local_data(protocol, paths or {})
    with TemporaryDirectory() as scratch:
        if data is not None:
            chosen = [_redirected(task, protocol, data, Path(scratch)) for task in chosen]
        results = simple_evaluate(
            model, tokenizer, chosen, asked_by=protocol.id, n_shots=protocol.harness.n_shots, download=download,
            batch_size=batch_size, max_length=protocol.windows.length, dataset=protocol.dataset.id,
        )  # fmt: skip
    summarize = _accuracy if protocol.metric.aggregation == "task-mean" else _rolling
    return summarize(results, protocol, f"lm-eval {version('lm_eval')}")


def simple_evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    asked_by: str = "requant eval",
    n_shots: int | None = None,
    download: bool = False,
    batch_size: int = 1,
    max_length: int | None = None,
    dataset: str | None = None,
) -> Mapping[str, Any]:
    """lm-eval's own results on a model in memory; model, tokenizer and random generators are left as they were.

    Args:
        tasks: lm-eval names or YAML files.
        n_shots: examples in the prompt; None leaves it to the task.
        max_length: tokens fed at once; None is the model's own maximum.
        dataset: id for the remedy that an error about missing data offers.
    Raises: EvaluationError if lm-eval is missing; DatasetUnavailable; ValueError for a task that is not there.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError(
            f"{asked_by} needs lm-eval ({error}): pip install 'lm-eval[hf]>=0.4.13'"
        ) from error
    _require_files(tasks)
    manager = TaskManager(**_index(tasks, Path(lm_eval.__file__).parent / "tasks"))
    if absent := [task for task in tasks if task not in manager.all_tasks and not Path(task).is_file()]:
        hint = nearest(absent[0], manager.all_tasks)
        raise ValueError(
            f"lm-eval {version('lm_eval')} has no task {absent[0]!r}"
            + (f"; did you mean {hint}?" if hint else "")
        )
    with ExitStack() as stack:
        for guard in (eval_mode(model), _random_state(), torch.inference_mode(), _untouched_weights(model)):
            stack.enter_context(guard)
        if not download:
            stack.enter_context(_offline())
        lm = HFLM(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size,
            max_length=max_length,
        )  # fmt: skip
        try:
            return lm_eval.simple_evaluate(
                model=lm, tasks=list(tasks), num_fewshot=n_shots, bootstrap_iters=0, task_manager=manager
            )
        except (ConnectionError, FileNotFoundError) as error:
            remedy = f' or give a local copy with paths={{"{dataset}": "<file>"}}' if dataset else ""
            raise DatasetUnavailable(
                f"{asked_by}: lm-eval cannot find the data of {list(tasks)} ({error}); allow the download "
                f"(download=True){remedy}"
            ) from error


def _require_files(tasks: Sequence[str]) -> None:
    for task in tasks:
        if Path(task).suffix in (".yaml", ".yml") and not Path(task).is_file():
            raise ValueError(f"the task file {task} does not exist")


def _tasks(protocol: Protocol, tasks: Sequence[str | Path] | None) -> list[str]:
    fixed = protocol.harness.task
    if (fixed is None) == (not tasks):
        need = (
            "name the lm-eval tasks (tasks=[...])" if fixed is None else f"the task is {fixed}; give no tasks"
        )
        raise ValueError(f"{protocol.id}: {need}")
    return [str(task) for task in tasks or ()] or [fixed]


def _local_data(protocol: Protocol, paths: Mapping[str, str | Path]) -> Path | None:
    return local_file(protocol.dataset, protocol.id, paths)


def _redirected(task: str, protocol: Protocol, data: Path, folder: Path) -> str:
    """A task file that includes the built-in task and reads its test split from `data`."""
    import lm_eval

    config = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / task / f"{task}.yaml"),
        "dataset_path": "parquet" if data.suffix == ".parquet" else "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {protocol.dataset.split: str(data)}},
        "training_split": None,
        "validation_split": None,
    }
    file = folder / f"{task}.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return str(file)


def _index(tasks: Sequence[str], tasks_dir: Path) -> dict[str, Any]:
    """What to index: all 14,000 files take up to half a minute, so the folders with a file of each task's name."""
    named = [task for task in tasks if not Path(task).is_file()]
    files = {path.stem: path for path in tasks_dir.rglob("*.yaml") if path.stem in named} if named else {}
    if all(name in files for name in named):
        folders = sorted({str(path.parent) for path in files.values()})
        return {"include_defaults": False, "include_path": folders or None}
    return {"include_defaults": True}


@contextmanager
def _offline() -> Iterator[None]:
    """No network for the hub and for datasets, which read their environment only when imported."""
    import datasets
    import huggingface_hub

    with (
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True),
    ):
        yield


@contextmanager
def _random_state() -> Iterator[None]:
    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)


@contextmanager
def _untouched_weights(model: nn.Module) -> Iterator[None]:
    """lm-eval calls model.tie_weights(), which could undo a head quantized apart from the embedding."""
    if not hasattr(model, "tie_weights"):
        yield
        return
    object.__setattr__(model, "tie_weights", lambda *args, **kwargs: None)
    try:
        yield
    finally:
        object.__delattr__(model, "tie_weights")


def _rolling(results: Mapping[str, Any], protocol: Protocol, engine: str) -> Evaluation:
    """Loss per word or byte from the per-document log-likelihoods, which also give the standard error."""
    metric = protocol.harness.metric
    (samples,) = results["samples"].values()
    if not samples or metric not in samples[0]:
        raise EvaluationError(f"{protocol.id}: the task reports no {metric}")
    sums = {
        name: torch.tensor([s[name] for s in samples], dtype=torch.float64) for name in _pairs(samples[0])
    }
    nll, error = ratio(-sums[metric][:, 0], sums[metric][:, 1])
    ((task, row),) = results["results"].items()
    value = float(row[f"{metric},none"])
    ratio_bytes = None
    if {"word_perplexity", "byte_perplexity"} <= sums.keys():
        ratio_bytes = float(sums["byte_perplexity"][:, 1].sum() / sums["word_perplexity"][:, 1].sum())
    return Evaluation(
        protocol=protocol.id, value=value, metric=protocol.metric.name, nll=nll, standard_error=error,
        value_standard_error=None if error is None else value * error, n_tokens=None, n_windows=len(samples),
        checks=Checks(windows=len(samples), bytes_per_word=ratio_bytes), engine=engine,
        tasks={task: {"version": results["versions"].get(task), "value": value, "n_documents": len(samples)}},
    )  # fmt: skip


def _pairs(sample: Mapping[str, Any]) -> list[str]:
    return [name for name in ("word_perplexity", "byte_perplexity", "bits_per_byte") if name in sample]


def _accuracy(results: Mapping[str, Any], protocol: Protocol, engine: str) -> Evaluation:
    """Percent of right answers; the tasks that were asked for are averaged without weights.

    A group of tasks (mmlu) counts once, with the value that lm-eval gives it; its members do not count again.
    """
    members = results.get("group_subtasks", {})
    inner = {name for names in members.values() for name in names}
    tasks, errors = {}, []
    for task, row in results["results"].items():
        if task in inner:
            continue
        metric = protocol.harness.metric
        if metric == "acc_norm" and "acc_norm,none" not in row:
            metric = "acc"
        if f"{metric},none" not in row:
            known = ", ".join(sorted(key.partition(",")[0] for key in row if key.endswith(",none")))
            raise EvaluationError(f"{protocol.id}: task {task} reports no {metric}; it reports {known}")
        share, n = row[f"{metric},none"], n_documents(results, task)
        tasks[task] = {
            "version": results.get("versions", {}).get(task),
            "value": 100 * share,
            "n_documents": n,
        }
        errors.append(1e4 * share * (1 - share) / max(n - 1, 1))
    total = sum(task["n_documents"] for task in tasks.values())
    return Evaluation(
        protocol=protocol.id, value=sum(task["value"] for task in tasks.values()) / len(tasks),
        metric=protocol.metric.name, nll=None, standard_error=None,
        value_standard_error=sum(errors) ** 0.5 / len(errors), n_tokens=None, n_windows=total,
        checks=Checks(windows=total), engine=engine, tasks=tasks,
    )  # fmt: skip


def n_documents(results: Mapping[str, Any], task: str) -> int:
    """Documents of a task that were evaluated; of a group, those of all its members."""
    members = results.get("group_subtasks", {}).get(task, ())
    if members:
        return sum(n_documents(results, member) for member in members)
    return results["n-samples"][task]["effective"]
