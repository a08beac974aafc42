"""Four-bit floating-point formats and the tensors a weight in one of them is stored as.

Source    NF4, block scales and double quantization: QLoRA (arXiv:2305.14314, Sec. 3); E1M2, E2M1 and E3M0 with a real
          exponent bias a row and an integer one a column: LLM-FP4 (arXiv:2310.16836, Sec. 3 and 4); fp4_bnb is the
          table bitsandbytes calls FP4, in its order of codes
Deviates  the code book of NF4 is the linspace construction that gives the published 16 values; the paper's formula
          does not. Codes are packed little end first along the input dimension, not as bitsandbytes' bytes

  weight[n, k] = book[code[n, k]] * absmax[(n * d_in + k) // block_size] * 2^exponent[k]

Blocks run over the flattened weight, so that one may span two rows. With double quantization
  absmax[b] = outer_book[absmax_code[b]] * outer[b // 256] + mean
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from requant.kernels._stored import Stored
from requant.kernels._triton import FLOATS, cdiv, check, check_shape, check_tensor
from requant.kernels.pack import n_words, pack, unpack_ref

OUTER_BLOCK = 256
"""Block scales that share a second-level scale (QLoRA, Sec. 3, "Double Quantization")."""
_ROWS = 2**20  # weights encoded at a time: 16 distances each


def _nf4() -> Tensor:
    """Quantiles of the normal distribution: 7 negative, zero, 8 positive, the largest scaled to 1."""
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    upper, lower = (
        torch.special.ndtri(torch.linspace(offset, 0.5, n, dtype=torch.float64))[:-1] for n in (9, 8)
    )
    book = torch.cat([-lower, torch.zeros(1, dtype=torch.float64), upper]).sort().values
    return book / book.max()


def float_values(exponent_bits: int, mantissa_bits: int) -> Tensor:
    """Non-negative values of a float format, by code, divided by the largest: float64 [2^(e+m)].

    Subnormals exist and no code is spent on infinities or NaN (LLM-FP4).
    """
    code = torch.arange(2 ** (exponent_bits + mantissa_bits), dtype=torch.float64)
    exponent, mantissa = code // 2**mantissa_bits, code % 2**mantissa_bits / 2**mantissa_bits
    values = torch.where(exponent == 0, mantissa * 2, (1 + mantissa) * 2**exponent)
    return values / values.max()


def _signed(magnitudes: Tensor) -> Tensor:
    return torch.cat([magnitudes, -magnitudes])  # the high bit of a code is the sign


_FORMATS = {
    "nf4": _nf4,
    "fp4_e1m2": lambda: _signed(float_values(1, 2)),
    "fp4_e2m1": lambda: _signed(float_values(2, 1)),
    "fp4_e3m0": lambda: _signed(float_values(3, 0)),
    "fp4_bnb": lambda: _signed(torch.tensor([0, 1 / 16, 8, 12, 4, 6, 2, 3], dtype=torch.float64) / 12),
}
FORMATS = tuple(_FORMATS)
"""Names of the formats."""


def _dynamic() -> Tensor:
    """bitsandbytes' signed 8-bit map: 2^i steps in the i-th of seven decades, and 0 and 1."""
    parts = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float64)
        steps = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        parts += [steps, -steps]
    return torch.cat(parts).sort().values


def _e4m3() -> Tensor:
    """Values of float8 E4M3 by their byte, divided by 448; the two NaN bytes, never written, read as 0."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return values.nan_to_num(nan=0.0) / 448


_OUTER_FORMATS = {"dynamic": _dynamic, "e4m3": _e4m3}


@functools.lru_cache(maxsize=64)
def book(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of a format by code, the largest 1: [16], or [256] for those of second-level codes."""
    known = {**_FORMATS, **_OUTER_FORMATS}
    check(name in known, f"format {name!r} is unknown; choose one of {', '.join(known)}")
    return known[name]().float().to(device, dtype)


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """Code of the value nearest to each entry of x (any shape), the lower value in a tie: uint8, same shape."""
    ordered, codes = values.sort(stable=True)
    edges = (ordered[1:] + ordered[:-1]) / 2
    return codes.to(torch.uint8)[torch.searchsorted(edges, x.contiguous())]


def bias_to_absmax(bias: Tensor, exponent_bits: int, mantissa_bits: int) -> Tensor:
    """Largest value of a float format with a real exponent bias: (2 - 2^-m) * 2^(2^e - 1 - bias) (LLM-FP4)."""
    return (2 - 2.0**-mantissa_bits) * torch.exp2(2**exponent_bits - 1 - bias)


