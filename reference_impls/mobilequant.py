"""MobileQuant: static integer ranges for every activation; scales, clipping and ranges are learned end to end.

Paper     Tan et al., Findings of EMNLP 2024, arXiv:2408.13933v1 (numbers refer to v1)   Entry  papers/mobilequant.yaml
Scope     weights of nn.Linear and norms in decoder blocks, inputs and outputs of linears, norms and softmax, outputs of
          activation functions, q and k after rotary embedding; embeddings, the final norm and lm_head untouched
Deviates  ranges are observed on all calibration samples (the code: on 512 others); training starts from this project's
          SmoothQuant factors at norms and, for scale_up, before down; under rotary embedding query-key scales of a pair
          are tied unless tie_rotary is off; finished weight scales are rounded to float16 (at 16 bits to float32),
          offsets to integers; biases of norms stay in floating point, as in the code
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant
from requant.reference_impls._calib import check_calib
from requant.reference_impls._learn import cosine_decay, descend, in_order
from requant.reference_impls._quant import check_choices
from requant.reference_impls._straight_through import ClippingStrengths
from requant.reference_impls._walk import Block, copy_model, decoder_blocks, require_whole, walk_blocks
from requant.reference_impls.parts.mobilequant_block import MobileBlock, whole_or_rows
from requant.reference_impls.parts.mobilequant_ranges import simulate
from requant.reference_impls.smoothquant import smooth_sites

ERROR_FLOOR = 0.01  # ranges start clipped to 0.982
TINY = {"epochs": 1, "batch_size": 8}


@dataclass(frozen=True)
class Config:
    """Defaults: W8A8 of Table 1."""

    w_bits: int = 8  # Table 1; 4 with per_channel, W4A8
    a_bits: int = 8  # Table 1
    wide_bits: int = 16  # Sec. 3.1: norms, outputs of o and down, softmax; 8 is "full W8A8", Table 5
    norm_weights: bool = True  # Sec. 3.1: wide_bits, one scale a norm; off: floating point
    softmax_inputs: bool = True  # Sec. 3.1: wide_bits; off: floating point
    w_granularity: str = "per_tensor"  # Sec. 4.1, W8; per_channel for W4; down is always per_channel
    symmetric: bool = False  # of weights; True in Table 7
    scale_up: bool = True  # Sec. 3.2: scales between up and down; False: OmniQuant's places ("static")
    learn_ranges: bool = True  # Sec. 3.3, Table 3
    end_to_end: bool = True  # Sec. 3.4, Table 2; False: block by block
    epochs: int = 60  # Table 2
    batch_size: int = 1  # code
    let_lr: float = 1e-3  # code
    lwc_lr: float = 1e-2  # code
    lrl_lr: float = 1e-6  # code, scales and offsets of activations
    lr_end_ratio: float = 0.1  # code: all rates fall by a cosine to 1e-4, 1e-3 and 1e-7
    weight_decay: float = 0.0  # code
    clip_init: float = 4.0  # code: logit, 0.982 of the range
    min_scale: float = 1e-2  # code: scales below it in magnitude are pushed to it
    alpha: float = 0.5  # of the SmoothQuant run that training starts from (README)
    tie_rotary: bool = True  # the code leaves the query-key scales of a rotary pair free (False)

    def __post_init__(self) -> None:
        check_choices(self, w_granularity=("per_tensor", "per_channel"))


# --- learning (Sec. 3.4) ----------------------------------------------------------------------------------------


@torch.no_grad()
def smoothed(model: nn.Module, calib: Tensor, cfg: Config) -> nn.Module:
    """A copy with the same function and SmoothQuant's factors (its Eq. 4) at norms and, for scale_up, before down."""
    model, names = copy_model(model), ("attn_norm", "mlp_norm", *(["up"] if cfg.scale_up else []))
    smooth_sites(model, calib, cfg.alpha, lambda site: site.name in names and site.writer is not None)
    return model


def learn(stack: Sequence[MobileBlock], inputs: Tensor, targets: Tensor, cfg: Config) -> list[float]:
    """Minimise the squared error of what a stack of blocks makes of inputs [n_samples, seqlen, hidden], jointly.

    Returns: the loss of each batch before its step.
    """
    learned = (
        (cfg.let_lr, [p for learner in stack for p in learner.scales.values()]),
        (cfg.lwc_lr, [p for learner in stack for p in learner.strengths()]),
        (cfg.lrl_lr, [p for learner in stack for p in learner.ranges() if cfg.learn_ranges]),
    )
    groups = [{"params": params, "lr": lr} for lr, params in learned if params]
    for p in (p for group in groups for p in group["params"]):
        p.requires_grad_(True)
    batches = list(in_order(len(inputs), cfg.batch_size, cfg.epochs))
    optimizer = torch.optim.AdamW(groups, weight_decay=cfg.weight_decay)
    schedule = cosine_decay(optimizer, len(batches), cfg.lr_end_ratio)

    def loss(batch: Tensor) -> Tensor:
        x = inputs[batch]
        for learner in stack:
            x = learner(x)
        return (x - targets[batch]).square().mean()

    return descend(loss, optimizer, batches, schedule=schedule)


