"""Prefill attention with online softmax, in 16 or 32 bits or in FP8 with a scale a block and a Hadamard rotation.

Source    FlashAttention-3 (arXiv:2407.08608): Alg. 1's online softmax, Sec. 3.3's block quantization and incoherent
          processing, and the released kernel's offset of 8 in the exponent of P
Deviates  what is only speed on one GPU is left to Triton: warp specialization, ping-pong scheduling, in-kernel
          transposition of V. Forward only

For a block of queries, block after block of keys:
  S = Q K^T; m' = max(m, rowmax S); P = exp2((S - m') a log2 e); c = exp2((m - m') a log2 e)
  l = c l + rowsum P; O = c O + round(P) V; and at the end O / l, log-sum-exp a m + ln l
In FP8 (e4m3) Q, K and V are codes with one scale a block of rows, which multiply S and P V; P is 2^8 times as large, so
that it fills the range of e4m3, and so is l: O / l stays. Q and K may be rotated alike before (`fp8.incoherent`).

On GPUs with FP8 instructions (compute capability 8.9 and up) P is converted by the hardware. Elsewhere, and in the
interpreter, whose conversion is wrong, codes are widened to float16 and P is rounded by integer arithmetic: the
products are the same numbers, since float16 holds every e4m3 value.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from requant.kernels._triton import (
    FLOATS,
    INTERPRET,
    MIN_DOT,
    Backend,
    assert_dot_block,
    autotune,
    cdiv,
    check,
    check_shape,
    check_tensor,
    config,
    jit,
    next_power_of_2,
    tl,
    use_triton,
)
from requant.kernels.fp8 import FP8_MAX, BlockFp8, round_e4m3, widen_e4m3

P_OFFSET = 8
"""log2 of what P is multiplied by before it is rounded to FP8."""
LOG2_E = math.log2(math.e)
PLAIN, FP8_WIDENED, FP8_NATIVE = 0, 1, 2
"""What Q, K and V are in the kernel."""


def _visible(n_query: int, n_key: int, causal: bool, device: torch.device) -> Tensor:
    """bool [n_query, n_key]: the last query sees the last key."""
    mask = torch.ones(n_query, n_key, dtype=torch.bool, device=device)
    return mask.tril(n_key - n_query) if causal else mask


def attention_prefill_ref(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The truth of `attention_prefill`: one softmax, in float32 (in float64 if q is); result and log-sum-exp."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    shared = q.shape[1] // k.shape[1]
    keys, values = (t.to(dtype).repeat_interleave(shared, 1) for t in (k, v))
    scores = q.to(dtype) @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~_visible(*scores.shape[-2:], causal, q.device), -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return (weights @ values).to(q.dtype), lse


def attention_prefill_fp8_ref(
    q: BlockFp8, k: BlockFp8, v: BlockFp8, *, causal: bool = True, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The truth of `attention_prefill_fp8`, key block by key block, float32: result and log-sum-exp.

    P is rounded against the running maximum, so the size of key blocks is part of the result.
    """
    shared = q.codes.shape[1] // k.codes.shape[1]
    factor = (q.codes.shape[-1] ** -0.5 if scale is None else scale) * LOG2_E
    codes = [x.codes.float().repeat_interleave(n, 1) for x, n in ((q, 1), (k, shared), (v, shared))]
    scales = [x.scale.repeat_interleave(n, 1) for x, n in ((q, 1), (k, shared), (v, shared))]
    q_scale = scales[0].repeat_interleave(q.block, 2)[:, :, : codes[0].shape[2]]
    mask = _visible(codes[0].shape[2], codes[1].shape[2], causal, codes[0].device)
    top = torch.full(codes[0].shape[:3], -torch.inf, device=mask.device)
    total, out = torch.zeros_like(top), torch.zeros_like(codes[0])
    for j, start in enumerate(range(0, mask.shape[1], k.block)):
        part = slice(start, start + k.block)
        S = codes[0] @ codes[1][:, :, part].transpose(-1, -2)
        S = S * (q_scale * scales[1][:, :, j, None] * factor)[..., None]
        S = S.masked_fill(~mask[:, part], -torch.inf)
        new_top = torch.maximum(top, S.amax(-1))
        base = new_top.masked_fill(new_top == -torch.inf, 0.0)
        P, shrink = (S - base[..., None] + P_OFFSET).exp2(), (top - base).exp2()
        total = total * shrink + P.sum(-1)
        P = P.clamp(max=FP8_MAX).to(torch.float8_e4m3fn).float()
        out = out * shrink[..., None] + P @ codes[2][:, :, part] * scales[2][:, :, j, None, None]
        top = new_top
    seen = total > 0
    lse = torch.where(seen, (top - P_OFFSET + total.log2()) / LOG2_E, -torch.inf)
    return out / torch.where(seen, total, 1.0)[..., None], lse


