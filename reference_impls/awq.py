"""AWQ: scale up, before rounding, the input channels that see large activations; one searched exponent a place.

Paper     Lin et al., MLSys 2024, arXiv:2306.00978v5 (numbers below refer to v5)   Entry  papers/awq.yaml
Scope     weights of nn.Linear in decoder blocks; norms and linears before them absorb the scales; activations, KV
          cache, embeddings and lm_head untouched
Deviates  numbers of equations and tables as public summaries of v5 give them. What the text leaves open (which pairs,
          whose error, how to clip) follows the official code. The errors of a single linear and of a clipped group are
          computed from X^T X, the same up to float error; scales are rounded to float16, as stored, before any code is
          chosen. Bloom: errors of the attention module and of the MLP, where the official code takes the whole block's
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant, _walk, gptq
from requant.reference_impls._anatomy import require_pre_norm
from requant.reference_impls._calib import check_calib
from requant.reference_impls._hessian import gram
from requant.reference_impls._quant import QuantizationError
from requant.reference_impls._walk import Block, named_linears, walk_blocks
from requant.reference_impls.parts.awq_pairs import Pair, observed_pairs, output_error


@dataclass(frozen=True)
class Config:
    """Defaults: the INT4 g128 rows of Table 4."""

    w_bits: int = 4  # Table 4 (also 3; 2 in Table 9)
    group_size: int | None = 128  # Sec. 5.1: inputs per scale; 64 in Table 9; None = whole row
    scale_search: bool = True  # Eq. 4 and 5
    n_grid: int = 20  # Sec. 3.2: exponents 0, 1/20 .. 19/20 (official code: 1 itself is never tried)
    clip_search: bool = True  # Sec. 3.2, last paragraph ("weight clipping"); how: official code
    clip_grid: int = 20  # official code, auto_clip n_grid: the range shrinks in steps of 1/20
    max_shrink: float = 0.5  # official code: steps 0 .. 9, so never below 0.55 of the range
    clip_tokens: int = 512  # official code: evenly strided tokens the clip search sees
    symmetric_clip: bool = True  # official code: to +-m; False (LLMC): minimum and maximum shrink apart
    duo_scaling: bool = False  # AutoAWQ's default, not the paper's: weights count in s as well
    then_gptq: bool = False  # Table 9: GPTQ in place of rounding to nearest, on the scaled weights
    search_samples: int | None = None  # sequences the searches see (Fig. 8: 16 do), GPTQ sees all; None = all


def choose_qparams(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """AWQ's grid (official pseudo_quantize_tensor): minimum to maximum, zero not forced inside as elsewhere.

    A group whose values all have one sign gets its zero point at an end of the code range, and saturates.

    Args:
        groups: [d_out, n_groups, group] float32.
    Returns: scale (stored precision) and zero_point (integer-valued), both [d_out, n_groups, 1].
    """
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = _quant.stored_scale((high - low).clamp(min=1e-5) / (2**bits - 1), bits)
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def _fake_quant(groups: Tensor, bits: int) -> Tensor:
    scale, zero_point = choose_qparams(groups, bits)
    return _quant.dequantize(_quant.quantize(groups, scale, zero_point, bits), scale, zero_point)


def round_weight(W: Tensor, cfg: Config) -> Tensor:
    """Q(W): round to nearest on AWQ's grid, dequantized [d_out, d_in]."""
    return _fake_quant(_quant.grouped(W, cfg.group_size), cfg.w_bits).flatten(1)


# --- scale search -------------------------------------------------------------------------------------------


def scale_candidates(magnitude: Tensor, W: Tensor, cfg: Config) -> Iterator[Tensor]:
    """s = s_X^alpha for each exponent of the grid (Eq. 5), divided by sqrt(max * min); alpha = 0 gives all ones.

    Args:
        magnitude: [d_in] mean |x| over calibration tokens, s_X (SmoothQuant uses the maximum).
        W: [d_out, d_in] all weights that read this input, stacked; looked at only with duo_scaling.
    """
    if cfg.duo_scaling:
        groups = _quant.grouped(W, cfg.group_size).abs()
        relative = (groups / (groups.amax(-1, keepdim=True) + 1e-6)).flatten(1).mean(0)  # [d_in]
    for step in range(cfg.n_grid):
        alpha = step / cfg.n_grid
        s = magnitude.pow(alpha)
        if cfg.duo_scaling:
            s = s / (relative.pow(1 - alpha) + 1e-4)
        s = s.clamp(min=1e-4)
        yield s / (s.max() * s.min()).sqrt()


def search_scale(W: Tensor, magnitude: Tensor, error: Callable[[Tensor], float], cfg: Config) -> Tensor:
    """Eq. 4: the candidate s [d_in] whose Q(W s) / s gives the least output error.

    Args:
        W: [d_out, d_in] float32, stacked weights of the linears that share the input.
        error: takes a weight in the place of W, returns the mean squared change of the inspected output.
    Raises: QuantizationError if no candidate has a finite error.
    """
    best, least = None, float("inf")
    for s in scale_candidates(magnitude, W, cfg):
        loss = error(round_weight(W * s, cfg) / s)
        if loss < least:
            best, least = s, loss
    if best is None:
        raise QuantizationError("no scale gives a finite output error; do the activations hold inf or nan?")
    return best


# --- clip search --------------------------------------------------------------------------------------------


