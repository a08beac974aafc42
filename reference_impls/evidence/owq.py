"""Evidence on OWQ: weak columns against their closed form and the official budget, what they and the grids gain.

Entry     papers/owq.yaml
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant, gptq
from requant.reference_impls._clip_search import search_grid_and_zero, search_symmetric_grid
from requant.reference_impls._fine_tuned import capitals, loss
from requant.reference_impls._hessian import damped, proxy_loss
from requant.reference_impls._outliers import TunableColumns, other_columns, top_columns
from requant.reference_impls.owq import (
    Config,
    column_budget,
    column_scores,
    quantize_keeping_columns,
    quantize_weight,
    to_even,
    tune_columns,
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
    scale, zero = search_grid_and_zero(x, bits, False, steps, 2.4)
    q = _quant.dequantize(_quant.quantize(x, scale, zero, bits), scale, zero)
    return float(((x - q).abs().pow(2.4).sum(1) / best - 1).max())


def symmetric_search_is_exhaustive(ctx) -> float:
    """Largest relative excess of a row's error over the best of 20 symmetric grids, tried one after the other with
    signed codes; or, if larger, the difference of the full grid's step from max|w| / 4."""
    W, _, _ = ctx.layer(_DOWN)
    x, peak = W[:64], W[:64].abs().amax(1, keepdim=True)
    errors = []
    for step in range(1, 21):
        scale = (peak * step / 80).half().float()
        errors.append((x - (x / scale).round().clamp(-4, 3) * scale).abs().pow(2.4).sum(1))
    scale, zero = search_symmetric_grid(x, 3, True, 20, 2.4)
    q = _quant.dequantize(_quant.quantize(x, scale, zero, 3), scale, zero)
    excess = float(((x - q).abs().pow(2.4).sum(1) / torch.stack(errors).amin(0) - 1).max())
    full, _ = search_symmetric_grid(x, 3, True, 1, 2.4)
    return max(excess, float((full - (peak / 4).half().float()).abs().max()))


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


def gain_of_zero_points(ctx) -> list[dict]:
    """Proxy loss of one layer at 3 bits over that with searched symmetric grids, by the kind of grid."""
    W, H, _ = ctx.layer("model.layers.1.self_attn.o_proj")
    searched = Config(n_columns=0, symmetric=True, n_grid=40)
    settings = {
        "asymmetric": replace(searched, symmetric=False),
        "symmetric": searched,
        "symmetric_minmax": replace(searched, clip_search=False),
    }
    loss = {name: proxy_loss(W, quantize_weight(W, H, cfg), H) for name, cfg in settings.items()}
    return [{"name": name, "value": value / loss["symmetric"]} for name, value in loss.items()]


def tuning_moves_weak_columns_alone(ctx) -> float:
    """Share of weights that tuning moved outside of weak columns, or that it left there as no float16 numbers.

    Infinite if no weak column moved.
    """
    cfg = Config(n_columns=2, clip_search=False, tuning_epochs=1, tuning_lr=1e-3, tuning_batch_size=2)
    calib = ctx.calib(4, 64)
    model, columns = quantize_keeping_columns(ctx.reference(), calib, cfg)
    before = {linear: linear.weight.clone() for linear in columns}
    tune_columns(model, columns, calib, cfg)
    wrong = moved = total = 0
    for linear, own in columns.items():
        changed, kept = linear.weight != before[linear], linear.weight[:, own]
        moved += int(changed[:, own].sum())
        wrong += int(changed.sum() - changed[:, own].sum()) + int((kept != kept.half().float()).sum())
        total += changed.numel()
    return wrong / total if moved else math.inf


def gradient_of_weak_columns(ctx) -> float:
    """Relative distance of the gradient of weak columns from those columns of the gradient of the whole weight."""
    W, _, X = ctx.layer(_DOWN, n_tokens=256)
    linear = nn.Linear(W.shape[1], len(W), bias=False)
    linear.weight = nn.Parameter(W)
    columns, target = torch.tensor([3, 100, 511]), X @ W.T * 0.9
    with torch.enable_grad():
        (linear(X) - target).square().sum().backward()
        whole = linear.weight.grad[:, columns]
        tunable = TunableColumns(linear.requires_grad_(False), columns)
        (tunable(X) - target).square().sum().backward()
    return float((tunable.values.grad - whole).norm() / whole.norm())


def features_kept_for_tuning(ctx) -> float:
    """Features of a token that a linear keeps for the backward pass to its weak columns, over their number."""
    W, _, X = ctx.layer(_DOWN, n_tokens=256)
    linear, columns, widths = nn.Linear(W.shape[1], len(W), bias=False), torch.arange(0, 768, 96), []
    tunable = TunableColumns(linear.requires_grad_(False), columns)

    def keep(saved: Tensor) -> Tensor:
        widths.extend([saved.numel() / len(X)] if len(saved) == len(X) else [])
        return saved

    X.requires_grad_(True)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        tunable(X)
    return sum(widths) / len(columns)


@torch.no_grad()
def losses_after_tuning(ctx) -> list[dict]:
    """Loss (nats) on the test split in capitals: float model, 4 of 256 columns kept at 3 bits, and those columns tuned.

    Eight steps on 32 samples of 96 tokens of the train split in capitals.
    """
    text, tokens = (capitals(ctx, w, 96)[:32] for w in (ctx.calib(16), ctx.test_windows(4)))
    cfg = Config(n_columns=4, clip_search=False, tuning_epochs=1, tuning_lr=3e-3, tuning_batch_size=4)
    rounded, columns = quantize_keeping_columns(ctx.reference(), ctx.calib(4), cfg)
    losses = {"float": float(loss(ctx.reference(), tokens)), "rounded": float(loss(rounded, tokens))}
    tune_columns(rounded, columns, text, cfg)
    losses["tuned"] = float(loss(rounded, tokens))
    return [{"name": name, "value": value} for name, value in losses.items()]
