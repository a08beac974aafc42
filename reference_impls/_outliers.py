"""Weights or columns that stay in float16 beside a low-bit matrix: how they are stored, and what they cost.

Dense columns (OWQ, QUIK: weakly quantizable inputs) and single weights (AdpQ) have each their container. Both are
added to the tensors of a packed matrix and count as storage, indices included.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from requant.reference_impls._quant import QuantizationError


def top_columns(score: Tensor, n: int) -> Tensor:
    """The n columns with the largest score [d_in], ascending: int64 [n]. Ties go to the lower index."""
    if not 0 <= n <= len(score):
        raise QuantizationError(f"{n} outlier columns asked for, the layer has {len(score)} inputs")
    return score.argsort(descending=True, stable=True)[:n].sort().values


def other_columns(columns: Tensor, d_in: int) -> Tensor:
    """The columns not in `columns`, ascending: int64 [d_in - n]."""
    kept = torch.ones(d_in, dtype=torch.bool)
    kept[columns] = False
    return kept.nonzero().flatten()


def pack_columns(W: Tensor, columns: Tensor) -> dict[str, Tensor]:
    """The columns [n] of W [d_out, d_in] in float16 with their indices (int32)."""
    return {"outlier_columns": columns.to(torch.int32), "outliers": W[:, columns].half()}


def join_columns(rest: Tensor, packed: dict[str, Tensor]) -> Tensor:
    """Put the float16 columns of `pack_columns` between those of rest [d_out, d_in - n]: float32 [d_out, d_in]."""
    columns = packed["outlier_columns"].long()
    d_in = rest.shape[1] + len(columns)
    W = rest.new_empty(len(rest), d_in)
    W[:, other_columns(columns, d_in)] = rest
    W[:, columns] = packed["outliers"].to(rest.dtype)
    return W


def column_bits(n: int, d_out: int, d_in: int) -> float:
    """Bits per weight of the whole layer that n float16 columns and their int32 indices take."""
    return n * (16 + 32 / d_out) / d_in


class TunableColumns(nn.Module):
    """A linear of which some columns can be trained: y = W x with those columns at 0, plus V x[columns].

    The backward pass to V keeps x[columns] alone, n features of d_in.
    """

    def __init__(self, linear: nn.Linear, columns: Tensor):
        super().__init__()
        self.linear, self.columns = linear, columns
        self.values = nn.Parameter(linear.weight.detach()[:, columns].float())
        linear.weight.data[:, columns] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + nn.functional.linear(x[..., self.columns], self.values.to(x.dtype))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The linear with the columns, rounded to float16, back in their places."""
        self.linear.weight[:, self.columns] = self.values.half().to(self.linear.weight.dtype)
        return self.linear


def pack_entries(W: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The weights where mask [d_out, d_in] holds, in float16, with a count a row and a 16-bit column each (CSR).

    Raises: QuantizationError for more than 65,536 inputs, which a 16-bit column cannot name.
    """
    if W.shape[1] > 2**16:
        raise QuantizationError(f"d_in {W.shape[1]} exceeds the 65,536 columns of the sparse format")
    rows, columns = mask.nonzero(as_tuple=True)
    return {
        "outlier_counts": torch.bincount(rows, minlength=len(W)).to(torch.int32),  # [d_out]
        "outlier_columns": (columns - 2**15).to(torch.int16),  # [n], shifted into the signed range
        "outliers": W[mask].half(),  # [n]
    }


def place_entries(W: Tensor, packed: dict[str, Tensor]) -> Tensor:
    """W [d_out, d_in] with the entries of `pack_entries` in their places; a new tensor."""
    rows = torch.repeat_interleave(torch.arange(len(W)), packed["outlier_counts"].long())
    W = W.clone()
    W[rows, packed["outlier_columns"].long() + 2**15] = packed["outliers"].to(W.dtype)
    return W


def entry_bits(n: int, d_out: int, d_in: int) -> float:
    """Bits per weight of n sparse float16 weights: 32 each, and 32 a row for the counts."""
    return (32 * n + 32 * d_out) / (d_out * d_in)
