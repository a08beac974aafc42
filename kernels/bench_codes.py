"""What the bench times of codebooks, trellises and attention: weights of random codes, caches, and their cases.

Decode attention takes the rows of x as sequences of TOKENS cached tokens, prefill as one sequence of that many tokens;
both stand with a model's attention layer, and torch's own attention in bf16 is timed beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from requant.kernels.attention_prefill import attention_prefill, attention_prefill_fp8
from requant.kernels.attention_quantized import attention_decode, attention_decode_ref
from requant.kernels.bitstream import stream_words
from requant.kernels.codebook import CodebookWeight, ColumnParts
from requant.kernels.fp8 import quantize_fp8
from requant.kernels.kv_codes import AffineCodes, Codes, CoupledCodes, quantize_affine
from requant.kernels.trellis_matmul import TILE, Code, TrellisWeight

TOKENS = 4096
"""Cached tokens of a sequence in decode."""
HEAD_DIM = 128
KV_HEADS = {"llama-2-7b": 32, "llama-3-70b": 8}
MAX_SEQUENCES = 16
"""Sequences beyond which decode is not timed: the cache in bf16 would not fit."""
MIN_PREFILL = 256
"""Tokens from which prefill is timed."""

Fields = tuple[Callable[[], Tensor], Callable[[], Tensor] | None, int, int, int]
"""A case's run, truth, weight bytes, bytes in and out, and operations."""


def random_words(*shape: int, device: torch.device) -> Tensor:
    """Random bits, int32."""
    return torch.randint(-(2**31), 2**31, shape, device=device, dtype=torch.int64).int()


