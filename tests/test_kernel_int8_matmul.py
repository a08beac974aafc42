"""int8 matmul and W4A8 with integer group scales, against float64; integer sums are exact on every path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.kernels import int8_matmul as i8
from requant.kernels import w4a8_matmul as w4
from requant.kernels._triton import HAS_TRITON
from requant.reference_impls import _quant

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="no triton")
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA, reason="bfloat16 needs a GPU: the interpreter is wrong in it"),
]
EXACT = 3e-7
"""Integer sums are exact: what is left is their rounding to float32 and two products."""


def codes(*shape: int, low: int = -128) -> torch.Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randint(low, 128, shape, generator=g, dtype=torch.int8).to(DEVICE)


def scales(*shape: int) -> torch.Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(7)) * 0.01 + 0.001).to(DEVICE)


def error(y: torch.Tensor, truth: torch.Tensor) -> float:
    assert y.shape == truth.shape
    return float(((y.double() - truth).abs() / truth.abs().max()).max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_tensor", [False, True], ids=["per-channel", "per-tensor"])
@pytest.mark.parametrize(("rows", "d_out", "d_in"), [(1, 17, 123), (3, 40, 257), (17, 33, 129), (20, 1, 1)])
def test_w8a8(rows: int, d_out: int, d_in: int, per_tensor: bool, backend: str):
    x, w, x_scale = codes(rows, d_in), codes(d_out, d_in), scales(rows, 1)
    w_scale = scales(1)[0] if per_tensor else scales(d_out)
    y = i8.int8_matmul(x, w, x_scale, w_scale, backend=backend)
    assert error(y, i8.int8_matmul_ref(x, w, x_scale, w_scale, torch.float64)) < EXACT


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_are_exact_where_float32_is_not(backend: str):
    x, w = torch.full((2, 4097), -128, dtype=torch.int8), torch.full((3, 4097), -128, dtype=torch.int8)
    w[0, 0] = -127
    one = torch.ones(1).to(DEVICE)
    y = i8.int8_matmul(x.to(DEVICE), w.to(DEVICE), one, one, backend=backend)
    assert y[0].tolist() == [float(torch.tensor(4097 * 2**14 - 128).float()), *[float(4097 * 2**14)] * 2]


@pytest.mark.parametrize("d_in", [5, 1024, 1025, 3000])
def test_both_products_of_the_cpu_are_the_same_integers(d_in: int):
    """With and without instructions for int8 products."""
    for x, w in (
        (codes(7, d_in), codes(9, d_in)),
        (torch.full((2, d_in), -128, dtype=torch.int8), torch.full((3, d_in), -128, dtype=torch.int8)),
    ):
        truth = (x.cpu().double() @ w.cpu().double().T).int()
        assert torch.equal(i8._float_product(x.cpu(), w.cpu()), truth)
        assert torch.equal(torch._int_mm(x.cpu(), w.cpu().T), truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=on_gpu)], ids=str
)
def test_output_dtype_and_batch(dtype: torch.dtype, backend: str):
    x, w = codes(2, 3, 64), codes(16, 64)
    y = i8.int8_matmul(x, w, scales(2, 3, 1), scales(16), out_dtype=dtype, backend=backend)
    assert y.dtype == dtype
    truth = i8.int8_matmul_ref(x, w, scales(2, 3, 1), scales(16), torch.float64)
    assert error(y, truth) < {torch.float32: EXACT, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=on_gpu)], ids=str
)
@pytest.mark.parametrize("shape", [(1, 1), (3, 123), (2, 2, 4097)], ids=str)
def test_per_token_codes_are_the_references(shape: tuple[int, ...], dtype: torch.dtype, backend: str):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype).to(DEVICE)
    x[0] = 0  # a row of zeros has a scale, too
    q, scale = i8.quantize_per_token(x, backend=backend)
    assert q.dtype == torch.int8 and scale.shape == (*shape[:-1], 1)
    assert torch.equal(scale, _quant.absmax_scale(x.float(), 8))
    assert torch.equal(q.float() * scale, _quant.absmax_fake_quant(x.float(), 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_round_to_even_and_clipping_saturates(backend: str):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]]).to(DEVICE)
    q, scale = i8.quantize_per_token(x, backend=backend)
    assert float(scale) == 1.0 and q.tolist() == [[127, 0, 2, 2, 0, -2, -126]]
    q, scale = i8.quantize_per_token(x, 0.5, backend=backend)
    assert float(scale) == 0.5 and q.tolist() == [[127, 1, 3, 5, -1, -3, -127]]


def make_w4(d_out: int, d_in: int, group_size: int, amplifier: int | None = 1024):
    w = torch.randint(0, 16, (d_out, d_in), generator=torch.Generator().manual_seed(d_in)).to(DEVICE)
    scale = scales(d_out, d_in // group_size)
    return w, scale, w4.pack_integer_scale(w, scale, group_size, amplifier)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "d_in", "group"), [(1, 128, 32), (3, 192, 64), (17, 256, 128), (2, 96, 96)])
def test_w4a8(rows: int, d_in: int, group: int, backend: str):
    _, _, weight = make_w4(17, d_in, group)
    x, x_scale = codes(rows, d_in, low=-127), scales(rows, 1)
    y = w4.w4a8_matmul(x, weight, x_scale, backend=backend)
    assert error(y, w4.w4a8_matmul_ref(x, weight, x_scale)) < EXACT


def test_w4a8_takes_odd_groups_in_the_reference_only():
    _, _, weight = make_w4(5, 60, 20)
    x, x_scale = codes(3, 60), scales(3, 1)
    assert error(w4.w4a8_matmul(x, weight, x_scale), w4.w4a8_matmul_ref(x, weight, x_scale)) < EXACT
    with pytest.raises(RuntimeError, match="group_size 20 is no multiple of 32"):
        w4.w4a8_matmul(x, weight, x_scale, backend="triton")


def test_integer_scales_keep_to_the_bound():
    """|S / amplifier - s| <= 0.5 / amplifier; exact where s * amplifier is an integer (arXiv:2405.14597)."""
    s = scales(50, 8)
    for amplifier in (1024, 4096, 2**16):
        integers, used = w4.integer_scale(s, amplifier)
        assert used == amplifier and integers.dtype == torch.int16
        assert ((integers.double() / amplifier - s.double()).abs() <= 0.5 / amplifier).all()
    exact = torch.tensor([[3 / 1024, 1 / 1024]])
    assert torch.equal(w4.integer_scale(exact)[0], torch.tensor([[3, 1]], dtype=torch.int16))


def test_amplifier_is_found_by_doubling():
    for smallest, wanted in ((1.0, 1), (0.6, 2), (0.5, 2), (0.3, 4), (1e-3, 1024), (3.0, 1)):
        assert w4.integer_scale(torch.tensor([smallest, 5.0]), None)[1] == wanted


def test_w4a8_stores_as_many_bits_as_float_scales():
    _, _, weight = make_w4(4, 256, 128)
    assert weight.bits_per_weight == 4 + 16 / 128


@needs_triton
@given(st.integers(1, 20), st.integers(1, 40), st.integers(1, 200), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_any_shape_is_exact(rows: int, d_out: int, d_in: int, seed: int):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (rows, d_in), generator=g, dtype=torch.int8).to(DEVICE)
    w = torch.randint(-128, 128, (d_out, d_in), generator=g, dtype=torch.int8).to(DEVICE)
    one = torch.ones(1).to(DEVICE)
    truth = x.double() @ w.double().T  # below 2^24: exact in float32
    assert torch.equal(i8.int8_matmul(x, w, one, one, backend="triton").double(), truth)
    assert torch.equal(i8.int8_matmul(x, w, one, one, backend="reference").double(), truth)


@needs_triton
@pytest.mark.parametrize(("rows", "d_in"), [(2, 128), (2, 1280), (33, 130)])
def test_kernels_write_every_output(rows: int, d_in: int, monkeypatch: pytest.MonkeyPatch):
    x, w, x_scale = codes(rows, d_in), codes(37, d_in), scales(rows, 1)
    real = torch.full
    worst = {torch.int32: -(2**31) + 1, torch.int8: 85}
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *s, dtype, device: real(
            s[0] if isinstance(s[0], tuple) else s, worst.get(dtype, float("nan")), dtype=dtype, device=device
        ),
    )
    y = i8.int8_matmul(x, w, x_scale, scales(37), backend="triton")
    q, scale = i8.quantize_per_token(y, backend="triton")
    monkeypatch.undo()
    assert error(y, i8.int8_matmul_ref(x, w, x_scale, scales(37), torch.float64)) < EXACT
    assert torch.equal(q, i8.quantize_per_token_ref(y)[0]) and bool(scale.isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(backend: str):
    x, w = codes(64, 5).T, codes(64, 24).T
    y = i8.int8_matmul(x, w, scales(5, 1), scales(24), backend=backend)
    assert error(y, i8.int8_matmul_ref(x, w, scales(5, 1), scales(24), torch.float64)) < EXACT
    floats = torch.randn(40, 6).to(DEVICE).T
    for got, wanted in zip(
        i8.quantize_per_token(floats, backend=backend), i8.quantize_per_token_ref(floats), strict=True
    ):
        assert torch.equal(got, wanted)


def test_refuses():
    x, w, one = codes(2, 8), codes(3, 8), torch.ones(1).to(DEVICE)
    for args, message in (
        ((x[:0], w, one, one), "x is empty"),
        ((x.float(), w, one, one), "x must be int8, not float32"),
        ((x, w.float(), one, one), "w must be int8"),
        ((x[:, :7], w, one, one), "x must have the weight's d_in=8"),
        ((x, w, scales(3), one), "x_scale must hold 1 or 2 values, not 3"),
        ((x, w, one, scales(2)), "w_scale must hold 1 or 3 values, not 2"),
    ):
        with pytest.raises(ValueError, match=message):
            i8.int8_matmul(*args)
    with pytest.raises(ValueError, match="above 131071"):
        i8.int8_matmul(x, torch.empty(1, 2**17, dtype=torch.int8), one, one)
    with pytest.raises(ValueError, match="out_dtype must be"):
        i8.int8_matmul(x, w, one, one, out_dtype=torch.int32)
    with pytest.raises(ValueError, match="x must be float16"):
        i8.quantize_per_token(x)


def test_integer_scale_refuses():
    w = torch.zeros(2, 64, dtype=torch.int32)
    for scale, amplifier, message in (
        (torch.full((2, 2), 1e-4), 1024, r"rounds the scale 0.0001 to 0; use a larger one"),
        (torch.full((2, 2), 0.1), 1000, "amplifier 1000 is no power of two"),
        (torch.zeros(2, 2), 1024, "scales must be positive and finite"),
        (torch.full((2, 2), 40.0), 2**20, r"could leave int32; use a smaller amplifier"),
        (torch.ones(2, 3), 1024, r"scale must have shape \(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            w4.pack_integer_scale(w, scale, 32, amplifier)
