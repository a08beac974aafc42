"""Evidence on RPTQ: reordering changes no output, the limits of clustering, and errors by the number of clusters.

Entry     papers/rptq.yaml
"""

from __future__ import annotations

import torch
from torch import Tensor

from requant.reference_impls import _quant
from requant.reference_impls._hessian import proxy_loss
from requant.reference_impls._logits import change_of_logits
from requant.reference_impls.parts.rptq_clusters import Ranges, Rounding, cluster, grid
from requant.reference_impls.rptq import Config, reorder, round_weight


def reordering_keeps_logits(ctx) -> float:
    """Largest change of a logit when norms, values and the MLP's inner channels are reordered, over the largest."""
    model, tokens = ctx.reference("reference-outlier"), ctx.calib(4)
    return change_of_logits(model, reorder(model, tokens, Config(kmeans_restarts=2)), tokens)


def _seen(ctx, name: str, n_tokens: int = 1024) -> tuple[Tensor, Tensor, Ranges, Tensor]:
    """W, held-out inputs, ranges of the first half of the inputs, and H of that half."""
    W, _, X = ctx.layer(f"model.layers.{name}", "reference-outlier", n_tokens)
    seen, unseen = X.chunk(2)
    ranges = Ranges()
    ranges.see(seen.unflatten(0, (-1, 256)))
    return W, unseen, ranges, seen.T @ seen / len(seen)


def limits_of_clustering(ctx) -> float:
    """Largest difference to one grid for the whole tensor (one cluster) and to one a channel (as many as channels)."""
    _, X, ranges, _ = _seen(ctx, "1.self_attn.q_proj")
    features, worst = ranges.features(), 0.0
    low, high = torch.stack(ranges.low).amin(0), torch.stack(ranges.high).amax(0)
    ranges = Ranges([low], [high])
    for n, ends in ((1, (low.min(), high.max())), (len(low), (low, high))):
        clustered = ranges.rounding(cluster(features, n, Config()), 4, 0.99)(X)
        worst = max(worst, float((clustered - Rounding(*grid(*ends, 4), 4)(X)).abs().max()))
    return worst


def clusters_refine_the_step(ctx) -> float:
    """Largest step of a cluster as a share of the step of the whole tensor; above 1 would make some channel worse."""
    _, _, ranges, _ = _seen(ctx, "1.mlp.down_proj")
    steps = [ranges.rounding(cluster(ranges.features(), n, Config()), 4, 0.99).scale for n in (32, 1)]
    return float((steps[0] / steps[1]).max())


def gptq_on_fixed_grids_helps(ctx) -> float:
    """tr(E H E^T) of the weights as a share of that of rounding to nearest on the very same cluster grids."""
    W, _, ranges, H = _seen(ctx, "1.self_attn.o_proj")
    cfg = Config()
    labels = cluster(ranges.features(), 32, cfg)
    losses = []
    for moments in (H, torch.eye(len(H))):
        codes, scale, zero_point = round_weight(W, moments, labels, cfg)
        losses.append(proxy_loss(W, _quant.dequantize(codes, scale[:, labels], zero_point[:, labels]), H))
    return losses[0] / losses[1]


def products_by_clusters(ctx) -> list[dict]:
    """Relative error of products on unseen tokens, inputs in 4 bits on static grids: mean over five linears."""
    names = (
        "0.self_attn.q_proj",
        "1.mlp.up_proj",
        "2.self_attn.o_proj",
        "2.mlp.down_proj",
        "3.mlp.down_proj",
    )
    errors = dict.fromkeys((32, 4, 1), 0.0)
    for name in names:
        W, X, ranges, _ = _seen(ctx, name)
        exact = X @ W.T
        for n in errors:
            rounded = ranges.rounding(cluster(ranges.features(), n, Config()), 4, 0.99)(X)
            error = float((rounded @ W.T - exact).square().sum() / exact.square().sum())
            errors[n] += error / len(names)
    return [{"name": f"clusters_{n}", "value": error} for n, error in errors.items()]
