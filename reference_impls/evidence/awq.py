"""Evidence on AWQ: folding changes no output, the two searches never hurt, and which channels are worth protecting.

Entry     papers/awq.yaml
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant, _walk
from requant.reference_impls._hessian import gram
from requant.reference_impls._walk import named_linears, walk_blocks
from requant.reference_impls.awq import (
    Config,
    clip_weight,
    find_scale,
    quantize,
    round_weight,
)
from requant.reference_impls.parts.awq_pairs import block_pairs, observed_pairs, output_error


@torch.no_grad()
def folding_keeps_logits(ctx) -> float:
    """Largest change of a logit when every pair of the reference model is scaled by random factors of 1/4 to 4."""
    model, tokens = ctx.reference(), ctx.test_windows(2)
    logits = model(tokens).logits
    generator = torch.Generator().manual_seed(0)
    for block in _walk.decoder_blocks(model):
        for pair in block_pairs(block):
            pair.fold(torch.exp2(4 * torch.rand(pair.linears[0].in_features, generator=generator) - 2))
    return float((model(tokens).logits - logits).abs().max())


def zero_exponent_is_rounding(ctx) -> float:
    """Largest weight difference between AWQ with alpha = 0 alone, unclipped, and the official grid written out."""
    model, top = ctx.reference(), 2**3 - 1
    quantized = quantize(model, ctx.calib(2, 64), Config(w_bits=3, n_grid=1, clip_search=False))
    worst = 0.0
    for plain, block in zip(_walk.decoder_blocks(model), _walk.decoder_blocks(quantized), strict=True):
        for name, linear in named_linears(block).items():
            W = plain.get_submodule(name).weight.reshape(-1, 128)
            low, high = W.amin(1, keepdim=True), W.amax(1, keepdim=True)
            step = ((high - low) / top).half().float()
            shift = (-(low / step).round()).clamp(0, top)
            expected = (((W / step).round() + shift).clamp(0, top) - shift) * step
            worst = max(worst, float((linear.weight.reshape(-1, 128) - expected).abs().max()))
    return worst


@torch.no_grad()
def scale_search_never_hurts(ctx) -> float:
    """Worst ratio of the output error with the chosen scale to that of plain rounding, over the pairs of one block."""
    cfg = Config(w_bits=3)
    block = next(walk_blocks(ctx.reference("reference-outlier"), ctx.calib(4, 128), propagate="original"))
    ratios = []
    for pair, X, calls in observed_pairs(block):
        W, s = torch.cat([linear.weight for linear in pair.linears]), find_scale(pair, X, calls, cfg)
        scaled = output_error(pair, calls, round_weight(W * s, cfg) / s)
        ratios.append(scaled / output_error(pair, calls, round_weight(W, cfg)))
    return max(ratios)


def clip_search_never_hurts(ctx) -> float:
    """Worst ratio, over rows and groups, of the error of a group's partial products with clipping to that without."""
    cfg, (W, _, X) = Config(w_bits=3), ctx.layer("model.layers.1.mlp.down_proj")
    X = X[:: len(X) // cfg.clip_tokens]

    def error(Q: Tensor) -> Tensor:
        tokens, change = (_quant.grouped(M, cfg.group_size) for M in (X, Q - W))
        return torch.einsum("tgi,ogi->tog", tokens, change).square().mean(0)  # [d_out, n_groups]

    return float((error(round_weight(clip_weight(W, gram(X), cfg), cfg)) / error(round_weight(W, cfg))).max())


def constant_factor_is_free(ctx) -> float:
    """Share of weights that change when s is multiplied by 0.37; not zero because group scales are float16."""
    cfg, (W, _, X) = Config(w_bits=3), ctx.layer("model.layers.1.mlp.down_proj")
    s = X.abs().mean(0).sqrt()
    first, second = (round_weight(W * factor, cfg) / factor for factor in (s, 0.37 * s))
    return float(((first - second).abs() > 0.01 * first.abs().mean()).float().mean())


@torch.no_grad()
def salient_channels(ctx) -> list[dict]:
    """Loss at INT3 g128 on reference-outlier after special care of 1 % of each linear's inputs (Tables 1 and 2).

    Rows: rtn (none); kept_by_activation, kept_by_weight, kept_at_random (left unrounded); doubled (those with the
    largest mean |x|, doubled before rounding and halved after).
    """
    cfg, tokens, calib = Config(w_bits=3), ctx.test_windows(16), ctx.calib(4, 128)
    generator = torch.Generator().manual_seed(0)

    def treat(W: Tensor, magnitude: Tensor, how: str) -> Tensor:
        order = magnitude
        if how == "kept_by_weight":
            order = W.norm(dim=0)
        elif how == "kept_at_random":
            order = torch.rand(W.shape[1], generator=generator)
        salient = order.topk(max(1, round(0.01 * len(order)))).indices
        s = torch.ones_like(magnitude)
        s[salient] = 2.0 if how == "doubled" else 1.0
        Q = round_weight(W * s, cfg) / s
        if how.startswith("kept"):
            Q[:, salient] = W[:, salient]
        return Q

    rows = []
    for how in ("rtn", "kept_by_activation", "kept_by_weight", "kept_at_random", "doubled"):
        model = ctx.reference("reference-outlier")
        for block in walk_blocks(model, calib, propagate="original"):
            linears, magnitude = named_linears(block.module), {}
            block.observe(linears, lambda name, X, seen=magnitude: seen.update({name: X.abs().mean(0)}))
            for name, linear in linears.items():
                linear.weight.copy_(treat(linear.weight, magnitude[name], how))
        logits = model(tokens).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        rows.append({"name": how, "value": float(loss)})
    return rows
