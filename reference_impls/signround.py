"""SignRound: an offset learned for every weight decides which way it is rounded, and two factors clip each group.

Paper     Cheng et al., Findings of EMNLP 2024, arXiv:2309.05516v5 (numbers below refer to v5)
          Entry  papers/signround.yaml
Scope     weights of nn.Linear in decoder blocks; activations, embeddings, norms and lm_head untouched
Deviates  float32 in place of automatic mixed precision; scales are rounded to float16, the precision they are stored
          in, before any code is chosen, and the gradient passes that rounding; the clipping factors of a group start at
          exactly 1 and are kept in [0, 1].
          quantize_weight and pack_weight, which see one layer and not its block, descend on that layer's output error.
          Groups must divide the inputs; mixtures of experts are not covered
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import LinearLR

from requant.reference_impls import _quant
from requant.reference_impls._calib import check_calib
from requant.reference_impls._learn import SignSGD, at_random, descend, samples
from requant.reference_impls._straight_through import affine_ste, round_ste, straight_through
from requant.reference_impls._walk import copy_model, named_linears, walk_blocks

TINY = {"n_iters": 50}  # with ten steps of 0.1 rounding to nearest is the best a layer sees


@dataclass(frozen=True)
class Config:
    """Defaults: W4 g128 of the main table. "code" is the official repository, intel/auto-round @b9f3d00."""

    w_bits: int = 4  # main table; also 3 and 2
    group_size: int | None = 128  # main table, inputs per scale; None = whole row
    symmetric: bool = False  # code, asymmetric
    n_iters: int = 200  # code, steps for each block; 1000 for the best recipe
    lr: float | None = None  # code: 1/n_iters, falling linearly to 0
    clip_lr: float | None = (
        None  # code, --minmax_lr: the same as lr; 2/n_iters advised where perplexity explodes
    )
    batch_size: int = 8  # code, samples for each step
    quantized_input: bool = True  # code, enable_quanted_input; off: train on the original blocks' outputs
    clamp_offsets: bool = True  # text: within half a step; version 0.1 of the code leaves them free (False)
    learn_clipping: bool = True  # code, enable_minmax_tuning; off in the first arXiv version
    seed: int = 0  # which samples make up each batch


class LearnedRounding(nn.Module):
    """A weight, the offset V of each of its entries and the clipping factors 1 + A, 1 + B of each group (Algorithm 1).

    Attributes: groups [d_out, n_groups, group_size]; offset alike; low, high (A, B) [d_out, n_groups, 1].
    """

    def __init__(self, W: Tensor, cfg: Config):
        super().__init__()
        self.bits, self.symmetric, self.clamp_offsets = cfg.w_bits, cfg.symmetric, cfg.clamp_offsets
        self.groups = _quant.grouped(W, cfg.group_size)
        self.offset = nn.Parameter(torch.zeros_like(self.groups))
        ends = torch.zeros_like(self.groups[..., :1])
        self.low, self.high = (nn.Parameter(ends.clone(), cfg.learn_clipping) for _ in range(2))
        self.bottom = self.groups.amin(-1, keepdim=True).clamp(max=0)
        self.top = self.groups.amax(-1, keepdim=True).clamp(min=0)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point [d_out, n_groups, 1] of the clipped range; differentiable."""
        bottom, top = (1 + self.low) * self.bottom, (1 + self.high) * self.top
        if self.symmetric:
            top = torch.maximum(top, -bottom)
            bottom = -top
        empty = (bottom == 0) & (top == 0)
        bottom, top = bottom.masked_fill(empty, -1.0), top.masked_fill(empty, 1.0)
        scale = (top - bottom) / (2**self.bits - 1)
        scale = straight_through(scale, lambda s: _quant.stored_scale(s, self.bits))
        if self.symmetric:
            return scale, torch.full_like(scale, 2.0 ** (self.bits - 1))
        return scale, round_ste(-bottom / scale)

    def weight(self) -> Tensor:
        """The dequantized weight [d_out, d_in], differentiable in all three parameters."""
        return affine_ste(self.groups, *self.grid(), self.bits, self.offset).flatten(1)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Integer-valued codes [d_out, n_groups, group_size]."""
        scale, zero_point = self.grid()
        return ((self.groups / scale + self.offset).round() + zero_point).clamp(0, 2**self.bits - 1)

    @torch.no_grad()
    def project(self) -> None:
        """Keep both ends of each range between 0 and where they were, and offsets within half a step."""
        for end in (self.low, self.high):
            end.clamp_(-1, 0)
        if self.clamp_offsets:
            self.offset.clamp_(-0.5, 0.5)


def learn(
    roundings: Iterable[LearnedRounding],
    loss: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    cfg: Config,
) -> list[float]:
    """Signed gradient descent (Algorithm 1), in place; ends with the parameters of the lowest batch loss.

    Returns: the loss of each batch before its step.
    """
    roundings = list(roundings)
    lr = 1 / cfg.n_iters if cfg.lr is None else cfg.lr
    groups = [{"params": [r.offset for r in roundings], "lr": lr}]
    if cfg.learn_clipping:
        ends = [end for r in roundings for end in (r.low, r.high)]
        groups.append({"params": ends, "lr": lr if cfg.clip_lr is None else cfg.clip_lr})
    optimizer = SignSGD(groups, lr)
    return descend(
        loss,
        optimizer,
        batches,
        schedule=LinearLR(optimizer, 1.0, 0.0, cfg.n_iters),
        project=lambda: [r.project() for r in roundings],
        keep_best=True,
    )


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Learn the rounding of all linears of a block together, block by block (Algorithm 1).

    The target is the original block on original inputs, the block that learns gets what quantized blocks give.
    """
    check_calib(calib)
    model = copy_model(model)
    generator = torch.Generator().manual_seed(cfg.seed)
    for block in walk_blocks(model, calib, propagate="both"):
        linears = named_linears(block.module)
        roundings = {name: LearnedRounding(linear.weight.float(), cfg) for name, linear in linears.items()}
        inputs = block.inputs if cfg.quantized_input else block.original_inputs

        def loss(batch: Tensor, block=block, roundings=roundings, inputs=inputs) -> Tensor:
            weights = {f"{name}.weight": rounding.weight() for name, rounding in roundings.items()}
            return mse_loss(block.forward(samples(inputs, batch), weights), samples(block.targets, batch))

        batches = at_random(len(calib), cfg.batch_size, cfg.n_iters, generator)
        learn(roundings.values(), loss, batches, cfg)
        for name, linear in linears.items():
            linear.weight.copy_(roundings[name].weight().detach())
    return model


