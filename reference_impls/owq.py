"""OWQ: GPTQ with a few whole input columns left in float16, those that would hurt most if rounded.

Paper     Lee et al., AAAI 2024, arXiv:2306.02272v4 (abstract; steps as in the official code)   Entry  papers/owq.yaml
Scope     weights of nn.Linear in decoder blocks; activations, embeddings, norms and lm_head untouched
Deviates  every linear of a block gets the same share of the extra bits, computed from its real shape: the released
          code's ratios say the same where an MLP is 4 h (OPT) or 8/3 h (LLaMA) wide, those for BLOOM's fused
          projection do not. Scales are rounded to float16, the precision they are stored in, before they are
          compared, and so are weak columns once compensated; H is divided by the number of tokens (its scale
          cancels). Symmetric grids, --act-order and the tuning of weak columns are left out
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant, gptq
from requant.reference_impls._hessian import damped, proxy_loss
from requant.reference_impls._outliers import (
    column_bits,
    join_columns,
    other_columns,
    pack_columns,
    top_columns,
)
from requant.reference_impls._quant import QuantizationError
from requant.reference_impls._walk import check_calib, decoder_blocks, named_linears
from requant.reference_impls._weights import quantize_blockwise

TINY = {"n_columns": 4, "n_grid": 10, "coarse_grid": 10}


@dataclass(frozen=True)
class Config:
    """Defaults: 3.01 bits, as in the abstract. "code" is the official repository @03cfc99."""

    w_bits: int = 3  # abstract; also 4
    extra_bits: float = 0.01  # code, --target_bit less --wbits; also 0.1
    n_columns: int | None = (
        None  # code, --target_rank: weak columns of every linear, whatever extra_bits says
    )
    group_size: int | None = None  # code, --groupsize; 128 in the authors' results with groups
    damp_ratio: float = 0.01  # code, --percdamp
    block_size: int = 128  # code
    hessian_only: bool = False  # code, --no_frob_norm: score columns by H_jj alone
    clip_search: bool = True  # code, --tuning mse; off: min-max grids
    n_grid: int = 100  # code: step sizes tried for the grid of a row
    coarse_grid: int = 40  # code: the same for the trial rounding of the score, and for groups
    clip_norm: float = 2.4  # code: power of the errors in the search
    true_sequential: bool = False  # code, --true-sequential


def search_grid(x: Tensor, bits: int, symmetric: bool, n_steps: int, norm: float) -> tuple[Tensor, Tensor]:
    """The best grid among n_steps fractions of the full step size, with each zero point 0..2^bits-1.

    Every row is sorted once. A zero point z then adds to the errors without clipping what the entries below -z steps
    and above 2^bits-1-z steps lose more, and these are the ends of the row.

    Args:
        x: [..., n]; the error is the sum of |x - q|^norm over the last dimension.
        symmetric: must be False; there for GPTQ's signature.
    Returns: scale, zero_point [..., 1].
    """
    if symmetric:
        raise QuantizationError("the range search knows asymmetric grids only")
    top, rows = 2**bits - 1, x.flatten(0, -2).sort(-1).values  # [m, n]
    ends = {
        -1: (-rows).T.contiguous(),
        1: rows.T.flip(0).contiguous(),
    }  # [n, m], what is clipped first comes first
    pairs = ends[1][: rows.shape[1] // 2] + ends[-1][: rows.shape[1] // 2]  # outermost two, next two, ...
    span = ends[1][0].clamp(min=0) + ends[-1][0].clamp(min=0)
    span = torch.where(span == 0, 1.0, span)
    cols = torch.arange(len(rows))
    best, best_scale, best_zero = (
        torch.full_like(span, torch.inf),
        torch.empty_like(span),
        torch.zeros_like(span),
    )
    for step in range(n_steps, 0, -1):
        scale = _quant.stored_scale(span * (step / (n_steps * top)), bits)
        if (2 * _quant.power_((pairs - top * scale).clamp_(min=0).div_(2), norm).sum(0) > best).all():
            break  # no grid of this width or less can hold both ends of the pairs
        level = torch.div(ends[1], scale).round_().mul_(scale)
        inside = _quant.power_(level.sub_(ends[1]).abs_(), norm)  # errors where nothing is clipped
        sums = torch.nn.functional.pad(inside.cumsum(0), (0, 0, 1, 0))  # [n + 1, m]
        limits = torch.arange(top + 1) * scale[:, None]  # [m, top + 1]
        first = {-1: torch.searchsorted(rows, -limits), 1: torch.searchsorted(rows, limits, right=True)}
        total = sums[-1].repeat(top + 1, 1)  # [zero points, m]
        for limit in range(top + 1):
            low, high = first[-1][:, limit], rows.shape[1] - first[1][:, limit]  # entries that are clipped
            for side, count, zero in ((-1, low, limit), (1, high, top - limit)):
                clipped = (ends[side][: int(count.max())] - limits[:, limit]).clamp_(min=0)
                extra = sums[-1] - sums[-1 - count, cols] if side < 0 else sums[count, cols]
                total[zero] += _quant.power_(clipped, norm).sum(0) - extra
        least, zero_point = total.min(0)
        better = least <= best
        best, best_scale = torch.where(better, least, best), torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero_point.float(), best_zero)
    shape = (*x.shape[:-1], 1)
    return best_scale.reshape(shape), best_zero.reshape(shape)


def _chooser(cfg: Config, n_steps: int):
    if not cfg.clip_search:
        return _quant.choose_qparams
    return partial(search_grid, n_steps=n_steps, norm=cfg.clip_norm)


def column_scores(W: Tensor, H: Tensor, cfg: Config) -> Tensor:
    """H_jj times the squared error of column j in a trial rounding of all rows: [d_in]."""
    if cfg.hessian_only:
        return H.diagonal().clone()
    scale, zero_point = _chooser(cfg, cfg.coarse_grid)(W, cfg.w_bits, False)
    Q = _quant.dequantize(_quant.quantize(W, scale, zero_point, cfg.w_bits), scale, zero_point)
    return H.diagonal() * (Q - W).square().sum(0)


def _even(n: float) -> int:
    return round(n) + round(n) % 2


def n_weak(d_in: int, cfg: Config) -> int:
    """Weak columns of a linear that stands alone: extra_bits (of 16 - w_bits more a weight) of its own weights."""
    if cfg.n_columns is not None:
        return cfg.n_columns
    return min(d_in, _even(d_in * cfg.extra_bits / (16 - cfg.w_bits)))


def column_budget(shapes: Mapping[str, tuple[int, int]], cfg: Config) -> dict[str, int]:
    """Weak columns of each linear of a block, by name: an equal share of the block's extra bits each (code).

    Args:
        shapes: name -> (d_out, d_in) of all linears of a block.
    """
    if cfg.n_columns is not None:
        return dict.fromkeys(shapes, cfg.n_columns)
    share = (
        sum(d_out * d_in for d_out, d_in in shapes.values()) * cfg.extra_bits / len(shapes)
    )  # bits a linear
    return {
        name: min(d_in, _even(share / (16 - cfg.w_bits) / d_out)) for name, (d_out, d_in) in shapes.items()
    }


def _round(W: Tensor, H: Tensor, cfg: Config, columns: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """GPTQ (its Algorithm 1) with the weak columns last and left unrounded.

    Returns: codes [d_out, d_in - n], scale and zero point [d_out, n_groups], weak columns [d_out, n].
    """
    rest = other_columns(columns, W.shape[1])
    order = torch.cat([rest, columns])
    kept = torch.zeros(W.shape, dtype=torch.bool)
    kept[:, len(rest) :] = True
    how = gptq.Config(cfg.w_bits, cfg.group_size, damp_ratio=cfg.damp_ratio, block_size=cfg.block_size)
    choose = _chooser(cfg, cfg.n_grid if cfg.group_size is None else cfg.coarse_grid)
    rounded = gptq.round_columns(W[:, order], H[order][:, order], how, choose, kept=kept)
    n_groups = -(-len(rest) // (cfg.group_size or W.shape[1]))
    scale, zero_point = rounded.scale[:n_groups].T, rounded.zero_point[:n_groups].T
    return rounded.codes[: len(rest)].T, scale, zero_point, rounded.kept[1][len(rest) :].T


def pack_weight(W: Tensor, H: Tensor, cfg: Config, columns: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors stored for one layer.

    Args:
        W: [d_out, d_in] float32; H: [d_in, d_in], second moments of its inputs; both left unchanged.
        columns: weak columns, ascending; None: the n_weak with the highest scores.
    """
    columns = top_columns(column_scores(W, H, cfg), n_weak(W.shape[1], cfg)) if columns is None else columns
    codes, scale, zero_point, weak = _round(W, H, cfg, columns)
    packed = {
        "shape": torch.tensor(codes.shape, dtype=torch.int32),
        "codes": _quant.pack_bits(codes, cfg.w_bits),
        "scale": scale.half() if cfg.w_bits <= 8 else scale,
        "zero_point": _quant.pack_bits(zero_point, cfg.w_bits),
    }
    return (
        packed | pack_columns(weak, torch.arange(len(columns))) | {"outlier_columns": columns.to(torch.int32)}
    )


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    shape, scale = tuple(packed["shape"].tolist()), packed["scale"].float()
    codes = _quant.unpack_bits(packed["codes"], cfg.w_bits, shape).float()
    zero_point = _quant.unpack_bits(packed["zero_point"], cfg.w_bits, tuple(scale.shape)).float()
    group = torch.arange(shape[1]) // (cfg.group_size or shape[1])
    return join_columns(_quant.dequantize(codes, scale[:, group], zero_point[:, group]), packed)


