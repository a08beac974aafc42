"""Our own layout: what a method's `pack_weight` stores, in safetensors, with what is needed to unpack it.

It holds what compressed-tensors has no place for: bit planes, codebooks, seeds of rotations, permuted groups.
site/docs/packed-format.md describes it.

The tensors are those that recording.py kept while the method ran. Where a method rounds by another function than its
`quantize_weight` (AWQ), codes are read off the finished weights (grid.py). Either way a layer is written only if the
method's own `unpack_weight` gives it back bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from requant.catalog.context import load_impl, make_config
from requant.catalog.files import sha256, write_json
from requant.catalog.grid import read_grid
from requant.catalog.plain import Plain, Rounding, dense_tensors
from requant.catalog.recording import Records
from requant.reference_impls import _quant

FORMAT, VERSION = "requant-packed", 1
METADATA, WEIGHTS = "requant.json", "packed.safetensors"


class PackedFileError(ValueError):
    """A folder is not one that `save_packed` wrote, or no longer; the message names the file and what to do."""


class NotPacked(ValueError):
    """The method gives nothing to pack for a linear; the message names both."""


def save_packed(
    plain: Plain, impl: ModuleType, cfg: object, records: Records, folder: Path
) -> dict[str, Any]:
    """Write config.json, packed.safetensors and requant.json into an existing folder.

    Returns: what was written: format, and the bits that the linears take, shapes left out.
    Raises: NotPacked.
    """
    name = impl.__name__.rpartition(".")[2]
    tensors = {f"dense.{key}": value for key, value in _untied(dense_tensors(plain.model)).items()}
    matrices: dict[int, dict[str, Any]] = {}
    n_bits = 0
    for linear_name, linear in plain.linears().items():
        place = records.find(linear.weight)
        if place is None:
            records.add(_from_grid(linear_name, linear.weight, impl, cfg), linear.weight)
            place = len(records.matrices) - 1, 0
        index, row = place
        rows = [row, row + linear.out_features]
        if index not in matrices:
            matrices[index] = {"shape": list(records.matrices[index].shape), "linears": []}
            packed = records.matrices[index].packed
            tensors |= {f"matrix.{index}.{key}": value.contiguous() for key, value in packed.items()}
            n_bits += _quant.storage_bits(packed)
        matrices[index]["linears"].append({"name": linear_name, "rows": rows})
        tensors.pop(f"dense.{linear_name}.weight", None)
    _check(plain, impl, cfg, records, matrices)
    activations, scales = _activations(plain)
    save_file(tensors | scales, folder / WEIGHTS)
    plain.model.config.save_pretrained(folder)
    metadata = {
        "format": FORMAT, "version": VERSION, "requant": version("requant"), "torch": torch.__version__,
        "method": name, "config": dataclasses.asdict(cfg),
        "matrices": {str(index): matrix for index, matrix in matrices.items()}, "activations": activations,
        "sha256": {file: sha256(folder / file) for file in (WEIGHTS, "config.json")},
    }  # fmt: skip
    write_json(folder / METADATA, metadata)
    return {"format": FORMAT, "bits": n_bits}


def _untied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One name for tensors that share memory: the model built from its config ties them again."""
    first: dict[int, str] = {}
    return {
        name: value for name, value in tensors.items() if first.setdefault(value.data_ptr(), name) == name
    }


def _from_grid(name: str, W: Tensor, impl: ModuleType, cfg: object) -> dict[str, Tensor]:
    """Packed tensors of a weight whose method rounded it without `quantize_weight`."""
    bits = getattr(cfg, "w_bits", None)
    problem = f"{impl.__name__.rpartition('.')[2]} packed nothing that gives back the weight of {name}"
    if not hasattr(impl, "unpack_weight") or bits not in range(1, 9):
        raise NotPacked(problem)
    symmetric = getattr(cfg, "symmetric", False)
    grid = read_grid(_quant.grouped(W, getattr(cfg, "group_size", None)), bits, symmetric)
    if grid is None:
        raise NotPacked(f"{problem}, and it lies on no {bits}-bit grid")
    zero_point = torch.full_like(grid.zero_point(), 2 ** (bits - 1)) if symmetric else grid.zero_point()
    return _quant.pack_affine(grid.k + zero_point, grid.scale, zero_point, bits, symmetric)


def _check(plain: Plain, impl: ModuleType, cfg: object, records: Records, matrices: dict[int, Any]) -> None:
    linears = plain.linears()
    for index, matrix in matrices.items():
        W = impl.unpack_weight(records.matrices[index].packed, cfg)
        for part in matrix["linears"]:
            if not torch.equal(W[slice(*part["rows"])], linears[part["name"]].weight):
                name = impl.__name__.rpartition(".")[2]
                raise NotPacked(f"what {name} packs for {part['name']} does not give back its weight")


