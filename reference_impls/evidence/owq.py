"""Evidence on OWQ: weak columns against their closed form and the official budget, what they and the grids gain.

Entry     papers/owq.yaml
"""

from __future__ import annotations

from dataclasses import replace

import torch

from requant.reference_impls import _quant, gptq
from requant.reference_impls._hessian import damped, proxy_loss
from requant.reference_impls._outliers import other_columns, top_columns
from requant.reference_impls.owq import (
    Config,
    column_budget,
    column_scores,
    quantize_weight,
    search_grid,
    to_even,
)

_DOWN = "model.layers.1.mlp.down_proj"


def nothing_kept_is_gptq(ctx) -> float:
    """Largest difference to GPTQ where no column is kept and grids are min-max."""
    W, H, _ = ctx.layer("model.layers.1.self_attn.o_proj")
    plain = quantize_weight(W, H, Config(n_columns=0, clip_search=False))
    return float((plain - gptq.quantize_weight(W, H, gptq.Config(w_bits=3))).abs().max())


def weak_columns_are_least_squares(ctx) -> float:
    """Relative distance of the weak columns from the closed form W_k + (W_r - Q_r) H_rk H_kk^-1, damped H."""
    W, H, _ = ctx.layer(_DOWN)
    cfg = Config(n_columns=8, n_grid=10, coarse_grid=10)
    columns = top_columns(column_scores(W, H, cfg), 8)
    rest = other_columns(columns, W.shape[1])
    Q, H = quantize_weight(W, H, cfg, columns).double(), damped(H, cfg.damp_ratio).double()
    moved = (W[:, rest] - Q[:, rest]) @ H[rest][:, columns] @ torch.linalg.inv(H[columns][:, columns])
    return float((Q[:, columns] - W[:, columns] - moved).norm() / moved.norm())


def search_is_exhaustive(ctx) -> float:
    """Largest relative excess of a row's error over the best of all grids, tried one after the other."""
    W, _, _ = ctx.layer(_DOWN)
    x, bits, steps = W[:64], 3, 20
    span = x.amax(1, keepdim=True).clamp(min=0) - x.amin(1, keepdim=True).clamp(max=0)
    errors = [torch.inf]
    for step in range(1, steps + 1):
        scale = _quant.stored_scale(span * (step / (steps * 7)), bits)
        for zero in torch.arange(8.0):
            q = _quant.dequantize(_quant.quantize(x, scale, zero, bits), scale, zero)
            errors.append((x - q).abs().pow(2.4).sum(1))
    best = torch.stack(errors[1:]).amin(0)
    scale, zero = search_grid(x, bits, False, steps, 2.4)
    q = _quant.dequantize(_quant.quantize(x, scale, zero, bits), scale, zero)
    return float(((x - q).abs().pow(2.4).sum(1) / best - 1).max())


def budget_is_the_official_one(ctx) -> float:
    """Largest difference in weak columns to 12/(16-b) (t-b)/n d_in ratio of the code, on LLaMA-7B and -13B shapes."""
    worst = 0
    for hidden, mlp in ((4096, 11008), (5120, 13824)):
        shapes = dict.fromkeys(("q", "k", "v", "o"), (hidden, hidden))
        shapes |= {"gate": (mlp, hidden), "up": (mlp, hidden), "down": (hidden, mlp)}
        for w_bits in (3, 4):
            for extra in (0.01, 0.1):
                ours = column_budget(shapes, Config(w_bits=w_bits, extra_bits=extra))
                for name, (_, d_in) in shapes.items():
                    ratio = 1 if len(name) == 1 else 0.375
                    worst = max(
                        worst, abs(ours[name] - to_even(12 / (16 - w_bits) * extra / 7 * d_in * ratio))
                    )
    return float(worst)


def columns_by_score(ctx) -> list[dict]:
    """Proxy loss of one layer, over that without weak columns, by which 8 of 768 columns are kept."""
    W, H, _ = ctx.layer(_DOWN)
    cfg = Config(n_columns=8, n_grid=10, coarse_grid=10)
    score = column_scores(W, H, cfg)
    draws = [
        torch.randperm(len(score), generator=torch.Generator().manual_seed(seed))[:8] for seed in range(3)
    ]
    tried = {
        "score": [top_columns(score, 8)],
        "random": [draw.sort().values for draw in draws],  # the best of three draws counts
        "none": [top_columns(score, 0)],
    }
    losses = {
        name: min(proxy_loss(W, quantize_weight(W, H, cfg, columns), H) for columns in choices)
        for name, choices in tried.items()
    }
    return [{"name": name, "value": loss / losses["none"]} for name, loss in losses.items()]


def gain_by_outliers(ctx) -> list[dict]:
    """Proxy loss with 4 weak columns of 256 over that with none, in q_proj with and without outlying inputs."""
    cfg, rows = Config(n_columns=4, n_grid=10, coarse_grid=10), []
    for name, model in (("outliers", "reference-outlier"), ("plain", "reference")):
        W, H, _ = ctx.layer("model.layers.1.self_attn.q_proj", model)
        some, none = (quantize_weight(W, H, replace(cfg, n_columns=n)) for n in (4, 0))
        rows.append({"name": name, "value": proxy_loss(W, some, H) / proxy_loss(W, none, H)})
    return rows


def gain_of_search(ctx) -> list[dict]:
    """Proxy loss of one layer over that with min-max grids, by how the grid of a row is found."""
    W, H, _ = ctx.layer("model.layers.1.self_attn.o_proj")
    cfg = Config(n_columns=0)
    loss = {on: proxy_loss(W, quantize_weight(W, H, replace(cfg, clip_search=on)), H) for on in (True, False)}
    return [{"name": "search", "value": loss[True] / loss[False]}, {"name": "minmax", "value": 1.0}]
