"""Four-bit float formats: code books, storage, and the fused product against the truth in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.kernels import _float4
from requant.kernels._float4 import FORMATS, Float4Weight, bias_to_absmax, book, dequantize_ref, pack_float4
from requant.kernels._triton import can_launch
from requant.kernels.nf4_matmul import nf4_matmul, nf4_matmul_ref

gpu = pytest.mark.gpu
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
triton_only = pytest.mark.skipif(not can_launch(torch.ones(1)), reason="needs triton and its interpreter")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN, so that an element no program writes shows."""
    plain = torch.empty

    def empty(*args, **kwargs):
        out = plain(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(77)

    monkeypatch.setattr(torch, "empty", empty)


def _data(M: int, N: int, K: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(M, K, generator=generator), torch.randn(N, K, generator=generator)


def _close(y: torch.Tensor, x: torch.Tensor, weight: Float4Weight, unit: float = 2.0**-20) -> None:
    """Equal to the product in float64 within unit times the sum of magnitudes."""
    W, x = dequantize_ref(weight, torch.float64), x.double()
    bound = x.abs() @ W.abs().T
    assert y.isfinite().all()
    assert ((y.double() - x @ W.T).abs() <= unit * bound + 1e-12).all()


def test_nf4_has_the_published_values():
    published = [
        -1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0,
        0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1,
    ]  # fmt: skip
    assert torch.allclose(book("nf4"), torch.tensor(published, dtype=torch.float32), atol=1e-6)


def test_float_formats_are_those_of_the_quantizer_with_a_real_bias():
    """Every value of EeMm is a fixed point of LLM-FP4's rounding, which yields nothing else."""
    for (e, m), name in {(1, 2): "fp4_e1m2", (2, 1): "fp4_e2m1", (3, 0): "fp4_e3m0"}.items():
        bias = torch.tensor(1.37, dtype=torch.float64)
        peak = bias_to_absmax(bias, e, m)
        values = _float4.float_values(e, m) * peak
        x = torch.cat([values, torch.linspace(0, float(peak), 4001, dtype=torch.float64)])
        exponent = (x.clamp(min=1e-9).log2() + bias + 1e-12).floor().clamp(min=1)
        step = torch.exp2(exponent - m - bias)
        rounded = (x / step).round() * step
        assert torch.allclose(rounded[: len(values)], values)
        assert (rounded[:, None] - values).abs().amin(1).max() < 1e-9
        assert torch.allclose(book(name)[: len(values)].double(), values / peak)


def test_e2m1_and_bitsandbytes_fp4_differ():
    assert (book("fp4_e2m1")[:8] * 6).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert torch.allclose(book("fp4_bnb")[:8] * 12, torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]))
    assert len(book("dynamic").unique()) == 256 and len(book("e4m3").unique()) == 253  # +-0 and two NaN


@given(seed=st.integers(0, 99), name=st.sampled_from(FORMATS), block=st.sampled_from((None, 1, 7, 64)))
@settings(max_examples=25, deadline=None)
def test_codes_are_the_nearest_values(seed, name, block):
    _, W = _data(1, 3, 37, seed)
    weight = pack_float4(W, name, block)
    scale = weight.absmax.repeat_interleave(weight.block)[: W.numel()].reshape(W.shape)
    grid = scale[..., None] * book(name)
    best = (grid - W[..., None]).abs().amin(-1)
    assert torch.allclose((dequantize_ref(weight) - W).abs(), best, atol=1e-6)


