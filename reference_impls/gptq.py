"""GPTQ: column-wise weight rounding that feeds each column's error into the columns not yet rounded.

Paper     Frantar et al., ICLR 2023, arXiv:2210.17323v2 (numbers below refer to v2)   Entry  papers/gptq.yaml
Scope     weights of nn.Linear in decoder blocks; activations, embeddings and lm_head untouched
Deviates  H is divided by the number of tokens, not of sequences (the scale cancels); scales are rounded to
          float16, the precision they are stored in, before any code is chosen; linears with the same input
          are stacked (rows are independent, so the result is the same); groups smaller than a lazy batch
          take their grid from fully compensated weights, as Sec. 4 says, where the official code misses the
          current batch's updates
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant
from requant.reference_impls._calib import Calib, check_calib
from requant.reference_impls._hessian import damped, inverse_cholesky, proxy_loss
from requant.reference_impls._weights import quantize_blockwise


@dataclass(frozen=True)
class Config:
    """Defaults: the OPT and BLOOM rows of Tables 3 and 4."""

    w_bits: int = 4  # Table 3 (also 3; 2 with groups, Table 7)
    group_size: int | None = None  # inputs per scale; None = whole row (Table 3); 1024, 128 in Tables 5 and 6
    symmetric: bool = False  # official code, --sym off
    damp_ratio: float = 0.01  # Sec. 3.3 "Step 3": fraction of mean(diag H)
    block_size: int = 128  # Sec. 3.3 "Step 2": columns per lazy batch
    act_order: bool = False  # official code only, off in the paper; on for the README's LLaMA rows
    static_groups: bool = False  # official code only: group grids from the original weights
    true_sequential: bool = False  # official code only, on for the README's LLaMA rows


@dataclass(frozen=True)
class Rounded:
    """Codes of one layer in processing order, with the grid of each group.

    codes [d_in, d_out]; scale, zero_point [n_groups, d_out]; order [d_in]: processing position -> input
    column; group [d_in]: processing position -> group; kept: mask [d_in, d_out] and float16 values of the weights
    that were not rounded, None where all were.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    order: Tensor
    group: Tensor
    kept: tuple[Tensor, Tensor] | None = None

    def dequantize(self) -> Tensor:
        """The weight, float32 [d_out, d_in], columns in input order."""
        Q = _quant.dequantize(
            self.codes, self.scale[self.group], self.zero_point[self.group]
        )  # [d_in, d_out]
        Q = Q if self.kept is None else torch.where(*self.kept, Q)
        return Q[self.order.argsort()].T.contiguous()


