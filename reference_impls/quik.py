"""QUIK: 4-bit weights times 4-bit activations, save a fixed few input features that keep 16 bits with their weights.

Paper     Ashkboos et al., EMNLP 2024, arXiv:2310.09259v2 (numbers below refer to v2)   Entry  papers/quik.yaml
Scope     weights and inputs of nn.Linear in decoder blocks; embeddings, lm_head, norms, attention products and the KV
          cache untouched
Deviates  outlier features and Hessians come from one calibration set (the paper finds the former on 512 sentences of
          the Pile); outlier columns are rounded to float16 as they are stored, and that error is compensated too;
          weight scales are rounded to float16; activations and products are float32. At layer level, where no
          activations are at hand, features are ranked by their second moments in place of their maxima
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant, gptq, smoothquant
from requant.reference_impls._activation import transform_inputs
from requant.reference_impls._anatomy import anatomy
from requant.reference_impls._calib import check_calib
from requant.reference_impls._clip_search import grid_of_share, search_grid
from requant.reference_impls._outliers import (
    column_bits,
    join_columns,
    other_columns,
    pack_columns,
    top_columns,
)
from requant.reference_impls._quant import QuantizationError
from requant.reference_impls._walk import copy_model, walk_blocks


@dataclass(frozen=True)
class Config:
    """Defaults: the LLaMA-2 rows of Tables 2 and 4."""

    w_bits: int = 4  # Table 4
    a_bits: int | None = 4  # Table 4; None = not quantized
    down_proj_bits: int | None = 8  # Table 4, weights and inputs; None = as the rest (OPT, Table 1)
    n_outliers: int = 256  # Tables 7 and 10, features kept in 16 bits
    symmetric: bool = True  # weights; False is the code's --w_asym. Activations are asymmetric
    relative_outliers: bool = True  # code --fp_relative: down projections get d_in / hidden times as many
    whole_ratio: bool = False  # code: d_in / hidden cut down to an integer, 512 outliers on 7B, not 688
    outlier_threshold: float = 0.0  # Table 13: none where max|X| is at most this (code: twice, at 8 bits)
    sparse: bool = (
        False  # the 2:4 variant, SparseGPT in the place of GPTQ: two of four base columns a row are 0
    )
    clip_search: bool = True  # Table 11; code --w_clip: 80 shares of the range, |error|^2.4
    damp_ratio: float = 0.01  # code, --percdamp
    block_size: int = 128  # code, blocksize of GPTQ


TINY = {"n_outliers": 4}


_ZEROS, _OF = 2, 4  # the pattern that sparse tensor cores take

# --- one layer --------------------------------------------------------------------------------------------------------


def round_weight(
    W: Tensor, H: Tensor, cfg: Config, peak: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """GPTQ with the outlier columns last: not rounded, but carrying the error of the others (code).

    Args:
        W: [d_out, d_in] float32; H: [d_in, d_in], second moments of the inputs; both left unchanged.
        peak: [d_in] max|X_j| over calibration tokens, the rank of each feature; None: the diagonal of H.
    Returns: codes [d_out, d_in - k] of the base columns in ascending order, their scale and zero point [d_out, 1], and
        W [d_out, d_in] with every base column dequantized and every outlier column compensated.
    Raises: QuantizationError if the layer has fewer inputs than outliers are asked for.
    """
    peak = H.diagonal() if peak is None else peak
    outliers = top_columns(peak, cfg.n_outliers)
    base = other_columns(outliers, len(peak))
    order = torch.cat([base_order(peak, cfg), outliers[peak[outliers].argsort(stable=True)]])
    kept = torch.zeros_like(W, dtype=torch.bool)
    kept[:, len(base) :] = True
    how = gptq.Config(
        cfg.w_bits, symmetric=cfg.symmetric, damp_ratio=cfg.damp_ratio, block_size=cfg.block_size
    )
    choose = search_grid if cfg.clip_search else grid_of_share  # both see the outlier columns as zeros
    if cfg.sparse and (len(base) % _OF or cfg.block_size % _OF):
        raise QuantizationError(
            f"{len(base)} base columns in batches of {cfg.block_size} do not fall into fours; change n_outliers"
        )
    pruned = (_ZEROS, _OF) if cfg.sparse else None
    rounded = gptq.round_columns(W[:, order], H[order][:, order], how, choose, kept=kept, pruned=pruned)
    back = order.argsort()
    codes = rounded.codes[back].T[:, base]
    return codes, rounded.scale.T, rounded.zero_point.T, rounded.dequantize()[:, back]


def quantize_weight(W: Tensor, H: Tensor, cfg: Config) -> Tensor:
    """`round_weight`, dequantized: float32 [d_out, d_in]."""
    return round_weight(W, H, cfg)[-1]


def base_order(peak: Tensor, cfg: Config) -> Tensor:
    """Base columns in the order of GPTQ, by rising peak [d_in] (code): of these, neighbours make a group of 2:4."""
    base = other_columns(top_columns(peak, cfg.n_outliers), len(peak))
    return base[peak[base].argsort(stable=True)]


def pack_weight(W: Tensor, H: Tensor, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer: packed codes, one float16 scale a row, float16 outlier columns and indices.

    A zero point a row comes with weights that are not symmetric.
    sparse: two codes of four with their two-bit places, in the order of GPTQ, and this order.
    """
    codes, scale, zero_point, Q = round_weight(W, H, cfg)
    outliers = pack_columns(Q, top_columns(H.diagonal(), cfg.n_outliers))
    if not cfg.sparse:
        return outliers | _quant.pack_affine(
            codes[:, None], scale[:, None], zero_point[:, None], cfg.w_bits, cfg.symmetric
        )
    order = base_order(H.diagonal(), cfg)
    place = order.argsort().argsort()  # of the codes, which are in the order of columns
    fours = codes[:, place].unflatten(1, (-1, _OF))
    kept = (fours - zero_point[..., None]).abs().argsort(dim=-1, descending=True, stable=True)
    kept = kept[..., :_ZEROS].sort(-1).values
    zero = {} if cfg.symmetric else {"zero_point": _quant.pack_bits(zero_point, cfg.w_bits)}
    return (
        outliers
        | zero
        | {
            "shape": torch.tensor(fours.shape, dtype=torch.int32),
            "codes": _quant.pack_bits(fours.gather(-1, kept), cfg.w_bits),
            "places": _quant.pack_bits(kept, 2),
            "scale": scale.half() if cfg.w_bits <= 8 else scale,
            "order": order.to(torch.int32),
        }
    )


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    if not cfg.sparse:
        return join_columns(_quant.unpack_affine(packed, cfg.w_bits, cfg.symmetric), packed)
    d_out, n_fours, _ = packed["shape"].tolist()
    some, zero = (d_out, n_fours, _ZEROS), torch.full((d_out, 1), 2 ** (cfg.w_bits - 1))
    if not cfg.symmetric:
        zero = _quant.unpack_bits(packed["zero_point"], cfg.w_bits, (d_out, 1))
    codes, places = (
        _quant.unpack_bits(packed[k], b, some) for k, b in (("codes", cfg.w_bits), ("places", 2))
    )
    fours = zero[..., None].repeat(1, n_fours, _OF).scatter(-1, places, codes)
    base = (fours.flatten(1) - zero) * packed["scale"].float()
    return join_columns(base[:, packed["order"].long().argsort()], packed)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """(b (n - k) + 16)/n + k (16 + 32/d_out)/n; a down projection has another b and k (`layer_config`).

    Not symmetric: b/n more. sparse: b/2 + 1 in the place of b, and an int32 for each of the n - k columns.
    """
    scale_bits = (16 if cfg.w_bits <= 8 else 32) + (0 if cfg.symmetric else cfg.w_bits)
    k = min(cfg.n_outliers, d_in)
    base = cfg.w_bits / 2 + 1 + 32 / d_out if cfg.sparse else cfg.w_bits
    return (base * (d_in - k) + scale_bits) / d_in + column_bits(k, d_out, d_in)


