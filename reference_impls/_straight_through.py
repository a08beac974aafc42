"""Rounding that lets gradients pass (straight-through estimator), and the ranges of weights it learns to clip."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from requant.reference_impls._quant import clipped_fake_quant, stored_scale


def round_ste(x: Tensor) -> Tensor:
    """Round to nearest; the gradient passes as if nothing had been rounded (straight-through estimator)."""
    return x + (x.round() - x).detach()


def straight_through(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """rounding(x) with the gradient of the identity, where it clips as well."""
    rounded = rounding(x.detach())
    return x + (rounded - x.detach()) if x.requires_grad else rounded


class _AffineSTE(torch.autograd.Function):
    """`affine_ste` in few passes over memory, where learned methods spend their time: one node in place of seven."""

    @staticmethod
    def forward(
        ctx, x: Tensor, scale: Tensor, zero_point: Tensor, offset: Tensor | None, bits: int
    ) -> Tensor:
        steps = x / scale
        codes = (steps.round() if offset is None else (steps + offset).round_()).add_(zero_point)
        clamped = codes.clamp(0, 2**bits - 1)
        inside = codes.eq_(clamped)  # 1.0 or 0.0: torch.where takes ten times as long as a product
        codes = clamped.sub_(zero_point)
        rest = None
        if ctx.needs_input_grad[1]:  # d(output) / d(scale)
            rest = torch.addcmul(codes, inside, steps, value=-1)
        ctx.save_for_backward(inside, rest, scale)
        ctx.shapes = [t.shape if isinstance(t, Tensor) else None for t in (x, scale, zero_point, offset)]
        return codes.mul_(scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        inside, rest, scale = ctx.saved_tensors
        to_x = inside * grad
        found = [
            to_x if ctx.needs_input_grad[0] else None,
            grad * rest if ctx.needs_input_grad[1] else None,
            (to_x - grad) * scale if ctx.needs_input_grad[2] else None,
            to_x * scale if ctx.needs_input_grad[3] else None,
        ]
        return *(
            None if one is None else one.sum_to_size(shape)
            for one, shape in zip(found, ctx.shapes, strict=True)
        ), None


def affine_ste(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, offset: Tensor | None = None
) -> Tensor:
    """Fake-quantize x [..., n] on an affine grid, differentiable in x, scale, zero_point and offset.

    Args:
        offset: added to x / scale before it is rounded (SignRound's learned rounding), in steps of the grid.
    Returns: (clamp(round(x / scale + offset) + zero_point, 0, 2^bits - 1) - zero_point) * scale, dequantized like x;
        rounding has the gradient of the identity (straight-through), clamping its own.
    """
    return _AffineSTE.apply(x, scale, zero_point, offset, bits)


class _RangeEnds(torch.autograd.Function):
    """amin and amax of slices, with a gradient that masks by products; their own takes three times as long."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        ends = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        ctx.save_for_backward(x, *ends)
        return ends

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        x, *ends = ctx.saved_tensors
        found = None
        for end, grad in zip(ends, grads, strict=True):
            here = x.clone().eq_(end)
            here.mul_(grad / here.sum(-1, keepdim=True))  # equal entries share it
            found = here if found is None else found.add_(here)
        return found


def range_ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest entry of each last-dimension slice of x [..., n], both [..., 1]; differentiable."""
    return _RangeEnds.apply(x)


def clipped_grid(x: Tensor, bits: int, low: Tensor | float, high: Tensor | float) -> tuple[Tensor, Tensor]:
    """Scale and zero point [..., 1] of the range from low * min(x, 0) to high * max(x, 0); differentiable.

    Args:
        x: [..., n] float32; low, high: numbers or [..., 1], share of each end of the range that is kept, in (0, 1].
    """
    least, largest = range_ends(x)
    bottom, top = low * least.clamp(max=0), high * largest.clamp(min=0)
    scale = ((top - bottom) / (2**bits - 1)).clamp(min=1e-5)
    return scale, round_ste(-bottom / scale)


class ClippingStrengths(nn.Module):
    """Learnable weight clipping (OmniQuant, arXiv:2308.13137v3, Sec. 3.2): sigmoid(logit) of both ends of each range.

    Logits are [..., 1], one for each last-dimension slice of the grouped weight, and start at `init` (4: 0.982).
    """

    def __init__(self, groups: Tensor, init: float = 4.0):
        super().__init__()
        shape = (*groups.shape[:-1], 1)
        self.low_logit = nn.Parameter(torch.full(shape, init))
        self.high_logit = nn.Parameter(torch.full(shape, init))

    def grid(self, groups: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
        """`clipped_grid` of groups [..., n] with the present strengths; symmetric: zero point 2^(bits-1)."""
        low, high = self.low_logit.sigmoid(), self.high_logit.sigmoid()
        if not symmetric:
            return clipped_grid(groups, bits, low, high)
        least, largest = range_ends(groups)
        peak = torch.maximum(-low * least, high * largest)
        scale = (peak / (2 ** (bits - 1) - 1)).clamp(min=1e-5)
        return scale, torch.full_like(scale, 2.0 ** (bits - 1))

    @torch.no_grad()
    def stored_grid(self, groups: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
        """`grid` in the precision it is stored in: float16 scale, zero point within the codes."""
        exact, zero_point = self.grid(groups, bits, symmetric)
        scale = stored_scale(exact, bits)
        if not symmetric:
            bottom = self.low_logit.sigmoid() * groups.amin(-1, keepdim=True).clamp(max=0)
            zero_point = (-bottom / scale).round()
        return scale, zero_point.clamp(0, 2**bits - 1)

    def fake_quantize(self, groups: Tensor, bits: int, symmetric: bool = False) -> Tensor:
        """groups rounded on `grid` while gradients are recorded, elsewhere on `stored_grid`; same shape."""
        grid = self.grid if torch.is_grad_enabled() else self.stored_grid
        return affine_ste(groups, *grid(groups, bits, symmetric), bits)


def token_ste(x: Tensor, bits: int, clip_ratio: float = 1.0) -> Tensor:
    """Asymmetric rounding of each last-dimension slice, differentiable in x and through its range (activations)."""
    if not x.requires_grad:
        return clipped_fake_quant(x, bits, clip_ratio)
    return affine_ste(x, *clipped_grid(x, bits, clip_ratio, clip_ratio), bits)
