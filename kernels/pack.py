"""Packing of 1-, 2-, 3-, 4- and 8-bit codes into int32 words along the input dimension.

Source    the word layout of GPTQ's and AWQ's kernels (arXiv:2210.17323, 2306.00978) with codes little end first;
          3 bits as one stream, so that 32 codes fill 3 words (GPTQ's 3-bit layout wastes nothing either)
Deviates  zero points are stored as they are, never minus one

Codes of one output row are one stream of bits: code i takes bits i*b to i*b + b - 1 of its row, bit j being bit
j mod 32 of word j // 32. Rows are padded with zeros to a multiple of 32 codes, hence b words for every 32 codes:

  4 bits   word 0   31..28 27..24 23..20 19..16 15..12 11..8  7..4   3..0
                     c7     c6     c5     c4     c3     c2     c1     c0
  2 bits   word 0   31..30 ... 3..2 1..0            1 bit   word 0   31  ... 1  0
                     c15         c1   c0                              c31     c1 c0
  8 bits   word 0   31..24 23..16 15..8 7..0
                     c3     c2     c1    c0
  3 bits   word 0   31..30          29..27 ... 3..1+2  2..0
                     c10 (low 2)     c9          c1     c0
           word 1   31              30..28 ... 3..1    0
                     c21 (low 1)     c20         c11    c10 (high 1)
           word 2   31..29          28..26 ... 4..2    1..0
                     c31             c30         c22    c21 (high 2)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from requant.kernels._stored import Stored
from requant.kernels._triton import (
    FLOATS,
    Backend,
    cdiv,
    check,
    check_shape,
    check_tensor,
    jit,
    tl,
    triton,
    use_triton,
)

WIDTHS = (1, 2, 3, 4, 8)
"""Code widths in bits."""
BLOCK = 32
"""Codes that a row is padded to a multiple of; BLOCK codes of b bits are b words."""
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_bits(bits: int, widths: tuple[int, ...] = WIDTHS) -> None:
    """Raises: ValueError if bits is not one of the widths."""
    check(bits in widths, f"bits must be one of {', '.join(map(str, widths))}, not {bits!r}")


def n_words(d_in: int, bits: int) -> int:
    """Words a row of d_in codes takes."""
    return cdiv(d_in, BLOCK) * bits


def pack_ref(codes: Tensor, bits: int) -> Tensor:
    """The truth of `pack`: int32 [..., n_words]."""
    d_in = codes.shape[-1]
    blocks = torch.nn.functional.pad(codes.long(), (0, -d_in % BLOCK)).unflatten(-1, (-1, BLOCK))
    first = torch.arange(BLOCK, device=codes.device) * bits  # first bit of each code in its block
    stream = blocks << first % 32  # below 2^39: a code may straddle two words
    words = torch.zeros(*blocks.shape[:-1], bits + 1, dtype=torch.int64, device=codes.device)
    words.index_add_(-1, first // 32, stream & 0xFFFFFFFF)
    words.index_add_(-1, first // 32 + 1, stream >> 32)
    words = words[..., :bits].flatten(-2)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def unpack_ref(words: Tensor, bits: int, d_in: int) -> Tensor:
    """The truth of `unpack`: uint8 [..., d_in]."""
    stream = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    first = torch.arange(d_in, device=words.device) * bits
    low, shift = first // 32, first % 32
    pair = stream[..., low] | (stream[..., low + 1] << 32)  # bit 63 may become the sign; b <= 8 bits are kept
    return ((pair >> shift) & (2**bits - 1)).to(torch.uint8)


@jit
def code_at(row_ptr, index, mask, BITS: tl.constexpr):
    """Code number `index` of packed rows: any shape, int32; 0 where mask is false.

    Args:
        row_ptr: pointer to a row's first word; broadcastable with index.
        index, mask: tensors (no scalars: see `_triton`) of one shape.
    """
    bit = index * BITS
    word = bit // 32
    shift = (bit % 32).to(tl.uint32)
    low = tl.load(row_ptr + word, mask=mask, other=0).to(tl.uint32, bitcast=True)
    code = low >> shift
    if BITS == 3:  # codes 10 and 21 of each 32 continue in the next word
        straddles = mask & (shift > 29)
        high = tl.load(row_ptr + word + 1, mask=straddles, other=0).to(tl.uint32, bitcast=True)
        code = code | (high << ((32 - shift) & 31))
    return (code & (2**BITS - 1)).to(tl.int32)


@jit
def _pack_kernel(codes_ptr, words_ptr, d_in, row_words, BITS: tl.constexpr, BLOCK_WORDS: tl.constexpr):
    """Words [BLOCK_WORDS] of one row: each gathers the codes that overlap it."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    mask = word < row_words
    first = word * 32 // BITS  # first code with a bit in this word
    out = tl.zeros([BLOCK_WORDS], dtype=tl.uint32)
    for j in tl.static_range(32 // BITS + (1 if 32 % BITS == 0 else 2)):
        index = first + j
        shift = index * BITS - word * 32  # from 1 - BITS
        code = tl.load(codes_ptr + row * d_in + index, mask=mask & (index < d_in), other=0).to(tl.uint32)
        left = code << tl.where((shift >= 0) & (shift < 32), shift, 0).to(tl.uint32)
        right = code >> tl.where(shift < 0, -shift, 0).to(tl.uint32)
        out = out | tl.where(shift < 0, right, tl.where(shift < 32, left, 0))
    tl.store(words_ptr + row * row_words + word, out.to(tl.int32, bitcast=True), mask=mask)


@jit
def _unpack_kernel(words_ptr, codes_ptr, d_in, row_words, BITS: tl.constexpr, BLOCK_CODES: tl.constexpr):
    """Codes [BLOCK_CODES] of one row."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK_CODES + tl.arange(0, BLOCK_CODES)
    mask = index < d_in
    code = code_at(words_ptr + row * row_words, index, mask, BITS)
    tl.store(codes_ptr + row * d_in + index, code.to(tl.uint8), mask=mask)


def pack(codes: Tensor, bits: int, *, backend: Backend = "auto") -> Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: [..., d_in] integers in 0..2^bits-1.
        bits: 1, 2, 3, 4 or 8.
    Returns: int32 [..., n_words(d_in, bits)].
    Raises: ValueError for another width or dtype, an empty tensor or a code out of range.
    """
    check_bits(bits)
    codes = check_tensor("codes", codes, _INTEGERS)
    check(codes.ndim > 0, "codes must have at least one dimension")
    low, high = (int(v) for v in codes.aminmax())
    check(low >= 0 and high < 2**bits, f"codes must lie in 0..{2**bits - 1}, not {low}..{high}")
    if not use_triton(backend, codes):
        return pack_ref(codes, bits)
    d_in = codes.shape[-1]
    rows = codes.to(torch.uint8).reshape(-1, d_in)
    width = n_words(d_in, bits)
    words = torch.empty(rows.shape[0], width, dtype=torch.int32, device=codes.device)
    grid = (rows.shape[0], triton.cdiv(width, 128))
    _pack_kernel[grid](rows, words, d_in, width, BITS=bits, BLOCK_WORDS=128)
    return words.reshape(*codes.shape[:-1], width)


def unpack(words: Tensor, bits: int, d_in: int, *, backend: Backend = "auto") -> Tensor:
    """Inverse of `pack`.

    Args:
        words: int32 [..., n_words(d_in, bits)].
        d_in: number of codes a row holds (padding left out).
    Returns: uint8 [..., d_in].
    Raises: ValueError for another width or dtype, an empty tensor, or a number of words that d_in does not take.
    """
    check_bits(bits)
    words = check_tensor("words", words, (torch.int32,))
    check(d_in > 0, f"d_in must be positive, not {d_in}")
    check_shape("words", words, (*words.shape[:-1], n_words(d_in, bits)))
    if not use_triton(backend, words):
        return unpack_ref(words, bits, d_in)
    rows = words.reshape(-1, words.shape[-1])
    codes = torch.empty(rows.shape[0], d_in, dtype=torch.uint8, device=words.device)
    grid = (rows.shape[0], triton.cdiv(d_in, 512))
    _unpack_kernel[grid](rows, codes, d_in, rows.shape[1], BITS=bits, BLOCK_CODES=512)
    return codes.reshape(*words.shape[:-1], d_in)


@dataclass(frozen=True)
class PackedWeight(Stored):
    """A weight [d_out, d_in] on an affine grid: (code - zero_point) * scale, groups along d_in.

    Attributes:
        words: int32 [d_out, n_words(d_in, bits)], `pack`ed codes.
        scale: [d_out, n_groups] float16, bfloat16 or float32.
        zero_point: int32 [d_out, n_words(n_groups, bits)], packed as codes are; None = 2^(bits-1) everywhere.
        bits: code width. d_in: codes a row. group_size: columns a scale; None = whole row.
    """

    words: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    d_in: int
    group_size: int | None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check(self.d_in > 0, f"d_in must be positive, not {self.d_in}")
        check(self.d_in % self.columns == 0, f"group_size {self.group_size} does not divide d_in {self.d_in}")
        check_tensor("words", self.words, (torch.int32,), 2)
        self._check("words", (torch.int32,), (self.d_out, n_words(self.d_in, self.bits)))
        self._check("scale", FLOATS, (self.d_out, self.n_groups))
        if self.zero_point is not None:
            self._check("zero_point", (torch.int32,), (self.d_out, n_words(self.n_groups, self.bits)))

    def _check(self, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, int]) -> None:
        """Check one tensor, and make it contiguous."""
        tensor = check_tensor(name, getattr(self, name), dtypes, 2)
        check_shape(name, tensor, shape)
        object.__setattr__(self, name, tensor)

    @property
    def d_out(self) -> int:
        return self.words.shape[0]

    @property
    def columns(self) -> int:
        """Columns that share a scale."""
        return self.d_in if self.group_size is None else self.group_size

    @property
    def n_groups(self) -> int:
        return self.d_in // self.columns


