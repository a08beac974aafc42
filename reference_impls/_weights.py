"""Apply a layer-level weight quantizer to a whole model; the outer loop that weight-only methods share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from requant.reference_impls._anatomy import anatomy
from requant.reference_impls._calib import Calib
from requant.reference_impls._walk import Block, copy_model, named_linears, visit_blocks, walk_blocks

LayerQuantizer = Callable[
    [Tensor, Tensor | None], Tensor
]  # (W [d_out, d_in], H [d_in, d_in] or None) -> dequantized W


@torch.no_grad()
def quantize_linears(model: nn.Module, quantize_weight: LayerQuantizer) -> nn.Module:
    """A copy of the model in which every linear of the decoder blocks went through quantize_weight(W, None)."""
    model = copy_model(model)
    for block in visit_blocks(model):
        for linear in named_linears(block).values():
            linear.weight.copy_(quantize_weight(linear.weight.float(), None))
    return model


@torch.no_grad()
def quantize_blockwise(
    model: nn.Module,
    calib: Calib,
    quantize_weight: Callable[..., Tensor],
    *,
    true_sequential: bool = False,
    stacked: bool = True,
) -> nn.Module:
    """A copy of the model quantized block by block with each linear's input second moments H (GPTQ, Sec. 3 and code).

    The Hessians of a block come from its full-precision weights, its inputs from the already quantized
    blocks before it. With true_sequential the linears of a block are done in the order {q, k, v}, {o},
    {gate, up}, {down}, and later ones see what the earlier ones became. Linears fed the same tensor go
    through quantize_weight as one stacked
    matrix: rows are independent in most methods that use this loop. With stacked=False each linear goes alone,
    through quantize_weight(W, H, name), named as in its block.
    """
    model = copy_model(model)
    for block in walk_blocks(model, calib, several_lengths=True):
        stages = sequential_stages(block) if true_sequential else [named_linears(block.module)]
        for stage in stages:
            hessians = block.hessians(stage)
            for names in _by_hessian(hessians):
                linears = [stage[name] for name in names]
                if not stacked:
                    for name, linear in zip(names, linears, strict=True):
                        linear.weight.copy_(quantize_weight(linear.weight.float(), hessians[name], name))
                    continue
                together = torch.cat([linear.weight.float() for linear in linears])  # [sum of d_out, d_in]
                quantized = quantize_weight(together, hessians[names[0]])
                for linear, rows in zip(
                    linears, quantized.split([l.out_features for l in linears]), strict=True
                ):
                    linear.weight.copy_(rows)
    return model


def _by_hessian(hessians: dict[str, Tensor]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, H in hessians.items():
        groups.setdefault(id(H), []).append(name)
    return list(groups.values())


def sequential_stages(block: Block) -> list[dict[str, nn.Linear]]:
    """The linears of a block by name, {q, k, v}, {o}, {gate, up} and {down} one after the other."""
    parts = anatomy(block.module)
    order: Sequence[Sequence[nn.Linear]] = (parts.qkv, [parts.o], parts.ups, [parts.down])
    names = {id(linear): name for name, linear in named_linears(block.module).items()}
    stages = [
        [getattr(linear, "linear", linear) for linear in stage] for stage in order
    ]  # inside a QuantInput
    return [{names[id(linear)]: linear for linear in stage} for stage in stages]
