"""Evidence on MagR: the proximal step against sorting, an objective that never rises, what smaller peaks are worth.

Entry     papers/magr.yaml
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

from requant.reference_impls import quip
from requant.reference_impls._hessian import damped, proxy_loss
from requant.reference_impls.magr import (
    Config,
    iterates,
    pack_weight,
    prox,
    quantize,
    quantize_weight,
    reduce_magnitude,
    unpack_weight,
)

_LAYERS = [f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")]


def prox_matches_sorting(ctx) -> float:
    """Largest difference of `prox` from v - t P(v / t) with P by sorting (Algorithms 2 and 3), per unit of max|v|."""
    W, _, _ = ctx.layer(_LAYERS[0])
    worst = 0.0
    for t in (1e-4, 1e-2, 1.0, 100.0):
        z = W.double() / t
        u = z.abs().sort(-1, descending=True).values
        excess = u.cumsum(-1) - 1
        count = torch.arange(1, W.shape[1] + 1)
        rho = (u > excess / count).sum(-1, keepdim=True)
        theta = (excess.gather(-1, rho - 1) / rho).clamp(min=0)  # 0 inside the ball
        by_sorting = W - t * z.sign() * (z.abs() - theta).clamp(min=0)
        worst = max(worst, float((prox(W, t)[0] - by_sorting).abs().max() / W.abs().max()))
    return worst


def objective_never_rises(ctx) -> float:
    """Largest relative rise, over all iterations, of 1/2 |X(w - w0)|^2 + alpha max|w| summed over channels."""
    W, H, _ = ctx.layer(_LAYERS[2])
    cfg, normal, last, worst = Config(n_iters=40), H / torch.linalg.eigvalsh(H)[-1], None, -1.0
    for reduced in [W, *iterates(W, H, cfg)]:
        now = proxy_loss(W, reduced, normal) / 2 + cfg.alpha * float(reduced.abs().amax(1).double().sum())
        worst = worst if last is None else max(worst, now / last - 1)
        last = now
    return worst


def output_change_within_bound(ctx) -> float:
    """Largest ratio of |X(w* - w0)| to its bound sqrt(2 alpha max|w0|), over channels, sigma_max(X) = 1."""
    worst = 0.0
    for name in _LAYERS:
        W, H, _ = ctx.layer(name)
        cfg = Config(n_iters=40)
        E = (reduce_magnitude(W, H, cfg) - W).double()
        change = ((E @ (H / torch.linalg.eigvalsh(H)[-1]).double()) * E).sum(1)
        worst = max(worst, float((change / (2 * cfg.alpha * W.abs().amax(1))).max().sqrt()))
    return worst


def sweeps_never_raise(ctx) -> float:
    """Largest relative rise of the damped objective over five sweeps of coordinate descent after OPTQ, at 2 bits."""
    W, H, _ = ctx.layer(_LAYERS[1])
    cfg = Config(n_iters=20)
    losses = [
        proxy_loss(W, quantize_weight(W, H, replace(cfg, cd_sweeps=n)), damped(H, cfg.cd_damp_ratio))
        for n in range(6)
    ]
    return max(after / before - 1 for before, after in pairwise(losses))


def cost_without_rounding(ctx) -> float:
    """Nats that preprocessing alone adds to the loss of the reference model (Table 1)."""
    runs = (("magr", {"quantizer": "none", "n_iters": 30}), ("none", {}))
    reduced, plain = (ctx.run(impl, config, calib=(16, 256)).nll for impl, config in runs)
    return reduced - plain


def peaks(ctx) -> list[dict]:
    """Mean over channels of max|w| after MagR, as a share of that before; the worst of three layers."""
    ratios = []
    for name in _LAYERS:
        W, H, _ = ctx.layer(name)
        ratios.append(float(reduce_magnitude(W, H, Config()).abs().amax(1).mean() / W.abs().amax(1).mean()))
    rows = {"after": max(ratios), "half": 0.5, "before": 1.0}
    return [{"name": name, "value": value} for name, value in rows.items()]


def layer_errors(ctx) -> list[dict]:
    """tr(E H E^T) of E = Q - W, summed over two layers, as a share of that without the step in question.

    At 3 bits MagR before either quantizer, on full min-max ranges; at 2 bits ten sweeps of descent after OPTQ.
    """
    pairs = {
        "magr_rtn": (Config(3, quantizer="rtn", beta=1.0), {"n_iters": 0}),
        "magr_optq": (Config(3, beta=1.0), {"n_iters": 0}),
        "descent_w2": (Config(2, cd_sweeps=10), {"cd_sweeps": 0}),
    }
    layers = [ctx.layer(name) for name in _LAYERS[:2]]

    def error(cfg: Config) -> float:
        return sum(
            proxy_loss(W, quantize_weight(W, H, cfg), H) / proxy_loss(W, 0 * W, H) for W, H, _ in layers
        )

    rows = {row: error(cfg) / error(replace(cfg, **without)) for row, (cfg, without) in pairs.items()}
    return [{"name": name, "value": value} for name, value in (rows | {"without": 1.0}).items()]


def last_sequence_is_all_magr_sees(ctx) -> float:
    """Largest difference of a weight, without rounding, between MagR on the last of three sequences and on that one
    alone; 0."""
    model, calib, cfg = ctx.reference(), ctx.calib(3, 64), Config(quantizer="none", n_iters=2)
    found = quantize(model, calib, replace(cfg, last_sequence=True)), quantize(model, calib[-1:], cfg)
    pairs = zip(*(twin.parameters() for twin in found), strict=True)
    return max(float((ours - alone).abs().max()) for ours, alone in pairs)


def new_grids_shrink(ctx) -> float:
    """Largest step of a group's grid after n sweeps with new grids, over beta^n times that before; up to ten sweeps."""
    W, H, _ = ctx.layer(_LAYERS[1])
    cfg = Config(3, 32, n_iters=5, beta=0.95, new_grids=True)
    first, worst = pack_weight(W[:64], H, cfg)["scale"].float(), 0.0
    for n in (1, 3, 10):
        step = pack_weight(W[:64], H, replace(cfg, cd_sweeps=n))["scale"].float()
        worst = max(worst, float((step / first).max()) / cfg.beta**n)
    return worst


