"""Evidence on SignRound: where learning starts, how far offsets move, and errors on text not learned from.

Entry     papers/signround.yaml
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from requant.reference_impls import rtn
from requant.reference_impls._learn import at_random
from requant.reference_impls._walk import copy_model, named_linears, walk_blocks
from requant.reference_impls.signround import Config, LearnedRounding, learn, round_layer


@torch.no_grad()
def starts_as_rtn(ctx) -> float:
    """Largest difference between the weight before the first step and round-to-nearest, over widths and groups."""
    W, _, _ = ctx.layer("model.layers.1.mlp.down_proj")
    settings = [(bits, size, sym) for bits in (2, 4) for size in (None, 64) for sym in (False, True)]
    return max(
        float(
            (LearnedRounding(W, Config(*s)).weight() - rtn.quantize_weight(W, None, rtn.Config(*s)))
            .abs()
            .max()
        )
        for s in settings
    )


def codes_move_by_at_most_one(ctx) -> float:
    """Largest distance, in codes, from round-to-nearest when ranges stay as they are."""
    W, H, _ = ctx.layer("model.layers.1.self_attn.o_proj")
    cfg = Config(w_bits=3, group_size=64, n_iters=20, learn_clipping=False)
    return float((round_layer(W, H, cfg).codes() - LearnedRounding(W, cfg).codes()).abs().max())


def offsets_within_sum_of_steps(ctx) -> float:
    """Largest |V| at any step, nothing clamped, as a share of the sum of the step sizes; lr (n_iters + 1) / 2."""
    seen, cfg = _offsets(ctx, n_iters=20)
    return max(float(V.abs().max()) for V in seen) / ((cfg.n_iters + 1) / (2 * cfg.n_iters))


def offsets_within_half_a_step(ctx) -> float:
    """Largest |V| at any step, in units of half a step of the grid, at twice the learning rate."""
    return max(float(V.abs().max()) for V in _offsets(ctx, n_iters=20, lr=0.1, clamp_offsets=True)[0]) / 0.5


def steps_have_one_size(ctx) -> float:
    """Largest distance of an offset's move from 0 or from that step's size, as a share of the latter."""
    seen, cfg = _offsets(ctx, n_iters=20)
    worst = 0.0
    for t, (before, after) in enumerate(pairwise(seen)):
        step, move = (1 - t / cfg.n_iters) / cfg.n_iters, (after - before).abs()
        worst = max(worst, float(torch.minimum(move, (move - step).abs()).max() / step))
    return worst


def _offsets(ctx, n_iters: int, **how) -> tuple[list[Tensor], Config]:
    W, H, _ = ctx.layer("model.layers.1.self_attn.o_proj")
    cfg = Config(w_bits=2, group_size=None, n_iters=n_iters, **{"clamp_offsets": False} | how)
    rounding, seen = LearnedRounding(W, cfg), []

    def loss(_batch: Tensor) -> Tensor:
        seen.append(rounding.offset.detach().clone())
        error = rounding.weight() - W
        return (error @ H * error).sum()

    learn([rounding], loss, [torch.arange(0)] * n_iters, cfg)
    return seen, cfg


def held_out_block_errors(ctx) -> list[dict]:
    """Output error of the second block at 2 bits a row on text not learned from, as a share of round-to-nearest's."""
    model, cfg = copy_model(ctx.reference()), Config(w_bits=2, group_size=None, batch_size=4)
    block = next(b for b in walk_blocks(model, ctx.calib(48, 64), propagate="original") if b.index == 1)
    X, linears = torch.cat(block.inputs), named_linears(block.module)
    with torch.no_grad():
        Y = block.forward(X)

    def learned(**overrides) -> float:
        variant = replace(cfg, **overrides)
        roundings = {f"{n}.weight": LearnedRounding(l.weight, variant) for n, l in linears.items()}

        def loss(batch: Tensor) -> Tensor:
            return mse_loss(block.forward(X[batch], {n: r.weight() for n, r in roundings.items()}), Y[batch])

        batches = at_random(32, cfg.batch_size, variant.n_iters, torch.Generator().manual_seed(0))
        learn(roundings.values(), loss, batches, variant)
        with torch.no_grad():
            return float(loss(torch.arange(32, 48)))

    nearest = learned(n_iters=1)  # the only loss is that of the start, which is kept
    variants = {"steps_50": {"n_iters": 50}, "steps_10": {"n_iters": 10}}
    variants["rounding_only"] = {"n_iters": 50, "learn_clipping": False}
    rows = [{"name": name, "value": learned(**how) / nearest} for name, how in variants.items()]
    return [*rows, {"name": "rtn", "value": 1.0}]
