"""Rounding of activations between the two ends of a range: of the tensor, of each token or group, or a static one."""

from __future__ import annotations

import torch
from torch import Tensor

from requant.reference_impls import _quant


def round_between(x: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Round x to the grid of so many bits from low to high, which is widened to hold 0; values beyond are clamped."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        limit = 2 ** (bits - 1) - 1
        scale = (torch.maximum(high, -low) / limit).clamp(min=1e-9)
        return (x / scale).round().clamp(-limit, limit) * scale
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-9)
    zero_point = (-low / scale).round()
    return ((x / scale).round() + zero_point).clamp(0, 2**bits - 1).sub(zero_point) * scale


class RangeRounding:
    """Rounds a tensor [..., seqlen, d] on the range of each token (per_token), group (per_group) or of all of it.

    A static range is the mean of those of the sequences seen while `observing`, each rounded on the mean so far.

    Args:
        granularity: per_token, per_group or, for one range, per_tensor_static; group_size: values a group.
        static: whether that one range is the mean; otherwise it is that of the tensor at hand, as during a search.
    """

    def __init__(
        self, bits: int, symmetric: bool, granularity: str, group_size: int | None, static: bool = False
    ):
        self.bits, self.symmetric, self.granularity = bits, symmetric, granularity
        self.group_size = group_size if granularity == "per_group" else None
        self.seen, self.observing = [] if static else None, static

    def __call__(self, x: Tensor) -> Tensor:
        if self.granularity != "per_tensor_static":
            groups = _quant.grouped(x.flatten(0, -2), self.group_size)
            low, high = torch.aminmax(groups, dim=-1, keepdim=True)
            return round_between(groups, low, high, self.bits, self.symmetric).view_as(x)
        if self.seen is None:
            return round_between(x, x.amin(), x.amax(), self.bits, self.symmetric)
        if self.observing:  # a sequence a row; OPT's MLP sees one tensor
            rows = x.flatten(1) if x.ndim > 2 else x.reshape(1, -1)
            self.seen += torch.stack(torch.aminmax(rows, dim=1), 1).tolist()
        low, high = torch.tensor(self.seen, device=x.device).mean(0)
        return round_between(x, low, high, self.bits, self.symmetric)
