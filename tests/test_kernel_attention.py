"""Decode attention over coded caches against plain attention in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.kernels import kv_codes
from requant.kernels._triton import INTERPRET
from requant.kernels.attention_quantized import apply_rope, attention_decode, attention_decode_ref
from requant.reference_impls._coder import Coder

interpreted = pytest.mark.skipif(
    not INTERPRET, reason="needs TRITON_INTERPRET=1 set before triton is imported"
)
gpu = pytest.mark.gpu


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN, so that an element nobody writes is seen."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(q, k, v, scale=None) -> torch.Tensor:
    """softmax(scale q k^T) v in float64 for q [batch, heads, n, d] and k, v [batch, kv_heads, m, d]."""
    heads = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(heads, 1), v.double().repeat_interleave(heads, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.softmax(-1) @ v


# --- codes of a cache


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([2, 4, 8]),
    st.integers(1, 70),
    st.sampled_from([(1, 32), (8, 1), (32, 1), (5, 4), (100, 32)]),
    st.integers(0, 99),
)
def test_affine_codes_are_half_a_step_away(
    bits: int, seqlen: int, groups: tuple[int, int], seed: int
) -> None:
    x = randn(2, 3, seqlen, 32, seed=seed) * 3 + 5  # ranges that do not contain zero
    codes = kv_codes.quantize_affine(x, bits, *groups)
    decoded = kv_codes.decode_ref(codes, torch.float64)
    step = codes.scale.double().repeat_interleave(groups[0], 2)[:, :, :seqlen].repeat_interleave(groups[1], 3)
    rounding = 2.0**-10 * (x.abs().amax() + step * 2**bits)  # of the float16 offset and scale
    assert ((decoded - x).abs() <= step / 2 + rounding).all()
    assert codes.words.numel() * 32 == x.numel() * bits
    n_grids = -(-seqlen // groups[0]) * (32 // groups[1])
    assert codes.stored_bytes == x.numel() * bits // 8 + 2 * 2 * 6 * n_grids


def test_keys_of_one_channel_share_a_grid() -> None:
    """An outlier channel costs the others nothing, which is why keys go per channel."""
    x = randn(1, 1, 64, 32)
    x[..., 7] *= 50
    others = [i for i in range(32) if i != 7]
    per_channel = kv_codes.decode_ref(kv_codes.quantize_affine(x, 4, 32, 1)) - x
    per_token = kv_codes.decode_ref(kv_codes.quantize_affine(x, 4, 1, 32)) - x
    assert per_channel[..., others].square().mean() < 0.05 * per_token[..., others].square().mean()


def coupled(batch: int, kv_heads: int, seqlen: int, head_dim: int, c: int, bits: int, seed: int = 0):
    """Random coupled codes and the plain integers they were packed from."""
    n_groups = kv_heads * head_dim // c
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (batch, seqlen, n_groups), generator=g)
    return kv_codes.pack_coupled(codes, randn(n_groups, 2**bits, c, seed=seed).half(), kv_heads), codes


def test_coupled_codes_are_those_of_the_coded_cache() -> None:
    coder = Coder(randn(8, 32, 4).half())
    x = randn(2, 1, 9, 32, seed=4)
    stored = kv_codes.pack_coupled(coder.encode(x), coder.centroids, 1)
    assert torch.equal(kv_codes.decode_ref(stored), coder.decode(coder.encode(x), 32).float())
    packed = coder.pack(x)  # bytes of the same stream
    assert torch.equal(stored.words.view(torch.uint8)[:, None, :, : packed.shape[-1]], packed)


# --- decode


def draw(kind: str, batch: int, kv_heads: int, seqlen: int, head_dim: int, seed: int):
    """Keys and values in one of the formats."""
    k, v = (
        randn(batch, kv_heads, seqlen, head_dim, seed=seed),
        randn(batch, kv_heads, seqlen, head_dim, seed=seed + 1),
    )
    if kind.startswith("affine"):
        bits = int(kind.removeprefix("affine"))
        return kv_codes.quantize_affine(k, bits, 32, 1), kv_codes.quantize_affine(v, bits, 1, head_dim)
    if kind == "mixed":
        keys = kv_codes.quantize_affine(k, 8, 5, 1)
        return keys, kv_codes.quantize_affine(v, 4, 1, 8)
    c, bits = {"coupled-2c8b": (2, 8), "coupled-4c8b": (4, 8), "coupled-8c10b": (8, 10)}[kind]
    shape = (batch, kv_heads, seqlen, head_dim, c, bits)
    return coupled(*shape, seed=seed)[0], coupled(*shape, seed=seed + 1)[0]


KINDS = ["affine8", "affine4", "affine2", "mixed", "coupled-2c8b", "coupled-4c8b", "coupled-8c10b"]


def tables(seqlen: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(seqlen)[:, None] * 100.0 ** -(torch.arange(head_dim // 2) * 2 / head_dim)
    return angle.cos(), angle.sin()


@interpreted
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_decode_agrees_with_float64(kind: str, rope: bool, poisoned) -> None:
    keys, values = draw(kind, 2, 2, 123, 32, 3)
    q = randn(2, 6, 32, seed=9)
    options = {"rope": tables(123, 32)} if rope else {}
    k, v = kv_codes.decode_ref(keys, torch.float64), kv_codes.decode_ref(values, torch.float64)
    truth = plain(q[:, :, None], apply_rope(k, tables(123, 32)) if rope else k, v)[:, :, 0]
    for backend in ("triton", "reference"):
        y = attention_decode(q, keys, values, backend=backend, **options)
        assert (y.double() - truth).abs().max() < 3e-6


@interpreted
@pytest.mark.parametrize(
    ("batch", "kv_heads", "shared", "seqlen", "head_dim"),
    [(1, 1, 1, 1, 64), (3, 1, 17, 17, 48), (1, 1, 2, 700, 32)],
)
def test_decode_takes_any_shape(batch, kv_heads, shared, seqlen, head_dim, poisoned) -> None:
    keys, values = draw("affine4", batch, kv_heads, seqlen, head_dim, 3)
    q = randn(batch, kv_heads * shared, head_dim, seed=9)
    truth = plain(q[:, :, None], *(kv_codes.decode_ref(c, torch.float64) for c in (keys, values)), 0.3)[
        :, :, 0
    ]
    y = attention_decode(q, keys, values, scale=0.3, backend="triton")
    assert (y.double() - truth).abs().max() < 3e-6


@interpreted
@settings(max_examples=6, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 5), st.integers(1, 80)),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([1, 3, 16, 32, 64, 100]),
    st.sampled_from([1, 4, 32]),
    st.integers(0, 9),
)
def test_decode_takes_any_groups(shape, bits: int, token_group: int, channel_group: int, seed: int) -> None:
    batch, kv_heads, shared, seqlen = shape
    k, v = (randn(batch, kv_heads, seqlen, 32, seed=s) for s in (seed, seed + 1))
    keys = kv_codes.quantize_affine(k, bits, token_group, channel_group)
    values = kv_codes.quantize_affine(v, bits, token_group, channel_group)
    q = randn(batch, kv_heads * shared, 32, seed=seed + 2)
    truth = plain(q[:, :, None], *(kv_codes.decode_ref(c, torch.float64) for c in (keys, values)))[:, :, 0]
    assert (attention_decode(q, keys, values, backend="triton").double() - truth).abs().max() < 3e-6


@interpreted
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_lengths_and_recent_tokens(backend: str, poisoned) -> None:
    keys, values = draw("affine8", 3, 2, 200, 32, 3)
    q, recent = randn(3, 4, 32, seed=9), (randn(3, 2, 5, 32, seed=10), randn(3, 2, 5, 32, seed=11))
    lengths = torch.tensor([200, 37, 0])
    k, v = kv_codes.decode_ref(keys, torch.float64), kv_codes.decode_ref(values, torch.float64)
    y = attention_decode(q, keys, values, lengths=lengths, recent=recent, backend=backend)
    alone = attention_decode(q, keys, values, lengths=lengths.int(), backend=backend)
    for b, n in enumerate(lengths.tolist()):
        both = [
            torch.cat([x[b : b + 1, :, :n], r[b : b + 1].double()], 2)
            for x, r in zip((k, v), recent, strict=True)
        ]
        assert (y[b] - plain(q[b : b + 1, :, None], *both)[0, :, 0]).abs().max() < 3e-6
        if n:
            coded = plain(q[b : b + 1, :, None], k[b : b + 1, :, :n], v[b : b + 1, :, :n])[0, :, 0]
            assert (alone[b] - coded).abs().max() < 3e-6
        else:
            assert (alone[b] == 0).all()


@interpreted
def test_decode_in_half_precision_and_strided(poisoned) -> None:
    keys, values = draw("coupled-4c8b", 2, 2, 40, 32, 3)
    q = randn(2, 32, 4, seed=9).half().transpose(1, 2)
    truth = plain(q[:, :, None], *(kv_codes.decode_ref(c, torch.float64) for c in (keys, values)))[:, :, 0]
    y = attention_decode(q, keys, values, backend="triton")
    assert y.dtype == torch.float16 and (y.double() - truth).abs().max() < 3e-3


@pytest.mark.skipif(not INTERPRET, reason="without the interpreter no kernel runs on a CPU")
def test_codes_that_cross_halves_go_to_the_reference() -> None:
    stored, _ = coupled(1, 1, 6, 24, 8, 4)
    q = randn(1, 2, 24)
    assert attention_decode(q, stored, stored).shape == (1, 2, 24)
    with pytest.raises(RuntimeError, match="8 channels a code do not divide half of head_dim 24"):
        attention_decode(q, stored, stored, backend="triton")


def test_wrong_arguments_of_decode_are_named() -> None:
    keys, values = draw("affine8", 1, 2, 6, 32, 0)
    q = randn(1, 4, 32)
    with pytest.raises(ValueError, match="q is empty"):
        attention_decode(q[:, :0], keys, values)
    with pytest.raises(ValueError, match=r"q must have shape \[1, a multiple of 2, 32\]"):
        attention_decode(q[:, :3], keys, values)
    with pytest.raises(ValueError, match="differ in batch"):
        attention_decode(q, keys, draw("affine8", 1, 2, 7, 32, 0)[1])
    with pytest.raises(ValueError, match="cos ends before seqlen 6"):
        attention_decode(q, keys, values, rope=tables(5, 32))
    with pytest.raises(ValueError, match=r"lengths must have shape \(1,\)"):
        attention_decode(q, keys, values, lengths=torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="recent values must have shape"):
        attention_decode(q, keys, values, recent=(randn(1, 2, 3, 32), randn(1, 2, 4, 32)))
    with pytest.raises(ValueError, match="bits must be 2, 4 or 8"):
        kv_codes.quantize_affine(randn(1, 1, 4, 32), 3, 1, 32)
    with pytest.raises(ValueError, match="no multiple of 16"):
        kv_codes.quantize_affine(randn(1, 1, 4, 24), 2, 1, 24)
    with pytest.raises(ValueError, match="power of two"):
        kv_codes.pack_coupled(torch.zeros(1, 1, 4, dtype=torch.int64), randn(4, 7, 8), 1)


# --- on a GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_decode_agrees_with_float64(kind: str, dtype: torch.dtype) -> None:
    keys, values = draw(kind, 2, 2, 4097, 128, 3)
    q = randn(2, 8, 128, seed=9).to(dtype)
    truth = attention_decode_ref(q.double(), keys, values, rope=tables(4097, 128))
    moved = [type(c)(**{**vars(c), **{n: t.cuda() for n, t in c.tensors.items()}}) for c in (keys, values)]
    y = attention_decode(q.cuda(), *moved, rope=tuple(t.cuda() for t in tables(4097, 128)))
    eps = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert y.dtype == dtype and (y.double().cpu() - truth).abs().max() < eps
