"""QuaRot: Hadamard rotations that leave the network's function alone and its activations without outliers.

Paper     Ashkboos et al., NeurIPS 2024, arXiv:2404.00456v2 (numbers below refer to v2)   Entry  papers/quarot.yaml
Scope     weights and inputs of nn.Linear in decoder blocks, keys, values; embeddings, lm_head, queries untouched
Deviates  RMSNorm models keep the mean of their embedding rows, unless centre_embeddings asks for what the official code
          does; random signs come before the Hadamard matrix, as in that code; rotation "none" leaves keys alone too;
          scales are rounded to float16; Hadamard bases are constructed, so they are other matrices than the code's
          tables; where a norm follows a sublayer (Gemma 2), the stream rotation behind it is online; groups must
          divide the MLP width, and the code's 8-bit down_proj flag is not offered
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant, gptq
from requant.reference_impls._activation import transform_attention, transform_inputs
from requant.reference_impls._anatomy import BlockAnatomy, anatomy, block_anatomies, heads
from requant.reference_impls._calib import check_calib
from requant.reference_impls._clip_search import grid_of_share, search_grid
from requant.reference_impls._hadamard import (
    hadamard_matrix,
    hadamard_transform,
    has_hadamard,
    random_hadamard,
    random_orthogonal,
)
from requant.reference_impls._quant import QuantizationError, check_choices
from requant.reference_impls._rotation import (
    centre_embeddings,
    fuse_norms,
    rotate_stream,
    rotate_values,
    same_function,
)
from requant.reference_impls._stream_ends import stream_ends
from requant.reference_impls._walk import (
    UnsupportedModelError,
    copy_model,
    decoder_blocks,
    named_linears,
    visit_blocks,
)
from requant.reference_impls._weights import quantize_blockwise, quantize_linears


@dataclass(frozen=True)
class Config:
    """Defaults: the W4A4KV4 rows with GPTQ weights of Table 1."""

    w_bits: int = 4  # Table 1
    a_bits: int | None = 4  # Table 1; None = not quantized
    kv_bits: int | None = 4  # Table 1; None = not quantized
    group_size: int | None = None  # inputs per scale of weights and activations; 128 for QuaRot-128G
    symmetric: bool = True  # Sec. 5: weights symmetric per output channel; False in the weight-only tables
    rounding: str = "gptq"  # "gptq" (Table 1) or "rtn", which needs no data
    clip_search: bool = True  # Sec. 5 of weight ranges; code --w_clip, off by default there
    damp_ratio: float = 0.01  # code --percdamp
    block_size: int = 128  # code, blocksize of GPTQ
    a_clip_ratio: float = 0.9  # Sec. 5; 1.0 is the code's default
    kv_clip_ratio: float = 0.95  # Sec. 5; 1.0 is the code's default
    kv_group_size: int | None = 128  # Sec. 5: the head dimension; narrower heads are one group
    rotation: str = "hadamard"  # or "orthogonal" (code --rotate_mode random), or "none" at all
    online: bool = True  # Stages 1b-1d: Hadamards before down_proj, across heads before o_proj, on q and k
    centre_embeddings: bool = False  # code, in all models, though RMSNorm does not undo it
    seed: int = 0  # of the random signs or the random orthogonal matrix


def _check(cfg: Config) -> None:
    check_choices(cfg, rounding=("gptq", "rtn"), rotation=("hadamard", "orthogonal", "none"))


# --- Stage 1: rotation ------------------------------------------------------------------------------------------


def across_heads(x: Tensor, n_heads: int) -> Tensor:
    """Hadamard over the head index of x [..., n_heads * head_dim]; with those inside heads the full one."""
    return hadamard_transform(x.unflatten(-1, (n_heads, -1)), -2).flatten(-2)


def _rotate_block(parts: BlockAnatomy, config, online: bool) -> None:
    """Stages 1b and 1c on one block, in place; online: what o and down read is transformed as well."""
    geometry = heads(parts, config)
    rotate_values(parts, geometry, hadamard_matrix(geometry.head_dim))  # inside heads: v's rows, o's columns
    before_o = partial(across_heads, n_heads=geometry.n_heads)
    for linear, before in ((parts.o, before_o), (parts.down, hadamard_transform)) if online else ():
        linear.weight.copy_(before(linear.weight.double()).to(linear.weight.dtype))
        transform_inputs(parts.block, [linear], before)


def _check_sizes(model: nn.Module, hidden: int, cfg: Config) -> None:
    """Raise UnsupportedModelError where a size that needs a Hadamard matrix has none."""
    needed = {"hidden size": hidden} if cfg.rotation == "hadamard" else {}
    for parts in block_anatomies(model):
        geometry = heads(parts, model.config)
        needed |= {"head_dim": geometry.head_dim}
        if cfg.online:
            needed |= {"number of heads": geometry.n_heads, "MLP width": parts.down.in_features}
    for name, size in needed.items():
        if not has_hadamard(size):
            remedy = "; online=False needs none" if name in ("number of heads", "MLP width") else ""
            raise UnsupportedModelError(f"no Hadamard matrix is known for the {name} {size}{remedy}")


@torch.no_grad()
def rotate(model: nn.Module, cfg: Config) -> nn.Module:
    """A rotated copy that computes the same logits, but for centred embeddings.

    Stage 1d, key rotation, comes with the cache (`quantize`).
    Raises: UnsupportedModelError for a structure, or a size, that cannot be rotated.
    """
    _check(cfg)
    model = copy_model(model)
    if cfg.rotation == "none":
        return model
    if cfg.centre_embeddings:
        centre_embeddings(model)
    with same_function(model):
        fuse_norms(model)
        hidden = stream_ends(model).head.in_features
        _check_sizes(model, hidden, cfg)
        draw = random_hadamard if cfg.rotation == "hadamard" else random_orthogonal
        rotate_stream(model, draw(hidden, torch.Generator().manual_seed(cfg.seed)))  # Stage 1a
        for parts in map(anatomy, visit_blocks(model)):
            _rotate_block(parts, model.config, cfg.online)
    return model


# --- Stage 2: quantization --------------------------------------------------------------------------------------


def _round(W: Tensor, H: Tensor | None, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [d_out, n_groups, group], scale and zero point [d_out, n_groups, 1] of one layer."""
    _check(cfg)
    choose = search_grid if cfg.clip_search else grid_of_share
    if cfg.rounding == "rtn":
        groups = _quant.grouped(W, cfg.group_size)
        scale, zero_point = choose(groups, cfg.w_bits, cfg.symmetric)
        return _quant.quantize(groups, scale, zero_point, cfg.w_bits), scale, zero_point
    if H is None:
        raise QuantizationError('rounding "gptq" needs H, the second moments of the inputs; or choose "rtn"')
    how = gptq.Config(cfg.w_bits, cfg.group_size, cfg.symmetric, cfg.damp_ratio, cfg.block_size)
    rounded = gptq.round_columns(W, H, how, choose)
    codes = _quant.grouped(rounded.codes.T, cfg.group_size)
    return codes, rounded.scale.T[..., None], rounded.zero_point.T[..., None]