def round_layer(W: Tensor, H: Tensor, cfg: Config) -> LearnedRounding:
    """The same descent for one layer [d_out, d_in] on its own output error tr(E H E^T), E = Q - W."""
    rounding = LearnedRounding(W, cfg)

    def loss(_batch: Tensor) -> Tensor:
        error = rounding.weight() - W
        return (error @ H * error).sum()

    learn([rounding], loss, [torch.arange(0)] * cfg.n_iters, cfg)
    return rounding


def quantize_weight(W: Tensor, H: Tensor, cfg: Config) -> Tensor:
    """`round_layer`, dequantized: float32 [d_out, d_in]."""
    return round_layer(W, H, cfg).weight().detach()


def pack_weight(W: Tensor, H: Tensor, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer: packed codes, float16 scales, packed zero points; nothing that was learned."""
    rounding = round_layer(W, H, cfg)
    scale, zero_point = (tensor.detach() for tensor in rounding.grid())
    return _quant.pack_affine(rounding.codes(), scale, zero_point, cfg.w_bits, cfg.symmetric)


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    return _quant.unpack_affine(packed, cfg.w_bits, cfg.symmetric)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + (16 + b)/g: codes, one float16 scale and one b-bit zero point per group."""
    return _quant.affine_bits(cfg.w_bits, cfg.group_size, d_in, cfg.symmetric)
