"""I-LLM: smoothing between all operators of a block, learned, and then every operator of the block on integers.

Paper     Hu et al., 2024, arXiv:2405.17849v2 (numbers below refer to v2)   Entry  papers/i_llm.yaml
Scope     decoder blocks of Llama, Mistral, Qwen2 and OPT, all operators; embeddings, learned positions, final norm and
          lm_head stay float
Deviates  FSBR follows the official code, but q/k factors are tied over rotary pairs (tie_rotary); ranges of
          activations include 0, and weights end on dyadic grids. The code has no integer operator: those here are
          reconstructed from implementations by others of Algorithms 1-4 and Eqs. 2-8. DI-Exp gets guard bits (0 = as
          printed), and M of DI-SwiGLU is at least 0. The residual stream has 16-bit codes a token, from which DI-Norm
          reads, unless norm_bits gives its input static codes a channel (the paper: 8 bits a channel); the input of
          rotary embedding stays wide, its tables have 14 bits; values are brought to one scale a head before they are
          summed; eps and biases are kept. No KV cache is kept between calls
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant
from requant.reference_impls._activation import transform_attention
from requant.reference_impls._anatomy import block_anatomies, heads
from requant.reference_impls._calib import check_calib
from requant.reference_impls._quant import QuantizationError, check_choices
from requant.reference_impls._straight_through import ClippingStrengths
from requant.reference_impls._walk import Block, copy_model, decoder_blocks, walk_blocks
from requant.reference_impls.parts.i_llm_block import IntegerBlock, require_integer_operators
from requant.reference_impls.parts.i_llm_dyadic import Dyadic, constant
from requant.reference_impls.parts.i_llm_fsbr import Smoothing
from requant.reference_impls.parts.i_llm_operators import ChannelGrids, DIMatMul, DINorm
from requant.reference_impls.smoothquant import channel_peaks


@dataclass(frozen=True)
class Config:
    """Defaults: W4A4 with integer operators (abstract)."""

    w_bits: int = 4  # abstract
    a_bits: int = 4  # abstract: inputs of linears and queries, per token
    kv_bits: int = 4  # code: keys and values, per token and head, as activations
    nonlinear_bits: int = 8  # Algorithms 2, 3: p_out, and the inputs of SwiGLU and softmax
    residual_bits: int = 16  # code: n_bits 16 of additions and norm inputs
    norm_bits: int | None = (
        None  # Algorithm 4: 8, on a static grid a channel; None = codes of the residual stream
    )
    softmax_clip: int | None = 15  # Eq. 10, c; None = the whole range of a row
    guard_bits: int = 16  # ours: left shift of what DI-Exp gets; 0 = Algorithm 1 as printed
    about_zero: bool = False  # Eqs. 2-8 round about the minimum; True, ours: about 0, as fake quantizers do
    smoothing: str = "full"  # FSBR; "partial": norms and values, as OmniQuant; "none"
    alpha: float = 0.5  # code, initial factors max|X|^alpha / max|W|^(1 - alpha)
    n_epochs: int = 20  # code, --epochs; 0 = initial factors
    batch_size: int = 1  # code, --batch_size
    let_lr: float = 5e-3  # code, --let_lr
    lwc_lr: float = 1e-2  # code, --lwc_lr
    tie_rotary: bool = True  # query-key factors cancel only then; the code leaves pairs free (False)
    integer: bool = True  # False: fake quantization, all that the code can evaluate
    seed: int = 0  # order of the samples (code: 2)

    def __post_init__(self) -> None:
        check_choices(self, smoothing=("full", "partial", "none"))
        if self.norm_bits is not None and not 2 <= self.norm_bits <= 16:
            raise QuantizationError(
                "norm_bits must be from 2 to 16, or None for the codes of the residual stream"
            )
        if not (2 <= self.w_bits <= 8 and 2 <= self.a_bits <= 8 and 2 <= self.kv_bits <= 8):
            raise QuantizationError("w_bits, a_bits and kv_bits must be from 2 to 8")


TINY = {"n_epochs": 1, "batch_size": 8}
ERROR_FLOOR = 5e-3  # weight clipping starts at 0.982 of the range


@torch.no_grad()
def settle(fsbr: Smoothing, config) -> IntegerBlock:
    """Write FSBR's parameters into its block, weights on their dyadic grids; returns the block on integers."""
    now, linears, parts, block = fsbr.smoothed(), {}, fsbr.parts, fsbr.block[0]
    for role, linear in fsbr.linears.items():
        codes = weight_codes(now[linear.weight], fsbr.cfg, fsbr.strengths[role])
        linears[role] = DIMatMul(codes, None if linear.bias is None else now[linear.bias])
        now[linear.weight] = codes.to_float()
    now.write()
    floats = {"attn": parts.attn_norm, "mlp": parts.mlp_norm}
    grids = channel_grids(block, floats, fsbr.cfg.norm_bits) if fsbr.cfg.norm_bits else {}
    norms = [DINorm(norm, grids.get(name)) for name, norm in floats.items()]
    a = fsbr.factors["act"] if parts.gated else None
    scaling = float(parts.attn.scaling)  # 1 / sqrt(head_dim)
    made = IntegerBlock(linears, norms, a, scaling, heads(parts, config), fsbr.cfg)
    made.attention_type = getattr(block.module, "attention_type", None)  # some models choose the mask by it
    return made


