"""ResQ: rotates to principal axes, keeps the eighth with the largest variance in 8 bits and the rest in 4.

Paper     Saxena et al., ICML 2025, arXiv:2412.14363v2 (numbers below refer to v2)   Entry  papers/resq.yaml
Scope     weights and inputs of nn.Linear in decoder blocks, keys, values; embeddings, lm_head untouched
Deviates  one calibration set gives the basis (all samples, at most basis_samples) and GPTQ (the first gptq_samples);
          ranges include zero; weight scales are rounded to float16; where a norm follows a sublayer (Gemma 2), the
          stream rotation behind it is online. Rotations are trained with activations and cache rounded, as they will
          be (the published script rounds nothing, which leaves the loss the same for all rotations), in float32
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant, gptq
from requant.reference_impls._activation import bare, transform_inputs
from requant.reference_impls._anatomy import block_anatomies, heads
from requant.reference_impls._calib import check_calib
from requant.reference_impls._clip_search import search_grid
from requant.reference_impls._quant import QuantizationError, check_choices
from requant.reference_impls._rotation import centre_embeddings, fuse_norms, same_function
from requant.reference_impls._walk import copy_model, named_linears, require_whole
from requant.reference_impls._weights import quantize_blockwise
from requant.reference_impls.parts.resq_bases import Bases, find_bases, fold, trained, turn_keys
from requant.reference_impls.parts.resq_basis_change import ChangeOfBasis
from requant.reference_impls.parts.resq_column_parts import (
    Part,
    pack_parts,
    round_parts,
    round_tokens,
    unpack_parts,
)


@dataclass(frozen=True)
class Config:
    """Defaults: W4A4KV4 with an eighth in 8 bits, the main table."""

    w_bits: int = 4  # main table
    a_bits: int | None = 4  # main table; None = not quantized
    kv_bits: int | None = 4  # main table; None = not quantized
    high_bits: int = 8  # scripts, --high_bits
    high_fraction: float = 0.125  # scripts, --high_fraction; 0 = uniform
    qk_bits: int | None = 8  # code: queries, keys and their rotation before that product; None = not rounded
    subspace: str = "principal"  # or "channels", by their sum of |x|: QUIK's choice (code, rotate_mode)
    mix: bool = True  # Sec. 4: a random rotation inside each part
    rounding: str = "gptq"  # or "rtn"
    clip_search: bool = True  # scripts, --w_clip
    damp_ratio: float = 0.01  # code, --percdamp
    block_size: int = 128  # code, blocksize of GPTQ
    gptq_samples: int = 128  # code, --nsamples of ptq.py
    basis_samples: int = 512  # scripts, --nsamples of get_basis.py
    basis_damp_ratio: float = 0.01  # code: of the mean diagonal, added to second moments
    rotation_granularity: str = "full_shared"  # scripts; a stream basis "per_layer", "one_per_decoder"
    change_bits: int | None = 8  # code: the stream where it is taken from basis to basis; None = not rounded
    train_rotations: bool = False  # scripts; True learns those inside the parts, but for the keys'
    steps: int = 100  # scripts, --max_steps
    batch_size: int = 1  # scripts: one GPU with a sequence
    lr: float = 1.5  # scripts, --learning_rate; decays to zero by a cosine
    momentum: float = 0.9  # code
    cayley_iterations: int = 5  # code
    centre_embeddings: bool = False  # code, in all models, though RMSNorm does not undo it
    seed: int = 0  # of the random rotations

    def high(self, width: int) -> int:
        """How many of `width` axes are kept in high_bits: the last ones."""
        return int(self.high_fraction * width)

    def widths(self, width: int, bits: int) -> list[tuple[int, int]]:
        """(axes, bits) of the low part, which has `bits`, and, if there is one, of the high part."""
        n_high = self.high(width)
        return [(width - n_high, bits), (n_high, self.high_bits)][: 2 if n_high else 1]


def _check(cfg: Config) -> None:
    check_choices(cfg, rounding=("gptq", "rtn"), subspace=("principal", "channels"))
    check_choices(cfg, rotation_granularity=("full_shared", "one_per_decoder", "per_layer"))
    if not 0 <= cfg.high_fraction < 1:
        raise QuantizationError(f"high_fraction is {cfg.high_fraction}; choose a share in [0, 1)")
    if cfg.train_rotations and cfg.rotation_granularity != "full_shared":  # an assertion in the code
        raise QuantizationError('rotations are trained with rotation_granularity "full_shared" alone')


# --- rotation (Sec. 4) ----------------------------------------------------------------------------------------------


@torch.no_grad()
def rotate(model: nn.Module, calib: Tensor, cfg: Config) -> nn.Module:
    """A copy that computes the same logits with its stream, values, keys and MLP activations rotated (Sec. 4).

    With centred embeddings they are others.
    Raises: UnsupportedModelError for a structure, or an MLP width, that cannot be rotated.
    """
    _check(cfg)
    check_calib(calib)
    model = copy_model(model)
    if cfg.centre_embeddings:
        centre_embeddings(model)
    with same_function(model):
        fuse_norms(model)
        fold(model, bases_of(model, calib, cfg))
    return model


def bases_of(model: nn.Module, calib: Tensor, cfg: Config) -> Bases:
    """Bases of a model with fused norms; with cfg.train_rotations those with a smaller loss of the rounded network."""
    bases = find_bases(model, calib, cfg)
    if not cfg.train_rotations:
        return bases
    require_whole(model, "resq with train_rotations")
    return trained(rounded_flow(model, bases, cfg), bases, calib.to(model.device), cfg)


def rounded_flow(model: nn.Module, bases: Bases, cfg: Config) -> nn.Module:
    """A float32 copy of a model with fused norms that has the bases, activations and cache rounded, weights not."""
    rounded = copy_model(model).float()
    fold(rounded, bases)
    quantize_flow(rounded, cfg)
    return rounded


# --- quantizers -----------------------------------------------------------------------------------------------------


def quantize_parts(x: Tensor, bits: int, cfg: Config, width: int | None = None) -> Tensor:
    """Asymmetric rounding of each `width` numbers (default: all) of x [..., d], the low and the high part apart."""
    groups = x if width is None else x.unflatten(-1, (-1, width))
    return round_parts(groups, cfg.widths(groups.shape[-1], bits)).view(x.shape)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, U: Tensor, cfg: Config
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys times U after rotary embedding, and a rounded cache; all per token and head."""
    if cfg.qk_bits is not None:
        query, key = (round_tokens(x, cfg.qk_bits) for x in (query, key))
        U = _quant.absmax_fake_quant(U.to(key), cfg.qk_bits, per_tensor=True)
    query, key, value = turn_keys(query, key, value, U)
    return query, quantize_parts(key, cfg.kv_bits, cfg), quantize_parts(value, cfg.kv_bits, cfg)


