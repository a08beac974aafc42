"""BiLLM: one sign a weight, a second sign in Hessian-salient columns, one of two scales by magnitude elsewhere.

Paper     Huang et al., ICML 2024, arXiv:2402.04291v2 (numbers below refer to v2)   Entry  papers/billm.yaml
Scope     weights of nn.Linear in decoder blocks; activations, embeddings, norms and lm_head untouched
Deviates  sign(0) is +1, because one bit cannot hold a zero; scales are rounded to float16, the precision they are
          stored in; H is divided by the number of tokens (its scale cancels); a block always keeps one column that is
          not salient; the searches use closed-form errors over prefix sums instead of one candidate after the other
          (same result). Where the text and the released code differ, the text is the default and the code an option.
          With all of the code's options and unrounded scales two layers agreed with the official code @dc137eb to 1e-6
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from requant.reference_impls._calib import check_calib
from requant.reference_impls._hessian import damped, inverse_cholesky
from requant.reference_impls._quant import check_choices, pack_bits, unpack_bits
from requant.reference_impls._walk import copy_model, named_linears, walk_blocks
from requant.reference_impls.parts.billm_binary import BinaryBlock, fit_scale, signed_value, split_error

COMPENSATIONS = ("diagonal", "solve", "none")


@dataclass(frozen=True)
class Config:
    """Defaults: the paper's text. "code" marks what the released code does instead."""

    block_size: int = 128  # Sec. 4.2: columns binarized together, beta of Algorithm 1
    damp_ratio: float = 0.01  # code; the text's lambda (Algorithm 1) has no value
    salient: bool = True  # Sec. 3.1; off: the splitting-only ablation of Figure 8
    splitting: bool = True  # Sec. 3.2; off: the salient-only ablation of Figure 8
    compensation: str = "diagonal"  # Algorithm 1, lines 12 and 13; "none"; "solve": least squares
    min_salient: int = 3  # App. C: 3 to 30 columns of a block; code 1
    max_salient: int = 30  # App. C; code 49
    search_terms: int = 1  # signs a weight while columns are searched: one (Eq. 5, Algorithm 2); code 2
    search_on_saliency: bool = False  # code: both searches approximate the saliencies instead of the weights
    row_means: bool = False  # code: mean + scale * sign; Eq. 4 and 12 have no mean
    break_points: str = "quantile"  # Sec. 3.2; "max" in Algorithm 2; code "quantile_with_zeros"
    n_break_points: int = 81  # code: levels 0.10 to 0.90 in steps of 0.01


def search_columns(x: Tensor, order: Tensor, cfg: Config) -> int:
    """How many columns of x [d_out, n] to treat as salient, the first of `order` first (Eq. 5, Algorithm 2)."""
    n = x.shape[1]
    high = min(cfg.max_salient, n - 1)
    counts = torch.arange(min(cfg.min_salient, high), high + 1)
    if len(counts) == 1:
        return high
    if cfg.search_terms > 1 or cfg.row_means:
        rank = order.argsort()
        errors = [split_error(x, rank < k, cfg.search_terms, cfg.row_means) for k in counts]
        return int(counts[torch.stack(errors).argmin()])
    # with the best scale |x - a sign(x)|^2 = |x|^2 - (sum |x|)^2 / n: maximize the sum of the last terms
    sums = x[:, order].abs().cumsum(1)
    head, total = sums[:, counts - 1], sums[:, -1:]  # [d_out, n_counts], [d_out, 1]
    explained = head.square() / counts + (total - head).square() / (n - counts)
    return int(counts[explained.sum(0).argmax()])


def break_points(magnitude: Tensor, n_zeros: int, cfg: Config) -> Tensor:
    """Candidates for the break-point, [n_break_points]: quantiles of the magnitudes, or fractions of the largest one.

    Args:
        magnitude: [d_out, n], columns that are not salient; n_zeros: number of entries in salient columns.
    """
    levels = torch.linspace(0.1, 0.9, cfg.n_break_points, dtype=torch.float64)
    if cfg.break_points == "max":
        return levels.to(magnitude.dtype) * magnitude.max()
    ordered = magnitude.flatten().sort().values
    if cfg.break_points == "quantile_with_zeros":  # code: the entries of salient columns count as zeros
        ordered = torch.cat([ordered.new_zeros(n_zeros), ordered])
    position = levels * (len(ordered) - 1)
    low = position.long()
    high = (low + 1).clamp(max=len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], (position - low).to(ordered.dtype))


