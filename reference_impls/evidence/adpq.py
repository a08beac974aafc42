"""Evidence on AdpQ: the threshold and what it is the answer to, both grids of a group, what outliers are worth.

Entry     papers/adpq.yaml
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from requant.reference_impls import _quant
from requant.reference_impls._quant import grouped
from requant.reference_impls._walk import decoder_blocks, named_linears
from requant.reference_impls.adpq import Config, outliers, quantize_weight, scale_of, shrink, two_grids


def _weights(ctx) -> list[Tensor]:
    """The weights of all linears in the third block of the reference model."""
    block = decoder_blocks(ctx.reference())[2]
    return [linear.weight.detach().float() for linear in named_linears(block).values()]


def closed_form_is_the_minimum(ctx) -> float:
    """How much lower, in units of w^2, any v on a fine grid from -w to 2w brings the penalized error of a weight."""
    W = _weights(ctx)[0].double().flatten()[:2048]
    penalty = W.square().quantile(0.92)

    def objective(v: Tensor) -> Tensor:
        return (W - v).square() / 2 + penalty * v.abs() / W.abs()

    grid = torch.linspace(-1, 2, 3001, dtype=torch.double)[:, None] * W  # [n, 2048], 0 and w among the points
    return float(((objective(shrink(W, penalty)) - objective(grid).amin(0)) / W.square()).max())


def search_ends_at_the_quantile(ctx) -> float:
    """Largest share of a matrix on which `outliers` differs from the support of `shrink` after a bisection for alpha.

    The bisection ends when the share is within 0.001 alpha, as in the code by others, or after 100 steps: the weights
    of the reference model are multiples of a 16-bit format's step, so the share can jump over alpha. Weights tied with
    the quantile are left out.
    """
    alpha, worst = Config().outlier_fraction, 0.0
    for W in _weights(ctx):
        W, ours = W.double(), outliers(W, alpha)
        tied = W.abs() == W.abs()[~ours].max()
        low, high = 0.0, float(W.square().max())
        for _ in range(100):
            penalty = (low + high) / 2
            support = shrink(W, penalty) != 0
            share = float(support.double().mean())
            if abs(share - alpha) <= 1e-3 * alpha:
                break
            low, high = (penalty, high) if share > alpha else (low, penalty)
        worst = max(worst, float(((support != ours) & ~tied).double().mean()))
    return worst


def core_grid_is_never_coarser(ctx) -> float:
    """Largest ratio of a core's scale to that of its whole group on the same kind of grid."""
    cfg, worst = Config(w_bits=3), 0.0
    for W in _weights(ctx):
        whole = _quant.stored_scale(_quant.absmax_scale(grouped(W, cfg.group_size), cfg.w_bits), cfg.w_bits)
        worst = max(worst, float((two_grids(W, cfg)[2][..., :1] / whole).max()))
    return worst


def half_a_step_of_its_own_grid(ctx) -> float:
    """Largest error of a weight in units of half a step of the grid of its part; 1 but for the rounding of scales."""
    cfg, worst = Config(w_bits=3), 0.0
    for W in _weights(ctx):
        codes, mask, scale, _ = two_grids(W, cfg)
        step = scale_of(scale, mask)
        worst = max(worst, float(((grouped(W, cfg.group_size) - codes * step).abs() / (step / 2)).max()))
    return worst


def error_against_share(ctx) -> list[dict]:
    """Squared weight error at 3 bits with growing shares of outliers, in units of that without any."""
    weights, errors = _weights(ctx), {}
    for percent in (0, 1, 2, 4, 8):
        cfg = Config(w_bits=3, outlier_fraction=percent / 100)
        errors[percent] = math.fsum(
            float((W - quantize_weight(W, None, cfg)).square().sum()) for W in weights
        )
    return [{"name": f"share_{percent}", "value": error / errors[0]} for percent, error in errors.items()]


def divergence_of_distributions(ctx) -> list[dict]:
    """KL divergence (nats) of the distribution of rounded weights from that of the original ones, at 3 bits.

    Histograms of 64 equal bins over the range of each matrix, or of 16, about as wide as a step of the grids; one count
    added to each bin; mean over matrices.
    """
    weights = _weights(ctx)
    settings = {"adpq": Config(w_bits=3), "no_outliers": Config(w_bits=3, outlier_fraction=0.0)}

    def histogram(W: Tensor, n_bins: int, peak: float) -> Tensor:
        counts = torch.histc(W, n_bins, -peak, peak).double() + 1
        return counts / counts.sum()

    def divergence(W: Tensor, n_bins: int, cfg: Config) -> float:
        peak = float(W.abs().max()) * 1.001  # scales are rounded, so the largest weight may move up a little
        p, q = (histogram(x, n_bins, peak) for x in (W, quantize_weight(W, None, cfg)))
        return float((p * (p / q).log()).sum())

    return [
        {
            "name": f"{name}_{n_bins}_bins",
            "value": math.fsum(divergence(W, n_bins, cfg) for W in weights) / len(weights),
        }
        for name, cfg in settings.items()
        for n_bins in (16, 64)
    ]


def distance_to_gptq(ctx) -> list[dict]:
    """Distance of the loss (nats) from that of GPTQ (arXiv:2210.17323v2, Algorithm 1), with outliers apart and without.

    All at 3 bits in groups of 128. GPTQ's algorithm is the only one with a number here: AdpQ's own were not read.
    """
    gptq = ctx.run("gptq", {"w_bits": 3, "group_size": 128}, calib=(16, 256)).nll
    shares = {"adpq": 0.08, "no_outliers": 0.0}
    return [
        {
            "name": name,
            "value": abs(ctx.run("adpq", {"w_bits": 3, "outlier_fraction": share}).nll - gptq),
        }
        for name, share in shares.items()
    ]
