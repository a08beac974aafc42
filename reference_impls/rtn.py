"""RTN: every weight rounded to the nearest point of a min-max grid; the baseline all methods are compared with.

Paper     no paper; the baseline as GPTQ's official code runs it (arXiv:2210.17323v2, Sec. 4 "Baselines")
          Entry  papers/rtn.yaml
Scope     weights of nn.Linear in decoder blocks; activations and embeddings untouched unless a_bits is set
Deviates  group_size and a_bits are options here; the GPTQ repository's own baseline ignores its group-size
          flag
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from requant.reference_impls import _quant
from requant.reference_impls._activation import wrap_linears
from requant.reference_impls._walk import decoder_blocks
from requant.reference_impls._weights import quantize_linears

DATA_FREE = True  # the outcome depends on neither calibration tokens nor a seed


@dataclass(frozen=True)
class Config:
    """Defaults: 4-bit asymmetric rows, the RTN rows of GPTQ's tables."""

    w_bits: int = 4  # GPTQ Table 3
    group_size: int | None = None  # inputs per scale; None = whole row
    symmetric: bool = False  # GPTQ's baseline is always asymmetric
    a_bits: int | None = None  # activation width of every linear input, absmax; None = not quantized
    a_per_tensor: bool = False  # one dynamic scale per forward pass instead of one per token


def quantize_weight(W: Tensor, H: Tensor | None, cfg: Config) -> Tensor:
    """Round W [d_out, d_in] to nearest; H is ignored. Returns the dequantized weight, float32 [d_out, d_in]."""
    return _quant.fake_quant(_quant.grouped(W, cfg.group_size), cfg.w_bits, cfg.symmetric).flatten(1)


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Round every decoder linear; calib is not used and may be None."""
    model = quantize_linears(model, lambda W, H: quantize_weight(W, H, cfg))
    if cfg.a_bits is not None:
        for block in decoder_blocks(model):
            wrap_linears(
                block, lambda x: _quant.absmax_fake_quant(x, cfg.a_bits, per_tensor=cfg.a_per_tensor)
            )
    return model


def pack_weight(W: Tensor, H: Tensor | None, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer: packed codes, float16 scales, packed zero points."""
    groups = _quant.grouped(W, cfg.group_size)
    scale, zero_point = _quant.choose_qparams(groups, cfg.w_bits, cfg.symmetric)
    codes = _quant.quantize(groups, scale, zero_point, cfg.w_bits)
    return _quant.pack_affine(codes, scale, zero_point, cfg.w_bits, cfg.symmetric)


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    return _quant.unpack_affine(packed, cfg.w_bits, cfg.symmetric)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + (16 + b)/g: codes, one float16 scale and one b-bit zero point per group."""
    return _quant.affine_bits(cfg.w_bits, cfg.group_size, d_in, cfg.symmetric)


def half_step_error(ctx) -> float:
    """Largest |W - Q| on a real layer, in units of half a step; 1 is the bound for rounding on a grid that covers W."""
    W, _, _ = ctx.layer("model.layers.1.mlp.down_proj")
    cfg = Config(w_bits=8, group_size=64)
    groups = _quant.grouped(W, cfg.group_size)
    scale, _ = _quant.choose_qparams(groups, cfg.w_bits)
    error = (groups - _quant.grouped(quantize_weight(W, None, cfg), cfg.group_size)).abs()
    return float((error / (scale / 2)).max())
