"""Quantize a model and leave with a folder that others can load: the work behind `requant quantize`.

A folder holds weights, config, tokenizer and provenance.json; it appears under its name when it is complete, or not
at all. Layout `auto` is compressed-tensors where that gives the same function back, else our own.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from requant.catalog.calibration import CalibrationError, Tokens, calibration_tokens
from requant.catalog.checkpoints import NotHere, find_checkpoint, load_checkpoint
from requant.catalog.compressed import NotExpressible, on_grid, save_compressed
from requant.catalog.corpus import DatasetUnavailable
from requant.catalog.files import write_json
from requant.catalog.folders import in_use, new_folder
from requant.catalog.packed import NotPacked, save_packed
from requant.catalog.plain import NotPlain, Plain, take_apart
from requant.catalog.recording import Records, recording
from requant.catalog.reference import models
from requant.catalog.settings import SettingsError, find_method, hint, read_config
from requant.catalog.vocabulary import Calibration, load_vocab

LAYOUTS = ("auto", "compressed-tensors", "requant")
_DYNAMIC = "activations are rounded by the format's rule, so logits differ a little"
_STATIC = "activations below the calibrated range saturate at code -128, not -127; all else is the same"


class QuantizeError(ValueError):
    """The model cannot be quantized or saved as asked; one line that says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What to do, as the command line says it.

    model: a reference model, a folder, or an id that find_checkpoint knows. settings: Config fields as `key=value`.
    """

    method: str
    model: str
    out: Path
    settings: Sequence[str] = ()
    calibration: str | None = None
    seed: int = 0
    layout: str = "auto"
    models_dir: str | None = None
    download: bool = False


@dataclasses.dataclass(frozen=True)
class Done:
    """What was written: layout, bits a weight of the quantized linears, seconds of the method, and a remark or ''."""

    layout: str
    n_linears: int
    bits: float
    seconds: float
    remark: str


def quantize_to_folder(job: Job) -> Done:
    """Quantize and save. Raises: QuantizeError; OSError where the folder cannot be written."""
    try:
        impl = find_method(job.method)
        cfg = read_config(impl, job.settings, job.seed)
    except SettingsError as problem:
        raise QuantizeError(f"{problem}") from problem
    if job.layout not in LAYOUTS:
        raise QuantizeError(f"--layout {job.layout!r} is not one of {', '.join(LAYOUTS)}")
    if problem := in_use(job.out):
        raise QuantizeError(f"--out {problem}")
    model, tokenizer = _load_model(job)
    calib = None if getattr(impl, "DATA_FREE", False) else _calibration(job, model, tokenizer)
    run = partial(_run, job, impl, model, calib, cfg)
    with new_folder(job.out) as folder:
        layout, plain, written, remark, seconds = _save(job, impl, cfg, run, folder)
        tokenizer.save_pretrained(folder)
        linears = plain.linears()
        bits = written["bits"] / sum(linear.weight.numel() for linear in linears.values())
        write_json(folder / "provenance.json", _provenance(job, cfg, layout, bits, calib))
    return Done(layout, len(linears), bits, seconds, remark)


# --- model and text -----------------------------------------------------------------------------------------


def _load_model(job: Job) -> tuple[nn.Module, Any]:
    """The float32 model and its tokenizer."""
    if job.model in models.VARIANTS:
        reference = models.load_reference(job.model)
        return reference.model, reference.tokenizer
    folder = Path(job.model)
    try:
        if not folder.is_dir():
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", job.model):
                raise QuantizeError(
                    f"--model {job.model}: there is no such folder, and it is no id like org/name"
                )
            folder = find_checkpoint(job.model, job.models_dir, job.download)
        elif not (folder / "config.json").is_file():
            raise QuantizeError(f"--model {job.model}: the folder has no config.json of a Hugging Face model")
        if '"quantization_config"' in (folder / "config.json").read_text(encoding="utf-8"):
            raise QuantizeError(
                f"--model {job.model} is quantized already; name the model that it was made from"
            )
        return load_checkpoint(folder)
    except NotHere as problem:
        raise QuantizeError(
            f"{problem} (--model takes a folder, too, or {', '.join(models.VARIANTS)})"
        ) from problem
    except QuantizeError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as problem:
        raise QuantizeError(f"--model {job.model} cannot be loaded: {_short(problem)}") from problem


def _calibration(job: Job, model: nn.Module, tokenizer: Any) -> Tokens | None:
    """Calibration tokens (calibration.draw); None for a real model if none are named."""
    own = job.model in models.VARIANTS
    if job.calibration is None:
        return models.calibration_tokens(seed=job.seed) if own else None
    known = _calibrations()
    if job.calibration not in known:
        meant = hint(job.calibration, known)
        raise QuantizeError(
            f"there is no calibration set {job.calibration!r} that can be drawn{meant}; there are {', '.join(known)}"
        )
    chosen = known[job.calibration]
    if chosen.rule == "reference" and not own:
        raise QuantizeError(f"{job.calibration} holds tokens of the reference models, not of {job.model}")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and chosen.seqlen > longest:
        raise QuantizeError(
            f"{job.calibration} has {chosen.seqlen} tokens a sample, {job.model} takes {longest}"
        )
    try:
        return calibration_tokens(chosen, load_vocab(), tokenizer, job.download)
    except (DatasetUnavailable, CalibrationError) as problem:
        raise QuantizeError(f"{problem}") from problem


def _calibrations() -> dict[str, Calibration]:
    """The sets whose sampler is implemented."""
    return {name: one for name, one in load_vocab().calibrations.items() if one.rule is not None}


# --- quantize and save --------------------------------------------------------------------------------------


def _run(
    job: Job, impl: ModuleType, model: nn.Module, calib: Tokens | None, cfg: object, keep: bool
) -> tuple[Plain, Records, float]:
    """Run the method: the model taken apart, what was packed on the way (keep: all of it), and seconds."""
    started = time.perf_counter()
    try:
        with recording(impl, needless=lambda W: not keep and on_grid(W, cfg)) as records:
            quantized = impl.quantize(model, calib, cfg)
    except (ValueError, ArithmeticError, RuntimeError, IndexError) as problem:
        if calib is None and "calib" in str(problem):
            raise QuantizeError(
                f"{job.method} needs calibration text: name a set with --calibration ID; there are "
                + ", ".join(_calibrations())
            ) from problem
        raise QuantizeError(f"{job.method} on {job.model}: {_short(problem)}") from problem
    seconds = time.perf_counter() - started
    try:
        plain = take_apart(quantized, model, cfg)
    except NotPlain as problem:
        raise QuantizeError(
            f"{job.method} with this config leaves more than weights: {problem}; no layout can hold that"
        ) from problem
    for name, linear in plain.linears().items():
        if not linear.weight.isfinite().all():
            raise QuantizeError(
                f"{job.method} gave {name} a weight that is not finite; is the checkpoint sound?"
            )
    return plain, records, seconds


def _save(
    job: Job, impl: ModuleType, cfg: object, run: Callable[..., tuple[Plain, Records, float]], folder: Path
) -> tuple[str, Plain, dict[str, Any], str, float]:
    """Run the method and write weights in the first layout that fits.

    Returns: layout, model, what was written, a remark for the user, seconds of the method.
    """
    plain, records, seconds = run(keep=job.layout == "requant")
    remark = ""
    if job.layout != "requant":
        try:
            written, remark = _save_compressed(job, plain, cfg, folder)
            return "compressed-tensors", plain, written, remark, seconds
        except NotExpressible as problem:
            remark = f"compressed-tensors cannot express it: {problem}"
            if job.layout == "compressed-tensors":
                raise QuantizeError(f"{remark}; try --layout requant") from problem
    if records.skipped:
        plain, records, seconds = run(keep=True)
    try:
        return "requant", plain, save_packed(plain, impl, cfg, records, folder), remark, seconds
    except NotPacked as problem:
        raise QuantizeError("; ".join(filter(None, (remark, str(problem))))) from problem


def _save_compressed(job: Job, plain: Plain, cfg: object, folder: Path) -> tuple[dict[str, Any], str]:
    """What was written, and a remark. Raises: NotExpressible, for `auto` also if logits would differ."""
    dynamic = any(item.scale is None for item in (*plain.inputs.values(), *plain.outputs.values()))
    if dynamic and job.layout == "auto":
        hint = "--layout compressed-tensors accepts that"
        raise NotExpressible(f"its rule for dynamic activations is another one ({hint})")
    try:
        written = save_compressed(plain, cfg, folder)
    except ModuleNotFoundError as missing:
        if missing.name != "compressed_tensors":
            raise
        raise NotExpressible('the library is missing; install it with: pip install -e ".[hub]"') from missing
    return written, _DYNAMIC if dynamic else "" if plain.weight_only else _STATIC


def _provenance(job: Job, cfg: object, layout: str, bits: float, calib: Tokens | None) -> dict[str, Any]:
    named = job.calibration or ("reference text" if calib is not None else None)
    return {
        "model": Path(job.model).name if Path(job.model).is_dir() else job.model,
        "method": job.method, "config": dataclasses.asdict(cfg), "calibration": named,
        "calibration_shape": _shape(calib), "seed": job.seed,
        "layout": layout, "bits_per_weight": bits,
        "versions": {name: version(name) for name in ("requant", "torch", "transformers")},
    }  # fmt: skip


def _shape(calib: Tokens | None) -> list | None:
    """[n_samples, seqlen], or one such pair for each length."""
    if calib is None or isinstance(calib, Tensor):
        return None if calib is None else list(calib.shape)
    return [list(part.shape) for part in calib]


def _short(problem: BaseException) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0][:300]
