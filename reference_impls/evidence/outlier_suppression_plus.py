"""Evidence on Outlier Suppression+: migration changes no output and bounds every channel, what its parts gain.

Entry     papers/outlier_suppression_plus.yaml
"""

from __future__ import annotations

import torch
from torch import Tensor

from requant.reference_impls._logits import change_of_logits
from requant.reference_impls._ranges import round_between, token_range
from requant.reference_impls.outlier_suppression_plus import Config, migrate, quantize_weight, search_scale
from requant.reference_impls.parts.outlier_suppression_plus_thresholds import scale_of, shift_of, thresholds
from requant.reference_impls.smoothquant import smoothing_factors


def migration_keeps_logits(ctx) -> float:
    """Largest change of a logit by shifts and scales alone, all sites included, as a share of the largest logit."""
    model, tokens = ctx.reference("reference-outlier"), ctx.calib(2)
    cfg = Config(scale_down=True, n_grid=4, max_step=None)
    return change_of_logits(model, migrate(model, tokens, cfg), tokens)


def channels_are_centred_and_bounded(ctx) -> float:
    """After the shift max + min of each channel, after the scale max|X| - t, both as shares of max|X| before."""
    X, worst = ctx.layer("model.layers.1.self_attn.q_proj", "reference-outlier", 512)[2], 0.0
    X, size = X + X.std(0), float(X.abs().max())
    centred = X - shift_of(X)
    for t in thresholds(centred, Config(n_grid=10, max_step=None)):
        worst = max(worst, float((centred / scale_of(centred, t)).abs().max()) - t)
    return max(worst, float((centred.amax(0) + centred.amin(0)).abs().max())) / size


def no_channel_is_enlarged(ctx) -> float:
    """1 - min s_j over all thresholds; 0 since channels inside keep s_j = 1."""
    X = ctx.layer("model.layers.1.mlp.up_proj", n_tokens=512)[2]
    return max(1 - float(scale_of(X, t).min()) for t in thresholds(X, Config()))


def _held_out(X: Tensor, W: Tensor, s: Tensor, z: Tensor, cfg: Config) -> float:
    """Squared error of the product on the second half of the tokens, rounded with the range of the first half."""
    seen, unseen = ((half - z) / s for half in X.chunk(2))
    rounded = round_between(unseen, *seen.aminmax(), cfg.a_bits, cfg.symmetric)
    return float((rounded @ quantize_weight(W * s, None, cfg).T - unseen @ (W * s).T).square().sum())


def _searched(X: Tensor, W: Tensor, z: Tensor, cfg: Config) -> Tensor:
    """s of the first half of the tokens, by the error of the product itself."""
    return search_scale(X.chunk(2)[0] - z, [(W, None)], lambda outputs: outputs[0], cfg)


def planted_asymmetry(ctx) -> list[dict]:
    """Held-out error of INT8* products, in units of no migration, with eight planted channels as OPT-66B has them.

    Half of them lie at +32 times the largest value of the others, half at -32 times.
    """
    cfg = Config(w_bits=8, a_bits=8, symmetric=True, w_granularity="per_tensor", max_step=None)
    errors = dict.fromkeys(("shift_and_scale", "scale", "shift", "none"), 0.0)
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        W, _, X = ctx.layer(f"model.layers.1.{name}", n_tokens=512)
        X[:, :8] += 32 * X.abs().max() * (1 - 2 * (torch.arange(8) % 2))
        zero, one = X.new_zeros(X.shape[1]), X.new_ones(X.shape[1])
        plain = _held_out(X, W, one, zero, cfg)
        for row in errors:
            z = shift_of(X.chunk(2)[0]) if "shift" in row else zero
            s = _searched(X, W, z, cfg) if "scale" in row else one
            errors[row] += _held_out(X, W, s, z, cfg) / plain / 2
    return [{"name": row, "value": error} for row, error in errors.items()]


