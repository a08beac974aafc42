"""Matrix product with a weight in a four-bit float format, dequantized as it is read: Y = X W^T.

Source    QLoRA (arXiv:2305.14314, Eq. 5 and 6) for NF4 with block scales and double quantization; LLM-FP4
          (arXiv:2310.16836) for the plain float formats; `_float4` describes formats and storage
Deviates  in half precision the dequantized weight is rounded to the dtype of x before the product, as QLoRA does

The codes of a tile are unpacked and looked up, and scales are read once for each run of columns that certainly
shares one, not once a weight. One row of x needs no dot, few rows split the columns over programs: `_split`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from requant.kernels._float4 import (
    OUTER_BLOCK,
    Float4Weight,
    book,
    dequantize_ref,
    pack_float4,
)
from requant.kernels._split import (
    TILES,
    block_rows,
    run_parts,
    split_count,
    tile_add,
    tile_sum,
    tile_zeros,
)
from requant.kernels._triton import (
    FLOATS,
    Backend,
    assert_dot_block,
    autotune,
    cdiv,
    check,
    check_tensor,
    jit,
    tl,
    use_triton,
)
from requant.kernels.int_matmul import unpack_chunks

__all__ = ["Float4Weight", "nf4_matmul", "nf4_matmul_ref", "pack_float4"]


@jit
def spread(values, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr):
    """Repeat each column of values [BLOCK_N, BLOCK_K / SPAN] SPAN times: [BLOCK_N, BLOCK_K]."""
    wide = tl.broadcast_to(values[:, :, None], (BLOCK_N, BLOCK_K // SPAN, SPAN))
    return tl.reshape(wide, (BLOCK_N, BLOCK_K))


@autotune(TILES, key=["N", "K", "BLOCK", "DOUBLE", "RUN", "BLOCK_M"])
@jit
def _nf4_matmul_kernel(
    x_ptr, words_ptr, book_ptr, absmax_ptr, outer_ptr, mean_ptr, outer_book_ptr, exponents_ptr, out_ptr,
    M, N, K, row_words, part_k,
    BLOCK: tl.constexpr, OUTER: tl.constexpr, DOUBLE: tl.constexpr, EXPONENTS: tl.constexpr,
    RUN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Outputs [BLOCK_M, BLOCK_N] from part_k columns, a multiple of BLOCK_K; RUN as `scale_run` gives it."""
    SPAN: tl.constexpr = RUN if RUN < BLOCK_K else BLOCK_K
    offs_m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_m = offs_m < M
    mask_n = offs_n < N
    part = tl.program_id(2)
    acc = tile_zeros(BLOCK_M, BLOCK_N, BLOCK_K)
    if DOUBLE:
        mean = tl.load(mean_ptr)
    for begin in range(part * part_k, tl.minimum((part + 1) * part_k, K), BLOCK_K):
        offs_k = begin + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(
            x_ptr + offs_m[:, None] * K + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0
        )
        offs_w = begin // 8 + tl.arange(0, BLOCK_K // 8)
        mask_w = mask_n[:, None] & (offs_w < row_words)[None, :]
        words = tl.load(words_ptr + offs_n[:, None] * row_words + offs_w[None, :], mask=mask_w, other=0)
        codes = unpack_chunks(words, 4)
        offs_s = begin + tl.arange(0, BLOCK_K // SPAN) * SPAN
        mask_s = mask_n[:, None] & (offs_s < K)[None, :]
        block = (offs_n[:, None] * K + offs_s[None, :]) // BLOCK
        if DOUBLE:
            inner = tl.load(absmax_ptr + block, mask=mask_s, other=0).to(tl.int32)
            scale = tl.load(outer_book_ptr + inner, mask=mask_s, other=0.0)
            scale = scale * tl.load(outer_ptr + block // OUTER, mask=mask_s, other=0.0) + mean
        else:
            scale = tl.load(absmax_ptr + block, mask=mask_s, other=0.0).to(tl.float32)
        w = tl.load(book_ptr + codes, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        w = w * spread(scale, BLOCK_N, BLOCK_K, SPAN)
        if EXPONENTS:
            power = tl.load(exponents_ptr + offs_k, mask=mask_k, other=0).to(tl.float32)
            w = w * tl.exp2(power)[None, :]
        acc = tile_add(acc, x, tl.trans(w), BLOCK_M)
    y = tile_sum(acc, BLOCK_M)
    offs = (part.to(tl.int64) * M + offs_m)[:, None] * N + offs_n[None, :]
    tl.store(out_ptr + offs, y.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def scale_run(weight: Float4Weight) -> int:
    """Columns that share a scale wherever a multiple of this number begins: a power of two, or 2^30 for whole rows.

    Blocks begin at multiples of the block size in the flattened weight, rows at multiples of d_in.
    """
    common = math.gcd(weight.block, weight.d_in)
    return 2**30 if weight.block == weight.d_in else common & -common


def column_parts(rows: int, d_out: int, d_in: int, device: torch.device) -> tuple[int, int]:
    """(parts, columns a part, a multiple of any BLOCK_K) to split the columns in."""
    parts = split_count(rows, d_out, cdiv(d_in, 128), device)
    return parts, cdiv(cdiv(d_in, 128), parts) * 128


def nf4_matmul_ref(x: Tensor, weight: Float4Weight) -> Tensor:
    """The truth: x times the dequantized weight, in float64 if x is float64, else in float32; dtype of x."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x.to(dtype) @ dequantize_ref(weight, dtype).T).to(x.dtype)


def _launch(x: Tensor, weight: Float4Weight) -> Tensor:
    """The kernel on x [M, d_in]: [M, d_out] in the dtype of x."""
    (M, K), N, block_m = x.shape, weight.d_out, block_rows(len(x))
    if block_m > 1:
        assert_dot_block(BLOCK_M=block_m)
    n_parts, part_k = column_parts(M, N, K, x.device)
    t = {name: tensor.contiguous() for name, tensor in weight.tensors.items()}
    double, unused = (
        weight.outer is not None,
        t["absmax"],
    )  # pointers that are not read need a tensor all the same

    def launch(_: int, results: Tensor) -> None:
        _nf4_matmul_kernel[lambda meta: (cdiv(N, meta["BLOCK_N"]), cdiv(M, block_m), n_parts)](
            x, t["words"], book(weight.format, x.device), t["absmax"], t.get("outer", unused),
            t.get("mean", unused), book(weight.outer_format, x.device) if double else unused,
            t.get("exponents", unused), results, M, N, K, t["words"].shape[1], part_k,
            BLOCK=weight.block, OUTER=OUTER_BLOCK, DOUBLE=double, EXPONENTS="exponents" in t,
            RUN=scale_run(weight), BLOCK_M=block_m,
        )  # fmt: skip

    return run_parts(M, N, [n_parts], x, launch)


def nf4_matmul(x: Tensor, weight: Float4Weight, *, backend: Backend = "auto") -> Tensor:
    """X W^T with W in a four-bit float format.

    Args:
        x: [..., d_in] float16, bfloat16 or float32 (float64: reference only).
        weight: see `pack_float4`.
        backend: "triton", "reference", or "auto": the kernel on CUDA, the reference elsewhere.
    Returns: [..., d_out] in the dtype of x, accumulated in float32 (float64 for float64).
    Raises: ValueError naming the argument; RuntimeError if "triton" cannot run.
    """
    x = check_tensor("x", x, (*FLOATS, torch.float64))
    check(
        x.ndim >= 1 and x.shape[-1] == weight.d_in, f"x {tuple(x.shape)} does not end in d_in {weight.d_in}"
    )
    wide = "x is float64" if x.dtype == torch.float64 else None
    if not use_triton(backend, x, *weight.tensors.values(), unsupported=wide):
        return nf4_matmul_ref(x, weight)
    return _launch(x.reshape(-1, weight.d_in), weight).reshape(*x.shape[:-1], weight.d_out)