def test_bits_of_double_quantization():
    W = torch.randn(256, 1024, generator=torch.Generator().manual_seed(1))
    plain, double = pack_float4(W), pack_float4(W, double_quant=True)
    assert plain.bits_per_weight == 4.5
    assert double.bits_per_weight == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=2e-4)  # 4.127
    errors = [float((dequantize_ref(w) - W).square().mean()) for w in (plain, double)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_error_on_gaussian_weights():
    """Mean squared errors at blocks of 64: NF4 0.0085, E2M1 0.0112, bitsandbytes' FP4 0.0149, E3M0 0.0354."""
    W = torch.randn(512, 512, generator=torch.Generator().manual_seed(2))
    wanted = {"nf4": 0.0085, "fp4_e2m1": 0.0112, "fp4_bnb": 0.0149, "fp4_e3m0": 0.0354}
    for name, value in wanted.items():
        assert float((dequantize_ref(pack_float4(W, name)) - W).square().mean()) == pytest.approx(
            value, rel=0.03
        )


def test_column_exponents_shift_exactly():
    _, W = _data(1, 5, 48)
    exponents = torch.arange(48, dtype=torch.int8) % 7 - 3
    shifted = pack_float4(W * torch.exp2(exponents.float()), "fp4_e2m1", None, exponents=exponents)
    plain = pack_float4(W, "fp4_e2m1", None)
    assert torch.equal(dequantize_ref(shifted), dequantize_ref(plain) * torch.exp2(exponents.float()))


SHAPES = [
    (1, 1, 1, 64), (1, 3, 17, 64), (3, 17, 123, 64), (17, 5, 123, None), (2, 40, 256, 64), (5, 16, 192, 96),
    (65, 33, 64, 128), (3, 2, 1030, 64),
]  # fmt: skip


@triton_only
@pytest.mark.parametrize("M, N, K, block", SHAPES)
@pytest.mark.parametrize("double", [False, True])
def test_kernel_agrees_with_truth(poisoned, M, N, K, block, double):
    x, W = _data(M, N, K)
    weight = pack_float4(W, "nf4", block, double_quant=double)
    _close(nf4_matmul(x, weight, backend="triton"), x, weight)
    _close(nf4_matmul(x, weight), x, weight)


@triton_only
@pytest.mark.parametrize("name", FORMATS)
def test_kernel_in_half_precision_with_exponents(poisoned, name):
    x, W = _data(4, 20, 96)
    exponents = torch.arange(96, dtype=torch.int8) % 5 - 2
    weight = pack_float4(W, name, 32, double_quant=name == "nf4", outer_format="e4m3", exponents=exponents)
    _close(nf4_matmul(x, weight, backend="triton"), x, weight)
    y = nf4_matmul(x.half(), weight, backend="triton")
    assert y.dtype == torch.float16
    _close(y, x.half(), weight, 2.0**-10)


@triton_only
@given(
    M=st.integers(1, 20), N=st.integers(1, 40), K=st.integers(1, 200),
    block=st.sampled_from((None, 8, 24, 64, 100)), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_kernel_at_any_shape(M, N, K, block, seed):
    x, W = _data(M, N, K, seed)
    weight = pack_float4(W, "fp4_e2m1", block, double_quant=seed % 2 == 0)
    _close(nf4_matmul(x, weight, backend="triton"), x, weight)


@triton_only
def test_split_columns_add_up(poisoned):
    """A long row is cut in parts, which cover every column once."""
    x, W = _data(1, 2, 4097)
    weight = pack_float4(W, double_quant=True)
    _close(nf4_matmul(x, weight, backend="triton"), x, weight)


@triton_only
def test_batched_and_strided_inputs():
    x, W = _data(12, 6, 64)
    weight = pack_float4(W)
    strided = torch.stack([x, x + 1], -1)[..., 0]
    assert not strided.is_contiguous()
    y = nf4_matmul(strided.reshape(3, 4, 64), weight, backend="triton")
    assert y.shape == (3, 4, 6)
    _close(y.reshape(12, 6), x, weight)
    _close(nf4_matmul(x[:, ::2], pack_float4(W[:, ::2]), backend="triton"), x[:, ::2], pack_float4(W[:, ::2]))


def test_truth_in_float64_and_float16():
    x, W = _data(3, 4, 70)
    weight = pack_float4(W)
    assert nf4_matmul(x.double(), weight).dtype == torch.float64
    _close(nf4_matmul_ref(x.double(), weight), x, weight, 1e-14)
    with pytest.raises(RuntimeError, match="float64"):
        nf4_matmul(x.double(), weight, backend="triton")


def test_wrong_arguments_are_named():
    x, W = _data(3, 4, 70)
    weight = pack_float4(W)
    with pytest.raises(ValueError, match="x is empty"):
        nf4_matmul(x[:0], weight)
    with pytest.raises(ValueError, match="d_in 70"):
        nf4_matmul(x[:, :69], weight)
    with pytest.raises(ValueError, match="x must be float16"):
        nf4_matmul(x.int(), weight)
    with pytest.raises(ValueError, match="W is empty"):
        pack_float4(W[:0])
    with pytest.raises(ValueError, match="format 'nf5'"):
        pack_float4(W, "nf5")
    with pytest.raises(ValueError, match="absmax must have shape"):
        pack_float4(W, absmax=torch.ones(3))
    with pytest.raises(ValueError, match="outer and mean"):
        Float4Weight(weight.words, weight.absmax, torch.ones(1), None, None, 70)
    with pytest.raises(ValueError, match="words must have shape"):
        Float4Weight(weight.words, weight.absmax, None, None, None, 300)


@gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("M", [1, 17, 300])
def test_kernel_on_gpu(dtype, M):
    x, W = _data(M, 515, 1027)
    weight = pack_float4(W.cuda(), double_quant=True)
    unit = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-20}[dtype]
    x = x.cuda().to(dtype)
    _close(nf4_matmul(x, weight), x, weight, unit)
