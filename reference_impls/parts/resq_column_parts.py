"""Tensors whose last columns have a width of their own.

A weight has codes and one symmetric scale a row for each part; activations are rounded a token and part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from requant.reference_impls import _quant
from requant.reference_impls._straight_through import straight_through

_PREFIXES = ("", "high_")  # of the names the tensors of a part are stored under


@dataclass(frozen=True)
class Part:
    """Codes [d_out, n] and scale [d_out, 1] of some columns; symmetric around the code 2^(bits - 1)."""

    codes: Tensor
    scale: Tensor
    bits: int

    def dequantize(self) -> Tensor:
        """The columns, float32 [d_out, n]."""
        return _quant.dequantize(self.codes, self.scale, 2.0 ** (self.bits - 1))


def pack_parts(parts: Sequence[Part]) -> dict[str, Tensor]:
    """The tensors stored for one part or two: codes and a float16 scale a row for each."""
    d_in = sum(part.codes.shape[1] for part in parts)
    packed = {"shape": torch.tensor((len(parts[0].codes), d_in), dtype=torch.int32)}
    for prefix, part in zip(_PREFIXES, parts, strict=False):
        packed[f"{prefix}codes"] = _quant.pack_bits(part.codes, part.bits)
        packed[f"{prefix}scale"] = part.scale.half()
    return packed


def unpack_parts(packed: dict[str, Tensor], widths: Sequence[tuple[int, int]]) -> Tensor:
    """Inverse of `pack_parts`, dequantized: float32 [d_out, d_in]; widths: (columns, bits) of each part."""
    columns = []
    for prefix, (n, bits) in zip(_PREFIXES, widths, strict=False):
        codes = _quant.unpack_bits(packed[f"{prefix}codes"], bits, (int(packed["shape"][0]), n)).float()
        columns.append(Part(codes, packed[f"{prefix}scale"].float(), bits).dequantize())
    return torch.cat(columns, 1)


def round_tokens(x: Tensor, bits: int) -> Tensor:
    """Asymmetric rounding of each last-dimension slice of x, with the gradient of the identity."""
    return straight_through(x, partial(_quant.clipped_fake_quant, bits=bits))


def round_parts(x: Tensor, widths: Sequence[tuple[int, int]]) -> Tensor:
    """`round_tokens` of x [..., d] with `widths`, the (columns, bits) of each part."""
    parts = x.split([n for n, _ in widths], -1)
    return torch.cat([round_tokens(part, bits) for part, (_, bits) in zip(parts, widths, strict=True)], -1)
