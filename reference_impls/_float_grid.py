"""Floating-point grids of few bits with a real exponent bias (LLM-FP4, arXiv:2310.16836v1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from requant.reference_impls._quant import QuantizationError


@dataclass(frozen=True)
class Format:
    """EeMm: a sign, e exponent bits, m mantissa bits; subnormals exist, no code is spent on infinity or NaN."""

    e: int
    m: int

    def bias(self, peak: Tensor) -> Tensor:
        """The real exponent bias B whose largest value is peak: 2^e - log2 c + log2(2 - 2^-m) - 1 (code)."""
        top = torch.tensor(2 - 2.0**-self.m)
        return 2**self.e - peak.clamp(min=1e-8).log2() + top.log2() - 1

    def peak(self, B: Tensor) -> Tensor:
        """The largest value, c = (2 - 2^-m) 2^(2^e - 1 - B); the text and the code, where Eq. 15 prints 2^(e-1)."""
        return (2 - 2.0**-self.m) * 2.0 ** (2**self.e - 1 - B)

    def step(self, x: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Exponent p = max(1, floor(log2|x| + B)) and step 2^(p - m - B) (code)."""
        p = (x.abs().log2() + B).floor().clamp(min=1)
        return p, 2.0 ** (p - self.m - B)

    def round(self, x: Tensor, B: Tensor) -> Tensor:
        """FP(x; e, m, B): clip to +-c, then to the nearest multiple of the step; B broadcasts against x."""
        c = self.peak(B)
        x = torch.minimum(torch.maximum(x, -c), c)
        _, step = self.step(x, B)
        return (x / step).round() * step

    def encode(self, x: Tensor, B: Tensor) -> Tensor:
        """Codes 0 .. 2^(1+e+m) - 1 of values that `round` gave: sign, exponent, mantissa; int64."""
        p, step = self.step(x, B)
        magnitude = (p - 1) * 2**self.m + (x.abs() / step).round()
        return magnitude.long() + (x < 0).long() * 2 ** (self.e + self.m)

    def decode(self, codes: Tensor, B: Tensor) -> Tensor:
        """Inverse of `encode`: float32."""
        size = 2 ** (self.e + self.m)
        sign, magnitude = 1 - 2 * (codes // size), codes % size
        exponent, mantissa = magnitude >> self.m, magnitude % 2**self.m
        mantissa = mantissa + (exponent > 0) * 2**self.m
        return sign * mantissa * 2.0 ** (exponent.clamp(min=1) - self.m - B)


def first_format(bits: int, mantissa_bits: Sequence[int] | None) -> Format:
    """E2M1 at 4 bits, E4M3 at 8, or the only one that is to be tried (code)."""
    e = min(bits - 1, 2 if bits < 8 else 4)
    if mantissa_bits is not None and len(mantissa_bits) == 1:
        e = bits - 1 - mantissa_bits[0]
    return Format(e, bits - 1 - e)


def formats(bits: int, mantissa_bits: Sequence[int] | None) -> list[Format]:
    """Those of so many bits with these mantissa bits; None (code): all but E0 below 8 bits, from there on at least M2.

    Raises: QuantizationError where none is left.
    """
    tried = mantissa_bits or range(0 if bits < 8 else 2, bits - 1)
    found = [Format(bits - 1 - m, m) for m in tried if m < bits - 1]
    if not found:
        raise QuantizationError(f"mantissa_bits {tuple(tried)} leave no exponent bit at {bits} bits")
    return found


@dataclass(frozen=True)
class Biases:
    """A format with the biases of one tensor: [d_out, 1] of a weight; rho + k [d_in] of an activation."""

    format: Format
    B: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return self.format.round(x, self.B)


def stored(B: Tensor) -> Tensor:
    """Round a bias to float16, as it is stored."""
    return B.half().float()
