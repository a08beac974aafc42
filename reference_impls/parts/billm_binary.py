"""Weights that are a mean plus or minus a scale, one or two signs each (BiLLM, arXiv:2402.04291v2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BinaryBlock:
    """A binarized block of n columns, as it is stored.

    Attributes:
        first: bool [d_out, n], whether the (first) sign is positive.
        second: bool [d_out, n], in salient columns the sign of the residual, elsewhere the flag of the sparse group.
        salient: bool [n].
        scale, mean: float32 [4, d_out, 1] with float16 values, for the concentrated group, the sparse group, and the
            first and second term of the salient columns.
    """

    first: Tensor
    second: Tensor
    salient: Tensor
    scale: Tensor
    mean: Tensor

    def dequantize(self) -> Tensor:
        """The approximation, float32 [d_out, n] (Eq. 7 and Algorithm 1, line 11)."""
        concentrated, sparse, term = (signed_value(self.mean[i], self.scale[i], self.first) for i in range(3))
        residual = signed_value(self.mean[3], self.scale[3], self.second)
        return torch.where(self.salient, term + residual, torch.where(self.second, sparse, concentrated))


def signed_value(mean: Tensor, scale: Tensor, positive: Tensor) -> Tensor:
    return mean + torch.where(positive, scale, -scale)


def fit_scale(x: Tensor, mask: Tensor, row_means: bool) -> tuple[Tensor, Tensor]:
    """Mean and scale of each row's masked entries, [d_out, 1] each (Eq. 4 and 12); 0 where a row has none."""
    count = mask.expand_as(x).sum(1, keepdim=True).clamp(min=1)
    mean = (x * mask).sum(1, keepdim=True) / count if row_means else torch.zeros_like(x[:, :1])
    return mean, ((x - mean).abs() * mask).sum(1, keepdim=True) / count


def split_error(x: Tensor, mask: Tensor, terms: int, row_means: bool) -> Tensor:
    """Squared error of binarizing masked and other entries apart, `terms` times each (Eq. 5, 8, 11)."""
    total = x.new_zeros(())
    for part in (mask, ~mask):
        rest = x
        for _ in range(terms):
            mean, scale = fit_scale(rest, part, row_means)
            rest = rest - signed_value(mean, scale, rest - mean >= 0)
        total = total + (rest.square() * part).sum()
    return total
