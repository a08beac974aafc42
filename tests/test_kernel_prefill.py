"""Prefill attention, plain and in FP8, against plain attention in float64."""

from __future__ import annotations

import pytest
import torch

from requant.kernels import attention_prefill as prefill
from requant.kernels import fp8
from requant.kernels._triton import INTERPRET, jit, tl

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


def plain(q, k, v, scale=None, causal=False) -> torch.Tensor:
    """softmax(scale q k^T) v in float64 for q [batch, heads, n, d] and k, v [batch, kv_heads, m, d]."""
    heads = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(heads, 1), v.double().repeat_interleave(heads, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        n, m = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(n, m).triu(1 + m - n).bool(), -torch.inf)
    return scores.softmax(-1) @ v


SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (1, 1, 1, 3, 4097, 16),
    (1, 2, 1, 33, 33, 32),
    (2, 1, 3, 17, 123, 48),
    (1, 1, 2, 70, 40, 64),
]


def qkv(shape: tuple[int, ...], dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    batch, kv_heads, shared, n_query, n_key, head_dim = shape
    q = randn(batch, kv_heads * shared, n_query, head_dim, seed=1)
    k, v = (randn(batch, kv_heads, n_key, head_dim, seed=s) for s in (2, 3))
    return q.to(dtype), k.to(dtype), v.to(dtype)


@interpreted
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_agrees_with_float64(shape: tuple[int, ...], causal: bool, poisoned) -> None:
    q, k, v = qkv(shape)
    truth = plain(q, k, v, causal=causal).nan_to_num(0.0)  # a query before every key sees nothing
    scores = q.double() @ k.double().repeat_interleave(shape[2], 1).transpose(-1, -2) * shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(
            torch.ones(scores.shape[-2:]).triu(1 + shape[4] - shape[3]).bool(), -torch.inf
        )
    for backend in ("triton", "reference"):
        y, lse = prefill.attention_prefill(q, k, v, causal=causal, backend=backend)
        assert (y.double() - truth).abs().max() < 3e-6
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=3e-6, rtol=0)


@interpreted
def test_prefill_in_half_precision_and_strided(poisoned) -> None:
    q, k, v = (
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv((2, 2, 2, 50, 50, 32), torch.float16)
    )
    y, _ = prefill.attention_prefill(q, k, v, scale=0.2, backend="triton")
    assert y.dtype == torch.float16 and (y.double() - plain(q, k, v, 0.2, True)).abs().max() < 3e-3


@jit
def _round_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y_ptr + i, fp8.round_e4m3(tl.load(x_ptr + i, mask=i >= 0)), mask=i >= 0)


@jit
def _widen_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, fp8.widen_e4m3(tl.load(x_ptr + i, mask=i >= 0)), mask=i >= 0)


@interpreted
def test_rounding_to_e4m3_is_bit_exact() -> None:
    """Every e4m3 value, every midpoint, their neighbours, and random floats of all magnitudes."""
    grid = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (grid[1:] + grid[:-1]) / 2
    edges = torch.cat([grid, middles])
    near = torch.cat([edges, torch.nextafter(edges, edges + 1), torch.nextafter(edges, edges - 1)])
    spread = randn(2**14) * 2.0 ** torch.randint(
        -24, 12, (2**14,), generator=torch.Generator().manual_seed(1)
    )
    x = torch.cat([near, -near, spread, torch.tensor([448.0, 463.9, 464.0, 1e6, 3e38, 1e-45])])
    x = torch.nn.functional.pad(x, (0, -len(x) % 4096))
    y = torch.full_like(x, float("nan"))
    _round_kernel[(len(x) // 4096,)](x, y, N=4096)
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(y, expected) and torch.equal(torch.signbit(y), torch.signbit(expected))


@interpreted
def test_widening_of_e4m3_is_bit_exact() -> None:
    codes = torch.arange(256).to(torch.uint8)
    y = torch.full([256], float("nan"), dtype=torch.float16)
    _widen_kernel[(1,)](codes, y, N=256)
    finite = (codes & 0x7F) != 0x7F
    assert torch.equal(y[finite].float(), codes.view(torch.float8_e4m3fn).float()[finite])


def with_outliers(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, ...]:
    """N(0, 1) + N(0, 100) Bernoulli(0.001) for q, k and v: the distribution of Sec. 4.3."""
    g = torch.Generator().manual_seed(seed)

    def draw_one() -> torch.Tensor:
        base, extra, where = torch.randn(2, *shape, generator=g), 10.0, torch.rand(shape, generator=g) < 0.001
        return base[0] + extra * base[1] * where

    return draw_one(), draw_one(), draw_one()


@interpreted
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(1, 2, 2, 100, 100, 32), (1, 1, 1, 33, 70, 64), (1, 1, 1, 40, 3, 16)])
def test_fp8_kernel_agrees_with_its_reference(shape: tuple[int, ...], causal: bool, poisoned) -> None:
    q, k, v = (fp8.quantize_fp8(x, 32) for x in qkv(shape))
    y, lse = prefill.attention_prefill_fp8(q, k, v, causal=causal, backend="triton")
    expected, expected_lse = prefill.attention_prefill_fp8(q, k, v, causal=causal, backend="reference")
    # one P of some may be rounded the other way, by one part in 16: exp2 differs in its last bit
    assert (y - expected).abs().max() < 2e-2 and (y - expected).square().mean().sqrt() < 2e-4
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=0)
    decoded = [x.decode(torch.float64) for x in (q, k, v)]
    exact, exact_lse = prefill.attention_prefill_ref(*decoded, causal=causal)
    assert (y - exact).abs().max() < 0.1 and (y - exact).square().mean().sqrt() < 0.015
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-4, rtol=0)