def errors_by_grids(ctx) -> list[dict]:
    """tr(E H E^T) after 30 sweeps at 2 bits in groups of 128 on the grids of OPTQ, and on new ones at every sweep; in
    units of that without a sweep. One layer."""
    W, H, _ = ctx.layer(_LAYERS[0])
    kept = Config(2, 128, n_iters=20, sweeps_everywhere=True)
    settings = {"kept": kept, "new": replace(kept, new_grids=True), "without": replace(kept, cd_sweeps=0)}
    loss = {name: proxy_loss(W, quantize_weight(W, H, cfg), H) for name, cfg in settings.items()}
    return [{"name": name, "value": value / loss["without"]} for name, value in loss.items()]


def errors_of_one_sweep(ctx) -> list[dict]:
    """The sweep that the code adds at 3 bits per channel: tr(E H E^T) in units of that without it, mean of two layers,
    with H as the sweep sees it and as it is."""
    rows = {"damped": 0.0, "undamped": 0.0, "without": 1.0}
    for name in _LAYERS[:2]:
        W, H, _ = ctx.layer(name)
        cfg = Config(3, n_iters=20)
        Q = [quantize_weight(W, H, how) for how in (replace(cfg, sweeps_everywhere=True), cfg)]
        for row, moments in (("damped", damped(H, cfg.cd_damp_ratio)), ("undamped", H)):
            after, before = (proxy_loss(W, q, moments) for q in Q)
            rows[row] += after / before / 2
    return [{"name": name, "value": value} for name, value in rows.items()]


def unreduced_is_quip(ctx) -> float:
    """Largest difference of a weight from QuIP's with no iteration of MagR, as rounded and as stored; 0."""
    W, H, _ = ctx.layer(_LAYERS[1])
    cfg, worst = Config(2, quantizer="quip", n_iters=0), 0.0
    plain = quip.quantize_weight(W, H, quip.Config(2))
    for Q in (quantize_weight(W, H, cfg), unpack_weight(pack_weight(W, H, cfg), cfg)):
        worst = max(worst, float((Q - plain).abs().max()))
    return worst


def quip_errors(ctx) -> list[dict]:
    """tr(E H E^T) of QuIP at 2 bits on reduced weights in units of that on the original ones; mean of 2 x 3 draws."""
    ratios = []
    for name in _LAYERS[:2]:
        W, H, _ = ctx.layer(name)
        reduced = reduce_magnitude(W, H, Config(quantizer="quip", n_iters=30))
        for seed in range(3):
            how = quip.Config(2, seed=seed)
            with_, without = (quip.quantize_weight(x, H, how) for x in (reduced, W))
            ratios.append(proxy_loss(W, with_, H) / proxy_loss(W, without, H))
    return [{"name": "magr_quip", "value": sum(ratios) / len(ratios)}, {"name": "quip", "value": 1.0}]