def clip_weight(W: Tensor, H: Tensor, cfg: Config) -> Tensor:
    """Clamp each group of each row to the range that, once rounded, changes its partial products least.

    Args:
        W: [d_out, d_in] float32, already scaled; left unchanged.
        H: [d_in, d_in] proportional to X^T X, X already divided by the scale; only diagonal blocks count.
    Returns: the clamped, not yet rounded weight. Step 0 is the full range, so no group gets worse.
    """
    groups = _quant.grouped(W, cfg.group_size)  # [d_out, n_groups, size]
    n_groups, size = groups.shape[1:]
    G = H.reshape(n_groups, size, n_groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if cfg.symmetric_clip:
        high = torch.maximum(high, -low)
        low = -high
    best, least = groups, torch.full_like(low, float("inf"))
    for step in range(int(cfg.max_shrink * cfg.clip_grid)):
        ratio = 1 - step / cfg.clip_grid
        clamped = groups.clamp(ratio * low, ratio * high)
        E = (_fake_quant(clamped, cfg.w_bits) - groups).transpose(0, 1)  # [n_groups, d_out, size]
        error = (E @ G * E).sum(-1).T[..., None]  # [d_out, n_groups, 1]
        better = error < least
        best, least = torch.where(better, clamped, best), torch.where(better, error, least)
    return best.flatten(1)


# --- one block ----------------------------------------------------------------------------------------------


def _gram_error(W: Tensor, H: Tensor, trial: Tensor) -> float:
    return float(((trial - W) @ H * (trial - W)).sum())


def find_scale(pair: Pair, X: Tensor, calls: list[tuple], cfg: Config) -> Tensor:
    """`search_scale` for one pair of an unmodified block; X [n_tokens, d_in] is the pair's input."""
    W = torch.cat([linear.weight.float() for linear in pair.linears])  # [sum of d_out, d_in]
    error = partial(output_error, pair, calls)
    if pair.inspected in pair.linears:  # then without running it: the mean of (X (trial - W)^T)^2
        error = partial(_gram_error, W, gram(X) / (len(X) * len(W)))
    return search_scale(W, X.abs().mean(0), error, cfg)


def transform_block(block: Block, cfg: Config) -> None:
    """Find all scales on the unscaled block, fold them in, then clip; in place."""
    sites, scales = observed_pairs(block), []
    if cfg.scale_search:
        scales = [find_scale(pair, X, calls, cfg) if pair.fold else None for pair, X, calls in sites]
    for index, s in enumerate(scales):
        if s is not None:
            pair, X, calls = sites[index]
            pair.fold(s)
            sites[index] = (pair, X / s, calls)
    if cfg.clip_search:
        for pair, X, _ in sites:
            sample = X[:: max(1, len(X) // cfg.clip_tokens)]
            for linear in pair.clips:
                linear.weight.copy_(clip_weight(linear.weight.float(), gram(sample) / len(sample), cfg))


# --- the method ---------------------------------------------------------------------------------------------


@torch.no_grad()
def transform(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """A copy with scales folded in and ranges clipped, not rounded; without clip_search the same function.

    Every block is searched on the inputs the full-precision blocks before it give.
    """
    check_calib(calib)
    require_pre_norm(model)
    model = _walk.copy_model(model)
    for block in walk_blocks(model, calib[: cfg.search_samples], propagate="original"):
        transform_block(block, cfg)
    return model


@torch.no_grad()
def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """`transform`, then round all decoder linears to nearest, or quantize them with GPTQ (Table 9)."""
    model = transform(model, calib, cfg)
    if cfg.then_gptq:
        return gptq.quantize(model, calib, _gptq_config(cfg))
    for block in _walk.visit_blocks(model):
        for linear in named_linears(block).values():
            linear.weight.copy_(round_weight(linear.weight.float(), cfg))
    return model


def _gptq_config(cfg: Config) -> gptq.Config:
    return gptq.Config(w_bits=cfg.w_bits, group_size=cfg.group_size)


def quantize_weight(W: Tensor, H: Tensor | None, cfg: Config) -> Tensor:
    """Clip and round one weight whose scale is folded in already (scales belong to pairs: `search_scale`).

    Args:
        W: [d_out, d_in] float32; left unchanged.
        H: [d_in, d_in] proportional to X^T X; None only where neither clip_search nor then_gptq is set.
    Returns: [d_out, d_in] float32, dequantized.
    """
    W = clip_weight(W, H, cfg) if cfg.clip_search else W
    return gptq.quantize_weight(W, H, _gptq_config(cfg)) if cfg.then_gptq else round_weight(W, cfg)


def pack_weight(W: Tensor, H: Tensor | None, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer: packed codes, float16 scales, packed zero points; see `quantize_weight`."""
    W = clip_weight(W, H, cfg) if cfg.clip_search else W
    if cfg.then_gptq:
        return gptq.pack_weight(W, H, _gptq_config(cfg))
    groups = _quant.grouped(W, cfg.group_size)
    scale, zero_point = choose_qparams(groups, cfg.w_bits)
    codes = _quant.quantize(groups, scale, zero_point, cfg.w_bits)
    return _quant.pack_affine(codes, scale, zero_point, cfg.w_bits, symmetric=False)


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    return _quant.unpack_affine(packed, cfg.w_bits, symmetric=False)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + (16 + b)/g; channel scales are folded away (but 16/d_out more for a down projection after GELU)."""
    return _quant.affine_bits(cfg.w_bits, cfg.group_size, d_in, symmetric=False)
