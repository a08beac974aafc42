"""DuQuant: smoothing, a greedy block rotation, a zigzag permutation and a second rotation in front of every linear.

Paper     Lin et al., NeurIPS 2024, arXiv:2406.01721v3 (numbers below refer to v3)   Entry  papers/duquant.yaml
Scope     weights and inputs of nn.Linear in decoder blocks, queries, keys, values; attention probabilities, embeddings,
          lm_head untouched
Deviates  learned clipping (LWC) runs in float32; one random completion a search, as the code draws it; the flat
          orthogonal matrix is a Householder reflection, the code's a product of plane rotations; smoothing
          takes the largest weight of all readers (the code's choice is an option) and under grouped queries one factor
          for the query heads that share a value head (the code divides the input of o when it runs); the Hadamard
          transform of queries and keys is at most a head wide; ranges include zero and scales are rounded to float16;
          rotations and permutations, two matrices and an index a layer input, are not counted as storage
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant
from requant.reference_impls._activation import transform_attention, transform_inputs
from requant.reference_impls._anatomy import anatomy
from requant.reference_impls._calib import check_calib
from requant.reference_impls._clipping import ClippedWeight, learn_ranges
from requant.reference_impls._equivalence import Site
from requant.reference_impls._hadamard import hadamard_transform
from requant.reference_impls._quant import check_choices
from requant.reference_impls._straight_through import ClippingStrengths, token_ste
from requant.reference_impls._walk import Block, copy_model, named_linears, walk_blocks
from requant.reference_impls.parts.duquant_dual_transform import search_transform
from requant.reference_impls.smoothquant import smooth_sites

TINY = {"block_size": 32, "max_rotation_step": 8}
ERROR_FLOOR = 0.05  # rows are clipped at 0.8 of their range


@dataclass(frozen=True)
class Config:
    """Defaults: DuQuant without learned clipping at W4A4, the rows of Table 1."""

    w_bits: int = 4  # Table 1
    a_bits: int | None = 4  # Table 1; None = not quantized
    kv_bits: int | None = 4  # queries, keys, values; code, the activations' width; None = not quantized
    w_clip_ratio: float = 0.8  # code, --swc: share of a row's range
    a_clip_ratio: float = 0.9  # code, --lac: share of a token's range, linear inputs only
    alpha: float | None = 0.6  # code, --alpha; 0.5 in run_lwc.sh; None = no smoothing
    smoothing_weights: str = (
        "all"  # whose maximum counts: of all readers, or as in the code of "q_and_up" alone
    )
    block_size: int = 128  # code, --block_size: channels that one rotation mixes
    max_rotation_step: int = 256  # code, --max_rotation_step: greedy steps tried; 0 = no rotation at all
    permutation_times: int = 1  # code, --permutation_times: permutations, each with one more rotation
    lwc: bool = False  # Table 1, DuQuant + LWC: a range learned for each row in the place of w_clip_ratio
    lwc_lr: float = 1e-2  # run_lwc.sh
    epochs: int = 20  # run_lwc.sh: passes over the samples, for each block
    batch_size: int = 1  # code
    clip_init: float = 4.0  # code: logit, 0.982 of the range
    construction: str = "paper"  # or "released": the code's base matrix and choice of channel
    seed: int = 0  # of the random completions


# --- quantization ---------------------------------------------------------------------------------------------------


def _attend(query: Tensor, key: Tensor, value: Tensor, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated and rounded queries and keys, whose product only rounding changes, and rounded values."""
    if cfg.max_rotation_step:
        width = min(128, query.shape[-1])  # code: blocks of 128, the head of a Llama
        query, key = (hadamard_transform(x.unflatten(-1, (-1, width))).flatten(-2) for x in (query, key))
    return tuple(token_ste(x, cfg.kv_bits) for x in (query, key, value))


