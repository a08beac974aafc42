"""Evidence on DuQuant: transforms change no output, the searches find what they claim, what each step does to peaks.

Entry     papers/duquant.yaml
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from requant.reference_impls import _quant
from requant.reference_impls._anatomy import block_anatomies
from requant.reference_impls._hadamard import random_orthogonal
from requant.reference_impls._learn import output_error
from requant.reference_impls._logits import change_of_logits
from requant.reference_impls._walk import Block, copy_model, walk_blocks
from requant.reference_impls.duquant import (
    Config,
    learn_clipping,
    quantize_weight,
    transform,
    transform_block,
)
from requant.reference_impls.parts.duquant_dual_transform import (
    base_rotation,
    search_rotation,
    search_transform,
    zigzag,
)
from requant.reference_impls.smoothquant import channel_peaks, smooth_sites

_LAYER = ("model.layers.1.mlp.down_proj", "reference-outlier", 512)  # 4 of 768 channels have outliers


def transforms_keep_logits(ctx) -> float:
    """Largest change of a logit by smoothing, rotations and permutation, as a share of the largest logit."""
    model, tokens = ctx.reference("reference-outlier"), ctx.test_windows(2)
    changed = transform(model, ctx.calib(4), Config(max_rotation_step=4))
    return change_of_logits(model, changed, tokens)


@torch.no_grad()
def smoothing_of_q_and_up(ctx) -> float:
    """Largest relative error of norm gains smoothed as in the code (formula with q or up alone), and of logits."""
    cfg = Config(smoothing_weights="q_and_up", max_rotation_step=0, permutation_times=0)
    model, tokens = ctx.reference("reference-outlier"), ctx.test_windows(2)
    peaks, smoothed = channel_peaks(model, ctx.calib(4)), transform(model, ctx.calib(4), cfg)
    logits = model(tokens).logits
    worst = float((smoothed(tokens).logits - logits).abs().max() / logits.abs().max())
    for before, after in zip(block_anatomies(model), block_anatomies(smoothed), strict=True):
        for name, linear in (("attn_norm", before.q), ("mlp_norm", before.up)):
            weight_peak = linear.weight.abs().amax(0)
            s = (peaks[linear] ** cfg.alpha / weight_peak ** (1 - cfg.alpha)).clamp(min=1e-5)
            gain, expected = getattr(after, name).weight, getattr(before, name).weight / s
            worst = max(worst, float((gain / expected - 1).abs().max()))
    return worst


def rotations_are_orthogonal(ctx) -> float:
    """Largest entry of |R R^T - I| over searched rotations, and distance of the base's first row from 1/sqrt(B)."""
    generator, worst = torch.Generator().manual_seed(ctx.seed), 0.0
    X = ctx.layer(*_LAYER)[2]
    for size in (32, 128, 256):
        cfg = Config(block_size=size, max_rotation_step=32)
        flat = base_rotation(size, cfg, generator)[0].abs() - size**-0.5
        R = search_transform(X, cfg, generator).rotations
        worst = max(worst, float(flat.abs().max()), float((R @ R.mT - torch.eye(size)).abs().max()))
    return worst


def zigzag_deals_evenly(ctx) -> float:
    """Channels dealt twice or not at all, plus blocks without exactly one of the K largest channels."""
    X, size, wrong = ctx.layer(*_LAYER)[2], 128, 0
    for data in (X, X[:, :256], X.abs() ** 0.5):
        order = zigzag(data, size)
        blocks = data.shape[1] // size
        largest = data.abs().amax(0).argsort(descending=True, stable=True)[:blocks]
        wrong += int((order.sort().values != torch.arange(len(order))).sum())
        wrong += int((torch.isin(order.view(blocks, size), largest).sum(1) != 1).sum())
    return float(wrong)


def kept_prefix_is_the_best(ctx) -> float:
    """Relative distance of the range that the kept rotation leaves from the smallest recorded one."""
    X = ctx.layer(*_LAYER)[2].reshape(-1, 128)
    R, peaks = search_rotation(X, Config(max_rotation_step=64), torch.Generator().manual_seed(ctx.seed))
    rotated = X @ R
    return abs(float(rotated.max() - rotated.min()) / min(peaks) - 1)


