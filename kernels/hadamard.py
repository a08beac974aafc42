"""Orthonormal Hadamard transform along the last dimension, alone or with per-token quantization of its result.

Source    the online transforms of QuaRot (arXiv:2404.00456, Sec. 4) and FlashAttention-3 (2407.08608, Sec. 3.3),
          followed by the symmetric per-token rounding that QuaRot, SmoothQuant and others give activations
Deviates  the matrices are those of `reference_impls._hadamard`, whose bases (12, 20, 28, 52, 108, 140, 156, 172)
          need not be the ones of an official table

An order n = base * 2^k is H_base (x) H_2 (x) ... (x) H_2. A program holds some rows as a tile [P, C]: P the base,
padded to a power of two, C = rows * 2^k columns. The base's product is taken while x is read, 16 rows of the tile
at a time; then windows of 4 to 6 bits of the column number are transformed by a product with a small matrix of
+-1 that is computed, not stored. All sums are float32; one factor 1/sqrt(n) ends it. Half precision goes through
tensor cores in three TF32 terms, which lose nothing it could show; the largest tile has no shared memory for that
(for sm_90: 264 KiB; in IEEE float32 132 KiB). Tiles of more than 8192 elements need a data-centre GPU's 164 KiB.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from requant.kernels._triton import (
    FLOATS,
    MIN_DOT,
    Backend,
    assert_dot_block,
    cdiv,
    check,
    check_tensor,
    jit,
    next_power_of_2,
    tl,
    use_triton,
)
from requant.reference_impls._hadamard import _split, hadamard_matrix, hadamard_transform
from requant.reference_impls._quant import absmax_scale

MAX_TILE = 2**15
"""Elements of the largest tile a program takes: 128 KiB of float32."""
_TILE = 4096  # elements a program takes where rows are short


@jit
def _sylvester(D: tl.constexpr, BITS: tl.constexpr):
    """[D, D] float32: +-1 by the parity of the bits in BITS that i and j share, 0 where other bits of i, j differ."""
    i = tl.arange(0, D)[:, None]
    j = tl.arange(0, D)[None, :]
    parity = i & j & BITS
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    sign = (1 - 2 * (parity & 1)).to(tl.float32)
    return tl.where(((i ^ j) & (D - 1 - BITS)) == 0, sign, 0.0)


@jit
def _window(
    y, TILE: tl.constexpr, LOW: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr
):
    """Multiply the window of D = 2^d column numbers from bit log2(LOW) on with `_sylvester(D, BITS)`."""
    H = _sylvester(D, BITS)
    if LOW == 1:
        flat = tl.reshape(y, (TILE // D, D))
        return tl.reshape(tl.dot(flat, H, input_precision=PRECISION), y.shape)
    else:
        parts = tl.permute(tl.reshape(y, (TILE // (D * LOW), D, LOW)), (0, 2, 1))
        flat = tl.dot(tl.reshape(parts, (TILE // D, D)), H, input_precision=PRECISION)
        parts = tl.permute(tl.reshape(flat, (TILE // (D * LOW), LOW, D)), (0, 2, 1))
        return tl.reshape(parts, y.shape)


@jit
def _hadamard_kernel(
    x_ptr, base_ptr, y_ptr, scale_ptr, n_rows, norm,
    BASE: tl.constexpr, P: tl.constexpr, POWER: tl.constexpr, ROWS: tl.constexpr,
    D0: tl.constexpr, BITS0: tl.constexpr, LOW1: tl.constexpr, D1: tl.constexpr, BITS1: tl.constexpr,
    LOW2: tl.constexpr, D2: tl.constexpr, BITS2: tl.constexpr, LIMIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS rows of BASE * POWER elements; windows with D = 0 are not used, LIMIT = 0 means no quantization.

    base_ptr: float32 [BASE, BASE] of +-1, by output and input. y_ptr: dtype of x, or int8 codes within +-LIMIT.
    """
    C: tl.constexpr = ROWS * POWER
    column = tl.arange(0, C)
    row = tl.program_id(0).to(tl.int64) * ROWS + column // POWER
    start = row * (BASE * POWER) + column % POWER  # of the tile's column in x
    mask_c = row < n_rows
    out = tl.arange(0, P)
    if BASE == 1:
        y = tl.load(x_ptr + start, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    else:
        y = tl.zeros([P, C], dtype=tl.float32)
        for first in range(0, BASE, 16):
            inner = first + tl.arange(0, 16)
            signs = tl.load(
                base_ptr + out[:, None] * BASE + inner[None, :],
                mask=(out < BASE)[:, None] & (inner < BASE)[None, :], other=0.0,
            )  # fmt: skip
            x = tl.load(
                x_ptr + start[None, :] + inner[:, None] * POWER,
                mask=mask_c[None, :] & (inner < BASE)[:, None], other=0.0,
            )  # fmt: skip
            y = tl.dot(signs, x.to(tl.float32), y, input_precision=PRECISION)
    if D0 > 0:
        y = _window(y, P * C, 1, D0, BITS0, PRECISION)
    if D1 > 0:
        y = _window(y, P * C, LOW1, D1, BITS1, PRECISION)
    if D2 > 0:
        y = _window(y, P * C, LOW2, D2, BITS2, PRECISION)
    y = y * norm
    offs = start[None, :] + out[:, None] * POWER
    mask = mask_c[None, :] & (out < BASE)[:, None]
    if LIMIT > 0:
        peak = tl.max(tl.max(tl.reshape(tl.abs(y), (P, ROWS, POWER)), 2), 0)  # padding rows are 0
        scale = tl.div_rn(tl.maximum(peak, 1e-5), tl.full([ROWS], LIMIT, tl.float32))
        rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        tl.store(scale_ptr + rows, scale, mask=rows < n_rows)
        wide = tl.broadcast_to(scale[None, :, None], (P, ROWS, POWER))
        y = tl.div_rn(y, tl.reshape(wide, (P, C)))
        y = (y + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds half to even
        y = tl.minimum(tl.maximum(y, -LIMIT), LIMIT)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def windows(k: int, c: int) -> list[tuple[int, int, int]]:
    """(LOW, D, BITS) of the products that transform the low k bits of a column number of c >= 4 bits.

    A window spans 4 to 6 bits; where fewer are left, BITS says which of the window's bits take part.
    """
    found, done = [], 0
    count = min(3, cdiv(k, 4))
    for i in range(count):
        width = cdiv(k - done, count - i)
        d = max(4, width)
        low = min(done, c - d)
        found.append((2**low, 2**d, (2**width - 1) << (done - low)))
        done += width
    return found


def _tile(n: int) -> tuple[int, int, int, int]:
    """(base, padded base, 2^k, rows a program takes) for order n."""
    base, k = _split(n)
    padded = 1 if base == 1 else max(MIN_DOT, next_power_of_2(base))
    largest = max((D for _, D, _ in windows(k, max(k, 4))), default=1)
    rows = max(_TILE // (padded * 2**k), cdiv(MIN_DOT * largest, padded * 2**k), cdiv(MIN_DOT, 2**k), 1)
    return base, padded, 2**k, rows


def precision(single: bool, tile: int) -> str:
    """How dots multiply: for half precision as three products on tensor cores, where shared memory suffices."""
    return "ieee" if single or tile > MAX_TILE // 2 else "tf32x3"


@functools.lru_cache(maxsize=64)
def _base_signs(base: int, inverse: bool, device: torch.device) -> Tensor:
    """float32 [output, input] of +-1, what the kernel multiplies with."""
    H = (hadamard_matrix(base) * math.sqrt(base)).round()
    return (H if inverse else H.T).to(device, torch.float32).contiguous()


def _launch(x: Tensor, inverse: bool, limit: int) -> tuple[Tensor, Tensor]:
    """The kernel on x [rows, n]: y and, with limit > 0, the scales [rows, 1]."""
    n_rows, n = x.shape
    base, padded, power, rows = _tile(n)
    columns = rows * power
    stages = windows(power.bit_length() - 1, columns.bit_length() - 1)
    assert_dot_block(tile=padded * columns, **{f"D{i}": D for i, (_, D, _) in enumerate(stages)})
    (_, D0, B0), (L1, D1, B1), (L2, D2, B2) = stages + [(1, 0, 0)] * (3 - len(stages))
    y = torch.empty(n_rows, n, dtype=torch.int8 if limit else x.dtype, device=x.device)
    scale = torch.empty(n_rows if limit else 1, 1, dtype=torch.float32, device=x.device)
    _hadamard_kernel[(cdiv(n_rows, rows),)](
        x, _base_signs(base, inverse, x.device), y, scale, n_rows, 1 / math.sqrt(n),
        BASE=base, P=padded, POWER=power, ROWS=rows, D0=D0, BITS0=B0, LOW1=L1, D1=D1, BITS1=B1,
        LOW2=L2, D2=D2, BITS2=B2, LIMIT=limit, PRECISION=precision(x.dtype == torch.float32, padded * columns),
        num_warps=min(16, max(4, padded * columns // 1024)),
    )  # fmt: skip
    return y, scale


def hadamard_ref(x: Tensor, *, inverse: bool = False) -> Tensor:
    """The truth of `hadamard`: in float64 if x is float64, else in float32; dtype of x."""
    return hadamard_transform(x.to(torch.promote_types(x.dtype, torch.float32)), inverse=inverse).to(x.dtype)


def hadamard_quantize_ref(x: Tensor, bits: int = 8, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """The truth of `hadamard_quantize`; the scale of a float64 x is float64."""
    y = hadamard_transform(x.to(torch.promote_types(x.dtype, torch.float32)), inverse=inverse)
    scale, limit = absmax_scale(y, bits), 2 ** (bits - 1) - 1
    return (y / scale).round().clamp(-limit, limit).to(torch.int8), scale


def _checked(x: Tensor, backend: Backend) -> tuple[Tensor, bool]:
    """x contiguous, and whether the kernel runs on it."""
    x = check_tensor("x", x, (*FLOATS, torch.float64))
    check(x.ndim > 0, "x must have at least one dimension")
    _, padded, power, rows = _tile(x.shape[-1])
    unsupported = None
    if x.dtype == torch.float64:
        unsupported = "x is float64"
    elif padded * power * rows > MAX_TILE:
        unsupported = f"order {x.shape[-1]} takes a tile of {padded * power * rows}, over {MAX_TILE} elements"
    return x, use_triton(backend, x, unsupported=unsupported)


def hadamard(x: Tensor, *, inverse: bool = False, backend: Backend = "auto") -> Tensor:
    """x H along the last dimension (x H^T if inverse), H orthonormal.

    Args:
        x: [..., n] float16, bfloat16 or float32 (float64: reference only); n = base * 2^k as in
            `reference_impls._hadamard`.
        backend: "triton", "reference", or "auto": the kernel on CUDA for tiles of up to MAX_TILE elements, the
            reference elsewhere.
    Returns: a new tensor of the shape and dtype of x.
    Raises: ValueError naming the argument, also for an order without a known matrix; RuntimeError if "triton"
        cannot run.
    """
    x, kernel = _checked(x, backend)
    if not kernel:
        return hadamard_ref(x, inverse=inverse)
    return _launch(x.reshape(-1, x.shape[-1]), inverse, 0)[0].reshape(x.shape)


def hadamard_quantize(
    x: Tensor, bits: int = 8, *, inverse: bool = False, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Signed codes of x H with one scale a token, max|y| / (2^(bits-1) - 1), in one pass over x.

    Args: as `hadamard`; bits: 2 to 8, one code a byte at any width.
    Returns: codes int8 [..., n] within +-(2^(bits-1) - 1), and scale float32 [..., 1].
    Raises: as `hadamard`.
    """
    check(isinstance(bits, int) and 2 <= bits <= 8, f"bits must be 2 to 8, not {bits!r}")
    x, kernel = _checked(x, backend)
    if not kernel:
        return hadamard_quantize_ref(x, bits, inverse=inverse)
    codes, scale = _launch(x.reshape(-1, x.shape[-1]), inverse, 2 ** (bits - 1) - 1)
    return codes.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)
