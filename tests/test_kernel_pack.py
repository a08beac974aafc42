"""Packing: a bijection over all codes, for every width and odd shapes, in torch and in the kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.kernels import pack as kp
from requant.kernels._triton import HAS_TRITON
from requant.reference_impls import _quant

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="no triton"))]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_codes(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", kp.WIDTHS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (17, 123), (2, 4097), (5,), (2, 3, 33)], ids=str)
def test_round_trip_and_size(bits: int, shape: tuple[int, ...], backend: str):
    codes = random_codes(bits, *shape)
    words = kp.pack(codes, bits, backend=backend)
    assert words.dtype == torch.int32
    assert words.shape == (*shape[:-1], -(-shape[-1] // 32) * bits)
    again = kp.unpack(words, bits, shape[-1], backend=backend)
    assert again.dtype == torch.uint8 and torch.equal(again.long(), codes)


@pytest.mark.parametrize("bits", kp.WIDTHS)
def test_every_code_at_every_position(bits: int):
    positions = torch.eye(32, dtype=torch.int64).repeat(2**bits, 1)
    codes = positions * torch.arange(2**bits).repeat_interleave(32)[:, None]
    words = kp.pack_ref(codes, bits)
    assert torch.equal(kp.unpack_ref(words, bits, 32).long(), codes)
    nonzero = torch.unique(words[codes.any(1)], dim=0)
    assert nonzero.shape[0] == 32 * (2**bits - 1), "two codes share words"


@pytest.mark.parametrize("bits", kp.WIDTHS)
def test_words_are_the_bit_stream_of_the_diagram(bits: int):
    codes = random_codes(bits, 64)
    stream = sum(int(c) << (i * bits) for i, c in enumerate(codes))  # a Python integer of any length
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(2 * bits)]
    assert [int(w) & 0xFFFFFFFF for w in kp.pack(codes, bits)] == words
    assert torch.equal(kp.pack_ref(codes.cpu(), bits).view(torch.uint8), _quant.pack_bits(codes.cpu(), bits))


@given(st.sampled_from(kp.WIDTHS), st.integers(1, 5), st.integers(1, 150), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_any_shape(bits: int, rows: int, d_in: int, seed: int):
    codes = torch.randint(0, 2**bits, (rows, d_in), generator=torch.Generator().manual_seed(seed))
    words = kp.pack(codes, bits)
    assert torch.equal(kp.unpack(words, bits, d_in).long(), codes)
    padded = torch.nn.functional.pad(codes, (0, -d_in % 32))
    assert torch.equal(kp.unpack(words, bits, padded.shape[1]).long(), padded), "padding is not zero"
    if HAS_TRITON and DEVICE == "cpu":
        assert torch.equal(kp.pack(codes, bits, backend="triton"), words)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_and_every_integer_dtype(backend: str):
    codes = random_codes(4, 40, 9)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        words = kp.pack(codes.to(dtype).T, 4, backend=backend)
        assert torch.equal(words, kp.pack_ref(codes.T.contiguous(), 4))
    columns = kp.pack(codes.T, 4).T.contiguous().T
    assert not columns.is_contiguous()
    assert torch.equal(kp.unpack(columns, 4, 40, backend=backend).long(), codes.T)


@pytest.mark.skipif(not HAS_TRITON, reason="no triton")
@pytest.mark.parametrize("bits", kp.WIDTHS)
def test_kernel_writes_every_element(bits: int, monkeypatch: pytest.MonkeyPatch):
    codes = random_codes(bits, 3, 123)
    monkeypatch.setattr(
        torch, "empty", lambda *s, dtype, device: torch.full(s, 85, dtype=dtype, device=device)
    )
    words = kp.pack(codes, bits, backend="triton")
    assert torch.equal(words, kp.pack_ref(codes, bits))
    assert torch.equal(kp.unpack(words, bits, 123, backend="triton").long(), codes)


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.zeros(0, 4, dtype=torch.int32), 4, "codes is empty"),
        (torch.zeros(2, 0, dtype=torch.int32), 4, "codes is empty"),
        (torch.zeros(2, 4), 4, "codes must be uint8"),
        (torch.full((2, 4), 16), 4, r"codes must lie in 0..15, not 16..16"),
        (torch.full((2, 4), -1), 2, r"codes must lie in 0..3, not -1..-1"),
        (torch.zeros(2, 4, dtype=torch.int32), 5, "bits must be one of 1, 2, 3, 4, 8, not 5"),
    ],
    ids=["no-row", "no-column", "float", "too-large", "negative", "width"],
)
def test_pack_refuses(codes: torch.Tensor, bits: int, message: str):
    with pytest.raises(ValueError, match=message):
        kp.pack(codes, bits)


def test_unpack_refuses():
    words = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"words must have shape \(2, 6\), not \(2, 3\)"):
        kp.unpack(words, 3, 33)
    with pytest.raises(ValueError, match="d_in must be positive"):
        kp.unpack(words, 3, 0)
    with pytest.raises(ValueError, match="words must be int32"):
        kp.unpack(words.long(), 3, 32)
    with pytest.raises(ValueError, match="backend must be"):
        kp.unpack(words, 3, 32, backend="cuda")


@pytest.mark.parametrize("bits", kp.WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 32, 24, 5])
def test_packed_weight_is_the_affine_grid(bits: int, symmetric: bool, group_size: int | None):
    d_out, d_in = 7, 480
    n_groups = d_in // (group_size or d_in)
    codes, zeros = random_codes(bits, d_out, d_in).cpu(), random_codes(bits, d_out, n_groups).cpu()
    scale = torch.rand(d_out, n_groups).half() + 0.5
    weight = kp.pack_weight(codes, scale, None if symmetric else zeros, bits, group_size)
    zero = torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros
    grid = codes.reshape(d_out, n_groups, -1)
    truth = _quant.dequantize(grid.double(), scale.double()[..., None], zero.double()[..., None]).flatten(1)
    assert torch.equal(kp.dequantize_ref(weight, torch.float64), truth)
    words = d_in // 32 * bits + (0 if symmetric else -(-n_groups // 32) * bits)
    assert weight.stored_bytes == d_out * (4 * words + 2 * n_groups)
    assert weight.bits_per_weight == 8 * weight.stored_bytes / (d_out * d_in)


def test_zero_points_are_stored_as_they_are():
    """Not minus one, as the first GPTQ files had them."""
    zeros = torch.arange(16).reshape(1, 16)
    weight = kp.pack_weight(torch.zeros(1, 256, dtype=torch.int32), torch.ones(1, 16), zeros, 4, 16)
    assert torch.equal(kp.unpack_ref(weight.zero_point, 4, 16).long(), zeros)
    assert torch.equal(kp.dequantize_ref(weight)[:, ::16], -zeros.float())


def test_packed_weight_refuses():
    codes, scale = torch.zeros(2, 64, dtype=torch.int32), torch.ones(2, 2)
    with pytest.raises(ValueError, match="group_size 48 does not divide d_in 64"):
        kp.pack_weight(codes, scale, None, 4, 48)
    with pytest.raises(ValueError, match=r"scale must have shape \(2, 4\), not \(2, 2\)"):
        kp.pack_weight(codes, scale, None, 4, 16)
    with pytest.raises(ValueError, match=r"zero_point must have shape \(2, 2\), not \(2, 1\)"):
        kp.pack_weight(codes, scale, torch.zeros(2, 1, dtype=torch.int32), 4, 32)
    with pytest.raises(ValueError, match="scale must be float16"):
        kp.pack_weight(codes, scale.int(), None, 4, 32)