def search_break_point(x: Tensor, n_zeros: int, cfg: Config) -> Tensor:
    """The magnitude at which x [d_out, n] is split with the least error (Eq. 11 to 13, Algorithm 2)."""
    magnitude = x.abs()
    points = break_points(magnitude, n_zeros, cfg)
    if cfg.row_means:
        return points[torch.stack([split_error(x, magnitude <= p, 1, True) for p in points]).argmin()]
    ordered = magnitude.sort(1).values
    sums = nn.functional.pad(ordered.cumsum(1), (1, 0))  # [d_out, n + 1]
    count = torch.searchsorted(ordered, points.repeat(len(x), 1), right=True)  # [d_out, n_break_points]
    head, total = sums.gather(1, count), sums[:, -1:]
    tail = (total - head).square() / (x.shape[1] - count).clamp(min=1)
    return points[(head.square() / count.clamp(min=1) + tail).sum(0).argmax()]


def find_groups(W: Tensor, saliency: Tensor, cfg: Config) -> tuple[Tensor, Tensor]:
    """Choose the salient columns and the sparse group of one block (Algorithm 1, lines 6 and 8).

    Args:
        W, saliency: [d_out, n] float32.
    Returns: salient bool [n]; sparse bool [d_out, n], False in salient columns.
    """
    x = saliency if cfg.search_on_saliency else W
    salient = torch.zeros(W.shape[1], dtype=torch.bool)
    if cfg.salient:
        order = saliency.sum(0).argsort(descending=True)
        salient[order[: search_columns(x, order, cfg)]] = True
    sparse = torch.zeros_like(W, dtype=torch.bool)
    if cfg.splitting:
        rest = x[:, ~salient]
        sparse[:, ~salient] = rest.abs() > search_break_point(rest, int(salient.sum()) * len(W), cfg)
    return salient, sparse


def binarize_block(W: Tensor, saliency: Tensor, cfg: Config) -> BinaryBlock:
    """Binarize one block of columns (Algorithm 1, lines 6 to 11); W, saliency [d_out, n], left unchanged."""
    salient, sparse = find_groups(W, saliency, cfg)
    columns = salient.expand_as(W)
    masks = (~(columns | sparse), sparse, columns)
    fits = [[t.half().float() for t in fit_scale(W, mask, cfg.row_means)] for mask in masks]
    first = torch.zeros_like(sparse)
    for mask, (mean, _) in zip(masks, fits, strict=True):
        first |= mask & (W - mean >= 0)
    residual = W - signed_value(*fits[2], first)  # Eq. 6
    fits.append([t.half().float() for t in fit_scale(residual, columns, cfg.row_means)])
    second = torch.where(columns, residual - fits[3][0] >= 0, sparse)
    mean, scale = (torch.stack(parts) for parts in zip(*fits, strict=True))
    return BinaryBlock(first, second, salient, scale, mean)


def spread_error(error: Tensor, U: Tensor, compensation: str) -> Tensor:
    """What corrects the columns to the right of a block, once multiplied with U's rows (Algorithm 1, line 12).

    Args:
        error: [d_out, n] weights minus approximation; U: [n, n], the block's part of the Cholesky factor.
    """
    if compensation == "solve":  # E U = error: what a GPTQ sweep sends on if it ends at the same values
        return torch.linalg.solve_triangular(U, error, upper=True, left=False)
    return error / U.diagonal() if compensation == "diagonal" else torch.zeros_like(error)


def binarize_columns(W: Tensor, H: Tensor, cfg: Config) -> Iterator[BinaryBlock]:
    """Algorithm 1: binarize block after block, each block's error spread over the columns to its right.

    Args:
        W: [d_out, d_in] float32; left unchanged.
        H: [d_in, d_in] float32, proportional to X^T X over calibration tokens; left unchanged.
    Raises: ValueError for options out of range; QuantizationError if H + damping is not positive definite.
    """
    _check(cfg)
    U = inverse_cholesky(damped(H, cfg.damp_ratio))  # H^-1 = U^T U, line 2
    rest = W.clone()
    rest[:, H.diagonal() == 0] = 0.0  # dead inputs
    for begin in range(0, W.shape[1], cfg.block_size):
        end = min(begin + cfg.block_size, W.shape[1])
        part, U_part = rest[:, begin:end], U[begin:end, begin:end]
        saliency = part.square() / U_part.diagonal().square()  # Eq. 3, with the factor as in Algorithm 2
        block = binarize_block(part, saliency, cfg)
        E = spread_error(part - block.dequantize(), U_part, cfg.compensation)
        rest[:, end:] -= E @ U[begin:end, end:]  # line 13; no compensation inside the block
        yield block


