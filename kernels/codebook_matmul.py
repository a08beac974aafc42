"""Matmul with a weight of vector codes: every vector of the weight is a sum of rows of codebooks.

Source    AQLM (arXiv:2401.06118): groups of 8 inputs, 1 codebook of 2^16, 2 of 2^8, ..., a scale an output
          channel; VPTQ (2409.17066): vectors of outputs of one input column, a residual codebook, codebooks for each
          group of columns, outlier columns with codebooks of their own, columns in permuted order
Deviates  VPTQ's optional normalisation of input columns is left to the caller: scale x before the product

A tile of the weight is decoded code by code, padded to a power of two along the vectors, and goes through a dot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from requant.kernels._split import TILES, block_rows, run_parts, split_count, tile_add, tile_sum, tile_zeros
from requant.kernels._triton import (
    Backend,
    apply_weight,
    assert_dot_block,
    autotune,
    cdiv,
    jit,
    next_power_of_2,
    tl,
)
from requant.kernels.bitstream import never_straddles, window_at
from requant.kernels.codebook import CodebookWeight, ColumnParts, decode_ref


def codebook_matmul_ref(x: Tensor, weight: CodebookWeight | ColumnParts) -> Tensor:
    """The truth of `codebook_matmul`: decode, then multiply, in float32 (in float64 if x is)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype) @ decode_ref(weight, dtype).T).to(x.dtype)


