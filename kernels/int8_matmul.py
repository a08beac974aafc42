"""W8A8: int8 activations times int8 weights, and the quantization of activations.

Source    per-token activation scales, per-channel or per-tensor weight scales: SmoothQuant (arXiv:2211.10438),
          LLM.int8() (2208.07339)
Deviates  none in the format

y[m, n] = sum_k x[m, k] w[n, k] * x_scale[m] * w_scale[n]; the sum is exact, in int32, and scales come in once an
output, in float32.

On the CPU the integer sums go through torch's int8 product where the CPU has instructions for it (several times as
fast as the float32 truth), through float32 in exact pieces where it has not.
"""

from __future__ import annotations

import functools
import time

import torch
from torch import Tensor

from requant.kernels._triton import (
    FLOATS,
    Backend,
    autotune,
    cdiv,
    check,
    check_tensor,
    config,
    jit,
    next_power_of_2,
    split_parts,
    sum_parts,
    tl,
    use_triton,
)
from requant.kernels.int_matmul import SPLIT_ROWS

MIN_SCALE = 1e-5 / 127
"""Smallest activation scale, so that a row of zeros has one."""
MAX_INNER = 2**31 // 2**14 - 1
"""Largest inner dimension whose sums of int8 products fit in int32, whatever the codes: 131071."""


