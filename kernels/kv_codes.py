"""Storage of coded keys and values, for attention that reads the codes (`attention_decode`).

Source    KIVI (arXiv:2402.02750): keys rounded per channel in groups of tokens, values per token; Coupled Quantization
          (2405.03917): a code for c neighbouring channels of a head, with learned centroids
Deviates  the affine grid is code * scale + offset with a float offset, as KIVI's: a key channel's range need not
          contain zero, so an integer zero point in 0..2^b-1 would not do

  AffineCodes    words [batch, kv_heads, seqlen, head_dim * bits / 32]: the codes of one token and head, little end
                 first; scale and offset are shared by token_group tokens x channel_group channels
  CoupledCodes   words [batch, seqlen, ...]: the codes of one token, all heads, groups in the order of the channels, as
                 one stream (`bitstream`); `reference_impls._coder` gives the same bytes
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from requant.kernels._triton import FLOATS, cdiv, check, check_shape, check_tensor, jit, tl
from requant.kernels.bitstream import MAX_WIDTH, pack_stream, stream_words, unpack_stream, window_at

AFFINE_BITS = (2, 4, 8)
"""Widths of affine codes: a word holds whole codes."""


@dataclass(frozen=True)
class AffineCodes:
    """Keys or values on affine grids: code * scale + offset.

    Attributes:
        words: int32 [batch, kv_heads, seqlen, head_dim * bits / 32].
        scale, offset: [batch, kv_heads, ceil(seqlen / token_group), head_dim / channel_group], floating point.
        bits: 2, 4 or 8. head_dim: channels of a head, a multiple of 32 / bits.
        token_group: tokens that share a scale. channel_group: channels that share one.
    """

    words: Tensor
    scale: Tensor
    offset: Tensor
    bits: int
    head_dim: int
    token_group: int
    channel_group: int

    def __post_init__(self) -> None:
        check(self.bits in AFFINE_BITS, f"bits must be 2, 4 or 8, not {self.bits!r}")
        check(self.token_group > 0, f"token_group must be positive, not {self.token_group}")
        whole = self.channel_group > 0 and self.head_dim % self.channel_group == 0
        check(whole, f"channel_group {self.channel_group} does not divide head_dim {self.head_dim}")
        lanes = 32 // self.bits
        check(self.head_dim % lanes == 0, f"head_dim {self.head_dim} is no multiple of {lanes} (32 / bits)")
        check_tensor("words", self.words, (torch.int32,), 4)
        check_shape("words", self.words, (*self.words.shape[:3], self.head_dim // lanes))
        groups = cdiv(self.seqlen, self.token_group), self.head_dim // self.channel_group
        for name in ("scale", "offset"):
            check_tensor(name, getattr(self, name), FLOATS, 4)
            check_shape(name, getattr(self, name), (*self.words.shape[:2], *groups))

    @property
    def batch(self) -> int:
        return self.words.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.words.shape[1]

    @property
    def seqlen(self) -> int:
        return self.words.shape[2]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are stored, by name."""
        return {"words": self.words, "scale": self.scale, "offset": self.offset}

    @property
    def stored_bytes(self) -> int:
        """Bytes of the stored tensors: codes, scales and offsets."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass(frozen=True)
class CoupledCodes:
    """Keys or values as codes of groups of neighbouring channels.

    Attributes:
        words: int32 [batch, seqlen, stream_words(n_groups, (code_bits,))].
        centroids: [n_groups, 2^code_bits, c], floating point; groups run through the first kv head, then the next.
        kv_heads: heads of keys and values; a group lies within one.
    """

    words: Tensor
    centroids: Tensor
    kv_heads: int

    def __post_init__(self) -> None:
        check_tensor("words", self.words, (torch.int32,), 3)
        check_tensor("centroids", self.centroids, FLOATS, 3)
        check(
            self.centroids.shape[1] == 2**self.code_bits and 1 <= self.code_bits <= MAX_WIDTH,
            f"the number of centroids must be 2 to 2^{MAX_WIDTH}, a power of two: {self.centroids.shape[1]}",
        )
        divides = self.kv_heads > 0 and self.centroids.shape[0] % self.kv_heads == 0
        check(divides, f"{self.centroids.shape[0]} groups of channels for {self.kv_heads} heads")
        words = stream_words(self.centroids.shape[0], (self.code_bits,))
        check_shape("words", self.words, (*self.words.shape[:2], words))

    @property
    def batch(self) -> int:
        return self.words.shape[0]

    @property
    def seqlen(self) -> int:
        return self.words.shape[1]

    @property
    def code_bits(self) -> int:
        """b, the width of a code."""
        return self.centroids.shape[1].bit_length() - 1

    @property
    def head_dim(self) -> int:
        return self.centroids.shape[0] // self.kv_heads * self.centroids.shape[2]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are stored, by name; centroids belong to the layer, not to one cache."""
        return {"words": self.words, "centroids": self.centroids}

    @property
    def stored_bytes(self) -> int:
        """Bytes of the codes; centroids are the layer's."""
        return self.words.numel() * self.words.element_size()