@torch.no_grad()
def outputs_of(stack: Sequence[Block | MobileBlock], x: Tensor) -> Tensor:
    """What a stack makes of x, in batches of 8 samples."""
    for each in stack:
        x = torch.cat([each.forward(batch) for batch in x.split(8)])
    return x


@torch.no_grad()
def prepare(
    model: nn.Module, calib: Tensor, cfg: Config
) -> tuple[nn.Module, list[MobileBlock], list[Block], Tensor]:
    """The simulated model with observed ranges, its learners, the original blocks, and what the first one is fed."""
    original = smoothed(model, calib, cfg).float()  # all blocks are learned at once, outside a walk
    walk = walk_blocks(original, calib, propagate="original")
    first = next(walk)
    blocks, inputs = [replace(block, inputs=[]) for block in (first, *walk)], torch.cat(first.inputs)
    model = copy_model(original)
    twins = [replace(b, module=module) for b, module in zip(blocks, decoder_blocks(model), strict=True)]
    learners = [MobileBlock(block, model.config, cfg) for block in twins]
    ranges = simulate(model, cfg.a_bits, cfg.wide_bits, cfg.softmax_inputs)
    outputs_of(twins, inputs)
    for each in ranges:
        each.settle()
    return model, learners, blocks, inputs


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Smooth, observe ranges, learn everything jointly on the last hidden state, fold and round.

    Raises: UnsupportedModelError where norm outputs are not read by linears alone or attention does not use
    transformers' interface.
    """
    check_calib(calib)
    require_whole(model, "mobilequant")
    dtype, (model, learners, blocks, inputs) = model.dtype, prepare(model, calib, cfg)
    fit(learners, blocks, inputs, cfg)
    with torch.no_grad():
        for learner in learners:
            learner.rounded().write()
            for offset in learner.ranges()[1::2]:
                offset.round_()
    return model.requires_grad_(False).to(dtype)


def fit(learners: list[MobileBlock], blocks: list[Block], inputs: Tensor, cfg: Config) -> None:
    """Learn all blocks at once or, unless end_to_end, one after the other on outputs of the rounded ones before."""
    size, original = len(blocks) if cfg.end_to_end else 1, inputs
    for span in (slice(i, i + size) for i in range(0, len(blocks), size) if cfg.epochs):
        original = outputs_of(blocks[span], original)
        learn(learners[span], inputs, original, cfg)
        inputs = outputs_of(learners[span], inputs)


# --- one layer ------------------------------------------------------------------------------------------------------


def pack_weight(W: Tensor, H: Tensor | None, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer other than down, its range clipped as at the start of training; H is ignored.

    The gains of a norm are a layer of one row, with w_bits at wide_bits and per_tensor.
    """
    groups = whole_or_rows(W, cfg.w_granularity == "per_tensor")
    clip = ClippingStrengths(groups, cfg.clip_init)
    scale, zero_point = clip.stored_grid(groups, cfg.w_bits, cfg.symmetric)
    codes = _quant.quantize(groups, scale, zero_point, cfg.w_bits).reshape(len(W), 1, -1)
    packed = _quant.pack_affine(codes, scale, zero_point, cfg.w_bits, cfg.symmetric)
    apart = () if len(scale) > 1 else ("scale", "zero_point")  # named apart where a matrix has one of them
    return {"tensor_" * (key in apart) + key: tensor for key, tensor in packed.items()}


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    packed = {key.removeprefix("tensor_"): tensor for key, tensor in packed.items()}
    return _quant.unpack_affine(packed, cfg.w_bits, cfg.symmetric)


def quantize_weight(W: Tensor, H: Tensor | None, cfg: Config) -> Tensor:
    """What `pack_weight` stores, dequantized: float32 [d_out, d_in]."""
    return unpack_weight(pack_weight(W, H, cfg), cfg)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + (16 + b)/(d_out d_in), or (16 + b)/d_in per channel; two numbers for each activation are not counted."""
    size = d_out * d_in if cfg.w_granularity == "per_tensor" else d_in
    return _quant.affine_bits(cfg.w_bits, size, d_in, cfg.symmetric)
