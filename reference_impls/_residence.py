"""Where the weights of a model wait and where they are computed with: one decoder block at a time comes to its device.

A model that fits its device waits and computes in one place, and nothing here changes it. The blocks of one that does
not (`place`, used by the loader) wait in memory or in files, with the rest of its modules. Each comes for its own
forward pass; `visit` brings one for longer, in float32 where it is held in 16 bits, and takes back what was changed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)
FILES = "files"
Taken = list[tuple[Tensor, Tensor]]  # a parameter or buffer, and the tensor it shows while it waits


def mapped(x: Tensor, folder: Path) -> Tensor:
    """The same values on the CPU, in a file of this folder that has no name and vanishes with its last tensor.

    The system reads and writes such a tensor as it is used, and may drop it from memory in between.
    """
    if not x.numel():
        return x.cpu()
    handle, name = tempfile.mkstemp(dir=folder, suffix=".tensor")
    os.close(handle)
    try:
        file = torch.from_file(name, shared=True, size=x.numel(), dtype=x.dtype)
    finally:
        Path(name).unlink()  # the mapping keeps the space until the tensor is gone
    return file.view(x.shape).copy_(x)


@dataclass(eq=False)
class Residence:
    """Of one module: the device it computes on, and the place where its tensors wait.

    Attributes:
        store: a device, FILES, or None where they stay on `device`.
        folder: for files, those of this module and of its copies.
    """

    device: torch.device
    store: torch.device | str | None
    folder: Path
    _guests: list[Taken] = field(default_factory=list)

    def put_away(self, x: Tensor) -> Tensor:
        """The same values where they wait."""
        if self.store is None:
            return x
        return mapped(x, self.folder) if self.store == FILES else x.to(self.store)

    def arrive(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before a forward pass (a torch hook): tensors and arguments come to the device."""
        self._guests.append(_bring(module, self))
        return _moved(args, self.device), _moved(kwargs, self.device)

    def leave(self, _module: nn.Module, _args: tuple, _output: object) -> None:
        """After it, or after an exception in it: the waiting tensors are shown again, as they were."""
        for tensor, home in reversed(self._guests.pop()):
            tensor.data = home


def place(modules: Mapping[nn.Module, tuple[torch.device, torch.device | str | None]], folder: Path) -> None:
    """Give modules, none inside another, a residence (device, store); their tensors must wait in the store already."""
    for module, (device, store) in modules.items():
        module.residence = Residence(device, store, folder)
        module.register_forward_pre_hook(module.residence.arrive, with_kwargs=True, prepend=True)
        module.register_forward_hook(module.residence.leave, always_call=True)


def placed(model: nn.Module) -> list[nn.Module]:
    """The modules that have a residence; none where the model fits its device."""
    return [module for module in model.modules() if getattr(module, "residence", None) is not None]


def away(model: nn.Module) -> bool:
    """Whether any part of the model waits elsewhere than where it computes."""
    return any(module.residence.store is not None for module in placed(model))


def homes_of_a_copy(model: nn.Module) -> dict[int, Tensor]:
    """id of each tensor with a residence -> an equal one in a file: a copy takes no memory (a memo for deepcopy)."""
    found: dict[int, Tensor] = {}
    for module in placed(model):
        for tensor in _tensors(module):
            if id(tensor) not in found:
                twin = mapped(tensor.data, module.residence.folder)
                parameter = isinstance(tensor, nn.Parameter)
                found[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if parameter else twin
    return found


@contextmanager
def visit(module: nn.Module, now: Callable[[], nn.Module] | None = None) -> Iterator[nn.Module]:
    """Inside, the module is on the device it computes on and in float32; after it, all goes back to where it waits.

    Tensors that are new by then wait there, too, in the dtype the module came with. Nothing happens to a module that
    waits where it computes and is not held in 16 bits.

    Args:
        now: what stands in the module's place after the visit, if that may be another one.
    """
    residence = getattr(module, "residence", None)
    taken = _bring(module, residence, torch.float32)
    try:
        yield module
    finally:
        _take_back(now() if now else module, residence, taken)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _bring(module: nn.Module, residence: Residence | None, dtype: torch.dtype | None = None) -> Taken:
    """Replace what the module's tensors show by working copies on its device; 16 bits become `dtype`, if given."""
    taken: Taken = []
    elsewhere = residence is not None and residence.store is not None
    with torch.inference_mode(False), torch.no_grad():
        for tensor in _tensors(module):
            wanted = dtype if dtype is not None and tensor.dtype in HALF else tensor.dtype
            if elsewhere:
                work = tensor.data.to(residence.device, wanted, copy=True)
            elif wanted != tensor.dtype:
                work = tensor.data.to(wanted)
            else:
                continue
            taken.append((tensor, tensor.data))
            tensor.data = work
    return taken


def _take_back(module: nn.Module, residence: Residence | None, taken: Taken) -> None:
    """Write working copies into the tensors that wait, and put away what the module has got in addition."""
    known = {id(tensor) for tensor, _ in taken}
    half = next((home.dtype for _, home in taken if home.dtype in HALF), None)
    with torch.inference_mode(False), torch.no_grad():
        for tensor, home in reversed(taken):
            if home.shape == tensor.shape:
                tensor.data = home.copy_(tensor.data)
            else:
                tensor.data = _waiting(tensor.data.to(home.dtype), residence)
        if not taken:
            return
        for tensor in _tensors(module):
            if id(tensor) not in known:
                lower = half if tensor.dtype == torch.float32 and half is not None else tensor.dtype
                tensor.data = _waiting(tensor.data.to(lower), residence)
    if residence is not None and getattr(module, "residence", None) is None:
        place({module: (residence.device, residence.store)}, residence.folder)


def _waiting(x: Tensor, residence: Residence | None) -> Tensor:
    return x if residence is None else residence.put_away(x)


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors in tuples, lists and dicts on the device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_moved(item, device) for item in value)
    return value