@jit
def _quantize_kernel(x_ptr, codes_ptr, scale_ptr, width, clip_ratio, smallest, BLOCK: tl.constexpr):
    """Codes and scale of one row: the largest magnitude first, then the codes."""
    row = tl.program_id(0).to(tl.int64)
    peak = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * width + k, mask=k < width, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, tl.abs(x))
    scale = tl.maximum(tl.div_rn(tl.max(peak, 0) * clip_ratio, 127.0), smallest)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * width + k, mask=k < width, other=0.0).to(tl.float32)
        x = tl.minimum(tl.maximum(tl.div_rn(x, scale + tl.zeros_like(x)), -127.0), 127.0)
        x = (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds half to even
        tl.store(codes_ptr + row * width + k, x.to(tl.int8), mask=k < width)
    tl.store(scale_ptr + row + tl.arange(0, 1), scale + tl.zeros([1], dtype=tl.float32))


def quantize_per_token_ref(x: Tensor, clip_ratio: float = 1.0) -> tuple[Tensor, Tensor]:
    """The truth of `quantize_per_token`."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) * clip_ratio / 127).clamp(min=MIN_SCALE)
    return (x / scale).clamp(-127, 127).round().to(torch.int8), scale


def quantize_per_token(
    x: Tensor, clip_ratio: float = 1.0, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes of each row: scale = clip_ratio * max|x| / 127, codes round(x / scale) in +-127.

    Args:
        x: [..., d_in] float16, bfloat16 or float32.
    Returns: codes int8 [..., d_in] and scale float32 [..., 1].
    Raises: ValueError for a wrong dtype or an empty x.
    """
    x = check_tensor("x", x, FLOATS)
    if not use_triton(backend, x):
        return quantize_per_token_ref(x, clip_ratio)
    width = x.shape[-1]
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    block = min(next_power_of_2(width), 4096)
    grid = (x.numel() // width,)
    _quantize_kernel[grid](x, codes, scale, width, float(clip_ratio), MIN_SCALE, BLOCK=block)
    return codes, scale


TILE_CONFIGS = [
    config(BLOCK_N=n, num_warps=w, num_stages=s)
    for n, w, s in ((32, 4, 2), (64, 4, 3), (64, 4, 5), (128, 4, 4), (128, 8, 3), (128, 8, 4), (256, 8, 3))
]


@autotune(TILE_CONFIGS, key=["d_out", "d_in", "SPLIT_K", "BLOCK_M", "BLOCK_K"])
@jit
def _int8_kernel(
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, out_ptr, n_rows, d_out, d_in,
    SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Outputs [BLOCK_M, BLOCK_N]; of SPLIT_K > 1 parts the int32 sums, to be scaled by `sum_parts`."""
    part = tl.cdiv(tl.cdiv(d_in, BLOCK_K), SPLIT_K) * BLOCK_K
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = m < n_rows
    mask_n = n < d_out
    x_row = x_ptr + m.to(tl.int64)[:, None] * d_in
    w_row = w_ptr + n.to(tl.int64)[:, None] * d_in
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    first = tl.program_id(2) * part
    for start in range(first, tl.minimum(first + part, d_in), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask_k = (k < d_in)[None, :]
        x = tl.load(x_row + k[None, :], mask=mask_m[:, None] & mask_k, other=0)
        w = tl.load(w_row + k[None, :], mask=mask_n[:, None] & mask_k, other=0)
        acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)
    out = (tl.program_id(2).to(tl.int64) * n_rows + m.to(tl.int64))[:, None] * d_out + n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if SPLIT_K == 1:
        y = acc.to(tl.float32) * tl.load(x_scale_ptr + m, mask=mask_m, other=0.0)[:, None]
        y = y * tl.load(w_scale_ptr + n, mask=mask_n, other=0.0)[None, :]
        tl.store(out_ptr + out, y.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out_ptr + out, acc, mask=mask)


def int8_matmul_ref(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The truth of `int8_matmul`: dequantize both, multiply in dtype (float32 or float64)."""
    x_scale, w_scale = row_scales(x, x_scale).to(dtype), _channel_scale(w, w_scale).to(dtype)
    return (x.to(dtype) * x_scale) @ (w.to(dtype) * w_scale[:, None]).T


def row_scales(x: Tensor, scale: Tensor) -> Tensor:
    """x_scale as [..., 1] (a per-tensor scale repeated)."""
    return (
        scale.reshape(1).expand(*x.shape[:-1], 1) if scale.numel() == 1 else scale.reshape(*x.shape[:-1], 1)
    )


def _channel_scale(w: Tensor, scale: Tensor) -> Tensor:
    """w_scale as [d_out] (a per-tensor scale repeated)."""
    return scale.reshape(1).expand(w.shape[0]) if scale.numel() == 1 else scale.reshape(w.shape[0])


def check_codes(x: Tensor, x_scale: Tensor, d_in: int) -> tuple[Tensor, Tensor]:
    """Checked codes [rows, d_in] and float32 scales [rows] of the activations."""
    x = check_tensor("x", x, (torch.int8,))
    check(
        x.shape[-1] == d_in,
        f"x must have the weight's d_in={d_in} as its last dimension, not shape {tuple(x.shape)}",
    )
    x_scale = check_tensor("x_scale", x_scale, FLOATS)
    rows = x.numel() // d_in
    check(x_scale.numel() in (1, rows), f"x_scale must hold 1 or {rows} values, not {x_scale.numel()}")
    return x.reshape(rows, d_in), row_scales(x, x_scale).reshape(rows).float().contiguous()


def tile_rows(rows: int, d_in: int, d_out: int, block_k: int, device: torch.device) -> tuple[int, int]:
    """BLOCK_M and the number of parts of K."""
    split = split_parts(cdiv(d_in, block_k), cdiv(d_out, 64), device) if rows <= SPLIT_ROWS else 1
    return min(max(16, next_power_of_2(rows)), 128), split


def int8_matmul(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
) -> Tensor:
    """x times the transposed w, both int8 codes, times their scales.

    Args:
        x: int8 [..., d_in] (`quantize_per_token`). w: int8 [d_out, d_in].
        x_scale: [..., 1], one a token, or one value. w_scale: [d_out], one an output channel, or one value.
        out_dtype: float16, bfloat16 or float32.
    Returns: [..., d_out] in out_dtype; the sum over d_in is exact. "reference" (and "auto" on the CPU) runs torch's
        integer product, not the float32 truth `int8_matmul_ref`.
    Raises: ValueError for a wrong shape, dtype or device, an empty tensor, or d_in > 131071 (int32 could overflow).
    """
    w = check_tensor("w", w, (torch.int8,), 2)
    d_out, d_in = w.shape
    check(d_in <= MAX_INNER, f"d_in {d_in} is above {MAX_INNER}: sums could leave int32")
    check(out_dtype in FLOATS, f"out_dtype must be float16, bfloat16 or float32, not {out_dtype}")
    flat, row_scale = check_codes(x, x_scale, d_in)
    w_scale = check_tensor("w_scale", w_scale, FLOATS)
    check(w_scale.numel() in (1, d_out), f"w_scale must hold 1 or {d_out} values, not {w_scale.numel()}")
    column_scale = _channel_scale(w, w_scale).float().contiguous()
    shape = (*x.shape[:-1], d_out)
    if not use_triton(backend, x, w, x_scale, w_scale):
        acc = integer_product(flat, w)
        return (acc.float().mul_(row_scale[:, None]).mul_(column_scale)).to(out_dtype).reshape(shape)
    rows = flat.shape[0]
    block_k = 128
    block_m, split = tile_rows(rows, d_in, d_out, block_k, x.device)
    dtype = out_dtype if split == 1 else torch.int32
    out = torch.empty(split, rows, d_out, dtype=dtype, device=x.device)
    _int8_kernel[lambda meta: (cdiv(d_out, meta["BLOCK_N"]), cdiv(rows, block_m), split)](
        flat, w, row_scale, column_scale, out, rows, d_out, d_in,
        SPLIT_K=split, BLOCK_M=block_m, BLOCK_K=block_k,
    )  # fmt: skip
    y = out[0] if split == 1 else sum_parts(out, out_dtype, row_scale, column_scale)
    return y.reshape(shape)


@functools.cache
def has_fast_int_mm() -> bool:
    """Whether torch's int8 product on this CPU beats float32: true with AVX512-VNNI, by two orders untrue without.

    Measured once (about 50 ms where it is slow); both ways give the same integers, so that results do not hang
    on it.
    """
    x, w = (torch.ones(n, 512, dtype=torch.int8) for n in (32, 512))
    seconds = {}
    for product in (_float_product, lambda x, w: torch._int_mm(x, w.T)):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            product(x, w)
            times.append(time.perf_counter() - start)
        seconds[product] = min(times)
    exact, integer = seconds.values()
    return integer < exact


def _float_product(x: Tensor, w: Tensor) -> Tensor:
    """Exact int32 x @ w.T through float32: sums of 1024 products of int8 are integers of at most 2^24."""
    acc = torch.zeros(x.shape[0], w.shape[0], dtype=torch.int32)
    for start in range(0, x.shape[1], 1024):
        part = slice(start, start + 1024)
        acc += (x[:, part].float() @ w[:, part].float().T).int()
    return acc


def integer_product(x: Tensor, w: Tensor) -> Tensor:
    """Exact int32 x @ w.T of int8 codes, through torch; rows and columns are padded to what CUDA's needs."""
    if not x.is_cuda:
        # torch 2.13 leaves the result unset where w.T has strides (1, 1)
        fast = x.shape[1] > 1 and has_fast_int_mm()
        return torch._int_mm(x, w.T) if fast else _float_product(x, w)
    rows, d_out = x.shape[0], w.shape[0]
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % 8, 0, max(0, 24 - rows)))
    w = torch.nn.functional.pad(w, (0, -w.shape[1] % 8, 0, -d_out % 8))
    return torch._int_mm(x, w.T)[:rows, :d_out]
