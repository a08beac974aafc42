"""Evidence on SmoothQuant: smoothing changes no output, the integer product, and which linears smoothing reaches.

Entry     papers/smoothquant.yaml
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant
from requant.reference_impls._anatomy import block_anatomies
from requant.reference_impls._logits import change_of_logits
from requant.reference_impls.smoothquant import (
    Config,
    activation_rounding,
    channel_peaks,
    observe_linears,
    quantize_weight,
    smooth,
    smoothing_factors,
    weight_scale,
)


def _norm_fed(model: nn.Module) -> list[list[nn.Linear]]:
    """The groups of linears that smoothing reaches, first block to last."""
    return [linears for parts in block_anatomies(model) for _norm, linears in parts.norm_groups]


def _out_of_reach(model: nn.Module) -> list[list[nn.Linear]]:
    """The linears whose input comes from no norm."""
    return [[linear] for parts in block_anatomies(model) for linear in (parts.o, parts.down)]


def smoothing_keeps_the_function(ctx) -> float:
    """Largest change of a logit by smoothing alone, as a share of the largest logit (Eq. 3)."""
    model, tokens = ctx.reference("reference-outlier"), ctx.calib(8)
    return change_of_logits(model, smooth(model, tokens, 0.5), tokens[:2])


def half_equalizes_the_maxima(ctx) -> float:
    """At alpha 0.5, largest relative difference of max|X_j| and max|W_j| after smoothing, over all channels."""
    tokens, worst = ctx.calib(8), 0.0
    model = smooth(ctx.reference("reference-outlier"), tokens, 0.5)
    peaks = channel_peaks(model, tokens)
    for linears in _norm_fed(model):
        weight_peak = torch.cat([linear.weight for linear in linears]).abs().amax(0)
        worst = max(worst, float((peaks[linears[0]] / weight_peak - 1).abs().max()))
    return worst


def one_flattens_the_activations(ctx) -> float:
    """At alpha 1, largest distance of max|X_j| from 1 on the calibration tokens."""
    tokens = ctx.calib(8)
    model = smooth(ctx.reference("reference-outlier"), tokens, 1.0)
    peaks = channel_peaks(model, tokens)
    return max(float((peaks[linears[0]] - 1).abs().max()) for linears in _norm_fed(model))


def integers_give_the_same_product(ctx) -> float:
    """Relative difference of the integer product times both scales and the fake-quantized product (Eq. 2)."""
    W, _, X = ctx.layer("model.layers.1.self_attn.o_proj", n_tokens=1024)
    cfg = Config(w_granularity="per_channel", a_granularity="per_token")
    fake = activation_rounding(cfg, None)(X) @ quantize_weight(W, None, cfg).T
    scales = _quant.absmax_scale(X, cfg.a_bits), weight_scale(W, cfg)
    X_int, W_int = (
        (t / scale).round().to(torch.int8).to(torch.int32) for t, scale in zip((X, W), scales, strict=True)
    )
    exact = (X_int @ W_int.T).double() * scales[0].double() * scales[1].double().T
    return float((fake - exact).abs().max() / exact.abs().max())


def static_codes_are_clamped(ctx) -> float:
    """Largest |code| under a static scale a quarter of what the tensor needs; four times 127 if nothing clamps."""
    _, _, X = ctx.layer("model.layers.1.self_attn.o_proj", n_tokens=1024)
    scale = X.abs().max() / 127 / 4
    return float((activation_rounding(Config(), scale)(X) / scale).round().abs().max())


def _inputs(model: nn.Module, tokens: Tensor) -> dict[nn.Linear, Tensor]:
    """X [n_samples, seqlen, d_in] of every linear of the blocks."""
    seen: dict[nn.Linear, list[Tensor]] = {}
    observe_linears(model, tokens, lambda linear, X, _Y: seen.setdefault(linear, []).append(X))
    return {linear: torch.cat(batches).unflatten(0, tokens.shape) for linear, batches in seen.items()}


def _product_error(X: Tensor, weights: Sequence[Tensor], weights_too: bool) -> float:
    """Mean over the matrices W that read X of ||Q(X) Q(W)^T - X W^T||^2 / ||X W^T||^2 at O2; or with Q(W) = W."""
    cfg, errors = Config(a_granularity="per_tensor"), []
    rounded = activation_rounding(cfg, None)(X)
    for W in weights:
        exact = X @ W.T
        error = rounded @ (quantize_weight(W, None, cfg) if weights_too else W).T - exact
        errors.append(float(error.square().sum() / exact.square().sum()))
    return sum(errors) / len(errors)


def alpha_sweep(ctx) -> list[dict]:
    """Product error after smoothing in units of its value at alpha 0.5, mean over the norm-fed groups.

    Inputs are those of reference-outlier. Its weight columns at outlier channels are small by the outliers' factor;
    rows named bare_* take the columns of reference instead, which are ordinary, as in large models.
    """
    tokens, model, rows = ctx.calib(4), ctx.reference("reference-outlier"), []
    inputs = _inputs(model, tokens)
    for prefix, owner in (("", model), ("bare_", ctx.reference())):
        errors: dict[float | None, float] = dict.fromkeys((0.5, 0.0, 1.0, None), 0.0)
        for linears, owners in zip(_norm_fed(model), _norm_fed(owner), strict=True):
            X, weights = inputs[linears[0]], [linear.weight for linear in owners]
            for alpha in errors:
                s = (
                    torch.ones(())
                    if alpha is None
                    else smoothing_factors(X.abs().amax((0, 1)), weights, alpha)
                )
                errors[alpha] += _product_error(X / s, [W * s for W in weights], True)
        half, zero, one, none = (error / errors[0.5] for error in errors.values())
        values = {"half": half, "nearer_end": min(zero, one), "zero": zero, "one": one, "no_smoothing": none}
        rows += [{"name": prefix + name, "value": value} for name, value in values.items()]
    return rows


def reach_of_smoothing(ctx) -> list[dict]:
    """Where inputs are rounded badly, and what smoothing changes there; only inputs are rounded, at O2.

    left_*   product error after smoothing as a share of the error before, on reference-outlier
    plain_*  share of each kind of input in the product error of the reference model as trained
    """
    tokens, plain, outlier = ctx.calib(4), ctx.reference(), ctx.reference("reference-outlier")
    smoothed, errors = smooth(outlier, tokens, 0.5), {}
    for model in (plain, outlier, smoothed):
        inputs = _inputs(model, tokens)
        for find in (_norm_fed, _out_of_reach):
            groups = find(model)
            total = sum(
                _product_error(inputs[group[0]], [l.weight for l in group], False) for group in groups
            )
            errors[model, find] = total / len(groups)
    rows = []
    for name, find in (("norm_fed", _norm_fed), ("o_and_down", _out_of_reach)):
        share = errors[plain, find] / (errors[plain, _norm_fed] + errors[plain, _out_of_reach])
        rows.append({"name": f"left_{name}", "value": errors[smoothed, find] / errors[outlier, find]})
        rows.append({"name": f"plain_{name}", "value": share})
    return rows
