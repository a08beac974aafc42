"""SpinQuant: QuaRot's rotations, but those that fold into weights are learned on the quantized network's loss.

Paper     Liu et al., ICLR 2025, arXiv:2405.16406v4 (numbers below refer to v4)   Entry  papers/spinquant.yaml
Scope     weights and inputs of nn.Linear in decoder blocks, keys, values; embeddings, lm_head, queries untouched
Deviates  calibration samples serve both stages, in order and again from the start where steps * batch_size exceeds
          them (official: 800 blocks for the rotations, 128 crops for GPTQ); float32 instead of bfloat16; ranges include
          zero; weight scales are rounded to float16; RMSNorm models keep the mean of their embedding rows, unless
          centre_embeddings asks for what the code does; matrices are orthonormalized before merging; where a norm
          follows a sublayer (Gemma 2), the stream rotation behind it is online; the ExecuTorch export (8-bit
          embeddings and head) is not offered
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant, quarot
from requant.reference_impls._activation import bare, transform_attention, transform_inputs
from requant.reference_impls._anatomy import anatomy, block_anatomies, heads
from requant.reference_impls._calib import check_calib
from requant.reference_impls._hadamard import (
    hadamard_transform,
    has_hadamard,
    random_hadamard,
    random_orthogonal,
)
from requant.reference_impls._places import RotatedNetwork, learn
from requant.reference_impls._quant import QuantizationError, check_choices
from requant.reference_impls._rotation import (
    centre_embeddings,
    fuse_norms,
    hadamard_before,
    rotate_stream,
    rotate_values,
    same_function,
)
from requant.reference_impls._straight_through import straight_through
from requant.reference_impls._stream_ends import stream_ends
from requant.reference_impls._walk import UnsupportedModelError, copy_model, require_whole, visit_blocks
from requant.reference_impls._weights import quantize_blockwise, quantize_linears

TINY = {"steps": 2, "batch_size": 2}


@dataclass(frozen=True)
class Config:
    """Defaults: SpinQuant_had at W4A4KV4 with GPTQ weights, Table 1."""

    w_bits: int = 4  # Table 1
    a_bits: int | None = 4  # Table 1; None = not quantized
    kv_bits: int | None = 4  # Table 1; None = not quantized
    group_size: int | None = None  # Table 1: one scale a row; 32 for the ExecuTorch export
    symmetric: bool = True  # code, weights; activations and cache are not (--a_asym, --k_asym, --v_asym)
    rounding: str = "gptq"  # Table 1, or "rtn"
    clip_search: bool = True  # scripts, --w_clip
    damp_ratio: float = 0.01  # code, --percdamp
    block_size: int = 128  # code, blocksize of GPTQ
    gptq_samples: int = 128  # code, --nsamples
    kv_group_size: int | None = 128  # scripts, --k_groupsize; narrower heads are one group
    online: bool = True  # SpinQuant_had: Hadamards on q, k and before down_proj; False: SpinQuant_no_had
    init: str = "hadamard"  # code, random Hadamard matrices; or "orthogonal", "identity"
    steps: int = 100  # scripts, --max_steps
    batch_size: int = 8  # scripts: 8 GPUs with a sequence each
    lr: float = 1.5  # scripts, --learning_rate; decays to zero by a cosine
    cayley_iterations: int = 5  # code
    learn_w_bits: int | None = None  # README: 16-bit weights while learning if GPTQ follows; None = 16
    centre_embeddings: bool = False  # code, in all models, though RMSNorm does not undo it
    seed: int = 0  # of the initial rotations


@dataclass(frozen=True)
class Rotations:
    """R1 [hidden, hidden] of the residual stream and one R2 [head_dim, head_dim] a block for values (Sec. 3.1)."""

    R1: Tensor
    R2: list[Tensor]


# --- rotation -------------------------------------------------------------------------------------------------------


def initial_rotations(model: nn.Module, cfg: Config) -> Rotations:
    """Where learning starts, float64. Raises: UnsupportedModelError for a size without a Hadamard matrix."""
    generator = torch.Generator().manual_seed(cfg.seed)

    def draw(size: int, what: str) -> Tensor:
        if cfg.init == "identity":
            return torch.eye(size, dtype=torch.float64)
        if cfg.init == "orthogonal":
            return random_orthogonal(size, generator)
        if not has_hadamard(size):
            raise UnsupportedModelError(
                f"no Hadamard matrix is known for the {what} {size}; try init='orthogonal'"
            )
        return random_hadamard(size, generator)

    widths = [heads(parts, model.config).head_dim for parts in block_anatomies(model)]
    R1 = draw(stream_ends(model).head.in_features, "hidden size")
    return Rotations(R1, [draw(width, "head_dim") for width in widths])


@torch.no_grad()
def rotate(model: nn.Module, rotations: Rotations, cfg: Config) -> nn.Module:
    """A copy with R1, R2 and R4 that computes the same logits, but for centred embeddings; R3 comes with the cache."""
    model = copy_model(model)
    if cfg.centre_embeddings:
        centre_embeddings(model)
    with same_function(model):
        fuse_norms(model)
        rotate_stream(model, rotations.R1)
        for parts, R2 in zip(map(anatomy, visit_blocks(model)), rotations.R2, strict=True):
            rotate_values(parts, heads(parts, model.config), R2)
            if cfg.online:
                hadamard_before(parts.block, parts.down, "; online=False needs none")
    return model


# --- quantizers -----------------------------------------------------------------------------------------------------


def _attend(query: Tensor, key: Tensor, value: Tensor, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """R3 on queries and keys after rotary embedding, then rounded keys and values."""
    if cfg.online:
        query, key = hadamard_transform(query), hadamard_transform(key)
    size = min(cfg.kv_group_size or key.shape[-1], key.shape[-1])
    if key.shape[-1] % size:
        raise QuantizationError(f"kv_group_size {size} does not divide head_dim {key.shape[-1]}")
    key, value = (_round_groups(x, cfg.kv_bits, size) for x in (key, value))
    return query, key, value


def _round_groups(x: Tensor, bits: int, size: int | None) -> Tensor:
    """Asymmetric rounding of x [..., d] in groups of `size`, with the gradient of the identity (Sec. 3.2)."""
    groups = x.unflatten(-1, (-1, size or x.shape[-1]))
    return straight_through(groups, partial(_quant.clipped_fake_quant, bits=bits)).flatten(-2)


def quantize_flow(model: nn.Module, cfg: Config) -> None:
    """Round cache and linear inputs of a rotated model when it runs, in place; o_proj in groups of a head."""
    for parts in map(bare, block_anatomies(model)):
        if cfg.kv_bits is not None:
            transform_attention(model, parts.attn, partial(_attend, cfg=cfg))
        width = heads(parts, model.config).head_dim
        for linears in (parts.qkv, [parts.o], parts.ups, [parts.down]) if cfg.a_bits is not None else ():
            size = width if linears == [parts.o] else None
            transform_inputs(parts.block, linears, partial(_round_groups, bits=cfg.a_bits, size=size))


# --- learning (Sec. 3.2) --------------------------------------------------------------------------------------------


def learnable(model: nn.Module, cfg: Config) -> tuple[RotatedNetwork, list[nn.Parameter]]:
    """The quantized network as a function of its rotations, and these: R1, then every R2."""
    initial = initial_rotations(model, cfg)
    R1, *R2 = matrices = [nn.Parameter(R.float().to(model.device)) for R in (initial.R1, *initial.R2)]
    unrotated = rotate(model, initial_rotations(model, replace(cfg, init="identity")), cfg).float()
    quantize_flow(unrotated, cfg)
    how = None if cfg.learn_w_bits is None else replace(cfg, w_bits=cfg.learn_w_bits, rounding="rtn")
    rounding = None if how is None else lambda W: quantize_weight(W, None, how)
    return RotatedNetwork(unrotated, lambda: (R1, R2), rounding), matrices


def learn_rotations(
    model: nn.Module, calib: Tensor, cfg: Config, watch: Callable[[list[Tensor]], None] | None = None
) -> Rotations:
    """Cayley SGD on {R1, R2}, all weights frozen; orthogonal matrices, float64.

    Args:
        calib: int64 [n_samples, seqlen].
        watch: called with R1 and all R2 after each step.
    """
    if not cfg.steps:
        return initial_rotations(model, cfg)
    require_whole(model, "spinquant with steps")
    network, matrices = learnable(model, cfg)
    R1, *R2 = learn(network, matrices, calib, cfg, watch=watch)
    return Rotations(R1, R2)


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Learn the rotations, merge them, round the weights with unquantized activations, then activations and cache.

    Raises: QuantizationError without calib; UnsupportedModelError for a structure or size that cannot be rotated.
    """
    check_choices(cfg, init=("hadamard", "orthogonal", "identity"))
    check_calib(calib)
    rotations = learn_rotations(model, calib.to(model.device), cfg)
    rotated, rounding = rotate(model, rotations, cfg), partial(quantize_weight, cfg=cfg)
    if cfg.rounding == "gptq":
        rotated = quantize_blockwise(rotated, calib[: cfg.gptq_samples], rounding, true_sequential=True)
    else:
        rotated = quantize_linears(rotated, rounding)
    quantize_flow(rotated, cfg)
    return rotated


# --- weights: QuaRot's rounding -------------------------------------------------------------------------------------


def _as_quarot(cfg: Config) -> quarot.Config:
    names = ("w_bits", "group_size", "symmetric", "rounding", "clip_search", "damp_ratio", "block_size")
    return quarot.Config(**{name: getattr(cfg, name) for name in names})


def quantize_weight(W: Tensor, H: Tensor | None, cfg: Config) -> Tensor:
    """Round a rotated weight [d_out, d_in] by GPTQ or to nearest, ranges by clip search; see `quarot`."""
    return quarot.quantize_weight(W, H, _as_quarot(cfg))


def pack_weight(W: Tensor, H: Tensor | None, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer; see `quarot.pack_weight`."""
    return quarot.pack_weight(W, H, _as_quarot(cfg))


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    return quarot.unpack_weight(packed, _as_quarot(cfg))


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + 16/g; learned rotations are folded, fixed ones constructed, so they store nothing."""
    return quarot.bits_per_weight(d_out, d_in, _as_quarot(cfg))
