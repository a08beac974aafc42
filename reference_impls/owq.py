"""OWQ: GPTQ with a few whole input columns left in float16, those that would hurt most if rounded.

Paper     Lee et al., AAAI 2024, arXiv:2306.02272v4 (abstract; steps as in the official code)   Entry  papers/owq.yaml
Scope     weights of nn.Linear in decoder blocks; activations, embeddings, norms and lm_head untouched
Deviates  every linear of a block gets the same share of the extra bits, computed from its real shape: the released
          code's ratios say the same where an MLP is 4 h (OPT) or 8/3 h (LLaMA) wide, those for BLOOM's fused
          projection do not. Scales are rounded to float16, the precision they are stored in, before they are
          compared, and so are weak columns once compensated; H is divided by the number of tokens (its scale
          cancels). The text of weak column tuning could not be read, and its code is not public: its optimizer (AdamW),
          rate and batches are ours
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant, gptq
from requant.reference_impls._calib import check_calib
from requant.reference_impls._clip_search import search_grid_and_zero, search_symmetric_grid
from requant.reference_impls._learn import descend, in_order, next_token_loss
from requant.reference_impls._outliers import (
    TunableColumns,
    column_bits,
    join_columns,
    other_columns,
    pack_columns,
    top_columns,
)
from requant.reference_impls._quant import QuantizationError
from requant.reference_impls._walk import decoder_blocks, named_linears, replace_module
from requant.reference_impls._weights import quantize_blockwise

TINY = {"n_columns": 4, "n_grid": 10, "coarse_grid": 10}


@dataclass(frozen=True)
class Config:
    """Defaults: 3.01 bits, as in the abstract. "code" is the official repository @03cfc99."""

    w_bits: int = 3  # abstract; also 4
    extra_bits: float = 0.01  # code, --target_bit less --wbits; also 0.1
    n_columns: int | None = None  # code, --target_rank: weak columns of every linear, not by extra_bits
    group_size: int | None = None  # code, --groupsize; 128 in the authors' results with groups
    damp_ratio: float = 0.01  # code, --percdamp
    block_size: int = 128  # code
    symmetric: bool = False  # code, --sym: 0 in the middle of the codes, no zero point stored
    hessian_only: bool = False  # code, --no_frob_norm: score columns by H_jj alone
    clip_search: bool = True  # code, --tuning mse; off: min-max grids
    n_grid: int = 100  # code: step sizes tried for the grid of a row
    coarse_grid: int = 40  # code: the same for the trial rounding of the score, and for groups
    clip_norm: float = 2.4  # code: power of the errors in the search
    true_sequential: bool = False  # code, --true-sequential
    act_order: bool = False  # code, --act-order: the other columns by falling score; for whole rows only
    tuning_epochs: int = 0  # weak column tuning: passes over calib on the model's loss; 0 = none
    tuning_lr: float = 1e-4  # ours
    tuning_batch_size: int = 8  # ours


def _chooser(cfg: Config, n_steps: int):
    if cfg.symmetric:
        return partial(search_symmetric_grid, n_steps=n_steps if cfg.clip_search else 1, norm=cfg.clip_norm)
    if not cfg.clip_search:
        return _quant.choose_qparams
    return partial(search_grid_and_zero, n_steps=n_steps, norm=cfg.clip_norm)


def column_scores(W: Tensor, H: Tensor, cfg: Config) -> Tensor:
    """H_jj times the squared error of column j in a trial rounding of all rows: [d_in]."""
    if cfg.hessian_only:
        return H.diagonal().clone()
    scale, zero_point = _chooser(cfg, cfg.coarse_grid)(W, cfg.w_bits, cfg.symmetric)
    Q = _quant.dequantize(_quant.quantize(W, scale, zero_point, cfg.w_bits), scale, zero_point)
    return H.diagonal() * (Q - W).square().sum(0)


def to_even(n: float) -> int:
    return round(n) + round(n) % 2


def n_weak(d_in: int, cfg: Config) -> int:
    """Weak columns of a linear that stands alone: extra_bits (of 16 - w_bits more a weight) of its own weights."""
    if cfg.n_columns is not None:
        return cfg.n_columns
    return min(d_in, to_even(d_in * cfg.extra_bits / (16 - cfg.w_bits)))


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
        name: min(d_in, to_even(share / (16 - cfg.w_bits) / d_out)) for name, (d_out, d_in) in shapes.items()
    }


def _round(W: Tensor, H: Tensor, cfg: Config, columns: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """GPTQ (its Algorithm 1) with the weak columns last and left unrounded.

    Returns: codes [d_out, d_in - n], scale and zero point [d_out, n_groups], weak columns [d_out, n].
    """
    rest = other_columns(columns, W.shape[1])
    turn = torch.arange(len(rest))
    if cfg.act_order:
        if cfg.group_size is not None:
            raise QuantizationError("act_order permutes the columns of groups; set group_size=None")
        turn = column_scores(W, H, cfg)[rest].argsort(descending=True, stable=True)
    order = torch.cat([rest[turn], columns])
    kept = torch.zeros(W.shape, dtype=torch.bool)
    kept[:, len(rest) :] = True
    how = gptq.Config(
        cfg.w_bits, cfg.group_size, cfg.symmetric, damp_ratio=cfg.damp_ratio, block_size=cfg.block_size
    )
    choose = _chooser(cfg, cfg.n_grid if cfg.group_size is None else cfg.coarse_grid)
    rounded = gptq.round_columns(W[:, order], H[order][:, order], how, choose, kept=kept)
    n_groups = -(-len(rest) // (cfg.group_size or W.shape[1]))
    scale, zero_point = rounded.scale[:n_groups].T, rounded.zero_point[:n_groups].T
    codes = rounded.codes[: len(rest)][turn.argsort()].T
    return codes, scale, zero_point, rounded.kept[1][len(rest) :].T


def weak_columns(W: Tensor, H: Tensor, cfg: Config) -> Tensor:
    """The `n_weak` columns with the highest scores, ascending."""
    return top_columns(column_scores(W, H, cfg), n_weak(W.shape[1], cfg))


def pack_weight(W: Tensor, H: Tensor, cfg: Config, columns: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors stored for one layer.

    Args:
        W: [d_out, d_in] float32; H: [d_in, d_in], second moments of its inputs; both left unchanged.
        columns: weak columns, ascending; None: `weak_columns`.
    """
    columns = weak_columns(W, H, cfg) if columns is None else columns
    codes, scale, zero_point, weak = _round(W, H, cfg, columns)
    packed = {
        "shape": torch.tensor(codes.shape, dtype=torch.int32),
        "codes": _quant.pack_bits(codes, cfg.w_bits),
        "scale": scale.half() if cfg.w_bits <= 8 else scale,
    }
    if not cfg.symmetric:
        packed["zero_point"] = _quant.pack_bits(zero_point, cfg.w_bits)
    return (
        packed | pack_columns(weak, torch.arange(len(columns))) | {"outlier_columns": columns.to(torch.int32)}
    )


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    shape, scale = tuple(packed["shape"].tolist()), packed["scale"].float()
    codes = _quant.unpack_bits(packed["codes"], cfg.w_bits, shape).float()
    zero_point = torch.full_like(scale, 2.0 ** (cfg.w_bits - 1))
    if not cfg.symmetric:
        zero_point = _quant.unpack_bits(packed["zero_point"], cfg.w_bits, tuple(scale.shape)).float()
    group = torch.arange(shape[1]) // (cfg.group_size or shape[1])
    return join_columns(_quant.dequantize(codes, scale[:, group], zero_point[:, group]), packed)


