"""Channels in clusters of like range, and one static grid for each cluster (RPTQ, arXiv:2304.01089).

Everywhere `cfg` is the method's Config: `kmeans_restarts` and `seed` of it count here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from requant.reference_impls import _quant
from requant.reference_impls._kmeans import weighted_kmeans


def cluster(features: Tensor, n_clusters: int, cfg) -> Tensor:
    """k-means on the features [n_channels, f], the best of some restarts: labels [n_channels], from 0 without gaps.

    The features of a channel are its largest and its smallest value over all calibration tokens.
    """
    if n_clusters >= len(features):
        return torch.arange(len(features))
    generator = torch.Generator().manual_seed(cfg.seed)
    points = features.T.expand(cfg.kmeans_restarts, -1, -1).contiguous()  # [restarts, f, n_channels]
    equal = torch.ones(cfg.kmeans_restarts, len(features))
    centroids, _ = weighted_kmeans(points, equal, n_clusters, 300, generator)
    distance, labels = torch.cdist(points.mT, centroids).min(-1)  # [restarts, n_channels]
    best = int(distance.square().sum(-1).argmin())
    return labels[best].unique(return_inverse=True)[1]


def cluster_heads(features: Tensor, n_clusters: int, cfg) -> Tensor:
    """`cluster` inside each head: features [n_heads, head_dim, f] -> labels [n_heads * head_dim], all different."""
    labels, start = [], 0
    for head in features:
        labels.append(cluster(head, n_clusters, cfg) + start)
        start = int(labels[-1].max()) + 1
    return torch.cat(labels)


def spread(labels: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The outermost range of each channel's cluster: low, high [..., n_channels] -> the same shapes."""
    index = labels.expand_as(low)
    ends = []
    for x, how in ((low, "amin"), (high, "amax")):
        found = x.new_zeros(*x.shape[:-1], int(labels.max()) + 1)
        ends.append(found.scatter_reduce(-1, index, x, how, include_self=False).gather(-1, index))
    return ends[0], ends[1]


def grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step (high - low) / 2^b, not over 2^b - 1, and rounded zero point -(high + low) / (2 step) of signed codes."""
    scale = ((high - low) * 2.0**-bits).clamp(1e-4, 1e4)
    return scale, (-(high + low) / (2 * scale)).clamp(-1e4, 1e4).round()


def codes_of(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """clamp(round(x / scale) + zero_point, -2^(b-1), 2^(b-1) - 1)."""
    return ((x / scale).round() + zero_point).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@dataclass
class Rounding:
    """Static rounding of [..., n_channels], or of [n, heads, seqlen, head_dim] with one grid a head and channel."""

    scale: Tensor
    zero_point: Tensor
    bits: int

    def __call__(self, x: Tensor) -> Tensor:
        return _quant.dequantize(
            codes_of(x, self.scale, self.zero_point, self.bits), self.scale, self.zero_point
        )


@dataclass
class Ranges:
    """Extremes of each channel: of each calibration sequence, [n_channels], in order."""

    low: list[Tensor] = field(default_factory=list)
    high: list[Tensor] = field(default_factory=list)

    def see(self, x: Tensor) -> None:
        """x: [n, seqlen, n_channels]."""
        low, high = torch.aminmax(x, dim=1)
        self.low += low.unbind()
        self.high += high.unbind()

    def features(self) -> Tensor:
        """(max, min) over all tokens: [n_channels, 2]."""
        return torch.stack([torch.stack(self.high).amax(0), torch.stack(self.low).amin(0)], -1)

    def rounding(self, labels: Tensor, bits: int, ema: float) -> Rounding | None:
        """The grid of each cluster: outermost of its channels' running averages; None for 16 bits."""
        if bits >= 16:
            return None
        ends = [side[0] for side in (self.low, self.high)]
        for new in zip(self.low[1:], self.high[1:], strict=True):
            ends = [end * ema + x * (1 - ema) for end, x in zip(ends, new, strict=True)]
        return Rounding(*grid(*spread(labels, *ends), bits), bits)
