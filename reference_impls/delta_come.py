"""Delta-CoMe: what fine-tuning changed, split by singular value, with fewer bits for smaller singular values.

Paper     Ping et al., NeurIPS 2024, arXiv:2406.08903v1   Entry  papers/delta_come.yaml
Scope     the difference to a base model in every nn.Linear of the decoder blocks; all else, biases too, is taken from
          the fine-tuned model as it is
Deviates  GPTQ is ours (the official repository lacks its gptq.py), with scales rounded to float16; every width of a
          block is calibrated on that block's own inputs, where the released code feeds the second and third width, and
          the next block, with outputs of repeated passes; the input of U is computed from the second moments of the
          layer's input; ranks beyond those a matrix has are dropped; heads of any grouping need no special case
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant, _walk, gptq
from requant.reference_impls._anatomy import anatomy
from requant.reference_impls._calib import check_calib
from requant.reference_impls._quant import QuantizationError, pack_bits, unpack_bits
from requant.reference_impls._walk import copy_model, decoder_blocks, named_linears
from requant.reference_impls._weights import sequential_stages

TINY = {"ranks_attention": (1, 4, 8), "ranks_mlp": (1, 4, 8)}


@dataclass(frozen=True)
class Config:
    """Defaults: a 7B Llama at one sixteenth of float16, run.sh @646a1fb."""

    widths: tuple[int, ...] = (8, 3, 2)  # run.sh, --bits, largest singular values first; 16 = float16
    ranks_attention: tuple[int, ...] = (2, 32, 968)  # run.sh, attn_int8_cols, attn_int3_cols, attn_int2_cols
    ranks_mlp: tuple[int, ...] = (2, 32, 1428)  # run.sh, mlp_int8_cols, mlp_int3_cols, mlp_int2_cols
    group_size: int | None = 128  # run.sh, --groupsize: columns that share a scale, of V^T and of U
    act_order: bool = True  # run.sh, --act-order
    damp_ratio: float = 0.01  # llama.py, --percdamp

    def __post_init__(self) -> None:
        for name in ("widths", "ranks_attention", "ranks_mlp"):  # lists come from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not len(self.widths) == len(self.ranks_attention) == len(self.ranks_mlp):
            raise QuantizationError(f"widths and ranks must be of one length: {self}")


@dataclass(frozen=True)
class Factor:
    """A rounded U or V^T: codes [rows, columns] and `order` [columns] in processing order, grids [rows, n_groups]."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    order: Tensor

    def dequantize(self, group_size: int | None) -> Tensor:
        """float32 [rows, columns], columns in their own order."""
        group = torch.arange(len(self.order)) // (group_size or len(self.order))
        Q = _quant.dequantize(self.codes, self.scale[:, group], self.zero_point[:, group])
        return Q[:, self.order.argsort()]


Part = Factor | Tensor  # a tensor where it stays in float16


def round_factor(W: Tensor, H: Tensor, bits: int, cfg: Config) -> Factor:
    """GPTQ (its Algorithm 1) on W [rows, columns] with input second moments H; the last group may be smaller."""
    columns = W.shape[1]
    order = H.diagonal().argsort(descending=True) if cfg.act_order else torch.arange(columns)
    size = min(cfg.group_size or columns, columns)
    filling = -columns % size
    padded = torch.diag(torch.where(H.diagonal() == 0, 1.0, H.diagonal()).mean().repeat(columns + filling))
    padded[:columns, :columns] = H[order][:, order]  # the filling leaves the damping as it is
    grid = gptq.Config(bits, size, damp_ratio=cfg.damp_ratio)
    found = gptq.round_columns(nn.functional.pad(W[:, order], (0, filling)), padded, grid)
    return Factor(found.codes.T[:, :columns], found.scale.T, found.zero_point.T, order)


