"""MagR: shrink the largest weight of each output channel as far as the layer's outputs allow, then round.

Paper     Zhang et al., NeurIPS 2024, arXiv:2406.00800v2 (numbers below refer to v2)   Entry  papers/magr.yaml
Scope     weights of nn.Linear in decoder blocks; activations, embeddings and lm_head untouched
Deviates  the prox finds its threshold by Newton's method instead of sorting (same point); where the code differs from
          the paper, that is the default and the code an option: MagR sees all calibration tokens (`last_sequence`),
          coordinate descent comes at 2 bits per channel only (`sweeps_everywhere`), and its sweeps on groups keep
          GPTQ's grids (`new_grids`), which the texts seen leave open, as whether beta holds for round-to-nearest too
          (it does here); zero points stay within their b bits; before QuIP, whose settings in Table 9 were not seen,
          MagR comes in the weights' own basis
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant, gptq, quip
from requant.reference_impls._calib import check_calib
from requant.reference_impls._hessian import coordinate_sweep, damped
from requant.reference_impls._quant import QuantizationError, check_choices
from requant.reference_impls._walk import copy_model, named_linears, walk_blocks
from requant.reference_impls._weights import quantize_blockwise

ERROR_FLOOR = 0.05  # the preprocessed weight is what is rounded, at any width
_NEWTON_STEPS = 50  # far more than it takes; the loop ends when no threshold moves
TINY = {"n_iters": 20, "cd_sweeps": 2}


@dataclass(frozen=True)
class Config:
    """Defaults: MagR + OPTQ with coordinate descent, 2 bits per channel, Table 3."""

    w_bits: int = 2  # Table 3 (also 3 and 4)
    group_size: int | None = None  # inputs per scale; None = whole row; 128 in Table 3
    symmetric: bool = False  # code, --sym off
    quantizer: str = "optq"  # Table 3: optq (GPTQ) or rtn; quip in Table 9; none = MagR alone, Table 1
    alpha: float = 1e-3  # Table 7, per channel; goes with H divided by its largest eigenvalue
    alpha_grouped: float = 1e-4  # code, MagR.py: in groups
    n_iters: int = 150  # K, the same in all experiments (code: 200)
    beta: float | None = None  # share of the range; None = `kept_range` (Table 8; code, llama.py)
    cd_sweeps: int | None = None  # after OPTQ; None = 30 at 2 bits per channel (Table 3, dagger), else 0
    sweeps_everywhere: bool = False  # code: where the paper has 0, 30 at 2 bits in groups and 1 elsewhere
    new_grids: bool = False  # code: in groups each sweep takes new grids, from the rounded weights
    cd_damp_ratio: float = 0.75  # code, optq.py: fraction of mean(diag H)
    last_sequence: bool = False  # code: MagR sees the last calibration sequence alone, OPTQ all
    damp_ratio: float = 0.01  # code, --percdamp
    block_size: int = 128  # code: columns per lazy batch of OPTQ
    seed: int = 0  # of QuIP's rotations

    def __post_init__(self) -> None:
        check_choices(self, quantizer=("optq", "rtn", "quip", "none"))
        if self.quantizer == "quip" and (self.group_size is not None or self.symmetric):
            raise QuantizationError("QuIP has one grid a layer: set group_size=None and symmetric=False")

    @property
    def kept_range(self) -> float:
        """beta, or the paper's choice: 0.8, 0.9, 1 at 2, 3, 4 bits per channel, 0.95 in groups of 128, 1 in others."""
        if self.beta is not None:
            return self.beta
        if self.group_size is not None:
            return {128: 0.95}.get(self.group_size, 1.0)
        return {2: 0.8, 3: 0.9}.get(self.w_bits, 1.0)

    @property
    def sweeps(self) -> int:
        """cd_sweeps, or the paper's choice (the code's, if sweeps_everywhere) for this width and group size."""
        if self.cd_sweeps is not None:
            return self.cd_sweeps
        if self.w_bits == 2 and (self.group_size is None or self.sweeps_everywhere):
            return 30
        return int(self.sweeps_everywhere)


