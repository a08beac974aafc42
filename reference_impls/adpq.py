"""AdpQ: an adaptive-LASSO threshold sets large weights apart, and both parts of each group get a low-bit grid.

Paper     Ghaffari et al., arXiv 2024, arXiv:2405.13358v1   Entry  papers/adpq.yaml
Scope     weights of nn.Linear in decoder blocks; activations, embeddings and lm_head untouched
Deviates  only abstract, pipeline figure and the code of others (Tfloow/auto_adpq @99fbb29) could be read: equal widths
          are the figure's, while symmetric grids, groups and the share of outliers are those of that code; the penalty
          is a quantile of W^2 instead of a root search for it, which ends at the same set up to its tolerance; scales
          are rounded before any code is chosen; asymmetric grids have a zero point for each part (that code: one for
          both)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant
from requant.reference_impls._quant import QuantizationError, grouped, pack_bits, unpack_bits
from requant.reference_impls._weights import quantize_linears

DATA_FREE = True  # the outcome depends on neither calibration tokens nor a seed


@dataclass(frozen=True)
class Config:
    """Defaults: AutoAdpQConfig of the code by others; the paper's abstract names 3 bits as its low end."""

    w_bits: int = 4  # code, q_bit; pipeline figure: 3, and the same for both parts
    group_size: int | None = 128  # code, group_size: inputs of a row that share two scales; None = whole row
    outlier_fraction: float = (
        0.08  # code, alpha: share of a matrix set apart (0.06 in another place of that code)
    )

    symmetric: bool = True  # code by others; False: min-max grids, as the baseline of GPTQ (its Sec. 4)

    def __post_init__(self) -> None:
        if self.w_bits < 2:
            raise QuantizationError(f"w_bits is {self.w_bits}; a symmetric grid needs 2 or more")
        if not 0 <= self.outlier_fraction < 1:
            raise QuantizationError(f"outlier_fraction is {self.outlier_fraction}; choose a share in [0, 1)")


def shrink(W: Tensor, penalty: Tensor | float) -> Tensor:
    """The adaptive-LASSO estimate for an identity design: sign(w) max(0, |w| - penalty / |w|), same shape as W.

    Minimises (w - v)^2 / 2 + penalty |v| / |w| for every weight by itself; nonzero exactly where w^2 > penalty.
    """
    size = W.abs()
    return W.sign() * (size - penalty / size).clamp(min=0).nan_to_num(0.0)


def outliers(W: Tensor, outlier_fraction: float) -> Tensor:
    """Which weights survive `shrink` when the penalty leaves this share of the matrix: bool, same shape as W.

    The support of the estimate is |w| > sqrt(penalty), so the penalty wanted is the square of a quantile of |W|. Of
    weights tied at it none survives.
    """
    threshold = W.abs().flatten().topk(_n_outliers(W.numel(), outlier_fraction) + 1).values[-1]
    return W.abs() > threshold


def _n_outliers(numel: int, outlier_fraction: float) -> int:
    return round(outlier_fraction * numel)


def _limit(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def two_grids(W: Tensor, cfg: Config) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes less their zero points [d_out, n_groups, g], outliers (bool, same shape), and scales and zero points.

    The last two are [d_out, n_groups, 2], core first. Symmetric codes lie within +-(2^(b-1) - 1).
    """
    groups = grouped(W, cfg.group_size)
    mask = outliers(W, cfg.outlier_fraction).view_as(groups)
    parts = torch.stack([groups * ~mask, groups * mask], -2)  # [d_out, n_groups, 2, g]
    if cfg.symmetric:
        scale = _quant.stored_scale(_quant.absmax_scale(parts, cfg.w_bits), cfg.w_bits)
        zero, top = torch.full_like(scale, _limit(cfg.w_bits)), 2 * _limit(cfg.w_bits)
    else:
        (scale, zero), top = _quant.choose_qparams(parts, cfg.w_bits), 2**cfg.w_bits - 1
    scale, zero = scale.squeeze(-1), zero.squeeze(-1)
    z = scale_of(zero, mask)
    return ((groups / scale_of(scale, mask)).round() + z).clamp(0, top) - z, mask, scale, zero


def scale_of(scale: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, scale[..., 1:], scale[..., :1])  # [d_out, n_groups, g]


def quantize_weight(W: Tensor, H: Tensor | None, cfg: Config) -> Tensor:
    """Round outliers and core of W [d_out, d_in], each on its own grid, and merge them; H is ignored.

    Returns: float32 [d_out, d_in], dequantized.
    Raises: QuantizationError if group_size does not divide d_in.
    """
    codes, mask, scale, _ = two_grids(W, cfg)
    return (codes * scale_of(scale, mask)).flatten(1)


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Quantize every decoder linear, none depending on another; calib is not used and may be None."""
    return quantize_linears(model, lambda W, H: quantize_weight(W, H, cfg))


def pack_weight(W: Tensor, H: Tensor | None, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer: codes, two float16 scales a group, and where the outliers of a group are."""
    codes, mask, scale, zero = two_grids(W, cfg)
    size = mask.shape[-1]
    packed = {} if cfg.symmetric else {"zero_point": pack_bits(zero, cfg.w_bits)}
    return packed | {
        "shape": torch.tensor(codes.shape, dtype=torch.int32),
        "codes": pack_bits(codes + scale_of(zero, mask), cfg.w_bits),
        "scale": scale.half() if cfg.w_bits <= 8 else scale,
        "outlier_counts": pack_bits(mask.sum(-1), size.bit_length()),  # [d_out, n_groups], 0..g
        "outlier_positions": pack_bits(mask.nonzero()[:, -1], (size - 1).bit_length()),
    }


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    d_out, n_groups, size = packed["shape"].tolist()
    codes, zero = unpack_bits(packed["codes"], cfg.w_bits, (d_out, n_groups, size)), _limit(cfg.w_bits)
    counts = unpack_bits(packed["outlier_counts"], size.bit_length(), (d_out * n_groups,))
    total = int(counts.sum())
    positions = unpack_bits(packed["outlier_positions"], (size - 1).bit_length(), (total,))
    mask = torch.zeros(d_out * n_groups, size, dtype=torch.bool)
    mask[torch.repeat_interleave(counts), positions] = True
    mask = mask.view_as(codes)
    if not cfg.symmetric:
        zero = scale_of(unpack_bits(packed["zero_point"], cfg.w_bits, (d_out, n_groups, 2)), mask)
    return ((codes - zero) * scale_of(packed["scale"].float(), mask)).flatten(1)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + (32 + bits of a count, and 2 b if asymmetric)/g + share * bits of a position.

    An upper bound if weights tie at the threshold.
    """
    size, numel = cfg.group_size or d_in, d_out * d_in
    scales = (32 if cfg.w_bits <= 8 else 64) + (0 if cfg.symmetric else 2 * cfg.w_bits)
    share = _n_outliers(numel, cfg.outlier_fraction) / numel
    return cfg.w_bits + (scales + size.bit_length()) / size + share * (size - 1).bit_length()
