"""Matrix product with a weight of one or two signs, or of ternary values, unpacked as it is read: Y = X W^T.

Source    BitNet (arXiv:2310.11453, Eq. 11: int8 activations too), its ternary successor (2402.17764), BiLLM
          (2402.04291, Eq. 7 and 13), ARB-LLM (2410.03129, Sec. 3); `_binary` describes the layouts
Deviates  in half precision a weight with several levels or groups is rounded to the dtype of x before the product; a
          weight with one scale a row is not: its values are exact in every dtype and the scale multiplies the sum

One row of x needs no dot (but for int8), few rows split the columns over programs: `_split`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from requant.kernels._binary import (
    BinaryWeight,
    TernaryWeight,
    dequantize_ref,
    pack_binary,
    pack_ternary,
    values_ref,
    wide,
)
from requant.kernels._split import TILES, block_rows, run_parts, tile_add, tile_sum, tile_zeros
from requant.kernels._triton import (
    FLOATS,
    Backend,
    assert_dot_block,
    autotune,
    cdiv,
    check,
    check_shape,
    check_tensor,
    jit,
    sum_parts,
    tl,
    use_triton,
)
from requant.kernels.int_matmul import unpack_chunks
from requant.kernels.nf4_matmul import column_parts, spread
from requant.kernels.pack import code_at

__all__ = [
    "BinaryWeight",
    "TernaryWeight",
    "binary_matmul",
    "binary_matmul_ref",
    "pack_binary",
    "pack_ternary",
]

_SIGNS, _TWO_BIT, _TRITS = 1, 2, 5  # what the kernel's KIND says the words hold


@jit
def load_plane(words_ptr, rows, mask_n, begin, row_words, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes int32 [rows, BLOCK_K] of packed rows from column begin, a multiple of BLOCK_K, on."""
    offs = begin * BITS // 32 + tl.arange(0, BLOCK_K * BITS // 32)
    mask = mask_n[:, None] & (offs < row_words)[None, :]
    words = tl.load(words_ptr + rows[:, None] * row_words + offs[None, :], mask=mask, other=0)
    return unpack_chunks(words, BITS)


