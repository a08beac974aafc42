"""Parameters of a block as functions of learned transforms, and the scale between queries and keys.

What OmniQuant and its relatives train: nothing changes in place until the finished transform is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from requant.reference_impls._anatomy import BlockAnatomy, gain_offset, heads


class Folded:
    """What a module's parameters become under transforms, by dotted name; differentiable, nothing changes in place.

    Index it with a parameter or buffer of the module. `tensors` is what `Block.forward` takes in their places.
    """

    def __init__(self, root: nn.Module):
        self.root = root
        self.names = {id(t): name for name, t in (*root.named_parameters(), *root.named_buffers())}
        self.tensors: dict[str, Tensor] = {}

    def __getitem__(self, tensor: Tensor) -> Tensor:
        return self.tensors.get(self.names[id(tensor)], tensor)

    def __setitem__(self, tensor: Tensor, value: Tensor) -> None:
        self.tensors[self.names[id(tensor)]] = value

    def scale_norm(self, norm: nn.Module, s: Tensor, d: Tensor | None = None) -> None:
        """Make the norm give (X - d) / s; s, d [hidden]."""
        offset, bias = gain_offset(norm), getattr(norm, "bias", None)
        self[norm.weight] = (self[norm.weight] + offset) / s - offset
        if bias is not None:
            self[bias] = (self[bias] if d is None else self[bias] - d) / s

    def scale_rows(self, linear: nn.Linear, rows: Tensor, s: Tensor, d: Tensor | None = None) -> None:
        """Make these output rows of a linear give (X - d) / s; s, d as long as rows."""
        divisor = torch.ones_like(self[linear.weight][:, 0]).index_copy(0, rows, s)
        self[linear.weight] = self[linear.weight] / divisor[:, None]
        if linear.bias is not None:
            moved = self[linear.bias] if d is None else self[linear.bias].index_add(0, rows, -d)
            self[linear.bias] = moved / divisor

    @torch.no_grad()
    def write(self) -> None:
        """Put all tensors into the module itself, in place."""
        own = {**dict(self.root.named_parameters()), **dict(self.root.named_buffers())}
        for name, tensor in self.tensors.items():
            own[name].copy_(tensor)


@dataclass(frozen=True)
class QueryKey:
    """The scale between queries and keys, s [rows of k]: q / s and k * s leave every attention score as it was.

    Under rotary embedding only if both channels of a rotated pair share their s; `tie` makes them.
    """

    q: nn.Linear
    k: nn.Linear
    head_dim: int
    repeat: int
    rotary_dim: int

    def tie(self, s: Tensor) -> Tensor:
        """s with the mean of each rotated pair (j, j + rotary_dim / 2) in both of its places."""
        by_head, half = s.view(-1, self.head_dim), self.rotary_dim // 2
        if not half:
            return s
        mean = (by_head[:, :half] + by_head[:, half : 2 * half]) / 2
        return torch.cat([mean, mean, by_head[:, 2 * half :]], 1).flatten()

    def fold_into(self, now: Folded, s: Tensor) -> None:
        """Scale both projections in `now`; gradients flow to s."""
        read = s.view(-1, 1, self.head_dim).expand(-1, self.repeat, -1).flatten()
        now.scale_rows(self.q, torch.arange(self.q.out_features), read)
        now.scale_rows(self.k, torch.arange(self.k.out_features), 1 / s)


def query_key(parts: BlockAnatomy, config, kwargs: Mapping[str, object]) -> QueryKey | None:
    """The q-k pair of a block; None where they are one linear or a norm stands behind them (Qwen 3).

    Args:
        kwargs: what the model passes to the block; cos and sin among it tell of rotary embedding, and its width.
    """
    weighted = [module for module in parts.attn.children() if getattr(module, "weight", None) is not None]
    if parts.q is None or any(not isinstance(getattr(m, "linear", m), nn.Linear) for m in weighted):
        return None
    geometry, rotary = heads(parts, config), kwargs.get("position_embeddings")
    rotary_dim = 0 if rotary is None else rotary[0].shape[-1]
    repeat = geometry.n_heads // geometry.n_kv_heads
    return QueryKey(parts.q, parts.k, geometry.head_dim, repeat, rotary_dim)