# --- the model --------------------------------------------------------------------------------------------------------


def round_inputs(x: Tensor, bits: int, base: Tensor) -> Tensor:
    """Round the base features of each token on an asymmetric grid of their own; x [..., d_in], outliers untouched."""
    if not len(base):
        return x
    return x.index_copy(-1, base, _quant.clipped_fake_quant(x.index_select(-1, base), bits))


def layer_config(cfg: Config, linear: nn.Linear, is_down: bool, peak: Tensor) -> Config:
    """What one linear gets: 8 bits and more outliers for a down projection (Table 4), none below the threshold."""
    n_outliers, threshold = cfg.n_outliers, cfg.outlier_threshold
    if is_down:
        if cfg.relative_outliers:
            times = linear.in_features / linear.out_features
            n_outliers = round(n_outliers * (int(times) if cfg.whole_ratio else times))
        if cfg.down_proj_bits is not None:
            a_bits = None if cfg.a_bits is None else cfg.down_proj_bits
            cfg, threshold = replace(cfg, w_bits=cfg.down_proj_bits, a_bits=a_bits), 2 * threshold
    return replace(cfg, n_outliers=0 if float(peak.max()) <= threshold else n_outliers)


@torch.no_grad()
def _quantize_stage(linears: Sequence[nn.Linear], H: Tensor, cfg: Config, peak: Tensor) -> None:
    """Round linears that read the same tensor, in place; their rows do not depend on each other."""
    Q = round_weight(torch.cat([linear.weight.float() for linear in linears]), H, cfg, peak)[-1]
    for linear, rows in zip(linears, Q.split([linear.out_features for linear in linears]), strict=True):
        linear.weight.copy_(rows)


@torch.no_grad()
def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Find the outlier features, round the weights block by block with unquantized activations, then wrap the inputs.

    Args:
        calib: int64 [n_samples, seqlen].
    Raises: QuantizationError without calib, or if a layer has fewer inputs than outliers are asked for.
    """
    check_calib(calib)
    if cfg.w_bits < 2 or (cfg.a_bits is not None and cfg.a_bits < 2):
        raise QuantizationError("w_bits and a_bits must be 2 or more")
    model = copy_model(model)
    peaks = smoothquant.channel_peaks(model, calib)  # of the unquantized model
    found: list[tuple[nn.Module, Sequence[nn.Linear], Config]] = []
    for block in walk_blocks(model, calib):
        parts = anatomy(block.module)
        for stage in (
            parts.qkv,
            [parts.o],
            parts.ups,
            [parts.down],
        ):  # later stages see what earlier ones became
            peak = peaks[stage[0]]
            own = layer_config(cfg, stage[0], stage[0] is parts.down, peak)
            _quantize_stage(stage, block.hessians({"first": stage[0]})["first"], own, peak)
            found.append((block.module, stage, own))
    for root, stage, own in found:
        if own.a_bits is not None:
            base = other_columns(top_columns(peaks[stage[0]], own.n_outliers), stage[0].in_features)
            transform_inputs(root, stage, partial(round_inputs, bits=own.a_bits, base=base))
    return model