@torch.no_grad()
def transform_block(block: Block, cfg: Config, generator, rounding: bool) -> dict[str, Tensor]:
    """One transform for linears that read the same tensor; their weights rounded in the new basis, in place.

    Args:
        block: its inputs are what transforms are searched on.
    Returns: the transformed weights before rounding, by the name of their linear in the block.
    """
    parts, unrounded = anatomy(block.module), {}
    for stage in (parts.qkv, [parts.o], parts.ups, [parts.down]):
        linears = [getattr(module, "linear", module) for module in stage]  # smoothing may wrap one
        seen: list[Tensor] = []
        block.observe({"input": linears[0]}, lambda _name, X, seen=seen: seen.append(X.float()))
        transform = search_transform(torch.cat(seen), cfg, generator)

        def before(x: Tensor, transform=transform) -> Tensor:
            x = transform(x)
            return token_ste(x, cfg.a_bits, cfg.a_clip_ratio) if rounding and cfg.a_bits is not None else x

        for linear in linears:
            unrounded[linear] = transform(linear.weight.float())
            W = unrounded[linear]
            linear.weight.copy_(quantize_weight(W, None, cfg) if rounding else W)
        transform_inputs(block.module, linears, before)
    return {name: unrounded[linear] for name, linear in named_linears(block.module).items()}


def learn_clipping(block: Block, unrounded: dict[str, Tensor], cfg: Config) -> list[float]:
    """Learn the range of each row of a transformed block on its output error (code, as OmniQuant's LWC), and round."""
    for name, linear in named_linears(block.module).items():
        linear.weight.copy_(unrounded[name])
    clips = {name: ClippedWeight(W, cfg.w_bits, None, False, cfg.clip_init) for name, W in unrounded.items()}
    return learn_ranges(block, clips, lr=cfg.lwc_lr, epochs=cfg.epochs, batch_size=cfg.batch_size)


def _weighed(site: Site, cfg: Config) -> list[nn.Linear]:
    """The readers of a site whose weights its smoothing factors count; q is the first behind a norm, up the last."""
    if cfg.smoothing_weights == "all":
        return site.linears
    return [site.linears[0 if site.name == "attn_norm" else -1]]


@torch.no_grad()
def transform(model: nn.Module, calib: Tensor, cfg: Config, rounding: bool = False) -> nn.Module:
    """A copy with smoothed channels, rotated and permuted inputs, and the inverse of all this in its weights.

    Transforms are searched block by block on a single sequence: the mean over samples of the first block's inputs, sent
    through the blocks as they have become. Without rounding the copy computes the same function.
    """
    check_choices(cfg, construction=("paper", "released"), smoothing_weights=("all", "q_and_up"))
    check_calib(calib)
    model, learned = copy_model(model), rounding and cfg.lwc
    if cfg.alpha is not None:
        smooth_sites(model, calib, cfg.alpha, weighed=partial(_weighed, cfg=cfg))
    generator = torch.Generator().manual_seed(cfg.seed)
    for block in walk_blocks(model, calib, propagate="both" if learned else "quantized"):
        if rounding and cfg.kv_bits is not None:
            transform_attention(model, anatomy(block.module).attn, partial(_attend, cfg=cfg))
        if block.index == 0:
            mean = [torch.cat(block.inputs).mean(0, keepdim=True)]  # [1, seqlen, hidden]
            block.inputs = block.inputs if learned else mean
        one = replace(block, inputs=mean) if learned else block
        unrounded = transform_block(one, cfg, generator, rounding)
        if learned:
            learn_clipping(block, unrounded, cfg)
            mean = one.run()
    return model


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Transform every linear input, then round weights, linear inputs, queries, keys and values to nearest.

    Raises: QuantizationError without calib, or if block_size does not divide a width; UnsupportedModelError.
    """
    return transform(model, calib, cfg, rounding=True)


def _round(W: Tensor, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    if cfg.lwc:  # where learning starts; what it ends with belongs to a block
        groups = W[:, None]
        scale, zero_point = ClippingStrengths(groups, cfg.clip_init).stored_grid(groups, cfg.w_bits)
    else:
        scale, zero_point = _quant.choose_qparams(W[:, None] * cfg.w_clip_ratio, cfg.w_bits)
    return _quant.quantize(W[:, None], scale, zero_point, cfg.w_bits), scale, zero_point


def quantize_weight(W: Tensor, H: Tensor | None, cfg: Config) -> Tensor:
    """Round W [d_out, d_in], already transformed, on one asymmetric grid a row; H is ignored. Dequantized."""
    return _quant.dequantize(*_round(W, cfg)).flatten(1)


def pack_weight(W: Tensor, H: Tensor | None, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one transformed layer: packed codes and zero points, float16 scales."""
    return _quant.pack_affine(*_round(W, cfg), cfg.w_bits, symmetric=False)


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    return _quant.unpack_affine(packed, cfg.w_bits, symmetric=False)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + (16 + b)/d_in; rotations and permutations, shared by all rows and blocks, are left out."""
    return _quant.affine_bits(cfg.w_bits, None, d_in, symmetric=False)
