"""ATQ: every input channel is scaled into [-1, 1], weights are rounded with compensation, activations as they are.

Paper     Gai and Li, Findings of EMNLP 2024, aclanthology.org/2024.findings-emnlp.1001 (only its abstract was read)
Entry     papers/atq.yaml
Scope     weights and inputs of nn.Linear in decoder blocks; attention products, norms, embeddings and lm_head untouched
Deviates  a reconstruction. Stated in the abstract: the equivalent transformation, the split of the error by the
          triangle inequality, weights rounded input by input with the following ones adjusted, transformed activations
          rounded directly, W8A8. Reconstructed, each marked [R]: the factors (largest absolute activation), where they
          go, GPTQ's update and its damping, symmetric grids, a scale per row and per token, which inputs calibrate a
          block
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant, gptq
from requant.reference_impls._activation import QuantInput
from requant.reference_impls._anatomy import anatomy, require_pre_norm
from requant.reference_impls._calib import check_calib
from requant.reference_impls._equivalence import Site, sites
from requant.reference_impls._hessian import proxy_loss
from requant.reference_impls._logits import change_of_logits
from requant.reference_impls._quant import QuantizationError, check_choices
from requant.reference_impls._walk import (
    copy_model,
    decoder_blocks,
    named_linears,
    replace_module,
    visit_blocks,
)
from requant.reference_impls._weights import quantize_blockwise
from requant.reference_impls.smoothquant import channel_peaks, smoothing_factors


@dataclass(frozen=True)
class Config:
    """Defaults: W8A8 of the abstract; the rest is reconstructed."""

    w_bits: int = 8  # abstract
    a_bits: int = 8  # abstract
    alpha: float = (
        1.0  # [R] s = max|X|^alpha / max|W|^(1 - alpha); 1: activations within [-1, 1]; 0.5: SmoothQuant's
    )
    a_granularity: str = (
        "per_token"  # [R] one scale a token, when the model runs; per_tensor_static: one, beforehand
    )
    symmetric: bool = True  # [R] weights: codes around zero, one scale per row
    damp_ratio: float = 0.01  # [R] GPTQ's
    block_size: int = 128  # [R] GPTQ's

    def __post_init__(self) -> None:
        check_choices(self, a_granularity=("per_token", "per_tensor_static"))
        if not 0 <= self.alpha <= 1:
            raise QuantizationError(f"alpha is {self.alpha}; choose a value from 0 to 1")


# --- the transformation -----------------------------------------------------------------------------------------------


def factors(site: Site, peak: Tensor, alpha: float) -> Tensor:
    """The diagonal of T for one tensor X: positive [channels written]; SmoothQuant's Eq. 4, at alpha 1 by default [R].

    Args:
        peak: [d_in] max |X_j| over calibration tokens, as the readers index it.
    """
    return site.written(smoothing_factors(peak, [linear.weight for linear in site.linears], alpha))


@torch.no_grad()
def transform(model: nn.Module, calib: Tensor, alpha: float) -> nn.Module:
    """A copy of the model that computes the same with X T^-1 and T W for X and W at all linears (abstract).

    T^-1 goes into the norm, the value rows or the up rows that write X; behind GELU it divides when the model runs [R].
    """
    require_pre_norm(model)
    check_calib(calib)
    model = copy_model(model)
    peaks = channel_peaks(model, calib)
    for parts in map(anatomy, visit_blocks(model)):
        for site in sites(parts, model.config):
            site.fold(factors(site, peaks[site.linears[0]], alpha))
    return model


# --- rounding ---------------------------------------------------------------------------------------------------------


def _round(W: Tensor, H: Tensor, cfg: Config) -> gptq.Rounded:
    """One input feature at a time, the following ones adjusted (abstract); by GPTQ's update, its Algorithm 1 [R]."""
    host = gptq.Config(
        cfg.w_bits, symmetric=cfg.symmetric, damp_ratio=cfg.damp_ratio, block_size=cfg.block_size
    )
    return gptq.round_columns(W, H, host, _quant.absmax_qparams if cfg.symmetric else _quant.choose_qparams)


def quantize_weight(W: Tensor, H: Tensor, cfg: Config) -> Tensor:
    """Round W [d_out, d_in] (already transformed) for H of the transformed inputs. Dequantized, same shape.

    Raises: QuantizationError if H + damping is not positive definite.
    """
    return _round(W, H, cfg).dequantize()