def quantize_weight(W: Tensor, H: Tensor | None, cfg: Config) -> Tensor:
    """Round a rotated weight.

    Args:
        W: [d_out, d_in] float32; left unchanged.
        H: [d_in, d_in] float32, second moments of the rotated inputs; not used if cfg.rounding is "rtn".
    Returns: float32 [d_out, d_in], dequantized.
    """
    return _quant.dequantize(*_round(W, H, cfg)).flatten(1)


def quantize_tokens(x: Tensor, bits: int, group_size: int | None, clip_ratio: float) -> Tensor:
    """Stage 2b: symmetric rounding of each token of x [..., d], or group of it; levels -2^(b-1)..2^(b-1)-1."""
    limit = 2 ** (bits - 1)
    groups = x if group_size is None else _quant.grouped(x.flatten(0, -2), group_size)
    peak = groups.abs().amax(-1, keepdim=True)
    scale = (clip_ratio / (limit - 1) * peak).masked_fill(peak == 0, 1.0)
    return (groups / scale).round_().clamp_(-limit, limit - 1).mul_(scale).view(x.shape)


def quantize_cache(x: Tensor, cfg: Config) -> Tensor:
    """Stage 2c: asymmetric rounding of keys or values [batch, heads, seqlen, head_dim] in groups of channels."""
    size = min(cfg.kv_group_size or x.shape[-1], x.shape[-1])
    if x.shape[-1] % size:
        raise QuantizationError(
            f"kv_group_size {size} does not divide head_dim {x.shape[-1]}; choose a divisor or None"
        )
    groups = x.unflatten(-1, (-1, size))
    scale, zero_point = grid_of_share(groups, cfg.kv_bits, False, cfg.kv_clip_ratio)
    return _quant.dequantize(
        _quant.quantize(groups, scale, zero_point, cfg.kv_bits), scale, zero_point
    ).flatten(-2)


def rotate_attention(query: Tensor, key: Tensor, value: Tensor, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Between rotary embedding and attention: q H and k H, whose product is q k^T (Stage 1d), and a rounded cache."""
    if cfg.online and cfg.rotation != "none":
        query, key = hadamard_transform(query), hadamard_transform(key)
    if cfg.kv_bits is not None:
        key, value = quantize_cache(key, cfg), quantize_cache(value, cfg)
    return query, key, value


def quantize_activations(model: nn.Module, cfg: Config) -> None:
    """Stage 2b in place: the input of every block linear, after its online Hadamard where it has one."""
    round_tokens = partial(
        quantize_tokens, bits=cfg.a_bits, group_size=cfg.group_size, clip_ratio=cfg.a_clip_ratio
    )
    for block in decoder_blocks(model):
        transform_inputs(block, named_linears(block).values(), round_tokens)


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Rotate, round the weights with unquantized activations, then quantize activations and cache.

    Args:
        calib: int64 [n_samples, seqlen]; may be None if cfg.rounding is "rtn".
    Raises: as `rotate`; QuantizationError without calib where GPTQ needs it.
    """
    _check(cfg)
    if cfg.rounding == "gptq":
        check_calib(calib)
    rotated = rotate(model, cfg)
    if cfg.rounding == "gptq":  # Stage 2a; inputs come from the already quantized blocks
        rotated = quantize_blockwise(
            rotated, calib, lambda W, H: quantize_weight(W, H, cfg), true_sequential=True
        )
    else:
        rotated = quantize_linears(rotated, lambda W, H: quantize_weight(W, H, cfg))
    if cfg.kv_bits is not None:
        for parts in block_anatomies(rotated):
            transform_attention(rotated, parts.attn, partial(rotate_attention, cfg=cfg))
    if cfg.a_bits is not None:
        quantize_activations(rotated, cfg)
    return rotated


def pack_weight(W: Tensor, H: Tensor | None, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer: packed codes and float16 scales; zero points only if asymmetric."""
    return _quant.pack_affine(*_round(W, H, cfg), cfg.w_bits, cfg.symmetric)


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    return _quant.unpack_affine(packed, cfg.w_bits, cfg.symmetric)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + 16/g, and b/g more if asymmetric; rotations are folded or constructed, so they store nothing."""
    return _quant.affine_bits(cfg.w_bits, cfg.group_size, d_in, cfg.symmetric)
