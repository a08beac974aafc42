"""Decode attention over a coded cache: one query token a sequence, keys and values decoded on the fly.

Source    the caches of KIVI (arXiv:2402.02750) and Coupled Quantization (2405.03917; `kv_codes`), online softmax as in
          FlashAttention-3 (2407.08608), tokens split over programs and merged by log-sum-exp
Deviates  none in the result; the exact latest tokens (a window, a group not yet full) are attended to in torch

A program takes one kv head of one sequence, all query heads that share it, and a part of the tokens. Keys are
decoded as two halves of the channels, which is what the rotary embedding pairs: where keys are coded before it
(Coupled Quantization), its tables are passed and applied here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from requant.kernels._triton import (
    FLOATS,
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
    split_parts,
    tl,
    use_triton,
)
from requant.kernels.bitstream import never_straddles
from requant.kernels.kv_codes import Codes, CoupledCodes, decode_ref, decoded_half

Rope = tuple[Tensor, Tensor]
LOG2_E = math.log2(math.e)


def apply_rope(keys: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding of keys [batch, heads, seqlen, head_dim]: channel i is paired with i + head_dim / 2."""
    cos, sin = (t.to(keys.dtype) for t in rope)
    first, second = keys.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention of q [batch, heads, head_dim] in its dtype: result and log-sum-exp [batch, heads] (-inf: nothing)."""
    heads = q.shape[1] // k.shape[1]
    k, v = (t.to(q.dtype).repeat_interleave(heads, 1) for t in (k, v))
    scores = (k @ q[..., None])[..., 0] * scale  # [batch, heads, seqlen]
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]).exp()
    return (weights[..., None, :] @ v)[..., 0, :], lse


def merge(results: Tensor, lse: Tensor) -> Tensor:
    """Attention over all tokens from attention over parts of them.

    Args:
        results: [n, parts, head_dim]; lse: [n, parts], natural logarithm, -inf for a part without tokens.
    Returns: [n, head_dim]; zero where no part has any.
    """
    top = lse.amax(-1, keepdim=True)
    weights = (lse - top.masked_fill(top == -torch.inf, 0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    return (weights[..., None] * results).sum(-2) / total.masked_fill(total == 0, 1.0)


def attention_decode_ref(
    q: Tensor,
    keys: Codes,
    values: Codes,
    *,
    scale: float | None = None,
    rope: Rope | None = None,
    lengths: Tensor | None = None,
    recent: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The truth of `attention_decode`: decode everything, one softmax, in float32 (in float64 if q is)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = decode_ref(keys, dtype), decode_ref(values, dtype)
    if rope is not None:
        k = apply_rope(k, tuple(t[: keys.seqlen] for t in rope))
    visible = torch.ones(keys.batch, keys.seqlen, dtype=torch.bool, device=q.device)
    if lengths is not None:
        visible = torch.arange(keys.seqlen, device=q.device) < lengths[:, None]
    if recent is not None:
        k, v = torch.cat([k, recent[0].to(dtype)], 2), torch.cat([v, recent[1].to(dtype)], 2)
        visible = torch.cat([visible, visible.new_ones(keys.batch, recent[0].shape[2])], 1)
    scale = keys.head_dim**-0.5 if scale is None else scale
    return _attend(q.to(dtype), k, v, scale, visible)[0].to(q.dtype)


CONFIGS = [config(BLOCK_T=t, num_warps=w, num_stages=s) for t, w, s in ((32, 4, 2), (64, 4, 2), (128, 4, 2))]


@autotune(CONFIGS, key=["seqlen", "HEAD_DIM", "K_BITS", "V_BITS", "K_COUPLED", "V_COUPLED"])
@jit
def _attention_decode_kernel(
    q_ptr, k_words_ptr, k_scale_ptr, k_offset_ptr, v_words_ptr, v_scale_ptr, v_offset_ptr, cos_ptr, sin_ptr,
    lengths_ptr, out_ptr, lse_ptr, scale_log2, kv_heads, seqlen, k_row_words, v_row_words,
    K_COUPLED: tl.constexpr, K_BITS: tl.constexpr, K_LANES: tl.constexpr, K_ALIGNED: tl.constexpr,
    K_TOKEN_GROUP: tl.constexpr, K_CHANNEL_GROUP: tl.constexpr,
    V_COUPLED: tl.constexpr, V_BITS: tl.constexpr, V_LANES: tl.constexpr, V_ALIGNED: tl.constexpr,
    V_TOKEN_GROUP: tl.constexpr, V_CHANNEL_GROUP: tl.constexpr,
    HAS_ROPE: tl.constexpr, HAS_LENGTHS: tl.constexpr, SHARED: tl.constexpr, SPLIT: tl.constexpr,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The SHARED query heads of one kv head over one of SPLIT parts of the tokens; results and log-sum-exps."""
    batch = tl.program_id(0) // kv_heads
    head = tl.program_id(0) % kv_heads
    heads = tl.arange(0, BLOCK_Q)
    i = tl.arange(0, BLOCK_H)
    q_row = (tl.program_id(0).to(tl.int64) * SHARED + heads)[:, None]
    mask_q = (heads < SHARED)[:, None] & (i < HALF)[None, :]
    q1 = tl.load(q_ptr + q_row * HEAD_DIM + i[None, :], mask=mask_q, other=0.0)
    q2 = tl.load(q_ptr + q_row * HEAD_DIM + (HALF + i)[None, :], mask=mask_q, other=0.0)
    length = seqlen
    if HAS_LENGTHS:
        length = tl.minimum(tl.load(lengths_ptr + batch).to(tl.int32), seqlen)
    part = tl.cdiv(tl.cdiv(seqlen, BLOCK_T), SPLIT) * BLOCK_T
    first = tl.program_id(1) * part
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    acc1 = tl.zeros([BLOCK_Q, BLOCK_H], dtype=tl.float32)
    acc2 = tl.zeros([BLOCK_Q, BLOCK_H], dtype=tl.float32)
    for start in range(first, tl.minimum(first + part, length), BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        mask_t = tokens < length
        k1 = decoded_half(
            k_words_ptr, k_scale_ptr, k_offset_ptr, batch, head, kv_heads, seqlen, k_row_words, tokens, start, mask_t,
            K_COUPLED, K_BITS, K_LANES, K_ALIGNED, K_TOKEN_GROUP, K_CHANNEL_GROUP, False, HALF, HEAD_DIM,
            BLOCK_T, BLOCK_H,
        )  # fmt: skip
        k2 = decoded_half(
            k_words_ptr, k_scale_ptr, k_offset_ptr, batch, head, kv_heads, seqlen, k_row_words, tokens, start, mask_t,
            K_COUPLED, K_BITS, K_LANES, K_ALIGNED, K_TOKEN_GROUP, K_CHANNEL_GROUP, True, HALF, HEAD_DIM,
            BLOCK_T, BLOCK_H,
        )  # fmt: skip
        if HAS_ROPE:
            table = tokens[:, None] * HALF + i[None, :]
            mask_r = mask_t[:, None] & (i < HALF)[None, :]
            cos = tl.load(cos_ptr + table, mask=mask_r, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + table, mask=mask_r, other=0.0).to(tl.float32)
            turned = k1 * cos - k2 * sin
            k2 = k2 * cos + k1 * sin
            k1 = turned
        scores = tl.dot(q1, tl.trans(k1.to(q1.dtype)), input_precision="ieee")
        scores = tl.dot(q2, tl.trans(k2.to(q2.dtype)), scores, input_precision="ieee")
        scores = tl.where(mask_t[None, :], scores * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v1 = decoded_half(
            v_words_ptr, v_scale_ptr, v_offset_ptr, batch, head, kv_heads, seqlen, v_row_words, tokens, start, mask_t,
            V_COUPLED, V_BITS, V_LANES, V_ALIGNED, V_TOKEN_GROUP, V_CHANNEL_GROUP, False, HALF, HEAD_DIM,
            BLOCK_T, BLOCK_H,
        )  # fmt: skip
        v2 = decoded_half(
            v_words_ptr, v_scale_ptr, v_offset_ptr, batch, head, kv_heads, seqlen, v_row_words, tokens, start, mask_t,
            V_COUPLED, V_BITS, V_LANES, V_ALIGNED, V_TOKEN_GROUP, V_CHANNEL_GROUP, True, HALF, HEAD_DIM,
            BLOCK_T, BLOCK_H,
        )  # fmt: skip
        p = p.to(q1.dtype)
        acc1 = tl.dot(p, v1.to(q1.dtype), acc1 * shrink[:, None], input_precision="ieee")
        acc2 = tl.dot(p, v2.to(q1.dtype), acc2 * shrink[:, None], input_precision="ieee")
        top = new_top
    seen = total > 0
    share = 1.0 / tl.where(seen, total, 1.0)
    row = q_row * SPLIT + tl.program_id(1)
    tl.store(out_ptr + row * HEAD_DIM + i[None, :], acc1 * share[:, None], mask=mask_q)
    tl.store(out_ptr + row * HEAD_DIM + (HALF + i)[None, :], acc2 * share[:, None], mask=mask_q)
    lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * 0.6931471805599453, float("-inf"))
    tl.store(lse_ptr + row, lse[:, None], mask=(heads < SHARED)[:, None])


def _unsupported(*sides: Codes) -> str | None:
    """Why the kernel does not take these codes, or None."""
    for codes in sides:
        coupled = isinstance(codes, CoupledCodes)
        lanes = codes.centroids.shape[2] if coupled else 32 // codes.bits
        what = f"{lanes} channels a {'code' if coupled else 'word'}"
        if lanes & (lanes - 1):
            return f"{what}: not a power of two"
        if codes.head_dim % (2 * lanes):
            return f"{what} do not divide half of head_dim {codes.head_dim}"
    return None


def _side(codes: Codes) -> tuple[tuple[Tensor, Tensor, Tensor], dict]:
    """Tensors and compile-time constants of keys or values."""
    if isinstance(codes, CoupledCodes):
        constants = {
            "COUPLED": True,
            "BITS": codes.code_bits,
            "LANES": codes.centroids.shape[2],
            "ALIGNED": never_straddles((codes.code_bits,)),
            "TOKEN_GROUP": 1,
            "CHANNEL_GROUP": 1,
        }
        return (codes.words, codes.centroids, codes.centroids), constants
    constants = {
        "COUPLED": False,
        "BITS": codes.bits,
        "LANES": 32 // codes.bits,
        "ALIGNED": True,
        "TOKEN_GROUP": codes.token_group,
        "CHANNEL_GROUP": codes.channel_group,
    }
    return (codes.words, codes.scale, codes.offset), constants


def _launch(
    q: Tensor, keys: Codes, values: Codes, scale: float, rope: Rope | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Results [batch * heads, parts, head_dim] and log-sum-exps [batch * heads, parts] of parts of the tokens."""
    batch, heads, head_dim = q.shape
    shared = heads // keys.kv_heads
    split = split_parts(cdiv(keys.seqlen, 128), batch * keys.kv_heads, q.device)
    block_q, block_h = max(MIN_DOT, next_power_of_2(shared)), max(MIN_DOT, next_power_of_2(head_dim // 2))
    assert_dot_block(BLOCK_Q=block_q, BLOCK_H=block_h)
    results = torch.empty(batch * heads, split, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch * heads, split, dtype=torch.float32, device=q.device)
    (k_tensors, k), (v_tensors, v) = _side(keys), _side(values)
    cos, sin = (q, q) if rope is None else rope  # pointers are passed, but not read
    _attention_decode_kernel[(batch * keys.kv_heads, split)](
        q,
        *k_tensors,
        *v_tensors,
        cos,
        sin,
        q if lengths is None else lengths,
        results,
        lse,
        scale * LOG2_E,
        keys.kv_heads,
        keys.seqlen,
        keys.words.shape[-1],
        values.words.shape[-1],
        **{f"K_{name}": value for name, value in k.items()},
        **{f"V_{name}": value for name, value in v.items()},
        HAS_ROPE=rope is not None,
        HAS_LENGTHS=lengths is not None,
        SHARED=shared,
        SPLIT=split,
        HEAD_DIM=head_dim,
        HALF=head_dim // 2,
        BLOCK_H=block_h,
        BLOCK_Q=block_q,
    )
    return results, lse


def _check_options(
    q: Tensor, keys: Codes, values: Codes, rope: Rope | None, lengths: Tensor | None, recent: tuple | None
) -> None:
    """Raises: ValueError naming the argument that does not fit q or the codes."""
    shape = (keys.batch, keys.kv_heads, keys.seqlen, keys.head_dim)
    other = (values.batch, values.kv_heads, values.seqlen, values.head_dim)
    check(shape == other, f"keys {shape} and values {other} differ in batch, kv_heads, seqlen or head_dim")
    check(keys.head_dim % 2 == 0, f"head_dim must be even, not {keys.head_dim}")
    wanted = f"[{keys.batch}, a multiple of {keys.kv_heads}, {keys.head_dim}]"
    fits = (q.shape[0], q.shape[2], q.shape[1] % keys.kv_heads) == (keys.batch, keys.head_dim, 0)
    check(fits, f"q must have shape {wanted}, not {tuple(q.shape)}")
    for name, table in zip(("cos", "sin"), rope or (), strict=False):
        check_tensor(f"rope's {name}", table, FLOATS, 2)
        check_shape(f"rope's {name}", table, (table.shape[0], keys.head_dim // 2))
        check(table.shape[0] >= keys.seqlen, f"rope's {name} ends before seqlen {keys.seqlen}")
    if lengths is not None:
        check_tensor("lengths", lengths, (torch.int32, torch.int64), 1)
        check_shape("lengths", lengths, (keys.batch,))
    for name, x in zip(("recent keys", "recent values"), recent or (), strict=False):
        check_tensor(name, x, FLOATS, 4)
        check_shape(name, x, (keys.batch, keys.kv_heads, recent[0].shape[2], keys.head_dim))


def attention_decode(
    q: Tensor,
    keys: Codes,
    values: Codes,
    *,
    scale: float | None = None,
    rope: Rope | None = None,
    lengths: Tensor | None = None,
    recent: tuple[Tensor, Tensor] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of one new token a sequence over coded keys and values.

    Args:
        q: [batch, heads, head_dim] float16, bfloat16 or float32; heads is a multiple of kv_heads.
        keys, values: codes of the same batch, heads, tokens and channels; kinds and widths may differ.
        scale: factor of the scores; None = head_dim^-0.5.
        rope: cos, sin [>= seqlen, head_dim / 2] of the tokens' positions, for keys coded before the rotary embedding
            (channel i paired with i + head_dim / 2); q has it already. None: keys are used as decoded.
        lengths: int32 or int64 [batch], coded tokens of each sequence that count; None = all.
        recent: exact keys (with rotary embedding) and values [batch, kv_heads, n, head_dim] that come after.
    Returns: [batch, heads, head_dim] in q's dtype, softmax and sums in float32; zero where no token counts.
    Raises: ValueError for a shape, dtype or device that does not fit, or an empty tensor; RuntimeError if
        backend="triton" cannot run, also for codes that cross halves of a head.
    """
    q = check_tensor("q", q, FLOATS, 3)
    _check_options(q, keys, values, rope, lengths, recent)
    scale = keys.head_dim**-0.5 if scale is None else scale
    given = [*keys.tensors.values(), *values.tensors.values(), *(rope or ()), *(recent or ())]
    given += [] if lengths is None else [lengths]
    if not use_triton(backend, q, *given, unsupported=_unsupported(keys, values)):
        return attention_decode_ref(q, keys, values, scale=scale, rope=rope, lengths=lengths, recent=recent)
    rope = rope and tuple(t.contiguous() for t in rope)
    results, lse = _launch(q, keys, values, scale, rope, lengths)
    if recent is not None:
        late, late_lse = _attend(q.float(), *recent, scale, None)
        results = torch.cat([results, late.reshape(-1, 1, q.shape[2])], 1)
        lse = torch.cat([lse, late_lse.reshape(-1, 1)], 1)
    return merge(results, lse).to(q.dtype).reshape(q.shape)