def pack_weight(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group_size: int | None = None,
    *,
    backend: Backend = "auto",
) -> PackedWeight:
    """Store codes, scales and zero points as `PackedWeight`.

    Args:
        codes: [d_out, d_in] integers in 0..2^bits-1.
        scale: [d_out, n_groups], floating point; kept in its dtype.
        zero_point: [d_out, n_groups] integers in 0..2^bits-1 (any integer dtype); None = 2^(bits-1), not stored.
        group_size: columns a scale, a divisor of d_in; None = whole row.
    Raises: ValueError naming the argument.
    """
    words = pack(check_tensor("codes", codes, _INTEGERS, 2), bits, backend=backend)
    scale = check_tensor("scale", scale, FLOATS, 2)
    zeros = None
    if zero_point is not None:
        zero_point = check_tensor("zero_point", zero_point, _INTEGERS, 2)
        check_shape("zero_point", zero_point, tuple(scale.shape))
        zeros = pack(zero_point, bits, backend=backend)
    return PackedWeight(words, scale, zeros, bits, codes.shape[1], group_size)


def dequantize_ref(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """(code - zero_point) * scale in dtype (float32 or float64): [d_out, d_in]."""
    codes = unpack_ref(weight.words, weight.bits, weight.d_in).to(dtype)
    if weight.zero_point is None:
        zeros = torch.full_like(weight.scale, 2.0 ** (weight.bits - 1), dtype=dtype)
    else:
        zeros = unpack_ref(weight.zero_point, weight.bits, weight.n_groups).to(dtype)
    grid = codes.unflatten(1, (weight.n_groups, weight.columns)) - zeros[..., None]
    return (grid * weight.scale.to(dtype)[..., None]).flatten(1)
