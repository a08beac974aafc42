"""Weight-only matmul against float64: every width, path and way scales may lie, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.kernels import int_matmul as im
from requant.kernels._triton import HAS_TRITON
from requant.kernels.pack import PackedWeight, dequantize_ref, pack_weight

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="no triton"))]
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="no triton")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA, reason="bfloat16 needs a GPU: the interpreter is wrong in it"),
]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Largest error over |x| |W| and a grid step times |x|: float32 sums; then one rounding of the output (2^-11, 2^-8)."""


def make(
    bits: int, d_out: int, d_in: int, group_size: int | None, symmetric: bool, scale_dtype=torch.float16
) -> PackedWeight:
    g = torch.Generator().manual_seed(bits * d_in + d_out)
    n_groups = d_in // (group_size or d_in)
    codes = torch.randint(0, 2**bits, (d_out, d_in), generator=g)
    zeros = None if symmetric else torch.randint(0, 2**bits, (d_out, n_groups), generator=g).to(DEVICE)
    scale = (torch.rand(d_out, n_groups, generator=g) + 0.5) / 2**bits
    return pack_weight(codes.to(DEVICE), scale.to(scale_dtype).to(DEVICE), zeros, bits, group_size)


def make_x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype).to(DEVICE)


def assert_close(y: torch.Tensor, x: torch.Tensor, weight: PackedWeight, factor: float = 1.0) -> None:
    truth = im.int_matmul_ref(x.double(), weight)
    assert y.dtype == x.dtype and y.shape == truth.shape
    magnitude = x.double().abs() @ dequantize_ref(weight, torch.float64).abs().T
    magnitude += x.double().abs().sum(-1, keepdim=True) * weight.scale.double().amax(1)
    error = ((y.double() - truth).abs() / magnitude).max()
    assert error <= factor * TOLERANCE[x.dtype], float(error)


@needs_triton
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    ("rows", "d_in", "group_size"),
    [(1, 123, None), (2, 128, 64), (3, 128, 32), (17, 123, None), (1, 96, 24)],
    ids=["gemv", "gemv-grouped", "tile-split", "tile", "odd-groups"],
)
def test_kernel_agrees_with_float64(bits: int, rows: int, d_in: int, group_size: int | None, symmetric: bool):
    weight = make(bits, 17, d_in, group_size, symmetric)
    x = make_x(rows, d_in)
    assert_close(im.int_matmul(x, weight, backend="triton"), x, weight)


@needs_triton
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=on_gpu)], ids=str
)
@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize("group_size", [None, 64, 24])
def test_dtypes(dtype: torch.dtype, rows: int, group_size: int | None):
    weight = make(4, 40, 192, group_size, False, torch.float32 if dtype == torch.float32 else torch.float16)
    x = make_x(rows, 192, dtype=dtype)
    # weights of odd groups are rounded to x's dtype before the dot, each by at most half a unit
    assert_close(im.int_matmul(x, weight, backend="triton"), x, weight, 2.0 if group_size == 24 else 1.0)


@needs_triton
@pytest.mark.parametrize("rows", [1, 3])
def test_long_odd_inner_dimension_is_split(rows: int, monkeypatch: pytest.MonkeyPatch):
    seen = []
    real = im.sum_parts
    monkeypatch.setattr(
        im, "sum_parts", lambda parts, dtype: seen.append(parts.shape[0]) or real(parts, dtype)
    )
    weight = make(4, 3, 4097, None, True)
    x = make_x(rows, 4097)
    assert_close(im.int_matmul(x, weight, backend="triton"), x, weight)
    assert seen and seen[0] > 1, "K was not split"


@needs_triton
@pytest.mark.parametrize(("rows", "d_in"), [(1, 123), (1, 1100), (6, 300), (33, 123)])
def test_kernel_writes_every_output(rows: int, d_in: int, monkeypatch: pytest.MonkeyPatch):
    weight, x = make(3, 37, d_in, None, False), make_x(rows, d_in)
    real = torch.full

    def poisoned(*size: int, dtype: torch.dtype, device) -> torch.Tensor:
        return real(size, float("nan") if dtype.is_floating_point else 85, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", poisoned)
    y = im.int_matmul(x, weight, backend="triton")
    monkeypatch.undo()
    assert_close(y, x, weight)


@needs_triton
@given(
    st.sampled_from([2, 3, 4, 8]), st.integers(1, 20), st.integers(1, 40), st.integers(1, 6),
    st.sampled_from([1, 3, 8, 16, 24, 32, 40]), st.booleans(),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_any_shape_and_group(bits: int, rows: int, d_out: int, n_groups: int, size: int, symmetric: bool):
    weight = make(bits, d_out, n_groups * size, size, symmetric)
    x = make_x(rows, n_groups * size)
    assert_close(im.int_matmul(x, weight, backend="triton"), x, weight, 2.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_and_batched_inputs(backend: str):
    weight = make(4, 17, 64, 32, True)
    x = make_x(64, 3, 5).permute(1, 2, 0)
    assert not x.is_contiguous()
    y = im.int_matmul(x, weight, backend=backend)
    assert y.shape == (3, 5, 17)
    assert_close(y, x, weight)
    vector = make_x(64)
    assert_close(im.int_matmul(vector, weight, backend=backend), vector, weight)
    strided = PackedWeight(weight.words.T.contiguous().T, weight.scale.T.contiguous().T, None, 4, 64, 32)
    assert torch.equal(im.int_matmul(x, strided, backend=backend), y)


@needs_triton
def test_same_bits_every_time():
    weight, x = make(4, 33, 1024, 128, False), make_x(4, 1024)
    first = im.int_matmul(x, weight, backend="triton")
    assert torch.equal(first, im.int_matmul(x, weight, backend="triton"))


def test_refuses():
    weight = make(4, 5, 64, 32, True)
    for x, message in (
        (make_x(2, 63), r"x must have d_in=64 as its last dimension, not shape \(2, 63\)"),
        (torch.zeros(0, 64, device=DEVICE), "x is empty"),
        (torch.zeros(2, 64, dtype=torch.float64, device=DEVICE), "x must be float16 or bfloat16 or float32"),
        (torch.zeros(2, 64, dtype=torch.int8, device=DEVICE), "x must be float16"),
    ):
        with pytest.raises(ValueError, match=message):
            im.int_matmul(x, weight)


def test_asking_for_triton_where_it_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch):
    shared = __import__("requant.kernels._triton", fromlist=["x"])
    weight, x = make(4, 5, 64, 32, True), make_x(2, 64)
    monkeypatch.setattr(shared, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        im.int_matmul(x, weight, backend="triton")
    monkeypatch.undo()
    if HAS_TRITON and not CUDA:
        monkeypatch.setattr(shared, "INTERPRET", False)
        with pytest.raises(RuntimeError, match="a tensor is on cpu"):
            im.int_matmul(x, weight, backend="triton")