# --- magnitude reduction ----------------------------------------------------------------------------------------------


def clip_threshold(v: Tensor, t: float, start: Tensor | None = None) -> Tensor:
    """The c with sum(max(|v| - c, 0)) = t of each last-dimension slice, 0 where sum|v| <= t: [..., 1].

    The sum is convex and piecewise linear in c: Newton's steps are exact after finitely many.

    Args:
        start: thresholds of a similar v, to begin at.
    """
    size = v.abs()
    c = torch.zeros_like(size[..., :1]) if start is None else start.minimum(size.amax(-1, keepdim=True))
    for _ in range(_NEWTON_STEPS):
        above = size.clone().ge_(c)  # 1.0 or 0.0
        new = (torch.linalg.vecdot(size, above)[..., None] - t) / above.sum(-1, keepdim=True)
        new = new.clamp(min=0)
        if torch.allclose(new, c, rtol=1e-6, atol=0):
            return new
        c = new
    return c


def prox(v: Tensor, t: float, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """argmin_w 1/2 |w - v|^2 + t max|w| of each slice: v clipped at `clip_threshold`, which is returned too.

    Equal to v - t * P(v / t), P the projection on the unit L1 ball (Algorithm 2).
    """
    c = clip_threshold(v, t, start)
    return v.clamp(-c, c), c


def iterates(W: Tensor, H: Tensor, cfg: Config) -> Iterator[Tensor]:
    """The weights after 1, 2, ... iterations of Algorithm 1: [d_out, d_in].

    Args:
        W: [d_out, d_in] float32, rows are output channels; left unchanged.
        H: [d_in, d_in] proportional to X^T X; divided by its largest eigenvalue here, so that the step is 1.
    """
    H = H / torch.linalg.eigvalsh(H)[-1]
    keep, pull = torch.eye(len(H)) - H, W @ H
    alpha = cfg.alpha if cfg.group_size is None else cfg.alpha_grouped
    reduced, c = W, None
    for _ in range(cfg.n_iters):
        v = torch.addmm(pull, reduced, keep)  # reduced - (reduced - W) H
        clipped, c = prox(_quant.grouped(v, cfg.group_size), alpha, c)
        reduced = clipped.flatten(1)
        yield reduced


def reduce_magnitude(W: Tensor, H: Tensor, cfg: Config) -> Tensor:
    """Algorithm 1: weights [d_out, d_in] with small largest entries and nearly the same outputs X W^T."""
    reduced = W
    for reduced in iterates(W, H, cfg):  # noqa: B007 the last one counts
        pass
    return reduced


# --- rounding ---------------------------------------------------------------------------------------------------------


def choose_qparams(x: Tensor, bits: int, symmetric: bool, beta: float) -> tuple[Tensor, Tensor]:
    """The min-max grid with its step times beta: anchored at the minimum, so the upper end is clipped (Table 8)."""
    scale, zero_point = _quant.choose_qparams(x, bits, symmetric)
    if beta == 1:
        return scale, zero_point
    scale = _quant.stored_scale(beta * scale, bits)
    if not symmetric:
        zero_point = (-x.amin(-1, keepdim=True).clamp(max=0) / scale).round().clamp(0, 2**bits - 1)
    return scale, zero_point


def _round(W: Tensor, reduced: Tensor, H: Tensor, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [d_out, n_groups, group], scale and zero point [d_out, n_groups, 1]; reduced: W after MagR."""
    if cfg.quantizer == "none":
        raise QuantizationError("with quantizer 'none' nothing is rounded; choose optq or rtn")
    groups = _quant.grouped(W, cfg.group_size)
    choose = partial(choose_qparams, beta=cfg.kept_range)
    if cfg.quantizer == "rtn":
        reduced = _quant.grouped(reduced, cfg.group_size)
        scale, zero_point = choose(reduced, cfg.w_bits, cfg.symmetric)
        return _quant.quantize(reduced, scale, zero_point, cfg.w_bits), scale, zero_point
    host = gptq.Config(
        cfg.w_bits, cfg.group_size, cfg.symmetric, damp_ratio=cfg.damp_ratio, block_size=cfg.block_size
    )
    rounded = gptq.round_columns(reduced, H, host, choose)
    codes, scale, zero_point, size = rounded.codes, rounded.scale, rounded.zero_point, groups.shape[-1]

    def nearest(j: int, best: Tensor) -> Tensor:
        g = j // size
        if cfg.new_grids and cfg.group_size is not None and j % size == 0:
            now = _quant.dequantize(codes[j : j + size], scale[g], zero_point[g]).T
            scale[g], zero_point[g] = (t.squeeze(-1) for t in choose(now, cfg.w_bits, cfg.symmetric))
        codes[j] = _quant.quantize(best, scale[g], zero_point[g], cfg.w_bits)
        return _quant.dequantize(codes[j], scale[g], zero_point[g])

    Q, H = rounded.dequantize(), damped(H, cfg.cd_damp_ratio)
    for _ in range(cfg.sweeps):  # towards the weights as they were before MagR (code, optq.py)
        Q = coordinate_sweep(Q, W, H, nearest)
    return codes.T.reshape(groups.shape), scale.T[..., None], zero_point.T[..., None]


def _quip(cfg: Config) -> quip.Config:
    return quip.Config(cfg.w_bits, damp_ratio=cfg.damp_ratio, seed=cfg.seed)


def quantize_weight(W: Tensor, H: Tensor, cfg: Config, H_magr: Tensor | None = None) -> Tensor:
    """MagR, then the host quantizer, dequantized: float32 [d_out, d_in].

    Args:
        H_magr: [d_in, d_in], what MagR sees in the place of H (`last_sequence`).
    Raises: QuantizationError if group_size does not divide d_in, or H + damping is not positive definite.
    """
    reduced = reduce_magnitude(W, H if H_magr is None else H_magr, cfg)
    if cfg.quantizer == "none":
        return reduced
    if cfg.quantizer == "quip":
        return quip.quantize_weight(reduced, H, _quip(cfg))
    return _quant.dequantize(*_round(W, reduced, H, cfg)).flatten(1)


@torch.no_grad()
def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Block by block, each on the outputs of the quantized blocks before it."""
    check_calib(calib)
    if cfg.quantizer != "quip" and not cfg.last_sequence:
        return quantize_blockwise(model, calib, lambda W, H: quantize_weight(W, H, cfg))
    seeds = count(cfg.seed * 2**16)  # as QuIP: every matrix has rotations of its own
    model = copy_model(model)
    for block in walk_blocks(model, calib):
        hessians = seen = block.hessians()
        if cfg.last_sequence:
            seen = replace(block, inputs=[block.inputs[-1][-1:]]).hessians()
        for name, linear in named_linears(block.module).items():
            own = replace(cfg, seed=next(seeds))
            linear.weight.copy_(quantize_weight(linear.weight.float(), hessians[name], own, seen[name]))
    return model


def pack_weight(W: Tensor, H: Tensor, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer: packed codes, float16 scales, packed zero points; or what QuIP stores."""
    reduced = reduce_magnitude(W, H, cfg)
    if cfg.quantizer == "quip":
        return quip.pack_weight(reduced, H, _quip(cfg))
    return _quant.pack_affine(*_round(W, reduced, H, cfg), cfg.w_bits, cfg.symmetric)


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    if cfg.quantizer == "quip":
        return quip.unpack_weight(packed, _quip(cfg))
    return _quant.unpack_affine(packed, cfg.w_bits, cfg.symmetric)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + (16 + b)/g, or QuIP's bits; 16 with quantizer none. MagR itself stores nothing."""
    if cfg.quantizer == "none":
        return 16.0
    if cfg.quantizer == "quip":
        return quip.bits_per_weight(d_out, d_in, _quip(cfg))
    return _quant.affine_bits(cfg.w_bits, cfg.group_size, d_in, cfg.symmetric)
