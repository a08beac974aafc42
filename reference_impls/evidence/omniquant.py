"""Evidence on OmniQuant: transforms change no output, whole ranges are plain rounding, what learned clipping gains.

Entry     papers/omniquant.yaml
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from requant.reference_impls import _quant
from requant.reference_impls._anatomy import anatomy
from requant.reference_impls._equivalence import sites
from requant.reference_impls._folded import Folded, query_key
from requant.reference_impls._hessian import proxy_loss
from requant.reference_impls._learn import output_error
from requant.reference_impls._logits import change_of_logits
from requant.reference_impls._walk import Block, copy_model, walk_blocks
from requant.reference_impls.omniquant import BlockLearner, Config, quantize_weight


@torch.no_grad()
def _change_of_logits(model: nn.Module, tokens: Tensor, tied: bool) -> float:
    """Largest change of a logit, as a share of the largest, when random scales and shifts are folded in everywhere."""
    generator, changed = torch.Generator().manual_seed(0), copy_model(model)

    def random(size: int) -> tuple[Tensor, Tensor]:
        draws = torch.randn(2, size, generator=generator)
        return (draws[0] / 2).exp(), draws[1] / 10

    for block in walk_blocks(changed, tokens, propagate="original"):
        parts, now = anatomy(block.module), Folded(block.module)
        for site in sites(parts, model.config)[:3]:
            s, d = random(len(site.written(torch.zeros(site.linears[0].in_features))))
            site.fold_into(now, s, d if site.can_learn_shift else None)
        pair = query_key(parts, model.config, block.kwargs)
        s = random(pair.k.out_features)[0]
        pair.fold_into(now, pair.tie(s) if tied else s)
        now.write()
    return change_of_logits(model, changed, tokens[:2])


def small_opt() -> nn.Module:
    """A random OPT: LayerNorm, biases everywhere, no rotary embedding."""
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (
            OPTForCausalLM(OPTConfig(vocab_size=2048, num_hidden_layers=2, **sizes))
            .requires_grad_(False)
            .eval()
        )


def transforms_keep_the_function(ctx) -> float:
    """Change of logits by random scales and shifts (Eq. 3 and 5): a small OPT, and the reference with tied pairs."""
    tokens = ctx.calib(2, 64)
    errors = _change_of_logits(small_opt(), tokens, False), _change_of_logits(ctx.reference(), tokens, True)
    return max(errors)


def query_key_scales(ctx) -> list[dict]:
    """Change of logits on the rotary reference model by random scales: pairs tied, and left free as the code does."""
    model, tokens = ctx.reference(), ctx.calib(2, 64)
    return [{"name": n, "value": _change_of_logits(model, tokens, n == "tied")} for n in ("tied", "free")]


def whole_ranges_are_rtn(ctx) -> float:
    """Largest difference between rounding without clipping and plain rounding to nearest, 2 to 8 bits; 0."""
    W, worst = ctx.layer("model.layers.1.mlp.down_proj")[0], 0.0
    for bits in (2, 3, 4, 8):
        Q = quantize_weight(W, None, Config(w_bits=bits, group_size=64, lwc=False))
        worst = max(worst, float((Q - _quant.fake_quant(_quant.grouped(W, 64), bits).flatten(1)).abs().max()))
    return worst


def _first_block(ctx, cfg: Config) -> BlockLearner:
    model = ctx.reference()
    return BlockLearner(model, next(iter(walk_blocks(model, ctx.calib(16, 128), propagate="both"))), cfg)


def weights_stay_frozen(ctx) -> float:
    """Largest change of a parameter of the block itself while clipping and scales are learned; 0."""
    learner, original = _first_block(ctx, Config(a_bits=4, epochs=1)), ctx.reference().model.layers[0]
    learner.learn()
    pairs = zip(learner.block.module.parameters(), original.parameters(), strict=True)
    return max(float((now - before).abs().max()) for now, before in pairs)


def clipping_on_a_layer(ctx) -> list[dict]:
    """Output error of one layer after LWC in units of that of rounding to nearest; at 2 bits also in groups."""
    W, H, _ = ctx.layer("model.layers.1.self_attn.o_proj")
    rows = [{"name": "rtn", "value": 1.0}]
    for bits, group in ((2, None), (3, None), (4, None), (2, 128), (2, 64)):
        learned = quantize_weight(W, H, Config(w_bits=bits, group_size=group, lwc_lr=0.1))
        error = proxy_loss(W, learned, H) / proxy_loss(W, _quant.fake_quant(W, bits), H)
        rows.append({"name": f"w{bits}" + (f"g{group}" if group else ""), "value": error})
    return rows


def held_out_block(ctx) -> Block:
    """The first block of the reference model with test tokens as its inputs."""
    return next(iter(walk_blocks(ctx.reference(), ctx.test_windows(8)[:, :128], propagate="both")))


def block_error(ctx) -> list[dict]:
    """Squared output error of the first block at 2 bits in units of its value before learning; also held out."""
    learner, other = _first_block(ctx, Config(w_bits=2, let=False, lwc_lr=0.1, epochs=2)), held_out_block(ctx)
    before = [output_error(data, learner.rounded().tensors, learner.block) for data in (learner.block, other)]
    learner.learn()
    after = [output_error(data, learner.rounded().tensors, learner.block) for data in (learner.block, other)]
    ratios = {"before": 1.0, "after": after[0] / before[0], "held_out": after[1] / before[1]}
    return [{"name": name, "value": value} for name, value in ratios.items()]


def transforms_on_a_block(ctx) -> list[dict]:
    """Output error of the first block at W4A4 on test text, in units of that without scales; nothing is clipped.

    initial: SmoothQuant's scales; learned: 32 steps later, on 16 samples of 64 tokens.
    """
    calib, tokens, errors = ctx.calib(16, 64), ctx.test_windows(8)[:, :64], {}
    cfg = Config(a_bits=4, lwc=False, epochs=2)
    ways = {"none": {"let": False}, "initial": {"epochs": 0}, "learned": {}}
    for name, over in ways.items():
        model = ctx.reference("reference-outlier")
        block, other = (next(iter(walk_blocks(model, text, propagate="both"))) for text in (calib, tokens))
        learner = BlockLearner(model, block, replace(cfg, **over))
        learner.learn()
        errors[name] = output_error(other, learner.rounded().tensors, learner.block)
    return [{"name": name, "value": error / errors["none"]} for name, error in errors.items()]
