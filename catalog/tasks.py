"""The lm-eval tasks behind an accuracy claim: what its setting or its data set names, in lm-eval's spelling."""

from __future__ import annotations

import re
from pathlib import Path

from requant.catalog.entry import MeasuredClaim
from requant.catalog.vocabulary import Dataset, Vocab
from requant.catalog.weights import NotHere

_NAME = re.compile(r"[a-z][a-z0-9_]*")
SHARES = frozenset(
    ("accuracy", "accuracy_norm", "mean_accuracy")
)  # metrics that are a share of right answers


def tasks_of(claim: MeasuredClaim, vocab: Vocab) -> tuple[str, ...]:
    """Names for lm-eval, in the order of the claim; several count equally.

    `setting.tasks` wins over the claim's data set. A name in it may be a data set's (its id, an alias, either with
    `_` for `-`), lm-eval's own, or a local task file ending in .yaml.
    Raises: NotHere saying which name leads nowhere.
    """
    names = claim.setting.get("tasks")
    if names is None:
        dataset = vocab.datasets.get(claim.dataset)
        if dataset is None or dataset.lm_eval_task is None:
            raise NotHere(
                f"no lm-eval task is known for {claim.dataset or 'its data'}; name them in setting.tasks"
            )
        return (dataset.lm_eval_task,)
    if not isinstance(names, str) or names == "unknown":
        raise NotHere("its setting does not name the lm-eval tasks")
    return tuple(task_name(name.strip(), vocab) for name in names.split(",") if name.strip())


def task_name(name: str, vocab: Vocab) -> str:
    """lm-eval's name of one task. Raises: NotHere, see `tasks_of`."""
    if Path(name).suffix in (".yaml", ".yml"):
        return name
    known = _spellings(vocab).get(_folded(name))
    if known is not None:
        if known.lm_eval_task is None:
            raise NotHere(f"no lm-eval task is known for {known.id}, one of its tasks")
        return known.lm_eval_task
    if not _NAME.fullmatch(name):
        raise NotHere(f"setting.tasks names {name!r}, which is neither a data set nor an lm-eval task")
    return name


def _spellings(vocab: Vocab) -> dict[str, Dataset]:
    return {
        _folded(name): dataset
        for dataset in vocab.datasets.values()
        for name in (dataset.id, *dataset.aliases)
    }


def _folded(name: str) -> str:
    return name.casefold().replace("_", "-")
