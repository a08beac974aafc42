"""Matmul with a weight coded by a bitshift trellis: computed codes, tail-biting tiles, decoded on the fly.

Source    QTIP (arXiv:2406.11235): the bitshift trellis, the codes 1MAD (Alg. 1), 3INST (Alg. 2) and HYB, tail-biting
          (Alg. 4), tiles of 16 x 16 weights, states of 16 bits
Deviates  the bits of a tile are in the order of the trellis: no permutation for one GPU's dot instructions. The
          transform and the signs around the product are the caller's (`hadamard`)

A tile of 16 x 16 weights, row by row, is one sequence of 256, V weights a step, and takes exactly 256 K bits = 8 K
words. Bits are numbered from the most significant of word 0. The state of step t is the L bits from bit t*K*V on,
first bit most significant, going round from the last bit to the first:

  K = 2, V = 1, L = 16   word 0   31..30 29..28 ... 17..16 15..14 ...       state 0 = bits 31..16 of word 0,
                                  step 0 step 1                             state 1 = bits 29..14, ...
so a step shifts K*V new bits in, any step can be decoded by itself, and no bits are spent on a start state.

From a state x (32-bit unsigned arithmetic) to values:
  1mad    x <- 34038481 x + 76625530; (sum of its four bytes - 510) / 147.800537109375
  3inst   x <- 89226354 x + 64248484; x <- (x & 0x8FFF8FFF) ^ 0x3B603B60; sum of its halves as float16
  hyb     x <- x x + x; two values from a table [2^Q, 2] at (x >> 15 - Q) mod 2^Q; bit 15 flips the second one's sign
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from requant.kernels._split import TILES, block_rows, run_parts, split_count, tile_add, tile_sum, tile_zeros
from requant.kernels._stored import Stored
from requant.kernels._triton import (
    FLOATS,
    Backend,
    apply_weight,
    assert_dot_block,
    autotune,
    cdiv,
    check,
    check_shape,
    check_tensor,
    jit,
    tl,
)

Code = Literal["1mad", "3inst", "hyb"]
CODES: tuple[Code, ...] = ("1mad", "3inst", "hyb")
TILE = 16
"""Rows and columns of a tile."""
MAD_STEP = 147.800537109375
"""Sum of bytes to value for 1MAD: about sqrt(4 (256^2 - 1) / 12), the standard deviation of the sum."""
_LOW32 = 0xFFFFFFFF


@dataclass(frozen=True)
class TrellisWeight(Stored):
    """A weight [d_out, d_in] of trellis codes times one scale.

    Attributes:
        words: int32 [ceil(d_out/16), ceil(d_in/16), 8 * bits]; weights beyond the edges are decoded, not used.
        scale: float32 [1].
        code: "1mad", "3inst" or "hyb".
        bits: bits a weight, 1 to 4. d_out, d_in: shape of the weight.
        table: float16, float32 or bfloat16 [2^Q, 2] with Q <= 15 for "hyb"; None for the others.
        state_bits: L, 4 to 16.
    """

    words: Tensor
    scale: Tensor
    code: Code
    bits: int
    d_out: int
    d_in: int
    table: Tensor | None = None
    state_bits: int = 16

    def __post_init__(self) -> None:
        check(self.code in CODES, f"code must be one of {', '.join(CODES)}, not {self.code!r}")
        check(self.bits in (1, 2, 3, 4), f"bits must be 1 to 4, not {self.bits!r}")
        check(self.d_out > 0 and self.d_in > 0, f"the weight is empty: [{self.d_out}, {self.d_in}]")
        low = max(4, self.bits * self.step)
        check(low <= self.state_bits <= 16, f"state_bits must be {low} to 16, not {self.state_bits!r}")
        check_tensor("words", self.words, (torch.int32,), 3)
        check_shape("words", self.words, (cdiv(self.d_out, TILE), cdiv(self.d_in, TILE), 8 * self.bits))
        check_tensor("scale", self.scale, (torch.float32,), 1)
        check_shape("scale", self.scale, (1,))
        check((self.table is None) == (self.code != "hyb"), "a table belongs to code 'hyb', and only to it")
        if self.table is not None:
            check_tensor("table", self.table, FLOATS, 2)
            check_shape("table", self.table, (2**self.index_bits, 2))
            check(self.index_bits <= 15, f"the table has at most 2^15 rows, not {len(self.table)}")

    @property
    def step(self) -> int:
        """V, weights a step of the trellis."""
        return 2 if self.code == "hyb" else 1

    @property
    def index_bits(self) -> int:
        """Q, the bits that choose a row of the table."""
        return 0 if self.table is None else max(len(self.table) - 1, 0).bit_length()


def pack_states(states: Tensor, bits: int, step: int, state_bits: int = 16) -> Tensor:
    """Words of tail-biting walks: [..., 256 / step] integer states -> int32 [..., 8 * bits].

    Raises: ValueError if a state does not follow from the one before it, or the first from the last.
    """
    check(states.shape[-1] * step == TILE * TILE, f"a tile has {TILE * TILE // step} steps: {states.shape}")
    new = bits * step
    states = states.long()
    overlap = (states.roll(1, -1) & (2 ** (state_bits - new) - 1)) == states >> new
    inside = (states >= 0) & (states < 2**state_bits)
    check(bool((overlap & inside).all()), "states do not form a closed walk through the trellis")
    head = states >> (state_bits - new)  # the first bits of every window, which lie at bit t*K*V
    stream = (head[..., None] >> torch.arange(new - 1, -1, -1, device=states.device)) & 1
    words = stream.reshape(*states.shape[:-1], -1, 32) << torch.arange(31, -1, -1, device=states.device)
    words = words.sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def unpack_states(words: Tensor, bits: int, step: int, state_bits: int = 16) -> Tensor:
    """Inverse of `pack_states`: int64 [..., 256 / step]."""
    first = torch.arange(TILE * TILE // step, device=words.device) * (bits * step)
    stream = words.long() & _LOW32
    pair = stream[..., first // 32] << 32 | stream[..., (first // 32 + 1) % words.shape[-1]]
    return pair >> (64 - state_bits - first % 32) & (2**state_bits - 1)


def code_values(
    states: Tensor, code: Code, table: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values [..., V] of integer states, in dtype: exact for 3INST and HYB, rounded once for 1MAD."""
    x = states.long()
    if code == "1mad":
        x = (x * 34038481 + 76625530) & _LOW32
        total = (x & 255) + (x >> 8 & 255) + (x >> 16 & 255) + (x >> 24)
        return ((total - 510).to(dtype) / MAD_STEP)[..., None]
    if code == "3inst":
        x = (x * 89226354 + 64248484) & _LOW32 & 0x8FFF8FFF ^ 0x3B603B60
        halves = torch.stack([x >> 16, x & 0xFFFF], -1)
        halves = torch.where(halves >= 2**15, halves - 2**16, halves).short().view(torch.float16)
        return (
            halves.float().sum(-1, keepdim=True).half().to(dtype)
        )  # the sum itself is a float16 instruction
    x = (x * x + x) & _LOW32
    index_bits = (len(table) - 1).bit_length()
    pair = table.to(dtype)[x >> (15 - index_bits) & (len(table) - 1)]
    sign = 1 - 2 * (x >> 15 & 1)
    return torch.stack([pair[..., 0], pair[..., 1] * sign], -1)