Codes = AffineCodes | CoupledCodes


def quantize_affine(x: Tensor, bits: int, token_group: int, channel_group: int) -> AffineCodes:
    """Round to nearest between the least and the greatest value of each token_group x channel_group block.

    Keys are given per channel: (tokens, 1); values per token: (1, head_dim).

    Args:
        x: [batch, kv_heads, seqlen, head_dim]; a last group of fewer tokens is rounded on its own range.
    Returns: codes with float16 scale and offset, which the codes are computed with.
    Raises: ValueError naming what does not fit.
    """
    x = check_tensor("x", x, FLOATS, 4)
    check(bits in AFFINE_BITS, f"bits must be 2, 4 or 8, not {bits!r}")
    batch, heads, seqlen, head_dim = x.shape
    whole = channel_group > 0 and head_dim % channel_group == 0
    check(whole, f"channel_group {channel_group} does not divide head_dim {head_dim}")
    lanes = 32 // bits
    check(head_dim % lanes == 0, f"head_dim {head_dim} is no multiple of {lanes} (32 / bits)")
    n_tokens = cdiv(seqlen, token_group)
    last = torch.full((n_tokens * token_group,), seqlen - 1, device=x.device)
    last[:seqlen] = torch.arange(seqlen, device=x.device)
    blocks = x.float()[:, :, last].reshape(batch, heads, n_tokens, token_group, -1, channel_group)
    low, high = blocks.amin((3, 5), keepdim=True), blocks.amax((3, 5), keepdim=True)
    offset = low.half()
    scale = ((high - offset.float()) / (2**bits - 1)).half().clamp(min=2.0**-24)
    codes = ((blocks - offset.float()) / scale.float()).round().clamp(0, 2**bits - 1).int()
    codes = codes.reshape(batch, heads, -1, head_dim)[:, :, :seqlen]
    words = pack_stream(codes[..., None], (bits,))
    grid = (t.reshape(batch, heads, n_tokens, -1) for t in (scale, offset))
    return AffineCodes(words, *grid, bits, head_dim, token_group, channel_group)


def pack_coupled(codes: Tensor, centroids: Tensor, kv_heads: int) -> CoupledCodes:
    """Store integer codes [batch, seqlen, n_groups], as a `_coder.Coder` gives them."""
    check(centroids.ndim == 3, f"centroids must be [n_groups, 2^b, c], not {tuple(centroids.shape)}")
    width = centroids.shape[1].bit_length() - 1
    return CoupledCodes(pack_stream(codes[..., None], (width,)), centroids, kv_heads)


