"""Codebook matmul: AQLM's and VPTQ's storage against a decoder written from the papers' formulas, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.kernels import bitstream
from requant.kernels._triton import INTERPRET
from requant.kernels.codebook import CodebookWeight, ColumnParts, decode_ref, pack_codebook
from requant.kernels.codebook_matmul import codebook_matmul
from requant.kernels.pack import pack

interpreted = pytest.mark.skipif(
    not INTERPRET, reason="needs TRITON_INTERPRET=1 set before triton is imported"
)
gpu = pytest.mark.gpu


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN, so that an element nobody writes is seen."""
    empty = torch.empty

    def nan(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(-77)

    monkeypatch.setattr(torch, "empty", nan)


def draw(seed: int, d_out: int, d_in: int, widths, v: int, along: str, sets: int = 1, scaled: bool = True):
    """A random weight, its codes [n_rows, places, M], its codebooks by name and its scale."""
    g = torch.Generator().manual_seed(seed)
    n_rows, places = (d_out, -(-d_in // v)) if along == "input" else (-(-d_out // v), d_in)
    codes = torch.stack([torch.randint(0, 2**b, (n_rows, places), generator=g) for b in widths], -1)
    books = [torch.randn(sets, 2**b, v, generator=g).half() for b in widths]
    scale = (torch.rand(d_out, generator=g) + 0.5).half() if scaled else None
    return pack_codebook(codes, torch.cat(books, 1), scale, widths, (d_out, d_in), along), codes, books, scale


def plain(codes, books, scale, d_out: int, d_in: int, along: str) -> torch.Tensor:
    """The papers' sums, element by element: W[n, k] in float64."""
    _, places, n_books = codes.shape
    sets, v = books[0].shape[0], books[0].shape[2]
    W = torch.zeros(d_out, d_in, dtype=torch.float64)
    for n in range(d_out):
        for k in range(d_in):
            row, place, lane = (n, k // v, k % v) if along == "input" else (n // v, k, n % v)
            which = place // -(-places // sets)
            W[n, k] = sum(float(books[m][which, codes[row, place, m], lane]) for m in range(n_books))
    return W if scale is None else W * scale.double()[:, None]


def rows(n: int, d_in: int, dtype=torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(y: torch.Tensor, x: torch.Tensor, W: torch.Tensor) -> None:
    """Against float64; the tolerance is of float32 sums, or of weights and output rounded to x's dtype."""
    truth = x.double() @ W.T
    size = (x.double().abs() @ W.abs().T).clamp(min=1e-6)
    eps = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[x.dtype]
    assert y.dtype == x.dtype and y.shape == truth.shape
    assert ((y.double() - truth).abs() / size).max() < eps


# --- the stream of codes


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(1, 16), min_size=1, max_size=4), st.integers(0, 9))
def test_stream_gives_back_every_code(places: int, widths: list[int], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(0, 2**b, (3, places), generator=g) for b in widths], -1)
    words = bitstream.pack_stream(codes, tuple(widths))
    assert words.shape == (3, -(-places * sum(widths) // 32)) and words.dtype == torch.int32
    assert torch.equal(bitstream.unpack_stream(words, tuple(widths), places), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_stream_of_one_width_is_what_pack_writes(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 64), generator=torch.Generator().manual_seed(0))
    assert torch.equal(bitstream.pack_stream(codes[..., None], (bits,)), pack(codes, bits))


def test_stream_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"codes\[\.\.\., 1\] must lie in 0\.\.7: 0\.\.8"):
        bitstream.pack_stream(torch.tensor([[[0, 0], [0, 8]]]), (4, 3))
    with pytest.raises(ValueError, match="1 to 16 bits"):
        bitstream.pack_stream(torch.zeros(1, 1, 1, dtype=torch.int64), (17,))
    with pytest.raises(ValueError, match="words must have shape"):
        bitstream.unpack_stream(torch.zeros(2, 3, dtype=torch.int32), (12,), 9)


# --- decoding

FORMATS = {  # name -> widths, v, along, sets
    "aqlm-1x16": ((16,), 8, "input", 1),
    "aqlm-2x8": ((8, 8), 8, "input", 1),
    "aqlm-8x8": ((8,) * 8, 8, "input", 1),
    "aqlm-2x12": ((12, 12), 8, "input", 1),
    "aqlm-1x15": ((15,), 8, "input", 1),
    "vptq-v6": ((12,), 6, "output", 1),
    "vptq-v12-residual": ((12, 12), 12, "output", 4),
    "vptq-v8-16-8": ((16, 8), 8, "output", 1),
    "vectors-of-one": ((3,), 1, "input", 3),
    "vectors-of-five": ((5, 4, 4), 5, "input", 2),
}


@pytest.mark.parametrize("name", FORMATS)
def test_decoded_weight_is_the_sum_of_entries(name: str) -> None:
    widths, v, along, sets = FORMATS[name]
    weight, *parts = draw(3, 13, 27, widths, v, along, sets)
    W = plain(*parts, 13, 27, along)
    assert torch.equal(decode_ref(weight, torch.float64), W)
    places = 13 * 4 if name.startswith("aqlm") else None
    if places:  # codes are bits / 8 a weight of the padded row, to whole words
        assert weight.words.numel() == 13 * -(-4 * sum(widths) // 32)
    assert weight.stored_bytes == sum(t.numel() * t.element_size() for t in weight.tensors.values())


def test_bits_are_those_of_the_formula() -> None:
    """AQLM: M B / g + 16 g M 2^B / (d_out d_in) + 16 / d_in."""
    weight, *_ = draw(0, 64, 256, (8, 8), 8, "input")
    bits = 2 * 8 / 8 + 16 * 8 * 2 * 2**8 / (64 * 256) + 16 / 256
    assert 8 * weight.stored_bytes / (64 * 256) == pytest.approx(bits, abs=1e-12)


# --- the product


@interpreted
@pytest.mark.parametrize("n", [1, 3, 17])
@pytest.mark.parametrize("name", FORMATS)
def test_kernel_agrees_with_float64(name: str, n: int, poisoned) -> None:
    widths, v, along, sets = FORMATS[name]
    weight, *_ = draw(n, 41, 123, widths, v, along, sets)
    x = rows(n, 123)
    W = decode_ref(weight, torch.float64)
    assert_close(codebook_matmul(x, weight, backend="triton"), x, W)
    assert_close(codebook_matmul(x, weight), x, W)


@interpreted
@pytest.mark.parametrize(
    ("n", "d_out", "d_in"), [(1, 1, 1), (2, 1, 300), (1, 100, 8), (70, 7, 40), (1, 3, 4097)]
)
def test_kernel_takes_any_shape(n: int, d_out: int, d_in: int, poisoned) -> None:
    for along in ("input", "output") if d_in < 4097 else ("input",):
        weight, *_ = draw(5, d_out, d_in, (8,), 8, along, scaled=False)
        x = rows(n, d_in)
        assert_close(codebook_matmul(x, weight, backend="triton"), x, decode_ref(weight, torch.float64))


@interpreted
@settings(max_examples=10, deadline=None)
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 50), st.integers(1, 90)),
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3)),
    st.integers(1, 12),
    st.sampled_from(["input", "output"]),
    st.integers(1, 3),
)
def test_kernel_takes_any_code(shape, widths: tuple[int, int, int], v: int, along: str, sets: int) -> None:
    (n, d_out, d_in), (first, other, n_books) = shape, widths
    places = -(-d_in // v) if along == "input" else d_in
    bits = (first, *[other] * (n_books - 1))
    weight, *_ = draw(n, d_out, d_in, bits, v, along, min(sets, places))
    x = rows(n, d_in)
    assert_close(codebook_matmul(x, weight, backend="triton"), x, decode_ref(weight, torch.float64))


@interpreted
def test_kernel_half_precision_and_leading_dimensions(poisoned) -> None:
    weight, *_ = draw(5, 33, 64, (8, 8), 8, "input")
    x = rows(12, 64, torch.float16)
    y = codebook_matmul(x.reshape(2, 6, 64), weight, backend="triton")
    assert_close(y.reshape(12, 33), x, decode_ref(weight, torch.float64))
    spread = rows(12, 128)[:, ::2]  # not contiguous
    assert_close(codebook_matmul(spread, weight, backend="triton"), spread, decode_ref(weight, torch.float64))


def vptq(seed: int, d_out: int, n_outlier: int, d_in: int, dtype=torch.int32) -> ColumnParts:
    """Outlier columns with vectors of 4, the rest with 6 and a residual, in permuted order."""
    outlier, *_ = draw(seed, d_out, n_outlier, (10,), 4, "output", scaled=False)
    rest, *_ = draw(seed + 1, d_out, d_in - n_outlier, (8, 8), 6, "output", 3, scaled=False)
    order = torch.randperm(d_in, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return ColumnParts((outlier, rest), order)


def test_order_names_the_column_each_place_holds() -> None:
    weight = vptq(2, 10, 3, 20)
    W = decode_ref(weight, torch.float64)
    parts = torch.cat([decode_ref(part, torch.float64) for part in weight.parts], 1)
    for place, column in enumerate(weight.order.tolist()):
        assert torch.equal(W[:, column], parts[:, place])


@interpreted
@pytest.mark.parametrize("ordered", [torch.int32, torch.int16, None])
@pytest.mark.parametrize("n", [1, 5])
def test_outlier_columns_and_permutation(n: int, ordered, poisoned) -> None:
    weight = vptq(4, 29, 5, 77, ordered or torch.int32)
    if ordered is None:
        weight = ColumnParts(weight.parts)
    x = rows(n, 77)
    assert_close(codebook_matmul(x, weight, backend="triton"), x, decode_ref(weight, torch.float64))
    assert_close(codebook_matmul(x, weight), x, decode_ref(weight, torch.float64))


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("n", [1, 16, 300])
def test_gpu_agrees_with_float64(n: int, name: str, dtype: torch.dtype) -> None:
    widths, v, along, sets = FORMATS[name]
    weight, *_ = draw(n, 1024, 4097, widths, v, along, sets)
    moved = {key: t.cuda() for key, t in weight.tensors.items()}
    on_gpu = CodebookWeight(
        moved["words"], moved["codebooks"], moved["scale"], widths, 1024, 4097, weight.along
    )
    x = rows(n, 4097, dtype)
    assert_close(codebook_matmul(x.cuda(), on_gpu).cpu(), x, decode_ref(weight, torch.float64))


def test_wrong_arguments_are_named() -> None:
    weight, codes, books, scale = draw(0, 6, 16, (4,), 8, "input")
    with pytest.raises(ValueError, match="x is empty"):
        codebook_matmul(torch.zeros(0, 16), weight)
    with pytest.raises(ValueError, match="d_in=16"):
        codebook_matmul(torch.zeros(2, 15), weight)
    with pytest.raises(ValueError, match="x must be float16"):
        codebook_matmul(torch.zeros(2, 16, dtype=torch.int64), weight)
    with pytest.raises(ValueError, match=r"words must have shape \(6, 1\)"):
        pack_codebook(codes[:5], books[0], scale, (4,), (6, 16))
    with pytest.raises(ValueError, match=r"codebooks must have shape \(1, 16, 8\)"):
        pack_codebook(codes, books[0][:, :15], scale, (4,), (6, 16))
    with pytest.raises(ValueError, match="after the first must be equal"):
        pack_codebook(codes.expand(-1, -1, 3), books[0], scale, (4, 5, 6), (6, 16))
    with pytest.raises(ValueError, match="permutation"):
        ColumnParts((weight,), torch.zeros(16, dtype=torch.int32))
    with pytest.raises(ValueError, match="same d_out"):
        ColumnParts((weight, draw(0, 7, 16, (4,), 8, "input")[0]))
    if not torch.cuda.is_available() and not INTERPRET:
        with pytest.raises(RuntimeError, match="cannot run"):
            codebook_matmul(torch.zeros(2, 16), weight, backend="triton")
