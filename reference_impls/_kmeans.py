"""k-means with weighted points on many small groups at once: coupled caches, clusters of channels, free levels."""

from __future__ import annotations

import torch
from torch import Tensor

from requant.reference_impls._coder import distances

_CONVERGED = 1e-3  # stop where the objective falls by less, relative, averaged over groups


def _plus_plus(points: Tensor, weights: Tensor, n_centroids: int, generator: torch.Generator) -> Tensor:
    """k-means++: a point is drawn with probability weight * squared distance to the nearest centroid so far.

    Where all these products are zero the weights no longer count, so that distinct points are all covered in the end.
    """
    chosen: list[Tensor] = []
    distance = torch.ones_like(weights)  # the first draw is by weight alone
    for _ in range(n_centroids):
        chance = weights * distance
        cdf = torch.where(chance.sum(-1, keepdim=True) > 0, chance, distance).cumsum(-1)  # [n_groups, n]
        draw = torch.rand(len(cdf), 1, generator=generator).to(cdf) * cdf[:, -1:]
        index = torch.searchsorted(cdf, draw).clamp(max=cdf.shape[-1] - 1)  # [n_groups, 1]
        point = points.gather(2, index[:, None].expand(-1, points.shape[1], -1))  # [n_groups, c, 1]
        nearest = (points - point).square().sum(1)
        distance = torch.minimum(distance, nearest) if chosen else nearest
        chosen.append(point[..., 0])
    return torch.stack(chosen, dim=1)


def weighted_kmeans(
    points: Tensor, weights: Tensor, n_centroids: int, max_iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm on many groups at once (arXiv:2405.03917, Eq. 5 with equal weights, Eq. 6 with Fisher weights).

    Weights enter the update and the objective; a point belongs to the nearest centroid whatever its weight.

    Args:
        points: [n_groups, c, n] float32; left unchanged.
        weights: [n_groups, n] float32, not negative.
    Returns: centroids [n_groups, n_centroids, c]; the objective before each update [n_iterations, n_groups].
    """
    centroids = _plus_plus(points, weights, n_centroids, generator)
    with_one = torch.cat([points, torch.ones_like(points[:, :1])], dim=1).transpose(1, 2)  # [.., n, c + 1]
    squares, history = points.square().sum(1), []
    for _ in range(max_iterations):
        distance = distances(points, centroids)
        nearest = distance.amin(1, keepdim=True)  # [n_groups, 1, n]
        history.append(((nearest[:, 0] + squares) * weights).sum(-1))
        if len(history) > 1 and relative_fall(history[-2], history[-1]).mean() < _CONVERGED:
            break
        assigned = distance.le_(nearest).mul_(weights[:, None])  # a point's weight at its nearest centroid
        sums = torch.bmm(assigned, with_one)  # [n_groups, k, c + 1]
        mass = sums[..., -1:]
        centroids = torch.where(mass > 0, sums[..., :-1] / mass, centroids)
    return centroids, torch.stack(history)


def relative_fall(before: Tensor, after: Tensor) -> Tensor:
    """Relative fall of an objective; 0 where it is 0, in groups that no loss depends on."""
    return (before - after) / before.clamp(min=1e-30)