def round_columns(
    W: Tensor,
    H: Tensor,
    cfg: Config,
    choose_qparams: Callable = _quant.choose_qparams,
    *,
    quantize: Callable = _quant.quantize,
    widths: Sequence[int] | Tensor | None = None,
    kept: Tensor | None = None,
    pruned: tuple[int, int] | None = None,
) -> Rounded:
    """Algorithm 1: round W column by column, each error spread over the columns still to come.

    Args:
        W: [d_out, d_in] float32; left unchanged.
        H: [d_in, d_in] float32, proportional to X^T X over calibration tokens; left unchanged.
        choose_qparams: (x [..., n], bits, symmetric) -> scale, zero_point [..., 1]; the grid of each row or
            group.
        quantize: (x [d_out], scale, zero_point, bits) -> codes, if not `_quant.quantize`.
        widths: the `bits` of each group, n_groups ints or a tensor [n_groups, d_out]; None: w_bits everywhere.
        kept: bool [d_out, d_in], weights that are compensated but not rounded, and count as 0 for the grids.
        pruned: (n, m): of every m columns that follow each other in processing order n weights of a row become 0, those
            with the least w^2 / U_jj^2 (SparseGPT, arXiv:2301.00774); kept weights are spared.
    Raises: QuantizationError if group_size does not divide d_in, or H + damping is not positive definite.
    """
    d_in = W.shape[1]
    size = _quant.grouped(W, cfg.group_size).shape[-1]
    order = H.diagonal().argsort(descending=True) if cfg.act_order else torch.arange(d_in)
    D = damped(H, cfg.damp_ratio)
    U = inverse_cholesky(D[order][:, order] if cfg.act_order else D)  # H^-1 = U^T U, Sec. 3.3 "Step 3"
    group = order // size if cfg.static_groups else torch.arange(d_in) // size
    fixed_grid = cfg.static_groups or size == d_in
    widths = [cfg.w_bits] * (d_in // size) if widths is None else widths
    keep = None if kept is None else kept.T[order]
    scale, zero_point = (torch.empty(d_in // size, W.shape[0]) for _ in range(2))

    def choose(g: int, x: Tensor) -> None:
        bits = widths[g][:, None] if isinstance(widths, Tensor) else widths[g]
        scale[g], zero_point[g] = (t.squeeze(-1) for t in choose_qparams(x, bits, cfg.symmetric))

    if fixed_grid:
        rounded_part = W if kept is None else W.masked_fill(kept, 0.0)
        for g, x in enumerate(rounded_part.split(size, 1)):
            choose(g, x)
    rest = W.T.clone()  # [d_in, d_out]: a column of W is a contiguous row here
    rest[H.diagonal() == 0] = 0.0  # dead inputs
    rest = rest[order]
    codes, values = torch.empty_like(rest), None if kept is None else torch.empty_like(rest)
    group_of, pivots = group.tolist(), U.diagonal()
    # views of all rows at once, since one column is too little work for several more calls
    scales, zeros, columns, coded = (t.unbind() for t in (scale, zero_point, rest, codes))
    starts = sorted({*range(0, d_in, cfg.block_size), *(() if fixed_grid else range(0, d_in, size)), d_in})
    for begin, end in pairwise(starts):
        if not fixed_grid and begin % size == 0:
            x = rest[begin : begin + size]
            choose(begin // size, (x if kept is None else x.masked_fill(keep[begin : begin + size], 0.0)).T)
        errors = torch.empty(end - begin, W.shape[0])
        lazy = zip(U[begin:end, begin:end].unbind(), pivots[begin:end].unbind(), errors.unbind(), strict=True)
        for j, (spread, pivot, error) in enumerate(lazy, begin):
            s, z, column = scales[group_of[j]], zeros[group_of[j]], columns[j]
            code = quantize(column, s, z, widths[group_of[j]])
            if pruned is not None:
                if j % pruned[1] == 0:
                    ahead = slice(j, j + pruned[1])
                    salience = (rest[ahead] / pivots[ahead, None]).square()
                    dropped = salience.argsort(dim=0, stable=True).argsort(dim=0) < pruned[0]  # [m, d_out]
                code = torch.where(dropped[j % pruned[1]], z, code)
            coded[j].copy_(code)
            value = _quant.dequantize(code, s, z)
            if kept is not None:
                value = values[j] = torch.where(keep[j], column.half().float(), value)
            torch.sub(column, value, out=error).div_(pivot)  # Eq. 2
            rest[j + 1 : end].addr_(spread[j + 1 - begin :], error, alpha=-1)  # Eq. 3, in the lazy batch
        rest[end:].addmm_(U[begin:end, end:].T, errors, alpha=-1)  # Eq. 4, "Step 2": lazy batch update
    return Rounded(codes, scale, zero_point, order, group, None if kept is None else (keep, values))


def quantize_weight(W: Tensor, H: Tensor, cfg: Config) -> Tensor:
    """`round_columns`, dequantized: float32 [d_out, d_in]."""
    return round_columns(W, H, cfg).dequantize()


def quantize(model: nn.Module, calib: Calib | None, cfg: Config) -> nn.Module:
    """Quantize the decoder blocks first to last, each on the outputs of the quantized blocks before it (Sec. 4).

    Args:
        calib: int64 [n_samples, seqlen], or several such tensors of different lengths.
    """
    check_calib(calib, several_lengths=True)
    return quantize_blockwise(
        model, calib, lambda W, H: quantize_weight(W, H, cfg), true_sequential=cfg.true_sequential
    )


def _stores_order(cfg: Config) -> bool:
    return cfg.act_order and cfg.group_size is not None and not cfg.static_groups


def pack_weight(W: Tensor, H: Tensor, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer; `order` only where groups are groups of permuted columns."""
    rounded = round_columns(W, H, cfg)
    back = torch.arange(W.shape[1]) if _stores_order(cfg) else rounded.order.argsort()
    codes = _quant.grouped(rounded.codes[back].T, cfg.group_size)
    scale, zero_point = rounded.scale.T[..., None], rounded.zero_point.T[..., None]  # [d_out, n_groups, 1]
    packed = _quant.pack_affine(codes, scale, zero_point, cfg.w_bits, cfg.symmetric)
    return packed | ({"order": rounded.order.to(torch.int32)} if _stores_order(cfg) else {})


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    W = _quant.unpack_affine(packed, cfg.w_bits, cfg.symmetric)
    return W[:, packed["order"].long().argsort()] if "order" in packed else W


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + (16 + b)/g, plus 32 bits an input column where act_order permutes the groups."""
    return _quant.affine_bits(cfg.w_bits, cfg.group_size, d_in, cfg.symmetric) + (
        32 / d_out if _stores_order(cfg) else 0
    )


# --- invariants named in papers/gptq.yaml
# -----------------------------------------------------------------------------


def diagonal_hessian_is_rtn(ctx) -> float:
    """Largest difference between GPTQ with a diagonal H and round-to-nearest; 0 by Eq. 2 and 3."""
    W, H, _ = ctx.layer("model.layers.1.self_attn.o_proj")
    cfg = Config(w_bits=3)
    diagonal = quantize_weight(W, torch.diag(H.diagonal()), cfg)
    return float((diagonal - _quant.fake_quant(W, cfg.w_bits)).abs().max())


def lazy_batches_change_nothing(ctx) -> float:
    """Share of codes that differ between column-by-column updates and lazy batches of 32, 100 and 128 columns."""
    W, H, _ = ctx.layer("model.layers.1.mlp.down_proj")
    plain = round_columns(W, H, Config(w_bits=3, block_size=1)).codes
    lazy = (round_columns(W, H, Config(w_bits=3, block_size=size)).codes for size in (32, 100, 128))
    return max(float((codes != plain).float().mean()) for codes in lazy)


def matches_explicit_obs(ctx) -> float:
    """Share of codes that differ from the explicit form of Eq. 2 and 3, which shrinks H^-1 after every column."""
    W, H, _ = ctx.layer("model.layers.1.self_attn.o_proj")
    W, H, cfg = W[:, :48], H[:48, :48], Config(w_bits=3)
    rest, inverse = W.double().clone(), torch.linalg.inv(damped(H, cfg.damp_ratio).double())
    scale, zero_point = _quant.choose_qparams(W, cfg.w_bits)
    codes = torch.empty_like(W)
    for j in range(W.shape[1]):
        codes[:, j : j + 1] = _quant.quantize(rest[:, j : j + 1], scale, zero_point, cfg.w_bits)
        error = (rest[:, j : j + 1] - _quant.dequantize(codes[:, j : j + 1], scale, zero_point)) / inverse[
            0, 0
        ]
        rest[:, j:] -= error * inverse[:1]  # Eq. 2
        inverse = (inverse - inverse[:, :1] * inverse[:1] / inverse[0, 0])[1:, 1:]  # Eq. 3
    return float((round_columns(W, H, cfg).codes != codes.T).float().mean())


def proxy_loss_ratio_to_rtn(ctx) -> float:
    """Worst ratio of tr(E H E^T) between GPTQ and round-to-nearest over the linears of one block, at 3 bits."""
    cfg, ratios = Config(w_bits=3), []
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        W, H, _ = ctx.layer(f"model.layers.2.{name}")
        rtn = quantize_weight(W, torch.eye(len(H)), replace(cfg, damp_ratio=0.0))
        ratios.append(proxy_loss(W, quantize_weight(W, H, cfg), H) / proxy_loss(W, rtn, H))
    return max(ratios)