def decode_ref(weight: TrellisWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [d_out, d_in] in dtype (float32 or float64)."""
    states = unpack_states(weight.words, weight.bits, weight.step, weight.state_bits)
    values = code_values(states, weight.code, weight.table, dtype)  # [tiles_out, tiles_in, steps, V]
    tiles = values.reshape(*states.shape[:2], TILE, TILE).transpose(1, 2)  # [tiles_out, 16, tiles_in, 16]
    W = tiles.reshape(tiles.shape[0] * TILE, -1)[: weight.d_out, : weight.d_in]
    return W * weight.scale.to(dtype)


def trellis_matmul_ref(x: Tensor, weight: TrellisWeight) -> Tensor:
    """The truth of `trellis_matmul`: decode, then multiply, in float32 (in float64 if x is)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype) @ decode_ref(weight, dtype).T).to(x.dtype)


@jit
def _decode(states, odd, table_ptr, mask, CODE: tl.constexpr, INDEX_BITS: tl.constexpr):
    """Values of states (uint32), float32; those of 1MAD times MAD_STEP, which makes them integers.

    Args:
        odd: for HYB, 1 where the second of the two values is wanted, else 0.
    """
    if CODE == "1mad":
        x = states * 34038481 + 76625530
        pairs = (x & 0x00FF00FF) + ((x >> 8) & 0x00FF00FF)
        return ((pairs & 0xFFFF) + (pairs >> 16)).to(tl.int32).to(tl.float32) - 510.0
    elif CODE == "3inst":
        x = ((states * 89226354 + 64248484) & 0x8FFF8FFF) ^ 0x3B603B60
        high = (x >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
        low = (x & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
        return (high.to(tl.float32) + low.to(tl.float32)).to(tl.float16).to(tl.float32)
    else:
        x = states * states + states
        row = ((x >> (15 - INDEX_BITS)) & (2**INDEX_BITS - 1)).to(tl.int32)
        value = tl.load(table_ptr + (row * 2 + odd), mask=mask, other=0.0).to(tl.float32)
        return tl.where(((x >> 15) & 1).to(tl.int32) * odd != 0, -value, value)


@autotune(TILES, key=["d_out", "d_in", "CODE", "BITS", "BLOCK_M"])
@jit
def _trellis_matmul_kernel(
    x_ptr, words_ptr, scale_ptr, table_ptr, out_ptr, M, d_out, d_in, tiles_in, split_k,
    CODE: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr, STATE_BITS: tl.constexpr, INDEX_BITS: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Outputs [BLOCK_M, BLOCK_N] from split_k columns (a multiple of BLOCK_K).

    CHUNK neighbouring weights of a row have their windows in two neighbouring words, which are loaded once for all.
    UNIT is what integer values are divided by.
    """
    CHUNK: tl.constexpr = 4 if BITS == 3 else (8 if BITS == 4 else 16)
    CHUNKS: tl.constexpr = BLOCK_K // CHUNK
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < d_out
    x_row = x_ptr + m.to(tl.int64)[:, None] * d_in
    tile_row = words_ptr + (n // 16).to(tl.int64)[:, None] * tiles_in * (8 * BITS)
    lane = tl.arange(0, CHUNK)
    first_lane = lane // STEP * STEP  # the weights of a step share a window
    acc = tile_zeros(BLOCK_M, BLOCK_N, BLOCK_K)
    first = tl.program_id(2) * split_k
    end = tl.minimum(first + split_k, d_in)
    for start in range(first, end, BLOCK_K):
        chunk = start + tl.arange(0, CHUNKS) * CHUNK  # column of a chunk's first weight
        mask = mask_n[:, None] & (chunk < end)[None, :]
        bit = ((n % 16) * (16 * BITS))[:, None] + (chunk % 16 * BITS)[None, :]
        word = bit // 32
        tile = tile_row + (chunk // 16 * (8 * BITS))[None, :]
        high = tl.load(tile + word, mask=mask, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
        low = tl.load(tile + (word + 1) % (8 * BITS), mask=mask, other=0).to(tl.uint32, bitcast=True)
        pair = (high << 32) | low.to(tl.uint64)
        shift = (64 - STATE_BITS) - (bit % 32)[:, :, None] - (first_lane * BITS)[None, None, :]
        states = (pair[:, :, None] >> shift.to(tl.uint64)).to(tl.uint32) & (2**STATE_BITS - 1)
        odd = (lane % STEP)[None, None, :] + tl.zeros_like(shift)
        w = _decode(states, odd, table_ptr, mask[:, :, None] & (odd >= 0), CODE, INDEX_BITS)
        w = tl.trans(tl.reshape(w, [BLOCK_N, BLOCK_K]))
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_row + k[None, :], mask=(m < M)[:, None] & (k < end)[None, :], other=0.0)
        acc = tile_add(acc, x, w, BLOCK_M)
    y = tile_sum(acc, BLOCK_M) * (tl.load(scale_ptr) / UNIT)
    out = (tl.program_id(2).to(tl.int64) * M + m.to(tl.int64))[:, None] * d_out + n[None, :]
    tl.store(out_ptr + out, y.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & mask_n[None, :])


def _launch(x: Tensor, weight: TrellisWeight) -> Tensor:
    """y [rows, d_out] of x [rows, d_in]."""
    rows, block_m = x.shape[0], block_rows(x.shape[0])
    if block_m > 1:
        assert_dot_block(BLOCK_M=block_m)
    steps = cdiv(weight.d_in, 128)
    split = split_count(rows, weight.d_out, steps, x.device)

    def launch(_: int, results: Tensor) -> None:
        def grid(meta: dict) -> tuple[int, int, int]:
            return cdiv(weight.d_out, meta["BLOCK_N"]), cdiv(rows, block_m), split

        _trellis_matmul_kernel[grid](
            x,
            weight.words,
            weight.scale,
            weight.words if weight.table is None else weight.table,  # a pointer is passed, but not read
            results,
            rows,
            weight.d_out,
            weight.d_in,
            weight.words.shape[1],
            cdiv(steps, split) * 128,
            CODE=weight.code,
            BITS=weight.bits,
            STEP=weight.step,
            STATE_BITS=weight.state_bits,
            INDEX_BITS=weight.index_bits,
            UNIT=MAD_STEP if weight.code == "1mad" else 1.0,
            BLOCK_M=block_m,
        )

    return run_parts(rows, weight.d_out, [split], x, launch)


def trellis_matmul(x: Tensor, weight: TrellisWeight, *, backend: Backend = "auto") -> Tensor:
    """x times the transposed weight, decoded on the fly.

    Args:
        x: [..., d_in] float16, bfloat16 or float32.
        weight: trellis codes [d_out, d_in], on x's device.
    Returns: [..., d_out] in x's dtype, accumulated in float32.
    Raises: ValueError for a wrong shape, dtype or device, or an empty x; RuntimeError if backend="triton" cannot run.
    """
    return apply_weight(x, weight, backend, trellis_matmul_ref, _launch)
