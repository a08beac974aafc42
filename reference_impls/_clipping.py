"""Learned ranges of weights alone: what OmniQuant learns without its transformations, for other methods' weights.

DuQuant clips transformed weights so, SliM-LLM+ groups of several widths, Integer Scale whatever has integer scales. The
quantizers are modules W -> rounded W (while gradients are recorded differentiably, elsewhere exactly as stored); their
parameters are learned together, one decoder block at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant
from requant.reference_impls._learn import reconstruct
from requant.reference_impls._straight_through import ClippingStrengths, affine_ste
from requant.reference_impls._walk import Block, named_linears


class ClippedWeight(nn.Module):
    """Learnable weight clipping (OmniQuant, arXiv:2308.13137v3, Sec. 3.2) of one linear; rows or groups of a row."""

    def __init__(self, W: Tensor, bits: int, group_size: int | None, symmetric: bool, init: float = 4.0):
        super().__init__()
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.strengths = ClippingStrengths(_quant.grouped(W, group_size), init)

    def forward(self, W: Tensor) -> Tensor:
        groups = _quant.grouped(W, self.group_size)
        return self.strengths.fake_quantize(groups, self.bits, self.symmetric).flatten(1)


class MixedClippedWeight(nn.Module):
    """Learned ranges where each group of inputs has its own width (SliM-LLM+, arXiv:2405.14917v2, Table 2).

    One-bit groups have the levels +-s, by the sign of w less the row's mean; s is mean |w| times 0.5 + a sigmoid that
    starts at 0.982, and the mean is not added back (official code).
    """

    def __init__(self, W: Tensor, widths: Sequence[int], group_size: int, init: float = 4.0):
        super().__init__()
        groups, self.group_size = _quant.grouped(W, group_size), group_size
        self.widths = torch.tensor(widths)
        self.strengths = nn.ModuleDict(
            {str(b): ClippingStrengths(groups[:, self.widths == b], init) for b in sorted(set(widths))}
        )

    def grid(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point [d_out, n, 1] of the groups x [d_out, n, size] of one width, as stored without grad."""
        strengths = self.strengths[str(bits)]
        if bits > 1:
            return strengths.grid(x, bits) if torch.is_grad_enabled() else strengths.stored_grid(x, bits)
        scale = 2 * x.abs().mean(-1, keepdim=True) * (0.5 + strengths.high_logit.sigmoid())
        return scale if torch.is_grad_enabled() else _quant.stored_scale(scale, 1), torch.full_like(
            scale, 0.5
        )

    def codes(self, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        """Integer-valued codes 0..2^b-1 of the groups of one width."""
        if bits == 1:
            return (x > x.mean(-1, keepdim=True)).to(x.dtype)
        return _quant.quantize(x, scale, zero_point, bits)

    @torch.no_grad()
    def stored(self, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [d_out, n_groups, size], scale and zero point [d_out, n_groups, 1] with the present ranges."""
        groups = _quant.grouped(W, self.group_size)
        codes, scale, zero = torch.empty_like(groups), *torch.empty(2, *groups.shape[:2], 1)
        for bits in self.widths.unique().tolist():
            chosen = self.widths == bits
            grid = scale[:, chosen], zero[:, chosen] = self.grid(groups[:, chosen], bits)
            codes[:, chosen] = self.codes(groups[:, chosen], *grid, bits)
        return codes, scale, zero

    def forward(self, W: Tensor) -> Tensor:
        groups = _quant.grouped(W, self.group_size)
        Q = torch.empty_like(groups)
        for bits in self.widths.unique().tolist():
            chosen = self.widths == bits
            x, grid = groups[:, chosen], self.grid(groups[:, chosen], bits)
            if bits == 1:
                Q[:, chosen] = _quant.dequantize(self.codes(x, *grid, bits), *grid)
            else:
                Q[:, chosen] = affine_ste(x, *grid, bits)
        return Q.flatten(1)


def learn_ranges(
    block: Block,
    quantizers: Mapping[str, nn.Module],
    *,
    lr: float,
    epochs: int,
    batch_size: int,
    second_targets: list[Tensor] | None = None,
) -> list[float]:
    """Learn the quantizers of linears (by their dotted names in the block) on the block's output error, then round.

    Args:
        block: from a walk that propagates "both"; its weights are unrounded, and end rounded.
        second_targets: outputs to come close to as well (OmniQuant's aug_loss).
    Returns: the loss of each batch before its step.
    """
    linears, losses = named_linears(block.module), []
    parameters = [p for quantizer in quantizers.values() for p in quantizer.parameters()]

    def rounded(_epoch: int) -> dict[str, Tensor]:
        return {f"{name}.weight": quantizer(linears[name].weight) for name, quantizer in quantizers.items()}

    if epochs:
        optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.0)
        how = {"epochs": epochs, "batch_size": batch_size, "second_targets": second_targets}
        losses = reconstruct(block, rounded, optimizer, **how)
    with torch.no_grad():
        for name, quantizer in quantizers.items():
            linears[name].weight.copy_(quantizer(linears[name].weight))
    return losses
