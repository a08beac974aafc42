"""Evidence on QuaRot: its rotations change no output, what they do to peaks, and losses with activations in 4 bits.

Entry     papers/quarot.yaml
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls._activation import transform_attention
from requant.reference_impls._anatomy import block_anatomies
from requant.reference_impls._hadamard import hadamard_matrix, hadamard_transform
from requant.reference_impls._logits import cost_in_nats
from requant.reference_impls._stream_ends import stream_ends
from requant.reference_impls._walk import decoder_blocks, named_linears
from requant.reference_impls.quarot import (
    Config,
    across_heads,
    quantize,
    quantize_activations,
    rotate,
    rotate_attention,
)


def rotation_keeps_logits(ctx) -> float:
    """Largest change of a logit by all of Stage 1 on the outlier model: fused norms, folded and online rotations."""
    model, tokens, cfg = ctx.reference("reference-outlier"), ctx.test_windows(2), Config(kv_bits=None)
    rotated = rotate(model, cfg)
    for parts in block_anatomies(rotated):
        transform_attention(rotated, parts.attn, partial(rotate_attention, cfg=cfg))
    with torch.no_grad():
        return float((rotated(tokens).logits - model(tokens).logits).abs().max())


@torch.no_grad()
def centring_costs_little(ctx) -> float:
    """Change of the loss of reference on 8 test windows, in nats, by centred embeddings; nothing is rounded."""
    model, tokens = ctx.reference(), ctx.test_windows(8)
    kept, centred = (rotate(model, Config(centre_embeddings=each)) for each in (False, True))
    return abs(cost_in_nats(kept, centred, tokens))


def hadamard_is_orthogonal(ctx) -> float:
    """Largest entry of |H H^T - I| and of ||H_ij| sqrt(n) - 1|, over every kind of base and some products."""
    worst = 0.0
    for order in (2, 12, 20, 28, 36, 40, 52, 64, 108, 140, 148, 156, 172, 256, 768):
        H = hadamard_matrix(order)
        flat = (H.abs() * order**0.5 - 1).abs().max()
        worst = max(worst, float((H @ H.T - torch.eye(order)).abs().max()), float(flat))
    return worst


def head_and_cross_head_make_full(ctx) -> float:
    """Largest difference between Hadamards inside, then across heads, and one of the full size."""
    worst, generator = 0.0, torch.Generator().manual_seed(ctx.seed)
    for n_heads, head_dim in ((4, 64), (8, 32), (32, 128)):
        x = torch.randn(16, n_heads * head_dim, generator=generator, dtype=torch.float64)
        inside = hadamard_transform(x.unflatten(-1, (n_heads, head_dim))).flatten(-2)
        worst = max(worst, float((across_heads(inside, n_heads) - hadamard_transform(x)).abs().max()))
    return worst


def key_rotation_keeps_scores(ctx) -> float:
    """Largest change of q k^T by rotating both, relative to the largest score, with real queries and keys."""
    W, _, X = ctx.layer("model.layers.1.self_attn.q_proj", n_tokens=256)
    key_weight = ctx.layer("model.layers.1.self_attn.k_proj", n_tokens=256)[0]
    q, k = (
        (X @ weight.T).view(1, -1, 4, 64).transpose(1, 2) for weight in (W, key_weight)
    )  # [1, 4, 256, 64]
    rotated_q, rotated_k, _ = rotate_attention(q, k, k, Config(kv_bits=None))
    scores = q @ k.mT
    return float((rotated_q @ rotated_k.mT - scores).abs().max() / scores.abs().max())


def ends_not_quantized(ctx) -> float:
    """Largest difference of embedding and head between a quantized and a rotated model; the head must be bare."""
    model, cfg = ctx.reference(), Config(rounding="rtn", clip_search=False)
    quantized, rotated = stream_ends(quantize(model, None, cfg)), stream_ends(rotate(model, cfg))
    pairs = zip((*quantized.embeddings, quantized.head), (*rotated.embeddings, rotated.head), strict=True)
    return max(float((a.weight - b.weight).abs().max()) for a, b in pairs)


def peaks_drop(ctx) -> float:
    """Worst ratio, rotated to original, of the mean max|x|/rms(x) over all inputs of linears in two models."""
    tokens, ratios = ctx.calib(4, 256), []
    for model in (ctx.reference(), ctx.reference("reference-outlier")):
        before, after = _peaks(model, tokens), _peaks(rotate(model, Config()), tokens)
        ratios += [after[name] / before[name] for name in before]
    return max(ratios)


@torch.no_grad()
def _peaks(model: nn.Module, tokens: Tensor) -> dict[tuple[int, str], float]:
    """Mean over tokens of max|x| / rms(x), for the input of every block linear as its weight sees it."""
    found, handles = {}, []
    for index, block in enumerate(decoder_blocks(model)):
        for name, linear in named_linears(block).items():

            def see(
                _module: nn.Module, args: tuple, key: tuple = (index, name.removesuffix(".linear"))
            ) -> None:
                x = args[0].flatten(0, -2)
                found[key] = float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean())

            handles.append(linear.register_forward_pre_hook(see))
    model(tokens)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def _nll(model: nn.Module, windows: Tensor) -> float:
    """Mean next-token loss in nats over windows [n, seqlen]."""
    logits = model(windows).logits[:, :-1].flatten(0, 1)
    return float(nn.functional.cross_entropy(logits, windows[:, 1:].flatten()))


def loss_of_8_bits(ctx) -> float:
    """Nats that weights, activations and cache in 8 bits, rounded to nearest, cost on 16 test windows."""
    model, windows = ctx.reference(), ctx.test_windows(16)
    cfg = Config(w_bits=8, a_bits=8, kv_bits=8, rounding="rtn", clip_search=False)
    return _nll(quantize(model, None, cfg), windows) - _nll(model, windows)


def losses_with_4_bit_activations(ctx) -> list[dict]:
    """Nats on 16 test windows with nothing but activations rounded (outlier model), as a mean over three seeds."""
    model, windows = ctx.reference("reference-outlier"), ctx.test_windows(16)
    variants = {
        "hadamard": Config(),
        "orthogonal": Config(rotation="orthogonal"),
        "not_clipped": Config(a_clip_ratio=1.0),
        "not_rotated": Config(rotation="none"),
    }
    rows = []
    for name, cfg in variants.items():
        losses = []
        for seed in (0,) if cfg.rotation == "none" else (0, 1, 2):
            rounded = rotate(model, replace(cfg, seed=seed))
            quantize_activations(rounded, cfg)
            losses.append(_nll(rounded, windows))
        rows.append({"name": name, "value": sum(losses) / len(losses)})
    return rows
