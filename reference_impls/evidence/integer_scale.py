"""Evidence on Integer Scale: integer sums are exact and fit into 32 bits, and what integer scales cost.

Entry     papers/integer_scale.yaml
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant
from requant.reference_impls._hessian import proxy_loss
from requant.reference_impls._walk import named_linears
from requant.reference_impls.integer_scale import (
    Config,
    GroupedLinear,
    effective_scale,
    integer_scales,
    largest_accumulator,
    quantize,
    quantize_weight,
)
from requant.reference_impls.parts.integer_scale_codes import base_codes

_LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def _linear(W: Tensor, cfg: Config) -> GroupedLinear:
    return GroupedLinear(*base_codes(W, None, cfg), None, cfg)


def integer_product_is_exact(ctx) -> float:
    """Wrong entries of the int32 sums against exact integers, plus the relative error of what is made of them."""
    worst = 0.0
    for name in _LAYERS:
        W, _, X = ctx.layer(f"model.layers.1.{name}", n_tokens=128)
        layer = _linear(W, Config())
        codes, scale = layer.quantize_input(X)
        exact = codes.double() @ (layer.codes * layer.scale).flatten(1).double().T
        wrong = float((layer.accumulate(codes) != exact).float().sum())
        expected = exact * scale.double() / layer.amplifier
        worst = max(worst, wrong + float((layer(X) - expected).abs().max() / expected.abs().max()))
    return worst


def scale_error_in_half_steps(ctx) -> float:
    """Largest |S / amplifier - s| in units of 0.5 / amplifier, over all linears of a block and three amplifiers."""
    worst = 0.0
    for name in _LAYERS:
        codes, scale = base_codes(ctx.layer(f"model.layers.1.{name}", n_tokens=128)[0], None, Config())
        for amplifier in (256, 1024, 2**14):
            S, _ = integer_scales(codes, scale, Config(amplifier=amplifier))
            worst = max(worst, float((S.double() - scale.double() * amplifier).abs().max() / 0.5))
    return worst


def integral_scales_change_nothing(ctx) -> float:
    """Largest difference between integer and float scales where all scales are multiples of 1/1024 to begin with."""
    W, _, X = ctx.layer("model.layers.1.mlp.up_proj", n_tokens=128)
    codes, scale = base_codes(W, None, Config())
    W = (codes * ((scale * 1024).round() / 1024)).flatten(1)
    integer, plain = (_linear(W, Config(integer=kind)) for kind in (True, False))
    return float(
        (integer(X) - plain(X)).abs().max() / plain(X).abs().max()
        + (integer.weight - plain.weight).abs().max()
    )


def share_of_int32_used(ctx) -> float:
    """Largest possible |sum| over all linears of the reference model at amplifier 1024, as a share of 2^31."""
    worst = 0
    for linear in named_linears(ctx.reference().model.layers).values():
        codes, scale = base_codes(linear.weight.detach(), None, Config())
        worst = max(worst, largest_accumulator(codes, integer_scales(codes, scale, Config())[0], 8))
    return worst / 2**31


@torch.no_grad()
def cost_of_integer_scales(ctx) -> float:
    """Change of the loss in nats, on 8 test windows, by integer scales at 1024 in place of float ones; W4A8."""
    windows, losses = ctx.test_windows(8), []
    for kind in (True, False):
        logits = quantize(ctx.reference(), None, Config(integer=kind))(windows).logits[:, :-1].flatten(0, 1)
        losses.append(float(nn.functional.cross_entropy(logits, windows[:, 1:].flatten())))
    return abs(losses[0] - losses[1])


def layer_errors(ctx) -> list[dict]:
    """tr(E H E^T) at 4 bits in units of rounding with float scales, mean over the linears of one block.

    rtn_<amplifier>, gptq_1024 and gptq_float say base and amplifier, as do awq_ (its clipping) and omniquant_ (learned
    clipping); dearest is the largest ratio of _1024 to _float. rtn_heuristic has the heuristic alone. small_* are
    weights divided by 8, with scales as in large models: the fixed amplifier, and the heuristic with four bits on top.
    anew_64 rounds the weights again on the integer scales of amplifier 64.
    """
    values: dict[str, float] = {}
    for name in _LAYERS:
        W, H, _ = ctx.layer(f"model.layers.2.{name}", n_tokens=2048)
        plain, small = Config(integer=False), W / 8
        made = {f"rtn_{a}": quantize_weight(W, None, Config(amplifier=a)) for a in (64, 256, 1024)}
        made["rtn_float"] = quantize_weight(W, None, plain)
        made["gptq_1024"] = quantize_weight(W, H, Config(rounding="gptq"))
        made["gptq_float"] = quantize_weight(W, H, replace(plain, rounding="gptq"))
        for base in ("awq", "omniquant"):
            codes, scale = base_codes(W, H, Config(rounding=base))
            made[f"{base}_float"] = (codes * scale).flatten(1)
            made[f"{base}_1024"] = (codes * effective_scale(codes, scale, Config())).flatten(1)
        made["rtn_heuristic"] = quantize_weight(W, None, Config(amplifier=None))
        made["small_fixed"] = 8 * quantize_weight(small, None, Config())
        made["small_lifted"] = 8 * quantize_weight(small, None, Config(amplifier=None, extra_bits=4))
        scale = effective_scale(*base_codes(W, None, plain), Config(amplifier=64))
        groups = _quant.grouped(W, plain.group_size)
        made["anew_64"] = ((groups / scale).round().clamp(-8, 7) * scale).flatten(1)
        unit = proxy_loss(W, made["rtn_float"], H)
        for key, Q in made.items():
            values[key] = values.get(key, 0.0) + proxy_loss(W, Q, H) / unit / len(_LAYERS)
    bases = ("rtn", "gptq", "awq", "omniquant")
    values |= {"dearest": max(values[f"{b}_1024"] / values[f"{b}_float"] for b in bases), "tenth_more": 1.1}
    return [{"name": name, "value": value} for name, value in values.items()]