def _check(cfg: Config) -> None:
    check_choices(cfg, compensation=COMPENSATIONS, break_points=("quantile", "quantile_with_zeros", "max"))
    if not 1 <= cfg.min_salient <= cfg.max_salient:
        raise ValueError(f"need 1 <= min_salient <= max_salient, got {cfg.min_salient} and {cfg.max_salient}")
    for name in ("block_size", "search_terms", "n_break_points"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} is {getattr(cfg, name)}; it must be at least 1")


def quantize_weight(W: Tensor, H: Tensor, cfg: Config) -> Tensor:
    """`binarize_columns`, dequantized: float32 [d_out, d_in]."""
    return torch.cat([block.dequantize() for block in binarize_columns(W, H, cfg)], 1)


@torch.no_grad()
def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Binarize the decoder blocks first to last, each on the outputs of the binarized ones before it (Sec. 3.3).

    One linear at a time: the searches look at all rows of a matrix, so linears with one input are not stacked.
    """
    check_calib(calib)
    model = copy_model(model)
    for block in walk_blocks(model, calib):
        hessians = block.hessians()
        for name, linear in named_linears(block.module).items():
            linear.weight.copy_(quantize_weight(linear.weight.float(), hessians[name], cfg))
    return model


def _stored_fits(cfg: Config) -> list[int]:
    """Which of a block's four (scale, mean) slots are stored."""
    return [0, *([1] if cfg.splitting else []), *([2, 3] if cfg.salient else [])]


def pack_weight(W: Tensor, H: Tensor, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer: two bit planes, the salient columns, float16 scales a row and block.

    A salient column needs no group flags, so the signs of its residual take their place: two bits a weight, however
    many columns are salient.
    """
    blocks, kept = list(binarize_columns(W, H, cfg)), _stored_fits(cfg)
    packed = {
        "shape": torch.tensor(W.shape, dtype=torch.int32),
        "first": pack_bits(torch.cat([block.first for block in blocks], 1), 1),
        "scale": torch.stack([block.scale[kept] for block in blocks]).half(),  # [n_blocks, n_fits, d_out, 1]
    }
    if cfg.salient or cfg.splitting:
        packed["second"] = pack_bits(torch.cat([block.second for block in blocks], 1), 1)
    if cfg.salient:
        packed["salient"] = pack_bits(torch.cat([block.salient for block in blocks]), 1)
    if cfg.row_means:
        packed["mean"] = torch.stack([block.mean[kept] for block in blocks]).half()
    return packed


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    d_out, d_in = packed["shape"].tolist()
    shapes = {"first": (d_out, d_in), "second": (d_out, d_in), "salient": (d_in,)}
    planes = {key: torch.zeros(shape) for key, shape in shapes.items()}
    fits = {key: torch.zeros(len(packed["scale"]), 4, d_out, 1) for key in ("scale", "mean")}
    for key in planes.keys() & packed.keys():
        planes[key] = unpack_bits(packed[key], 1, shapes[key])
    for key in fits.keys() & packed.keys():
        fits[key][:, _stored_fits(cfg)] = packed[key].float()
    pieces = (plane.bool().split(cfg.block_size, -1) for plane in planes.values())
    blocks = (BinaryBlock(*parts) for parts in zip(*pieces, fits["scale"], fits["mean"], strict=True))
    return torch.cat([block.dequantize() for block in blocks], 1)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """Two planes, four float16 scales a row and block, one bit a column: 2 + 64 / block_size + 1 / d_out.

    Eq. 14 counts the planes (as parameters and flags) and leaves the scales out; row_means doubles the scales.
    """
    n_planes = 2 if cfg.salient or cfg.splitting else 1
    n_scales = len(_stored_fits(cfg)) * -(-d_in // cfg.block_size) * (2 if cfg.row_means else 1)  # a row
    n_bytes = n_planes * -(-d_out * d_in // 8) + 2 * n_scales * d_out + (-(-d_in // 8) if cfg.salient else 0)
    return 8 * n_bytes / (d_out * d_in)
