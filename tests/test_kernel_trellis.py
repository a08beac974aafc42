"""Trellis matmul: QTIP's codes, walks and tiles, with a small Viterbi encoder as the source of real codes."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.kernels._triton import INTERPRET
from requant.kernels.trellis_matmul import (
    CODES,
    TrellisWeight,
    code_values,
    decode_ref,
    pack_states,
    trellis_matmul,
    unpack_states,
)

interpreted = pytest.mark.skipif(
    not INTERPRET, reason="needs TRITON_INTERPRET=1 set before triton is imported"
)
gpu = pytest.mark.gpu


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN, so that an element nobody writes is seen."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


def table(index_bits: int = 9) -> torch.Tensor:
    return torch.randn(2**index_bits, 2, generator=torch.Generator().manual_seed(1)).half()


def draw(code: str, bits: int, d_out: int, d_in: int, state_bits: int = 16, seed: int = 0) -> TrellisWeight:
    """A weight of random bits: every string of 256 K bits is a closed walk."""
    g = torch.Generator().manual_seed(seed)
    shape = (-(-d_out // 16), -(-d_in // 16), 8 * bits)
    words = torch.randint(-(2**31), 2**31, shape, generator=g).int()
    scale = torch.rand(1, generator=g) + 0.5
    return TrellisWeight(
        words, scale, code, bits, d_out, d_in, table() if code == "hyb" else None, state_bits
    )


def assert_close(y: torch.Tensor, x: torch.Tensor, W: torch.Tensor) -> None:
    """Against float64; the tolerance is of float32 sums, or of weights and output rounded to x's dtype."""
    truth = x.double() @ W.T
    size = (x.double().abs() @ W.abs().T).clamp(min=1e-6)
    eps = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[x.dtype]
    assert y.dtype == x.dtype and y.shape == truth.shape
    assert ((y.double() - truth).abs() / size).max() < eps


def rows(n: int, d_in: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(n)).to(dtype)


# --- codes, in Python's own integers


def half(bits: int) -> float:
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def spelled_out(x: int, code: str, lut: torch.Tensor) -> list[float]:
    """The values of a state, from the definition."""
    if code == "1mad":
        x = (34038481 * x + 76625530) % 2**32
        return [(sum(x.to_bytes(4, "little")) - 510) / 147.800537109375]
    if code == "3inst":
        x = (89226354 * x + 64248484) % 2**32
        x = (x & 0x8FFF8FFF) ^ 0x3B603B60
        return [half(struct.unpack("<H", struct.pack("<e", half(x >> 16) + half(x & 0xFFFF)))[0])]
    x = (x * x + x) % 2**32
    first, second = lut[(x >> 6) % 512].tolist()
    return [first, -second if x & 2**15 else second]


@pytest.mark.parametrize("code", CODES)
def test_code_is_the_definition(code: str) -> None:
    states = torch.cat([torch.arange(64), torch.randint(0, 2**16, (300,)), torch.tensor([2**16 - 1])])
    values = code_values(states, code, table(), torch.float64)
    expected = [spelled_out(x, code, table()) for x in states.tolist()]
    assert torch.equal(values, torch.tensor(expected, dtype=torch.float64))


def test_codes_have_the_spread_of_a_gaussian() -> None:
    states = torch.arange(2**16)
    mad = code_values(states, "1mad", dtype=torch.float64)
    assert mad.abs().max() <= 510 / 147.8 and mad.std() == pytest.approx(1.0, abs=0.01)
    assert mad.mean().abs() < 0.02
    assert code_values(states, "3inst", dtype=torch.float64).std() == pytest.approx(1.24, abs=0.02)