@dataclass(frozen=True)
class Float4Weight(Stored):
    """A weight [d_out, d_in] in a four-bit format.

    Attributes:
        words: int32 [d_out, n_words(d_in, 4)], packed codes.
        absmax: [n_blocks] float32, float16 or bfloat16 scales, or uint8 codes if doubly quantized.
        outer: float32 [n_blocks / 256, rounded up], scale of 256 codes; mean: float32 [1], of all scales. Both or
            neither.
        exponents: int8 [d_in], power of two that a column is multiplied by, or None.
        block_size: weights a block, counted over the flattened weight; None = one block a row.
        format: one of FORMATS. outer_format: "dynamic" (bitsandbytes) or "e4m3" (8-bit float, as the text says).
    """

    words: Tensor
    absmax: Tensor
    outer: Tensor | None
    mean: Tensor | None
    exponents: Tensor | None
    d_in: int
    block_size: int | None = 64
    format: str = "nf4"
    outer_format: str = "dynamic"

    def __post_init__(self) -> None:
        check(self.d_in > 0, f"d_in must be positive, not {self.d_in}")
        check(self.block_size is None or self.block_size > 0, "block_size must be positive, or None")
        for name, choices in (("format", _FORMATS), ("outer_format", _OUTER_FORMATS)):
            value = getattr(self, name)
            check(value in choices, f"{name} {value!r} is unknown; choose one of {', '.join(choices)}")
        check_tensor("words", self.words, (torch.int32,), 2)
        check_shape("words", self.words, (self.d_out, n_words(self.d_in, 4)))
        check((self.outer is None) == (self.mean is None), "outer and mean come together, or neither does")
        check_tensor("absmax", self.absmax, FLOATS if self.outer is None else (torch.uint8,), 1)
        check_shape("absmax", self.absmax, (self.n_blocks,))
        if self.outer is not None:
            check_tensor("outer", self.outer, (torch.float32,), 1)
            check_tensor("mean", self.mean, (torch.float32,), 1)
            check_shape("outer", self.outer, (cdiv(self.n_blocks, OUTER_BLOCK),))
            check_shape("mean", self.mean, (1,))
        if self.exponents is not None:
            check_tensor("exponents", self.exponents, (torch.int8,), 1)
            check_shape("exponents", self.exponents, (self.d_in,))

    @property
    def d_out(self) -> int:
        return self.words.shape[0]

    @property
    def block(self) -> int:
        """Weights a block."""
        return self.d_in if self.block_size is None else self.block_size

    @property
    def n_blocks(self) -> int:
        return cdiv(self.d_out * self.d_in, self.block)


def pack_float4(
    W: Tensor,
    format: str = "nf4",
    block_size: int | None = 64,
    *,
    double_quant: bool = False,
    outer_format: str = "dynamic",
    absmax: Tensor | None = None,
    exponents: Tensor | None = None,
) -> Float4Weight:
    """Round a weight to the nearest value of a four-bit format.

    Args:
        W: [d_out, d_in] floating point; left unchanged.
        block_size: weights a block of the flattened weight; None = one block a row.
        double_quant: store the blocks' scales in 8 bits.
        absmax: [n_blocks] positive, the values a block's largest code stands for (LLM-FP4: `bias_to_absmax` of the
            bias found by search); None = the largest magnitude of each block. Kept in its dtype unless double_quant.
        exponents: int8 [d_in], see `Float4Weight`.
    Raises: ValueError naming the argument.
    """
    W = check_tensor("W", W, (*FLOATS, torch.float64), 2).float()
    d_out, d_in = W.shape
    block = d_in if block_size is None else block_size
    check(block > 0, f"block_size must be positive, not {block_size}")
    if exponents is not None:
        check_shape("exponents", exponents, (d_in,))
        W = W * torch.exp2(-exponents.float())
    flat = torch.nn.functional.pad(W.flatten(), (0, -W.numel() % block)).reshape(-1, block)
    scale = flat.abs().amax(1) if absmax is None else check_tensor("absmax", absmax, FLOATS, 1)
    check_shape("absmax", scale, (len(flat),))
    outer = mean = None
    if double_quant:
        scale, outer, mean = _quantize_scales(scale.float(), outer_format)
    used = scales_ref(scale, outer, mean, outer_format)  # codes are chosen with the scales that are stored
    steps = max(1, _ROWS // block)
    divisor = torch.where(used > 0, used, math.inf)[:, None]
    values = book(format, W.device)
    codes = torch.cat(
        [nearest(part / by, values) for part, by in zip(flat.split(steps), divisor.split(steps), strict=True)]
    )
    codes = codes.flatten()[: d_out * d_in].reshape(d_out, d_in)
    return Float4Weight(pack(codes, 4), scale, outer, mean, exponents, d_in, block_size, format, outer_format)


def _quantize_scales(scale: Tensor, outer_format: str) -> tuple[Tensor, Tensor, Tensor]:
    """8-bit codes of the scales less their mean, their second-level scales, and the mean."""
    mean = scale.mean().reshape(1)
    rest = torch.nn.functional.pad(scale - mean, (0, -len(scale) % OUTER_BLOCK)).reshape(-1, OUTER_BLOCK)
    outer = rest.abs().amax(1)
    codes = nearest(rest / outer.clamp(min=1e-30)[:, None], book(outer_format, scale.device))
    return codes.flatten()[: len(scale)].contiguous(), outer, mean


def scales_ref(
    absmax: Tensor,
    outer: Tensor | None,
    mean: Tensor | None,
    outer_format: str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The scale of each block, [n_blocks] in dtype, whether doubly quantized or not."""
    if outer is None:
        return absmax.to(dtype)
    inner = book(outer_format, absmax.device, dtype)[absmax.long()]
    return inner * outer.to(dtype).repeat_interleave(OUTER_BLOCK)[: len(absmax)] + mean.to(dtype)


def dequantize_ref(weight: Float4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight in dtype (float32 or float64): [d_out, d_in]."""
    values = book(weight.format, weight.words.device, dtype)
    codes = unpack_ref(weight.words, 4, weight.d_in)
    scale = scales_ref(weight.absmax, weight.outer, weight.mean, weight.outer_format, dtype)
    flat = torch.nn.functional.pad(values[codes.long()].flatten(), (0, -codes.numel() % weight.block))
    scaled = flat.reshape(-1, weight.block) * scale[:, None]
    W = scaled.flatten()[: codes.numel()].reshape(codes.shape)
    return W if weight.exponents is None else W * torch.exp2(weight.exponents.to(dtype))
