"""Evidence on MobileQuant: transforms change no output, wide grids are exact and in place, what training gains.

Entry     papers/mobilequant.yaml
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from requant.reference_impls._anatomy import anatomy, block_anatomies
from requant.reference_impls.mobilequant import (
    Config,
    fit,
    outputs_of,
    prepare,
    quantize,
    quantize_weight,
    smoothed,
)


@torch.no_grad()
def transforms_keep_the_function(ctx) -> float:
    """Change of the last hidden state by random scales everywhere, as a share of its largest; nothing is rounded."""
    _, learners, blocks, inputs = prepare(ctx.reference("reference-outlier"), ctx.calib(2, 64), Config())
    generator, x = torch.Generator().manual_seed(0), inputs
    for learner in learners:
        for s in learner.scales.values():
            s.copy_((torch.randn(s.shape, generator=generator) / 2).exp())
        for module in learner.block.module.modules():
            module.observing = True  # of a StaticRange: it lets everything pass
        x = learner.block.forward(x, learner.transformed().tensors)
    expected = outputs_of(blocks, inputs)
    return float((x - expected).abs().max() / expected.abs().max())


def sixteen_bits_are_enough(ctx) -> float:
    """Relative error of the logits when weights and all activations have 16 bits and whole ranges, untrained."""
    model, tokens = ctx.reference(), ctx.calib(4, 64)
    cfg = Config(w_bits=16, a_bits=16, clip_init=math.inf, epochs=0)
    with torch.no_grad():
        plain, rounded = (net(tokens).logits for net in (model, quantize(model, tokens, cfg)))
    return float((rounded - plain).norm() / plain.norm())


@torch.no_grad()
def wide_places_have_their_levels(ctx) -> float:
    """Largest number of distinct values, over 2^wide_bits, of what is wide in the first block: the gains of a norm, its
    inputs, inputs and outputs of the softmax; 4 bits, 256 test tokens."""
    cfg, tokens = Config(wide_bits=4, epochs=0), ctx.test_windows(1)
    model = quantize(ctx.reference(), ctx.calib(2, 64), cfg)
    parts, seen = anatomy(model.model.layers[0]), []
    rounded, norm, _ = parts.attn_norm
    for module in (rounded, parts.attn.ranges[2], parts.attn.ranges[3]):
        module.register_forward_hook(lambda _module, _args, output: seen.append(output))
    model(tokens)
    if len(seen) != 3:
        return math.inf
    return max(len(x.unique()) for x in (norm.weight, *seen)) / 2**cfg.wide_bits


def gains_are_stored(ctx) -> float:
    """Largest difference of an untrained model's norm gains from what is stored of them at 5 bits; 0."""
    model, calib = ctx.reference("reference-outlier"), ctx.calib(2, 64)
    cfg = Config(wide_bits=5, epochs=0)
    stored = replace(cfg, w_bits=cfg.wide_bits)
    pairs = zip(
        block_anatomies(smoothed(model, calib, cfg)),
        block_anatomies(quantize(model, calib, cfg)),
        strict=True,
    )
    worst = 0.0
    for before, after in pairs:
        for norm, (_, rounded, _) in ((before.attn_norm, after.attn_norm), (before.mlp_norm, after.mlp_norm)):
            Q = quantize_weight(norm.weight[None], None, stored)[0]
            worst = max(worst, float((Q - rounded.weight).abs().max()))
    return worst


def hidden_state_error(ctx) -> list[dict]:
    """Squared error of the last hidden state on test tokens at W4A8 after 32 steps, in units of its value before; mean
    of two calibration draws."""
    rows, tokens = [{"name": "before", "value": 1.0}], ctx.test_windows(8)[:, :64]
    for name, whole in (("end_to_end", True), ("blockwise", False)):
        cfg, ratios = Config(w_bits=4, w_granularity="per_channel", epochs=4, end_to_end=whole), []
        for calib in ctx.calib(16, 64).split(8):
            model, learners, blocks, inputs = prepare(ctx.reference(), calib, cfg)
            x = model.get_input_embeddings()(tokens)
            target, before = outputs_of(blocks, x), outputs_of(learners, x)
            fit(learners, blocks, inputs, cfg)
            errors = [float((y - target).square().mean()) for y in (before, outputs_of(learners, x))]
            ratios.append(errors[1] / errors[0])
        rows.append({"name": name, "value": sum(ratios) / len(ratios)})
    return rows


def ranges_at_a_high_rate(ctx) -> list[dict]:
    """Squared error of what the first two blocks make of test tokens at W8A8, ranges learned alone, in units of before.

    32 steps on 8 samples of 64 tokens at 100 times the published rate; scales between operators and weight clipping
    stay where they begin.
    """
    model, tokens = ctx.reference("reference-outlier"), ctx.test_windows(8)[:, :64]
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2
    cfg = Config(epochs=4, let_lr=0.0, lwc_lr=0.0, lrl_lr=100 * Config().lrl_lr)
    copy, learners, blocks, inputs = prepare(model, ctx.calib(8, 64), cfg)
    x = copy.get_input_embeddings()(tokens)
    target, before = outputs_of(blocks, x), outputs_of(learners, x)
    fit(learners, blocks, inputs, cfg)
    errors = [float((y - target).square().mean()) for y in (before, outputs_of(learners, x))]
    return [{"name": "minmax", "value": 1.0}, {"name": "fast", "value": errors[1] / errors[0]}]