def quantize_weight(W: Tensor, H: Tensor, cfg: Config, columns: Tensor | None = None) -> Tensor:
    """The dequantized weight, float32 [d_out, d_in]; arguments as for `pack_weight`."""
    return unpack_weight(pack_weight(W, H, cfg, columns), cfg)


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Quantize block by block, each on the outputs of the quantized blocks before it, as GPTQ does."""
    check_calib(calib)
    linears = named_linears(decoder_blocks(model)[0])
    budget = column_budget({name: tuple(linear.weight.shape) for name, linear in linears.items()}, cfg)
    return quantize_blockwise(
        model,
        calib,
        lambda W, H, name: quantize_weight(W, H, replace(cfg, n_columns=budget[name])),
        true_sequential=cfg.true_sequential,
        stacked=False,
    )


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """w_bits for d_in - n columns, 16 for n, scale and zero point of each row and group, an int32 a weak column."""
    n = n_weak(d_in, cfg)
    n_groups = -(-(d_in - n) // (cfg.group_size or d_in))
    return (cfg.w_bits * (d_in - n) + n_groups * (16 + cfg.w_bits)) / d_in + column_bits(n, d_out, d_in)


# --- invariants and experiments named in papers/owq.yaml

_DOWN = "model.layers.1.mlp.down_proj"


def nothing_kept_is_gptq(ctx) -> float:
    """Largest difference to GPTQ where no column is kept and grids are min-max."""
    W, H, _ = ctx.layer("model.layers.1.self_attn.o_proj")
    plain = quantize_weight(W, H, Config(n_columns=0, clip_search=False))
    return float((plain - gptq.quantize_weight(W, H, gptq.Config(w_bits=3))).abs().max())


def weak_columns_are_least_squares(ctx) -> float:
    """Relative distance of the weak columns from the closed form W_k + (W_r - Q_r) H_rk H_kk^-1, damped H."""
    W, H, _ = ctx.layer(_DOWN)
    cfg = Config(n_columns=8, n_grid=10, coarse_grid=10)
    columns = top_columns(column_scores(W, H, cfg), 8)
    rest = other_columns(columns, W.shape[1])
    Q, H = quantize_weight(W, H, cfg, columns).double(), damped(H, cfg.damp_ratio).double()
    moved = (W[:, rest] - Q[:, rest]) @ H[rest][:, columns] @ torch.linalg.inv(H[columns][:, columns])
    return float((Q[:, columns] - W[:, columns] - moved).norm() / moved.norm())


def search_is_exhaustive(ctx) -> float:
    """Largest relative excess of a row's error over the best of all grids, tried one after the other."""
    W, _, _ = ctx.layer(_DOWN)
    x, bits, steps = W[:64], 3, 20
    span = x.amax(1, keepdim=True).clamp(min=0) - x.amin(1, keepdim=True).clamp(max=0)
    errors = [torch.inf]
    for step in range(1, steps + 1):
        scale = _quant.stored_scale(span * (step / (steps * 7)), bits)
        for zero in torch.arange(8.0):
            q = _quant.dequantize(_quant.quantize(x, scale, zero, bits), scale, zero)
            errors.append((x - q).abs().pow(2.4).sum(1))
    best = torch.stack(errors[1:]).amin(0)
    scale, zero = search_grid(x, bits, False, steps, 2.4)
    q = _quant.dequantize(_quant.quantize(x, scale, zero, bits), scale, zero)
    return float(((x - q).abs().pow(2.4).sum(1) / best - 1).max())


