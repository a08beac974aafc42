"""Evidence on QUIK: the integer path against fake quantization, how outliers are kept apart, and errors of layers.

Entry     papers/quik.yaml
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from requant.reference_impls import _quant
from requant.reference_impls._hessian import proxy_loss
from requant.reference_impls._outliers import other_columns, top_columns
from requant.reference_impls.quik import (
    Config,
    base_order,
    bits_per_weight,
    layer_config,
    pack_weight,
    quantize_weight,
    round_inputs,
    round_weight,
    unpack_weight,
)

_LAYER = "model.layers.1.self_attn.o_proj"
_OF = 4  # neighbours, of which two are 0


def integer_path_is_fake_quant(ctx) -> float:
    """Relative difference of the kernel's sum (int32 product, correction, 16-bit part) and the fake-quantized one."""
    return max(_integer_path_error(ctx, Config(n_outliers=16, symmetric=each)) for each in (True, False))


def _integer_path_error(ctx, cfg: Config) -> float:
    W, H, X = ctx.layer(_LAYER, n_tokens=512)
    half = 2**3
    codes, s_w, zero_point, Q = round_weight(W, H, cfg)
    outliers = top_columns(H.diagonal(), cfg.n_outliers)
    base = other_columns(outliers, W.shape[1])
    low, high = (end.unsqueeze(-1) for end in torch.aminmax(X[:, base], dim=-1))
    s_x = (high.clamp(min=0) - low.clamp(max=0)) / (2**cfg.a_bits - 1)
    zero_x = (-low.clamp(max=0) / s_x).round()
    X_int = (_quant.quantize(X[:, base], s_x, zero_x, cfg.a_bits) - half).to(torch.int8).to(torch.int32)
    W_int = (codes - zero_point).to(torch.int8).to(torch.int32)
    row_sums = (W_int * s_w.double()).sum(1)
    exact = (X_int @ W_int.T).double() * s_x.double() * s_w.double().T
    exact += (half - zero_x.double()) * s_x.double() * row_sums + (X[:, outliers] @ Q[:, outliers].T).double()
    fake = round_inputs(X, cfg.a_bits, base) @ Q.T
    return float((fake - exact).abs().max() / exact.abs().max())


def all_outliers_change_nothing(ctx) -> float:
    """Largest change of a weight, relative to the largest, if every feature is an outlier: float16 rounding is left."""
    W, H, X = ctx.layer(_LAYER, n_tokens=512)
    Q = quantize_weight(W, H, Config(n_outliers=W.shape[1]))
    same_inputs = round_inputs(X, 4, other_columns(torch.arange(W.shape[1]), W.shape[1]))
    return float((Q - W).abs().max() / W.abs().max() + (same_inputs - X).abs().max())


def scale_ignores_outlier_columns(ctx) -> float:
    """Largest change of a row's scale when its outlier columns grow a hundredfold, with and without clipping."""
    W, H, _ = ctx.layer(_LAYER)
    larger, worst = W.clone(), 0.0
    larger[:, top_columns(H.diagonal(), 16)] *= 100
    for clip in (False, True):
        cfg = Config(n_outliers=16, clip_search=clip)
        worst = max(worst, float((round_weight(W, H, cfg)[1] - round_weight(larger, H, cfg)[1]).abs().max()))
    return worst


def outlier_features_pass_untouched(ctx) -> float:
    """Largest change of an outlier feature, or of another one whose token has no outliers, by rounding the inputs."""
    _, H, X = ctx.layer("model.layers.1.mlp.gate_proj", "reference-outlier", n_tokens=512)
    outliers = top_columns(H.diagonal(), 16)
    base = other_columns(outliers, X.shape[1])
    rounded, alone = round_inputs(X, 4, base), _quant.clipped_fake_quant(X[:, base], 4)
    return float((rounded[:, outliers] - X[:, outliers]).abs().max() + (rounded[:, base] - alone).abs().max())


def _no_flow(W: Tensor, H: Tensor, cfg: Config) -> Tensor:
    """GPTQ on the base columns alone: what they cannot absorb is lost, outlier columns stay as they were."""
    outliers = top_columns(H.diagonal(), cfg.n_outliers)
    base = other_columns(outliers, W.shape[1])
    Q = W.clone()
    Q[:, base] = quantize_weight(W[:, base], H[base][:, base], replace(cfg, n_outliers=0))
    return Q


