"""Weight-only integer matmul: floating-point activations times a packed 1-, 2-, 3-, 4- or 8-bit weight.

Source    the W{2,3,4,8}A16 formats of GPTQ (arXiv:2210.17323), AWQ (2306.00978), OmniQuant (2308.13137) and whoever
          else stores codes with scales per output channel or per group of inputs
Deviates  none in the format; the kernels are this project's own, and readable before fast

y[m, n] = sum_k x[m, k] * (code[n, k] - zero_point[n, g(k)]) * scale[n, g(k)], accumulated in float32.

Codes become floats without an integer conversion, which GPUs do slowly: a code's bits, put into the mantissa of 2^23,
are 2^23 + code. Where scales are constant over a block of K, dots run over code - zero_point, which float16 and
bfloat16 hold exactly, and the scale multiplies the float32 partial sum: weights are then not rounded at all.

Two kernels. Up to GEMV_ROWS rows, one program reads whole words along K and multiplies on the plain cores
(`_gemv_kernel`). Beyond, tiles of codes are unpacked and go through dots (`_tile_kernel`). Both split K over
programs where the outputs alone are too few to fill the device (up to SPLIT_ROWS rows); the parts are added in a
fixed order by a second launch, so that results do not change from run to run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from requant.kernels._triton import (
    Backend,
    apply_weight,
    assert_dot_block,
    autotune,
    cdiv,
    config,
    jit,
    next_power_of_2,
    split_parts,
    sum_parts,
    tl,
)
from requant.kernels.pack import PackedWeight, code_at, dequantize_ref

GEMV_ROWS = 2
"""Rows of x up to which the dot-free kernel is used."""
SPLIT_ROWS = 16
"""Rows of x up to which K is split over programs."""
PER_CHANNEL, PER_BLOCK, PER_ELEMENT = 0, 1, 2
"""How scales lie in a tile: one an output channel, one a block of K, or anywhere (odd group sizes)."""


def int_matmul_ref(x: Tensor, weight: PackedWeight) -> Tensor:
    """The truth of `int_matmul`: dequantize, then multiply, in float32 (in float64 if x is)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype) @ dequantize_ref(weight, dtype).T).to(x.dtype)


@jit
def codes_minus(codes, zero):
    """Integers 0..2^23-1 (int32) less zero, float32, exactly: their bits are the mantissa of 2^23 + code."""
    return (codes | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)


@jit
def load_chunks(row_ptr, chunk, mask, BITS: tl.constexpr):
    """Words of packed rows, or for 3 bits runs of 8 codes (24 bits, high byte undefined): int32, shape of mask."""
    if BITS == 3:
        word = chunk * 3 // 4
        shift = (chunk * 24 % 32).to(tl.uint32)
        low = tl.load(row_ptr + word, mask=mask, other=0).to(tl.uint32, bitcast=True)
        high = tl.load(row_ptr + word + 1, mask=mask & (shift > 8), other=0).to(tl.uint32, bitcast=True)
        return ((low >> shift) | (high << ((32 - shift) & 31))).to(tl.int32, bitcast=True)
    else:
        return tl.load(row_ptr + chunk, mask=mask, other=0)


@jit
def unpack_chunks(chunks, BITS: tl.constexpr):
    """Codes of chunks [N, KC], in order along K: int32 [N, KC * codes a chunk]."""
    if BITS == 3:
        chunks = tl.interleave(chunks, chunks >> 12)
        chunks = tl.interleave(chunks, chunks >> 6)
        chunks = tl.interleave(chunks, chunks >> 3)
    else:
        if BITS <= 8:
            chunks = tl.interleave(chunks, chunks >> 16)
            chunks = tl.interleave(chunks, chunks >> 8)
        if BITS <= 4:
            chunks = tl.interleave(chunks, chunks >> 4)
        if BITS <= 2:
            chunks = tl.interleave(chunks, chunks >> 2)
        if BITS == 1:
            chunks = tl.interleave(chunks, chunks >> 1)
    return chunks & (2**BITS - 1)


GEMV_CONFIGS = [
    config(BLOCK_N=n, BLOCK_CHUNKS=c, num_warps=w)
    for n, c, w in (
        (16, 32, 4),
        (4, 128, 2),
        (8, 128, 4),
        (16, 128, 4),
        (16, 128, 8),
        (32, 64, 4),
        (8, 256, 4),
    )
]


