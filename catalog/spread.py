"""Load a checkpoint that does not fit its device: accelerate's device map says where each part waits.

transformers places the weights by that map (`device_map="auto"`): on accelerators, then in memory, then on disk. What
waits in memory or on disk is then handed to reference_impls/_residence.py, which brings it to its device block by
block, in place of accelerate's own hooks: those show no weights between forward passes, and write none back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from requant.reference_impls._residence import FILES, mapped, place
from requant.reference_impls._walk import decoder_blocks


class NoRoom(ValueError):
    """A model does not fit as it was to be loaded; the message says what is needed."""


def load_spread(
    folder: Path, how: Mapping[str, Any], max_memory: Mapping[int | str, int], offload_dir: Path | None
) -> nn.Module:
    """The model by transformers' loading; a copy of it will fit, or wait in files of `offload_dir`.

    Args:
        how: arguments of from_pretrained.
        max_memory: bytes that weights may take: number of an accelerator or `cpu` -> bytes. Empty: what is free now.
    Raises: NoRoom without `offload_dir` where two models do not fit; ImportError without accelerate.
    """
    from accelerate.utils import get_max_memory
    from transformers import AutoModelForCausalLM

    limits = get_max_memory(dict(max_memory) or None)
    main = next(iter(limits), "cpu")
    with TemporaryDirectory(dir=offload_dir) as scratch:  # for weights that cannot be read where they are
        model = AutoModelForCausalLM.from_pretrained(
            folder, device_map="auto", max_memory=dict(max_memory) or None, offload_folder=scratch, **how
        )
        where = getattr(model, "hf_device_map", {"": main})
        if set(where.values()) == {main} and 2 * model.get_memory_footprint() <= limits[main]:
            return model
        if offload_dir is None:
            needed = 2 * model.get_memory_footprint() / 1e9
            raise NoRoom(
                f"two models of it take {needed:.3g} GB, more than fits; give --offload-dir, a folder on disk"
            )
        _settle(model, where, main, offload_dir)
    return model


def _settle(model: nn.Module, where: Mapping[str, Any], main: int | str, folder: Path) -> None:
    """Replace accelerate's hooks by residences."""
    from accelerate.hooks import remove_hook_from_module

    found = _waiting_tensors(model, folder)
    remove_hook_from_module(model, recurse=True)
    for (module, name), (tensor, _store) in found.items():
        module._parameters[name] = tensor
    stores = {id(module._parameters[name]): store for (module, name), (_, store) in found.items()}
    names = {module: name for name, module in model.named_modules()}
    units = {}
    for module in _units(model):
        here = {stores.get(id(tensor)) for tensor in module.parameters()} - {None}
        device = _of(where, names[module])
        device = torch.device(main if device in ("cpu", "disk") else device)
        units[module] = device, FILES if FILES in here else next(iter(here), None)
    place(units, folder)


def _units(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks, and all modules outside them that hold tensors themselves."""
    blocks = decoder_blocks(model)
    inside = {module for block in blocks for module in block.modules()}
    outside = (module for module in model.modules() if module not in inside)
    own = [m for m in outside if any(True for _ in (*m.parameters(recurse=False), *m.buffers(recurse=False)))]
    return [*blocks, *own]


def _of(where: Mapping[str, Any], name: str) -> Any:
    """The entry of a device map for a module: that of the longest name it lies under."""
    under = [key for key in where if not key or name == key or name.startswith(f"{key}.")]
    return where[max(under, key=len)]


def _waiting_tensors(
    model: nn.Module, folder: Path
) -> dict[tuple[nn.Module, str], tuple[nn.Parameter, torch.device | str]]:
    """(module, name) of each parameter that accelerate keeps elsewhere -> it with its values, and where those wait."""
    found: dict[tuple[nn.Module, str], tuple[nn.Parameter, torch.device | str]] = {}
    made: dict[int, tuple[nn.Parameter, torch.device | str]] = {}  # tied parameters stay one
    for module in model.modules():
        for name, tensor in module.named_parameters(recurse=False):
            if tensor.is_meta:
                if id(tensor) not in made:
                    value, store = _read(module._hf_hook, name, folder)
                    made[id(tensor)] = nn.Parameter(value, requires_grad=False), store
                found[module, name] = made[id(tensor)]
    return found


def _read(hook: Any, name: str, folder: Path) -> tuple[Tensor, torch.device | str]:
    """A tensor as a hook of accelerate finds it, and where it waits now."""
    from safetensors import safe_open

    weights, key = hook.weights_map.dataset, hook.weights_map.prefix + name
    if key in weights.state_dict:
        return weights.state_dict[key], torch.device("cpu")
    entry = weights.index[key]
    with safe_open(entry["safetensors_file"], framework="pt") as file:
        stored = file.get_tensor(entry["weight_name"])
    dtype = getattr(torch, entry["dtype"])
    own = Path(entry["safetensors_file"]).is_relative_to(folder)  # the scratch folder, soon gone
    # as it is, the tensor is a view of the mapped checkpoint: it takes no memory
    return stored if stored.dtype == dtype and not own else mapped(stored.to(dtype), folder), FILES