def peaks_after_rotation(ctx) -> list[dict]:
    """Range max - min of the input of down_proj in blocks of 128, as a share of the range before; means of 3 draws."""
    X = ctx.layer(*_LAYER)[2].reshape(-1, 128)
    before, totals = float(X.max() - X.min()), {}
    for seed in range(3):
        for name, construction in (("searched", "paper"), ("released", "released")):
            cfg = Config(max_rotation_step=64, construction=construction)
            peaks = search_rotation(X, cfg, torch.Generator().manual_seed(seed))[1]
            totals[name] = totals.get(name, 0.0) + min(peaks)
            if name == "searched":
                totals["one_step"] = totals.get("one_step", 0.0) + peaks[1]
        rotated = X @ random_orthogonal(128, torch.Generator().manual_seed(seed)).float()
        totals["random"] = totals.get("random", 0.0) + float(rotated.max() - rotated.min())
    return [{"name": "none", "value": 1.0}] + [
        {"name": name, "value": total / 3 / before} for name, total in totals.items()
    ]


def unevenness_of_blocks(ctx) -> list[dict]:
    """Standard deviation over blocks of the mean of max|x_j|, as a share of the mean; after one rotation."""
    X, size = ctx.layer(*_LAYER)[2], 32
    cfg, generator = Config(block_size=size, max_rotation_step=32), torch.Generator().manual_seed(ctx.seed)
    X = search_transform(X, replace(cfg, permutation_times=0), generator)(X)
    orders = {"none": [torch.arange(X.shape[1])], "zigzag": [zigzag(X, size)]}
    orders["random"] = [torch.randperm(X.shape[1], generator=generator) for _ in range(8)]
    rows = []
    for name, choices in orders.items():
        means = [X.abs().amax(0)[order].view(-1, size).mean(1) for order in choices]
        value = sum(float(mean.std(correction=0) / mean.mean()) for mean in means) / len(means)
        rows.append({"name": name, "value": value})
    return rows


def product_errors(ctx) -> list[dict]:
    """Squared error of a 4-bit product of one down_proj as a share of its square; mean over three draws.

    planted_* is reference-outlier, where weights at outlier channels are small by the factor of the outliers.
    """
    how = {"dual": (32, 1), "rotated_once": (32, 0), "plain": (0, 0)}
    rows = []
    for prefix, model in (("", "reference"), ("planted_", "reference-outlier")):
        W, _, X = ctx.layer(_LAYER[0], model, 512)
        exact = X @ W.T
        for name, (steps, times) in how.items():
            cfg, total = Config(block_size=32, max_rotation_step=steps, permutation_times=times), 0.0
            for seed in range(3):
                T = search_transform(X, cfg, torch.Generator().manual_seed(seed))
                Y = (
                    _quant.clipped_fake_quant(T(X), cfg.a_bits, cfg.a_clip_ratio)
                    @ quantize_weight(T(W), None, cfg).T
                )
                total += float((Y - exact).square().sum() / exact.square().sum())
            rows.append({"name": prefix + name, "value": total / 3})
    return rows


@torch.no_grad()
def _first_blocks(ctx, settings: list[Config], model: str, tokens: Tensor) -> Iterator[tuple[Block, Block]]:
    """For each setting the first block, rounded for 16 samples of 64 tokens, and the same one fed with other tokens."""
    smoothed, calib = copy_model(ctx.reference(model)), ctx.calib(16, 64)
    smooth_sites(smoothed, calib, 0.5)
    for cfg in settings:
        block, other = (next(walk_blocks(copy_model(smoothed), t, propagate="both")) for t in (calib, tokens))
        other.module = block.module
        mean = replace(block, inputs=[torch.cat(block.inputs).mean(0, keepdim=True)])
        unrounded = transform_block(mean, cfg, torch.Generator().manual_seed(ctx.seed), True)
        if cfg.lwc:
            learn_clipping(block, unrounded, cfg)
        yield block, other


def unclipped_learning_is_rounding(ctx) -> float:
    """Largest difference of a block's weights between no step of learning from whole ranges and a ratio of 1; 0."""
    cfg = Config(max_rotation_step=2, lwc=True, epochs=0, clip_init=math.inf)
    settings = [cfg, replace(cfg, lwc=False, w_clip_ratio=1.0)]
    blocks = [block.module for block, _ in _first_blocks(ctx, settings, "reference", ctx.calib(1, 64))]
    pairs = zip(*(block.parameters() for block in blocks), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def clipping_of_a_block(ctx) -> list[dict]:
    """Output error of the first block at W4A4 on test text: rows clipped at 0.8, not at all, or learned (32 steps).

    As shares of the first.
    """
    cfg = Config(max_rotation_step=8, epochs=2, lwc_lr=0.1)
    ways = {"fixed": cfg, "whole": replace(cfg, w_clip_ratio=1.0), "learned": replace(cfg, lwc=True)}
    blocks = _first_blocks(ctx, list(ways.values()), "reference-outlier", ctx.test_windows(8)[:, :64])
    errors = {name: output_error(other) for name, (_, other) in zip(ways, blocks, strict=True)}
    return [{"name": name, "value": error / errors["fixed"]} for name, error in errors.items()]
