"""DuQuant's dual transformation (arXiv:2406.01721v3, Sec. 3.2): greedy block rotations and zigzag permutations.

`cfg` is the method's Config: block_size, max_rotation_step, permutation_times and construction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from requant.reference_impls._hadamard import random_orthogonal
from requant.reference_impls._quant import QuantizationError


def base_rotation(size: int, cfg, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix [size, size]; as in the paper its first row is flat, |r_1j| = 1/sqrt(size).

    The rest is a random completion: diag(1, Q) U with U flat in its first row and Q random orthogonal. The released
    code has U diag(1, Q), of which only the first entry keeps that size.
    """
    v = torch.full((size,), -(size**-0.5), dtype=torch.float64)
    v[0] += 1.0
    U = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(v, v) / (v @ v)  # e_1 <-> the flat vector
    Q = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), random_orthogonal(size - 1, generator))
    return (Q @ U if cfg.construction == "paper" else U @ Q).float()


def search_rotation(X: Tensor, cfg, generator: torch.Generator) -> tuple[Tensor, list[float]]:
    """The product of greedy rotations that leaves the smallest peak.

    Each step moves the channel with the largest magnitude to the first place, where the base matrix spreads it over
    all channels; of all products of the first k steps the one with the smallest range max - min is kept.

    Args:
        X: [n, block_size] float32, all blocks of all tokens; left unchanged.
    Returns: R [block_size, block_size], and the range after 0, 1, ..., max_rotation_step steps.
    """
    size = X.shape[1]
    base = base_rotation(size, cfg, generator)
    R = best = torch.eye(size)
    peaks: list[float] = []
    for step in range(cfg.max_rotation_step + 1):
        high, low = X.amax(0), X.amin(0)  # [block_size]
        peaks.append(float(high.max() - low.min()))
        if peaks[-1] < min(peaks[:-1], default=torch.inf):
            best = R
        if step == cfg.max_rotation_step:
            break
        if cfg.construction == "paper":
            channel = int(torch.maximum(high, -low).argmax())
        else:  # a row of X, which counts tokens and blocks, taken for a channel
            channel = int(X.abs().argmax()) // size % size
        swap = torch.arange(size)
        swap[0], swap[channel] = channel, 0
        turn = base[swap][:, swap]
        X, R = X @ turn, R @ turn
    return best, peaks


def zigzag(X: Tensor, block_size: int) -> Tensor:
    """The order of channels that deals them to blocks by falling max|x_j|: 1..K, K..1, 1..K, ... (Sec. 3.2).

    Args:
        X: [n_tokens, d_in].
    Returns: int64 [d_in]; the channels of one block follow each other, the largest first.
    """
    ranked = X.abs().amax(0).argsort(descending=True, stable=True).view(block_size, -1)  # [round, block]
    ranked[1::2] = ranked[1::2].flip(1)
    return ranked.T.flatten()


@dataclass(frozen=True)
class Transform:
    """x -> x R1 P R2 ...: rotations [n, B, B], the same for all blocks of x, and n - 1 permutations [n - 1, d_in]."""

    rotations: Tensor
    permutations: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., d_in], activations or the rows of a weight; a new tensor of the same shape and dtype."""
        shape, size = x.shape, self.rotations.shape[-1]
        for index, R in enumerate(self.rotations):
            if index:
                x = x.reshape(-1, shape[-1]).index_select(1, self.permutations[index - 1].to(x.device))
            x = x.reshape(-1, size) @ R.to(x)
        return x.view(shape)


def search_transform(X: Tensor, cfg, generator: torch.Generator) -> Transform:
    """Rotation, permutation, rotation for X [n_tokens, d_in], each found on what the one before leaves.

    Raises: QuantizationError if block_size does not divide d_in.
    """
    d_in, size = X.shape[1], cfg.block_size
    if d_in % size:
        raise QuantizationError(
            f"block_size {size} does not divide d_in {d_in}; choose a divisor of both widths"
        )
    found, orders = [], []
    for time in range(cfg.permutation_times + 1):
        if time:
            orders.append(zigzag(X, size))
            X = X[:, orders[-1]]
        R, _ = search_rotation(X.reshape(-1, size), cfg, generator)
        found.append(R)
        X = (X.reshape(-1, size) @ R).view(-1, d_in)
    return Transform(torch.stack(found), torch.stack(orders) if orders else torch.empty(0, d_in))
