"""Evidence on Delta-CoMe: factors of a constructed difference, and losses of one bit a weight spent in several ways.

Entry     papers/delta_come.yaml
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from requant.reference_impls._fine_tuned import capitals, fine_tuned, loss
from requant.reference_impls._walk import copy_model
from requant.reference_impls.delta_come import (
    Config,
    code_bits,
    decompose,
    product_of_factors,
    quantize,
    round_factor,
    with_base,
)


def bit_delta(tuned: nn.Module, base: nn.Module) -> nn.Module:
    """The baseline of one bit a weight: sign of the difference times its mean magnitude (BitDelta, not distilled)."""
    model = copy_model(tuned)
    for linear, weight in with_base(model, base):
        D = linear.weight - weight
        linear.weight.copy_(weight + D.sign() * D.abs().mean())
    return model


@torch.no_grad()
def deltas_at_one_sixteenth(ctx) -> list[dict]:
    """Loss (nats) on 8 windows of the test split in capitals, for the same bits of codes spent in different ways.

    The model is `fine_tuned`, its base the reference model; calibrated on 8 windows of the train split in capitals. The
    rows `kl_*` are mean KL divergences (nats) of the predictions from those of the fine-tuned model.
    """
    base, tuned = ctx.reference(), fine_tuned(ctx)
    calib, windows = (capitals(ctx, tokens, 256)[:8] for tokens in (ctx.calib(16), ctx.test_windows(16)))
    settings = {
        "mixed": Config((8, 3, 2), (2, 32, 8), (2, 32, 40)),  # the published ranks, cut to budget
        "low_rank": Config((16,), (8,), (12,)),
        "two_bit": Config((2,), (64,), (96,)),
        "three_bit": Config((3,), (42,), (64,)),
    }
    models = {name: quantize(tuned, calib, cfg, base) for name, cfg in settings.items()}
    models |= {"bit_delta": bit_delta(tuned, base), "base": base, "fine_tuned": tuned}
    wanted, values = tuned(windows).logits.log_softmax(-1), {}
    for name, model in models.items():
        found = model(windows).logits.log_softmax(-1)
        values[name] = float(loss(model, windows))
        values[f"kl_{name}"] = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    return [{"name": name, "value": value} for name, value in values.items()]


def _layer(ctx) -> tuple[Tensor, Tensor]:
    """A constructed difference, a tenth of that between two layers of the reference model, and H of the first."""
    W, H, _ = ctx.layer("model.layers.1.self_attn.q_proj")
    return 0.1 * (ctx.layer("model.layers.2.self_attn.q_proj")[0] - W), H


def all_ranks_give_the_difference(ctx) -> float:
    """Relative error of U diag(S) V^T with all ranks; what is left is the rounding of S to bfloat16."""
    D, _ = _layer(ctx)
    ((U, S, Vt),) = decompose(D, (len(D),))
    return float((U * S @ Vt - D).norm() / D.norm())


def sixteen_bits_give_the_model_back(ctx) -> float:
    """Largest relative error of a linear's difference when all its ranks stay in 16 bits; infinite if else changed."""
    base, tuned, tokens = ctx.reference(), ctx.reference("reference-outlier"), ctx.calib(2)
    merged = quantize(tuned, tokens, Config((16,), (256,), (256,)), base)
    worst = 0.0 if torch.equal(merged.model.norm.weight, tuned.model.norm.weight) else math.inf
    for (linear, old), (_, new) in zip(with_base(merged, base), with_base(merged, tuned), strict=True):
        worst = max(worst, float((linear.weight - new).norm() / (new - old).norm()))
    return worst


def default_ranks_fit_the_budget(ctx) -> float:
    """Bits per weight of the codes at the published ranks for the matrices of a 7B Llama; 1 is a sixteenth of 16."""
    cfg = Config()
    shapes = ((4096, 4096, cfg.ranks_attention), (11008, 4096, cfg.ranks_mlp), (4096, 11008, cfg.ranks_mlp))
    return max(code_bits(d_out, d_in, cfg.widths, ranks) for d_out, d_in, ranks in shapes)


def inputs_of_u(ctx) -> list[dict]:
    """Output error of a 2-bit slice, U rounded for outputs of the rounded or the exact V^T, in units of the latter."""
    D, H = _layer(ctx)
    ((U, S, Vt),), cfg, errors = decompose(D, (64,)), Config(), {}
    rounded_V = round_factor(Vt, H, 2, cfg)
    for name, V in (("rounded_v", rounded_V.dequantize(cfg.group_size)), ("exact_v", Vt)):
        Y = S[:, None] * V
        E = product_of_factors(round_factor(U, Y @ H @ Y.T, 2, cfg), S, rounded_V, cfg) - U * S @ Vt
        errors[name] = float((E @ H * E).sum())
    return [{"name": name, "value": error / errors["exact_v"]} for name, error in errors.items()]
