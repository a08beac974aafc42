"""Evidence on SliM-LLM: widths keep their mean, its increments are exact, and what allocation and calibration gain.

Entry     papers/slim_llm.yaml
"""

from __future__ import annotations

from dataclasses import replace

import torch

from requant.reference_impls import _quant, gptq
from requant.reference_impls._hessian import proxy_loss
from requant.reference_impls.slim_llm import (
    OBJECTIVES,
    Config,
    Search,
    choose_widths,
    divergence_from,
    group_salience,
    quantize_weight,
)

_DOWN = "model.layers.1.mlp.down_proj"


def mean_width_is_the_target(ctx) -> float:
    """Largest distance of the mean width of a layer's groups from N, over two widths and all objectives."""
    W, H, X = ctx.layer(_DOWN, n_tokens=512)
    configs = [Config(bits, 32, objective=objective) for bits in (2, 3) for objective in OBJECTIVES]
    chosen = [choose_widths(W, H, cfg, X) for cfg in configs]
    return max(
        abs(sum(widths) / len(widths) - cfg.w_bits) for widths, cfg in zip(chosen, configs, strict=True)
    )


def uniform_is_gptq(ctx) -> float:
    """Largest difference from group-wise GPTQ without allocation and calibration."""
    W, H, _ = ctx.layer("model.layers.1.self_attn.o_proj")
    plain = quantize_weight(W, H, Config(3, 32, allocation=False, calibration=False))
    return float((plain - gptq.quantize_weight(W, H, gptq.Config(w_bits=3, group_size=32))).abs().max())


def increments_are_exact(ctx) -> float:
    """Relative distance of the divergences from those of matrices put together anew for every count."""
    W, H, X = ctx.layer(_DOWN, n_tokens=256)
    cfg = Config(2, 64)
    search = Search(W, group_salience(W, H, cfg), cfg)
    search.see(X)
    explicit = []
    for count in search.counts:
        Q = search.mid.clone().reshape(len(W), -1, 64)
        for groups, change in (
            (search.order[:count], search.lowered),
            (search.order[12 - count :], search.raised),
        ):
            Q[:, groups] += change.reshape(Q.shape)[:, groups]
        explicit.append(divergence_from(X @ W.T, "kl")(X @ Q.flatten(1).T))
    return float((search.total / torch.tensor(explicit, dtype=torch.float64) - 1).abs().max())


def levels_within_width(ctx) -> float:
    """Largest number of distinct values of a row in a group over the 2^bits of that group."""
    W, H, X = ctx.layer(_DOWN, n_tokens=512)
    cfg = Config(2, 32, n_grid=10)
    widths = choose_widths(W, H, cfg, X)
    Q = _quant.grouped(quantize_weight(W, H, cfg, widths), 32)
    return max(
        len(Q[row, g].unique()) / 2**bits for row in range(0, len(W), 16) for g, bits in enumerate(widths)
    )


def allocation_by_salience(ctx) -> list[dict]:
    """Proxy loss of a layer over that of uniform widths: a quarter of the groups raised and a quarter lowered."""
    W, H, _ = ctx.layer(_DOWN)
    cfg = Config(2, 32, n_grid=20)
    salience = group_salience(W, H, cfg)
    losses = {}
    for name, score in (("salient", salience), ("uniform", None), ("swapped", -salience)):
        widths = torch.full((24,), 2)
        if score is not None:
            order = score.argsort()
            widths[order[:6]], widths[order[-6:]] = 1, 3
        losses[name] = proxy_loss(W, quantize_weight(W, H, cfg, widths.tolist()), H)
    return [{"name": name, "value": loss / losses["uniform"]} for name, loss in losses.items()]


def gain_of_calibration(ctx) -> list[dict]:
    """Proxy loss of a layer at uniform 2 bits over that with min-max grids."""
    W, H, _ = ctx.layer("model.layers.1.self_attn.o_proj")
    cfg = Config(2, 32, allocation=False)
    loss = {on: proxy_loss(W, quantize_weight(W, H, replace(cfg, calibration=on)), H) for on in (True, False)}
    return [{"name": "calibrated", "value": loss[True] / loss[False]}, {"name": "minmax", "value": 1.0}]