def decompose(D: Tensor, ranks: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """U [d_out, r], S [r] (as bfloat16 stores it) and V^T [r, d_in] of consecutive ranks; float32."""
    U, S, Vt = torch.linalg.svd(D.float(), full_matrices=False)
    ends = torch.tensor([0, *_clipped(ranks, len(S))]).cumsum(0).tolist()
    S = S.bfloat16().float()
    return [(U[:, a:b], S[a:b], Vt[a:b]) for a, b in pairwise(ends)]


def _clipped(ranks: Sequence[int], rank: int) -> list[int]:
    """Ranks of which the last are cut where the matrix has no more."""
    return [max(0, min(r, rank - sum(ranks[:i]))) for i, r in enumerate(ranks)]


def round_slice(U: Tensor, S: Tensor, Vt: Tensor, H: Tensor, bits: int, cfg: Config) -> tuple[Part, Part]:
    """Round V^T on the layer's inputs (H), then U on what the rounded V^T makes of them; 16 bits: float16, no H."""
    if bits == 16:
        return U.half(), Vt.half()
    rounded_V = round_factor(Vt, H, bits, cfg)
    Y = S[:, None] * rounded_V.dequantize(cfg.group_size)  # y = diag(S) V^T x, second moments Y H Y^T
    return round_factor(U, Y @ H @ Y.T, bits, cfg), rounded_V


def product_of_factors(U: Part, S: Tensor, Vt: Part, cfg: Config) -> Tensor:
    U, Vt = (f.float() if isinstance(f, Tensor) else f.dequantize(cfg.group_size) for f in (U, Vt))
    return U * S @ Vt


# --- whole models


@torch.no_grad()
def quantize(model: nn.Module, calib: Tensor | None, cfg: Config, base: nn.Module | None = None) -> nn.Module:
    """The fine-tuned model with its difference to `base` compressed.

    Blocks are done first to last on the outputs of those before them; inside a block widths largest first, each added
    to the weights before the next; inside a width {q, k, v}, {o}, {gate, up}, {down} (llama.py, llama_sequential).

    Args:
        base: a model with the same linears; None stands for linears of zeros, so that the weights themselves are
            what is compressed.
    Raises: QuantizationError if a linear of the base is missing or has another shape.
    """
    check_calib(calib)
    tuned, model = model, copy_model(model)
    for linear, weight in with_base(model, base):
        linear.weight.copy_(weight)
    for block, original in zip(_walk.walk_blocks(model, calib), _walk.visit_blocks(tuned), strict=True):
        _compress_block(block, named_linears(original), cfg)
    return model


def with_base(model: nn.Module, base: nn.Module | None) -> Iterator[tuple[nn.Linear, Tensor]]:
    """Each linear of the blocks with the weight of that name in the base, or zeros; block after block.

    Raises: QuantizationError as `quantize`.
    """
    if base is None:
        for block in _walk.visit_blocks(model):
            yield from ((linear, torch.zeros_like(linear.weight)) for linear in named_linears(block).values())
        return
    ours, theirs = (named_linears(decoder_blocks(each)) for each in (model, base))
    wrong = [
        name for name in ours if name not in theirs or ours[name].weight.shape != theirs[name].weight.shape
    ]
    if wrong:
        raise QuantizationError(f"the base has no linear of the name and shape of {', '.join(wrong[:3])}")
    for block, other in zip(_walk.visit_blocks(model), _walk.visit_blocks(base), strict=False):
        others = named_linears(other)
        yield from ((linear, others[name].weight) for name, linear in named_linears(block).items())


def _compress_block(block: _walk.Block, tuned: dict[str, nn.Linear], cfg: Config) -> None:
    parts = anatomy(block.module)
    attention = {id(linear) for linear in (*parts.qkv, parts.o)}
    linears = named_linears(block.module)
    slices = {}
    for name, linear in linears.items():
        ranks = cfg.ranks_attention if id(linear) in attention else cfg.ranks_mlp
        slices[name] = decompose(tuned[name].weight.float() - linear.weight.float(), ranks)
    for index, bits in enumerate(cfg.widths):
        before = {name: linear.weight.clone() for name, linear in linears.items()}
        for name, linear in linears.items():  # unrounded, until its turn comes
            linear.weight += product_of_factors(*slices[name][index], cfg)
        for stage in sequential_stages(block):
            hessians = block.hessians(stage) if bits != 16 else dict.fromkeys(stage)
            for name, linear in stage.items():
                U, S, Vt = slices[name][index]
                if len(S):
                    U, Vt = round_slice(U, S, Vt, hessians[name], bits, cfg)
                    linear.weight.copy_(before[name] + product_of_factors(U, S, Vt, cfg))


# --- one layer


def _rounded(D: Tensor, H: Tensor, cfg: Config) -> Iterator[tuple[int, Part, Tensor, Part]]:
    _quant.grouped(D, cfg.group_size)  # raises where groups do not divide d_in
    for bits, (U, S, Vt) in zip(cfg.widths, decompose(D, cfg.ranks_attention), strict=True):
        if len(S):
            rounded_U, rounded_V = round_slice(U, S, Vt, H, bits, cfg)
            yield bits, rounded_U, S, rounded_V


def quantize_weight(D: Tensor, H: Tensor, cfg: Config) -> Tensor:
    """Compress a difference D [d_out, d_in] with `ranks_attention`, all widths on the same H: float32, same shape."""
    return sum(
        (product_of_factors(U, S, Vt, cfg) for _, U, S, Vt in _rounded(D, H, cfg)), torch.zeros_like(D)
    )


def pack_weight(D: Tensor, H: Tensor, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for the difference of one layer: S (bfloat16), codes, grids and orders of both factors."""
    packed = {"shape": torch.tensor(D.shape, dtype=torch.int32)}
    for bits, U, S, Vt in _rounded(D, H, cfg):
        packed[f"{bits}_S"] = S.bfloat16()
        for key, factor in ((f"{bits}_U", U), (f"{bits}_V", Vt)):
            packed |= {key: factor} if isinstance(factor, Tensor) else _pack_factor(factor, key, bits, cfg)
    return packed


def _pack_factor(factor: Factor, key: str, bits: int, cfg: Config) -> dict[str, Tensor]:
    codes, zero_point = (pack_bits(t, bits) for t in (factor.codes, factor.zero_point))
    packed = {f"{key}_codes": codes, f"{key}_scale": factor.scale.half(), f"{key}_zero_point": zero_point}
    order = pack_bits(factor.order, (len(factor.order) - 1).bit_length())
    return packed | ({f"{key}_order": order} if cfg.act_order else {})


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    d_out, d_in = packed["shape"].tolist()
    D = torch.zeros(d_out, d_in)
    for bits in (bits for bits in cfg.widths if f"{bits}_S" in packed):
        S = packed[f"{bits}_S"].float()
        U = _unpack_factor(packed, f"{bits}_U", bits, (d_out, len(S)))
        D += product_of_factors(U, S, _unpack_factor(packed, f"{bits}_V", bits, (len(S), d_in)), cfg)
    return D


def _unpack_factor(packed: dict, key: str, bits: int, shape: tuple[int, int]) -> Part:
    if key in packed:
        return packed[key]
    scale, columns = packed[f"{key}_scale"].float(), shape[1]
    order = torch.arange(columns)
    if f"{key}_order" in packed:
        order = unpack_bits(packed[f"{key}_order"], (columns - 1).bit_length(), (columns,))
    zero_point = unpack_bits(packed[f"{key}_zero_point"], bits, tuple(scale.shape)).float()
    return Factor(unpack_bits(packed[f"{key}_codes"], bits, shape).float(), scale, zero_point, order)


def code_bits(d_out: int, d_in: int, widths: Sequence[int], ranks: Sequence[int]) -> float:
    """Bits per weight that the paper counts, 16 alpha: sum of b r_b (d_out + d_in) / (d_out d_in)."""
    return sum(b * r for b, r in zip(widths, ranks, strict=True)) * (d_out + d_in) / (d_out * d_in)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """`code_bits` of the difference with `ranks_attention`, and its grids, orders and singular values."""
    ranks = _clipped(cfg.ranks_attention, min(d_out, d_in))
    extra = 0
    for bits, r in zip(cfg.widths, ranks, strict=True):
        extra += 16 * r
        for rows, columns in ((d_out, r), (r, d_in)) if bits != 16 and r else ():
            extra += rows * math.ceil(columns / (cfg.group_size or columns)) * (16 + bits)
            extra += columns * (columns - 1).bit_length() if cfg.act_order else 0
    return code_bits(d_out, d_in, cfg.widths, ranks) + extra / (d_out * d_in)