def quantize_weight(W: Tensor, H: Tensor, cfg: Config, columns: Tensor | None = None) -> Tensor:
    """The dequantized weight, float32 [d_out, d_in]; arguments as for `pack_weight`."""
    return unpack_weight(pack_weight(W, H, cfg, columns), cfg)


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Quantize block by block, each on the outputs of the quantized blocks before it, as GPTQ does; then tune."""
    model, columns = quantize_keeping_columns(model, calib, cfg)
    if cfg.tuning_epochs:
        tune_columns(model, columns, calib, cfg)
    return model


def quantize_keeping_columns(
    model: nn.Module, calib: Tensor | None, cfg: Config
) -> tuple[nn.Module, dict[nn.Linear, Tensor]]:
    """The quantized model, and the weak columns of each of its linears."""
    check_calib(calib)
    linears = named_linears(decoder_blocks(model)[0])
    budget = column_budget({name: tuple(linear.weight.shape) for name, linear in linears.items()}, cfg)
    found: list[dict[str, Tensor]] = []  # by block and name

    def rounding(W: Tensor, H: Tensor, name: str) -> Tensor:
        own = replace(cfg, n_columns=budget[name])
        if not found or name in found[-1]:
            found.append({})
        found[-1][name] = weak_columns(W, H, own)
        return quantize_weight(W, H, own, found[-1][name])

    model = quantize_blockwise(model, calib, rounding, true_sequential=cfg.true_sequential, stacked=False)
    blocks = zip(decoder_blocks(model), found, strict=True)
    return model, {named_linears(block)[name]: c for block, own in blocks for name, c in own.items()}


def tune_columns(
    model: nn.Module, columns: Mapping[nn.Linear, Tensor], tokens: Tensor, cfg: Config
) -> list[float]:
    """Weak column tuning: train the float16 columns, and nothing else, on the next-token loss; in place.

    Args:
        tokens: int64 [n, seqlen], the text to learn. What comes out is stored as before.
    Returns: the loss of each batch before its step.
    """
    names = {module: name for name, module in model.named_modules()}
    places = {names[linear]: TunableColumns(linear, own) for linear, own in columns.items() if len(own)}
    for name, module in places.items():
        replace_module(model, name, module)
    optimizer = torch.optim.AdamW([m.values for m in places.values()], cfg.tuning_lr, weight_decay=0.0)
    batches = in_order(len(tokens), cfg.tuning_batch_size, cfg.tuning_epochs)
    losses = descend(
        lambda batch: next_token_loss(model(tokens[batch], use_cache=False).logits, tokens[batch]),
        optimizer,
        batches,
    )
    for name, module in places.items():
        replace_module(model, name, module.merged())
    return losses


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """w_bits for d_in - n columns, 16 for n, scale and zero point of each row and group, an int32 a weak column.

    Symmetric grids have no zero point.
    """
    n = n_weak(d_in, cfg)
    n_groups, zero_bits = -(-(d_in - n) // (cfg.group_size or d_in)), 0 if cfg.symmetric else cfg.w_bits
    return (cfg.w_bits * (d_in - n) + n_groups * (16 + zero_bits)) / d_in + column_bits(n, d_out, d_in)
