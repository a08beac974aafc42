"""Evidence on BiLLM: groups and second terms of real blocks, the searches against every candidate, compensation.

Entry     papers/billm.yaml
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from requant.reference_impls._hessian import damped, inverse_cholesky, proxy_loss
from requant.reference_impls.billm import (
    COMPENSATIONS,
    Config,
    binarize_block,
    break_points,
    find_groups,
    quantize_weight,
    search_break_point,
    search_columns,
    spread_error,
)
from requant.reference_impls.parts.billm_binary import signed_value, split_error

_LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def _first_parts(ctx) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights and saliencies of the first block of columns, for four linears of one decoder block."""
    n = Config().block_size
    for name in _LAYERS:
        W, H, _ = ctx.layer(f"model.layers.2.{name}")
        U = inverse_cholesky(damped(H, Config().damp_ratio))
        yield W[:, :n], (W / U.diagonal()).square()[:, :n]


def _row_errors(W: Tensor, Q: Tensor) -> Tensor:
    return (W - Q).square().sum(1)


def second_term_ratio(ctx) -> float:
    """Largest ratio, over rows, of the error of two terms to that of one, in salient columns; <= 1 by Eq. 8."""
    ratios = []
    for W, saliency in _first_parts(ctx):
        block = binarize_block(W, saliency, Config())
        two, one = block.dequantize(), signed_value(block.mean[2], block.scale[2], block.first)
        two, one = (_row_errors(W[:, block.salient], Q[:, block.salient]) for Q in (two, one))
        ratios.append(float((two / one).max()))
    return max(ratios)


def splitting_ratio(ctx) -> float:
    """Largest ratio, over rows, of the error of two magnitude groups to that of one; <= 1 at any break-point."""
    ratios = []
    for W, saliency in _first_parts(ctx):
        blocks = (binarize_block(W, saliency, Config(salient=False, splitting=on)) for on in (True, False))
        two, one = (_row_errors(W, block.dequantize()) for block in blocks)
        ratios.append(float((two / one).max()))
    return max(ratios)


def most_values_in_a_row(ctx) -> float:
    """Most distinct values a row takes within a block: at most 2 concentrated, 2 sparse and 4 salient ones."""
    counts = []
    for W, saliency in _first_parts(ctx):
        ordered = binarize_block(W, saliency, Config()).dequantize().sort(1).values
        counts.append(float((ordered.diff(dim=1) != 0).sum(1).max()) + 1)
    return max(counts)


def misplaced_weights(ctx) -> float:
    """Sparse weights in salient columns, concentrated ones larger than a sparse one, too few or many columns."""
    wrong = 0
    for W, saliency in _first_parts(ctx):
        salient, sparse = find_groups(W, saliency, Config())
        concentrated = ~(sparse | salient)
        wrong += int((sparse & salient).sum())
        wrong += int((W.abs()[concentrated] >= W.abs()[sparse].min()).sum())
        wrong += int(not Config().min_salient <= int(salient.sum()) <= Config().max_salient)
    return float(wrong)


def compensation_inside_a_block(ctx) -> float:
    """Largest difference that compensation makes to a layer of a single block; none of it stays inside."""
    W, H, _ = ctx.layer("model.layers.2.self_attn.o_proj")
    Q = [quantize_weight(W, H, Config(block_size=len(H), compensation=how)) for how in COMPENSATIONS]
    return max(float((Q[i] - Q[2]).abs().max()) for i in range(2))


def search_excess(ctx) -> float:
    """How much worse, relatively, the searches by prefix sums do than trying every candidate."""
    cfg, excess = Config(), []
    for W, saliency in _first_parts(ctx):
        x, order = W[:64].double(), saliency.sum(0).argsort(descending=True)
        rank, size = order.argsort(), x.abs()
        counts = range(cfg.min_salient, cfg.max_salient + 1)
        columns = {k: float(split_error(x, rank < k, 1, False)) for k in counts}
        points = [float(split_error(x, size <= p, 1, False)) for p in break_points(size, 0, cfg)]
        found = float(split_error(x, size <= search_break_point(x, 0, cfg), 1, False))
        excess += [
            columns[search_columns(x, order, cfg)] / min(columns.values()) - 1,
            found / min(points) - 1,
        ]
    return max(excess)


def least_squares_update_ratio(ctx) -> float:
    """Largest ratio of layer losses once one block is binarized: least-squares correction to line 12's."""
    ratios, n = [], Config().block_size
    for (part, saliency), name in zip(_first_parts(ctx), _LAYERS, strict=True):
        W, H, _ = ctx.layer(f"model.layers.2.{name}")
        H = damped(H, Config().damp_ratio)
        U = inverse_cholesky(H)
        error = part - binarize_block(part, saliency, Config()).dequantize()
        spread = (spread_error(error, U[:n, :n], how) @ U[:n, n:] for how in COMPENSATIONS[:2])
        changes = (torch.cat([error, right], 1) for right in spread)
        diagonal, solve = (proxy_loss(torch.zeros_like(W), change, H) for change in changes)
        ratios.append(solve / diagonal)
    return max(ratios)
