"""The tensors that binary and ternary weights are stored as, for the layouts of BitNet, BiLLM and ARB-LLM.

Source    BitNet (arXiv:2310.11453, Sec. 2.1), its ternary successor (2402.17764, Sec. 2), BiLLM (2402.04291,
          Sec. 3), ARB-LLM (2410.03129, Sec. 3)
Deviates  a sign of zero is stored as +1 or -1, as the quantizer chose: one bit cannot hold a zero

Planes of bits are packed as 1-bit codes are (`pack`): column k of a row is bit k mod 32 of word k // 32, 1 = +1.
Ternary codes are value + 1, either as 2-bit codes or five to a byte, in base 3 with the first column lowest:

  byte b of a row   t(5b) + 3 t(5b+1) + 9 t(5b+2) + 27 t(5b+3) + 81 t(5b+4)       0..242, 1.6 bits a weight

Levels of a binary weight: every weight has a sign and, by its flag and its column, a level, which gives the scale
and mean of its row and group of columns. A salient column has two terms, hence two levels and two signs.

  planes                            not salient           salient
  signs                             0                     -                  BitNet (1 level)
  signs, flags                      flag ? 1 : 0          -                  two groups by magnitude (2)
  signs, flags, salient             flag ? 1 : 0          2 and 3: flags hold the second sign    BiLLM (4)
  signs, flags, salient, residual   flag ? 1 : 0          flag ? (4, 5) : (2, 3); second sign in residual, which
                                                          holds the salient columns alone        ARB-LLM (6)

  weight[n, k] = sum over its terms of mean[level, n, g] + sign * scale[level, n, g] * column_scale[level, k]
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from requant.kernels._stored import Stored
from requant.kernels._triton import FLOATS, cdiv, check, check_shape, check_tensor
from requant.kernels.pack import n_words, pack, unpack_ref

TRITS = 5
"""Ternary codes a byte."""


class _Grouped(Stored):
    """What both layouts have in common."""

    @property
    def d_out(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    @property
    def columns(self) -> int:
        """Columns that share a scale; fewer in the last group if they do not divide d_in."""
        return self.d_in if self.group_size is None else self.group_size

    @property
    def n_groups(self) -> int:
        return cdiv(self.d_in, self.columns)

    def _check_scale(self, name: str, n_levels: int) -> None:
        scale = check_tensor(name, getattr(self, name), FLOATS, 3)
        rows = scale.shape[1]
        check_shape(name, scale, (n_levels, rows, self.n_groups))
        check(
            rows == self.scale.shape[1] and self.d_out % rows == 0,
            f"{name} has {rows} rows, which must divide d_out {self.d_out} and agree with scale",
        )

    def _check_sizes(self) -> None:
        check(self.d_in > 0, f"d_in must be positive, not {self.d_in}")
        check(self.group_size is None or self.group_size > 0, "group_size must be positive, or None")


@dataclass(frozen=True)
class BinaryWeight(_Grouped):
    """A weight [d_out, d_in] of signs and scales; the module's head says how planes and levels go together.

    Attributes:
        signs: int32 [d_out, n_words(d_in, 1)], the first sign of each weight.
        scale: [n_levels, rows, n_groups] floating point; rows divides d_out: 1 = the whole weight shares a scale,
            d_out = each row has its own, else equal runs of rows share one.
        flags: int32, like signs, or None. salient: int32 [n_words(d_in, 1)], one bit a column, or None.
        residual: int32 [d_out, n_words(number of salient columns, 1)], or None.
        mean: like scale, or None = 0. column_scale: [n_levels, d_in] floating point, or None = 1 (ARB-LLM's RC).
        group_size: columns a scale; None = all of a row.
    """

    signs: Tensor
    scale: Tensor
    d_in: int
    flags: Tensor | None = None
    salient: Tensor | None = None
    residual: Tensor | None = None
    mean: Tensor | None = None
    column_scale: Tensor | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        self._check_sizes()
        width = n_words(self.d_in, 1)
        check_shape("signs", check_tensor("signs", self.signs, (torch.int32,), 2), (self.d_out, width))
        check(self.flags is not None or self.salient is None, "salient columns need flags")
        check(self.salient is not None or self.residual is None, "residual signs need salient columns")
        if self.flags is not None:
            check_shape("flags", check_tensor("flags", self.flags, (torch.int32,), 2), (self.d_out, width))
        if self.salient is not None:
            check_shape("salient", check_tensor("salient", self.salient, (torch.int32,), 1), (width,))
        if self.residual is not None:
            check_tensor("residual", self.residual, (torch.int32,), 2)
            wanted = max(1, n_words(self.n_salient, 1))
            check_shape("residual", self.residual, (self.d_out, wanted))
        self._check_scale("scale", self.n_levels)
        if self.mean is not None:
            self._check_scale("mean", self.n_levels)
        if self.column_scale is not None:
            check_tensor("column_scale", self.column_scale, FLOATS, 2)
            check_shape("column_scale", self.column_scale, (self.n_levels, self.d_in))

    @property
    def n_levels(self) -> int:
        planes = (self.flags, self.salient, self.residual)
        return (1, 2, 4, 6)[sum(plane is not None for plane in planes)]

    @functools.cached_property
    def n_salient(self) -> int:
        return 0 if self.salient is None else int(unpack_ref(self.salient, 1, self.d_in).sum())

    @functools.cached_property
    def ranks(self) -> Tensor:
        """int32 [d_in]: the place of each salient column in residual (of others any place); not stored."""
        salient = unpack_ref(self.salient, 1, self.d_in).int()
        return (salient.cumsum(0) - 1).clamp(min=0).int()


@dataclass(frozen=True)
class TernaryWeight(_Grouped):
    """A weight [d_out, d_in] of -1, 0 and +1 times a scale.

    Attributes:
        codes: value + 1: int32 [d_out, n_words(d_in, 2)], or uint8 [d_out, d_in / 5 rounded up], five a byte.
        scale: [1, rows, n_groups], as in `BinaryWeight`.
        group_size: columns a scale; None = all of a row.
    """

    codes: Tensor
    scale: Tensor
    d_in: int
    group_size: int | None = None

    def __post_init__(self) -> None:
        self._check_sizes()
        check_tensor("codes", self.codes, (torch.int32, torch.uint8), 2)
        width = cdiv(self.d_in, TRITS) if self.trits else n_words(self.d_in, 2)
        check_shape("codes", self.codes, (self.d_out, width))
        self._check_scale("scale", 1)

    @property
    def trits(self) -> bool:
        """Whether five codes share a byte."""
        return self.codes.dtype == torch.uint8


def pack_trits(values: Tensor) -> Tensor:
    """Five values a byte along the last dimension: uint8 [..., d_in / 5 rounded up], padded with zeros.

    Args:
        values: [..., d_in] of -1, 0 and +1, any dtype.
    """
    _check_ternary(values)
    padded = torch.nn.functional.pad(values.long() + 1, (0, -values.shape[-1] % TRITS), value=1)
    places = 3 ** torch.arange(TRITS, device=values.device)
    return (padded.unflatten(-1, (-1, TRITS)) * places).sum(-1).to(torch.uint8)


def unpack_trits(packed: Tensor, d_in: int) -> Tensor:
    """Inverse of `pack_trits`: int8 [..., d_in]."""
    places = 3 ** torch.arange(TRITS, device=packed.device)
    digits = packed[..., None].long() // places % 3 - 1
    return digits.flatten(-2)[..., :d_in].to(torch.int8)


def _check_ternary(values: Tensor) -> None:
    check(values.numel() > 0, f"values is empty: shape {tuple(values.shape)}")
    known = (values == 0) | (values == 1) | (values == -1)
    check(bool(known.all()), "ternary values must be -1, 0 or +1")


def _rows(scale: Tensor, n_levels: int = 1) -> Tensor:
    """scale as [n_levels, rows, n_groups]: a number, [rows], [rows, n_groups] or that with levels."""
    if scale.ndim == 3:
        return scale
    return (scale.reshape(-1, 1) if scale.ndim < 2 else scale)[None].expand(n_levels, -1, -1).contiguous()


def pack_binary(
    positive: Tensor,
    scale: Tensor,
    *,
    flags: Tensor | None = None,
    salient: Tensor | None = None,
    residual: Tensor | None = None,
    mean: Tensor | None = None,
    column_scale: Tensor | None = None,
    group_size: int | None = None,
) -> BinaryWeight:
    """Store planes of bits and their scales.

    Args:
        positive: bool [d_out, d_in], where the first sign is +1.
        scale: [n_levels, rows, n_groups], or with one level [rows, n_groups], [rows] or a single number.
        flags: bool [d_out, d_in]: the group by magnitude; in salient columns the second sign, without residual.
        salient: bool [d_in]. residual: bool [d_out, d_in], the second sign; read in salient columns only.
        mean, column_scale, group_size: see `BinaryWeight`.
    Raises: ValueError naming the argument.
    """
    check_tensor("positive", positive, (torch.bool,), 2)
    for name, plane in (("flags", flags), ("residual", residual)):
        if plane is not None:
            check_shape(name, check_tensor(name, plane, (torch.bool,), 2), tuple(positive.shape))
    if salient is not None:
        check_shape("salient", check_tensor("salient", salient, (torch.bool,), 1), (positive.shape[1],))
    second = None
    if residual is not None:
        check(salient is not None, "residual signs need salient columns")
        kept = residual[:, salient].byte()
        second = pack(kept, 1) if kept.numel() else torch.zeros(len(kept), 1, dtype=torch.int32)
    return BinaryWeight(
        pack(positive.byte(), 1), _rows(scale), positive.shape[1],
        None if flags is None else pack(flags.byte(), 1), None if salient is None else pack(salient.byte(), 1),
        second, mean, column_scale, group_size,
    )  # fmt: skip


def pack_ternary(
    values: Tensor, scale: Tensor, group_size: int | None = None, *, trits: bool = True
) -> TernaryWeight:
    """Store ternary values and their scales.

    Args:
        values: [d_out, d_in] of -1, 0 and +1, any dtype.
        scale: [1, rows, n_groups], [rows, n_groups], [rows] or a single number.
        trits: five codes a byte (1.6 bits a weight) instead of 2-bit codes.
    Raises: ValueError naming the argument.
    """
    check(values.ndim == 2, f"values must have 2 dimensions, not shape {tuple(values.shape)}")
    _check_ternary(values)
    codes = pack_trits(values) if trits else pack((values + 1).to(torch.uint8), 2)
    return TernaryWeight(codes, _rows(scale), values.shape[1], group_size)


def wide(scale: Tensor, d_out: int, d_in: int, columns: int, dtype: torch.dtype) -> Tensor:
    """scale [n_levels, rows, n_groups] for every weight: [n_levels, d_out, d_in] in dtype."""
    rows = scale.to(dtype).repeat_interleave(d_out // scale.shape[1], 1)
    return rows.repeat_interleave(columns, 2)[..., :d_in]


def values_ref(weight: BinaryWeight | TernaryWeight) -> Tensor:
    """The first signs, or the ternary values: int8 [d_out, d_in]."""
    if isinstance(weight, BinaryWeight):
        return 2 * unpack_ref(weight.signs, 1, weight.d_in).to(torch.int8) - 1
    if weight.trits:
        return unpack_trits(weight.codes, weight.d_in)
    return unpack_ref(weight.codes, 2, weight.d_in).to(torch.int8) - 1


def dequantize_ref(weight: BinaryWeight | TernaryWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight in dtype (float32 or float64): [d_out, d_in]."""
    first, d_in = values_ref(weight).to(dtype), weight.d_in
    scale = wide(weight.scale, weight.d_out, d_in, weight.columns, dtype)
    if isinstance(weight, TernaryWeight):
        return first * scale[0]
    if weight.column_scale is not None:
        scale = scale * weight.column_scale.to(dtype)[:, None]
    mean = torch.zeros_like(scale)
    if weight.mean is not None:
        mean = wide(weight.mean, weight.d_out, d_in, weight.columns, dtype)
    term = [mean[i] + first * scale[i] for i in range(weight.n_levels)]
    if weight.flags is None:
        return term[0]
    flag = unpack_ref(weight.flags, 1, d_in).bool()
    plain = torch.where(flag, term[1], term[0])
    if weight.salient is None:
        return plain
    salient = unpack_ref(weight.salient, 1, d_in).bool()
    if weight.residual is None:
        return torch.where(salient, term[2] + mean[3] + torch.where(flag, scale[3], -scale[3]), plain)
    bits = unpack_ref(weight.residual, 1, 32 * weight.residual.shape[1])[:, weight.ranks.long()]
    second = 2 * bits.to(dtype) - 1
    both = [term[i] + mean[i + 1] + second * scale[i + 1] for i in (2, 4)]
    return torch.where(salient, torch.where(flag, both[1], both[0]), plain)
