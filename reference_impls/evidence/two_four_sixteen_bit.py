"""Evidence on 2/4/16-bit weights: the limiting case, where outliers and 4-bit groups lie, what they are worth.

Entry     papers/two_four_sixteen_bit.yaml
"""

from __future__ import annotations

from dataclasses import replace

import torch

from requant.reference_impls import gptq
from requant.reference_impls._hessian import proxy_loss
from requant.reference_impls.two_four_sixteen_bit import (
    Config,
    choose_outliers,
    choose_widths,
    n_outliers,
    quantize_weight,
)

_LAYER = "model.layers.1.mlp.down_proj"


def two_bits_alone_are_gptq(ctx) -> float:
    """Largest difference from group-wise GPTQ without 4-bit groups, outliers and quantized scales."""
    W, H, _ = ctx.layer("model.layers.1.self_attn.o_proj")
    plain = quantize_weight(W, H, Config(high_fraction=0, outlier_fraction=0, scale_bits=16))
    return float((plain - gptq.quantize_weight(W, H, gptq.Config(w_bits=2, group_size=16))).abs().max())


def outliers_are_kept(ctx) -> float:
    """Largest change that the size of an outlier makes elsewhere, or largest distance of an outlier from its value.

    Every eighth weight of the first column is made 1 or 64, float16 numbers: what is kept then has no error to pass on.
    """
    W, H, _ = ctx.layer(_LAYER)
    cfg, results = Config(), []
    widths, mask = (
        torch.full((len(W), W.shape[1] // cfg.group_size), 2),
        torch.zeros(W.shape, dtype=torch.bool),
    )
    mask[::8, 0] = True
    for value in (1.0, 64.0):
        W[::8, 0] = value
        results.append(quantize_weight(W, H, cfg, widths, mask))
    moved = max(float((Q[::8, 0] - value).abs().max()) for Q, value in zip(results, (1.0, 64.0), strict=True))
    return max(moved, float((results[0] - results[1])[:, 1:].abs().max()))


def high_groups_are_aligned(ctx) -> float:
    """Largest distance of the number of 4-bit groups from one in every stretch of 16 groups of a row."""
    W, H, _ = ctx.layer(_LAYER)
    high = choose_widths(W, H, Config()) == 4
    return float((high.reshape(len(W), -1, 16).sum(-1) - 1).abs().max())


def quantized_scales_cost_little(ctx) -> float:
    """Proxy loss of a layer with 4-bit scales over that with float16 scales."""
    W, H, _ = ctx.layer(_LAYER)
    losses = [proxy_loss(W, quantize_weight(W, H, Config(scale_bits=bits)), H) for bits in (4, 16)]
    return losses[0] / losses[1]


def groups_by_sensitivity(ctx) -> list[dict]:
    """Proxy loss of a layer over that of 2 bits alone, without outliers, by which sixteenth of the groups has 4."""
    W, H, _ = ctx.layer(_LAYER)
    cfg = Config(outlier_fraction=0)
    draws = [torch.rand(len(W), 48, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    random = [torch.where(draw.argsort(1).argsort(1) < 3, 4, 2) for draw in draws]  # three of 48 in every row
    tried = {"sensitive": [choose_widths(W, H, cfg)], "random": random, "none": [torch.full((len(W), 48), 2)]}
    losses = {
        name: min(proxy_loss(W, quantize_weight(W, H, cfg, widths), H) for widths in choices)
        for name, choices in tried.items()
    }
    return [{"name": name, "value": loss / losses["none"]} for name, loss in losses.items()]


def outliers_by_width(ctx) -> list[dict]:
    """Proxy loss of a layer, over that without outliers, by the width of the groups that outliers are taken from."""
    W, H, _ = ctx.layer(_LAYER)
    cfg = Config()
    widths = choose_widths(W, H, cfg)
    losses = {
        name: proxy_loss(W, quantize_weight(W, H, cfg, widths, choose_outliers(W, allowed, some)), H)
        for name, allowed, some in (
            ("two_bit", widths == 2, cfg),
            ("four_bit", widths == 4, cfg),
            ("none", widths == 2, replace(cfg, outlier_fraction=0)),
        )
    }
    return [{"name": name, "value": loss / losses["none"]} for name, loss in losses.items()]


def outliers_by_score(ctx) -> list[dict]:
    """Proxy loss of a layer, over that without outliers, by what the outliers of its 2-bit groups are ranked by."""
    W, H, _ = ctx.layer(_LAYER)
    cfg = Config()
    widths, losses = choose_widths(W, H, cfg), {}
    none = torch.zeros(W.shape, dtype=torch.bool)
    generator = torch.Generator().manual_seed(ctx.seed)
    free = (widths == 2).repeat_interleave(cfg.group_size, 1)
    drawn = (
        torch.rand(W.shape, generator=generator)
        .masked_fill(~free, -1.0)
        .flatten()
        .topk(n_outliers(*W.shape, cfg))
    )
    masks = {"none": none, "random": none.flatten().scatter(0, drawn.indices, True).view(W.shape)}
    for score in ("magnitude", "salience"):
        masks[score] = choose_outliers(W, widths == 2, replace(cfg, outlier_score=score), H)
    for name, mask in masks.items():
        losses[name] = proxy_loss(W, quantize_weight(W, H, cfg, widths, mask), H)
    return [{"name": name, "value": loss / losses["none"]} for name, loss in losses.items()]