# --- walks


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2]), st.sampled_from([8, 11, 16]), st.integers(0, 99)
)
def test_words_are_closed_walks_and_back(bits: int, step: int, state_bits: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (2, 3, 8 * bits), generator=g).int()
    states = unpack_states(words, bits, step, state_bits)
    new = bits * step
    assert states.shape == (2, 3, 256 // step)
    assert torch.equal(states >> new, states.roll(1, -1) & (2 ** (state_bits - new) - 1))
    assert torch.equal(pack_states(states, bits, step, state_bits), words)


def test_first_state_is_the_top_of_word_zero() -> None:
    words = torch.zeros(16, dtype=torch.int32)
    words[0], words[15] = 0x12345678, 0x0000ABCD
    states = unpack_states(words, 2, 1)
    assert [hex(x) for x in states[:3].tolist()] == ["0x1234", "0x48d1", "0x2345"]
    assert hex(states[-1]) == hex((0b01 << 14) | (0x1234 >> 2))  # goes round


def test_broken_walk_is_refused() -> None:
    states = unpack_states(torch.zeros(16, dtype=torch.int32), 2, 1)
    states[7] = 5
    with pytest.raises(ValueError, match="closed walk"):
        pack_states(states, 2, 1)


# --- an encoder


def viterbi(x: torch.Tensor, values: torch.Tensor, new: int, overlap: torch.Tensor | None = None):
    """Cheapest walk: x [n, steps, V], values [states, V] -> states [n, steps]; overlap fixes both ends' shared bits."""
    n, steps, _ = x.shape
    count = len(values)
    keep = count >> new  # states with the same new bits dropped
    state = torch.arange(count)
    cost = (x[:, 0, None] - values).square().sum(-1)
    if overlap is not None:
        cost = cost.masked_fill(state >> new != overlap[:, None], torch.inf)
    choices = []
    for t in range(1, steps):
        best, choice = cost.view(n, 2**new, keep).min(1)
        choices.append(choice)
        cost = best.repeat_interleave(2**new, 1) + (x[:, t, None] - values).square().sum(-1)
    if overlap is not None:
        cost = cost.masked_fill(state & (keep - 1) != overlap[:, None], torch.inf)
    walk = [cost.argmin(1)]
    for choice in reversed(choices):
        last = walk[-1] >> new
        walk.append(choice.gather(1, last[:, None])[:, 0] * keep + last)
    return torch.stack(walk[::-1], 1)


def encode(W: torch.Tensor, code: str, bits: int, state_bits: int, lut: torch.Tensor | None = None):
    """Nearly best tail-biting codes of W [d_out, d_in], multiples of 16 (Alg. 4: two passes)."""
    step = 2 if code == "hyb" else 1
    new = bits * step
    values = code_values(torch.arange(2**state_bits), code, lut)
    scale = W.square().mean().sqrt() / values.square().mean().sqrt()
    tiles = W.unflatten(0, (-1, 16)).unflatten(2, (-1, 16)).transpose(1, 2)  # [tiles_out, tiles_in, 16, 16]
    x = (tiles / scale).reshape(-1, 256 // step, step)
    middle = 128 // step
    free = viterbi(x.roll(middle, 1), values, new)
    states = viterbi(x, values, new, free[:, middle] >> new)
    words = pack_states(states, bits, step, state_bits).unflatten(0, tiles.shape[:2])
    return TrellisWeight(words, scale.reshape(1), code, bits, *W.shape, lut, state_bits)


@pytest.mark.parametrize(
    ("code", "bits", "limit"), [("1mad", 2, 0.100), ("3inst", 2, 0.100), ("hyb", 2, 0.110)]
)
def test_encoded_gaussian_is_nearer_than_scalar_codes(code: str, bits: int, limit: float) -> None:
    """At 2 bits a scalar quantizer's best mean squared error is 0.1175."""
    W = torch.randn(48, 64, generator=torch.Generator().manual_seed(2))
    lut = table() * 0.968 if code == "hyb" else None
    weight = encode(W, code, bits, 10, lut)
    error = (decode_ref(weight) - W).square().mean() / W.square().mean()
    assert 2**-4 < error < limit
    assert weight.words.numel() * 32 == bits * W.numel()  # not one bit more than K a weight


def test_more_bits_and_more_states_are_better() -> None:
    W = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))

    def error(bits: int, state_bits: int) -> float:
        return float((decode_ref(encode(W, "1mad", bits, state_bits)) - W).square().mean())

    assert error(1, 8) > error(2, 8) > error(3, 8) > error(4, 8)
    assert error(2, 11) < error(2, 8)


def test_published_states_of_16_bits() -> None:
    W = torch.randn(16, 16, generator=torch.Generator().manual_seed(4))
    weight = encode(W, "3inst", 2, 16)
    assert (decode_ref(weight) - W).square().mean() < 0.085


# --- the product


