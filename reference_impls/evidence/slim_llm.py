"""Evidence on SliM-LLM: widths keep their mean, increments are exact, what allocation, calibration and feedback gain.

Entry     papers/slim_llm.yaml
"""

from __future__ import annotations

from dataclasses import replace

import torch

from requant.reference_impls import _quant, gptq, omniquant
from requant.reference_impls._clipping import MixedClippedWeight
from requant.reference_impls._hessian import damped, proxy_loss
from requant.reference_impls._learn import output_error
from requant.reference_impls._walk import copy_model, walk_blocks
from requant.reference_impls.parts.slim_llm_widths import OBJECTIVES, divergence_from, group_salience
from requant.reference_impls.slim_llm import (
    COMPENSATIONS,
    Config,
    choose_widths,
    learn_block,
    quantize_weight,
    search_block,
    start_search,
)

_DOWN, _O = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"


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
    W, H, _ = ctx.layer(_O)
    plain = quantize_weight(W, H, Config(3, 32, allocation=False, calibration=False))
    return float((plain - gptq.quantize_weight(W, H, gptq.Config(w_bits=3, group_size=32))).abs().max())


def increments_are_exact(ctx) -> float:
    """Relative distance of the divergences from those of matrices put together anew for every count; bias on both
    sides, and left out of the rounded one as in the released code."""
    W, H, X = ctx.layer(_DOWN, n_tokens=256)
    bias = torch.linspace(-1, 1, len(W))
    worst = 0.0
    for same_bias in (True, False):
        search = start_search(W, H, Config(2, 64, same_bias=same_bias), bias)
        search.see(X)
        explicit = []
        for count in search.counts:
            Q = search.mid.clone().reshape(len(W), -1, 64)
            for groups, change in (
                (search.order[:count], search.lowered),
                (search.order[12 - count :], search.raised),
            ):
                Q[:, groups] += change.reshape(Q.shape)[:, groups]
            output = X @ Q.flatten(1).T + (bias if same_bias else 0)
            explicit.append(divergence_from(X @ W.T + bias, "kl")(output))
        ratio = search.total / torch.tensor(explicit, dtype=torch.float64)
        worst = max(worst, float((ratio - 1).abs().max()))
    return worst


def damp_is_the_codes(ctx) -> float:
    """Groups out of place, and largest difference of a weight, from the code's ridge of 0.01 on its own H; 0.

    Its H is 2 seqlen times ours, here with small inputs, so that 0.01 counts. Saliences come from explicit inverses.
    """
    W, H, _ = ctx.layer(_O)
    W, H, seqlen = W[:, :64], H[:64, :64], 128
    H = H / H.diagonal().mean() * 0.01 / seqlen
    cfg = Config(2, 8, absolute_damp=0.01 / (2 * seqlen), allocation=False)
    search, ridged = start_search(W, H, cfg), 2 * seqlen * H + 0.01 * torch.eye(64)
    worst = float(
        (quantize_weight(W, H, cfg) - quantize_weight(W, ridged, replace(cfg, absolute_damp=0.0))).abs().max()
    )
    for order, ratio in ((search.order, 0.0), (search.final_order, cfg.damp_ratio)):
        full = ridged.double() + ratio * ridged.diagonal().mean() * torch.eye(64)
        squares = [torch.linalg.inv(full[j:, j:])[0, 0] for j in range(64)]  # U_jj^2
        salience = (W.double().square() / torch.stack(squares)).reshape(len(W), 8, 8).sum((0, 2))
        worst = max(worst, float((order != salience.argsort()).sum()))
    return worst


