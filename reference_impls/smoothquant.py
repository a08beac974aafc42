"""SmoothQuant: activation outliers are scaled down and weight columns up, channel by channel, so that both fit 8 bits.

Paper     Xiao et al., ICML 2023, arXiv:2211.10438v7 (numbers below refer to v7)   Entry  papers/smoothquant.yaml
Scope     weights and inputs of nn.Linear in decoder blocks, outputs of q, k and v; the residual stream, norms, softmax,
          embeddings and lm_head untouched
Deviates  softmax outputs and biases stay unquantized, as in the official fake quantizer (the INT8 engine rounds both);
          weight scales are rounded to float16, the precision they are stored in; a per-tensor dynamic scale covers one
          sequence, the tensor that the official evaluation feeds (in OPT's MLP, which sees a flat batch, one batch);
          GLM-130B's token clipping follows a single sentence
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant
from requant.reference_impls._activation import QuantInput
from requant.reference_impls._anatomy import anatomy, fold_channel_scale, require_pre_norm
from requant.reference_impls._calib import Calib, batches_of, check_calib
from requant.reference_impls._equivalence import Site, sites
from requant.reference_impls._quant import QuantizationError, check_choices
from requant.reference_impls._walk import (
    UnsupportedModelError,
    copy_model,
    decoder_blocks,
    named_linears,
    replace_module,
    visit_blocks,
)

_FLOOR = 1e-5  # official code: lower clamp of the weight maxima and of s


@dataclass(frozen=True)
class Config:
    """Defaults: SmoothQuant-O3 of Table 2. O2: per_tensor activations; O1: per_token; naive W8A8: O2 without alpha."""

    w_bits: int = 8  # Sec. 5.1
    a_bits: int = 8  # Sec. 5.1
    alpha: float | None = 0.5  # Sec. 5.1, OPT and BLOOM (0.8 LLaMA); None = naive, without smoothing
    w_granularity: str = "per_tensor"  # Table 2; per_channel (rows) in Table 7
    a_granularity: str = "per_tensor_static"  # Table 2: O3; per_tensor = O2, per_token = O1, both dynamic
    quantize_bmm_input: bool = True  # Figure 6: outputs of q, k, v, the inputs of the attention products
    static_clip_ratio: float = 0.0  # share of tokens the static scales may clip; 0.02 for GLM-130B (Sec. 5.1)

    def __post_init__(self) -> None:
        check_choices(
            self,
            w_granularity=("per_tensor", "per_channel"),
            a_granularity=("per_token", "per_tensor", "per_tensor_static"),
        )
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise QuantizationError(
                f"alpha is {self.alpha}; choose a value from 0 to 1, or None for no smoothing"
            )
        if min(self.w_bits, self.a_bits) < 2:
            raise QuantizationError(
                "w_bits and a_bits must be 2 or more: one signed bit has no level but zero"
            )
        if not 0 <= self.static_clip_ratio < 1:
            raise QuantizationError(
                f"static_clip_ratio is {self.static_clip_ratio}; choose a share in [0, 1)"
            )


# --- calibration ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def observe_linears(model: nn.Module, calib: Calib, see: Callable[[nn.Linear, Tensor, Tensor], None]) -> None:
    """Run the decoder on calib and call see(linear, X [n_tokens, d_in], Y [n_tokens, d_out]) for each block linear."""

    def hook(linear: nn.Linear, args: tuple, output: Tensor) -> None:
        see(linear, args[0].flatten(0, -2), output.flatten(0, -2))

    linears = [linear for block in decoder_blocks(model) for linear in named_linears(block).values()]
    handles = [linear.register_forward_hook(hook) for linear in linears]
    try:
        for batch in batches_of(calib, 8):
            model.base_model(batch.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def channel_peaks(model: nn.Module, calib: Calib) -> dict[nn.Linear, Tensor]:
    """max |X_j| over all calibration tokens, for each linear of the blocks: float32 [d_in]."""
    peaks: dict[nn.Linear, Tensor] = {}

    def see(linear: nn.Linear, X: Tensor, _Y: Tensor) -> None:
        peak = X.abs().amax(0).float()
        peaks[linear] = torch.maximum(peaks[linear], peak) if linear in peaks else peak

    observe_linears(model, calib, see)
    return peaks


def static_scales(model: nn.Module, calib: Calib, cfg: Config) -> dict[nn.Linear, tuple[Tensor, Tensor]]:
    """Fixed step sizes (input, output) of each linear: the calibration maximum / (2^(b-1) - 1), float32 scalars.

    With static_clip_ratio the largest tokens are left out of the maximum, by their own largest value.
    """
    peaks: dict[nn.Linear, list[tuple[Tensor, Tensor]]] = {}

    def see(linear: nn.Linear, X: Tensor, Y: Tensor) -> None:
        peaks.setdefault(linear, []).append((X.abs().amax(-1).float(), Y.abs().amax(-1).float()))

    def scale(tokens: Sequence[Tensor]) -> Tensor:
        ranked = torch.cat(list(tokens)).sort(descending=True).values  # [n_tokens]
        peak = ranked[int(cfg.static_clip_ratio * len(ranked))]
        return peak.clamp(min=_FLOOR) / (2 ** (cfg.a_bits - 1) - 1)

    observe_linears(model, calib, see)
    return {linear: tuple(scale(side) for side in zip(*seen, strict=True)) for linear, seen in peaks.items()}


# --- smoothing --------------------------------------------------------------------------------------------------------


def smoothing_factors(act_peak: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), Eq. 4, and 1 for a channel that is never active: float32 [d_in].

    Args:
        act_peak: [d_in] max |X_j| over calibration tokens.
        weights: matrices [d_out, d_in] that read the same X; the weight maximum runs over the rows of all of them.
        alpha: migration strength, 0 (all on the activations) to 1 (all on the weights).
    """
    weight_peak = torch.stack([W.float().abs().amax(0) for W in weights]).amax(0).clamp(min=_FLOOR)
    s = (act_peak**alpha / weight_peak ** (1 - alpha)).clamp(min=_FLOOR)
    return torch.where(act_peak > 0, s, 1.0)


