"""2/4/16-bit weights: 4 bits for the most sensitive groups, 16 for outliers of the 2-bit groups, quantized scales.

Paper     Li et al., ICCAD 2024, arXiv:2311.16442v4 (abstract only)   Entry  papers/two_four_sixteen_bit.yaml
Scope     weights of nn.Linear in decoder blocks; activations, embeddings, norms and lm_head untouched. The CUDA kernel
          and its asynchronous dequantization are not here
Deviates  a reconstruction: there is no public code, and only the abstracts of v1 and v4 could be read. They say: most
          groups at 2 bits, a small share with larger Hessian and range at 4, aligned in memory; large weights of the
          2-bit groups alone kept in 16 bits; scales quantized too; 2.91 bits in all. Ours are the formula of the
          sensitivity, groups of 16, 4-bit scales in blocks of 16 rows, the constant share a stretch of a row, outliers
          by magnitude after the widths are chosen, both shares (they give the 2.91 bits), and GPTQ for the codes
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from requant.reference_impls import _mixed, _quant, gptq
from requant.reference_impls._calib import check_calib
from requant.reference_impls._hessian import damped, inverse_cholesky
from requant.reference_impls._outliers import entry_bits, pack_entries, place_entries
from requant.reference_impls._quant import QuantizationError
from requant.reference_impls._weights import quantize_blockwise

TINY = {"high_fraction": 0.25, "align_groups": 4}


@dataclass(frozen=True)
class Config:
    """Widths as in the title; "ours" marks what the abstract (Abs.) leaves open."""

    low_bits: int = 2  # title
    high_bits: int = 4  # title
    high_fraction: float = 0.0625  # ours; Abs.: a small fraction of the groups
    outlier_fraction: float = (
        0.0065  # ours: what is left of 2.91 bits; Abs.: a small fraction of large weights
    )
    outlier_score: str = "magnitude"  # ours: |w|, or "salience": w^2 over the diagonal of the inverse Hessian
    group_size: int = 16  # ours: inputs per scale
    scale_bits: int = 4  # ours; 16: scales stay float16
    scale_group_size: int = 16  # ours: rows whose scales share a step and a minimum
    align_groups: int = 16  # ours: groups of a row that contain the same number of 4-bit groups
    damp_ratio: float = 0.01  # GPTQ, Sec. 3.3
    block_size: int = 128  # GPTQ, Sec. 3.3

    def __post_init__(self) -> None:
        if self.outlier_score not in ("magnitude", "salience"):
            raise QuantizationError(f"outlier_score is {self.outlier_score!r}; choose magnitude or salience")


def choose_widths(W: Tensor, H: Tensor, cfg: Config) -> Tensor:
    """Bits of each group: high_bits for the most sensitive ones of every align_groups groups of a row.

    The sensitivity is the mean of H_jj over the group times the square of its range.

    Returns: int64 [d_out, n_groups].
    """
    x = _quant.grouped(W, cfg.group_size)
    d_out, n_groups, _ = x.shape
    if n_groups % cfg.align_groups:
        raise QuantizationError(
            f"align_groups {cfg.align_groups} does not divide the {n_groups} groups of a row"
        )
    energy = H.diagonal().reshape(n_groups, -1).mean(1)
    score = energy * (x.amax(-1) - x.amin(-1)).square()
    stretches = score.reshape(d_out, -1, cfg.align_groups)
    n_high = round(cfg.high_fraction * cfg.align_groups)
    high = torch.zeros_like(stretches, dtype=torch.bool).scatter_(
        -1, stretches.topk(n_high, -1).indices, True
    )
    return torch.where(high.reshape(d_out, n_groups), cfg.high_bits, cfg.low_bits)


def n_outliers(d_out: int, d_in: int, cfg: Config) -> int:
    """Weights of a matrix kept in 16 bits."""
    return round(cfg.outlier_fraction * d_out * d_in)


def choose_outliers(W: Tensor, allowed: Tensor, cfg: Config, H: Tensor | None = None) -> Tensor:
    """The weights with the largest scores in groups where allowed [d_out, n_groups] holds: mask [d_out, d_in]."""
    score = W.abs()
    if cfg.outlier_score == "salience":
        if H is None:
            raise QuantizationError('outlier_score "salience" needs H, the second moments of the inputs')
        U = inverse_cholesky(damped(H, cfg.damp_ratio))  # H^-1 = U^T U
        score = W.square() / U.square().sum(0)
    score = score.masked_fill(~allowed.repeat_interleave(cfg.group_size, 1), -1.0).flatten()
    chosen = score.argsort(descending=True, stable=True)[: n_outliers(*W.shape, cfg)]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(0, chosen, True).reshape(W.shape)


class _Grids:
    """Chooses grids for GPTQ, group by group, and remembers how their scales are stored."""

    def __init__(self, cfg: Config):
        self.cfg, self.codes, self.step, self.low = cfg, [], [], []

    def choose(self, x: Tensor, bits: Tensor, _symmetric: bool) -> tuple[Tensor, Tensor]:
        """Min-max grids of a group x [d_out, n] with bits [d_out, 1], their scales rounded as they are stored."""
        low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
        scale = torch.where(high == low, 2.0, high - low) / (2.0**bits - 1)
        scale = _quant.stored_scale(scale, 8) if self.cfg.scale_bits == 16 else self._rounded(scale)
        return scale, (-low / scale).round().clamp(min=0).minimum(2.0**bits - 1)

    def _rounded(self, scale: Tensor) -> Tensor:
        blocks, top = scale.reshape(-1, self.cfg.scale_group_size), 2**self.cfg.scale_bits - 1
        low = _quant.stored_scale(blocks.amin(1, keepdim=True), 8)
        step = _quant.stored_scale((blocks.amax(1, keepdim=True) - low).clamp(min=0) / top, 8)
        codes = ((blocks - low) / step).round().clamp(0, top)
        for kept, new in ((self.codes, codes), (self.step, step), (self.low, low)):
            kept.append(new)
        return (low + codes * step).reshape(scale.shape)

    def stored(self, scale: Tensor) -> dict[str, Tensor]:
        """scale [n_groups, d_out] as it is stored: codes, step and minimum of each block, or float16."""
        if self.cfg.scale_bits == 16:
            return {"scale": scale.half()}
        codes = _quant.pack_bits(torch.stack(self.codes), self.cfg.scale_bits)
        return {
            "scale": codes,
            "scale_step": torch.stack(self.step).half(),
            "scale_low": torch.stack(self.low).half(),
        }


def pack_weight(
    W: Tensor, H: Tensor, cfg: Config, widths: Tensor | None = None, outliers: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors stored for one layer.

    Args:
        W: [d_out, d_in] float32; H: [d_in, d_in], second moments of its inputs; both left unchanged.
        widths: bits of each group [d_out, n_groups], None: `choose_widths`.
        outliers: mask [d_out, d_in] of weights kept in float16, None: `choose_outliers` in the 2-bit groups.
    """
    if W.shape[0] % cfg.scale_group_size:
        raise QuantizationError(
            f"scale_group_size {cfg.scale_group_size} does not divide the {W.shape[0]} rows"
        )
    widths = choose_widths(W, H, cfg) if widths is None else widths
    outliers = choose_outliers(W, widths == cfg.low_bits, cfg, H) if outliers is None else outliers
    how = gptq.Config(cfg.low_bits, cfg.group_size, damp_ratio=cfg.damp_ratio, block_size=cfg.block_size)
    grids, choices = _Grids(cfg), (cfg.low_bits, cfg.high_bits)
    rounded = gptq.round_columns(
        W, H, how, grids.choose, quantize=_mixed.quantize, widths=widths.T.contiguous(), kept=outliers
    )
    codes, widths = _quant.grouped(rounded.codes.T, cfg.group_size), widths[..., None]
    return {
        "shape": torch.tensor(codes.shape, dtype=torch.int32),
        "widths": _mixed.pack_widths(widths, choices),
        **_mixed.pack_codes(codes, widths, choices),
        **_mixed.pack_codes(rounded.zero_point.T[..., None], widths, choices, "zero_point"),
        **grids.stored(rounded.scale),
        **pack_entries(rounded.dequantize(), outliers),
    }


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    d_out, n_groups, size = packed["shape"].tolist()
    choices = (cfg.low_bits, cfg.high_bits)
    widths = _mixed.unpack_widths(packed["widths"], choices, (d_out, n_groups, 1))
    codes = _mixed.unpack_codes(packed, widths, choices, (d_out, n_groups, size)).float()
    zero_point = _mixed.unpack_codes(packed, widths, choices, (d_out, n_groups, 1), "zero_point").float()
    scale = packed["scale"]
    if cfg.scale_bits != 16:
        shape = (n_groups, d_out // cfg.scale_group_size, cfg.scale_group_size)
        scale = _quant.unpack_bits(scale, cfg.scale_bits, shape) * packed["scale_step"].float()
        scale = (scale + packed["scale_low"].float()).reshape(n_groups, d_out)
    scale = scale.float().T[..., None]
    return place_entries(_quant.dequantize(codes, scale, zero_point).flatten(1), packed)


def quantize_weight(
    W: Tensor, H: Tensor, cfg: Config, widths: Tensor | None = None, outliers: Tensor | None = None
) -> Tensor:
    """The dequantized weight, float32 [d_out, d_in]; arguments as for `pack_weight`."""
    return unpack_weight(pack_weight(W, H, cfg, widths, outliers), cfg)


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Quantize block by block, each on the outputs of the quantized blocks before it, as GPTQ does."""
    check_calib(calib)
    return quantize_blockwise(model, calib, lambda W, H, _name: quantize_weight(W, H, cfg), stacked=False)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """Codes, zero points as wide, scales and their blocks, one bit a group for its width, 32 bits an outlier."""
    share = round(cfg.high_fraction * cfg.align_groups) / cfg.align_groups
    mean = cfg.low_bits + share * (cfg.high_bits - cfg.low_bits)
    scale = 16 if cfg.scale_bits == 16 else cfg.scale_bits + 32 / cfg.scale_group_size
    return mean + (mean + scale + 1) / cfg.group_size + entry_bits(n_outliers(d_out, d_in, cfg), d_out, d_in)