@jit
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr, scale_log2, heads, n_query, n_key,
    MODE: tl.constexpr, CAUSAL: tl.constexpr, SHARED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head. MODE is PLAIN, FP8_WIDENED or FP8_NATIVE; blocks of FP8 scales are the tiles."""
    plane = tl.program_id(1).to(tl.int64)  # batch * heads + head
    kv_plane = plane // heads * (heads // SHARED) + plane % heads // SHARED
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    mask_m = (m < n_query)[:, None] & (d < HEAD_DIM)[None, :]
    q_place = (plane * n_query + m)[:, None] * HEAD_DIM + d[None, :]
    factor = scale_log2
    if MODE == 0:
        q = tl.load(q_ptr + q_place, mask=mask_m, other=0.0)
    else:
        if MODE == 1:
            q = widen_e4m3(tl.load(q_ptr + q_place, mask=mask_m, other=0))
        else:
            q = tl.load(q_ptr + q_place, mask=mask_m, other=0.0)
        factor = factor * tl.load(q_scale_ptr + plane * tl.cdiv(n_query, BLOCK_M) + tl.program_id(0))
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    end = n_key
    last_key = m + (n_key - n_query)  # for CAUSAL: the last query sees the last key
    if CAUSAL:
        end = tl.minimum(n_key, (tl.program_id(0) + 1) * BLOCK_M + n_key - n_query)
    for start in range(0, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask_n = (n < n_key)[:, None] & (d < HEAD_DIM)[None, :]
        kv_place = (kv_plane * n_key + n)[:, None] * HEAD_DIM + d[None, :]
        if MODE == 1:
            k = widen_e4m3(tl.load(k_ptr + kv_place, mask=mask_n, other=0))
            v = widen_e4m3(tl.load(v_ptr + kv_place, mask=mask_n, other=0))
        else:
            k = tl.load(k_ptr + kv_place, mask=mask_n, other=0.0)
            v = tl.load(v_ptr + kv_place, mask=mask_n, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        block = kv_plane * tl.cdiv(n_key, BLOCK_N) + start // BLOCK_N
        scores = scores * factor if MODE == 0 else scores * (factor * tl.load(k_scale_ptr + block))
        inside = (n < n_key)[None, :] & (m >= 0)[:, None]
        if CAUSAL:
            inside = inside & (n[None, :] <= last_key[:, None])
        scores = tl.where(inside, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - base)
        if MODE == 0:
            p = tl.exp2(scores - base[:, None])
            total = total * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        else:
            p = tl.exp2(scores - base[:, None] + 8.0)
            total = total * shrink + tl.sum(p, 1)
            p = round_e4m3(p).to(tl.float16) if MODE == 1 else p.to(tl.float8e4nv)
            acc = acc * shrink[:, None] + tl.dot(p, v) * tl.load(v_scale_ptr + block)
        top = new_top
    seen = total > 0
    safe = tl.where(seen, total, 1.0)
    out = acc / safe[:, None]
    tl.store(out_ptr + q_place, out.to(out_ptr.dtype.element_ty), mask=mask_m)
    offset = 0.0 if MODE == 0 else 8.0
    lse = tl.where(seen, (top - offset + tl.log2(safe)) * 0.6931471805599453, float("-inf"))
    tl.store(lse_ptr + plane * n_query + m, lse, mask=m < n_query)


_KEY = ["n_query", "n_key", "MODE", "CAUSAL", "HEAD_DIM"]
_plain_kernel = autotune(
    [
        config(BLOCK_M=m, BLOCK_N=n, num_warps=w, num_stages=s)
        for m, n, w, s in ((32, 32, 4, 2), (64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2))
    ],
    key=_KEY,
)(_prefill_kernel)
_fp8_kernel = autotune([config(num_warps=w, num_stages=s) for w, s in ((4, 2), (8, 2), (8, 3))], key=_KEY)(
    _prefill_kernel
)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises: ValueError naming the argument that does not fit the others."""
    check_shape("v", v, tuple(k.shape))
    fits = (q.shape[0], q.shape[3], q.shape[1] % k.shape[1]) == (k.shape[0], k.shape[3], 0)
    wanted = f"[{k.shape[0]}, a multiple of {k.shape[1]}, seqlen, {k.shape[3]}]"
    check(fits, f"q must have shape {wanted}, not {tuple(q.shape)}")


