"""Evidence on ResQ: its rotations change no output, how they part the variance, and errors of the rounded stream.

Entry     papers/resq.yaml
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from requant.reference_impls._activation import bare
from requant.reference_impls._anatomy import block_anatomies
from requant.reference_impls._hadamard import random_orthogonal
from requant.reference_impls._logits import cost_in_nats
from requant.reference_impls._rotation import fuse_norms
from requant.reference_impls._stiefel import skew_direction
from requant.reference_impls._walk import copy_model, walk_blocks
from requant.reference_impls.parts.resq_bases import Bases, find_bases, learnable, mixing
from requant.reference_impls.parts.resq_moments import Moments, collect
from requant.reference_impls.resq import Config, bases_of, quantize_parts, rotate, rounded_flow


def _fused(model: nn.Module) -> nn.Module:
    """A copy with fused norms."""
    model = copy_model(model)
    fuse_norms(model)
    return model


@torch.no_grad()
def _moved_logits(ctx, *settings: Config) -> float:
    """Largest change of a logit of reference-outlier by all rotations, folded and online, with nothing rounded."""
    model, tokens = ctx.reference("reference-outlier"), ctx.test_windows(2)
    before, calib = model(tokens).logits, ctx.calib(4)
    return max(float((rotate(model, calib, cfg)(tokens).logits - before).abs().max()) for cfg in settings)


def rotation_keeps_logits(ctx) -> float:
    """Largest change of a logit with one basis of the stream."""
    return _moved_logits(ctx, Config())


def basis_changes_keep_logits(ctx) -> float:
    """Largest change of a logit with a basis of the stream for each block, and for each sublayer."""
    settings = (Config(rotation_granularity=each) for each in ("one_per_decoder", "per_layer"))
    return _moved_logits(ctx, *settings)


@torch.no_grad()
def centring_costs_little(ctx) -> float:
    """Change of the loss of reference on 8 test windows, in nats, by centred embeddings; nothing is rounded."""
    model, tokens, calib = ctx.reference(), ctx.test_windows(8), ctx.calib(4)
    kept, centred = (rotate(model, calib, Config(centre_embeddings=each)) for each in (False, True))
    return abs(cost_in_nats(kept, centred, tokens))


_learned: dict[int, tuple] = {}  # seed -> what `_learning` returns


def _learning(ctx) -> tuple[nn.Module, Tensor, Config, Bases, Bases]:
    """reference-outlier with fused norms, four samples of 64 tokens, 16 steps on all of them, bases before and after.

    It starts from principal axes alone. Where it starts from random rotations inside the parts, which are nearly as
    good, what so few tokens teach is less than what one draw differs from another.
    """
    if ctx.seed not in _learned:
        model, calib = _fused(ctx.reference("reference-outlier")), ctx.calib(4, 64)
        cfg = Config(train_rotations=True, steps=16, batch_size=4, mix=False, seed=ctx.seed)
        with torch.no_grad():
            before, after = (
                bases_of(model, calib, each) for each in (replace(cfg, train_rotations=False), cfg)
            )
        _learned[ctx.seed] = model, calib, cfg, before, after
    return _learned[ctx.seed]


def flat_without_rounding(ctx) -> float:
    """Size of the loss's gradient along the manifold with nothing rounded, as a share of that of the 4-bit network."""
    model, sizes = _fused(ctx.reference("reference-outlier")), []
    with torch.no_grad():
        bases = find_bases(model, ctx.calib(4), Config())
    for cfg in (Config(a_bits=None, kv_bits=None), Config()):
        network, matrices = learnable(rounded_flow(model, bases, cfg), bases, cfg)
        network.loss(ctx.calib(1)).backward()
        parts = [R for each in matrices for R in each]
        sizes.append(sum(float(skew_direction(R.detach(), R.grad).norm()) for R in parts))
    return sizes[0] / sizes[1]