def channel_grids(block: Block, norms: Mapping[str, nn.Module], bits: int) -> dict[str, ChannelGrids]:
    """Static grids, one a channel, of what the norms of a block are fed."""
    seen: dict[str, list[Tensor]] = {name: [] for name in norms}
    block.observe(norms, lambda name, X: seen[name].append(X))
    return {name: ChannelGrids.of(torch.cat(batches), bits) for name, batches in seen.items()}


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Smooth and clip block by block (FSBR), then put integer blocks in the place of all decoder blocks.

    Args:
        calib: int64 [n_samples, seqlen].
    Raises: UnsupportedModelError for blocks other than those of Scope; QuantizationError without calib.
    """
    check_calib(calib)
    require_integer_operators(model)
    model, generator = copy_model(model), torch.Generator().manual_seed(cfg.seed)
    peaks = channel_peaks(model, calib)
    for parts in block_anatomies(model):
        transform_attention(model, parts.attn, lambda q, k, v: (q, k, v))
    blocks = decoder_blocks(model)
    for block in walk_blocks(
        model, calib, propagate="both"
    ):  # the next one is fed by `block.module`, in floats
        fsbr = Smoothing(block, model.config, peaks, cfg)
        fsbr.train_block(generator)
        made = settle(fsbr, model.config)
        if cfg.integer:
            blocks[block.index] = made
    return model


# --- weights ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def weight_codes(W: Tensor, cfg: Config, strengths: nn.Module | None = None) -> Dyadic:
    """W [d_out, d_in] on a dyadic grid a row; without strengths clipping is where it starts."""
    scale, zero_point = (strengths or ClippingStrengths(W)).grid(W, cfg.w_bits)
    m, k = constant(scale)
    step = torch.ldexp(m.float(), -k.float())
    codes = ((W / step).round() + zero_point).clamp(0, 2**cfg.w_bits - 1)
    return Dyadic(codes.long(), zero_point.long(), m, k)


def quantize_weight(W: Tensor, H: Tensor | None, cfg: Config) -> Tensor:
    """Round W [d_out, d_in] as before any training; smoothing is outside of it. H is ignored."""
    return weight_codes(W, cfg).to_float()


def pack_weight(W: Tensor, H: Tensor | None, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer: packed codes, and zero point, m and k of each row in a byte each."""
    rounded = weight_codes(W, cfg)
    small = {"zero_point": torch.uint8, "m": torch.uint8, "k": torch.int8}
    return {
        "shape": torch.tensor(W.shape, dtype=torch.int32),
        "codes": _quant.pack_bits(rounded.codes, cfg.w_bits),
        **{name: getattr(rounded, name).to(dtype) for name, dtype in small.items()},
    }


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    codes = _quant.unpack_bits(packed["codes"], cfg.w_bits, tuple(packed["shape"].tolist()))
    return Dyadic(codes, *(packed[name].long() for name in ("zero_point", "m", "k"))).to_float()


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + 24/d_in: codes, and three bytes a row."""
    return cfg.w_bits + 24 / d_in