def feedback_by_group(ctx) -> float:
    """Largest difference of a weight of `compensation` "group" from GPTQ where a group is one column, and from rounding
    alone where there is one group; 0."""
    W, H, _ = ctx.layer(_O)
    cfg = Config(2, 1, allocation=False, compensation="group")
    small = W[:, :48], H[:48, :48]
    worst = (
        quantize_weight(*small, cfg) - quantize_weight(*small, replace(cfg, compensation="column"))
    ).abs()
    whole = replace(cfg, group_size=W.shape[1])
    rounded = quantize_weight(W, torch.eye(len(H)), replace(whole, compensation="column"))
    return float(torch.maximum(worst.max(), (quantize_weight(W, H, whole) - rounded).abs().max()))


def gain_of_feedback(ctx) -> list[dict]:
    """Proxy loss at uniform 2 bits by where errors go on to, over that from column to column; mean of 2 layers."""
    cfg, losses = Config(2, 32, allocation=False, n_grid=20), {"column": 0.0, "group": 0.0, "none": 0.0}
    for name in (_O, "model.layers.0.self_attn.q_proj"):
        W, H, _ = ctx.layer(name)
        loss = {
            how: proxy_loss(W, quantize_weight(W, H, replace(cfg, compensation=how)), H)
            for how in COMPENSATIONS
        }
        loss["none"] = proxy_loss(W, quantize_weight(W, torch.eye(len(H)), cfg), H)
        for how in losses:
            losses[how] += loss[how] / loss["column"] / 2
    return [{"name": name, "value": value} for name, value in losses.items()]


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
    salience = group_salience(W, damped(H, cfg.damp_ratio), cfg.group_size)
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
    W, H, _ = ctx.layer(_O)
    cfg = Config(2, 32, allocation=False)
    loss = {on: proxy_loss(W, quantize_weight(W, H, replace(cfg, calibration=on)), H) for on in (True, False)}
    return [{"name": "calibrated", "value": loss[True] / loss[False]}, {"name": "minmax", "value": 1.0}]


def plus_at_one_width_is_omniquant(ctx) -> float:
    """Largest relative difference of the losses of SliM-LLM+ without allocation from OmniQuant's learned clipping."""
    tokens, models = ctx.calib(4, 64), [copy_model(ctx.reference()) for _ in range(2)]
    ours, theirs = (next(walk_blocks(model, tokens, propagate="both")) for model in models)
    losses = learn_block(ours, {}, Config(2, 32, plus=True, epochs=2))
    cfg = omniquant.Config(w_bits=2, group_size=32, let=False, lwc_lr=1e-2, epochs=2)
    others = omniquant.BlockLearner(models[1], theirs, cfg).learn()
    return max(abs(a / b - 1) for a, b in zip(losses, others, strict=True))


def plus_stores_what_it_rounds(ctx) -> float:
    """Largest difference of a packed layer of SliM-LLM+, at 2 and 3 bits on average, from its quantizer's weight; 0."""
    W, H, X = ctx.layer(_DOWN, n_tokens=512)
    worst = 0.0
    for bits in (2, 3):
        cfg = Config(bits, 32, plus=True)
        widths = choose_widths(W, H, cfg, X)
        with torch.no_grad():
            Q = MixedClippedWeight(W, widths, 32)(W)
        worst = max(worst, float((quantize_weight(W, H, cfg, widths) - Q).abs().max()))
    return worst


def learning_at_mixed_widths(ctx) -> list[dict]:
    """Output error of the first block on test text at the widths SliM-LLM allots, 2 bits on average: 32 steps of
    learned clipping over none."""
    calib, tokens, errors = ctx.calib(16, 64), ctx.test_windows(8)[:, :64], {}
    for name, epochs in (("learned", 2), ("unlearned", 0)):
        cfg, model = Config(2, 32, plus=True, epochs=epochs, lwc_lr=0.1), copy_model(ctx.reference())
        block, other = (next(walk_blocks(model, text, propagate="both")) for text in (calib, tokens))
        learn_block(block, search_block(block, block.hessians(), cfg), cfg)
        errors[name] = output_error(other)
    return [{"name": name, "value": error / errors["unlearned"]} for name, error in errors.items()]
