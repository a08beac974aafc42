"""FP8 (e4m3) with a scale a block of rows, its rounding in a kernel, and the rotation that prepares for it.

Source    FlashAttention-3 (arXiv:2407.08608, Sec. 3.3): block quantization and incoherent processing; e4m3 is the
          format with largest value 448, without infinities
Deviates  none

In a kernel, values are rounded and codes widened by integer arithmetic, bit for bit as torch does: this also runs in
the interpreter, whose own conversion is wrong, and on GPUs without FP8 instructions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from requant.kernels._triton import FLOATS, Backend, cdiv, check, check_shape, check_tensor, jit, tl
from requant.kernels.hadamard import hadamard

FP8_MAX = 448.0
"""Largest e4m3 value."""
BLOCKS = (32, 64, 128)
"""Rows that may share a scale."""


@dataclass(frozen=True)
class BlockFp8:
    """codes * scale of the row's block.

    Attributes:
        codes: float8_e4m3fn [batch, heads, seqlen, head_dim].
        scale: float32 [batch, heads, ceil(seqlen / block)].
        block: rows that share a scale: 32, 64 or 128.
    """

    codes: Tensor
    scale: Tensor
    block: int

    def __post_init__(self) -> None:
        check(self.block in BLOCKS, f"block must be 32, 64 or 128, not {self.block!r}")
        check_tensor("codes", self.codes, (torch.float8_e4m3fn,), 4)
        check_tensor("scale", self.scale, (torch.float32,), 3)
        check_shape("scale", self.scale, (*self.codes.shape[:2], cdiv(self.codes.shape[2], self.block)))

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the codes stand for, [batch, heads, seqlen, head_dim]."""
        scale = self.scale.to(dtype).repeat_interleave(self.block, 2)[:, :, : self.codes.shape[2], None]
        return self.codes.to(dtype) * scale

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.numel() + 4 * self.scale.numel()


def quantize_fp8(x: Tensor, block: int = 128, *, per_tensor: bool = False) -> BlockFp8:
    """Round to e4m3, to nearest even, with scale amax / 448 of each block of rows, or of the whole tensor.

    Args:
        x: [batch, heads, seqlen, head_dim] float16, bfloat16 or float32.
    """
    x = check_tensor("x", x, FLOATS, 4)
    check(block in BLOCKS, f"block must be 32, 64 or 128, not {block!r}")
    seqlen = x.shape[2]
    rows = torch.nn.functional.pad(x.float(), (0, 0, 0, -seqlen % block)).unflatten(2, (-1, block))
    peak = rows.abs().amax((-1, -2))  # [batch, heads, blocks]
    peak = peak.amax().expand_as(peak) if per_tensor else peak
    scale = (peak / FP8_MAX).masked_fill(peak == 0, 1.0).contiguous()
    codes = (rows / scale[..., None, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return BlockFp8(codes.flatten(2, 3)[:, :, :seqlen].contiguous(), scale, block)


def incoherent(q: Tensor, k: Tensor, signs: Tensor, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Rotate queries and keys alike, which leaves q k^T as it is and spreads outliers over the channels.

    Args:
        q, k: [..., head_dim]; signs: [head_dim] of +-1, drawn once for both.
    Returns: q diag(signs) H and k diag(signs) H, H an orthonormal Hadamard matrix; same dtypes.
    """
    check_shape("signs", signs, (q.shape[-1],))
    return tuple(hadamard(x * signs.to(x.dtype), backend=backend) for x in (q, k))


@jit
def round_e4m3(x):
    """float32 rounded to e4m3, to nearest even, saturating at +-448; still float32. For finite x."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
    small = (size.to(tl.float32, bitcast=True) + 16384.0) - 16384.0  # multiples of 2^-9, below 2^-6
    rounded = tl.where(size < 0x3C800000, small, normal)
    rounded = tl.minimum(rounded, 448.0).to(tl.uint32, bitcast=True)
    return (rounded | (bits & 0x80000000)).to(tl.float32, bitcast=True)


@jit
def widen_e4m3(codes):
    """The bytes (uint8) of e4m3 values as float16, exactly: exponent and mantissa moved, times 2^8 for the bias."""
    wide = codes.to(tl.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
