"""Write a quantized model in the compressed-tensors format, which transformers and serving engines load.

Codes and steps are read off the finished weights (grid.py), so no method has to know about the format, and weights that
lie on no grid are refused rather than rounded a second time. Every matrix is decompressed by the library and
compared bit for bit before it is written.

Dynamic activations are the one thing that comes back changed: the format divides a token's absmax by 127.5 where
the methods divide by 127, and takes one scale for the whole batch where they take one a sequence. Static
scales are stored; only values beyond the calibrated range saturate one step lower on the negative side.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from requant.catalog.grid import Grid, read_grid
from requant.catalog.plain import Plain, Rounding, dense_tensors
from requant.reference_impls import _quant

BITS = range(2, 9)  # what the format packs


class NotExpressible(ValueError):
    """The format has no place for this model; the message says what and which linear."""


def save_compressed(plain: Plain, cfg: object, folder: Path) -> dict[str, Any]:
    """Write config.json and weights of a model into an existing folder.

    Args:
        plain: the quantized model.
        cfg: the method's Config; w_bits, group_size and w_granularity say where to look for the grid.
    Returns: what was written: format, symmetric, and the bits that the linears take, shapes left out.
    Raises: NotExpressible naming the first thing that has no place in the format.
    """
    bits, size = getattr(cfg, "w_bits", None), getattr(cfg, "group_size", None)
    if bits not in BITS:
        raise NotExpressible(f"it packs integers of {BITS[0]} to {BITS[-1]} bits, and w_bits is {bits}")
    per_tensor = getattr(cfg, "w_granularity", "per_channel") == "per_tensor"
    grids, symmetric = _grids(plain.linears(), bits, size, per_tensor)
    strategy = "tensor" if per_tensor else "channel" if size is None else "group"
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    config, schemes = _quantization_config(
        plain, weights | ({"group_size": size} if size and not per_tensor else {})
    )
    tensors = dense_tensors(plain.model)
    n_bits = 0
    for name, linear in plain.linears().items():
        stored = _compress(name, linear.weight, grids.pop(name), symmetric, schemes[name], config.format)
        stored |= _static_scales(plain, name)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in stored.items()}
        n_bits += 8 * sum(value.nbytes for key, value in stored.items() if key != "weight_shape")
    plain.model.save_pretrained(folder, state_dict=tensors)
    _describe(folder, config, asymmetric_weights=not symmetric and plain.weight_only)
    return {"format": str(config.format), "symmetric": symmetric, "bits": n_bits}


def on_grid(W: Tensor, cfg: object) -> bool:
    """Whether the codes of a quantized weight [d_out, d_in] can be read off it; group_size has to divide d_in."""
    bits = getattr(cfg, "w_bits", None)
    if bits not in BITS:
        return False
    return (
        read_grid(_quant.grouped(W.float(), getattr(cfg, "group_size", None)), bits, symmetric=False)
        is not None
    )


def _grids(
    linears: Mapping[str, nn.Linear], bits: int, size: int | None, per_tensor: bool
) -> tuple[dict[str, Grid], bool]:
    """The grid of every linear, symmetric if all of them are."""
    problem = ""
    for symmetric in (True, False):
        grids: dict[str, Grid] = {}
        for name, linear in linears.items():
            W = linear.weight.flatten()[None] if per_tensor else linear.weight
            grid = read_grid(_quant.grouped(W, None if per_tensor else size), bits, symmetric)
            if grid is None:
                problem = f"the weights of {name} lie on no {bits}-bit grid with float16 steps"
                problem += f" in groups of {size} neighbours" if size else ""
                break
            grids[name] = grid
        else:
            return grids, symmetric
    raise NotExpressible(problem)


def _compress(
    name: str, weight: Tensor, grid: Grid, symmetric: bool, scheme: Any, form: str
) -> dict[str, Tensor]:
    """The library's tensors of one linear, checked by decompressing them."""
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(form)
    d_out, d_in = weight.shape
    scale = grid.scale.squeeze(-1).reshape(-1) if grid.k.shape[0] == 1 < d_out else grid.scale.squeeze(-1)
    state = {"weight": weight.detach(), "weight_scale": scale}
    if not symmetric:
        middle = 2 ** (scheme.weights.num_bits - 1)
        state["weight_zero_point"] = (
            (grid.zero_point() - middle).squeeze(-1).reshape(scale.shape).to(torch.int8)
        )
    stored = compressor.compress(state, scheme)
    if not torch.equal(compressor.decompress(stored, scheme)["weight"], weight):
        raise NotExpressible(f"{name} [{d_out}, {d_in}] does not come back from {form} bit for bit")
    return stored


def _static_scales(plain: Plain, name: str) -> dict[str, Tensor]:
    sides = {"input": plain.inputs.get(name), "output": plain.outputs.get(name)}
    return {
        f"{side}_scale": rounding.scale.reshape(1).float()
        for side, rounding in sides.items()
        if rounding is not None and rounding.scale is not None
    }


def _quantization_config(plain: Plain, weights: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The library's description of the model, and the scheme of each linear."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    kinds: dict[str, tuple[dict, list[str]]] = {}
    for name in plain.linears():
        scheme = {"weights": weights}
        for side, roundings in (("input_activations", plain.inputs), ("output_activations", plain.outputs)):
            if name in roundings:
                scheme[side] = _activation_args(roundings[name])
        kinds.setdefault(json.dumps(scheme, sort_keys=True), (scheme, []))[1].append(name)
    form = "pack-quantized" if plain.weight_only else "int-quantized"
    groups, schemes = {}, {}
    for index, (scheme, names) in enumerate(kinds.values()):
        targets = ["Linear"] if len(kinds) == 1 else names
        groups[f"group_{index}"] = QuantizationScheme(targets=targets, format=form, **scheme)
        schemes |= dict.fromkeys(names, groups[f"group_{index}"])
    ignored = [*_other_linears(plain)]
    config = QuantizationConfig(
        config_groups=groups, ignore=ignored, format=form, quantization_status="compressed"
    )
    return config, schemes


def _activation_args(rounding: Rounding) -> dict[str, Any]:
    if rounding.bits not in BITS:
        raise NotExpressible(f"activations of {rounding.bits} bits; the format has {BITS[0]} to {BITS[-1]}")
    args = {"num_bits": rounding.bits, "type": "int", "symmetric": True, "dynamic": rounding.scale is None}
    return args | {"strategy": "tensor" if rounding.per_tensor or rounding.scale is not None else "token"}


def _other_linears(plain: Plain) -> Iterator[str]:
    quantized = plain.linears()
    for name, module in plain.model.named_modules():
        if isinstance(module, nn.Linear) and name not in quantized:
            yield name


def _describe(folder: Path, config: Any, asymmetric_weights: bool) -> None:
    """Add the description to config.json.

    transformers 5.23 leaves weights packed until the first forward pass, but gives packed zero points a
    place of the wrong shape; `dequantize` makes it unpack them on loading, to the same weights.
    """
    import compressed_tensors

    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    described = config.model_dump(mode="json") | {"version": compressed_tensors.__version__}
    if asymmetric_weights:
        described["dequantize"] = True
    settings["quantization_config"] = described | {"quant_method": "compressed-tensors"}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