def codebooks(d_out: int, d_in: int, widths: tuple[int, ...], v: int, along: str, device) -> CodebookWeight:
    """A weight of random vector codes; AQLM's has a scale an output."""
    rows, places = (d_out, -(-d_in // v)) if along == "input" else (-(-d_out // v), d_in)
    words = random_words(rows, stream_words(places, widths), device=device)
    books = torch.randn(1, sum(2**b for b in widths), v, device=device).half() * 0.02
    scale = torch.rand(d_out, device=device).half() + 0.5 if along == "input" else None
    return CodebookWeight(words, books, scale, widths, d_out, d_in, along)


def aqlm(*widths: int) -> Callable[[Any, torch.device], CodebookWeight]:
    """Maker of AQLM weights: groups of 8 inputs."""
    return lambda shape, device: codebooks(shape.d_out, shape.d_in, widths, 8, "input", device)


def vptq(shape: Any, device: torch.device) -> CodebookWeight:
    """Vectors of 6 outputs, 4096 centroids: 2 bits."""
    return codebooks(shape.d_out, shape.d_in, (12,), 6, "output", device)


def vptq_outliers(shape: Any, device: torch.device) -> ColumnParts:
    """Vectors of 12 with a residual, and 1 % of the columns in vectors of 4, in permuted order."""
    first = shape.d_in // 100
    outliers = codebooks(shape.d_out, first, (13,), 4, "output", device)
    rest = codebooks(shape.d_out, shape.d_in - first, (12, 12), 12, "output", device)
    return ColumnParts((outliers, rest), torch.randperm(shape.d_in, device=device).to(torch.int16))


def qtip(code: Code, bits: int) -> Callable[[Any, torch.device], TrellisWeight]:
    """Maker of QTIP weights: states of 16 bits, HYB with a table of 512 rows."""

    def make(shape: Any, device: torch.device) -> TrellisWeight:
        words = random_words(-(-shape.d_out // TILE), -(-shape.d_in // TILE), 8 * bits, device=device)
        table = torch.randn(512, 2, device=device).half() if code == "hyb" else None
        scale = torch.full((1,), 0.02, device=device)
        return TrellisWeight(words, scale, code, bits, shape.d_out, shape.d_in, table)

    return make


# --- attention


def is_attention(shape: Any) -> bool:
    """Whether the linear layer reads a token's hidden state into queries: attention is timed once a model."""
    return shape.layers.startswith("q") and shape.model in KV_HEADS


def affine_cache(bits: int) -> Callable[[int, int, torch.device], tuple[Codes, Codes]]:
    """Maker of keys (per channel, groups of 128 tokens) and values (per token)."""

    def side(batch: int, heads: int, device: torch.device, groups: tuple[int, int]) -> AffineCodes:
        little = quantize_affine(torch.randn(1, 1, TOKENS, HEAD_DIM, device=device), bits, *groups)
        grids = (
            t.expand(batch, heads, -1, -1).contiguous() for t in (little.words, little.scale, little.offset)
        )
        return AffineCodes(*grids, bits, HEAD_DIM, *groups)

    return lambda batch, heads, device: tuple(
        side(batch, heads, device, groups) for groups in ((128, 1), (1, HEAD_DIM))
    )


def coupled_cache(c: int, bits: int) -> Callable[[int, int, torch.device], tuple[Codes, Codes]]:
    """Maker of keys and values in codes of c channels."""

    def side(batch: int, heads: int, device: torch.device) -> CoupledCodes:
        n_groups = heads * HEAD_DIM // c
        words = random_words(batch, TOKENS, stream_words(n_groups, (bits,)), device=device)
        return CoupledCodes(words, torch.randn(n_groups, 2**bits, c, device=device).half(), heads)

    return lambda batch, heads, device: (side(batch, heads, device), side(batch, heads, device))


def decode(cache: Callable | None, rope: bool = False) -> Callable[[Any, int, torch.device], Fields | None]:
    """Maker of decode attention over a coded cache; None: torch's attention over one in bf16."""

    def make(shape: Any, rows: int, device: torch.device) -> Fields | None:
        if not is_attention(shape) or rows > MAX_SEQUENCES:
            return None
        heads, kv_heads = shape.d_out // HEAD_DIM, KV_HEADS[shape.model]
        q = torch.randn(rows, heads, HEAD_DIM, device=device).bfloat16()
        io, operations = 2 * 2 * q.numel(), 4 * rows * heads * TOKENS * HEAD_DIM
        if cache is None:
            k, v = (torch.randn(rows, kv_heads, TOKENS, HEAD_DIM, device=device).bfloat16() for _ in range(2))
            run = lambda: sdpa(q[:, :, None], k, v, enable_gqa=True)  # noqa: E731
            return run, None, 4 * k.numel(), io, operations
        keys, values = cache(rows, kv_heads, device)
        tables = {"rope": torch.randn(2, TOKENS, HEAD_DIM // 2, device=device).unbind()} if rope else {}
        return (
            lambda: attention_decode(q, keys, values, **tables),
            lambda: attention_decode_ref(q.float(), keys, values, **tables),
            keys.stored_bytes + values.stored_bytes,
            io,
            operations,
        )

    return make


def prefill(kind: str) -> Callable[[Any, int, torch.device], Fields | None]:
    """Maker of causal prefill: "torch" or "triton" in bf16, or "fp8" (the rotation and the rounding not included)."""

    def make(shape: Any, rows: int, device: torch.device) -> Fields | None:
        if not is_attention(shape) or rows < MIN_PREFILL:
            return None
        heads, kv_heads = shape.d_out // HEAD_DIM, KV_HEADS[shape.model]
        q, k, v = (
            torch.randn(1, n, rows, HEAD_DIM, device=device).bfloat16() for n in (heads, kv_heads, kv_heads)
        )
        operations = 2 * rows * rows * heads * HEAD_DIM  # causal: half of 4 n^2 d
        size = (2 * q.numel() + k.numel() + v.numel()) * 2
        exact = lambda: sdpa(*(x.float() for x in (q, k, v)), is_causal=True, enable_gqa=True)  # noqa: E731
        if kind == "torch":
            return lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True), exact, 0, size, operations
        if kind == "triton":
            return lambda: attention_prefill(q, k, v)[0], exact, 0, size, operations
        codes = [quantize_fp8(x) for x in (q, k, v)]
        run = lambda: attention_prefill_fp8(*codes, dtype=torch.bfloat16)[0]  # noqa: E731
        return run, exact, 0, size // 2 + q.numel(), operations

    return make