@jit
def load_trits(bytes_ptr, rows, mask, offs_k, row_bytes):
    """Codes 0..2 int32 [rows, BLOCK_K] of rows with five trits a byte.

    Quotients are products with a reciprocal in 16 bits, exact for bytes up to 242.
    """
    digit = offs_k % 5
    low = tl.where(digit == 0, 65536, tl.where(digit == 1, 21846, 7282))
    reciprocal = tl.where(digit < 3, low, tl.where(digit == 3, 2428, 810))
    packed = tl.load(bytes_ptr + rows[:, None] * row_bytes + (offs_k // 5)[None, :], mask=mask, other=0)
    quotient = (packed.to(tl.int32) * reciprocal[None, :]) >> 16
    return quotient - 3 * ((quotient * 171) >> 9)


@autotune(TILES, key=["N", "K", "KIND", "LEVELS", "PLAIN", "INTEGER", "BLOCK_M"])
@jit
def _binary_matmul_kernel(
    x_ptr, words_ptr, flags_ptr, salient_ptr, residual_ptr, ranks_ptr, scale_ptr, mean_ptr, column_ptr,
    out_ptr, M, N, K, row_words, residual_words, scale_rows, row_run, n_groups, part_k,
    KIND: tl.constexpr, LEVELS: tl.constexpr, PLAIN: tl.constexpr, GROUP: tl.constexpr, MEAN: tl.constexpr,
    COLUMN: tl.constexpr, INTEGER: tl.constexpr, RUN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Outputs [BLOCK_M, BLOCK_N] from part_k columns, a multiple of BLOCK_K; INTEGER: sums in int32, not scaled.

    row_run rows share a scale, and RUN columns from any multiple of RUN on; PLAIN: one scale a row and nothing else.
    """
    SPAN: tl.constexpr = RUN if RUN < BLOCK_K else BLOCK_K
    offs_m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_m = offs_m < M
    mask_n = offs_n < N
    part = tl.program_id(2)
    scale_row = offs_n // row_run
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32) if INTEGER else tile_zeros(BLOCK_M, BLOCK_N, BLOCK_K)
    for begin in range(part * part_k, tl.minimum((part + 1) * part_k, K), BLOCK_K):
        offs_k = begin + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        mask_w = mask_n[:, None] & mask_k[None, :]
        x = tl.load(
            x_ptr + offs_m[:, None] * K + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0
        )
        if KIND == 5:
            value = load_trits(words_ptr, offs_n, mask_w, offs_k, row_words) - 1
        else:
            value = load_plane(words_ptr, offs_n, mask_n, begin, row_words, KIND, BLOCK_K)
            value = value * (3 - KIND) - 1  # 0 and 1 are -1 and 1; 0, 1 and 2 are -1, 0 and 1
        if PLAIN:
            w = value.to(tl.int8 if INTEGER else tl.float32)
        else:
            first = value.to(tl.float32)
            second = first
            if LEVELS > 1:
                flag = load_plane(flags_ptr, offs_n, mask_n, begin, row_words, 1, BLOCK_K)
            if LEVELS > 2:
                one = tl.arange(0, 1).to(tl.int64)
                chosen = load_plane(salient_ptr, one, one == 0, begin, row_words, 1, BLOCK_K) + flag * 0
            if LEVELS == 4:
                second = (2 * flag - 1).to(tl.float32)
            if LEVELS == 6:
                rank = tl.load(ranks_ptr + offs_k, mask=mask_k, other=0)[None, :] + flag * 0
                mask_r = mask_w & (chosen == 1)
                bit = code_at(residual_ptr + offs_n[:, None] * residual_words, rank, mask_r, 1)
                second = (2 * bit - 1).to(tl.float32)
            offs_s = begin + tl.arange(0, BLOCK_K // SPAN) * SPAN
            mask_s = mask_n[:, None] & (offs_s < K)[None, :]
            group = scale_row[:, None] * n_groups + (offs_s // GROUP)[None, :]
            w = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
            for level in tl.static_range(LEVELS):
                offs = level * scale_rows * n_groups + group
                scale = tl.load(scale_ptr + offs, mask=mask_s, other=0.0).to(tl.float32)
                term = spread(scale, BLOCK_N, BLOCK_K, SPAN) * (second if level == 3 or level == 5 else first)
                if COLUMN:
                    column = tl.load(column_ptr + level * K + offs_k, mask=mask_k, other=0.0).to(tl.float32)
                    term = term * column[None, :]
                if MEAN:
                    mean = tl.load(mean_ptr + offs, mask=mask_s, other=0.0).to(tl.float32)
                    term = term + spread(mean, BLOCK_N, BLOCK_K, SPAN)
                if LEVELS == 2:
                    term = tl.where(flag == level, term, 0.0)
                elif LEVELS > 2:
                    here = (chosen == 0) & (flag == level) if level < 2 else chosen == 1
                    if LEVELS == 6 and level > 1:
                        here = here & (flag == level // 2 - 1)
                    term = tl.where(here, term, 0.0)
                w += term
        acc = tl.dot(x, tl.trans(w), acc) if INTEGER else tile_add(acc, x, tl.trans(w), BLOCK_M)
    y = acc if INTEGER else tile_sum(acc, BLOCK_M)
    if PLAIN and not INTEGER:
        y = y * tl.load(scale_ptr + scale_row, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    offs = (part.to(tl.int64) * M + offs_m)[:, None] * N + offs_n[None, :]
    tl.store(out_ptr + offs, y.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def _plain(weight: BinaryWeight | TernaryWeight) -> bool:
    """Whether every row is a scale times values that are exact in any dtype."""
    if isinstance(weight, TernaryWeight):
        return weight.n_groups == 1
    extras = (weight.flags, weight.mean, weight.column_scale)
    return weight.n_groups == 1 and all(extra is None for extra in extras)


def binary_matmul_ref(
    x: Tensor, weight: BinaryWeight | TernaryWeight, x_scale: Tensor | None = None
) -> Tensor:
    """The truth of `binary_matmul`: in float64 for float64 x, exact sums for int8 x, else in float32."""
    if x.dtype != torch.int8:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return (x.to(dtype) @ dequantize_ref(weight, dtype).T).to(x.dtype)
    sums = x.double() @ values_ref(weight).double().T  # integers below 2^53
    scale = wide(weight.scale, weight.d_out, 1, 1, torch.float64)[0, :, 0]
    return (sums * scale * x_scale.double()).float()


def _launch(x: Tensor, weight: BinaryWeight | TernaryWeight, x_scale: Tensor | None) -> Tensor:
    """The kernel on x [M, d_in]: [M, d_out] in the dtype of x, float32 for int8."""
    (M, K), N, integer = x.shape, weight.d_out, x_scale is not None
    block_m = max(block_rows(M), 16 if integer else 1)
    if block_m > 1:
        assert_dot_block(BLOCK_M=block_m)
    n_parts, part_k = column_parts(M, N, K, x.device)
    t = {name: tensor.contiguous() for name, tensor in weight.tensors.items()}
    words = t["signs"] if isinstance(weight, BinaryWeight) else t["codes"]
    kind = _SIGNS if isinstance(weight, BinaryWeight) else _TRITS if weight.trits else _TWO_BIT
    residual, scale = t.get("residual", words), t["scale"]  # what is not read needs a pointer all the same
    ranks = weight.ranks if "residual" in t else words

    def launch(_: int, results: Tensor) -> None:
        _binary_matmul_kernel[lambda meta: (cdiv(N, meta["BLOCK_N"]), cdiv(M, block_m), n_parts)](
            x, words, t.get("flags", words), t.get("salient", words), residual, ranks, scale,
            t.get("mean", scale), t.get("column_scale", scale), results,
            M, N, K, words.shape[1], residual.shape[1], scale.shape[1], N // scale.shape[1], weight.n_groups, part_k,
            KIND=kind, LEVELS=len(scale), PLAIN=_plain(weight), GROUP=weight.columns, MEAN="mean" in t,
            COLUMN="column_scale" in t, INTEGER=integer,
            RUN=2**30 if weight.n_groups == 1 else weight.columns & -weight.columns, BLOCK_M=block_m,
        )  # fmt: skip

    if not integer:
        return run_parts(M, N, [n_parts], x, launch)
    sums = torch.empty(n_parts, M, N, dtype=torch.int32, device=x.device)
    launch(0, sums)
    return sum_parts(sums, torch.float32, x_scale.flatten(), wide(scale, N, 1, 1, torch.float32).flatten())


def binary_matmul(
    x: Tensor,
    weight: BinaryWeight | TernaryWeight,
    x_scale: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """X W^T with a binary or ternary W.

    Args:
        x: [..., d_in] float16, bfloat16 or float32 (float64: reference only); or int8 codes, for a weight with one
            scale a row or fewer.
        weight: see `pack_binary` and `pack_ternary`.
        x_scale: float32 [..., 1], what the int8 codes of a token are multiplied by; for int8 only.
        backend: "triton", "reference", or "auto": the kernel on CUDA, the reference elsewhere.
    Returns: [..., d_out] in the dtype of x, accumulated in float32; for int8 x float32, accumulated in int32.
    Raises: ValueError naming the argument; RuntimeError if "triton" cannot run.
    """
    x = check_tensor("x", x, (*FLOATS, torch.float64, torch.int8))
    check(
        x.ndim >= 1 and x.shape[-1] == weight.d_in, f"x {tuple(x.shape)} does not end in d_in {weight.d_in}"
    )
    check((x_scale is not None) == (x.dtype == torch.int8), "x_scale belongs to int8 x, and only to it")
    tensors = [x, *weight.tensors.values()]
    if x_scale is not None:
        check(_plain(weight), "int8 x needs a weight with one scale a row, without groups, means or flags")
        x_scale = check_tensor("x_scale", x_scale, (torch.float32,))
        check_shape("x_scale", x_scale, (*x.shape[:-1], 1))
        tensors.append(x_scale)
    wide_x = "x is float64" if x.dtype == torch.float64 else None
    if not use_triton(backend, *tensors, unsupported=wide_x):
        return binary_matmul_ref(x, weight, x_scale)
    return _launch(x.reshape(-1, weight.d_in), weight, x_scale).reshape(*x.shape[:-1], weight.d_out)
