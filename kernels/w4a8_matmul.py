"""W4A8 with integer group scales: int8 activations times packed 4-bit weights, all sums in int32.

Source    Integer Scale (arXiv:2405.14597)
Deviates  the amplifier 1024 of the paper is a default, since it makes zero of scales below 0.5/1024: `integer_scale`
          refuses those, or finds the amplifier itself by the paper's rule

y[m, n] = sum_g S[n, g] sum_{k in g} x[m, k] (code[n, k] - 8) * x_scale[m] / amplifier, with integers S = round(scale *
amplifier): one conversion to float an output, instead of one a group. The sum is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from requant.kernels._stored import Stored
from requant.kernels._triton import (
    FLOATS,
    Backend,
    autotune,
    cdiv,
    check,
    check_shape,
    jit,
    sum_parts,
    tl,
    use_triton,
)
from requant.kernels.int8_matmul import (
    TILE_CONFIGS,
    check_codes,
    integer_product,
    row_scales,
    tile_rows,
)
from requant.kernels.int_matmul import load_chunks, unpack_chunks
from requant.kernels.pack import n_words, pack, unpack_ref


@autotune(TILE_CONFIGS, key=["d_out", "d_in", "GROUP", "SPLIT_K", "BLOCK_M", "BLOCK_K"])
@jit
def _w4a8_kernel(
    x_ptr, words_ptr, group_scale_ptr, x_scale_ptr, out_ptr, n_rows, d_out, d_in, row_words, n_groups,
    GROUP: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As `_int8_kernel`, from packed 4-bit codes; BLOCK_K divides GROUP, x_scale holds the amplifier."""
    part = tl.cdiv(tl.cdiv(d_in, BLOCK_K), SPLIT_K) * BLOCK_K
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = m < n_rows
    mask_n = n < d_out
    rows = n.to(tl.int64)
    x_row = x_ptr + m.to(tl.int64)[:, None] * d_in
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    first = tl.program_id(2) * part
    for start in range(first, tl.minimum(first + part, d_in), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_row + k[None, :], mask=mask_m[:, None] & (k < d_in)[None, :], other=0)
        word = start // 8 + tl.arange(0, BLOCK_K // 8)
        mask_w = mask_n[:, None] & (word < row_words)[None, :]  # padding of a row meets x = 0
        word = word[None, :] + tl.zeros_like(n)[:, None]
        codes = unpack_chunks(load_chunks(words_ptr + rows[:, None] * row_words, word, mask_w, 4), 4) - 8
        group_scale = tl.load(group_scale_ptr + rows * n_groups + start // GROUP, mask=mask_n, other=0)
        inner = tl.dot(x, tl.trans(codes.to(tl.int8)), out_dtype=tl.int32)
        acc += inner * group_scale.to(tl.int32)[None, :]
    out = (tl.program_id(2).to(tl.int64) * n_rows + m.to(tl.int64))[:, None] * d_out + n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if SPLIT_K == 1:
        y = acc.to(tl.float32) * tl.load(x_scale_ptr + m, mask=mask_m, other=0.0)[:, None]
        tl.store(out_ptr + out, y.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out_ptr + out, acc, mask=mask)


@dataclass(frozen=True)
class IntegerScaleWeight(Stored):
    """A symmetric 4-bit weight with integer group scales: (code - 8) * scale / amplifier.

    Attributes:
        words: int32 [d_out, n_words(d_in, 4)], packed codes.
        scale: int16 or int32 [d_out, n_groups], at least 1.
        amplifier: the power of two that scales were multiplied by.
        d_in: codes a row. group_size: columns a scale.
    """

    words: Tensor
    scale: Tensor
    amplifier: int
    d_in: int
    group_size: int

    @property
    def d_out(self) -> int:
        return self.words.shape[0]


def integer_scale(scale: Tensor, amplifier: int | None = 1024) -> tuple[Tensor, int]:
    """Integer group scales round(scale * amplifier) (Integer Scale, arXiv:2405.14597).

    Args:
        scale: positive floats.
        amplifier: a power of two; None doubles from 1 until the smallest scale times it is at least 1.
    Returns: int16 scales (int32 where one is above 32767) and the amplifier.
    Raises: ValueError if the amplifier is no power of two, or so small that a scale becomes 0, or if a scale is
        not positive.
    """
    smallest = float(scale.min())
    check(0 < smallest < math.inf, f"scales must be positive and finite, but the smallest is {smallest}")
    if amplifier is None:
        amplifier = 2 ** max(0, math.ceil(-math.log2(smallest)))
    check(amplifier > 0 and amplifier & (amplifier - 1) == 0, f"amplifier {amplifier} is no power of two")
    integers = (scale.double() * amplifier).round()
    check(
        bool(integers.min() >= 1),
        f"amplifier {amplifier} rounds the scale {smallest:.3g} to 0; use a larger one, or None to have it found",
    )
    check(bool(integers.max() < 2**31), f"amplifier {amplifier} takes scales out of int32; use a smaller one")
    return integers.to(torch.int16 if integers.max() < 2**15 else torch.int32), amplifier


def pack_integer_scale(
    codes: Tensor, scale: Tensor, group_size: int, amplifier: int | None = 1024
) -> IntegerScaleWeight:
    """Store a 4-bit symmetric weight, from any base quantizer, with integer group scales.

    Args:
        codes: [d_out, d_in] integers in 0..15 (zero point 8). scale: [d_out, d_in / group_size], positive floats.
    Raises: ValueError also if the sums of a row could leave int32 (|x| <= 128, |code - 8| <= 8 taken everywhere).
    """
    d_out, d_in = codes.shape
    check(group_size > 0 and d_in % group_size == 0, f"group_size {group_size} does not divide d_in {d_in}")
    check_shape("scale", scale, (d_out, d_in // group_size))
    integers, amplifier = integer_scale(scale, amplifier)
    bound = int(integers.long().sum(1).max()) * 128 * 8 * group_size
    check(bound < 2**31, f"sums up to {bound} could leave int32; use a smaller amplifier than {amplifier}")
    return IntegerScaleWeight(pack(codes, 4), integers.contiguous(), amplifier, d_in, group_size)


def w4a8_matmul_ref(x: Tensor, weight: IntegerScaleWeight, x_scale: Tensor) -> Tensor:
    """The truth of `w4a8_matmul`: integers in float64, where they are exact; float64 [..., d_out]."""
    codes = unpack_ref(weight.words, 4, weight.d_in).double() - 8
    w = codes * weight.scale.double().repeat_interleave(weight.group_size, 1)
    return x.double() @ w.T * (row_scales(x, x_scale).double() / weight.amplifier)


def _w4a8_integer(x: Tensor, weight: IntegerScaleWeight) -> Tensor:
    """The int32 sums [rows, d_out] through torch's integer product, one group after the other."""
    codes = unpack_ref(weight.words, 4, weight.d_in).to(torch.int8) - 8
    acc = torch.zeros(x.shape[0], weight.d_out, dtype=torch.int32, device=x.device)
    for g, start in enumerate(range(0, weight.d_in, weight.group_size)):
        part = slice(start, start + weight.group_size)
        inner = integer_product(x[:, part].contiguous(), codes[:, part].contiguous())
        acc += inner * weight.scale[:, g].int()
    return acc


def w4a8_matmul(
    x: Tensor,
    weight: IntegerScaleWeight,
    x_scale: Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
) -> Tensor:
    """x times the transposed 4-bit weight with integer group scales.

    Args:
        x: int8 [..., d_in]. x_scale: [..., 1], one a token, or one value.
        weight: from `pack_integer_scale`, on x's device. The kernel takes groups of a multiple of 32 columns.
    Returns: [..., d_out] in out_dtype; the sum over d_in is exact.
    Raises: ValueError for a wrong shape, dtype or device or an empty x; RuntimeError if backend="triton" cannot run.
    """
    check(out_dtype in FLOATS, f"out_dtype must be float16, bfloat16 or float32, not {out_dtype}")
    check_shape("words", weight.words, (weight.d_out, n_words(weight.d_in, 4)))
    flat, row_scale = check_codes(x, x_scale, weight.d_in)
    row_scale = row_scale / weight.amplifier  # exact: a power of two
    rows, d_out, d_in = flat.shape[0], weight.d_out, weight.d_in
    block_k = min(128, weight.group_size & -weight.group_size)
    odd = None if block_k >= 32 else f"group_size {weight.group_size} is no multiple of 32"
    shape = (*x.shape[:-1], d_out)
    if not use_triton(backend, x, x_scale, weight.words, weight.scale, unsupported=odd):
        acc = _w4a8_integer(flat, weight)
        return acc.float().mul_(row_scale[:, None]).to(out_dtype).reshape(shape)
    block_m, split = tile_rows(rows, d_in, d_out, block_k, x.device)
    dtype = out_dtype if split == 1 else torch.int32
    out = torch.empty(split, rows, d_out, dtype=dtype, device=x.device)
    _w4a8_kernel[lambda meta: (cdiv(d_out, meta["BLOCK_N"]), cdiv(rows, block_m), split)](
        flat, weight.words, weight.scale, row_scale, out, rows, d_out, d_in, weight.words.shape[1],
        weight.scale.shape[1],
        GROUP=weight.group_size, SPLIT_K=split, BLOCK_M=block_m, BLOCK_K=block_k,
    )  # fmt: skip
    y = out[0] if split == 1 else sum_parts(out, out_dtype, row_scale)
    return y.reshape(shape)
