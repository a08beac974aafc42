"""Grids that clip on purpose, the range of each by trial (QuaRot, arXiv:2404.00456v2, and its followers)."""

from __future__ import annotations

import torch
from torch import Tensor

from requant.reference_impls import _quant

_FLOOR = (
    1e-6  # of a step: log and exp take ten times as long at 0 and where a result is below the normal numbers
)


def grid_of_share(x: Tensor, bits: int, symmetric: bool, ratio: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scale and zero point [..., 1] for ratio times the range of x [..., n]; symmetric: peak / (2^(b-1) - 1)."""
    if not symmetric:
        return _quant.choose_qparams(x * ratio, bits)
    peak = x.abs().amax(-1, keepdim=True)
    scale = (ratio * peak).masked_fill(peak == 0, 1.0) / (2 ** (bits - 1) - 1)
    scale = _quant.stored_scale(scale, bits)
    return scale, torch.full_like(scale, 2.0 ** (bits - 1))


def search_grid(x: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The grid with the least sum of |x - q|^2.4 among 1.00, 0.99, ..., 0.21 of the full range (code)."""
    x = x.contiguous()
    best_scale, best_zero = grid_of_share(x, bits, symmetric)
    best = torch.full_like(best_scale, torch.inf)
    error = torch.empty_like(x)
    for step in range(80):
        scale, zero = grid_of_share(x, bits, symmetric, 1 - step / 100)
        codes = torch.div(x, scale, out=error).round_().add_(zero).clamp_(0, 2**bits - 1)
        codes.sub_(zero).mul_(scale).sub_(x)  # all in the memory of `error`
        torch.maximum(error.abs_(), scale * _FLOOR, out=error)
        total = error.log_().mul_(2.4).exp_().sum(-1, keepdim=True)
        better = total < best
        best, best_scale = torch.where(better, total, best), torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero
