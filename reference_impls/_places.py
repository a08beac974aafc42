"""The tensors of a decoder that folded rotations change, as differentiable functions of the rotations.

SpinQuant (arXiv:2405.16406v4, Sec. 3.1): R1 turns the residual stream, one R2 a block the values of each head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from requant.reference_impls._activation import bare
from requant.reference_impls._anatomy import block_anatomies
from requant.reference_impls._learn import straight_through
from requant.reference_impls._rotation import Heads, Rotation, heads, stream_ends


@dataclass(frozen=True)
class Place:
    """A tensor that R1 or R2 changes: what reads the stream, what writes to it, values, and what reads values."""

    name: str
    tensor: Tensor
    reads: bool = False
    writes: bool = False
    layer: int | None = None  # whose R2
    geometry: Heads | None = None
    values: bool = False  # the rows of v; else the columns of o

    def rotated(self, R1: Tensor, R2: list[Tensor], rounding: Callable | None) -> Tensor:
        """The tensor after rotation, differentiable in R1 and R2."""
        T = self.tensor
        if self.layer is not None:
            R, size, rows = R2[self.layer], self.geometry.head_dim, self.geometry.value_rows
            if not self.values:
                T = (T.unflatten(1, (-1, size)) @ R).flatten(1)
            elif T.ndim == 1:
                T = T.index_copy(0, rows, (T[rows].view(-1, size) @ R).flatten())
            else:
                T = T.index_copy(0, rows, (R.T @ T[rows].unflatten(0, (-1, size))).flatten(0, 1))
        if self.reads:
            T = T @ R1
        if self.writes:
            T = R1.T @ T if T.ndim == 2 else T @ R1
        return T if rounding is None or T.ndim == 1 else straight_through(T, rounding)


def places(model: nn.Module) -> Iterator[tuple[Place, bool]]:
    """All of them in a model rotated by identities, and whether each is a weight to be rounded."""
    names = {id(module): name for name, module in model.named_modules()}
    ends = stream_ends(model)
    for module in (*ends.embeddings, ends.head):
        yield Place(f"{names[id(module)]}.weight", module.weight, reads=True), False
    for index, parts in enumerate(map(bare, block_anatomies(model))):
        online = [each for each in parts.block.modules() if isinstance(each, Rotation)]  # behind post-norms
        for rotation in online:
            yield Place(f"{names[id(rotation)]}.Q", torch.eye(len(rotation.Q)), reads=True), False
        geometry = heads(parts, model.config)
        readers = [*parts.qkv, *parts.ups]
        for module in (*readers, parts.o, parts.down):
            value, writes = module is geometry.value, module not in readers and not online
            name, inner = names[id(module)], {"layer": index, "geometry": geometry, "values": value}
            inner = inner if value or module is parts.o else {}
            yield Place(f"{name}.weight", module.weight, module in readers, writes, **inner), True
            if module.bias is not None and (value or writes):
                yield Place(f"{name}.bias", module.bias, writes=writes, **(inner if value else {})), False
