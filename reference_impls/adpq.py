"""AdpQ: an adaptive-LASSO threshold sets large weights apart, and both parts of each group get a low-bit grid.

Paper     Ghaffari et al., arXiv 2024, arXiv:2405.13358v1   Entry  papers/adpq.yaml
Scope     weights of nn.Linear in decoder blocks; activations, embeddings and lm_head untouched
Deviates  only abstract, pipeline figure and the code of others (Tfloow/auto_adpq @99fbb29) could be read: equal widths
          are the figure's, while symmetric grids, groups and the share of outliers are those of that code; the penalty
          is a quantile of W^2 instead of a root search for it, which ends at the same set up to its tolerance; scales
          are rounded before any code is chosen; an asymmetric grid, an option of that code, is left out
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant
from requant.reference_impls._quant import QuantizationError, grouped, pack_bits, unpack_bits
from requant.reference_impls._walk import decoder_blocks, named_linears
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


def _two_grids(W: Tensor, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Signed codes [d_out, n_groups, g], outliers (bool, same shape) and scales [d_out, n_groups, 2], core first."""
    groups = grouped(W, cfg.group_size)
    mask = outliers(W, cfg.outlier_fraction).view_as(groups)
    parts = torch.stack([groups * ~mask, groups * mask], -2)  # [d_out, n_groups, 2, g]
    scale = _quant.stored_scale(_quant.absmax_scale(parts, cfg.w_bits), cfg.w_bits).squeeze(-1)
    limit = _limit(cfg.w_bits)
    return (groups / _scale_of(scale, mask)).round().clamp(-limit, limit), mask, scale


def _scale_of(scale: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, scale[..., 1:], scale[..., :1])  # [d_out, n_groups, g]


def quantize_weight(W: Tensor, H: Tensor | None, cfg: Config) -> Tensor:
    """Round outliers and core of W [d_out, d_in], each on its own grid, and merge them; H is ignored.

    Returns: float32 [d_out, d_in], dequantized.
    Raises: QuantizationError if group_size does not divide d_in.
    """
    codes, mask, scale = _two_grids(W, cfg)
    return (codes * _scale_of(scale, mask)).flatten(1)


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Quantize every decoder linear, none depending on another; calib is not used and may be None."""
    return quantize_linears(model, lambda W, H: quantize_weight(W, H, cfg))


def pack_weight(W: Tensor, H: Tensor | None, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer: codes, two float16 scales a group, and where the outliers of a group are."""
    codes, mask, scale = _two_grids(W, cfg)
    size = mask.shape[-1]
    return {
        "shape": torch.tensor(codes.shape, dtype=torch.int32),
        "codes": pack_bits(codes + _limit(cfg.w_bits), cfg.w_bits),
        "scale": scale.half() if cfg.w_bits <= 8 else scale,
        "outlier_counts": pack_bits(mask.sum(-1), size.bit_length()),  # [d_out, n_groups], 0..g
        "outlier_positions": pack_bits(mask.nonzero()[:, -1], (size - 1).bit_length()),
    }


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    d_out, n_groups, size = packed["shape"].tolist()
    codes = unpack_bits(packed["codes"], cfg.w_bits, (d_out, n_groups, size)) - _limit(cfg.w_bits)
    counts = unpack_bits(packed["outlier_counts"], size.bit_length(), (d_out * n_groups,))
    total = int(counts.sum())
    positions = unpack_bits(packed["outlier_positions"], (size - 1).bit_length(), (total,))
    mask = torch.zeros(d_out * n_groups, size, dtype=torch.bool)
    mask[torch.repeat_interleave(counts), positions] = True
    return (codes * _scale_of(packed["scale"].float(), mask.view_as(codes))).flatten(1)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + (32 + bits of a count)/g + share * bits of a position; an upper bound if weights tie at the threshold."""
    size, numel = cfg.group_size or d_in, d_out * d_in
    scales = 32 if cfg.w_bits <= 8 else 64
    share = _n_outliers(numel, cfg.outlier_fraction) / numel
    return cfg.w_bits + (scales + size.bit_length()) / size + share * (size - 1).bit_length()


# --- invariants and findings named in papers/adpq.yaml


def _weights(ctx) -> list[Tensor]:
    """The weights of all linears in the third block of the reference model."""
    block = decoder_blocks(ctx.reference())[2]
    return [linear.weight.detach().float() for linear in named_linears(block).values()]


def closed_form_is_the_minimum(ctx) -> float:
    """How much lower, in units of w^2, any v on a fine grid from -w to 2w brings the penalized error of a weight."""
    W = _weights(ctx)[0].double().flatten()[:2048]
    penalty = W.square().quantile(0.92)

    def objective(v: Tensor) -> Tensor:
        return (W - v).square() / 2 + penalty * v.abs() / W.abs()

    grid = torch.linspace(-1, 2, 3001, dtype=torch.double)[:, None] * W  # [n, 2048], 0 and w among the points
    return float(((objective(shrink(W, penalty)) - objective(grid).amin(0)) / W.square()).max())


def search_ends_at_the_quantile(ctx) -> float:
    """Largest share of a matrix on which `outliers` differs from the support of `shrink` after a bisection for alpha.

    The bisection ends when the share is within 0.001 alpha, as in the code by others, or after 100 steps: the weights
    of the reference model are multiples of a 16-bit format's step, so the share can jump over alpha. Weights tied with
    the quantile are left out.
    """
    alpha, worst = Config().outlier_fraction, 0.0
    for W in _weights(ctx):
        W, ours = W.double(), outliers(W, alpha)
        tied = W.abs() == W.abs()[~ours].max()
        low, high = 0.0, float(W.square().max())
        for _ in range(100):
            penalty = (low + high) / 2
            support = shrink(W, penalty) != 0
            share = float(support.double().mean())
            if abs(share - alpha) <= 1e-3 * alpha:
                break
            low, high = (penalty, high) if share > alpha else (low, penalty)
        worst = max(worst, float(((support != ours) & ~tied).double().mean()))
    return worst


def core_grid_is_never_coarser(ctx) -> float:
    """Largest ratio of a core's scale to that of its whole group on the same kind of grid."""
    cfg, worst = Config(w_bits=3), 0.0
    for W in _weights(ctx):
        whole = _quant.stored_scale(_quant.absmax_scale(grouped(W, cfg.group_size), cfg.w_bits), cfg.w_bits)
        worst = max(worst, float((_two_grids(W, cfg)[2][..., :1] / whole).max()))
    return worst


