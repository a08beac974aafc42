"""Grids that clip on purpose, the range of each by trial.

`search_grid` is the search of QuaRot (arXiv:2404.00456v2) and its followers, `search_grid_and_zero` that of OWQ
(arXiv:2306.02272v4), which tries all zero points as well, `search_symmetric_grid` that of OWQ's symmetric grids.
"""

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


def search_grid_and_zero(
    x: Tensor, bits: int, symmetric: bool, n_steps: int, norm: float
) -> tuple[Tensor, Tensor]:
    """The best grid among n_steps fractions of the full step size, with each zero point 0..2^bits-1.

    Every row is sorted once. A zero point z then adds to the errors without clipping what the entries below -z steps
    and above 2^bits-1-z steps lose more, and these are the ends of the row.

    Args:
        x: [..., n]; the error is the sum of |x - q|^norm over the last dimension.
        symmetric: must be False; there for GPTQ's signature.
    Returns: scale, zero_point [..., 1].
    """
    if symmetric:
        raise _quant.QuantizationError("the range search knows asymmetric grids only")
    top, rows = 2**bits - 1, x.flatten(0, -2).sort(-1).values  # [m, n]
    ends = {
        -1: (-rows).T.contiguous(),
        1: rows.T.flip(0).contiguous(),
    }  # [n, m], what is clipped first comes first
    pairs = ends[1][: rows.shape[1] // 2] + ends[-1][: rows.shape[1] // 2]  # outermost two, next two, ...
    span = ends[1][0].clamp(min=0) + ends[-1][0].clamp(min=0)
    span = torch.where(span == 0, 1.0, span)
    cols = torch.arange(len(rows))
    best, best_scale, best_zero = (
        torch.full_like(span, torch.inf),
        torch.empty_like(span),
        torch.zeros_like(span),
    )
    for step in range(n_steps, 0, -1):
        scale = _quant.stored_scale(span * (step / (n_steps * top)), bits)
        if (2 * _quant.power_((pairs - top * scale).clamp_(min=0).div_(2), norm).sum(0) > best).all():
            break  # no grid of this width or less can hold both ends of the pairs
        level = torch.div(ends[1], scale).round_().mul_(scale)
        inside = _quant.power_(level.sub_(ends[1]).abs_(), norm)  # errors where nothing is clipped
        sums = torch.nn.functional.pad(inside.cumsum(0), (0, 0, 1, 0))  # [n + 1, m]
        limits = torch.arange(top + 1) * scale[:, None]  # [m, top + 1]
        first = {-1: torch.searchsorted(rows, -limits), 1: torch.searchsorted(rows, limits, right=True)}
        total = sums[-1].repeat(top + 1, 1)  # [zero points, m]
        for limit in range(top + 1):
            low, high = first[-1][:, limit], rows.shape[1] - first[1][:, limit]  # entries that are clipped
            for side, count, zero in ((-1, low, limit), (1, high, top - limit)):
                clipped = (ends[side][: int(count.max())] - limits[:, limit]).clamp_(min=0)
                extra = sums[-1] - sums[-1 - count, cols] if side < 0 else sums[count, cols]
                total[zero] += _quant.power_(clipped, norm).sum(0) - extra
        least, zero_point = total.min(0)
        better = least <= best
        best, best_scale = torch.where(better, least, best), torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero_point.float(), best_zero)
    shape = (*x.shape[:-1], 1)
    return best_scale.reshape(shape), best_zero.reshape(shape)


def search_symmetric_grid(
    x: Tensor, bits: int, _symmetric: bool, n_steps: int, norm: float
) -> tuple[Tensor, Tensor]:
    """The best grid among n_steps fractions of the full step size, max|x| / 2^(bits-1), with 0 in the middle (code).

    The full grid reaches -max|x|, and one step less above; n_steps 1 leaves it alone.

    Args:
        x: [..., n]; the error is the sum of |x - q|^norm over the last dimension. With GPTQ's signature.
    Returns: scale, zero_point [..., 1], the latter 2^(bits-1).
    """
    half, peak = 2 ** (bits - 1), x.abs().amax(-1, keepdim=True)
    full = peak.masked_fill(peak == 0, 1.0) / half
    best_scale, best, error = full, torch.full_like(full, torch.inf), torch.empty_like(x.contiguous())
    for step in range(n_steps, 0, -1):
        scale = _quant.stored_scale(full * (step / n_steps), bits)
        torch.div(x, scale, out=error).round_().clamp_(-half, half - 1).mul_(scale).sub_(x)
        total = _quant.power_(error.abs_(), norm).sum(-1, keepdim=True)
        better = total <= best
        best, best_scale = torch.where(better, total, best), torch.where(better, scale, best_scale)
    return best_scale, torch.full_like(best_scale, float(half))
