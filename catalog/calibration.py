"""Draw the calibration set that a claim names, exactly as its rule says: Python's random stream, order and all.

Rules     crops-of-documents  a random document with at least seqlen tokens, then a random crop of it (GPTQ,
          C4)
          crops-of-joined     random crops of the joined and tokenized text (GPTQ, WikiText-2)
          packed-short        shuffled documents of at most seqlen tokens, joined, cut in blocks (AWQ, Pile)
          truncated           shuffled documents, truncated to seqlen tokens; shorter ones stay (SmoothQuant, Pile)
          truncated-long      shuffled documents of seqlen tokens or more, truncated, but for those that mostly
          repeat their last token (AutoRound, Pile)
          reference           windows of the reference text, BOS first
Source    IST-DASLab/gptq@2d65066 datautils.py; mit-han-lab/llm-awq@d6e797a awq/utils/calib_data.py;
          mit-han-lab/smoothquant@43ded6c smoothquant/calibration.py; intel/auto-round@b9f3d00, as its paper states it
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from requant.catalog.corpus import DatasetUnavailable, Tokenizer, rows_of_dataset
from requant.catalog.protocols import Dataset
from requant.catalog.reference import models
from requant.catalog.vocabulary import Calibration, Vocab

_ATTEMPTS = 100_000  # documents looked at before a corpus counts as too short


class CalibrationError(ValueError):
    """The text cannot give the calibration set; the message says which rule failed and why."""


Tokens = Tensor | list[Tensor]


def draw(calibration: Calibration, tokenizer: Tokenizer, texts: Sequence[str]) -> Tokens:
    """Calibration tokens from the documents of the calibration's dataset.

    Returns: int64 [n_samples, seqlen]; where a rule keeps shorter samples, one such tensor for each length.
    Raises: CalibrationError if the rule is not one that can be run, or the text is too short for it.
    """
    if calibration.rule not in _RULES:
        raise CalibrationError(
            f"{calibration.id} has the rule {calibration.rule!r}; only {', '.join(_RULES)} can be run"
        )
    return _RULES[calibration.rule](calibration, tokenizer, texts)


def calibration_tokens(
    calibration: Calibration,
    vocab: Vocab,
    tokenizer: Tokenizer,
    download: bool = False,
    paths: Mapping[str, str | Path] | None = None,
) -> Tokens:
    """`draw` on the calibration's own dataset, or on the file given for it (see corpus.documents).

    Raises: DatasetUnavailable if it is not here.
    """
    if calibration.rule == "reference":
        return models.calibration_tokens(calibration.n_samples, calibration.seqlen, calibration.seed)
    dataset = source_of(calibration, vocab)
    return draw(
        calibration, tokenizer, rows_of_dataset(dataset, calibration.id, paths=paths, download=download)
    )


def source_of(calibration: Calibration, vocab: Vocab) -> Dataset:
    """The file a calibration set is drawn from. Raises: DatasetUnavailable if none is known."""
    source = vocab.datasets[calibration.dataset]
    if calibration.file is None or source.repo is None:
        raise DatasetUnavailable(
            f"{calibration.id} names no file of {calibration.dataset} that could be read"
        )
    return Dataset(
        id=source.repo, config=None, revision=source.revision, split=calibration.split,
        file=calibration.file, field="text", text_lines=None,
    )  # fmt: skip


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer(text, verbose=False)["input_ids"]


def _crops_of_documents(calibration: Calibration, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    stream, length, crops = random.Random(calibration.seed), calibration.seqlen, []
    for _ in range(_ATTEMPTS):
        ids = _encode(tokenizer, texts[stream.randint(0, len(texts) - 1)])
        if len(ids) < length:
            continue
        if len(ids) == length:
            raise CalibrationError(
                f"{calibration.id}: a document of exactly {length} tokens ends the original sampler as well"
            )
        start = stream.randint(0, len(ids) - length - 1)
        crops.append(ids[start : start + length])
        if len(crops) == calibration.n_samples:
            return torch.tensor(crops)
    raise CalibrationError(f"{calibration.id}: too few documents of {length} tokens or more")


def _crops_of_joined(calibration: Calibration, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    ids, length = torch.tensor(_encode(tokenizer, "\n\n".join(texts))), calibration.seqlen
    if len(ids) < length + 2:
        raise CalibrationError(
            f"{calibration.id}: the text has {len(ids)} tokens, too few for crops of {length}"
        )
    stream = random.Random(calibration.seed)
    starts = [stream.randint(0, len(ids) - length - 1) for _ in range(calibration.n_samples)]
    return torch.stack([ids[start : start + length] for start in starts])


def _packed_short(calibration: Calibration, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    kept: list[list[int]] = []
    for index in _shuffled(len(texts), calibration.seed):
        ids = _encode(tokenizer, texts[index].strip())
        if 0 < len(ids) <= calibration.seqlen:
            kept.append(ids)
        if len(kept) == calibration.n_samples:
            break
    tokens = torch.tensor([token for ids in kept for token in ids])
    n_blocks = len(tokens) // calibration.seqlen
    if not n_blocks:
        raise CalibrationError(
            f"{calibration.id}: {len(kept)} short documents do not fill one block of {calibration.seqlen}"
        )
    return tokens[: n_blocks * calibration.seqlen].view(n_blocks, calibration.seqlen)


def _truncated(calibration: Calibration, tokenizer: Tokenizer, texts: Sequence[str]) -> list[Tensor]:
    by_length: dict[int, list[list[int]]] = {}
    for index in _shuffled(len(texts), calibration.seed)[: calibration.n_samples]:
        ids = _encode(tokenizer, texts[index])[: calibration.seqlen]
        by_length.setdefault(len(ids), []).append(ids)
    n_samples = sum(map(len, by_length.values()))
    if n_samples < calibration.n_samples or 0 in by_length:
        problem = "an empty one" if 0 in by_length else f"only {n_samples}"
        raise CalibrationError(
            f"{calibration.id}: among {calibration.n_samples} documents there would be {problem}"
        )
    return [torch.tensor(samples) for samples in by_length.values()]


def _truncated_long(calibration: Calibration, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    kept: list[list[int]] = []
    for index in _shuffled(len(texts), calibration.seed):
        ids = _encode(tokenizer, texts[index])[: calibration.seqlen]
        if len(ids) == calibration.seqlen and ids.count(ids[-1]) <= calibration.seqlen // 2:
            kept.append(ids)
        if len(kept) == calibration.n_samples:
            return torch.tensor(kept)
    raise CalibrationError(
        f"{calibration.id}: {len(kept)} documents have {calibration.seqlen} tokens, {calibration.n_samples} are needed"
    )


def _shuffled(n: int, seed: int) -> Sequence[int]:
    """The order of datasets' shuffle(seed)."""
    return np.random.default_rng(seed).permutation(n).tolist()


_RULES: dict[str, Callable[[Calibration, Tokenizer, Sequence[str]], Tokens]] = {
    "crops-of-documents": _crops_of_documents,
    "crops-of-joined": _crops_of_joined,
    "packed-short": _packed_short,
    "truncated": _truncated,
    "truncated-long": _truncated_long,
}
