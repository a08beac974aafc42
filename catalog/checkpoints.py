"""A published number on a real checkpoint: find the weights, pass the gate, quantize, evaluate."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from requant.catalog.calibration import CalibrationError, calibration_tokens
from requant.catalog.context import load_impl, make_config
from requant.catalog.corpus import DatasetUnavailable
from requant.catalog.entry import UNSTATED, MeasuredClaim, Paper
from requant.catalog.evaluate import Evaluation, evaluate
from requant.catalog.gate import fp16_gate, tokenizer_family, verify_checks
from requant.catalog.protocols import Protocol, get_protocol
from requant.catalog.tasks import SHARES, tasks_of
from requant.catalog.vocabulary import Vocab, load_vocab
from requant.catalog.weights import NotHere, find_checkpoint, load_checkpoint, stamp

if TYPE_CHECKING:
    from requant.catalog.claims import Options

__all__ = ["NotHere", "find_checkpoint", "load_checkpoint", "measure_checkpoint", "protocol_of", "tasks_for"]


@dataclass
class _Held:
    """The checkpoint used last, which the next claim probably names too, and what it gives unquantized."""

    key: tuple = ()
    model: nn.Module | None = None
    tokenizer: Any = None
    plain: dict[tuple, Evaluation] = field(default_factory=dict)


_held = _Held()


def measure_checkpoint(paper: Paper, claim: MeasuredClaim, options: Options) -> tuple[Evaluation, str]:
    """Evaluate the claim's method on its checkpoint under its protocol.

    Returns: the evaluation and a note on the unquantized model.
    Raises: NotHere where anything it needs is missing, where the method does not know the model, or where the
        unquantized model is off (the fp16 gate).
    """
    protocol, vocab = protocol_of(paper, claim), load_vocab()
    tasks = tasks_for(claim, protocol, vocab)
    held = _load(checkpoint_path(claim.model, options, vocab), options)
    how = {"download": options.download, "tasks": tasks, "paths": options.data_paths}
    impl = load_impl(paper.impl)
    try:
        key = (protocol.fingerprint, tasks)
        if key not in held.plain:
            held.plain[key] = evaluate(held.model, held.tokenizer, protocol, **how)
        plain = held.plain[key]
        calib = None
        if claim.calibration is not None:
            calibration = vocab.calibrations[claim.calibration]
            where = (options.download, options.data_paths)
            calib = calibration_tokens(calibration, vocab, held.tokenizer, *where)
    except (DatasetUnavailable, CalibrationError) as error:
        raise NotHere(str(error)) from error
    mismatches = verify_checks(plain, protocol, tokenizer_family(claim.model))
    off = [str(item) for item in mismatches if item.evidence != "recalled"]
    gate = fp16_gate(plain.value, protocol, claim.model, stated=claim.baselines.get("fp16"))
    if off or gate:
        raise NotHere(f"baseline off: {'; '.join([*off, gate] if gate else off)}")
    quantized = quantize(paper.impl, held.model, calib, make_config(impl, claim.config), options.offload_dir)
    found = evaluate(quantized, held.tokenizer, protocol, reference_model=held.model, **how)
    return found, f"unquantized {plain.value:.4g}"


def quantize(
    impl: str, model: nn.Module, calib: Any, cfg: object, offload_dir: str | None = None
) -> nn.Module:
    """The method's `quantize`, its calibration activations in files of a folder where one is given.

    Raises: NotHere, naming method and model, for a structure that it does not know; where there is no calibration set
        and the method needs one.
    """
    from requant.reference_impls._offload import activations_in
    from requant.reference_impls._quant import QuantizationError
    from requant.reference_impls._walk import UnsupportedModelError

    try:
        with activations_in(offload_dir):
            return load_impl(impl).quantize(model, calib, cfg)
    except UnsupportedModelError as error:
        kind = getattr(model.config, "model_type", "unknown")
        raise NotHere(f"{impl} does not support {type(model).__name__} ({kind}): {error}") from error
    except QuantizationError as error:
        if calib is not None:
            raise
        raise NotHere(f"no calibration set is named: {error}") from error


def checkpoint_path(model_id: str, options: Options, vocab: Vocab) -> Path:
    """Where the checkpoint is, at its pinned revision where the vocabulary knows one. Raises: NotHere."""
    model = vocab.models.get(model_id)
    return find_checkpoint(
        model_id,
        options.models_dir,
        options.download,
        model_paths=options.model_paths,
        revision=model.revision if model else None,
        allow_pickle=options.allow_pickle,
    )


def _load(path: Path, options: Options) -> _Held:
    """Keep one checkpoint in memory: claims on the same one follow each other."""
    global _held
    how = (options.device, options.allow_pickle, options.max_memory, options.offload_dir)
    key = (path, stamp(path), *how)
    if _held.key != key:
        _held = _Held()  # let go of the last one before the next is read
        model, tokenizer = load_checkpoint(path, *how)
        _held = _Held(key, model, tokenizer)
    return _held


def protocol_of(paper: Paper, claim: MeasuredClaim) -> Protocol:
    """The claim's protocol, if a checkpoint, its text and its tasks are all that is needed. Raises: NotHere."""
    if claim.kind not in ("perplexity", "accuracy"):
        needs = {"speed": "the hardware it was measured on", "memory": "the packed format"}
        raise NotHere(f"{claim.kind} claims need {needs[claim.kind]}")
    missing = [
        (claim.model is None, "no public checkpoint"),
        (claim.protocol == UNSTATED, f"protocol unstated: {claim.protocol_note}"),
        (claim.config is None, "its setting is not one the implementation can run"),
        (claim.tolerance is None, "no tolerance stated"),
        (
            claim.kind == "accuracy" and claim.metric not in SHARES,
            f"its metric {claim.metric} is not a share of right answers, which is what lm-eval gives",
        ),
    ]
    for absent, reason in missing:
        if absent:
            raise NotHere(reason)
    return get_protocol(claim.protocol)


def tasks_for(claim: MeasuredClaim, protocol: Protocol, vocab: Vocab) -> tuple[str, ...] | None:
    """The lm-eval tasks to hand over, where the protocol leaves them to the claim; else None. Raises: NotHere."""
    if protocol.engine != "lm-eval" or protocol.harness.task is not None:
        return None
    return tasks_of(claim, vocab)