def pack_weight(W: Tensor, H: Tensor, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer: packed codes and a float16 scale per row; T lives in what writes X."""
    rounded = _round(W, H, cfg)
    scale, zero_point = rounded.scale.T[..., None], rounded.zero_point.T[..., None]  # [d_out, 1, 1]
    return _quant.pack_affine(rounded.codes.T[:, None], scale, zero_point, cfg.w_bits, cfg.symmetric)


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    return _quant.unpack_affine(packed, cfg.w_bits, cfg.symmetric)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + 16/d_in: codes and a float16 scale per row; a static activation scale a layer is not counted."""
    return _quant.affine_bits(cfg.w_bits, None, d_in, cfg.symmetric)


def rounding(cfg: Config, peak: Tensor) -> Callable[[Tensor], Tensor]:
    """How inputs are rounded: per token, or with one scale from the largest calibration value, peak (a scalar)."""
    if cfg.a_granularity == "per_token":
        return partial(_quant.absmax_fake_quant, bits=cfg.a_bits)
    scale = peak.clamp(min=1e-5) / (2 ** (cfg.a_bits - 1) - 1)
    return partial(_quant.absmax_fake_quant, bits=cfg.a_bits, scale=scale)


@torch.no_grad()
def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Transform, round weights block by block on the outputs of rounded blocks [R], then round all inputs."""
    check_calib(calib)
    model = transform(model, calib, cfg.alpha)
    peaks = [
        {name: peaks[linear].max() for name, linear in named_linears(block).items()}
        for peaks in [channel_peaks(model, calib)]
        for block in decoder_blocks(model)
    ]
    model = quantize_blockwise(model, calib, lambda W, H: quantize_weight(W, H, cfg))
    for block, largest in zip(decoder_blocks(model), peaks, strict=True):
        for name, linear in named_linears(block).items():
            replace_module(block, name, QuantInput(linear, rounding(cfg, largest[name])))
    return model


# --- invariants and findings named in papers/atq.yaml -----------------------------------------------------------------

_LAYERS = [
    f"model.layers.{i}.{name}"
    for i in (0, 2)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
]


def transformation_keeps_the_function(ctx) -> float:
    """Largest change of a logit by the transformation alone, as a share of the largest logit."""
    model, tokens = ctx.reference("reference-outlier"), ctx.calib(8)
    return change_of_logits(model, transform(model, tokens, 1.0), tokens[:2])


def activations_reach_one(ctx) -> float:
    """At alpha 1, largest distance of max|X_j| from 1 over all channels of all linears, on the calibration tokens."""
    tokens = ctx.calib(8)
    peaks = channel_peaks(transform(ctx.reference("reference-outlier"), tokens, 1.0), tokens)
    return max(float((peak - 1).abs().max()) for peak in peaks.values())


def _transformed(ctx, name: str) -> tuple[Tensor, Tensor]:
    """W and X of one layer of reference-outlier with all channels of X scaled into [-1, 1]."""
    W, _, X = ctx.layer(name, "reference-outlier", 2048)
    s = smoothing_factors(X.abs().amax(0), [W], 1.0)
    return W * s, X / s


def error_split(ctx) -> list[dict]:
    """Largest ratio, over three layers and 4 and 8 bits, of the joint output error to the sum of its parts; float64.

    |X W - Q(X) Q(W)| against |X W - X Q(W)| + |X Q(W) - Q(X) Q(W)|, Frobenius norms; the sum is 1.
    """
    worst = 0.0
    for name in _LAYERS[:3]:
        W, X = _transformed(ctx, name)
        H = X.T @ X / len(X)
        for bits in (4, 8):
            cfg = Config(w_bits=bits, a_bits=bits)
            W_, X_, Q, R = (t.double() for t in (W, X, quantize_weight(W, H, cfg), rounding(cfg, X.max())(X)))
            joint, weights, activations = X_ @ W_.T - R @ Q.T, X_ @ (W_ - Q).T, (X_ - R) @ Q.T
            worst = max(worst, float(joint.norm() / (weights.norm() + activations.norm())))
    return [{"name": "joint", "value": worst}, {"name": "sum", "value": 1.0}]


def compensation(ctx) -> list[dict]:
    """Output error of transformed weights at 8 bits, compensated and not, as shares of the latter; the worst layer."""
    worst, cfg = 0.0, Config()
    for name in _LAYERS:
        W, X = _transformed(ctx, name)
        H = X.T @ X / len(X)
        plain = quantize_weight(W, torch.eye(len(H)), cfg)
        worst = max(worst, proxy_loss(W, quantize_weight(W, H, cfg), H) / proxy_loss(W, plain, H))
    return [{"name": "compensated", "value": worst}, {"name": "plain", "value": 1.0}]


def perplexity_rise(ctx) -> float:
    """Rise of the perplexity at W8A8, the larger one of reference and reference-outlier."""
    rises = []
    for model in ("reference", "reference-outlier"):
        plain = ctx.run("none", {}, model=model).nll
        rises.append(torch.tensor([ctx.run("atq", {}, model=model, calib=(16, 256)).nll, plain]).exp())
    return max(float(after - before) for after, before in rises)
