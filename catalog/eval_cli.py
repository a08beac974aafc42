"""`requant eval`: quantize a model with a method and evaluate it, under a protocol or on lm-eval tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from requant.catalog.errors import nearest
from requant.catalog.eval_rows import print_rows, protocol_rows, task_rows
from requant.catalog.terminal import (
    AllowPickleOption,
    DataOption,
    DeviceOption,
    DownloadOption,
    JsonOption,
    MaxMemoryOption,
    ModelPathOption,
    ModelsDirOption,
    OffloadOption,
    data_paths,
    max_memory,
    model_paths,
    offload_dir,
    stop,
)

if TYPE_CHECKING:
    from requant.catalog.claims import Options

app = typer.Typer()
REFERENCE_CALIBRATION = "reference-train-64x256/1"


@app.command("eval")
def evaluate_model(
    model: Annotated[
        str, typer.Option("--model", metavar="M", help="A reference model, a checkpoint's id, or its path.")
    ],
    method: Annotated[
        str, typer.Option("--method", metavar="METHOD", help="Implementation to quantize with.")
    ] = "none",
    config: Annotated[
        list[str] | None, typer.Option("--config", metavar="K=V", help="A field of its Config. Repeatable.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="ID", help="Calibration set, where the method needs one.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="A,B", help="lm-eval tasks: names or local YAML files.")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option("--protocol", metavar="ID", help="Protocol (default: the tasks' own metrics)."),
    ] = None,
    n_shots: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt (default: the task's).")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens fed at once (default: the model's).")
    ] = None,
    json_file: JsonOption = None,
    models_dir: ModelsDirOption = None,
    model_path: ModelPathOption = None,
    download: DownloadOption = False,
    allow_pickle: AllowPickleOption = False,
    data: DataOption = None,
    offload: OffloadOption = None,
    device: DeviceOption = "cpu",
    memory: MaxMemoryOption = None,
) -> None:
    """Quantize a model and evaluate it beside the unquantized one, on lm-eval tasks or under a protocol."""
    named = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if not named and protocol is None:
        stop("nothing to evaluate on: give --tasks, --protocol, or both")
    if protocol is not None and (n_shots is not None or max_length is not None):
        stop(f"{protocol} fixes shots and window length; leave out --n-shots and --max-length")

    from requant.catalog.calibration import CalibrationError
    from requant.catalog.claims import Options
    from requant.catalog.corpus import EvaluationError
    from requant.catalog.weights import NotHere

    options = Options(
        str(models_dir) if models_dir else None, download, device, model_paths(model_path), allow_pickle,
        data_paths(data), offload_dir(offload), max_memory(memory, device),
    )  # fmt: skip
    try:
        versions = _models(model, method, config or (), calibration, options)
        if protocol is None:
            rows = list(task_rows(versions, named, n_shots, max_length, download))
        else:
            rows = list(protocol_rows(versions, protocol, named, options))
    except (NotHere, EvaluationError, CalibrationError, ValueError) as problem:
        stop(str(problem))
    print_rows(rows, model)
    if json_file is not None:
        from requant.catalog.files import write_json

        write_json(json_file, [{"model": model, "config": config or []} | asdict(row) for row in rows])


def _models(
    name: str, method: str, config: Sequence[str], calibration: str | None, options: Options
) -> list[tuple[str, Any, Any]]:
    """(method, model, tokenizer): the unquantized model and, where a method is named, the quantized one."""
    import torch

    from requant.catalog.checkpoints import quantize
    from requant.catalog.settings import find_method, read_config

    if method != "none":
        impl = find_method(method)
        made = read_config(impl, config, seed=0)
    elif config:
        raise ValueError("--config needs a --method that it configures")
    torch.manual_seed(0)
    model, tokenizer, is_reference = _load(name, options)
    versions = [("none", model, tokenizer)]
    if method != "none":
        calib = _calib(impl, method, calibration, tokenizer, is_reference, options)
        quantized = quantize(method, model, calib, made, options.offload_dir)
        versions.append((method, quantized, tokenizer))
    return versions


def _load(name: str, options: Options) -> tuple[Any, Any, bool]:
    """Model, tokenizer, and whether it is one of the reference models."""
    from requant.catalog.checkpoints import checkpoint_path, load_checkpoint
    from requant.catalog.packed import METADATA
    from requant.catalog.reference.models import VARIANTS, load_reference
    from requant.catalog.vocabulary import load_vocab

    if name in VARIANTS:
        found = load_reference(name)
        return found.model.to(options.computes_on), found.tokenizer, True
    given = Path(name).exists() and name not in options.model_paths
    path = Path(name) if given else checkpoint_path(name, options, load_vocab())
    if (path / METADATA).is_file():  # our own layout, already quantized
        return *_packed(path, options.computes_on), False
    where = (options.max_memory, options.offload_dir)
    return *load_checkpoint(path, options.device, options.allow_pickle, *where), False


def _packed(folder: Path, device: str) -> tuple[Any, Any]:
    """Model and tokenizer of a folder that `requant quantize` wrote. Raises: ValueError if it was altered."""
    from transformers import AutoTokenizer

    from requant.catalog.packed import load_packed

    return load_packed(folder).to(device), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _calib(
    impl: Any, method: str, name: str | None, tokenizer: Any, is_reference: bool, options: Options
) -> Any:
    """Calibration tokens, None where none are needed. Raises: ValueError naming the sets there are."""
    from requant.catalog.calibration import calibration_tokens
    from requant.catalog.vocabulary import load_vocab

    vocab = load_vocab()
    if name is None:
        if getattr(impl, "DATA_FREE", False):
            return None
        if not is_reference:
            usable = sorted(key for key, item in vocab.calibrations.items() if item.rule)
            raise ValueError(
                f"{method} needs calibration data: give --calibration, one of {', '.join(usable)}"
            )
        name = REFERENCE_CALIBRATION
    if name not in vocab.calibrations:
        hint = nearest(name, vocab.calibrations)
        raise ValueError(
            f"there is no calibration set {name!r}" + (f"; did you mean {hint}?" if hint else "")
        )
    where = (options.download, options.data_paths)
    return calibration_tokens(vocab.calibrations[name], vocab, tokenizer, *where)