@torch.no_grad()
def loss_of_the_samples_learned_from(ctx) -> list[dict]:
    """What rounded activations and cache cost on the samples learned from, in units of before; sum of three draws."""
    costs = {"before": 0.0, "after": 0.0}
    for draw in (type(ctx)(seed) for seed in range(3)):
        model, calib, cfg, *both = _learning(draw)
        for name, bases in zip(costs, both, strict=True):
            costs[name] += cost_in_nats(model, rounded_flow(model, bases, cfg), calib)
    return [{"name": name, "value": cost / costs["before"]} for name, cost in costs.items()]


def training_keeps_parts_apart(ctx) -> float:
    """Largest entry of |U^T U - I| of trained bases, and of the product of one part with the other before training."""
    *_, cfg, before, after = _learning(ctx)
    pairs = [(before.stream[0], after.stream[0])]
    pairs += [
        heads
        for layers in zip(before.values, after.values, strict=True)
        for heads in zip(*layers, strict=True)
    ]
    worst = 0.0
    for U, V in pairs:
        n_low = len(U) - cfg.high(len(U))
        crossed = U.T @ V
        crossed = torch.cat([crossed[:n_low, n_low:].flatten(), crossed[n_low:, :n_low].flatten()])
        worst = max(worst, float(crossed.abs().max()), float((V.T @ V - torch.eye(len(V))).abs().max()))
    return worst


def _stream_moments(ctx, granularity: str = "full_shared") -> list[Moments]:
    """Moments of what each sublayer of reference reads in 8 calibration samples, norms fused."""
    return collect(_fused(ctx.reference()), ctx.calib(8), granularity)[0]


@torch.no_grad()
def _stream_inputs(ctx) -> list[tuple[int, Tensor]]:
    """(number of the sublayer, what it reads in 4 test windows) in reference, norms fused."""
    model, inputs = _fused(ctx.reference()), []
    for block in walk_blocks(model, ctx.test_windows(4)):
        parts = bare(block_anatomies(model)[block.index])
        for turn, reader in enumerate((parts.qkv[0], parts.ups[0]), 2 * block.index):
            block.observe({"stream": reader}, lambda _name, X, turn=turn: inputs.append((turn, X)))
    return inputs


def high_part_holds_the_variance(ctx) -> float:
    """Relative difference of the variance in the last eighth of U_A R1 and the sum of the largest eigenvalues."""
    moments = _stream_moments(ctx)[0]
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
    moments = _stream_moments(ctx)[0]
    cfg = Config()
    draw = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    first, second = (moments.axes(cfg) @ mixing(256, cfg, generator) for generator in draw)
    n_low = 256 - cfg.high(256)
    mixed = (first[:, n_low:].T @ second[:, :n_low]).abs().max()
    return max(float(mixed), float((first.T @ first - torch.eye(256)).abs().max()))


def stream_errors(ctx) -> list[dict]:
    """Squared error of the rounded stream in units of that of a random rotation and uniform 4 bits; three draws."""
    inputs, shared, own = _stream_inputs(ctx), _stream_moments(ctx), _stream_moments(ctx, "per_layer")
    variants = {
        "resq": Config(), "uniform": Config(high_fraction=0.0), "sixteenth": Config(high_fraction=1 / 16),
        "quarter": Config(high_fraction=0.25), "channels": Config(subspace="channels"), "not_mixed": Config(mix=False),
        "own_basis": Config(rotation_granularity="per_layer"),
    }  # fmt: skip
    totals = dict.fromkeys((*variants, "random_subspace"), 0.0)
    for seed in range(3):
        for name, cfg in [*variants.items(), ("random_subspace", Config())]:
            generator = torch.Generator().manual_seed(seed)
            if name == "random_subspace":
                axes = [random_orthogonal(256, generator)] * len(own)
            elif name == "own_basis":
                axes = [moments.axes(cfg) for moments in own]
            else:
                axes = [shared[0].axes(cfg)] * len(own)
            R = mixing(256, cfg, generator)
            for turn, X in inputs:
                U = (axes[turn] @ R).float()
                totals[name] += float(
                    (quantize_parts(X @ U, 4, cfg) - X @ U).square().sum() / X.square().sum()
                )
    return [{"name": name, "value": total / totals["uniform"]} for name, total in totals.items()]
