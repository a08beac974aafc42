"""A quantized model taken apart: ordinary linears with new weights, and what rounds their inputs and outputs.

A saved model is rebuilt from its config by whoever loads it, so nothing but parameters and described roundings can
be saved. What a method may leave behind besides is refused by name: rotations that run online, quantized caches,
layers of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant
from requant.reference_impls._activation import QuantInput
from requant.reference_impls._walk import decoder_blocks, replace_module

_NARROW = (torch.bfloat16, torch.float16)


class NotPlain(ValueError):
    """The quantized model is more than parameters and roundings; the message says what it holds."""


@dataclass(frozen=True)
class Rounding:
    """Round to nearest on a signed grid +-(2^(bits-1)-1), as `_quant.absmax_fake_quant` does.

    scale: float32 scalar fixed by calibration; None: absmax of each token, or per_tensor of each sequence.
    """

    bits: int
    per_tensor: bool = False
    scale: Tensor | None = None

    def function(self) -> Callable[[Tensor], Tensor]:
        """What a QuantInput runs."""
        if self.scale is not None:
            return partial(_quant.absmax_fake_quant, bits=self.bits, scale=self.scale)
        return partial(_quant.absmax_fake_quant, bits=self.bits, per_tensor=self.per_tensor)


@dataclass(frozen=True)
class Plain:
    """`model` has the modules that its config gives it; inputs and outputs by the dotted name of a linear."""

    model: nn.Module
    inputs: dict[str, Rounding]
    outputs: dict[str, Rounding]

    @property
    def weight_only(self) -> bool:
        """Whether no activation is rounded."""
        return not self.inputs and not self.outputs

    def linears(self) -> dict[str, nn.Linear]:
        """The linears of the decoder blocks by their name in the model."""
        blocks = decoder_blocks(self.model)
        inside = {id(module) for block in blocks for module in block.modules()}
        named = self.model.named_modules()
        return {name: m for name, m in named if isinstance(m, nn.Linear) and id(m) in inside}

    def assembled(self) -> nn.Module:
        """The model with its roundings in place; the module is changed, not copied."""
        for name in sorted(self.inputs.keys() | self.outputs.keys()):
            before, after = self.inputs.get(name), self.outputs.get(name)
            linear = self.model.get_submodule(name)
            wrapped = QuantInput(linear, before and before.function(), after and after.function())
            replace_module(self.model, name, wrapped)
        return self.model


def take_apart(quantized: nn.Module, original: nn.Module, cfg: object) -> Plain:
    """Remove the roundings from `quantized`, in place, and make sure that nothing else is left.

    Args:
        original: the model that was quantized; says which modules the config gives.
        cfg: the method's Config; its a_bits is what a dynamic rounding is tried with.
    Raises: NotPlain.
    """
    inputs: dict[str, Rounding] = {}
    outputs: dict[str, Rounding] = {}
    wrapped = [(name, module) for name, module in quantized.named_modules() if type(module) is QuantInput]
    for name, module in wrapped:
        for function, found in ((module.transform, inputs), (module.after, outputs)):
            if function is not None:
                found[name] = _describe(name, function, getattr(cfg, "a_bits", None))
        replace_module(quantized, name, module.linear)
    _compare(quantized, original)
    return Plain(quantized, inputs, outputs)


def _compare(quantized: nn.Module, original: nn.Module) -> None:
    types = {name: type(module) for name, module in original.named_modules()}
    for name, module in quantized.named_modules():
        if types.pop(name, None) is not type(module):
            raise NotPlain(
                f"{name or 'the model'} became a {type(module).__name__}, which only its method can build"
            )
        if "requant_transform" in vars(module):
            raise NotPlain(f"{name} transforms queries, keys or values while it runs")
    if types:
        raise NotPlain(f"{next(iter(types))} is gone")
    shapes = {name: value.shape for name, value in original.state_dict().items()}
    if {name: value.shape for name, value in quantized.state_dict().items()} != shapes:
        raise NotPlain("it has parameters of other names or shapes than its config gives")
    if any(
        hooks
        for module in quantized.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
    ):
        raise NotPlain("hooks change what its modules compute")


def _describe(name: str, function: Callable[[Tensor], Tensor], bits: int | None) -> Rounding:
    """The rounding that a function does, found by trying it."""
    settings = function.keywords if isinstance(function, partial) else {}
    scale = settings.get("scale")
    bits = settings.get("bits", bits)
    probe = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    for rounding in (Rounding(bits or 8, per_tensor, scale) for per_tensor in (False, True)):
        if torch.equal(function(probe), rounding.function()(probe)):
            return rounding
    raise NotPlain(f"the activations at {name} are rounded by a rule that a saved model cannot describe")


def dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model, each tensor in a 16-bit float type if that changes no value; tied tensors stay tied."""
    kept: dict[tuple, Tensor] = {}
    found = {}
    for name, value in model.state_dict().items():
        key = (value.data_ptr(), tuple(value.shape))
        if key not in kept:
            kept[key] = _narrowest(value)
        found[name] = kept[key]
    return found


def _narrowest(value: Tensor) -> Tensor:
    if value.dtype == torch.float32:
        for dtype in _NARROW:
            if torch.equal(value.to(dtype).float(), value):
                return value.to(dtype).contiguous()
    return value.contiguous()
