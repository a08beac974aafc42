"""Trying a rounding inside a decoder block: probes in the places of its linears, which catch, answer, or end the pass.

Outlier Suppression+ (arXiv:2304.09145) judges a scale by what the operators behind it make of rounded outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls._anatomy import BlockAnatomy
from requant.reference_impls._walk import Block, replace_module


class _Caught(Exception):
    """A probe has what was wanted."""


class Probe(nn.Module):
    """A linear that runs as `run` (input -> output) says; may answer with `given`, or end the pass."""

    def __init__(self, linear: nn.Linear, run: Callable[[Tensor], Tensor]):
        super().__init__()
        self.linear, self.run, self.given, self.caught = linear, run, None, None

    def forward(self, x: Tensor) -> Tensor:
        if self.caught is not None:
            self.caught.append(x)
            raise _Caught
        return self.run(x) if self.given is None else self.given

    def catch(self, run: Callable[[], object]) -> Tensor:
        """What reaches this linear when `run` is called."""
        self.caught = []
        with suppress(_Caught):
            run()
        (x,), self.caught = self.caught, None
        return x


def replace_linears(parts: BlockAnatomy, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules into the places of the old ones in a block."""
    names = {module: name for name, module in parts.block.named_modules()}
    for old, module in new.items():
        replace_module(parts.block, names[old], module)


def outputs_behind(
    block: Block,
    linears: Sequence[nn.Linear],
    sublayers: Sequence[tuple[nn.Module, list[nn.Linear], nn.Linear]],
    probes: Mapping[nn.Linear, Probe],
) -> Callable[[list[Tensor]], Tensor]:
    """A function from outputs of `linears` to what they become behind the operators that follow, [..., d].

    Args:
        sublayers: (module, the linears it begins with, the one it ends with) of attention and MLP. Those that begin
            with some of `linears` are replayed up to their last linear; outputs of other linears stay as they are.
        probes: in the places of all these linears; the block runs once for each sublayer to be replayed.
    """
    replayed = []
    for module, readers, end in sublayers:
        if readers[0] in linears:
            calls: list[tuple] = []
            handle = module.register_forward_pre_hook(
                lambda _m, args, kwargs, calls=calls: calls.append((args, kwargs)), with_kwargs=True
            )
            probes[end].catch(lambda: block.forward(block.inputs[0]))
            handle.remove()
            args, kwargs = calls[0]
            replayed.append((partial(module, *args, **kwargs), readers, probes[end]))

    def behind(outputs: list[Tensor]) -> Tensor:
        left, seen = dict(zip(linears, outputs, strict=True)), []
        for call, readers, end in replayed:
            for reader in readers:
                probes[reader].given = left.pop(reader)
            seen.append(end.catch(call))
            for reader in readers:
                probes[reader].given = None
        return torch.cat([*seen, *left.values()], -1)

    return behind