@torch.no_grad()
def smooth(model: nn.Module, calib: Calib, alpha: float) -> nn.Module:
    """A copy of the model that computes the same function with smoothed norm outputs (Eq. 3).

    Inputs of o and down follow no norm and keep their outliers. All maxima come from the model as it was.
    Raises: UnsupportedModelError where a norm's output is not used by linears alone.
    """
    require_pre_norm(model)
    check_calib(calib, several_lengths=True)
    model = copy_model(model)
    peaks = channel_peaks(model, calib)
    for parts in map(anatomy, visit_blocks(model)):
        for norm, linears in parts.norm_groups:
            if getattr(norm, "weight", None) is None:
                raise UnsupportedModelError(f"{type(norm).__name__} has no gain to absorb the factors")
            s = smoothing_factors(peaks[linears[0]], [linear.weight for linear in linears], alpha)
            fold_channel_scale(norm, linears, s)
    return model


def _site_factors(site: Site, linears: list[nn.Linear], peak: Tensor, alpha: float) -> Tensor:
    """`smoothing_factors` of each channel written [channels], over all heads that read it (grouped queries)."""
    weights = [linear.weight for linear in linears]
    if site.repeat > 1:
        split = (-1, site.repeat, site.head_dim)
        peak = peak.view(split).amax(1).flatten()
        weights = [W.unflatten(1, split).transpose(1, 2).reshape(-1, len(peak)) for W in weights]
    return smoothing_factors(peak, weights, alpha)