def test_tiles_are_row_major() -> None:
    weight = draw("hyb", 3, 20, 40)
    states = unpack_states(weight.words, 3, 2)
    W = decode_ref(weight, torch.float64)
    for n, k in [(0, 0), (0, 1), (3, 17), (15, 39), (16, 5), (19, 38)]:
        place = n % 16 * 16 + k % 16
        pair = spelled_out(int(states[n // 16, k // 16, place // 2]), "hyb", weight.table)
        assert W[n, k] == pytest.approx(pair[place % 2] * float(weight.scale), rel=1e-12)


@interpreted
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("code", CODES)
def test_kernel_agrees_with_float64(code: str, bits: int, poisoned) -> None:
    weight = draw(code, bits, 41, 123)
    W = decode_ref(weight, torch.float64)
    for n in (1, 3, 17):
        x = rows(n, 123)
        assert_close(trellis_matmul(x, weight, backend="triton"), x, W)
        assert_close(trellis_matmul(x, weight), x, W)


@interpreted
@pytest.mark.parametrize("state_bits", [8, 13])
@pytest.mark.parametrize("code", CODES)
def test_kernel_takes_shorter_states(code: str, state_bits: int, poisoned) -> None:
    weight = draw(code, 2, 33, 40, state_bits)
    x = rows(2, 40)
    assert_close(trellis_matmul(x, weight, backend="triton"), x, decode_ref(weight, torch.float64))


@interpreted
@pytest.mark.parametrize(
    ("n", "d_out", "d_in"), [(1, 1, 1), (2, 1, 300), (1, 100, 17), (70, 7, 40), (1, 3, 4097)]
)
def test_kernel_takes_any_shape(n: int, d_out: int, d_in: int, poisoned) -> None:
    weight = draw("1mad", 3, d_out, d_in)
    x = rows(n, d_in)
    assert_close(trellis_matmul(x, weight, backend="triton"), x, decode_ref(weight, torch.float64))


@interpreted
@settings(max_examples=10, deadline=None)
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 50), st.integers(1, 90)),
    st.sampled_from(CODES),
    st.integers(1, 4),
    st.integers(8, 16),
)
def test_kernel_takes_any_code(shape, code: str, bits: int, state_bits: int) -> None:
    n, d_out, d_in = shape
    weight = draw(code, bits, d_out, d_in, state_bits)
    x = rows(n, d_in)
    assert_close(trellis_matmul(x, weight, backend="triton"), x, decode_ref(weight, torch.float64))


@interpreted
def test_kernel_half_precision_and_leading_dimensions(poisoned) -> None:
    for code in CODES:
        weight = draw(code, 2, 33, 64)
        W = decode_ref(weight, torch.float64)
        x = rows(12, 64, torch.float16)
        y = trellis_matmul(x.reshape(2, 6, 64), weight, backend="triton")
        assert_close(y.reshape(12, 33), x, W)
        spread = rows(3, 128)[:, ::2]  # not contiguous
        assert_close(trellis_matmul(spread, weight, backend="triton"), spread, W)


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("code", CODES)
def test_gpu_agrees_with_float64(code: str, bits: int, dtype: torch.dtype) -> None:
    weight = draw(code, bits, 1000, 4097)
    moved = {key: t.cuda() for key, t in weight.tensors.items()}
    on_gpu = TrellisWeight(moved["words"], moved["scale"], code, bits, 1000, 4097, moved.get("table"))
    for n in (1, 16, 300):
        x = rows(n, 4097, dtype)
        assert_close(trellis_matmul(x.cuda(), on_gpu).cpu(), x, decode_ref(weight, torch.float64))


def test_wrong_arguments_are_named() -> None:
    weight = draw("1mad", 2, 16, 32)
    with pytest.raises(ValueError, match="x is empty"):
        trellis_matmul(torch.zeros(0, 32), weight)
    with pytest.raises(ValueError, match="d_in=32"):
        trellis_matmul(torch.zeros(2, 31), weight)
    with pytest.raises(ValueError, match="x must be float16"):
        trellis_matmul(torch.zeros(2, 32, dtype=torch.int8), weight)
    with pytest.raises(ValueError, match="code must be one of"):
        TrellisWeight(weight.words, weight.scale, "2mad", 2, 16, 32)
    with pytest.raises(ValueError, match=r"words must have shape \(1, 2, 24\)"):
        TrellisWeight(weight.words, weight.scale, "1mad", 3, 16, 32)
    with pytest.raises(ValueError, match="a table belongs to"):
        TrellisWeight(weight.words, weight.scale, "hyb", 2, 16, 32)
    with pytest.raises(ValueError, match="state_bits must be 4 to 16"):
        TrellisWeight(weight.words, weight.scale, "1mad", 2, 16, 32, state_bits=17)