def _arguments(q: Tensor, k: Tensor, scale: float | None, causal: bool) -> tuple[tuple, dict]:
    """Sizes and compile-time constants that both launches pass."""
    head_dim = q.shape[3]
    block_d = max(MIN_DOT, next_power_of_2(head_dim))
    assert_dot_block(BLOCK_D=block_d)
    factor = (head_dim**-0.5 if scale is None else scale) * LOG2_E
    constants = {
        "CAUSAL": causal,
        "SHARED": q.shape[1] // k.shape[1],
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
    }
    return (factor, q.shape[1], q.shape[2], k.shape[2]), constants


def attention_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v.

    Args:
        q: [batch, heads, n_query, head_dim] float16, bfloat16 or float32.
        k, v: [batch, kv_heads, n_key, head_dim] in q's dtype; heads is a multiple of kv_heads.
        causal: query i sees keys up to i + n_key - n_query.
        scale: positive factor of the scores; None = head_dim^-0.5.
    Returns: result [batch, heads, n_query, head_dim] in q's dtype (zero where a query sees nothing) and float32
        log-sum-exp [batch, heads, n_query] (natural logarithm).
    Raises: ValueError for a shape, dtype or device that does not fit, or an empty tensor; RuntimeError if
        backend="triton" cannot run.
    """
    q = check_tensor("q", q, FLOATS, 4)
    k, v = (check_tensor(name, x, (q.dtype,), 4) for name, x in (("k", k), ("v", v)))
    _check_shapes(q, k, v)
    if not use_triton(backend, q, k, v):
        return attention_prefill_ref(q, k, v, causal=causal, scale=scale)
    sizes, constants = _arguments(q, k, scale, causal)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    grid = lambda meta: (cdiv(q.shape[2], meta["BLOCK_M"]), q.shape[0] * q.shape[1])  # noqa: E731
    _plain_kernel[grid](q, k, v, lse, lse, lse, out, lse, *sizes, MODE=PLAIN, **constants)
    return out, lse


def attention_prefill_fp8(
    q: BlockFp8,
    k: BlockFp8,
    v: BlockFp8,
    *,
    causal: bool = True,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`attention_prefill` of FP8 codes: products of codes, accumulated in float32, P rounded to e4m3.

    Args:
        q, k, v: from `quantize_fp8`; k and v with the same block.
        dtype: of the result, float16, bfloat16 or float32.
    Returns and Raises: as `attention_prefill`.
    """
    _check_shapes(q.codes, k.codes, v.codes)
    check(k.block == v.block, f"k and v must have the same block, not {k.block} and {v.block}")
    check(dtype in FLOATS, f"dtype must be float16, bfloat16 or float32, not {dtype}")
    tensors = [t.contiguous() for x in (q, k, v) for t in (x.codes, x.scale)]
    if not use_triton(backend, *tensors):
        out, lse = attention_prefill_fp8_ref(q, k, v, causal=causal, scale=scale)
        return out.to(dtype), lse
    native = not INTERPRET and torch.cuda.get_device_capability(q.codes.device) >= (8, 9)
    codes = [t if native else t.view(torch.uint8) for t in tensors[::2]]
    sizes, constants = _arguments(q.codes, k.codes, scale, causal)
    shape = q.codes.shape
    out = torch.empty(shape, dtype=dtype, device=tensors[0].device)
    lse = torch.empty(shape[:3], dtype=torch.float32, device=tensors[0].device)
    constants |= {"MODE": FP8_NATIVE if native else FP8_WIDENED, "BLOCK_M": q.block, "BLOCK_N": k.block}
    if native:
        constants["BLOCK_D"] = max(32, constants["BLOCK_D"])  # what FP8 dots need along the inner dimension
    _fp8_kernel[(cdiv(shape[2], q.block), shape[0] * shape[1])](
        *codes, *tensors[1::2], out, lse, *sizes, **constants
    )
    return out, lse
