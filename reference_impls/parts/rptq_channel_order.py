"""The channels inside a decoder block in another order, without a change of its function (RPTQ, arXiv:2304.01089)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from requant.reference_impls._anatomy import BlockAnatomy, heads
from requant.reference_impls._walk import replace_module


class ReorderedNorm(nn.Module):
    """A norm whose output channels come in another order."""

    def __init__(self, norm: nn.Module, order: Tensor):
        super().__init__()
        self.norm = norm
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)[..., self.order]


def move_rows(linear: nn.Linear, rows: Tensor, order: Tensor) -> None:
    """The given output rows of a linear, in another order; in place."""
    linear.weight[rows] = linear.weight[rows[order]]
    if linear.bias is not None:
        linear.bias[rows] = linear.bias[rows[order]]


def reader_groups(parts: BlockAnatomy) -> list[list[nn.Linear]]:
    """The linears of a block, those that read one tensor together: behind each norm, o, down."""
    return [*(readers for _norm, readers in parts.norm_groups), [parts.o], [parts.down]]


def reorder_channels(
    parts: BlockAnatomy, config, labels: dict[nn.Linear | str, Tensor]
) -> dict[nn.Linear | str, Tensor]:
    """Sort channels by label, norms by a gather and linears by their rows and columns; in place.

    Args:
        labels: int64 [n_channels] for the first linear of each of `reader_groups`, and "v" for the values, whose labels
            keep each head together; "q" and "k" stay where they are. Those of o follow the values.
    Returns: the order of each tensor moved: place -> channel.
    """
    orders = {key: one.argsort(stable=True) for key, one in labels.items() if key not in ("q", "k")}
    geometry, width = heads(parts, config), parts.down.in_features
    size, repeat = geometry.head_dim, geometry.n_heads // geometry.n_kv_heads
    within = orders["v"].view(-1, size) % size  # [n_kv_heads, head_dim]
    first = torch.arange(geometry.n_heads)[:, None] * size
    orders[parts.o] = (within.repeat_interleave(repeat, 0) + first).flatten()
    for norm, readers in parts.norm_groups:
        name = next(name for name, module in parts.block.named_modules() if module is norm)
        replace_module(parts.block, name, ReorderedNorm(norm, orders[readers[0]]))
    for readers in reader_groups(parts):
        for linear in readers:
            linear.weight.copy_(linear.weight[:, orders[readers[0]]])
    move_rows(geometry.value, geometry.value_rows, orders["v"])
    for linear in parts.ups:
        for rows in torch.arange(linear.out_features).split(width):
            move_rows(linear, rows, orders[parts.down])
    return orders
