"""The integers behind weights that were already dequantized.

A method returns weights, and the walk that made them keeps neither codes nor scales. A grid with float16 steps can be
read off the weights exactly, whatever the method did to find it (clipping, error feedback, folded scales): a weight
is k * s, k an integer of at most 9 bits and s a float16, so the product has at most 20 significant bits and
float32 holds it without rounding. Every float16 is a multiple of 2^-24; counted in these units, s divides the
greatest common divisor of a group, and the step found that way spans no more codes than the method's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_UNIT = 2.0**24  # float16 numbers are multiples of 1 / _UNIT


@dataclass(frozen=True)
class Grid:
    """Weights as integers: k [d_out, n_groups, size] int64 and scale [d_out, n_groups, 1] float32; W = k * scale."""

    k: Tensor
    scale: Tensor

    def zero_point(self) -> Tensor:
        """The code of zero if codes start at 0: [d_out, n_groups, 1] int64."""
        return -self.k.amin(-1, keepdim=True).clamp(max=0)


def read_grid(groups: Tensor, bits: int, symmetric: bool) -> Grid | None:
    """The affine grid that weights lie on, one step a last-dimension slice; None if there is none.

    Args:
        groups: [d_out, n_groups, size] float32, dequantized.
        bits: code width, at most 8.
        symmetric: k in -2^(bits-1) .. 2^(bits-1)-1; otherwise any 2^bits consecutive integers that hold 0.
    """
    units = groups.double() * _UNIT
    if not torch.equal(units, units.round()) or float(units.abs().max()) >= 2.0**52:
        return None
    units = units.long()
    whole = _gcd(units)  # [d_out, n_groups, 1]
    whole = whole.masked_fill(whole == 0, int(_UNIT))  # a group of zeros: any step will do
    step, open_ = whole.clone(), torch.ones_like(whole, dtype=torch.bool)
    for divisor in range(1, 2**bits):  # the divisor itself need not be a float16, a part of it is
        part = whole[open_] // divisor
        found = (part * divisor == whole[open_]) & _is_float16(part)
        step[open_] = torch.where(found, part, step[open_])
        open_[open_.clone()] = ~found
        if not open_.any():
            break
    else:
        return None
    k = units // step
    low, high = k.amin(-1).clamp(max=0), k.amax(-1).clamp(min=0)
    if symmetric:
        fits = bool((low >= -(2 ** (bits - 1))).all() and (high < 2 ** (bits - 1)).all())
    else:
        fits = bool((high - low < 2**bits).all())
    return Grid(k, (step / _UNIT).float()) if fits else None


def _gcd(x: Tensor) -> Tensor:
    """Greatest common divisor along the last dimension, kept; 0 where all are 0."""
    while x.shape[-1] > 1:
        half = (x.shape[-1] + 1) // 2
        x = torch.cat(
            [torch.gcd(x[..., : x.shape[-1] - half], x[..., half:]), x[..., x.shape[-1] - half : half]], -1
        )
    return x.abs()


def _is_float16(step: Tensor) -> Tensor:
    value = step / _UNIT
    return value.half().double() == value
