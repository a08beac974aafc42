"""Linears that read one input, the operator that can absorb a scale of it, and the module whose error decides on one.

AWQ's choices (arXiv:2306.00978v5 and its official code), place by place in a decoder block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls._anatomy import BlockAnatomy, anatomy, fold_channel_scale
from requant.reference_impls._equivalence import up_site, value_site
from requant.reference_impls._walk import Block


@dataclass(frozen=True)
class Pair:
    """Linears that read one input, with the operator that can divide this input by a scale.

    inspected: the module whose output error decides. fold(s) divides the input by s [d_in] and multiplies the
    weight columns by it, in place; None where nothing can absorb a scale. clips: linears that may be clipped.
    """

    linears: list[nn.Linear]
    inspected: nn.Module
    fold: Callable[[Tensor], None] | None
    clips: list[nn.Linear]


def _inspected(parts: BlockAnatomy, linears: list[nn.Linear]) -> nn.Module:
    if parts.mlp_norm is None:
        return parts.block
    if linears[0] is parts.qkv[0]:
        return parts.attn
    return parts.mlp if parts.mlp is not parts.block else parts.up


def block_pairs(block: nn.Module) -> list[Pair]:
    """The pairs of one block with the official code's choices (auto_scale.py).

    norm -> {q, k, v}: error of the attention module. norm -> {gate, up}: of the MLP, or of the up projection where
    the MLP is no module of its own (OPT). One norm for both (Phi): of the block. value -> output only if the two
    weights have one shape (no grouped-query attention). up -> down always. q, k and fused q/k/v are not clipped.
    """
    parts = anatomy(block)
    unclipped = {id(parts.q), id(parts.k), id(parts.fused_qkv)}
    pairs = []
    for norm, linears in parts.norm_groups:
        fold = partial(fold_channel_scale, norm, linears)
        clips = [linear for linear in linears if id(linear) not in unclipped]
        pairs.append(Pair(linears, _inspected(parts, linears), fold, clips))
    square = parts.v is not None and parts.v.weight.shape == parts.o.weight.shape
    output_fold = value_site(parts, parts.v, torch.arange(parts.v.out_features)).fold if square else None
    pairs.append(Pair([parts.o], parts.o, output_fold, [parts.o]))
    pairs.append(Pair([parts.down], parts.down, up_site(parts).fold, [parts.down]))
    return pairs


def _first(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def record_calls(block: Block, modules: list[nn.Module]) -> dict[nn.Module, list[tuple]]:
    """Run the block once on its calibration inputs: (args, kwargs, output) of each call of the given modules."""
    calls: dict[nn.Module, list[tuple]] = {module: [] for module in modules}

    def keep(module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
        calls[module].append((args, kwargs, _first(output)))

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in calls]
    try:
        block.run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def output_error(pair: Pair, calls: list[tuple], trial: Tensor) -> float:
    """Mean squared change of the inspected output when the pair's stacked weights are replaced by `trial`."""
    kept = [linear.weight.clone() for linear in pair.linears]
    for linear, rows in zip(pair.linears, trial.split([len(W) for W in kept]), strict=True):
        linear.weight.copy_(rows)
    changes = [(_first(pair.inspected(*args, **kwargs)) - output).float() for args, kwargs, output in calls]
    for linear, W in zip(pair.linears, kept, strict=True):
        linear.weight.copy_(W)
    return sum(float(change.square().sum()) for change in changes) / sum(change.numel() for change in changes)


def observed_pairs(block: Block) -> list[tuple[Pair, Tensor, list[tuple]]]:
    """Each pair with its input X [n_tokens, d_in] and the recorded calls of the module it is judged by."""
    pairs = block_pairs(block.module)
    calls = record_calls(block, [module for pair in pairs for module in (pair.linears[0], pair.inspected)])
    inputs = [torch.cat([args[0].flatten(0, -2) for args, _, _ in calls[pair.linears[0]]]) for pair in pairs]
    return [(pair, X.float(), calls[pair.inspected]) for pair, X in zip(pairs, inputs, strict=True)]
