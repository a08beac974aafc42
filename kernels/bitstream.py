"""Rows of codes of any widths up to 16 bits as int32 words: what codebooks, coded caches and trellises index.

Source    the index streams of AQLM (arXiv:2401.06118) and VPTQ (2409.17066), the codes of Coupled Quantization
          (2405.03917); for one width that `pack` knows, the words are those of `pack` up to its padding

A row holds n places, each of one code a codebook. With widths (b0, b1, ...) a place takes b0 + b1 + ... bits, first
codebook lowest, little end first, and places follow each other without gaps; only the last word is padded:

  widths (12,)     word 0   31..24             23..12   11..0        word 1   31..28   27..16   15..4   3..0
                            c2 (low 8)          c1       c0                   c5 (low 4) c4     c3      c2 (high 4)
  widths (16, 8)   word 0   31..24             23..16   15..0
                            second place's      b        a            a: first codebook, b: second
"""

from __future__ import annotations

import torch
from torch import Tensor

from requant.kernels._triton import cdiv, check, check_shape, check_tensor, jit, tl

MAX_WIDTH = 16
"""Widest code in bits: a code then lies in at most two words."""
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_widths(widths: tuple[int, ...]) -> None:
    """Raises: ValueError unless there is at least one width and each is 1 to 16 bits."""
    good = len(widths) > 0 and all(isinstance(b, int) and 1 <= b <= MAX_WIDTH for b in widths)
    check(good, f"code widths must be 1 to {MAX_WIDTH} bits each, not {widths!r}")


def stream_words(places: int, widths: tuple[int, ...]) -> int:
    """Words a row of that many places takes."""
    return cdiv(places * sum(widths), 32)


def never_straddles(widths: tuple[int, ...]) -> bool:
    """Whether every code lies within one word: equal widths that divide 32."""
    return len(set(widths)) == 1 and 32 % widths[0] == 0


def _first_bits(places: int, widths: tuple[int, ...], device: torch.device) -> Tensor:
    """First bit of every code: int64 [places * len(widths)]."""
    offsets = torch.tensor([sum(widths[:m]) for m in range(len(widths))], device=device)
    return (torch.arange(places, device=device)[:, None] * sum(widths) + offsets).flatten()


def pack_stream(codes: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Pack codes along the last two dimensions.

    Args:
        codes: integers [..., places, len(widths)], code m of each place in 0..2^widths[m]-1.
    Returns: int32 [..., stream_words(places, widths)].
    Raises: ValueError for a width, shape, dtype or code out of range.
    """
    check_widths(widths)
    codes = check_tensor("codes", codes, _INTEGERS)
    check(codes.ndim >= 2, "codes must have dimensions [..., places, codebooks]")
    check_shape("codes", codes, (*codes.shape[:-1], len(widths)))
    for m, width in enumerate(widths):
        low, high = (int(v) for v in codes[..., m].aminmax())
        check(low >= 0 and high < 2**width, f"codes[..., {m}] must lie in 0..{2**width - 1}: {low}..{high}")
    places = codes.shape[-2]
    first = _first_bits(places, widths, codes.device)
    shifted = codes.long().flatten(-2) << first % 32  # below 2^47
    words = torch.zeros(
        *codes.shape[:-2], stream_words(places, widths) + 1, dtype=torch.int64, device=codes.device
    )
    words.index_add_(-1, first // 32, shifted & 0xFFFFFFFF)
    words.index_add_(-1, first // 32 + 1, shifted >> 32)
    words = words[..., :-1]
    return torch.where(words >= 2**31, words - 2**32, words).int()


def unpack_stream(words: Tensor, widths: tuple[int, ...], places: int) -> Tensor:
    """Inverse of `pack_stream`: int64 [..., places, len(widths)].

    Raises: ValueError for a width, or words that are not those of that many places.
    """
    check_widths(widths)
    words = check_tensor("words", words, (torch.int32,))
    check_shape("words", words, (*words.shape[:-1], stream_words(places, widths)))
    first = _first_bits(places, widths, words.device)
    stream = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    pair = stream[..., first // 32] | stream[..., first // 32 + 1] << 32  # bit 63 may become the sign
    code = (pair >> first % 32).unflatten(-1, (places, len(widths)))
    return code & torch.tensor([2**b - 1 for b in widths], device=words.device)


@jit
def window_at(row_ptr, bit, mask, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """The WIDTH <= 16 bits of a stream from number `bit` on: any shape, int32; 0 where mask is false.

    Args:
        row_ptr: pointer to the row's first word, broadcastable with bit.
        bit: first bit.
        ALIGNED: no code straddles two words (`never_straddles`): the second load is left out.
    """
    word = bit // 32
    shift = (bit % 32).to(tl.uint32)
    low = tl.load(row_ptr + word, mask=mask, other=0).to(tl.uint32, bitcast=True)
    code = low >> shift
    if not ALIGNED:
        straddles = mask & (shift > 32 - WIDTH)
        high = tl.load(row_ptr + word + 1, mask=straddles, other=0).to(tl.uint32, bitcast=True)
        code = code | ((high << 1) << (31 - shift))
    return (code & (2**WIDTH - 1)).to(tl.int32)
