"""SliM-LLM: GPTQ in which the least salient groups of a matrix lend one bit to the most salient ones.

Paper     Huang et al., ICML 2025, arXiv:2405.14917v2 (numbers below refer to v2)   Entry  papers/slim_llm.yaml
Scope     weights of nn.Linear in decoder blocks; activations, embeddings, norms and lm_head untouched
Deviates  the layer's bias takes part in the search on both sides (code: on one, `same_bias`); both ends of the search
          are tried, uniform widths and half the groups raised (code: neither, `both_ends`); nothing absolute is added
          to H (code: 0.01, `absolute_damp`); errors go on from column to column, as in the code (text: from group to
          group, `compensation`); the grid search sums the errors of all weights, because the code weighs its salient
          and its other part alike; scales, and the means of 1-bit groups, are rounded to float16, the precision they
          are stored in; where only H is known and no inputs (`pack_weight` alone), the rows of a factor of H stand in
          for them. SliM-LLM+ (`plus`) searches widths on what its own blocks give, in float32; a layer on its own has
          the ranges that learning starts from
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls import _mixed, _quant, gptq
from requant.reference_impls._calib import check_calib
from requant.reference_impls._clipping import MixedClippedWeight, learn_ranges
from requant.reference_impls._hessian import damped, inverse_cholesky
from requant.reference_impls._quant import QuantizationError, check_choices
from requant.reference_impls._walk import Block, copy_model, named_linears, walk_blocks
from requant.reference_impls.parts import slim_llm_grid
from requant.reference_impls.parts.slim_llm_widths import OBJECTIVES, WidthSearch, group_salience

TINY = {"w_bits": 3, "group_size": 16, "n_grid": 10}
COMPENSATIONS = ("column", "group")


@dataclass(frozen=True)
class Config:
    """Defaults: 2 bits in groups of 128, Tables 1 and 8. "code" is the official repository @cfdf5ff."""

    w_bits: int = 2  # mean width N, Tables 1 and 8; also 3
    group_size: int = 128  # Table 1; 64 and 32 in Table 7
    damp_ratio: float = 0.01  # code, --percdamp
    absolute_damp: float = (
        0.0  # added to H, the mean of x x^T; code: 0.01 in units of 2 seqlen, so 0.01 / (2 seqlen)
    )
    compensation: str = (
        "column"  # code: errors go on from column to column; "group": the text, group to group
    )
    block_size: int = 128  # code: columns per lazy batch
    allocation: bool = True  # salience-determined bit allocation; off: N bits everywhere
    objective: str = "kl"  # code: KL(quantized || original); "kl_original": the text's order; "mse": Table 6
    both_ends: bool = True  # the text; code: off
    same_bias: bool = True  # in the search; code: off, original outputs have the layer's bias, others do not
    calibration: bool = True  # salience-weighted quantizer calibration; off: min-max grids
    tau_range: float = 0.1  # code: factors of a group's range in [1 - tau_range, 1 + tau_range]
    n_grid: int = 100  # code: factors tried besides 1, half of them above and half below
    clip_norm: float = 2.4  # code: power of the errors
    plus: bool = False  # SliM-LLM+, Table 2: OmniQuant's learned clipping at these widths instead of GPTQ
    lwc_lr: float = 1e-2  # code, --lwc_lr of SliM-LLM+
    epochs: int = 50  # scripts of SliM-LLM+
    batch_size: int = 1  # code
    aug_loss: bool = False  # code, on in its scripts for LLaMA: second distance, as OmniQuant's
    clip_init: float = 4.0  # code: logit, 0.982 of the range


def _check(cfg: Config) -> None:
    check_choices(cfg, objective=OBJECTIVES, compensation=COMPENSATIONS)
    if cfg.w_bits < 2:
        raise QuantizationError(f"w_bits {cfg.w_bits} leaves nothing to lend; choose 2 or more")
    if cfg.absolute_damp < 0:
        raise QuantizationError(f"absolute_damp is {cfg.absolute_damp}; choose 0 or more")


def factors(cfg: Config) -> tuple[float, ...]:
    """The multiples of a group's range that are tried."""
    if not cfg.calibration or cfg.n_grid < 2:
        return (1.0,)
    return tuple((1 + torch.linspace(-cfg.tau_range, cfg.tau_range, cfg.n_grid // 2 * 2 + 1)).tolist())


# --- widths


def with_damp(H: Tensor, cfg: Config) -> Tensor:
    """H with `absolute_damp` on its diagonal, dead inputs set to one first (code); without `absolute_damp` H itself."""
    if not cfg.absolute_damp:
        return H
    H = damped(H, 0.0)
    H.diagonal().add_(cfg.absolute_damp)
    return H


def start_search(W: Tensor, H: Tensor, cfg: Config, bias: Tensor | None = None) -> WidthSearch:
    """Salience-determined bit allocation of one linear; the code's `absolute_damp` leaves damp_ratio out of it."""
    H = with_damp(H, cfg)
    final = group_salience(W, damped(H, cfg.damp_ratio), cfg.group_size)
    salience = group_salience(W, damped(H, 0.0), cfg.group_size) if cfg.absolute_damp else final
    rounded = partial(slim_llm_grid.fake_quant, W, group_size=cfg.group_size)
    how = {"objective": cfg.objective, "both_ends": cfg.both_ends, "same_bias": cfg.same_bias}
    return WidthSearch(W, rounded, cfg.w_bits, salience, final, bias=bias, **how)


def choose_widths(W: Tensor, H: Tensor, cfg: Config, X: Tensor | None = None) -> list[int]:
    """Bits of each group of a linear with inputs X [n_tokens, d_in]; without X, rows of a factor of H stand for it."""
    _check(cfg)
    if not cfg.allocation:
        return [cfg.w_bits] * _quant.grouped(W, cfg.group_size).shape[1]
    search = start_search(W, H, cfg)
    search.see(torch.linalg.cholesky(damped(H, cfg.damp_ratio)).T * len(H) ** 0.5 if X is None else X)
    return search.widths()


# --- one linear


def round_groups(W: Tensor, H: Tensor, cfg: Config, widths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The text's feedback: a group's columns are rounded as they are, their errors corrected in later groups.

    Returns: codes [d_out, n_groups, group], scale and zero point [d_out, n_groups, 1].
    """
    U = inverse_cholesky(damped(H, cfg.damp_ratio))
    rest, done = W.masked_fill(H.diagonal() == 0, 0.0), []  # dead inputs
    for begin, bits in zip(range(0, W.shape[1], cfg.group_size), widths, strict=True):
        here, later = slice(begin, begin + cfg.group_size), slice(begin + cfg.group_size, None)
        x = rest[:, here]
        scale, zero = slim_llm_grid.choose_qparams(x, bits, factors(cfg), cfg.clip_norm)
        codes = slim_llm_grid.quantize(x, scale, zero, bits)
        errors = (x - _quant.dequantize(codes, scale, zero)) / U.diagonal()[here]
        rest[:, later] -= errors @ U[here, later]
        done.append((codes, scale, zero))
    codes, scale, zero = (torch.stack(parts, 1) for parts in zip(*done, strict=True))
    return codes, scale, zero


def round_columns(W: Tensor, H: Tensor, cfg: Config, widths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The code's feedback, which is GPTQ's; returns as `round_groups`."""
    how = gptq.Config(cfg.w_bits, cfg.group_size, damp_ratio=cfg.damp_ratio, block_size=cfg.block_size)

    def choose(x: Tensor, bits: int, _symmetric: bool) -> tuple[Tensor, Tensor]:
        return slim_llm_grid.choose_qparams(x, bits, factors(cfg), cfg.clip_norm)

    rounded = gptq.round_columns(W, H, how, choose, quantize=slim_llm_grid.quantize, widths=widths)
    codes = _quant.grouped(rounded.codes.T, cfg.group_size)
    return codes, rounded.scale.T[..., None], rounded.zero_point.T[..., None]


def pack_weight(W: Tensor, H: Tensor, cfg: Config, widths: list[int] | None = None) -> dict[str, Tensor]:
    """The tensors stored for one layer; widths: bits of each group, None: `choose_widths`.

    Zero points are as wide as their codes; at a mean of 2 bits, where 1-bit groups have fractions, all are float16.
    """
    _check(cfg)
    widths = choose_widths(W, H, cfg) if widths is None else widths
    if cfg.plus:
        codes, scale, zero = MixedClippedWeight(W, widths, cfg.group_size, cfg.clip_init).stored(W)
    else:
        rounding = round_groups if cfg.compensation == "group" else round_columns
        codes, scale, zero = rounding(W, with_damp(H, cfg), cfg, widths)
    packed = _mixed.pack_groups(codes, scale, zero.floor(), torch.tensor(widths)[:, None], _choices(cfg))
    if cfg.w_bits > 2:
        return packed
    return {key: t for key, t in packed.items() if "zero" not in key} | {"zero_point": zero.half()}


def _choices(cfg: Config) -> tuple[int, ...]:
    return (cfg.w_bits - 1, cfg.w_bits, cfg.w_bits + 1)


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    if cfg.w_bits > 2:
        return _mixed.unpack_groups(packed, _choices(cfg))
    shape = tuple(packed["shape"].tolist())
    widths = _mixed.unpack_widths(packed["widths"], _choices(cfg), (shape[1], 1))
    codes = _mixed.unpack_codes(packed, widths, _choices(cfg), shape).float()
    return _quant.dequantize(codes, packed["scale"].float(), packed["zero_point"].float()).flatten(1)


def quantize_weight(W: Tensor, H: Tensor, cfg: Config, widths: list[int] | None = None) -> Tensor:
    """The dequantized weight, float32 [d_out, d_in]; arguments as for `pack_weight`."""
    return unpack_weight(pack_weight(W, H, cfg, widths), cfg)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """N + (16 + N)/g and 2 bits a group for its width; 16 + 16 instead of 16 + N where N is 2 (`pack_weight`)."""
    bits = _mixed.group_bits(cfg.w_bits, cfg.group_size, d_out, _choices(cfg))
    return bits + ((16 - cfg.w_bits) / cfg.group_size if cfg.w_bits == 2 else 0)


# --- a model


def search_block(block: Block, hessians: dict[str, Tensor], cfg: Config) -> dict[str, list[int]]:
    linears, searches = named_linears(block.module), {}
    for name, linear in linears.items():
        W, bias = linear.weight.float(), None if linear.bias is None else linear.bias.float()
        searches[name] = start_search(W, hessians[name], cfg, bias)
    block.observe(linears, lambda name, X: searches[name].see(X.float()))
    return {name: search.widths() for name, search in searches.items()}


@torch.no_grad()
def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Quantize block by block, each on the outputs of the quantized blocks before it: widths first, then GPTQ.

    With `plus` ranges are learned in the place of GPTQ, on the block's output error.
    """
    check_calib(calib)
    _check(cfg)
    model = copy_model(model)
    for block in walk_blocks(model, calib, propagate="both" if cfg.plus else "quantized"):
        hessians = block.hessians()
        widths = search_block(block, hessians, cfg) if cfg.allocation else {}
        if cfg.plus:
            learn_block(block, widths, cfg)
            continue
        for name, linear in named_linears(block.module).items():
            linear.weight.copy_(quantize_weight(linear.weight.float(), hessians[name], cfg, widths.get(name)))
    return model


def learn_block(block: Block, widths: dict[str, list[int]], cfg: Config) -> list[float]:
    """SliM-LLM+ on one block, in place: learned clipping of groups with these widths (default: N), then rounding."""
    quantizers = {}
    for name, linear in named_linears(block.module).items():
        uniform = [cfg.w_bits] * (linear.in_features // cfg.group_size)
        W, own = linear.weight.float(), widths.get(name, uniform)
        quantizers[name] = MixedClippedWeight(W, own, cfg.group_size, cfg.clip_init)
    how = {"lr": cfg.lwc_lr, "epochs": cfg.epochs, "batch_size": cfg.batch_size}
    return learn_ranges(block, quantizers, **how, second_targets=block.run() if cfg.aug_loss else None)
