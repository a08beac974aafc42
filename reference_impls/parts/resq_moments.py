"""Second moments inside a decoder, and the axes along which they are largest (ResQ, arXiv:2412.14363v2, Sec. 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from requant.reference_impls._activation import transform_attention
from requant.reference_impls._anatomy import block_anatomies
from requant.reference_impls._hessian import damped, gram
from requant.reference_impls._walk import walk_blocks


class Moments:
    """Sums over tokens of x x^T and |x| for x [..., n_tokens, d], leading dimensions kept apart."""

    def __init__(self) -> None:
        self.squares = self.sizes = 0.0

    def add(self, X: Tensor) -> None:
        """Count X [..., n_tokens, d] in."""
        products = gram(X) if X.ndim == 2 else X.mT @ X
        self.squares, self.sizes = self.squares + products.double(), self.sizes + X.abs().sum(-2).double()

    def axes(self, cfg) -> Tensor:
        """Orthonormal axes [..., d, d] as columns, the largest last; moments are not centred.

        Args:
            cfg: the method's Config. subspace "principal" stands for eigenvectors in the order of their eigenvalues,
                "channels" for channels in the order of their sums of |x|; basis_damp_ratio is added to the moments, as
                a share of their mean diagonal.
        """
        width = self.sizes.shape[-1]
        if cfg.subspace == "channels":
            return torch.eye(width, dtype=torch.float64)[self.sizes.argsort().cpu()].mT
        moments = torch.stack([damped(S, cfg.basis_damp_ratio) for S in self.squares.view(-1, width, width)])
        return torch.linalg.eigh(moments.view_as(self.squares)).eigenvectors.cpu()  # eigenvalues ascend


@torch.no_grad()
def collect(
    model: nn.Module, calib: Tensor, granularity: str = "full_shared"
) -> tuple[list[Moments], list[Moments], list[Moments]]:
    """Moments of the stream as the linears read it, of values and of keys after rotary embedding.

    Args:
        model: with fused norms; its attention modules are left with a transform that changes nothing.
        granularity: whose moments of the stream are one: "full_shared" all, "one_per_decoder" those of a block,
            "per_layer" those of a sublayer. Only if all are, the heads of a block share the moments of keys.
    Returns: the stream's in front of each attention and MLP in turn, the same object where they are one; for each
        block the values' [n_kv_heads, head_dim, head_dim] and the keys' [head_dim, head_dim], or as the values'.
    """
    shared, stream, values, keys = Moments(), [], [], []
    per_head = granularity != "full_shared"

    def record(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys[-1].add(key.transpose(0, 1).flatten(int(per_head), 2))  # [(n_kv_heads,) n_tokens, head_dim]
        values[-1].add(value.transpose(0, 1).flatten(1, 2))  # [n_kv_heads, n_tokens, head_dim]
        return query, key, value

    anatomies = block_anatomies(model)
    for parts in anatomies:
        transform_attention(model, parts.attn, lambda *states: states)
    for block, parts in zip(walk_blocks(model, calib), anatomies, strict=True):
        values.append(Moments())
        keys.append(Moments())
        parts.attn.requant_transform = record
        attention = shared if granularity == "full_shared" else Moments()
        mlp = Moments() if granularity == "per_layer" else attention
        stream += [attention, mlp]
        read = {"attention": attention, "mlp": mlp}
        readers = {"attention": parts.qkv[0], "mlp": parts.ups[0]}
        block.observe(readers, lambda name, X, read=read: read[name].add(X.float()))
        parts.attn.requant_transform = lambda *states: states
    return stream, values, keys