def budget_is_the_official_one(ctx) -> float:
    """Largest difference in weak columns to 12/(16-b) (t-b)/n d_in ratio of the code, on LLaMA-7B and -13B shapes."""
    worst = 0
    for hidden, mlp in ((4096, 11008), (5120, 13824)):
        shapes = dict.fromkeys(("q", "k", "v", "o"), (hidden, hidden))
        shapes |= {"gate": (mlp, hidden), "up": (mlp, hidden), "down": (hidden, mlp)}
        for w_bits in (3, 4):
            for extra in (0.01, 0.1):
                ours = column_budget(shapes, Config(w_bits=w_bits, extra_bits=extra))
                for name, (_, d_in) in shapes.items():
                    ratio = 1 if len(name) == 1 else 0.375
                    worst = max(worst, abs(ours[name] - _even(12 / (16 - w_bits) * extra / 7 * d_in * ratio)))
    return float(worst)


def columns_by_score(ctx) -> list[dict]:
    """Proxy loss of one layer, over that without weak columns, by which 8 of 768 columns are kept."""
    W, H, _ = ctx.layer(_DOWN)
    cfg = Config(n_columns=8, n_grid=10, coarse_grid=10)
    score = column_scores(W, H, cfg)
    draws = [
        torch.randperm(len(score), generator=torch.Generator().manual_seed(seed))[:8] for seed in range(3)
    ]
    tried = {
        "score": [top_columns(score, 8)],
        "random": [draw.sort().values for draw in draws],  # the best of three draws counts
        "none": [top_columns(score, 0)],
    }
    losses = {
        name: min(proxy_loss(W, quantize_weight(W, H, cfg, columns), H) for columns in choices)
        for name, choices in tried.items()
    }
    return [{"name": name, "value": loss / losses["none"]} for name, loss in losses.items()]


def gain_by_outliers(ctx) -> list[dict]:
    """Proxy loss with 4 weak columns of 256 over that with none, in q_proj with and without outlying inputs."""
    cfg, rows = Config(n_columns=4, n_grid=10, coarse_grid=10), []
    for name, model in (("outliers", "reference-outlier"), ("plain", "reference")):
        W, H, _ = ctx.layer("model.layers.1.self_attn.q_proj", model)
        some, none = (quantize_weight(W, H, replace(cfg, n_columns=n)) for n in (4, 0))
        rows.append({"name": name, "value": proxy_loss(W, some, H) / proxy_loss(W, none, H)})
    return rows


def gain_of_search(ctx) -> list[dict]:
    """Proxy loss of one layer over that with min-max grids, by how the grid of a row is found."""
    W, H, _ = ctx.layer("model.layers.1.self_attn.o_proj")
    cfg = Config(n_columns=0)
    loss = {on: proxy_loss(W, quantize_weight(W, H, replace(cfg, clip_search=on)), H) for on in (True, False)}
    return [{"name": "search", "value": loss[True] / loss[False]}, {"name": "minmax", "value": 1.0}]