@autotune(TILES, key=["d_out", "d_in", "places", "BLOCK_M", "WIDTH_0"])
@jit
def _codebook_matmul_kernel(
    x_ptr, order_ptr, words_ptr, books_ptr, scale_ptr, out_ptr, M, d_out, d_in, stride_xm, n_rows, row_words,
    places, set_places, entries, split_places,
    WIDTH_0: tl.constexpr, WIDTH: tl.constexpr, N_BOOKS: tl.constexpr, ALIGNED: tl.constexpr, VECTOR: tl.constexpr,
    LANES: tl.constexpr, ALONG_INPUT: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Outputs [BLOCK_M, BLOCK_N] from split_places places; vectors are padded to LANES, a power of two."""
    ROWS: tl.constexpr = BLOCK_N if ALONG_INPUT else BLOCK_N // LANES
    PLACES: tl.constexpr = BLOCK_K // LANES if ALONG_INPUT else BLOCK_K
    lane = tl.arange(0, LANES)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ptr = words_ptr + rows.to(tl.int64)[:, None] * row_words
    tile_n = tl.arange(0, BLOCK_N)
    if ALONG_INPUT:
        n = tl.program_id(0) * ROWS + tile_n
        mask_n = n < d_out
    else:
        n = (tl.program_id(0) * ROWS + tile_n // LANES) * VECTOR + tile_n % LANES
        mask_n = (n < d_out) & (tile_n % LANES < VECTOR)
    tile_k = tl.arange(0, BLOCK_K)
    x_row = x_ptr + m.to(tl.int64)[:, None] * stride_xm
    acc = tile_zeros(BLOCK_M, BLOCK_N, BLOCK_K)
    first = tl.program_id(2) * split_places
    end = tl.minimum(first + split_places, places)
    for start in range(first, end, PLACES):
        place = start + tl.arange(0, PLACES)
        mask = (rows < n_rows)[:, None] & (place < end)[None, :]
        base = (place // set_places * entries)[None, :] + tl.zeros_like(rows)[:, None]
        bit = (place * (WIDTH_0 + (N_BOOKS - 1) * WIDTH))[None, :] + tl.zeros_like(rows)[:, None]
        w = tl.zeros([ROWS, PLACES, LANES], dtype=tl.float32)
        for book in tl.static_range(N_BOOKS):
            if book == 0:
                entry = base + window_at(row_ptr, bit, mask, WIDTH_0, ALIGNED)
            else:
                code = window_at(row_ptr, bit + (WIDTH_0 + (book - 1) * WIDTH), mask, WIDTH, ALIGNED)
                entry = base + code + (2**WIDTH_0 + (book - 1) * 2**WIDTH)
            mask_w = mask[:, :, None] & (lane < VECTOR)[None, None, :]
            w += tl.load(
                books_ptr + (entry[:, :, None] * VECTOR + lane[None, None, :]), mask=mask_w, other=0.0
            ).to(tl.float32)
        if ALONG_INPUT:
            w = tl.trans(tl.reshape(w, [BLOCK_N, BLOCK_K]))
            place_k = start + tile_k // LANES
            k = place_k * VECTOR + tile_k % LANES
            mask_k = (place_k < end) & (tile_k % LANES < VECTOR) & (k < d_in)
        else:
            w = tl.reshape(tl.permute(w, (1, 0, 2)), [BLOCK_K, BLOCK_N])
            k = start + tile_k
            mask_k = k < end
        if HAS_ORDER:
            k = tl.load(order_ptr + k, mask=mask_k, other=0).to(tl.int32)
        x = tl.load(x_row + k[None, :], mask=(m < M)[:, None] & mask_k[None, :], other=0.0)
        acc = tile_add(acc, x, w, BLOCK_M)
    y = tile_sum(acc, BLOCK_M)
    if HAS_SCALE:
        y = y * tl.load(scale_ptr + n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    out = (tl.program_id(2).to(tl.int64) * M + m.to(tl.int64))[:, None] * d_out + n[None, :]
    tl.store(out_ptr + out, y.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & mask_n[None, :])


def _launch_part(
    x: Tensor, order: Tensor | None, weight: CodebookWeight, split: int, results: Tensor
) -> None:
    """Write the products of x's columns (in the order given) with one part: results [split, rows, d_out]."""
    rows, lanes = x.shape[0], max(2, next_power_of_2(weight.vector))
    block_m, along_input = block_rows(rows), weight.along == "input"
    if block_m > 1:
        assert_dot_block(BLOCK_M=block_m)

    def grid(meta: dict) -> tuple[int, int, int]:
        programs = cdiv(weight.n_rows, meta["BLOCK_N"] if along_input else meta["BLOCK_N"] // lanes)
        return programs, cdiv(rows, block_m), split

    _codebook_matmul_kernel[grid](
        x,
        weight.words if order is None else order,  # a pointer is passed, but not read
        weight.words,
        weight.codebooks,
        weight.codebooks if weight.scale is None else weight.scale,
        results,
        rows,
        weight.d_out,
        weight.d_in,
        x.stride(0),
        weight.n_rows,
        weight.words.shape[1],
        weight.places,
        weight.set_places,
        weight.codebooks.shape[1],
        cdiv(weight.places, split),
        WIDTH_0=weight.widths[0],
        WIDTH=weight.widths[-1],
        N_BOOKS=len(weight.widths),
        ALIGNED=never_straddles(weight.widths),
        VECTOR=weight.vector,
        LANES=lanes,
        ALONG_INPUT=along_input,
        HAS_ORDER=order is not None,
        HAS_SCALE=weight.scale is not None,
        BLOCK_M=block_m,
    )


def _launch(x: Tensor, weight: CodebookWeight | ColumnParts) -> Tensor:
    """y [rows, d_out] of x [rows, d_in]."""
    parts = weight.parts if isinstance(weight, ColumnParts) else (weight,)
    order = weight.order if isinstance(weight, ColumnParts) else None
    rows, first = x.shape[0], [sum(part.d_in for part in parts[:i]) for i in range(len(parts))]
    splits = [split_count(rows, p.d_out, cdiv(p.d_in, 128), x.device) for p in parts]

    def launch(i: int, results: Tensor) -> None:
        columns = None if order is None else order[first[i] :]
        _launch_part(x[:, first[i] :] if order is None else x, columns, parts[i], splits[i], results)

    return run_parts(rows, weight.d_out, splits, x, launch)


def codebook_matmul(x: Tensor, weight: CodebookWeight | ColumnParts, *, backend: Backend = "auto") -> Tensor:
    """x times the transposed weight, decoded on the fly.

    Args:
        x: [..., d_in] float16, bfloat16 or float32.
        weight: vector codes [d_out, d_in], on x's device.
    Returns: [..., d_out] in x's dtype, accumulated in float32.
    Raises: ValueError for a wrong shape, dtype or device, or an empty x; RuntimeError if backend="triton" cannot run.
    """
    return apply_weight(x, weight, backend, codebook_matmul_ref, _launch)
