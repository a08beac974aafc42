"""What matmuls that decode their weights on the fly share: parts of K, the product of two tiles, the sum of parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from requant.kernels._triton import cdiv, config, jit, next_power_of_2, split_parts, sum_parts, tl

SPLIT_ROWS = 64
"""Rows of x up to which K is split over programs: beyond, the outputs alone fill a device."""

TILES = [
    config(BLOCK_N=n, BLOCK_K=k, num_warps=w, num_stages=s)
    for n, k, w, s in ((32, 32, 4, 2), (64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 4, 2), (128, 64, 8, 3))
]
"""Candidate tiles, for `autotune`."""


def block_rows(rows: int) -> int:
    """Rows of x a program takes: 1 (no dot), or a power of two from 16 to 128."""
    return 1 if rows == 1 else min(max(16, next_power_of_2(rows)), 128)


def split_count(rows: int, d_out: int, steps: int, device: torch.device) -> int:
    """Parts of K, at most `steps`; 1 for more than SPLIT_ROWS rows."""
    return 1 if rows > SPLIT_ROWS else split_parts(steps, cdiv(d_out, 64), device)


def run_parts(
    rows: int, d_out: int, splits: Sequence[int], like: Tensor, launch: Callable[[int, Tensor], Any]
) -> Tensor:
    """y [rows, d_out] in the dtype of `like`: the sum, in a fixed order, of what the launches write.

    Args:
        splits: for each launch, the number of results [rows, d_out] that it writes.
        launch: called with a launch's number and its results, [splits[i], rows, d_out] (float32, or the final
            dtype where there is only one result in all).
    """
    total = sum(splits)
    dtype = like.dtype if total == 1 else torch.float32
    out = torch.empty(total, rows, d_out, dtype=dtype, device=like.device)
    for i, results in enumerate(out.split(list(splits))):
        launch(i, results)
    return out[0] if total == 1 else sum_parts(out, like.dtype)


@jit
def tile_zeros(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """What `tile_add` starts from: float32 [BLOCK_M, BLOCK_N], or [BLOCK_K, BLOCK_N] where there is one row of x."""
    ROWS: tl.constexpr = BLOCK_K if BLOCK_M == 1 else BLOCK_M
    return tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)


@jit
def tile_add(acc, x, w, BLOCK_M: tl.constexpr):
    """acc plus the product of x [BLOCK_M, BLOCK_K] and w [BLOCK_K, BLOCK_N] (float32, narrowed to x's dtype).

    One row needs no dot: its products stay elementwise in acc until `tile_sum`, and w is not narrowed.
    """
    if BLOCK_M == 1:
        return acc + tl.trans(x).to(tl.float32) * w
    else:
        return tl.dot(x, w.to(x.dtype), acc, input_precision="ieee")


@jit
def tile_sum(acc, BLOCK_M: tl.constexpr):
    """The finished tile, float32 [BLOCK_M, BLOCK_N]."""
    if BLOCK_M == 1:
        return tl.sum(acc, 0)[None, :]
    else:
        return acc
