"""Hadamard transform with and without per-token quantization: the kernel against the truth in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.kernels._triton import can_launch
from requant.kernels.hadamard import (
    MAX_TILE,
    hadamard,
    hadamard_quantize,
    hadamard_quantize_ref,
    hadamard_ref,
    windows,
)
from requant.reference_impls._hadamard import hadamard_matrix

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
triton_only = pytest.mark.skipif(not can_launch(torch.ones(1)), reason="needs triton and its interpreter")
BASES = (12, 20, 28, 40, 52, 108, 140, 156, 172)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN, so that an element no program writes shows."""
    plain = torch.empty

    def empty(*args, **kwargs):
        out = plain(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(-128)

    monkeypatch.setattr(torch, "empty", empty)


def _x(rows: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))


def _check(x: torch.Tensor, inverse: bool, tolerance: float = 4e-6) -> None:
    truth = hadamard_ref(x.double(), inverse=inverse)
    y = hadamard(x, inverse=inverse, backend="triton" if can_launch(x) else "auto")
    assert y.dtype == x.dtype and y.shape == x.shape
    assert float((y.double() - truth).abs().max()) <= tolerance


def _check_codes(x: torch.Tensor, bits: int, inverse: bool = False) -> None:
    """Codes within one of the truth, and different only where rounding is a near tie."""
    codes, scale = hadamard_quantize(x, bits, inverse=inverse, backend="triton" if can_launch(x) else "auto")
    wanted, wanted_scale = hadamard_quantize_ref(x.double(), bits, inverse=inverse)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32
    assert scale.shape == (*x.shape[:-1], 1)
    assert torch.allclose(scale.double(), wanted_scale, rtol=1e-5)
    exact = hadamard_ref(x.double(), inverse=inverse) / wanted_scale
    assert int(codes.abs().max()) <= 2 ** (bits - 1) - 1
    assert float((codes.double() - exact).abs().max()) <= 0.5 + 1e-3
    assert int((codes != wanted).sum()) <= max(1, codes.numel() // 1000)


@pytest.mark.parametrize("n", [1, 2, 64, *BASES, 344])
def test_truth_is_the_matrix(n):
    x, H = _x(3, n).double(), hadamard_matrix(n)
    assert torch.allclose(hadamard_ref(x), x @ H)
    assert torch.allclose(hadamard_ref(hadamard_ref(x), inverse=True), x)
    assert torch.allclose(hadamard_ref(x).square().sum(1), x.square().sum(1))


@pytest.mark.parametrize("k", range(16))
def test_windows_transform_every_bit_once(k):
    c = max(k, 4)
    covered = 0
    for low, D, bits in windows(k, c):
        assert 16 <= D <= 64 and low * D <= 2**c and bits < D
        assert covered & (bits * low) == 0
        covered |= bits * low
    assert covered == 2**k - 1


@triton_only
@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, *BASES, 24, 80, 192, 1792])
@pytest.mark.parametrize("inverse", [False, True])
def test_kernel_agrees_with_truth(poisoned, n, inverse):
    _check(_x(3, n), inverse)
    _check_codes(_x(3, n), 8, inverse)


@triton_only
@pytest.mark.parametrize("n", [11008, 14336, 32768])
def test_largest_tiles(poisoned, n):
    _check(_x(2, n), False, 1e-5)


@triton_only
@given(
    base=st.sampled_from((1, *BASES)), k=st.integers(0, 3), rows=st.integers(1, 20), seed=st.integers(0, 9),
    bits=st.integers(2, 8), inverse=st.booleans(),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_kernel_at_any_order(base, k, rows, seed, bits, inverse):
    x = _x(rows, base * 2**k, seed)
    _check(x, inverse)
    _check_codes(x, bits, inverse)


@triton_only
def test_many_rows_fill_several_programs(poisoned):
    _check(_x(123, 64), False)
    _check_codes(_x(4097, 4), 8)


@triton_only
def test_half_precision(poisoned):
    _check(_x(5, 96).half(), False, 4e-3)
    _check_codes(_x(5, 96).half(), 4)


@triton_only
def test_strided_and_batched_inputs(poisoned):
    x = _x(12, 48)
    _check(torch.stack([x, x], -1)[..., 0].reshape(3, 4, 48), False)
    strided = _x(48, 12).T
    assert not strided.is_contiguous()
    _check(strided, True)
    _check_codes(strided, 8)


@triton_only
def test_codes_of_a_zero_token():
    codes, scale = hadamard_quantize(torch.zeros(2, 16), backend="triton")
    assert not codes.any() and float(scale.max()) == pytest.approx(1e-5 / 127)


@triton_only
def test_a_spike_is_spread_evenly():
    """One outlier of 100 becomes n values of 100/sqrt(n): what the transform is for."""
    x = torch.zeros(1, 64)
    x[0, 5] = 100
    y = hadamard(x, backend="triton")
    assert torch.allclose(y.abs(), torch.full_like(y, 12.5))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="x is empty"):
        hadamard(torch.ones(0, 16))
    with pytest.raises(ValueError, match="x must be float16"):
        hadamard(torch.ones(2, 16, dtype=torch.int8))
    with pytest.raises(ValueError, match="order 17"):
        hadamard(torch.ones(2, 17))
    with pytest.raises(ValueError, match="bits must be 2 to 8"):
        hadamard_quantize(torch.ones(2, 16), 9)
    with pytest.raises(RuntimeError, match="float64"):
        hadamard(torch.ones(2, 16).double(), backend="triton")
    with pytest.raises(RuntimeError, match=str(MAX_TILE)):
        hadamard(torch.ones(1, 2 * MAX_TILE), backend="triton")
    assert float(hadamard(torch.ones(1, 2 * MAX_TILE))[0, 0]) == pytest.approx(256)  # by the reference


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [64, 4096, 11008, 14336, 28672, 32768])
def test_kernel_on_gpu(dtype, n):
    x = _x(37, n).cuda().to(dtype)
    _check(x, False, {torch.float16: 8e-3, torch.bfloat16: 6e-2, torch.float32: 2e-5}[dtype])
    _check_codes(x, 8)