def text_and_code_agree_on_centred_channels(ctx) -> float:
    """Largest relative distance of Eq. 8 as printed from the code's scale on centred channels, and of the text's K
    thresholds from k/K max|X|."""
    X = ctx.layer("model.layers.1.mlp.up_proj", "reference-outlier", 512)[2]
    centred, cfg = X - shift_of(X), Config(n_grid=7, max_step=None, lower_bound=None)
    grid, top = thresholds(centred, cfg), float(centred.abs().max())
    worst = max(abs(t * 7 / (top * k) - 1) for t, k in zip(grid, range(7, 0, -1), strict=True))
    for t in grid:
        worst = max(worst, float((scale_of(centred, t, False) / scale_of(centred, t) - 1).abs().max()))
    return worst


def sides_of_equation_8(ctx) -> list[dict]:
    """Held-out error of 6-bit products without shift in units of that with no migration, on planted asymmetric channels
    as in `planted_asymmetry`, by the sides that the scale sees."""
    settings = {"both_sides": Config(max_step=None), "as_printed": Config(max_step=None, both_sides=False)}
    errors = dict.fromkeys(settings, 0.0)
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        W, _, X = ctx.layer(f"model.layers.1.{name}", n_tokens=512)
        X[:, :8] += 32 * X.abs().max() * (1 - 2 * (torch.arange(8) % 2))
        zero, one = X.new_zeros(X.shape[1]), X.new_ones(X.shape[1])
        for row, cfg in settings.items():
            s = _searched(X, W, zero, cfg)
            errors[row] += _held_out(X, W, s, zero, cfg) / _held_out(X, W, one, zero, cfg) / 2
    return [{"name": row, "value": error} for row, error in (errors | {"none": 1.0}).items()]


def searched_against_formula(ctx) -> list[dict]:
    """Held-out error of 6-bit products in units of that of SmoothQuant's scales at alpha 0.5; worst of three draws.

    Inputs are those of reference-outlier, whose weight columns at outlier channels are small by the outliers' factor;
    here these columns are those of reference: ordinary, as in large models.
    """
    cfg, searched, none = Config(max_step=None), [], []
    for draw in (type(ctx)(seed) for seed in range(3)):
        errors = torch.zeros(3)
        for name in ("1.self_attn.q_proj", "2.mlp.up_proj", "3.self_attn.v_proj"):
            W = draw.layer(f"model.layers.{name}", n_tokens=512)[0]
            X = draw.layer(f"model.layers.{name}", "reference-outlier", 512)[2]
            z, one = X.new_zeros(X.shape[1]), X.new_ones(X.shape[1])
            smoothed = smoothing_factors(X.chunk(2)[0].abs().amax(0), [W], 0.5)
            ways = (_searched(X, W, z, cfg), smoothed, one)
            errors += torch.tensor([_held_out(X, W, s, z, cfg) for s in ways])
        searched, none = [*searched, float(errors[0] / errors[1])], [*none, float(errors[2] / errors[1])]
    return [
        {"name": "searched", "value": max(searched)},
        {"name": "smoothed", "value": 1.0},
        {"name": "none", "value": min(none)},
    ]


def clipped_range_leaves_out_a_share(ctx) -> float:
    """Largest share of tokens beyond a range that leaves out 1.5 % at either end, over that share.

    And the largest distance from the minimum and maximum of a range that leaves out none, which is 0.
    """
    X = ctx.layer("model.layers.2.mlp.down_proj", n_tokens=1024)[2].unflatten(0, (4, 256))
    whole = torch.stack(token_range(X, 0.0)) - torch.stack([X.amin((1, 2)), X.amax((1, 2))])
    low, high = (end[:, None] for end in token_range(X, 0.015))
    beyond = torch.stack([(X.amax(-1) > high).float().mean(1), (X.amin(-1) < low).float().mean(1)])
    return float(beyond.max() / 0.015 + whole.abs().max())