@autotune(GEMV_CONFIGS, key=["d_out", "d_in", "BITS", "GROUP", "SPLIT_K"])
@jit
def _gemv_kernel(
    x_ptr, words_ptr, scale_ptr, zero_ptr, out_ptr, n_rows, d_out, d_in, row_words, n_groups, zero_words,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    """Outputs [BLOCK_N] of one row of x, from one of SPLIT_K parts of K; GROUP 0 = one scale a row.

    Each program holds words [BLOCK_N, BLOCK_CHUNKS] and goes through their codes by position j: the codes at j of
    all words meet x[:, j], so nothing has to be rearranged.
    """
    CODES: tl.constexpr = 8 if BITS == 3 else 32 // BITS  # codes a chunk
    HALF: tl.constexpr = CODES // 2
    n_chunks = row_words * 4 // 3 if BITS == 3 else row_words
    part = tl.cdiv(tl.cdiv(n_chunks, BLOCK_CHUNKS), SPLIT_K) * BLOCK_CHUNKS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < d_out
    rows = n.to(tl.int64)[:, None]
    m = tl.program_id(2).to(tl.int64)
    acc = tl.zeros([BLOCK_N, BLOCK_CHUNKS], dtype=tl.float32)
    first = tl.program_id(1) * part
    for start in range(first, tl.minimum(first + part, n_chunks), BLOCK_CHUNKS):
        chunk = start + tl.arange(0, BLOCK_CHUNKS)
        mask = mask_n[:, None] & (chunk < n_chunks)[None, :]
        low = load_chunks(
            words_ptr + rows * row_words, chunk[None, :] + tl.zeros_like(n)[:, None], mask, BITS
        )
        high = (low.to(tl.uint32, bitcast=True) >> (HALF * BITS)).to(tl.int32, bitcast=True)
        total = tl.zeros([BLOCK_CHUNKS], dtype=tl.float32)
        dots = tl.zeros([BLOCK_N, BLOCK_CHUNKS], dtype=tl.float32)
        for j in tl.static_range(CODES):
            k = chunk * CODES + j
            x = tl.load(x_ptr + m * d_in + k, mask=k < d_in, other=0.0).to(tl.float32)
            total += x
            bits = (low if j < HALF else high) & ((2**BITS - 1) << (j % HALF * BITS))
            middle = 2.0 ** (BITS - 1 + j % HALF * BITS)
            dots += codes_minus(bits, middle) * (x * 2.0 ** (-(j % HALF) * BITS))[None, :]
        group = tl.zeros_like(low)
        if GROUP > 0:
            group += (chunk * CODES // GROUP)[None, :]
        mask = mask_n[:, None] & (chunk * CODES < d_in)[None, :]  # padding is in no group
        if HAS_ZERO:
            zero = code_at(zero_ptr + rows * zero_words, group, mask, BITS).to(tl.float32)
            dots -= total[None, :] * (zero - 2.0 ** (BITS - 1))
        if GROUP > 0:
            dots *= tl.load(scale_ptr + rows * n_groups + group, mask=mask, other=0.0).to(tl.float32)
        acc += dots
    y = tl.sum(acc, 1)
    if GROUP == 0:
        y = y * tl.load(scale_ptr + n, mask=mask_n, other=0.0).to(tl.float32)
    out = out_ptr + (tl.program_id(1).to(tl.int64) * n_rows + m) * d_out + n
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask_n)


TILE_CONFIGS = [
    config(BLOCK_N=n, num_warps=w, num_stages=s)
    for n, w, s in ((32, 4, 2), (64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 3), (128, 8, 4), (256, 8, 3))
]


@autotune(TILE_CONFIGS, key=["d_out", "d_in", "BITS", "GROUP", "SPLIT_K", "BLOCK_M", "BLOCK_K"])
@jit
def _tile_kernel(
    x_ptr, words_ptr, scale_ptr, zero_ptr, out_ptr, n_rows, d_out, d_in, row_words, n_groups, zero_words,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, SPLIT_K: tl.constexpr, MODE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Outputs [BLOCK_M, BLOCK_N] from one of SPLIT_K parts of K; MODE says how scales lie (PER_CHANNEL, ...)."""
    CODES: tl.constexpr = 8 if BITS == 3 else 32 // BITS
    n_chunks = row_words * 4 // 3 if BITS == 3 else row_words
    part = tl.cdiv(tl.cdiv(d_in, BLOCK_K), SPLIT_K) * BLOCK_K
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = m < n_rows
    mask_n = n < d_out
    rows = n.to(tl.int64)
    x_row = x_ptr + m.to(tl.int64)[:, None] * d_in
    words_row = words_ptr + rows[:, None] * row_words
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    zero = tl.full([BLOCK_N, 1], 2.0 ** (BITS - 1), dtype=tl.float32)
    if MODE == 0 and HAS_ZERO:
        zero = code_at(zero_ptr + rows * zero_words, tl.zeros_like(n), mask_n, BITS).to(tl.float32)[:, None]
    first = tl.program_id(2) * part
    for start in range(first, tl.minimum(first + part, d_in), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_row + k[None, :], mask=mask_m[:, None] & (k < d_in)[None, :], other=0.0)
        chunk = start // CODES + tl.arange(0, BLOCK_K // CODES)
        mask_w = mask_n[:, None] & (chunk < n_chunks)[None, :]  # padding of a row meets x = 0
        chunk = chunk[None, :] + tl.zeros_like(n)[:, None]
        codes = unpack_chunks(load_chunks(words_row, chunk, mask_w, BITS), BITS)
        if MODE == 0:
            w = codes_minus(codes, zero).to(x.dtype)
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
        elif MODE == 1:
            group = start // GROUP
            if HAS_ZERO:
                zero = code_at(zero_ptr + rows * zero_words, group + tl.zeros_like(n), mask_n, BITS)
                zero = zero.to(tl.float32)[:, None]
            scale = tl.load(scale_ptr + rows * n_groups + group, mask=mask_n, other=0.0).to(tl.float32)
            w = codes_minus(codes, zero).to(x.dtype)
            acc += tl.dot(x, tl.trans(w), input_precision="ieee") * scale[None, :]
        else:
            mask = mask_n[:, None] & (k < d_in)[None, :]
            group = (k // GROUP)[None, :] + tl.zeros_like(n)[:, None]
            if HAS_ZERO:
                w = codes_minus(codes, code_at(zero_ptr + rows[:, None] * zero_words, group, mask, BITS))
            else:
                w = codes_minus(codes, zero)
            scale = tl.load(scale_ptr + rows[:, None] * n_groups + group, mask=mask, other=0.0).to(tl.float32)
            w = (w * scale).to(x.dtype)
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    if MODE == 0:
        acc = acc * tl.load(scale_ptr + rows, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    out = (tl.program_id(2).to(tl.int64) * n_rows + m.to(tl.int64))[:, None] * d_out + n[None, :]
    tl.store(out_ptr + out, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def _tile_shape(rows: int, weight: PackedWeight) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_K and MODE of `_tile_kernel`.

    BLOCK_K is the largest power of two up to a limit that divides the group, so that scales are constant in a
    block; a group that allows no 16 columns, or no whole chunk, has its scales read element by element.
    """
    codes = 8 if weight.bits == 3 else 32 // weight.bits
    limit = 128 if rows <= SPLIT_ROWS else 64
    block_m = min(max(16, next_power_of_2(rows)), 128)
    if weight.n_groups == 1:
        return block_m, limit, PER_CHANNEL
    block_k = min(limit, weight.columns & -weight.columns)
    if block_k >= max(16, codes):
        return block_m, block_k, PER_BLOCK
    return block_m, limit, PER_ELEMENT


def _launch(x: Tensor, weight: PackedWeight) -> Tensor:
    """y [rows, d_out] of x [rows, d_in] through one of the kernels."""
    rows, d_in, d_out = x.shape[0], weight.d_in, weight.d_out
    codes = 8 if weight.bits == 3 else 32 // weight.bits
    gemv = rows <= GEMV_ROWS and (weight.n_groups == 1 or weight.columns % codes == 0)
    block_m, block_k, mode = _tile_shape(rows, weight)
    if gemv:
        split = split_parts(cdiv(d_in, 128 * codes), cdiv(d_out, 4) * rows, x.device)  # BLOCK_N may be 4
    elif rows <= SPLIT_ROWS:
        split = split_parts(cdiv(d_in, block_k), cdiv(d_out, 64), x.device)
    else:
        split = 1
    dtype = x.dtype if split == 1 else torch.float32
    out = torch.empty(split, rows, d_out, dtype=dtype, device=x.device)
    has_zero = weight.zero_point is not None
    zeros = weight.zero_point if has_zero else weight.words  # a pointer is passed, but not read
    args = (x, weight.words, weight.scale, zeros, out, rows, d_out, d_in, weight.words.shape[1])
    args += (weight.n_groups, zeros.shape[1] if has_zero else 0)
    common = {
        "BITS": weight.bits,
        "GROUP": 0 if weight.n_groups == 1 else weight.columns,
        "HAS_ZERO": has_zero,
        "SPLIT_K": split,
    }
    if gemv:
        _gemv_kernel[lambda meta: (cdiv(d_out, meta["BLOCK_N"]), split, rows)](*args, **common)
    else:
        assert_dot_block(BLOCK_M=block_m, BLOCK_K=block_k)
        grid = lambda meta: (cdiv(d_out, meta["BLOCK_N"]), cdiv(rows, block_m), split)  # noqa: E731
        _tile_kernel[grid](*args, **common, MODE=mode, BLOCK_M=block_m, BLOCK_K=block_k)
    return out[0] if split == 1 else sum_parts(out, x.dtype)


def int_matmul(x: Tensor, weight: PackedWeight, *, backend: Backend = "auto") -> Tensor:
    """x times the transposed weight.

    Args:
        x: [..., d_in] float16, bfloat16 or float32.
        weight: codes of 1, 2, 3, 4 or 8 bits [d_out, d_in], on x's device.
    Returns: [..., d_out] in x's dtype, accumulated in float32.
    Raises: ValueError for a wrong shape, dtype or device, or an empty x; RuntimeError if backend="triton" cannot run.
    """
    return apply_weight(x, weight, backend, int_matmul_ref, _launch)