def test_block_scales_and_rotation_halve_the_error_of_fp8() -> None:
    """Against float64 on the outlier distribution: error of one scale a tensor over error of both measures."""
    ratios = []
    for seed in range(2):
        q, k, v = with_outliers((1, 1, 1024, 64), seed)
        truth = plain(q, k, v)

        def error(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, truth=truth, **how) -> float:
            codes = (fp8.quantize_fp8(x, 128, **how) for x in (q, k, v))
            y, _ = prefill.attention_prefill_fp8(*codes, causal=False)
            return float((y - truth).square().mean().sqrt())

        signs = torch.randint(0, 2, (64,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
        rotated = fp8.incoherent(q, k, signs)
        torch.testing.assert_close(rotated[0] @ rotated[1].mT, q @ k.mT, atol=1e-3, rtol=1e-4)
        ratios.append(error(q, k, v, per_tensor=True) / error(*rotated, v))
    assert sum(ratios) / len(ratios) > 1.3


def test_wrong_arguments_of_prefill_are_named() -> None:
    q, k, v = qkv((1, 2, 2, 8, 8, 16))
    with pytest.raises(ValueError, match="k is empty"):
        prefill.attention_prefill(q, k[:, :, :0], v)
    with pytest.raises(ValueError, match="k must be float32"):
        prefill.attention_prefill(q, k.half(), v)
    with pytest.raises(ValueError, match=r"v must have shape \(1, 2, 8, 16\)"):
        prefill.attention_prefill(q, k, v[:, :, :7])
    with pytest.raises(ValueError, match="a multiple of 2"):
        prefill.attention_prefill(q[:, :3], k, v)
    with pytest.raises(ValueError, match="block must be 32, 64 or 128"):
        fp8.quantize_fp8(q, 16)
    codes = [fp8.quantize_fp8(x, n) for x, n in ((q, 32), (k, 32), (v, 64))]
    with pytest.raises(ValueError, match="same block"):
        prefill.attention_prefill_fp8(*codes)


# --- on a GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_gpu_prefill_agrees_with_float64(head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = qkv((1, 2, 4, 1000, 1111, head_dim), dtype)
    y, _ = prefill.attention_prefill(q.cuda(), k.cuda(), v.cuda())
    eps = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert y.dtype == dtype and (y.double().cpu() - plain(q, k, v, causal=True)).abs().max() < eps


@gpu
@needs_cuda
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gpu_fp8_prefill_agrees_with_its_reference(head_dim: int) -> None:
    codes = [fp8.quantize_fp8(x.cuda(), 128) for x in qkv((1, 2, 2, 1000, 1000, head_dim))]
    y, lse = prefill.attention_prefill_fp8(*codes)
    expected, expected_lse = prefill.attention_prefill_fp8(*codes, backend="reference")
    assert (y - expected).abs().max() < 5e-2 and (y - expected).square().mean().sqrt() < 2e-3
    torch.testing.assert_close(lse, expected_lse, atol=1e-2, rtol=0)
