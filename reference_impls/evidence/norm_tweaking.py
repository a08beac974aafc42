"""Evidence on Norm Tweaking: what changes and what does not, distances on other text, and how much the rate decides.

Entry     papers/norm_tweaking.yaml
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from requant.reference_impls import rtn, smoothquant
from requant.reference_impls._learn import next_token_loss
from requant.reference_impls._walk import copy_model, decoder_blocks, named_linears, walk_blocks
from requant.reference_impls.norm_tweaking import (
    Config,
    distance,
    norm_parameters,
    quantize,
    round_block,
    search_lr,
    text_for,
    tweak,
    tweaked,
)


def only_norms_change(ctx) -> float:
    """Share of tensors outside the norms of blocks that differ from those of the host alone, rounding to nearest."""
    cfg = Config(w_bits=3, host="rtn", lr=1e-3, generated=False)
    tweaked = quantize(ctx.reference(), ctx.calib(8, 64), cfg)
    alone = rtn.quantize(ctx.reference(), None, rtn.Config(w_bits=3)).state_dict()
    norms = {id(p) for block in decoder_blocks(tweaked) for p in norm_parameters(block).values()}
    others = [name for name, p in tweaked.named_parameters() if id(p) not in norms]
    state = tweaked.state_dict()
    return sum(not torch.equal(state[name], alone[name]) for name in others) / len(others)


def no_steps_is_the_host(ctx) -> float:
    """Largest difference of any tensor from the host's alone with a learning rate of 0."""
    cfg = Config(w_bits=3, host="rtn", lr=0.0, generated=False)
    idle = quantize(ctx.reference(), ctx.calib(8, 64), cfg).state_dict()
    alone = rtn.quantize(ctx.reference(), None, rtn.Config(w_bits=3)).state_dict()
    return max(float((idle[name] - alone[name]).abs().max()) for name in alone)


def distance_sees_no_order(ctx) -> float:
    """Distance of a layer's inputs from themselves in another order of tokens, relative to that from their doubles."""
    _, _, X = ctx.layer("model.layers.1.mlp.down_proj")
    shuffled = X[torch.randperm(len(X), generator=torch.Generator().manual_seed(0))]
    return float(distance(X, shuffled) / distance(X, 2 * X))


def mean_gaps(ctx) -> list[dict]:
    """Mean |difference of channel means| from the unquantized model after the first and the last block.

    Rounding to nearest at 2 bits a row; on corpus text, while the tweaked model saw its own.
    """
    models = {"tweaked": quantize(ctx.reference(), ctx.calib(32, 64), Config(2, host="rtn", lr=1e-3))}
    models["plain"] = rtn.quantize(ctx.reference(), None, rtn.Config(w_bits=2))
    tokens = ctx.test_windows(8)
    means = {name: _channel_means(model, tokens) for name, model in models.items()}
    exact = _channel_means(ctx.reference(), tokens)
    return [
        {"name": f"{name}_{place}", "value": float((found[index] - exact[index]).abs().mean())}
        for name, found in means.items()
        for place, index in (("first", 0), ("last", -1))
    ]


def _channel_means(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    return [torch.cat(block.run()).mean((0, 1)) for block in walk_blocks(model, tokens)]


def held_out_distances(ctx) -> list[dict]:
    """`distance` of the second block on corpus text, at 2 bits a row, by learning rate; as a share of the untweaked."""
    text, values = text_for(ctx.reference(), ctx.calib(32, 64), Config()), {}
    for name, lr in {"untweaked": 0.0, "small": 1e-5, "medium": 1e-3}.items():
        model, other, cfg = copy_model(ctx.reference()), ctx.calib(48, 64)[32:], Config(w_bits=2)
        block = next(
            b for b in walk_blocks(model, torch.cat([text, other]), propagate="original") if b.index == 1
        )
        targets = block.run()
        for linear in named_linears(block.module).values():
            linear.weight.data = rtn.quantize_weight(linear.weight, None, rtn.Config(w_bits=2))
        tweak(block, targets, len(text), lr, cfg)
        with torch.no_grad():
            values[name] = float(distance(targets[-1], block.forward(block.inputs[-1])))
    return [{"name": name, "value": value / values["untweaked"]} for name, value in values.items()]


@torch.no_grad()
def distances_with_activations(ctx) -> list[dict]:
    """`distance` of the second block on corpus text at W4A4, smoothed first or not, as shares of those untweaked.

    16 rows of 64 tokens that the model wrote, at a rate of 1e-3.
    """
    text, values = text_for(ctx.reference(), ctx.calib(16, 64), Config()), {}
    other = ctx.calib(32, 64)[16:]
    for host in ("rtn", "smoothquant"):
        cfg, found = Config(4, host=host, a_bits=4), []
        model = ctx.reference("reference-outlier")
        model = smoothquant.smooth(model, text, cfg.alpha) if host == "smoothquant" else model
        for lr in (0.0, 1e-3):
            walk = walk_blocks(copy_model(model), torch.cat([text, other]), propagate="original")
            block = next(b for b in walk if b.index == 1)
            targets = block.run()
            round_block(block, cfg)
            tweak(block, targets, len(text), lr, cfg)
            found.append(float(distance(targets[-1], block.forward(block.inputs[-1]))))
        values[host] = found[1] / found[0]
    return [{"name": name, "value": value} for name, value in (values | {"untweaked": 1.0}).items()]


def searched_rate(ctx) -> list[dict]:
    """Loss (nats) on 4 test windows of the first two blocks, rounded to nearest at 2 bits, by learning rate.

    searched: the best of 1e-5, 1e-3 and 1e-1 on held-out rows of 16 that the model wrote.
    """
    model, tokens = ctx.reference(), ctx.test_windows(4)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2
    cfg, grid = Config(2, host="rtn"), (1e-5, 1e-3, 1e-1)
    text = text_for(model, ctx.calib(16, 64), cfg)
    rates = {
        "searched": search_lr(model, text, replace(cfg, lr_grid=grid)),
        "largest": grid[-1],
        "untweaked": 0.0,
    }
    rows = []
    for name, lr in rates.items():
        with torch.no_grad():
            logits = tweaked(model, text, replace(cfg, lr=lr))[0](tokens).logits
        rows.append({"name": name, "value": float(next_token_loss(logits, tokens))})
    return rows