def layer_errors(ctx) -> list[dict]:
    """tr(E H E^T) at 4 bits and 16 outliers in units of round-to-nearest, mean over the linears of one block.

    quik clips; unclipped does not; no_flow is unclipped with outlier columns that take up no error; rtn has the same
    outlier columns; no_outliers is unclipped GPTQ of every column.
    """
    cfg, values = Config(n_outliers=16, clip_search=False), {}
    layers = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    for name in layers:
        W, H, _ = ctx.layer(f"model.layers.2.{name}", n_tokens=2048)
        diagonal = torch.diag(H.diagonal())  # nothing to compensate: round-to-nearest on the same grids
        made = {
            "quik": quantize_weight(W, H, replace(cfg, clip_search=True)),
            "unclipped": quantize_weight(W, H, cfg),
            "no_flow": _no_flow(W, H, cfg),
            "no_outliers": quantize_weight(W, H, replace(cfg, n_outliers=0)),
            "rtn": quantize_weight(W, diagonal, cfg),
        }
        unit = proxy_loss(W, made["rtn"], H)
        for key, Q in made.items():
            values[key] = values.get(key, 0.0) + proxy_loss(W, Q, H) / unit / len(layers)
    return [{"name": name, "value": value} for name, value in values.items()]


def two_of_four_are_zero(ctx) -> float:
    """Largest number of weights beyond two, among four neighbours of a row in processing order, that are not 0."""
    worst = -_OF
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        W, H, _ = ctx.layer(f"model.layers.1.{name}")
        cfg = Config(n_outliers=16, sparse=True, clip_search=False)
        Q = quantize_weight(W, H, cfg)[:, base_order(H.diagonal(), cfg)]
        worst = max(worst, int((Q != 0).unflatten(1, (-1, _OF)).sum(-1).max()) - 2)
    return float(worst)


def _storing_error(ctx, cfg: Config) -> float:
    """Largest difference of a layer from what is unpacked, and of its stored bits a weight from those stated."""
    W, H, _ = ctx.layer(_LAYER)
    packed = pack_weight(W, H, cfg)
    wrong = float((unpack_weight(packed, cfg) - quantize_weight(W, H, cfg)).abs().max())
    return wrong + abs(_quant.storage_bits(packed) / W.numel() - bits_per_weight(*W.shape, cfg))


def sparse_layer_is_stored(ctx) -> float:
    """What storing a 2:4 layer gets wrong, weights and bits together."""
    return _storing_error(ctx, Config(n_outliers=16, sparse=True, clip_search=False))


def asymmetric_layer_is_stored(ctx) -> float:
    """What storing weights with a zero point a row gets wrong, weights and bits together, dense and 2:4."""
    cfg = Config(n_outliers=16, symmetric=False, clip_search=False)
    return max(_storing_error(ctx, replace(cfg, sparse=sparse)) for sparse in (False, True))


def asymmetric_range_is_min_to_max(ctx) -> float:
    """Largest relative difference of a row's scale from (max - min) / 15 over its base columns and 0."""
    W, H, _ = ctx.layer(_LAYER)
    scale = round_weight(W, H, Config(n_outliers=16, symmetric=False, clip_search=False))[1]
    base = W[:, other_columns(top_columns(H.diagonal(), 16), W.shape[1])]
    low, high = (end.unsqueeze(-1) for end in torch.aminmax(base, dim=-1))
    expected = (high.clamp(min=0) - low.clamp(max=0)) / 15
    return float((scale / expected - 1).abs().max())


def outliers_of_down_projections(ctx) -> float:
    """Largest difference from the stated numbers of outliers of Llama-2's down projections, by paper and by code."""
    stated = {(4096, 11008): (688, 512), (5120, 13824): (691, 512), (8192, 28672): (896, 768)}
    peak, worst = torch.ones(1), 0
    for (hidden, width), numbers in stated.items():
        down = torch.nn.Linear(width, hidden, device="meta")
        for whole, number in zip((False, True), numbers, strict=True):
            found = layer_config(Config(whole_ratio=whole), down, True, peak).n_outliers
            worst = max(worst, abs(found - number))
    return float(worst)


def sparse_errors(ctx) -> list[dict]:
    """tr(E H E^T) of 4-bit weights of which half are 0, in units of the dense ones: mean over the linears of one block.

    joint prunes and rounds in one pass; apart prunes by magnitude, then GPTQ rounds what is left (zeros stay);
    no_outliers is joint without columns in 16 bits.
    """
    cfg, values = Config(n_outliers=16, clip_search=False, sparse=True), {}
    layers = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    for name in layers:
        W, H, _ = ctx.layer(f"model.layers.2.{name}", n_tokens=2048)
        order = base_order(H.diagonal(), cfg)
        fours = W[:, order].unflatten(1, (-1, _OF))
        small = fours.abs().argsort(-1).argsort(-1) < 2
        pruned = W.clone()
        pruned[:, order] = fours.masked_fill(small, 0.0).flatten(1)
        apart = quantize_weight(pruned, H, replace(cfg, sparse=False))
        apart[:, order] = apart[:, order].masked_fill(small.flatten(1), 0.0)
        made = {"joint": quantize_weight(W, H, cfg), "apart": apart}
        made["no_outliers"] = quantize_weight(W, H, replace(cfg, n_outliers=0))
        unit = proxy_loss(W, quantize_weight(W, H, replace(cfg, sparse=False)), H)
        for key, Q in made.items():
            values[key] = values.get(key, 0.0) + proxy_loss(W, Q, H) / unit / len(layers)
    return [{"name": name, "value": value} for name, value in values.items()]
