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


def token_range(x: Tensor, clip_ratio: float) -> tuple[Tensor, Tensor]:
    """The range of x [n, seqlen, d] without the most extreme tokens, a share clip_ratio at either end: low, high [n].

    Token-wise clipping of Outlier Suppression (arXiv:2209.13325), as the code of Outlier Suppression+ has it.
    """
    low, high = torch.aminmax(x.float(), dim=-1)  # [n, seqlen]
    ends = []
    for end in (high, -low):
        limit = end.abs().quantile(1 - clip_ratio, dim=1, keepdim=True)
        ends.append(end.masked_fill(end > limit, -torch.inf).amax(1))
    return -ends[1], ends[0]


class RangeRounding:
    """Rounds a tensor [..., seqlen, d] on the range of each token (per_token), group (per_group) or of all of it.

    A static range is the mean of those of the sequences seen while `observing`, each rounded on the mean so far.

    Args:
        granularity: per_token, per_group or, for one range, per_tensor_static; group_size: values a group.
        static: whether that one range is the mean; otherwise it is that of the tensor at hand, as during a search.
        token_clip_ratio: share of the tokens of a sequence that its range leaves out at either end (`token_range`).
    """

    def __init__(
        self,
        bits: int,
        symmetric: bool,
        granularity: str,
        group_size: int | None,
        static: bool = False,
        token_clip_ratio: float = 0.0,
    ):
        self.bits, self.symmetric, self.granularity = bits, symmetric, granularity
        self.group_size = group_size if granularity == "per_group" else None
        self.seen, self.observing = [] if static else None, static
        self.token_clip_ratio = token_clip_ratio

    def __call__(self, x: Tensor) -> Tensor:
        if self.granularity != "per_tensor_static":
            groups = _quant.grouped(x.flatten(0, -2), self.group_size)
            low, high = torch.aminmax(groups, dim=-1, keepdim=True)
            return round_between(groups, low, high, self.bits, self.symmetric).view_as(x)
        if self.seen is None:
            return round_between(x, x.amin(), x.amax(), self.bits, self.symmetric)
        if self.observing:
            tokens = x.transpose(1, 2).flatten(2) if x.ndim == 4 else x  # all heads of a token together
            tokens = tokens[None] if x.ndim == 2 else tokens  # OPT's MLP sees one tensor
            self.seen += torch.stack(token_range(tokens, self.token_clip_ratio), 1).tolist()
        low, high = torch.tensor(self.seen, device=x.device).mean(0)
        return round_between(x, low, high, self.bits, self.symmetric)
