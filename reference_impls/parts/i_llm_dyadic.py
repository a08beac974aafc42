"""Dyadic numbers: integer tensors with a scale m / 2^k, and arithmetic on them without a float.

value = (codes - zero_point) * m / 2^k. Every function but `from_float` and `constant`, which make such numbers, takes
and returns int32 or int64 tensors and uses sums, products, shifts and integer divisions only. Divisions and right
shifts round to the nearest integer, halves up: both add half the divisor and round down, whatever the sign.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_WIDEST = 30  # bits that a tensor may have before it is requantized


def ilog2(x: Tensor) -> Tensor:
    """floor(log2 x) of integers x >= 1, by halving the search for the highest bit."""
    result = torch.zeros_like(x)
    for step in (32, 16, 8, 4, 2, 1):
        if step < torch.iinfo(x.dtype).bits:
            big = (x >> step) > 0
            result, x = result + step * big, torch.where(big, x >> step, x)
    return result


def shift(x: Tensor, n: Tensor) -> Tensor:
    """x / 2^n, rounded; a left shift where n is negative."""
    down = n.clamp(0, 62)
    y = x + ((1 << down) >> 1)
    y >>= down
    y <<= (-n).clamp(min=0)
    return y.to(x.dtype)


def divide(a: Tensor, b: Tensor | int) -> Tensor:
    """a / b for b > 0, rounded; 2 a + b must fit the type."""
    doubled = torch.add(b, a, alpha=2) if isinstance(b, Tensor) else 2 * a + b
    return doubled.div_(2 * b, rounding_mode="floor")


def isqrt(x: Tensor) -> Tensor:
    """floor(sqrt x) of int64 0 <= x < 2^62, bit by bit from the top."""
    root = torch.zeros_like(x)
    for bit in range(30, -1, -1):
        trial = root + (1 << bit)
        root = torch.where(trial * trial <= x, trial, root)
    return root


def normalize(x: Tensor, k: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """x / 2^k, x >= 1, as m / 2^k' with 2^(bits-1) <= m < 2^bits."""
    n = ilog2(x) - (bits - 1)
    m = shift(x, n)
    full = (m >> bits) > 0  # rounded up to 2^bits
    return torch.where(full, m >> 1, m), k - n - full.to(k.dtype)


@dataclass(frozen=True)
class Dyadic:
    """Codes [..., n] with zero_point, m and k [..., 1], all integers; value = (codes - zero_point) * m / 2^k."""

    codes: Tensor
    zero_point: Tensor
    m: Tensor
    k: Tensor

    @property
    def centered(self) -> Tensor:
        """codes - zero_point, in units of m / 2^k."""
        return self.codes - self.zero_point

    def to_float(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, for what is not computed on integers."""
        return (self.centered.double() * torch.ldexp(self.m.double(), -self.k.double())).to(dtype)


def constant(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Nearest m / 2^k to each entry of a float tensor, |m| < 2^bits: int64 m and k. Made once, offline."""
    mantissa, exponent = torch.frexp(x.double())
    m = (mantissa * 2**bits).round().to(torch.int64)
    full = m.abs() == 2**bits
    return torch.where(full, m >> 1, m), torch.where(x == 0, 0, bits - exponent.long() - full.long())


def from_float(x: Tensor, bits: int) -> Dyadic:
    """Round each last-dimension slice of a float tensor to codes on a min-max grid: where integers begin."""
    fine = constant(x.abs().amax(-1, keepdim=True).clamp(min=2.0**-40))[1] + _WIDEST - 9
    integers = torch.ldexp(x.double(), fine.double()).round().to(torch.int64)
    return requantize(integers, torch.ones_like(fine), fine, bits, about_zero=True)


def requantize(x: Tensor, m: Tensor, k: Tensor, bits: int, *, about_zero: bool = False) -> Dyadic:
    """Give each last-dimension slice of x * m / 2^k the codes 0..2^bits-1 over its range, and a dyadic scale.

    Args:
        x: int64 [..., n]; m, k: int64, broadcast against [..., 1]; m positive, at most 16 bits.
        about_zero: round x / scale and add the rounded zero point, instead of rounding x's distance from the minimum:
            the latter shifts all values of a slice alike, by what the zero point was rounded.
    """
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    n = (ilog2((high - low).clamp(min=1)) - _WIDEST + 1).clamp(min=0)
    x, low, high, k = shift(x, n), shift(low, n), shift(high, n), k - n
    span, top = (high - low).clamp(min=1), 2**bits - 1
    limit = 2 ** max(bits, 14)  # keeps products small where a slice lies far from 0
    zero_point = divide(-low * top, span).clamp(-limit, limit)
    start, first = (0, zero_point) if about_zero else (low, 0)
    codes = (divide((x - start) * top, span) + first).clamp(0, top)
    m, k = normalize(divide((span * m) << 16, top), k + 16)
    return Dyadic(codes, zero_point, m, k)


def align(x: Tensor, m: Tensor, k: Tensor, dim: int, *, coarse: bool = False) -> tuple[Tensor, Tensor]:
    """x * m / 2^k with scales that differ along `dim`, as integers y / 2^k' with one k' along it: y, k' (dim kept).

    k' is the largest k, which makes this exact, unless the scales lie more than 2^20 apart; with `coarse` it is the
    smallest, which keeps y as small as x * m.
    """
    common = k.masked_fill(m == 0, 2**20).amin(dim, keepdim=True)
    if not coarse:
        common = torch.minimum(k.masked_fill(m == 0, -(2**20)).amax(dim, keepdim=True), common + 20)
    return shift(x * m, k - common), common


def add(a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of two (integers [..., n], m, k) as integers with one scale: the sum, 1 and k."""
    (x, m_x, k_x), (y, m_y, k_y) = narrow(*a), narrow(*b)
    k = torch.minimum(k_x, k_y) + 20
    total = shift(x * m_x, k_x - k) + shift(y * m_y, k_y - k)
    return total, torch.ones_like(k), k


def narrow(x: Tensor, m: Tensor, k: Tensor, bits: int = 25) -> tuple[Tensor, Tensor, Tensor]:
    """The same numbers with integers of at most so many bits in each last-dimension slice: x, m, k."""
    n = (ilog2(x.abs().amax(-1, keepdim=True).clamp(min=1)) - bits + 1).clamp(min=0)
    return shift(x, n), m, k - n