def decode_ref(codes: Codes, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the codes stand for, in dtype (float32 or float64): [batch, kv_heads, seqlen, head_dim]."""
    if isinstance(codes, AffineCodes):
        values = unpack_stream(codes.words, (codes.bits,), codes.head_dim)[..., 0].to(dtype)
        scale, offset = (
            t.to(dtype).repeat_interleave(codes.token_group, 2)[:, :, : codes.seqlen]
            for t in (codes.scale, codes.offset)
        )
        values = values.unflatten(-1, (-1, codes.channel_group))
        return (values * scale[..., None] + offset[..., None]).flatten(-2)
    n_groups = codes.centroids.shape[0]
    index = unpack_stream(codes.words, (codes.code_bits,), n_groups)[..., 0]  # [batch, seqlen, n_groups]
    group = torch.arange(n_groups, device=index.device)
    values = codes.centroids.to(dtype)[group, index].flatten(-2)  # [batch, seqlen, kv_heads * head_dim]
    return values.unflatten(-1, (codes.kv_heads, codes.head_dim)).transpose(1, 2)


@jit
def decoded_half(
    words_ptr, scale_ptr, offset_ptr, batch, head, kv_heads, seqlen, row_words, tokens, start, mask_t,
    COUPLED: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr,
    TOKEN_GROUP: tl.constexpr, CHANNEL_GROUP: tl.constexpr, SECOND: tl.constexpr, HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Channels of the first or SECOND half of a head, float32 [BLOCK_T, BLOCK_H]; padding holds finite values.

    LANES channels come from one word (affine codes) or one code (coupled). scale_ptr is the centroids' if COUPLED.
    """
    unit = tl.arange(0, BLOCK_H // LANES)
    lane = tl.arange(0, LANES)
    first = (HALF // LANES if SECOND else 0) + unit  # word, or code, within the head
    mask = mask_t[:, None] & (unit < HALF // LANES)[None, :]
    if COUPLED:
        row = words_ptr + (batch.to(tl.int64) * seqlen + tokens)[:, None] * row_words
        group = head * (HEAD_DIM // LANES) + first
        bit = (group * BITS)[None, :] + tl.zeros_like(tokens)[:, None]
        entry = (group << BITS)[None, :] + window_at(row, bit, mask, BITS, ALIGNED)
        place = entry[:, :, None] * LANES + lane[None, None, :]
        x = tl.load(scale_ptr + place, mask=mask[:, :, None] & (lane >= 0)[None, None, :], other=0.0)
        return tl.reshape(x.to(tl.float32), [BLOCK_T, BLOCK_H])
    else:
        plane = batch.to(tl.int64) * kv_heads + head
        row = words_ptr + (plane * seqlen + tokens)[:, None] * row_words
        words = tl.load(row + first[None, :], mask=mask, other=0).to(tl.uint32, bitcast=True)
        codes = (words[:, :, None] >> (lane * BITS).to(tl.uint32)[None, None, :]) & (2**BITS - 1)
        x = tl.reshape(codes.to(tl.int32).to(tl.float32), [BLOCK_T, BLOCK_H])
        n_columns: tl.constexpr = HEAD_DIM // CHANNEL_GROUP
        grids = plane * tl.cdiv(seqlen, TOKEN_GROUP)
        i = tl.arange(0, BLOCK_H)
        column = ((HALF if SECOND else 0) + i) // CHANNEL_GROUP
        if n_columns == 1:
            place = (grids + tokens // TOKEN_GROUP)[:, None]
            inside = mask_t[:, None]
        elif TOKEN_GROUP % BLOCK_T == 0:  # start is a multiple of BLOCK_T: one grid a channel
            place = ((grids + start // TOKEN_GROUP) * n_columns + column)[None, :]
            inside = (i < HALF)[None, :]
        else:
            place = (grids + tokens // TOKEN_GROUP)[:, None] * n_columns + column[None, :]
            inside = mask_t[:, None] & (i < HALF)[None, :]
        scale = tl.load(scale_ptr + place, mask=inside, other=0.0).to(tl.float32)
        offset = tl.load(offset_ptr + place, mask=inside, other=0.0).to(tl.float32)
        return x * scale + offset
