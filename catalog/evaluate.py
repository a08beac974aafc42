"""Run a protocol on a model: perplexity, its standard error, and the divergence from an unquantized model.

Scoring is written once for all protocols that requant runs itself (scoring.py): windows are fed without padding, and
only the logits that predict a scored token are made. Protocols of lm-eval are handed to lm-eval (harness.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from requant.catalog.corpus import (
    Checks,
    DatasetUnavailable,
    EvaluationError,
    Tokenizer,
    Window,
    Windows,
    documents,
    token_windows,
)
from requant.catalog.gate import CheckMismatch, fp16_gate, tokenizer_family, verify_checks
from requant.catalog.protocols import REFERENCE_TEXT, Protocol, get_protocol
from requant.catalog.scoring import score_windows

__all__ = [
    "CheckMismatch", "Checks", "DatasetUnavailable", "Evaluation", "EvaluationError", "Window", "Windows",
    "documents", "evaluate", "fp16_gate", "token_windows", "tokenizer_family", "verify_checks",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One number and what is needed to judge it.

    Attributes:
        value: in the unit of the protocol's metric (perplexity, or percent).
        nll: mean loss in nats per token, word or byte; None for accuracies.
        standard_error: of `nll`, over windows (documents for lm-eval), which are taken as independent.
        value_standard_error: of `value`, in its unit.
        kl: mean KL(reference_model || model) in nats per scored token.
        top1_agreement: share of scored positions at which both models prefer the same token.
        first_tokens: first token id of windows 0 and 1, which shows where BOS went.
        tasks: of lm-eval protocols, task -> its version, value in the metric's unit, and number of documents.
    """

    protocol: str
    value: float
    metric: str
    nll: float | None
    standard_error: float | None
    value_standard_error: float | None
    n_tokens: int | None
    n_windows: int
    kl: float | None = None
    top1_agreement: float | None = None
    checks: Checks = field(default_factory=Checks)
    first_tokens: tuple[int, ...] = ()
    engine: str = "requant"
    tasks: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    @property
    def perplexity_standard_error(self) -> float | None:
        """Standard error of a perplexity, by the delta method; None for other metrics."""
        return self.value_standard_error if self.metric.endswith("perplexity") else None


def evaluate(
    model: nn.Module,
    tokenizer: Tokenizer,
    protocol: Protocol | str,
    *,
    documents: Sequence[str] | None = None,
    windows: Windows | None = None,
    reference_model: nn.Module | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    paths: Mapping[str, str | Path] | None = None,
    download: bool = False,
    tasks: Sequence[str | Path] | None = None,
) -> Evaluation:
    """Evaluate a causal language model under a protocol.

    Args:
        model: returns an object with `.logits` [batch, seqlen, vocab] for model(input_ids); runs where its
            parameters are; left as it was, its train/eval mode included.
        documents, windows: the text, or the windows made from it, in place of the protocol's dataset.
        reference_model: the unquantized model; gives `kl` and `top1_agreement` for a second forward pass,
            and is not looked at by lm-eval.
        batch_size: windows a forward pass; the default keeps a batch at 4,096 tokens. Use 1 for a model that
            computes activation scales over a whole batch.
        progress: called with (windows done, windows in all).
        paths, download: where the dataset may come from, see corpus.documents.
        tasks: lm-eval tasks (names or YAML files) where the protocol leaves them to the claim.
    Raises: EvaluationError, naming the window, for logits or losses that are not finite; DatasetUnavailable;
        ValueError for arguments that do not fit the protocol.
    """
    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    if protocol.engine == "lm-eval":
        if documents is not None or windows is not None:
            raise ValueError(f"{protocol.id}: lm-eval brings its own text; give tasks or paths")
        from requant.catalog.harness import run_harness

        return run_harness(
            model,
            tokenizer,
            protocol,
            tasks=tasks,
            paths=paths,
            download=download,
            batch_size=batch_size or 1,
        )
    if tasks is not None:
        raise ValueError(f"{protocol.id} is no lm-eval protocol, so it takes no tasks; got {list(tasks)}")
    if windows is None:
        windows = _windows(tokenizer, protocol, documents, paths, download)
    elif windows.protocol != protocol.id:
        raise ValueError(f"these windows were cut for {windows.protocol}, not for {protocol.id}")
    _check_positions(model, protocol)
    with eval_mode(model), eval_mode(reference_model), torch.inference_mode():
        how = (protocol, batch_size, progress)
        rows = list(score_windows(model, reference_model, windows.windows, *how))
    return _summary(torch.cat(rows), windows, protocol, reference_model is not None)


_reference_cache: dict[tuple[str, str], Windows] = {}


def _windows(
    tokenizer: Tokenizer, protocol: Protocol, texts: Sequence[str] | None, paths, download: bool
) -> Windows:
    """Cut the windows; those of the embedded text are kept, as claims evaluate hundreds of models on it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    keep = texts is None and protocol.dataset.id == REFERENCE_TEXT and not paths and backend is not None
    key = (protocol.fingerprint, f"{tokenizer.bos_token_id} {backend.to_str()}") if keep else None
    if key in _reference_cache:
        return _reference_cache[key]
    found = token_windows(
        documents(protocol, paths=paths, download=download) if texts is None else texts, tokenizer, protocol
    )
    if keep:
        _reference_cache[key] = found
    return found


def _check_positions(model: nn.Module, protocol: Protocol) -> None:
    limit, length = (
        getattr(getattr(model, "config", None), "max_position_embeddings", None),
        protocol.windows.length,
    )
    if isinstance(limit, int) and length > limit:
        raise EvaluationError(
            f"{protocol.id} feeds {length} tokens at once, but the model has {limit} positions"
        )


@contextmanager
def eval_mode(model: nn.Module | None) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()] if model is not None else []
    try:
        if model is not None:
            model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


def _summary(rows: Tensor, windows: Windows, protocol: Protocol, compared: bool) -> Evaluation:
    counts, losses, divergence, same = rows.unbind(dim=1)  # float64 [n_windows] each
    weights = torch.ones_like(counts) if protocol.metric.aggregation == "window-mean" else counts
    nll, error = ratio(losses * weights / counts, weights)
    if not math.isfinite(nll) or nll > 700:
        raise EvaluationError(f"{protocol.id}: a mean loss of {nll} nats has no perplexity")
    value = math.exp(nll)
    return Evaluation(
        protocol=protocol.id, value=value, metric=protocol.metric.name, nll=nll, standard_error=error,
        value_standard_error=None if error is None else value * error,
        n_tokens=int(counts.sum()), n_windows=len(counts),
        kl=float(divergence.sum() / counts.sum()) if compared else None,
        top1_agreement=float(same.sum() / counts.sum()) if compared else None,
        checks=windows.checks, first_tokens=tuple(int(window.ids[0]) for window in windows.windows[:2]),
    )  # fmt: skip


def ratio(sums: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """sum(sums) / sum(counts) and its standard error over the items (ratio estimator); None for one item."""
    n, mean = len(sums), float(sums.sum() / counts.sum())
    if n < 2:
        return mean, None
    residuals = sums - mean * counts
    return mean, float((residuals.square().sum() * n / (n - 1)).sqrt() / counts.sum())
