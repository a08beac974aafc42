"""ResQ's bases (arXiv:2412.14363v2, Sec. 4): principal axes, times an orthogonal matrix for each part of their width.

`cfg` is the method's Config: `widths` says how many axes each part has, the low one first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls._activation import bare
from requant.reference_impls._anatomy import anatomy, heads
from requant.reference_impls._hadamard import random_orthogonal
from requant.reference_impls._places import RotatedNetwork, learn
from requant.reference_impls._rotation import hadamard_before, rotate_stream, rotate_values
from requant.reference_impls._walk import visit_blocks
from requant.reference_impls.parts.resq_basis_change import rotate_sublayers
from requant.reference_impls.parts.resq_moments import collect


@dataclass(frozen=True)
class Bases:
    """Orthogonal matrices, float64, that turn the stream, values and keys of a model with fused norms.

    Attributes:
        stream: U_A R1 [hidden, hidden], what each attention and each MLP in turn read, and the head at last; the same
            object where they are one.
        values: U_B R2 [n_kv_heads, head_dim, head_dim] for each block.
        keys: U_C R2 for each block, [head_dim, head_dim] or as of values.
    """

    stream: list[Tensor]
    values: list[Tensor]
    keys: list[Tensor]


def mixing(width: int, cfg, generator: torch.Generator) -> Tensor:
    """blockdiag(R_low, R_high) [width, width], random orthogonal or, without mixing, the identity; float64."""
    if not cfg.mix:
        return torch.eye(width, dtype=torch.float64)
    return torch.block_diag(*(random_orthogonal(n, generator) for n, _ in cfg.widths(width, cfg.w_bits)))


def find_bases(model: nn.Module, calib: Tensor, cfg) -> Bases:
    """Those of a model with fused norms: axes by variance, times a random rotation inside each part."""
    stream, values, keys = collect(model, calib[: cfg.basis_samples], cfg.rotation_granularity)
    generator = torch.Generator().manual_seed(cfg.seed)
    R1, R2 = (mixing(moments.sizes.shape[-1], cfg, generator) for moments in (stream[0], keys[0]))
    different = {id(moments): moments for moments in stream}
    U_A = {which: moments.axes(cfg) @ R1 for which, moments in different.items()}
    read = [U_A[id(moments)] for moments in stream]
    head = read[-1] if len(U_A) == 1 else R1  # code: behind its last change of basis the head reads R1 alone
    return Bases(
        [*read, head], [each.axes(cfg) @ R2 for each in values], [each.axes(cfg) @ R2 for each in keys]
    )


def turn_keys(query: Tensor, key: Tensor, value: Tensor, U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [batch, heads, seqlen, head_dim] times U after rotary embedding: their products stay."""
    U = U.to(key)
    for_queries = U if U.ndim == 2 else U.repeat_interleave(query.shape[1] // len(U), 0)
    return query @ for_queries, key @ U, value


def fold(model: nn.Module, bases: Bases) -> None:
    """Rotate a model with fused norms, in place; Hadamard transforms stand before the down projections.

    Raises: UnsupportedModelError for a structure, or an MLP width, that cannot be rotated.
    """
    if bases.stream[0] is bases.stream[-1]:
        rotate_stream(model, bases.stream[0])
    else:
        rotate_sublayers(model, bases.stream)
    blocks = map(bare, map(anatomy, visit_blocks(model)))
    for parts, U_B, U_C in zip(blocks, bases.values, bases.keys, strict=True):
        rotate_values(parts, heads(parts, model.config), U_B)
        hadamard_before(parts.block, parts.down)
        parts.attn.requant_transform = partial(turn_keys, U=U_C)


def learnable(rounded: nn.Module, bases: Bases, cfg) -> tuple[RotatedNetwork, list[list[nn.Parameter]]]:
    """A network as a function of further rotations inside the parts of its bases, and these: R1's, then every R2's.

    They start at the identity and come behind `bases`: Cayley SGD takes the same steps from there as from R1 and R2
    themselves.

    Args:
        rounded: float32, rotated by `bases`, one of the stream; rounded when it runs.
    """
    sizes = [len(bases.stream[0]), *(each.shape[-1] for each in bases.values)]
    matrices = [
        [nn.Parameter(torch.eye(n, device=rounded.device)) for n, _ in cfg.widths(size, cfg.w_bits)]
        for size in sizes
    ]

    def rotations() -> tuple[Tensor, list[Tensor]]:
        R1, *R2 = (torch.block_diag(*parts) for parts in matrices)
        return R1, R2

    return RotatedNetwork(rounded, rotations), matrices


def trained(rounded: nn.Module, bases: Bases, calib: Tensor, cfg) -> Bases:
    """R1 and one R2 a block moved, each part for itself, to where the network of `learnable` has a smaller loss.

    Args:
        calib: int64 [n_samples, seqlen].
    """
    network, matrices = learnable(rounded, bases, cfg)
    flat = [part for parts in matrices for part in parts]
    learned = iter(learn(network, flat, calib, cfg, cfg.momentum))
    R1, *R2 = (torch.block_diag(*(next(learned).cpu() for _ in parts)) for parts in matrices)
    values = [U @ R for U, R in zip(bases.values, R2, strict=True)]
    return Bases([bases.stream[0] @ R1] * len(bases.stream), values, bases.keys)
