"""Score windows with a causal language model: losses, and divergence from another model, a few positions at a time.

A batch goes through the model's blocks once; the logits of all its positions are never there together. At a vocabulary
of 256,000 those of 4,096 tokens take 4 GB, more than a model that has such a vocabulary may take itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from requant.catalog.corpus import EvaluationError, Window
from requant.catalog.protocols import Protocol

BATCH_TOKENS = 4096  # tokens a forward pass by default: 16 windows of 256, 2 of 2048
LOGITS_AT_ONCE = 2**24  # made by the head in one product: 64 MiB of float32
IN_CACHE = 2**19  # of these, normalized at once: 2 MiB


def score_windows(
    model: nn.Module,
    reference: nn.Module | None,
    windows: Sequence[Window],
    protocol: Protocol,
    batch_size: int | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Tensor]:
    """Per batch float64 [n, 4]: scored tokens, and sums over them of the loss, the KL and the agreements.

    Raises: EvaluationError, naming the window, for logits or losses that are not finite.
    """
    done = 0
    for (length, first), group in groupby(windows, key=lambda window: (len(window.ids), window.first_scored)):
        alike = list(group)
        size = batch_size or max(1, BATCH_TOKENS // length)
        for start in range(0, len(alike), size):
            ids = torch.stack([window.ids for window in alike[start : start + size]])  # [n, length]
            fed = ids[:, :-1] if protocol.windows.fed == "all-but-last" else ids
            mine = predict(model, fed, first, length)
            theirs = None if reference is None else predict(reference, fed, first, length)
            yield _score(mine, theirs, ids[:, first:], protocol, done)
            done += len(ids)
            if progress is not None:
                progress(done, len(windows))


# --- logits, some positions at a time ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predictions:
    """What a model predicts at n positions: their last hidden states, and the head that makes logits of a few."""

    states: Tensor  # [n, d]
    head: Callable[[Tensor], Tensor]
    vocabulary: int

    def logits(self, begin: int, end: int) -> Tensor:
        """[end - begin, vocabulary]."""
        return self.head(self.states[begin:end])


class _Seen(Exception):
    """Ends a forward pass before the head."""


def predict(model: nn.Module, fed: Tensor, first: int, length: int) -> Predictions:
    """Run the model on tokens fed [batch, seqlen]: what it predicts at positions first..length-1, window after window.

    A transformers model is run up to its head, without keeping keys and values; of any other all logits are made.
    """
    device = next(chain(model.parameters(), model.buffers()), fed).device
    used = slice(first - 1, length - 1)
    body = model.get_decoder() if hasattr(model, "get_decoder") else model
    if body is model:
        output = model(fed.to(device))
        logits = getattr(output, "logits", output)[:, used].flatten(0, 1)
        return Predictions(logits, lambda chosen: chosen, logits.shape[-1])
    seen: list[Any] = []

    def stop(_body: nn.Module, _args: tuple, output: Any) -> None:
        seen.append(output)
        raise _Seen

    handle = body.register_forward_hook(stop)
    try:
        with suppress(_Seen):
            model(fed.to(device), use_cache=False)
    finally:
        handle.remove()
    states = seen[0][0][:, used].flatten(0, 1)
    vocabulary = model.get_output_embeddings().weight.shape[0]

    def head(chosen: Tensor) -> Tensor:
        """What the model itself makes of hidden states, soft caps and scales behind its head included."""
        body.forward = lambda *_args, **_kwargs: type(seen[0])(last_hidden_state=chosen[None])
        try:
            return model(fed[:1, :1].to(device), use_cache=False).logits[0]
        finally:
            del body.forward

    return Predictions(states, head, vocabulary)


# --- scores -----------------------------------------------------------------------------------------------------------


def _score(
    mine: Predictions, theirs: Predictions | None, targets: Tensor, protocol: Protocol, done: int
) -> Tensor:
    """float64 [n, 4] of a batch with targets [n, t]; its first window is number `done`."""
    n, n_targets = targets.shape
    flat, step = targets.flatten().to(mine.states.device), max(1, LOGITS_AT_ONCE // mine.vocabulary)
    losses, divergence, same = [], [], []
    for begin in range(0, len(flat), step):
        end = min(begin + step, len(flat))
        logits = mine.logits(begin, end)
        other = None if theirs is None else theirs.logits(begin, end).to(logits.device)
        for rows in torch.arange(end - begin).split(max(1, IN_CACHE // mine.vocabulary)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            exact = logits[part] if protocol.score.loss_dtype == "model" else logits[part].float()
            losses.append(functional.cross_entropy(exact, flat[begin:end][part], reduction="none"))
            if not math.isfinite(exact.sum(dtype=torch.float32) + losses[-1].sum(dtype=torch.float32)):
                _name_what_is_not_finite(exact, losses[-1], protocol, done, begin + part.start, n_targets)
            if other is not None:
                same.append(logits[part].argmax(-1) == other[part].argmax(-1))
                divergence.append(_divergence(logits[part], other[part]))
    by_window = torch.cat(losses).view(n, n_targets)
    if protocol.score.loss_dtype == "model":  # the mean of a window is rounded to that dtype, too
        by_window = by_window.mean(1, keepdim=True).expand(n, n_targets)
    counts = torch.full((n,), n_targets, dtype=torch.float64)
    none = torch.zeros(n, n_targets)
    found = [torch.cat(parts).view(n, n_targets) if parts else none for parts in (divergence, same)]
    return torch.stack([counts, *(part.double().sum(1).cpu() for part in (by_window, *found))], dim=1)


def _name_what_is_not_finite(
    logits: Tensor, losses: Tensor, protocol: Protocol, done: int, begin: int, n_targets: int
) -> None:
    """Raise EvaluationError naming the window of the first position, counted from `begin`, with such a logit or loss.

    Nothing happens where only their sum is too large.
    """
    for what, finite in (("logits", torch.isfinite(logits).all(dim=1)), ("losses", torch.isfinite(losses))):
        if not finite.all():
            window = done + (begin + int((~finite).nonzero()[0])) // n_targets
            raise EvaluationError(
                f"{protocol.id}: the {what} of window {window} are not finite (NaN or infinite)"
            )


def _divergence(logits: Tensor, other: Tensor) -> Tensor:
    """KL(other || model) at each position, nats."""
    p, q = other.float().log_softmax(-1), logits.float().log_softmax(-1)
    return p.exp().mul_(p.sub_(q)).sum(-1)
