"""A decoder whose activations all have static ranges, as on an integer NPU (MobileQuant, arXiv:2408.13933v1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from requant.reference_impls._activation import QuantInput, one_each, transform_attention
from requant.reference_impls._anatomy import block_anatomies
from requant.reference_impls._straight_through import affine_ste
from requant.reference_impls._walk import named_linears, replace_module


class StaticRange(nn.Module):
    """One scale and one offset for a tensor, whatever it holds: observes first, then rounds; both can be learned."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits, self.low, self.high, self.observing = bits, 0.0, 0.0, True
        self.scale, self.offset = (nn.Parameter(torch.zeros(()), requires_grad=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.observing:
            self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
            return x
        return affine_ste(x, self.scale.clamp(1e-5, 1e6), self.offset, self.bits)

    @torch.no_grad()
    def settle(self) -> None:
        """Take the observed range."""
        self.scale.fill_(max((self.high - self.low) / (2**self.bits - 1), 1e-5))
        self.offset.copy_((-self.low / self.scale).round())
        self.observing = False


def simulate(model: nn.Module, a_bits: int, wide_bits: int, scores: bool = True) -> list[StaticRange]:
    """Put a StaticRange at every place of the blocks that an integer NPU rounds (Sec. 3.1), in place.

    Inputs of norms, outputs of o and down, inputs (unless `scores` is off) and outputs of the softmax have wide_bits,
    all others a_bits.
    """
    made: list[StaticRange] = []

    def new(bits: int = a_bits) -> StaticRange:
        made.append(StaticRange(bits))
        return made[-1]

    for parts in block_anatomies(model):
        names = {id(module): name for name, module in parts.block.named_modules()}
        for norm, _ in parts.norm_groups:
            replace_module(parts.block, names[id(norm)], nn.Sequential(new(wide_bits), norm, new()))
        widths = (a_bits, a_bits, wide_bits, *([wide_bits] if scores else []))
        q, k, softmax, *score = parts.attn.ranges = nn.ModuleList(new(bits) for bits in widths)
        ways = one_each(q, k, nn.Identity())
        transform_attention(model, parts.attn, ways, weigh=softmax, score=score[0] if scores else None)
        for name in ("act_fn", "activation_fn"):
            if parts.gate is not None and isinstance(getattr(parts.mlp, name, None), nn.Module):
                setattr(parts.mlp, name, nn.Sequential(getattr(parts.mlp, name), new()))
        for linear in named_linears(parts.block).values():
            wide = linear in (parts.o, parts.down)
            after = new(wide_bits if wide else a_bits)
            replace_module(parts.block, names[id(linear)], QuantInput(linear, new() if wide else None, after))
    return made
