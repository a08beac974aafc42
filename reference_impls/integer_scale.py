"""Integer Scale: group scales become integers, so that a fine-grained product adds up in int32 and is converted once.

Paper     Li et al., 2024, arXiv:2405.14597v2 (numbers below refer to v2)   Entry  papers/integer_scale.yaml
Scope     weights and inputs of nn.Linear in decoder blocks; embeddings, lm_head, norms, attention and cache untouched
Deviates  no official code was found, and the paper was read in abstracts and summaries: the numbers of equations, the
          default of the amplifier, its heuristic, and what Llama-3 gets (rotation, more bits for down_proj) are
          recalled. AWQ searches its scales on its own asymmetric grid; OmniQuant learns clipping alone, with unrounded
          activations; a layer on its own has AWQ's clipping, and OmniQuant's for its own output. A scale that would
          become 0, or a sum that could leave int32, is an error. Products and sums are int32 tensors; activation
          scales, and the one conversion, are float32
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant, awq, quarot
from requant.reference_impls._activation import bare
from requant.reference_impls._anatomy import anatomy
from requant.reference_impls._calib import check_calib
from requant.reference_impls._integer_product import integer_product
from requant.reference_impls._quant import QuantizationError, check_choices
from requant.reference_impls._walk import copy_model, named_linears, replace_module, visit_blocks, walk_blocks
from requant.reference_impls.parts.integer_scale_codes import BASES, base_codes, clipped_codes


@dataclass(frozen=True)
class Config:
    """Defaults: fine-grained W4A8 with the fixed amplifier."""

    w_bits: int = 4  # W4A8 throughout
    a_bits: int = 8  # one dynamic scale a token
    group_size: int | None = 128  # inputs per scale
    amplifier: int | None = 1024  # recalled; None = the heuristic: double until all scales reach 1
    extra_bits: int = 0  # doublings on top of the heuristic; ours, 0 = as the paper
    rounding: str = (
        "rtn"  # base quantizer: "rtn", which needs no data, "gptq", "awq" or "omniquant" (abstract)
    )
    rotate: bool = False  # recalled, for Llama-3: QuaRot's rotations before anything else
    down_bits: int | None = None  # recalled, for Llama-3: weights of down_proj; None = w_bits
    epochs: int = 20  # of base "omniquant", its Sec. 4.1
    integer: bool = True  # False = float group scales, the scheme it is compared with

    def __post_init__(self) -> None:
        check_choices(self, rounding=BASES)
        if not all(2 <= bits <= 8 for bits in (self.w_bits, self.a_bits, self.down_bits or 8)):
            raise QuantizationError(
                "w_bits, a_bits and down_bits must be from 2 to 8: codes are 8-bit integers"
            )
        if self.amplifier is not None and (self.amplifier < 1 or self.amplifier & (self.amplifier - 1)):
            raise QuantizationError(f"amplifier {self.amplifier} is no power of two")


# --- weights ----------------------------------------------------------------------------------------------------------


def choose_amplifier(scale: Tensor, cfg: Config) -> int:
    """The fixed amplifier, or the heuristic (recalled): double from 1 until the smallest scale reaches 1."""
    if cfg.amplifier is not None:
        return cfg.amplifier
    smallest, amplifier = float(scale.min()), 1
    while smallest * amplifier < 1:
        amplifier *= 2
    return amplifier << cfg.extra_bits


def integer_scales(codes: Tensor, scale: Tensor, cfg: Config) -> tuple[Tensor, int]:
    """S = round(s * amplifier), int32 [d_out, n_groups, 1], and the amplifier (Eq. 2).

    Raises: QuantizationError if a group with codes other than 0 gets scale 0, or an output could leave int32.
    """
    amplifier = choose_amplifier(scale[codes.any(-1)] if codes.any() else scale, cfg)
    S = (scale * amplifier).round().to(torch.int32)
    if ((S == 0)[..., 0] & codes.any(-1)).any():
        raise QuantizationError(
            f"amplifier {amplifier} rounds a group scale of {float(scale.min()):.2g} to 0; take a larger one, or None"
        )
    peak = largest_accumulator(codes, S, cfg.a_bits)
    if peak >= 2**31 or int(S.max()) >= 2**15:
        raise QuantizationError(
            f"with amplifier {amplifier} an int32 sum could reach {peak} and the largest scale is {int(S.max())}; "
            "take a smaller amplifier"
        )
    return S, amplifier


def largest_accumulator(codes: Tensor, S: Tensor, a_bits: int) -> int:
    """The largest magnitude that any input codes could give to an output: (2^(a-1) - 1) max_n sum_g S_g sum_k |w_k|."""
    return int((2 ** (a_bits - 1) - 1) * (codes.long().abs().sum(-1) * S[..., 0].long()).sum(-1).max())


def effective_scale(codes: Tensor, scale: Tensor, cfg: Config) -> Tensor:
    """The scale that is really applied: S / amplifier (exact, a power of two), or the float scale."""
    if not cfg.integer:
        return scale
    S, amplifier = integer_scales(codes, scale, cfg)
    return S / amplifier


def quantize_weight(W: Tensor, H: Tensor | None, cfg: Config) -> Tensor:
    """Codes as the base quantizer left them, times S / amplifier: float32 [d_out, d_in]. H only for GPTQ."""
    codes, scale = base_codes(W, H, cfg)
    return (codes * effective_scale(codes, scale, cfg)).flatten(1)


def pack_weight(W: Tensor, H: Tensor | None, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer: packed codes, int16 scales and the exponent of the amplifier in a byte."""
    codes, scale = base_codes(W, H, cfg)
    packed = {
        "shape": torch.tensor(codes.shape, dtype=torch.int32),
        "codes": _quant.pack_bits(codes.long() + 2 ** (cfg.w_bits - 1), cfg.w_bits),
    }
    if not cfg.integer:
        return packed | {"scale": scale.half()}
    S, amplifier = integer_scales(codes, scale, cfg)
    exponent = torch.tensor([amplifier.bit_length() - 1], dtype=torch.uint8)
    return packed | {"scale": S.to(torch.int16), "exponent": exponent}


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    shape = tuple(packed["shape"].tolist())
    codes = _quant.unpack_bits(packed["codes"], cfg.w_bits, shape) - 2 ** (cfg.w_bits - 1)
    amplifier = 2 ** int(packed["exponent"]) if cfg.integer else 1
    return (codes * (packed["scale"].float() / amplifier)).flatten(1)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + 16/g, and 8 bits a layer for the amplifier."""
    return cfg.w_bits + 16 / (cfg.group_size or d_in) + (8 / (d_out * d_in) if cfg.integer else 0)


# --- the product ------------------------------------------------------------------------------------------------------


class GroupedLinear(nn.Module):
    """y = s_a / amplifier * float(sum_g S_g (x_g . w_g)), everything in the brackets int32 (Eq. 2).

    With float scales every group's sum is converted on its own instead: y = s_a sum_g s_g float(x_g . w_g) (Eq. 1).
    """

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, cfg: Config):
        """codes and scale from `base_codes`."""
        super().__init__()
        S, self.amplifier = integer_scales(codes, scale, cfg) if cfg.integer else (scale, 1)
        self.register_buffer("codes", codes)  # int8 [d_out, n_groups, group]
        self.register_buffer("scale", S)  # int32 (or float32) [d_out, n_groups, 1]
        self.bias, self.a_bits = bias, cfg.a_bits

    @property
    def weight(self) -> Tensor:
        """The effective weight, dequantized, for model code that looks at it."""
        return (self.codes * (self.scale / self.amplifier)).flatten(1)

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int32 and float scale [..., 1] of each token, symmetric."""
        limit = 2 ** (self.a_bits - 1) - 1
        scale = _quant.absmax_scale(x, self.a_bits)
        return (x / scale).round().clamp(-limit, limit).to(torch.int32), scale

    def accumulate(self, x_int: Tensor) -> Tensor:
        """sum_g S_g (x_g . w_g) for codes [n_tokens, d_in]: [n_tokens, d_out], of the scales' dtype."""
        total = torch.zeros(len(x_int), len(self.codes), dtype=self.scale.dtype)
        for g, x_g in enumerate(x_int.split(self.codes.shape[-1], 1)):
            inner = integer_product(x_g, self.codes[:, g].T)  # exact
            total += inner * self.scale[:, g].T  # int32; or float, the conversion that a group costs
        return total

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = self.quantize_input(x)
        total = self.accumulate(codes.flatten(0, -2)).unflatten(0, x.shape[:-1])
        y = total.to(x.dtype) * (scale / self.amplifier)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Replace every linear of the decoder blocks by a `GroupedLinear`.

    Args:
        calib: int64 [n_samples, seqlen]; not used by rounding "rtn", None there.
    Raises: QuantizationError as `integer_scales`, for groups that do not divide an input, or a base without calib.
    """
    model = quarot.rotate(model, quarot.Config()) if cfg.rotate else copy_model(model)
    if cfg.rounding == "awq":  # scales folded and ranges clipped: what is left is rounding to nearest
        model = awq.transform(model, calib, awq.Config(cfg.w_bits, cfg.group_size))
        cfg = replace(cfg, rounding="rtn")
    if cfg.rounding == "rtn":
        for module in visit_blocks(model):
            own, linears = _settings(module, cfg), named_linears(module)
            codes = {name: base_codes(one.weight.float(), None, own[name]) for name, one in linears.items()}
            _replace_linears(module, codes, own)
        return model
    check_calib(calib)
    for block in walk_blocks(model, calib, propagate="both" if cfg.rounding == "omniquant" else "quantized"):
        own, linears = _settings(block.module, cfg), named_linears(block.module)
        if cfg.rounding == "omniquant":
            codes = clipped_codes(block, own)
        else:
            hessians = block.hessians()
            codes = {
                name: base_codes(one.weight.float(), hessians[name], own[name])
                for name, one in linears.items()
            }
        _replace_linears(block.module, codes, own)
    return model


def _settings(block: nn.Module, cfg: Config) -> dict[str, Config]:
    """The settings of each linear of a block, by name: down_proj may have other bits."""
    linears = named_linears(block)
    if cfg.down_bits is None:
        return dict.fromkeys(linears, cfg)
    wider, down = replace(cfg, w_bits=cfg.down_bits), bare(anatomy(block)).down
    return {name: wider if linear is down else cfg for name, linear in linears.items()}


def _replace_linears(
    block: nn.Module, codes: Mapping[str, tuple[Tensor, Tensor]], settings: Mapping[str, Config]
) -> None:
    for name, linear in named_linears(block).items():
        replace_module(block, name, GroupedLinear(*codes[name], linear.bias, settings[name]))
