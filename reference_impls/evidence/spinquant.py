"""Evidence on SpinQuant: its rotations change no output and stay orthogonal, and what learning them gains.

Entry     papers/spinquant.yaml
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OPTConfig

from requant.reference_impls._hadamard import random_orthogonal
from requant.reference_impls._learn import next_token_loss
from requant.reference_impls._logits import cost_in_nats
from requant.reference_impls._stiefel import CayleySGD, skew_direction
from requant.reference_impls._weights import quantize_linears
from requant.reference_impls.spinquant import (
    Config,
    Rotations,
    initial_rotations,
    learn_rotations,
    learnable,
    quantize_flow,
    quantize_weight,
    rotate,
)


def rotation_keeps_logits(ctx) -> float:
    """Largest change of a logit by random orthogonal R1 and R2, as learned from and as merged, nothing rounded."""
    model, tokens = ctx.reference("reference-outlier"), ctx.test_windows(2)
    cfg = Config(a_bits=None, kv_bits=None, init="orthogonal")
    with torch.no_grad():
        plain, merged = model(tokens).logits, rotate(model, initial_rotations(model, cfg), cfg)(tokens).logits
        learned = learnable(model, cfg)[0].logits(tokens)
    return max(float((logits - plain).abs().max()) for logits in (merged, learned))


@torch.no_grad()
def _centred(model: nn.Module) -> Iterator[nn.Module]:
    """The rotated model with embeddings as they are, then with centred ones; nothing is rounded."""
    for each in (False, True):
        cfg = Config(init="orthogonal", online=False, centre_embeddings=each)
        yield rotate(model, initial_rotations(model, cfg), cfg)


def centring_is_free_for_layer_norm(ctx) -> float:
    """Largest change of a logit by centred embeddings, in a random OPT whose embeddings have means far from 0."""
    config = OPTConfig(
        vocab_size=128, hidden_size=64, ffn_dim=128, word_embed_proj_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ctx.seed)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model.get_input_embeddings().weight += torch.linspace(-1, 1, 128)[:, None]
    tokens = torch.arange(32).view(2, 16)
    kept, centred = (each(tokens).logits for each in _centred(model))
    return float((kept - centred).abs().max())


def centring_costs_little(ctx) -> float:
    """Change of the loss of reference on 8 test windows, in nats, by centred embeddings; nothing is rounded."""
    return abs(cost_in_nats(*_centred(ctx.reference()), ctx.test_windows(8)))


_learned: dict[int, tuple] = {}  # seed -> what `_learning` returns


def _learning(ctx) -> tuple[Rotations, float, Tensor, Config]:
    """The learning of the ordering claim: rotations, largest |R R^T - I| after any step, samples and config."""
    worst = 0.0

    def watch(learned: list[Tensor]) -> None:
        nonlocal worst
        worst = max(worst, *(float((R @ R.T - torch.eye(len(R))).abs().max()) for R in learned))

    if ctx.seed not in _learned:
        calib = ctx.calib(32)
        cfg = Config(rounding="rtn", clip_search=False, learn_w_bits=4, steps=12, batch_size=2, seed=ctx.seed)
        rotations = learn_rotations(ctx.reference("reference-outlier"), calib, cfg, watch)
        _learned[ctx.seed] = rotations, worst, calib, cfg
    return _learned[ctx.seed]


def stays_on_the_manifold(ctx) -> float:
    """Largest entry of |R R^T - I| over all rotations and all steps of one learning."""
    return _learning(ctx)[1]


def iteration_is_the_cayley_transform(ctx) -> float:
    """Largest difference of a step and (I - a/2 W)^-1 (I + a/2 W) R^T, on a loss that punishes large values."""
    generator = torch.Generator().manual_seed(ctx.seed)
    X = torch.randn(256, 64, generator=generator) * (1 + 20 * (torch.arange(64) % 16 == 0))
    R = nn.Parameter(random_orthogonal(64, generator).float())
    (X @ R).pow(4).mean().backward()
    before = R.detach().clone()
    W = skew_direction(before, R.grad)
    half = min(1.5, 1.0 / float(W.abs().sum(0).max())) / 2 * W
    exact = torch.linalg.solve(torch.eye(64) - half, (torch.eye(64) + half) @ before.T).T
    CayleySGD([R], lr=1.5, qr_chance=0.0).step()
    return float((R.detach() - exact).abs().max())


def flat_without_quantization(ctx) -> float:
    """Size of the loss's gradient along the manifold with nothing rounded, as a share of that of the 4-bit network."""
    model, tokens, sizes = ctx.reference(), ctx.calib(1), []
    for cfg in (Config(a_bits=None, kv_bits=None), Config()):
        network, matrices = learnable(model, cfg)
        network.loss(tokens).backward()
        sizes.append(sum(float(skew_direction(R.detach(), R.grad).norm()) for R in matrices))
    return sizes[0] / sizes[1]


def loss_of_the_samples_learned_from(ctx) -> list[dict]:
    """Nats of the 4-bit network on the 32 samples it learned from, before and after."""
    model = ctx.reference("reference-outlier")
    learned, _, calib, cfg = _learning(ctx)
    rows = []
    for name, chosen in (("before", initial_rotations(model, cfg)), ("after", learned)):
        rounded = quantize_linears(rotate(model, chosen, cfg), partial(quantize_weight, cfg=cfg))
        quantize_flow(rounded, cfg)
        with torch.no_grad():
            rows.append({"name": name, "value": float(next_token_loss(rounded(calib).logits, calib))})
    return rows


def spread_over_rotations(ctx) -> list[dict]:
    """Largest minus smallest loss in nats on 6 test windows over four random orthogonal rotations."""
    model, tokens, rows = ctx.reference("reference-outlier"), ctx.test_windows(6), []
    for name, cfg in (("rounded", Config()), ("not_rounded", Config(a_bits=None, kv_bits=None))):
        losses = []
        for seed in range(4):
            start = initial_rotations(model, replace(cfg, init="orthogonal", seed=seed))
            rotated = rotate(model, start, cfg)
            quantize_flow(rotated, cfg)
            with torch.no_grad():
                losses.append(float(next_token_loss(rotated(tokens).logits, tokens)))
        rows.append({"name": name, "value": max(losses) - min(losses)})
    return rows
