"""A decoder as a differentiable function of the rotations that fold into it, and learning them.

SpinQuant (arXiv:2405.16406v4, Sec. 3.1): R1 turns the residual stream, one R2 a block the values of each head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from requant.reference_impls._activation import bare
from requant.reference_impls._anatomy import Heads, block_anatomies, heads
from requant.reference_impls._learn import descend, in_order, next_token_loss
from requant.reference_impls._rotation import Rotation
from requant.reference_impls._stiefel import CayleySGD, orthonormalized
from requant.reference_impls._straight_through import straight_through
from requant.reference_impls._stream_ends import stream_ends


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
    """All of them in a model with fused norms, and whether each is a weight to be rounded."""
    names = {id(module): name for name, module in model.named_modules()}
    ends = stream_ends(model)
    for module in (*ends.embeddings, ends.head):
        yield Place(f"{names[id(module)]}.weight", module.weight, reads=True), False
    for index, parts in enumerate(map(bare, block_anatomies(model))):
        online = [each for each in parts.block.modules() if isinstance(each, Rotation)]  # behind post-norms
        for rotation in online:
            yield Place(f"{names[id(rotation)]}.Q", rotation.Q, reads=True), False
        geometry = heads(parts, model.config)
        readers = [*parts.qkv, *parts.ups]
        for module in (*readers, parts.o, parts.down):
            value, writes = module is geometry.value, module not in readers and not online
            name, inner = names[id(module)], {"layer": index, "geometry": geometry, "values": value}
            inner = inner if value or module is parts.o else {}
            yield Place(f"{name}.weight", module.weight, module in readers, writes, **inner), True
            if module.bias is not None and (value or writes):
                yield Place(f"{name}.bias", module.bias, writes=writes, **(inner if value else {})), False


class RotatedNetwork:
    """A network, rounded when it runs, as a function of the rotations of its stream and values.

    Args:
        model: float32, with fused norms; where rotations are folded in already, these come on top.
        rotations: () -> R1 [hidden, hidden] and one R2 [head_dim, head_dim] a block.
        rounding: of the rotated weights, W -> dequantized W; None = not rounded.
    """

    def __init__(
        self,
        model: nn.Module,
        rotations: Callable[[], tuple[Tensor, list[Tensor]]],
        rounding: Callable[[Tensor], Tensor] | None = None,
    ):
        self.model, self.rotations = model, rotations
        self.places = [(place, rounding if is_weight else None) for place, is_weight in places(model)]

    def logits(self, tokens: Tensor) -> Tensor:
        """[n, seqlen, vocabulary] for tokens [n, seqlen]."""
        R1, R2 = self.rotations()
        weights = {place.name: place.rotated(R1, R2, how) for place, how in self.places}
        return torch.func.functional_call(self.model, weights, (tokens,), {"use_cache": False}).logits

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean next-token cross entropy in nats (SpinQuant, Eq. 2)."""
        return next_token_loss(self.logits(tokens), tokens)


def learn(
    network: RotatedNetwork,
    matrices: list[nn.Parameter],
    calib: Tensor,
    cfg,
    momentum: float = 0.0,
    watch: Callable[[list[Tensor]], None] | None = None,
) -> list[Tensor]:
    """Cayley SGD on the orthogonal matrices that the network's rotations are made of, all weights frozen.

    Args:
        calib: int64 [n_samples, seqlen], in order and again from the start where it is used up.
        cfg: the method's Config: steps, batch_size, lr (decays to zero along a cosine), cayley_iterations, seed.
        watch: called with the matrices after each step.
    Returns: the matrices, orthonormalized, float64.
    """
    generator = torch.Generator().manual_seed(cfg.seed)
    optimizer = CayleySGD(matrices, cfg.lr, cfg.cayley_iterations, generator=generator, momentum=momentum)
    schedule = LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / cfg.steps)))
    epochs = cfg.steps * cfg.batch_size // len(calib) + 1
    batches = islice(in_order(len(calib), cfg.batch_size, epochs), cfg.steps)
    project = None if watch is None else lambda: watch(matrices)
    descend(lambda batch: network.loss(calib[batch]), optimizer, batches, schedule=schedule, project=project)
    return [orthonormalized(R.detach()) for R in matrices]
