"""A published number on a real checkpoint: find the weights, pass the gate, quantize, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from requant.catalog.calibration import CalibrationError, calibration_tokens
from requant.catalog.context import load_impl, make_config
from requant.catalog.corpus import DatasetUnavailable
from requant.catalog.entry import UNSTATED, MeasuredClaim, Paper
from requant.catalog.evaluate import Evaluation, evaluate
from requant.catalog.gate import fp16_gate, tokenizer_family, verify_checks
from requant.catalog.protocols import Protocol, get_protocol
from requant.catalog.vocabulary import load_vocab

if TYPE_CHECKING:
    from requant.catalog.claims import Options

_NEEDED = ["*.safetensors", "*.json", "*.txt", "*.model"]


class NotHere(RuntimeError):
    """A claim cannot be measured here; the text is the reason shown as `not run (reason)`."""


def find_checkpoint(model_id: str, models_dir: str | None = None, download: bool = False) -> Path:
    """Folder of a checkpoint: below models_dir, else in the Hugging Face cache, else fetched if allowed.

    Raises: NotHere with what to do.
    """
    if models_dir is not None:
        for name in (model_id, model_id.replace("/", "--")):
            folder = Path(models_dir) / name
            if (folder / "config.json").is_file():
                return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_id, allow_patterns=_NEEDED, local_files_only=not download))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if download:
            raise NotHere(f"{model_id} could not be fetched: {type(error).__name__}") from error
        raise NotHere(f"no checkpoint of {model_id} here; use --models-dir or --download") from error


def load_checkpoint(folder: Path, device: str = "cpu") -> tuple[nn.Module, object]:
    """Model and tokenizer. Safetensors only: loading can then execute nothing.

    On the CPU the weights become float32, elsewhere they keep their dtype.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not any(folder.glob("*.safetensors")):
        raise NotHere(
            f"{folder.name} has no safetensors weights; pickled checkpoints are not loaded, because they can run code"
        )
    dtype = torch.float32 if device == "cpu" else "auto"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.to(device).eval().requires_grad_(False), tokenizer


def measure_checkpoint(paper: Paper, claim: MeasuredClaim, options: Options) -> tuple[Evaluation, str]:
    """Evaluate the claim's method on its checkpoint under its protocol.

    Returns: the evaluation and a note on the unquantized model.
    Raises: NotHere where anything it needs is missing, or where the unquantized model is off (the fp16 gate).
    """
    protocol = _runnable(paper, claim)
    folder = find_checkpoint(claim.model, options.models_dir, options.download)
    model, tokenizer = load_checkpoint(folder, options.device)
    impl, vocab = load_impl(paper.impl), load_vocab()
    try:
        plain = evaluate(model, tokenizer, protocol, download=options.download)
        calib = None
        if claim.calibration is not None:
            calibration = vocab.calibrations[claim.calibration]
            calib = calibration_tokens(calibration, vocab, tokenizer, options.download)
    except (DatasetUnavailable, CalibrationError) as error:
        raise NotHere(str(error)) from error
    mismatches = verify_checks(plain, protocol, tokenizer_family(claim.model))
    off = [str(item) for item in mismatches if item.evidence != "recalled"]
    gate = fp16_gate(plain.value, protocol, claim.model, stated=claim.baselines.get("fp16"))
    if off or gate:
        raise NotHere(f"baseline off: {'; '.join([*off, gate] if gate else off)}")
    quantized = impl.quantize(model, calib, make_config(impl, claim.config))
    found = evaluate(quantized, tokenizer, protocol, reference_model=model, download=options.download)
    return found, f"unquantized {plain.value:.4g}"


def _runnable(paper: Paper, claim: MeasuredClaim) -> Protocol:
    """The claim's protocol, if nothing but a checkpoint is needed to run it."""
    if claim.kind != "perplexity":
        needs = {
            "accuracy": "lm-eval task runs",
            "speed": "the hardware it was measured on",
            "memory": "the packed format",
        }
        raise NotHere(f"{claim.kind} claims need {needs[claim.kind]}")
    missing = [
        (claim.model is None, "no public checkpoint"),
        (claim.protocol == UNSTATED, f"protocol unstated: {claim.protocol_note}"),
        (claim.config is None, "its setting is not one the implementation can run"),
        (claim.tolerance is None, "no tolerance stated"),
    ]
    for absent, reason in missing:
        if absent:
            raise NotHere(reason)
    return get_protocol(claim.protocol)