def half_a_step_of_its_own_grid(ctx) -> float:
    """Largest error of a weight in units of half a step of the grid of its part; 1 but for the rounding of scales."""
    cfg, worst = Config(w_bits=3), 0.0
    for W in _weights(ctx):
        codes, mask, scale = _two_grids(W, cfg)
        step = _scale_of(scale, mask)
        worst = max(worst, float(((grouped(W, cfg.group_size) - codes * step).abs() / (step / 2)).max()))
    return worst


def error_against_share(ctx) -> list[dict]:
    """Squared weight error at 3 bits with growing shares of outliers, in units of that without any."""
    weights, errors = _weights(ctx), {}
    for percent in (0, 1, 2, 4, 8):
        cfg = Config(w_bits=3, outlier_fraction=percent / 100)
        errors[percent] = math.fsum(
            float((W - quantize_weight(W, None, cfg)).square().sum()) for W in weights
        )
    return [{"name": f"share_{percent}", "value": error / errors[0]} for percent, error in errors.items()]


def divergence_of_distributions(ctx) -> list[dict]:
    """KL divergence (nats) of the distribution of rounded weights from that of the original ones, at 3 bits.

    Histograms of 64 equal bins over the range of each matrix, or of 16, about as wide as a step of the grids; one count
    added to each bin; mean over matrices.
    """
    weights = _weights(ctx)
    settings = {"adpq": Config(w_bits=3), "no_outliers": Config(w_bits=3, outlier_fraction=0.0)}

    def histogram(W: Tensor, n_bins: int, peak: float) -> Tensor:
        counts = torch.histc(W, n_bins, -peak, peak).double() + 1
        return counts / counts.sum()

    def divergence(W: Tensor, n_bins: int, cfg: Config) -> float:
        peak = float(W.abs().max()) * 1.001  # scales are rounded, so the largest weight may move up a little
        p, q = (histogram(x, n_bins, peak) for x in (W, quantize_weight(W, None, cfg)))
        return float((p * (p / q).log()).sum())

    return [
        {
            "name": f"{name}_{n_bins}_bins",
            "value": math.fsum(divergence(W, n_bins, cfg) for W in weights) / len(weights),
        }
        for name, cfg in settings.items()
        for n_bins in (16, 64)
    ]


def distance_to_gptq(ctx) -> list[dict]:
    """Distance of the loss (nats) from that of GPTQ (arXiv:2210.17323v2, Algorithm 1), with outliers apart and without.

    All at 3 bits in groups of 128. GPTQ's algorithm is the only one with a number here: AdpQ's own were not read.
    """
    gptq = ctx.run("gptq", {"w_bits": 3, "group_size": 128}, calib=(16, 256)).nll
    shares = {"adpq": 0.08, "no_outliers": 0.0}
    return [
        {
            "name": name,
            "value": abs(ctx.run("adpq", {"w_bits": 3, "outlier_fraction": share}).nll - gptq),
        }
        for name, share in shares.items()
    ]
