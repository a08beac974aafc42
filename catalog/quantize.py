"""Quantize a model and leave with a folder that others can load: the work behind `requant quantize`.

A folder holds weights, config, tokenizer and provenance.json; it appears under its name when it is complete, or not
at all. Layout `auto` is compressed-tensors where that gives the same function back, else our own.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import tempfile
import time
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from requant.catalog.calibration import CalibrationError, calibration_tokens
from requant.catalog.checkpoints import NotHere, find_checkpoint, load_checkpoint
from requant.catalog.compressed import NotExpressible, save_compressed
from requant.catalog.context import load_impl
from requant.catalog.corpus import DatasetUnavailable
from requant.catalog.errors import nearest
from requant.catalog.files import write_json
from requant.catalog.loader import default_folders
from requant.catalog.packed import NotPacked, save_packed
from requant.catalog.plain import NotPlain, take_apart
from requant.catalog.recording import Records, recording
from requant.catalog.reference import models
from requant.catalog.vocabulary import Calibration, load_vocab

LAYOUTS = ("auto", "compressed-tensors", "requant")
_WORDS = {"true": True, "false": False, "none": None, "null": None}
_LIMITS = {"w_bits": (1, 16), "a_bits": (2, 16), "kv_bits": (1, 16), "group_size": (1, 2**20)}


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
    impl = find_method(job.method)
    cfg = read_config(impl, job.settings, job.seed)
    if job.layout not in LAYOUTS:
        raise QuantizeError(f"--layout {job.layout!r} is not one of {', '.join(LAYOUTS)}")
    _check_target(job.out)
    model, tokenizer = _load_model(job)
    calib = None if getattr(impl, "DATA_FREE", False) else _calibration(job, model, tokenizer)
    started = time.perf_counter()
    quantized, records = _quantize(job, impl, model, calib, cfg)
    seconds = time.perf_counter() - started
    try:
        plain = take_apart(quantized, model, cfg)
    except NotPlain as problem:
        raise QuantizeError(
            f"{job.method} with this config leaves more than weights: {problem}; no layout can hold that"
        ) from problem
    with _new_folder(job.out) as folder:
        layout, written, remark = _save(job.layout, plain, impl, cfg, records, folder)
        tokenizer.save_pretrained(folder)
        linears = plain.linears()
        bits = written["bits"] / sum(linear.weight.numel() for linear in linears.values())
        write_json(folder / "provenance.json", _provenance(job, cfg, layout, bits, calib))
    return Done(layout, len(linears), bits, seconds, remark)


# --- method and config --------------------------------------------------------------------------------------


def find_method(name: str) -> ModuleType:
    """The implementation with this id. Raises: QuantizeError with the nearest id."""
    known = sorted(path.stem for path in default_folders().impls.glob("[a-z]*.py"))
    if name not in known:
        raise QuantizeError(f"there is no method {name!r}{_hint(name, known)}; there are {', '.join(known)}")
    impl = load_impl(name)
    if not (hasattr(impl, "quantize") and hasattr(impl, "Config")):
        raise QuantizeError(f"{name} is an analysis, it quantizes nothing")
    return impl


def read_config(impl: ModuleType, settings: Sequence[str], seed: int) -> Any:
    """impl.Config from `key=value` texts; seed goes where the Config has one. Raises: QuantizeError."""
    name, kinds = impl.__name__.rpartition(".")[2], typing.get_type_hints(impl.Config)
    values: dict[str, Any] = {"seed": seed} if "seed" in kinds else {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise QuantizeError(f"--config {text!r} is not of the form key=value")
        if key not in kinds:
            raise QuantizeError(f"{name} has no setting {key!r}{_hint(key, kinds)}; it has {', '.join(kinds)}")
        try:
            values[key] = _typed(value, kinds[key])
        except ValueError:
            kind = getattr(kinds[key], "__name__", None) or str(kinds[key])
            raise QuantizeError(f"--config {key}={value}: {key} of {name} is of the type {kind}") from None
        low, high = _LIMITS.get(key, (None, None))
        if low is not None and values[key] is not None and not low <= values[key] <= high:
            raise QuantizeError(f"--config {key}={value}: {key} must lie in {low}..{high}")
    try:
        return impl.Config(**values)
    except (ValueError, TypeError) as problem:
        raise QuantizeError(f"{name}: {problem}") from problem


def _typed(text: str, kind: Any) -> Any:
    """The text as a value of this type. Raises: ValueError."""
    if isinstance(kind, types.UnionType):
        if type(None) in typing.get_args(kind) and text.lower() in ("none", "null"):
            return None
        kinds = [one for one in typing.get_args(kind) if one is not type(None)]
        return _typed(text, kinds[0])
    if typing.get_origin(kind) is tuple:
        parts, inner = text.split(","), typing.get_args(kind)
        inner = [inner[0]] * len(parts) if inner[-1] is Ellipsis else inner
        return tuple(_typed(part.strip(), one) for part, one in zip(parts, inner, strict=True))
    if kind is bool:
        if not isinstance(_WORDS.get(text.lower()), bool):
            raise ValueError(text)
        return _WORDS[text.lower()]
    if kind not in (int, float, str):
        raise ValueError(text)
    return kind(text)


def _hint(name: str, choices: Sequence[str] | Mapping[str, Any]) -> str:
    found = nearest(name, choices)
    return f" (did you mean {found}?)" if found else ""


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
                raise QuantizeError(f"--model {job.model}: there is no such folder, and it is no id like org/name")
            folder = find_checkpoint(job.model, job.models_dir, job.download)
        elif not (folder / "config.json").is_file():
            raise QuantizeError(f"--model {job.model}: the folder has no config.json of a Hugging Face model")
        return load_checkpoint(folder)
    except NotHere as problem:
        raise QuantizeError(f"{problem} (--model takes a folder, too, or {', '.join(models.VARIANTS)})") from problem
    except QuantizeError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as problem:
        raise QuantizeError(f"--model {job.model} cannot be loaded: {_short(problem)}") from problem


def _calibration(job: Job, model: nn.Module, tokenizer: Any) -> Tensor | None:
    """Calibration tokens int64 [n_samples, seqlen]; None for a real model if none are named."""
    own = job.model in models.VARIANTS
    if job.calibration is None:
        return models.calibration_tokens(seed=job.seed) if own else None
    known = _calibrations()
    if job.calibration not in known:
        hint = _hint(job.calibration, known)
        raise QuantizeError(
            f"there is no calibration set {job.calibration!r} that can be drawn{hint}; there are {', '.join(known)}"
        )
    chosen = known[job.calibration]
    if chosen.rule == "reference" and not own:
        raise QuantizeError(f"{job.calibration} holds tokens of the reference models, not of {job.model}")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and chosen.seqlen > longest:
        raise QuantizeError(f"{job.calibration} has {chosen.seqlen} tokens a sample, {job.model} takes {longest}")
    try:
        return calibration_tokens(chosen, load_vocab(), tokenizer, job.download)
    except (DatasetUnavailable, CalibrationError) as problem:
        raise QuantizeError(f"{problem}") from problem


def _calibrations() -> dict[str, Calibration]:
    """The sets whose sampler is implemented."""
    return {name: one for name, one in load_vocab().calibrations.items() if one.rule is not None}


def _quantize(
    job: Job, impl: ModuleType, model: nn.Module, calib: Tensor | None, cfg: object
) -> tuple[nn.Module, Records]:
    """The quantized model, and what was packed on the way if the layout may need it."""
    keep = nullcontext(Records()) if job.layout == "compressed-tensors" else recording(impl)
    try:
        with keep as records:
            return impl.quantize(model, calib, cfg), records
    except (ValueError, ArithmeticError, RuntimeError, IndexError) as problem:
        if calib is None and "calib" in str(problem):
            raise QuantizeError(
                f"{job.method} needs calibration text: name a set with --calibration ID; there are "
                + ", ".join(_calibrations())
            ) from problem
        raise QuantizeError(f"{job.method} on {job.model}: {_short(problem)}") from problem


# --- the folder ---------------------------------------------------------------------------------------------


def _save(
    layout: str, plain: Any, impl: ModuleType, cfg: object, records: Records, folder: Path
) -> tuple[str, dict[str, Any], str]:
    """Write weights in the first layout that fits: its name, what was written, and a remark for the user."""
    inexact = [r for r in (*plain.inputs.values(), *plain.outputs.values()) if r.scale is None]
    remark = ""
    try:
        if layout != "requant":
            if inexact and layout == "auto":
                raise NotExpressible(
                    "its rule for dynamic activations is another one (--layout compressed-tensors accepts that)"
                )
            written = save_compressed(plain, cfg, folder)
            note = "activations are rounded by the format's rule, so logits differ a little" if inexact else ""
            return "compressed-tensors", written, note
    except ModuleNotFoundError as missing:
        if missing.name != "compressed_tensors":
            raise
        remark = 'the library compressed-tensors is missing; install it with: pip install -e ".[hub]"'
    except NotExpressible as problem:
        remark = f"compressed-tensors cannot express it: {problem}"
    if layout == "compressed-tensors":
        raise QuantizeError(f"{remark}; --layout requant can hold it" if "missing" not in remark else remark)
    try:
        return "requant", save_packed(plain, impl, cfg, records, folder), remark
    except NotPacked as problem:
        raise QuantizeError("; ".join(filter(None, (remark, str(problem))))) from problem


def _check_target(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise QuantizeError(f"--out {out} is a file; name a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise QuantizeError(f"--out {out} is not empty; name a new folder, or remove that one first")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that gets its name if nothing fails, and vanishes otherwise."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield folder
        mask = os.umask(0)
        os.umask(mask)
        for path in folder.iterdir():  # some writers make files that only their owner can read
            path.chmod(0o666 & ~mask)
        folder.chmod(0o777 & ~mask)
        _check_target(out)  # someone may have filled it meanwhile
        folder.replace(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _provenance(job: Job, cfg: object, layout: str, bits: float, calib: Tensor | None) -> dict[str, Any]:
    named = job.calibration or ("reference text" if calib is not None else None)
    return {
        "model": Path(job.model).name if Path(job.model).is_dir() else job.model,
        "method": job.method, "config": dataclasses.asdict(cfg), "calibration": named,
        "calibration_shape": None if calib is None else list(calib.shape), "seed": job.seed,
        "layout": layout, "bits_per_weight": bits,
        "versions": {name: version(name) for name in ("requant", "torch", "transformers")},
    }  # fmt: skip


def _short(problem: BaseException) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0][:300]
