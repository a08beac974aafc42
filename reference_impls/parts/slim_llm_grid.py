"""The grids of SliM-LLM's groups: min-max ranges stretched or shrunk a little, and two levels where there is one bit.

SliM-LLM, arXiv:2405.14917v2 (salience-weighted quantizer calibration); "code" is its official repository @cfdf5ff.
Codes are 0..2^b-1 with a zero point that is not clamped to them, and is a fraction at one bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from requant.reference_impls import _quant


def choose_qparams(
    x: Tensor, bits: int, factors: Sequence[float] = (1.0,), norm: float = 2.4
) -> tuple[Tensor, Tensor]:
    """The grid of each last-dimension slice of x [..., n]: scale and zero point, [..., 1] each.

    One bit stands for mean + or - mean |x| (code). Wider codes have a min-max grid, its range times the one of the
    factors that rounds x with the least sum of |error|^norm; ties go to the factor next to 1.
    """
    if bits == 1:
        scale = _quant.stored_scale(2 * x.abs().mean(-1, keepdim=True), bits)
        return scale, (0.5 - x.mean(-1, keepdim=True) / scale).half().float()
    top = 2**bits - 1
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    step = torch.where(high == low, 2.0, high - low) / top
    zero = (-low / step).round()
    best_scale = _quant.stored_scale(step, 8)
    if len(factors) == 1:
        return _quant.stored_scale(factors[0] * step, 8), zero
    best, q, x = torch.full_like(step, torch.inf), torch.empty_like(x), x.contiguous()
    for factor in sorted(factors, key=lambda f: abs(f - 1)):
        scale = _quant.stored_scale(factor * step, 8)
        torch.div(x, scale, out=q).add_(zero).round_().clamp_(0, top).sub_(zero).mul_(scale).sub_(x)
        error = _quant.power_(q.abs_(), norm).sum(-1, keepdim=True)
        better = error < best
        best, best_scale = torch.where(better, error, best), torch.where(better, scale, best_scale)
    return best_scale, zero


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Integer-valued codes 0..2^bits-1, same shape as x."""
    return (x / scale + zero_point).round().clamp(0, 2**bits - 1)


def fake_quant(W: Tensor, bits: int, group_size: int) -> Tensor:
    """W [d_out, d_in] rounded to nearest, every group at the same width and on its min-max grid."""
    x = _quant.grouped(W, group_size)
    scale, zero = choose_qparams(x, bits)
    return _quant.dequantize(quantize(x, scale, zero, bits), scale, zero).flatten(1)
