"""What a method packs, kept while it quantizes a model.

`quantize` returns a model of dequantized weights, and packing needs each W and H as they were inside the
walk. So while a method runs, `recording` puts a function in the place of its `quantize_weight` that packs, unpacks and
keeps what was packed. That a method's unpacked layer equals its quantized layer is a test every method passes, so the
result is the same model, and no method changes. Rows of stacked matrices are found again by their bits.

Packing takes longer than rounding. `needless` saves it where codes can be read off the finished weights: it is asked
once, about the first matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Record:
    """One matrix that went through `quantize_weight`: its packed tensors, and a key of every row [d_out]."""

    packed: dict[str, Tensor]
    shape: tuple[int, int]
    keys: Tensor


@dataclass
class Records:
    """All matrices of one run, with an index from the key of a row to the places it has."""

    matrices: list[Record] = field(default_factory=list)
    skipped: bool | None = None  # whether packing was needless; None before the first matrix
    places: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def add(self, packed: dict[str, Tensor], W: Tensor) -> None:
        """Keep a matrix W [d_out, d_in] float32."""
        keys = _row_keys(W)
        for row, key in enumerate(keys.tolist()):
            self.places.setdefault(key, []).append((len(self.matrices), row))
        self.matrices.append(Record(packed, tuple(W.shape), keys))

    def find(self, W: Tensor) -> tuple[int, int] | None:
        """Matrix and first row of a weight that was cut out of it unchanged."""
        keys = _row_keys(W)
        for index, row in reversed(self.places.get(int(keys[0]), [])):
            if torch.equal(self.matrices[index].keys[row : row + len(keys)], keys):
                return index, row
        return None


def _row_keys(W: Tensor) -> Tensor:
    """A number for every row that depends on each of its bits: int64 [d_out]; exact, so the same anywhere."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(2**62, (W.shape[1],), generator=generator) * 2 + 1
    return (W.detach().float().contiguous().view(torch.int32).long() * factors).sum(1)


@contextmanager
def recording(impl: ModuleType, needless: Callable[[Tensor], bool] = lambda _: False) -> Iterator[Records]:
    """While open, every weight the method quantizes is kept in packed form; one run at a time in a process.

    Args:
        needless: asked about the first quantized matrix [d_out, d_in]; if true, nothing is kept.
    """
    records, plain = Records(), getattr(impl, "quantize_weight", None)
    if plain is None or not hasattr(impl, "pack_weight"):
        yield records
        return

    def quantize_weight(W: Tensor, H: Tensor | None, cfg: object) -> Tensor:
        if records.skipped is None:
            first = plain(W, H, cfg)
            records.skipped = needless(first)
            if records.skipped:
                return first
        if records.skipped:
            return plain(W, H, cfg)
        packed = impl.pack_weight(W, H, cfg)
        unpacked = impl.unpack_weight(packed, cfg)
        records.add(packed, unpacked)
        return unpacked

    impl.quantize_weight = quantize_weight
    try:
        yield records
    finally:
        impl.quantize_weight = plain