def _activations(plain: Plain) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The roundings as metadata, and the static scales among them as tensors `scale.<side>.<linear>`."""
    described: dict[str, Any] = {}
    scales: dict[str, Tensor] = {}
    for side, roundings in (("input", plain.inputs), ("output", plain.outputs)):
        for name, rounding in roundings.items():
            static = rounding.scale is not None
            entry = {"bits": rounding.bits, "per_tensor": rounding.per_tensor, "static": static}
            described.setdefault(name, {})[side] = entry
            if static:
                scales[f"scale.{side}.{name}"] = rounding.scale.detach().clone()
    return described, scales


# --- loading ------------------------------------------------------------------------------------------------


def load_packed(folder: str | Path) -> nn.Module:
    """The model that was saved, bit for bit: float32, in eval mode, activations rounded as they were.

    Raises: PackedFileError if a file is missing, altered, truncated, or of another version.
    """
    folder = Path(folder)
    metadata = read_metadata(folder)
    try:
        impl = load_impl(metadata["method"])
        cfg = make_config(impl, _config_values(impl, metadata["config"]))
        tensors = load_file(folder / WEIGHTS)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _fill(model, _dense(tensors) | dict(_unpacked(metadata["matrices"], tensors, impl, cfg)))
        sides = [_roundings(metadata["activations"], side, tensors) for side in ("input", "output")]
    except (
        LookupError,
        AttributeError,
        TypeError,
        ValueError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as error:
        raise PackedFileError(
            f"{folder.name}/{METADATA} does not describe {WEIGHTS}: {_first_line(error)}; quantize the model again"
        ) from error
    return Plain(model.eval().requires_grad_(False), *sides).assembled()


def read_metadata(folder: Path) -> dict[str, Any]:
    """The checked content of requant.json. Raises: PackedFileError."""
    path = folder / METADATA
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PackedFileError(f"cannot read {folder.name}/{METADATA}: {_first_line(error)}") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise PackedFileError(f"{folder.name}/{METADATA} is not of the format {FORMAT}")
    if metadata.get("version") != VERSION:
        found = metadata.get("version")
        raise PackedFileError(
            f"{folder.name}/{METADATA} has version {found!r} of the format; this requant reads version {VERSION}"
        )
    if not re.fullmatch(r"[a-z][a-z0-9_]*", str(metadata.get("method"))):
        raise PackedFileError(f"{folder.name}/{METADATA} names no method: {metadata.get('method')!r}")
    for file in (WEIGHTS, "config.json"):
        if not (folder / file).is_file():
            raise PackedFileError(f"{folder.name} has no {file}; copy the whole folder again")
        if sha256(folder / file) != (metadata.get("sha256") or {}).get(file):
            raise PackedFileError(
                f"{folder.name}/{file} is not the file that was written (SHA-256 differs); copy it again"
            )
    return metadata


def _config_values(impl: ModuleType, values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples: lists become tuples where the default is one."""
    defaults = {item.name: item.default for item in dataclasses.fields(impl.Config)}
    return {key: tuple(v) if isinstance(defaults.get(key), tuple) else v for key, v in values.items()}


def _dense(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("dense."): value for key, value in tensors.items() if key.startswith("dense.")}


def _unpacked(
    matrices: dict[str, Any], tensors: dict[str, Tensor], impl: ModuleType, cfg: object
) -> Iterator[tuple[str, Tensor]]:
    for index, matrix in matrices.items():
        prefix = f"matrix.{index}."
        W = impl.unpack_weight(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, cfg
        )
        for part in matrix["linears"]:
            yield f"{part['name']}.weight", W[slice(*part["rows"])]


def _fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Set every parameter and buffer. Raises: ValueError naming the first that is missing or too many."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    set_now = {value.data_ptr() for name, value in model.state_dict().items() if name not in missing}
    left = [name for name in missing if model.state_dict()[name].data_ptr() not in set_now]  # not tied to one
    if left or unexpected:
        raise ValueError(f"{left[0]} is missing" if left else f"{unexpected[0]} has no place in the model")


def _roundings(described: dict[str, Any], side: str, tensors: dict[str, Tensor]) -> dict[str, Rounding]:
    found = {}
    for name, sides in described.items():
        if side in sides:
            entry = sides[side]
            scale = tensors[f"scale.{side}.{name}"] if entry["static"] else None
            found[name] = Rounding(entry["bits"], entry["per_tensor"], scale)
    return found


def _first_line(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"there is no {text}" if isinstance(error, KeyError) else text