@torch.no_grad()
def smooth_sites(
    model: nn.Module,
    calib: Tensor,
    alpha: float,
    wanted: Callable[[Site], bool] = lambda site: True,
    weighed: Callable[[Site], list[nn.Linear]] = lambda site: site.linears,
) -> None:
    """Fold Eq. 4's factors in at the sites of `_equivalence` that are wanted, not at norms alone (ours); in place.

    `weighed` gives the readers of a site whose weights count in its factors.
    Raises: UnsupportedModelError where a norm's output is not used by linears alone.
    """
    require_pre_norm(model)
    peaks = channel_peaks(model, calib)
    for parts in map(anatomy, visit_blocks(model)):
        places = [site for site in sites(parts, model.config) if wanted(site)]
        factors = [_site_factors(site, weighed(site), peaks[site.linears[0]], alpha) for site in places]
        for site, s in zip(places, factors, strict=True):
            site.fold(s)


# --- quantization -----------------------------------------------------------------------------------------------------


def weight_scale(W: Tensor, cfg: Config) -> Tensor:
    """absmax / (2^(b-1) - 1) in stored precision: [1, 1], or [d_out, 1] per channel."""
    scale = _quant.absmax_scale(W, cfg.w_bits, per_tensor=cfg.w_granularity == "per_tensor")
    return _quant.stored_scale(scale, cfg.w_bits)


def quantize_weight(W: Tensor, H: Tensor | None, cfg: Config) -> Tensor:
    """Round W [d_out, d_in] (already smoothed) on a signed symmetric grid; H is ignored. Dequantized, same shape."""
    return _quant.absmax_fake_quant(W, cfg.w_bits, weight_scale(W, cfg))


def activation_rounding(cfg: Config, scale: Tensor | None) -> Callable[[Tensor], Tensor]:
    if scale is not None:
        return partial(_quant.absmax_fake_quant, bits=cfg.a_bits, scale=scale)
    return partial(_quant.absmax_fake_quant, bits=cfg.a_bits, per_tensor=cfg.a_granularity == "per_tensor")


@torch.no_grad()
def quantize(model: nn.Module, calib: Calib | None, cfg: Config) -> nn.Module:
    """Smooth, then round weights once and activations on the fly.

    Args:
        calib: int64 [n_samples, seqlen], or several such tensors of different lengths, as the paper's samples have;
            None only for dynamic activations without smoothing.
    """
    model = copy_model(model) if cfg.alpha is None else smooth(model, calib, cfg.alpha)
    static: dict[nn.Linear, tuple[Tensor, Tensor]] = {}
    if cfg.a_granularity == "per_tensor_static":
        check_calib(calib, several_lengths=True)
        static = static_scales(model, calib, cfg)  # official code: of the smoothed, unquantized model
    for parts in map(anatomy, visit_blocks(model)):
        bmm_inputs = set(parts.qkv if cfg.quantize_bmm_input else ())
        for name, linear in named_linears(parts.block).items():
            linear.weight.copy_(quantize_weight(linear.weight.float(), None, cfg))
            scale_in, scale_out = static.get(linear, (None, None))
            after = activation_rounding(cfg, scale_out) if linear in bmm_inputs else None
            replace_module(parts.block, name, QuantInput(linear, activation_rounding(cfg, scale_in), after))
    return model


def pack_weight(W: Tensor, H: Tensor | None, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer: packed codes and float16 scales; smoothing lives in W and the norm's gain."""
    scale, middle = weight_scale(W, cfg), 2 ** (cfg.w_bits - 1)
    codes = (W / scale).round().clamp(1 - middle, middle - 1) + middle
    return _quant.pack_affine(codes[:, None], scale[:, None], torch.empty(0), cfg.w_bits, symmetric=True)


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    return _quant.unpack_affine(packed, cfg.w_bits, symmetric=True)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + 16/(d_out d_in), or b + 16/d_in per channel; static activation scales, two a layer, are not counted."""
    scale_bits = 16 if cfg.w_bits <= 8 else 32
    return cfg.w_bits + scale_bits / (d_in if cfg.w_granularity == "per_channel" else d_out * d_in)
