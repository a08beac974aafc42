"""Vector codes of keys and values: the nearest centroid of each group of channels, and its number packed into bytes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from requant.reference_impls import _quant

ELEMENTS = 2**25  # distances held at once


def distances(points: Tensor, centroids: Tensor) -> Tensor:
    """|x - c|^2 - |x|^2: points [n_groups, c, n], centroids [n_groups, k, c] -> [n_groups, k, n]."""
    return torch.baddbmm(centroids.square().sum(-1, keepdim=True), centroids, points, alpha=-2)


class Coder(nn.Module):
    """Codes of one layer's keys or values: in each group of c channels the nearest centroid in L2.

    centroids: float16 buffer [n_groups, 2^b, c]; groups run through the first kv head, then the next.
    """

    def __init__(self, centroids: Tensor):
        super().__init__()
        self.register_buffer("centroids", centroids)

    @property
    def code_bits(self) -> int:
        """b, the width of a code."""
        return self.centroids.shape[1].bit_length() - 1

    def encode(self, x: Tensor) -> Tensor:
        """[batch, kv_heads, seqlen, head_dim] -> int64 codes [batch, seqlen, n_groups]."""
        n_groups, size, c = self.centroids.shape
        centroids = self.centroids.to(torch.promote_types(x.dtype, torch.float32))
        points = x.to(centroids.dtype).transpose(1, 2).reshape(-1, n_groups, c).permute(1, 2, 0)
        index, codes = torch.arange(size, device=x.device, dtype=centroids.dtype)[:, None], []
        for some in points.split(max(1, ELEMENTS // (n_groups * size)), dim=-1):
            distance = distances(some.contiguous(), centroids)  # [n_groups, 2^b, n]
            nearest = distance.amin(1, keepdim=True)
            codes.append(distance.le_(nearest).mul_(index).amax(1))  # several times as fast as argmin on CPU
        return torch.cat(codes, dim=-1).T.long().unflatten(0, (x.shape[0], x.shape[2]))

    def decode(self, codes: Tensor, head_dim: int) -> Tensor:
        """Codes [batch, seqlen, n_groups] -> float16 [batch, kv_heads, seqlen, head_dim]."""
        index = codes.flatten(0, 1).T[:, None].expand(-1, self.centroids.shape[-1], -1)  # [n_groups, c, n]
        values = self.centroids.transpose(1, 2).gather(2, index).permute(2, 0, 1)  # [n, n_groups, c]
        return values.reshape(*codes.shape[:2], -1, head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Decoded codes of x [batch, kv_heads, seqlen, head_dim], same shape and dtype."""
        return self.decode(self.encode(x), x.shape[-1]).to(x.dtype)

    @property
    def _padding(self) -> int:
        """Codes to add to a token's so that they fill whole bytes; none for any published setting."""
        return -self.centroids.shape[0] % (8 // math.gcd(8, self.code_bits))

    def pack(self, x: Tensor) -> Tensor:
        """Codes of x [batch, kv_heads, seqlen, head_dim], whole bytes a token: uint8 [batch, 1, seqlen, bytes]."""
        codes = functional.pad(self.encode(x), (0, self._padding))
        return _quant.pack_bits(codes, self.code_bits).view(*codes.shape[:2], -1)[:, None]

    def unpack(self, packed: Tensor, head_dim: int) -> Tensor:
        """Inverse of `pack`, decoded: float16 [batch, kv_heads, seqlen, head_dim]."""
        batch, _, seqlen, _ = packed.shape
        n_groups = self.centroids.shape[0]
        shape = batch, seqlen, n_groups + self._padding
        return self.decode(
            _quant.unpack_bits(packed.flatten(), self.code_bits, shape)[..., :n_groups], head_dim
        )
