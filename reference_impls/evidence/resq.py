"""Evidence on ResQ: its rotations change no output, how they part the variance, and errors of the rounded stream.

Entry     papers/resq.yaml
"""

from __future__ import annotations

import torch
from torch import Tensor

from requant.reference_impls._activation import bare
from requant.reference_impls._anatomy import block_anatomies
from requant.reference_impls._hadamard import random_orthogonal
from requant.reference_impls._rotation import fuse_norms
from requant.reference_impls._walk import copy_model, walk_blocks
from requant.reference_impls.resq import Config, Moments, collect, mixing, quantize_parts, rotate


def rotation_keeps_logits(ctx) -> float:
    """Largest change of a logit by all rotations, folded and online, with nothing rounded."""
    model, tokens = ctx.reference("reference-outlier"), ctx.test_windows(2)
    with torch.no_grad():
        return float(
            (rotate(model, ctx.calib(4), Config())(tokens).logits - model(tokens).logits).abs().max()
        )


@torch.no_grad()
def _stream(ctx) -> tuple[Moments, list[Tensor]]:
    """Moments of the stream (8 calibration samples) and what reads it (4 test windows) in reference, norms fused."""
    model = copy_model(ctx.reference())
    fuse_norms(model)
    inputs: list[Tensor] = []
    for block in walk_blocks(model, ctx.test_windows(4)):
        parts = bare(block_anatomies(model)[block.index])
        block.observe({"attention": parts.qkv[0], "mlp": parts.ups[0]}, lambda _name, X: inputs.append(X))
    return collect(model, ctx.calib(8))[0], inputs


def high_part_holds_the_variance(ctx) -> float:
    """Relative difference of the variance in the last eighth of U_A R1 and the sum of the largest eigenvalues."""
    moments, _ = _stream(ctx)
    cfg = Config()
    U = moments.axes(cfg) @ mixing(256, cfg, torch.Generator().manual_seed(ctx.seed))
    n_high, high = cfg.high(256), U[:, -cfg.high(256) :]
    held, most = (
        (high.T @ moments.squares @ high).trace(),
        torch.linalg.eigvalsh(moments.squares)[-n_high:].sum(),
    )
    return float((held / most - 1).abs())


def parts_stay_apart(ctx) -> float:
    """Largest entry of |U^T U - I|, and of the product of one rotation's high columns with another's low ones."""
    moments, _ = _stream(ctx)
    cfg = Config()
    draw = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    first, second = (moments.axes(cfg) @ mixing(256, cfg, generator) for generator in draw)
    n_low = 256 - cfg.high(256)
    mixed = (first[:, n_low:].T @ second[:, :n_low]).abs().max()
    return max(float(mixed), float((first.T @ first - torch.eye(256)).abs().max()))


def stream_errors(ctx) -> list[dict]:
    """Squared error of the rounded stream in units of that of a random rotation and uniform 4 bits; three draws."""
    moments, inputs = _stream(ctx)
    variants = {
        "resq": Config(), "uniform": Config(high_fraction=0.0), "sixteenth": Config(high_fraction=1 / 16),
        "quarter": Config(high_fraction=0.25), "channels": Config(subspace="channels"), "not_mixed": Config(mix=False),
    }  # fmt: skip
    totals = dict.fromkeys((*variants, "random_subspace"), 0.0)
    for seed in range(3):
        for name, cfg in [*variants.items(), ("random_subspace", Config())]:
            generator = torch.Generator().manual_seed(seed)
            axes = random_orthogonal(256, generator) if name == "random_subspace" else moments.axes(cfg)
            U = (axes @ mixing(256, cfg, generator)).float()
            for X in inputs:
                totals[name] += float(
                    (quantize_parts(X @ U, 4, cfg) - X @ U).square().sum() / X.square().sum()
                )
    return [{"name": name, "value": total / totals["uniform"]} for name, total in totals.items()]
