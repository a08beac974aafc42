"""Storage of weights of vector codes: every vector of the weight is a sum of rows of codebooks.

Source    AQLM (arXiv:2401.06118) and VPTQ (2409.17066), as in `codebook_matmul`
Deviates  ends that the vector length does not divide are padded; the papers' models have none

One storage serves both papers. A code row is one output channel (vectors along "input", AQLM) or v neighbouring
channels (along "output", VPTQ); it has one place for every v inputs, or for every input. A place holds one code a
codebook (`bitstream`), and its vector is the sum of the entries that the codes name:
  along "input"   W[n, v*p + i] = scale[n] * sum_m C_m[code[n, p, m], i]
  along "output"  W[v*r + i, p] = scale[v*r + i] * sum_m C_m[code[r, p, m], i]
Places may be divided into equal sets with their own codebooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from requant.kernels._stored import Stored
from requant.kernels._triton import FLOATS, cdiv, check, check_shape, check_tensor
from requant.kernels.bitstream import check_widths, pack_stream, stream_words, unpack_stream

MAX_VECTOR = 16
"""Longest vector of a codebook."""


@dataclass(frozen=True)
class CodebookWeight(Stored):
    """A weight [d_out, d_in] of vector codes.

    Attributes:
        words: int32 [n_rows, stream_words(places, widths)].
        codebooks: [n_sets, entries, v], floating point; entries = sum of 2^width, first codebook first.
        scale: [d_out], floating point; None = 1.
        widths: bits of each codebook's codes; all but the first must be equal.
        d_out, d_in: shape of the weight.
        along: whether a vector holds neighbouring inputs of one output ("input") or the reverse ("output").
    """

    words: Tensor
    codebooks: Tensor
    scale: Tensor | None
    widths: tuple[int, ...]
    d_out: int
    d_in: int
    along: Literal["input", "output"] = "input"

    def __post_init__(self) -> None:
        check_widths(self.widths)
        check(len(set(self.widths[1:])) <= 1, f"widths after the first must be equal: {self.widths}")
        check(self.along in ("input", "output"), f"along must be 'input' or 'output', not {self.along!r}")
        check(self.d_out > 0 and self.d_in > 0, f"the weight is empty: [{self.d_out}, {self.d_in}]")
        check_tensor("words", self.words, (torch.int32,), 2)
        check_tensor("codebooks", self.codebooks, FLOATS, 3)
        check(self.vector <= MAX_VECTOR, f"vectors hold at most {MAX_VECTOR} weights, not {self.vector}")
        check_shape("words", self.words, (self.n_rows, stream_words(self.places, self.widths)))
        entries = sum(2**b for b in self.widths)
        check_shape("codebooks", self.codebooks, (self.n_sets, entries, self.vector))
        check(self.n_sets <= self.places, f"{self.n_sets} sets of codebooks for {self.places} places")
        if self.scale is not None:
            check_tensor("scale", self.scale, FLOATS, 1)
            check_shape("scale", self.scale, (self.d_out,))

    @property
    def vector(self) -> int:
        """Weights a vector holds."""
        return self.codebooks.shape[2]

    @property
    def n_sets(self) -> int:
        """Sets of codebooks, each for `set_places` places."""
        return self.codebooks.shape[0]

    @property
    def places(self) -> int:
        """Vectors of a code row."""
        return cdiv(self.d_in, self.vector) if self.along == "input" else self.d_in

    @property
    def n_rows(self) -> int:
        """Code rows."""
        return self.d_out if self.along == "input" else cdiv(self.d_out, self.vector)

    @property
    def set_places(self) -> int:
        """Places that share a set; the last set may have fewer."""
        return cdiv(self.places, self.n_sets)


@dataclass(frozen=True)
class ColumnParts(Stored):
    """A weight whose columns are reordered and coded in parts, as VPTQ's outlier columns and the rest are.

    Attributes:
        parts: weights that follow each other along d_in, outlier columns first; equal d_out.
        order: int16 or int32 [d_in], the column of the weight that each column of the parts is; None = as they are.
    """

    parts: tuple[CodebookWeight, ...]
    order: Tensor | None = None

    def __post_init__(self) -> None:
        check(len(self.parts) > 0, "parts is empty")
        check(len({part.d_out for part in self.parts}) == 1, "parts must have the same d_out")
        if self.order is not None:
            check_tensor("order", self.order, (torch.int16, torch.int32), 1)
            check_shape("order", self.order, (self.d_in,))
            steps = torch.arange(self.d_in, device=self.order.device)
            check(
                torch.equal(self.order.long().sort().values, steps), "order must be a permutation of columns"
            )

    @property
    def d_out(self) -> int:
        return self.parts[0].d_out

    @cached_property
    def d_in(self) -> int:
        return sum(part.d_in for part in self.parts)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are stored, by name: those of part i begin with i."""
        found = {f"{i}.{name}": t for i, part in enumerate(self.parts) for name, t in part.tensors.items()}
        return found if self.order is None else found | {"order": self.order}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of each part, in their order."""
        return {"parts": [part.settings for part in self.parts]}

    @classmethod
    def from_stored(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> ColumnParts:
        """See `Stored.from_stored`."""
        parts = [
            CodebookWeight.from_stored(
                {name.removeprefix(f"{i}."): t for name, t in tensors.items() if name.startswith(f"{i}.")}, of
            )
            for i, of in enumerate(settings["parts"])
        ]
        return cls(tuple(parts), tensors.get("order"))


def pack_codebook(
    codes: Tensor,
    codebooks: Tensor,
    scale: Tensor | None,
    widths: tuple[int, ...],
    shape: tuple[int, int],
    along: Literal["input", "output"] = "input",
) -> CodebookWeight:
    """Store codes [n_rows, places, len(widths)] (integers) of a weight of this shape [d_out, d_in].

    Raises: ValueError naming the argument that does not fit.
    """
    return CodebookWeight(pack_stream(codes, widths), codebooks, scale, tuple(widths), *shape, along)


def decode_ref(weight: CodebookWeight | ColumnParts, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [d_out, d_in] in dtype (float32 or float64)."""
    if isinstance(weight, ColumnParts):
        W = torch.cat([decode_ref(part, dtype) for part in weight.parts], dim=1)
        return W if weight.order is None else torch.zeros_like(W).index_copy_(1, weight.order.long(), W)
    codes = unpack_stream(weight.words, weight.widths, weight.places)  # [n_rows, places, M]
    tables = [sum(2**b for b in weight.widths[:m]) for m in range(len(weight.widths))]
    entries = codes + torch.tensor(tables, device=codes.device)
    sets = torch.arange(weight.places, device=codes.device) // weight.set_places
    vectors = weight.codebooks.to(dtype)[sets[:, None], entries].sum(2)  # [n_rows, places, v]
    if weight.along == "output":
        vectors = vectors.transpose(1, 2)  # [n_rows, v, places]
        W = vectors.reshape(-1, weight.places)[: weight.d_out]
    else:
        W = vectors.flatten(1)[:, : weight.d_in]
    return W if weight.scale is None else W * weight.scale.to(dtype)[:, None]
