"""Symmetric codes of groups by what Integer Scale (arXiv:2405.14597v2) builds on: RTN, GPTQ, AWQ or OmniQuant.

`cfg` is integer_scale.Config, or whatever else has w_bits, group_size, rounding (one of BASES) and epochs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from requant.reference_impls import _quant, awq, gptq, omniquant
from requant.reference_impls._clipping import ClippedWeight, learn_ranges
from requant.reference_impls._quant import QuantizationError
from requant.reference_impls._straight_through import ClippingStrengths
from requant.reference_impls._walk import Block, named_linears

BASES = ("rtn", "gptq", "awq", "omniquant")
_LWC_LR = 1e-2  # OmniQuant's scripts


def base_codes(
    W: Tensor, H: Tensor | None, cfg, clipping: ClippingStrengths | None = None
) -> tuple[Tensor, Tensor]:
    """Signed codes int8 [d_out, n_groups, group] and float scales [d_out, n_groups, 1] of the base quantizer.

    Args:
        clipping: OmniQuant's learned strengths of the groups; None: learned on the output error of this layer.
    Raises: QuantizationError where the base needs H and has none.
    """
    if cfg.rounding != "rtn" and H is None and clipping is None:
        raise QuantizationError(
            f"rounding {cfg.rounding!r} needs H, the second moments of the inputs, from calib"
        )
    if cfg.rounding == "gptq":
        how = gptq.Config(cfg.w_bits, cfg.group_size, symmetric=True)
        rounded = gptq.round_columns(W, H, how, _quant.absmax_qparams)
        codes = _quant.grouped(rounded.codes.T, cfg.group_size)
        scale, zero_point = rounded.scale.T[..., None], rounded.zero_point.T[..., None]
        return (codes - zero_point).to(torch.int8), scale
    if cfg.rounding == "awq":
        W = awq.clip_weight(W, H, awq.Config(cfg.w_bits, cfg.group_size))
    groups = _quant.grouped(W, cfg.group_size)
    scale, zero_point = _quant.absmax_qparams(groups, cfg.w_bits)
    if cfg.rounding == "omniquant":
        how = omniquant.Config(cfg.w_bits, group_size=cfg.group_size, symmetric=True, lwc_lr=_LWC_LR)
        clipping = omniquant.learn_clipping(W, H, how) if clipping is None else clipping
        scale, zero_point = clipping.stored_grid(groups, cfg.w_bits, symmetric=True)
    codes = _quant.quantize(groups, scale, zero_point, cfg.w_bits)
    return (codes - zero_point).to(torch.int8), scale


def clipped_codes(block: Block, settings: Mapping[str, object]) -> dict[str, tuple[Tensor, Tensor]]:
    """`base_codes` of a block's linears with OmniQuant's clipping learned together, with the settings of its scripts.

    Args:
        block: from a walk that propagates "both".
        settings: of each linear, by name; epochs and group_size are the same in all.
    """
    weights = {name: linear.weight.float().clone() for name, linear in named_linears(block.module).items()}
    clips = {
        name: ClippedWeight(W, settings[name].w_bits, settings[name].group_size, symmetric=True)
        for name, W in weights.items()
    }
    epochs = next(iter(settings.values())).epochs
    learn_ranges(block, clips, lr=_LWC_LR, epochs=epochs, batch_size=1)
    return {name: base_codes(W, None, settings[name], clips[name].strengths) for name, W in weights.items()}