def quantize_flow(model: nn.Module, cfg: Config) -> None:
    """Round cache, linear inputs and what changes its basis when a rotated model runs, in place."""
    for change in (module for module in model.modules() if isinstance(module, ChangeOfBasis)):
        change.bits = None if cfg.a_bits is None else cfg.change_bits
    for parts in map(bare, block_anatomies(model)):
        if cfg.kv_bits is not None:
            U = parts.attn.requant_transform.keywords["U"]
            parts.attn.requant_transform = partial(_attend, U=U, cfg=cfg)
        if cfg.a_bits is None:
            continue
        plain = partial(quantize_parts, bits=cfg.a_bits, cfg=cfg)
        by_head = partial(plain, width=heads(parts, model.config).head_dim)
        uniform = partial(round_tokens, bits=cfg.a_bits)
        stages = ((parts.qkv, plain), ([parts.o], by_head), (parts.ups, plain), ([parts.down], uniform))
        for linears, rounding in stages:
            transform_inputs(parts.block, linears, rounding)


# --- weights --------------------------------------------------------------------------------------------------------


def _round(W: Tensor, H: Tensor | None, cfg: Config) -> list[Part]:
    """The low part and, if there is one, the high part."""
    _check(cfg)
    choose = search_grid if cfg.clip_search else _quant.absmax_qparams
    widths = cfg.widths(W.shape[1], cfg.w_bits)
    columns = W.split([n for n, _ in widths], 1)
    grids = [choose(x, bits, True) for x, (_, bits) in zip(columns, widths, strict=True)]
    if cfg.rounding == "rtn":
        codes = [
            _quant.quantize(x, *grid, bits) for x, grid, (_, bits) in zip(columns, grids, widths, strict=True)
        ]
    elif H is None:
        raise QuantizationError('rounding "gptq" needs H, the second moments of the inputs; or choose "rtn"')
    else:
        size = math.gcd(*(n for n, _ in widths))  # of groups, of which the last ones are the high part
        each = [index for index, (n, _) in enumerate(widths) for _ in range(n // size)]
        turns = iter([grids[index] for index in each])
        how = gptq.Config(cfg.w_bits, size, True, cfg.damp_ratio, cfg.block_size, static_groups=True)
        rounded = gptq.round_columns(
            W, H, how, lambda *_: next(turns), widths=[widths[index][1] for index in each]
        )
        codes = rounded.codes.T.split([n for n, _ in widths], 1)
    return [Part(c, grid[0], bits) for c, grid, (_, bits) in zip(codes, grids, widths, strict=True)]


def quantize_weight(W: Tensor, H: Tensor | None, cfg: Config) -> Tensor:
    """Round a rotated weight by GPTQ or to nearest, its last columns (`Config.high`) in high_bits.

    Args:
        W: [d_out, d_in] float32; left unchanged.
        H: [d_in, d_in] float32, second moments of the rotated inputs; not used if cfg.rounding is "rtn".
    Returns: float32 [d_out, d_in], dequantized.
    """
    return torch.cat([part.dequantize() for part in _round(W, H, cfg)], 1)


def _by_role(model: nn.Module, cfg: Config) -> Callable[[Tensor, Tensor, str], Tensor]:
    """`quantize_weight` by a linear's name in its block: o's high columns are the last of each head, down has none."""
    parts = bare(block_anatomies(model)[0])
    names = {id(linear): name for name, linear in named_linears(parts.block).items()}
    head = heads(parts, model.config).head_dim
    columns = torch.arange(parts.o.in_features).view(-1, head)
    low, high = columns.split([head - cfg.high(head), cfg.high(head)], 1)
    order = torch.cat([low.flatten(), high.flatten()])

    def rounding(W: Tensor, H: Tensor, name: str) -> Tensor:
        if name == names[id(parts.down)]:
            return quantize_weight(W, H, replace(cfg, high_fraction=0.0))
        if name == names[id(parts.o)]:
            return quantize_weight(W[:, order], H[order][:, order], cfg)[:, order.argsort()]
        return quantize_weight(W, H, cfg)

    return rounding


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Rotate, round the weights with unquantized activations, then activations and cache.

    Raises: QuantizationError without calib; UnsupportedModelError as `rotate`.
    """
    rotated = rotate(model, calib, cfg)
    samples = calib[: cfg.gptq_samples if cfg.rounding == "gptq" else 1]
    rotated = quantize_blockwise(
        rotated, samples, _by_role(rotated, cfg), true_sequential=True, stacked=False
    )
    quantize_flow(rotated, cfg)
    return rotated


def pack_weight(W: Tensor, H: Tensor | None, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer: codes and a float16 scale a row for each part."""
    return pack_parts(_round(W, H, cfg))


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    return unpack_parts(packed, cfg.widths(int(packed["shape"][1]), cfg.w_bits))


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """The mean width and a float16 scale a row for each part; folded rotations store nothing.

    Products between bases, hidden^2 numbers for each block or sublayer, belong to no layer and are left out.
    """
    return sum(bits * n + 16 for n, bits in cfg.widths(d_in, cfg.w_bits)) / d_in
