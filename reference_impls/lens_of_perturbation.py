"""Lens of perturbation: noise in the place of rounding shows what hurts, and rounding cube roots follows from it.

Paper     Gong et al., AAAI 2024, arXiv:2403.06408v1 (numbers below refer to v1)
          Entry  papers/lens_of_perturbation.yaml
Scope     weights of nn.Linear in decoder blocks and, with a_bits, their inputs; embeddings, norms and lm_head untouched
Deviates  reconstructed from the abstract and from notes on the paper, without official code. Granularity is not known:
          weights have one grid a row, activations one a token. How the paper shaped noise that shrinks with the value
          is not known: shrinking has a deviation proportional to max|x| - |x|, inverse one proportional to
          1 / (|x| + c) with c the mean of |x|. Intensity is the norm of the noise as a share of the tensor's; one batch
          of windows is one tensor. Scales are rounded to float16, the precision they are stored in
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant
from requant.reference_impls._activation import wrap_linears
from requant.reference_impls._quant import check_choices
from requant.reference_impls._walk import copy_model, decoder_blocks
from requant.reference_impls._weights import quantize_linears

DATA_FREE = True  # the quantizer depends on neither calibration tokens nor a seed
CLIP_FRACTION = 0.001  # largest values that the clipping experiment cuts off


@dataclass(frozen=True)
class Config:
    """Defaults: the non-uniform quantizer at W4A16 (abstract)."""

    w_bits: int = 4  # abstract: W4A16; 8 for W8A8
    a_bits: int | None = None  # abstract: 8 for W8A8, a grid for each token; None = not quantized
    group_size: int | None = None  # inputs per scale; None = whole row; not stated
    symmetric: bool = False  # weights; min-max
    transform: str = (
        "cube_root"  # x^(1/3); identity = the uniform grid of the study, GPTQ's baseline (its Sec. 4)
    )

    def __post_init__(self) -> None:
        check_choices(self, transform=("cube_root", "identity"))


# --- the quantizer ----------------------------------------------------------------------------------------------------


def forth(x: Tensor, cfg: Config) -> Tensor:
    """sign(x) |x|^(1/3), or x itself; same shape."""
    return x.sign() * x.abs().pow(1 / 3) if cfg.transform == "cube_root" else x


def back(y: Tensor, cfg: Config) -> Tensor:
    """The inverse of `forth`."""
    return y * y * y if cfg.transform == "cube_root" else y


def quantize_weight(W: Tensor, H: Tensor | None, cfg: Config) -> Tensor:
    """Round the cube roots of W [d_out, d_in] to nearest; H is ignored. Returns float32 [d_out, d_in]."""
    roots = _quant.grouped(forth(W, cfg), cfg.group_size)
    return back(_quant.fake_quant(roots, cfg.w_bits, cfg.symmetric).flatten(1), cfg)


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Round every decoder linear and, with a_bits, every token it reads; calib is not used and may be None."""
    model = quantize_linears(model, lambda W, H: quantize_weight(W, H, cfg))
    if cfg.a_bits is not None:
        for block in decoder_blocks(model):
            wrap_linears(block, lambda x: back(_quant.clipped_fake_quant(forth(x, cfg), cfg.a_bits), cfg))
    return model


def pack_weight(W: Tensor, H: Tensor | None, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer: packed codes, and scales and zero points of the roots."""
    roots = _quant.grouped(forth(W, cfg), cfg.group_size)
    scale, zero_point = _quant.choose_qparams(roots, cfg.w_bits, cfg.symmetric)
    codes = _quant.quantize(roots, scale, zero_point, cfg.w_bits)
    packed = _quant.pack_affine(codes, scale, zero_point, cfg.w_bits, cfg.symmetric)
    packed["root_scale"] = packed.pop(
        "scale"
    )  # another name: no integer kernel may take these for affine weights
    return packed


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    affine = {"scale" if key == "root_scale" else key: tensor for key, tensor in packed.items()}
    return back(_quant.unpack_affine(affine, cfg.w_bits, cfg.symmetric), cfg)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + (16 + b)/g, as for the uniform quantizer."""
    return _quant.affine_bits(cfg.w_bits, cfg.group_size, d_in, cfg.symmetric)


# --- artificial perturbations -----------------------------------------------------------------------------------------

_DRAWS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "uniform": lambda x, generator: 2 * torch.rand(x.shape, generator=generator) - 1,
    "rademacher": lambda x, generator: torch.randint(2, x.shape, generator=generator) * 2.0 - 1,
}
_ENVELOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "growing": torch.abs,
    "shrinking": lambda x: x.abs().max() - x.abs(),
    "inverse": lambda x: 1 / (x.abs() + x.abs().mean()),
}


def noise(x: Tensor, kind: str, intensity: float, generator: torch.Generator) -> Tensor:
    """Noise of the given kind with the norm intensity * |x|, whatever the kind; same shape as x.

    Args:
        kind: gaussian, uniform or rademacher; growing: Gaussian, with a deviation that grows with |x|; shrinking
            and inverse: with one that falls with |x|, linearly or as 1 / (|x| + mean |x|).
    """
    D = _DRAWS[kind](x, generator) if kind in _DRAWS else torch.randn(x.shape, generator=generator)
    D = D * _ENVELOPES[kind](x) if kind in _ENVELOPES else D
    return D * (intensity * x.norm() / D.norm())


def clip(x: Tensor, fraction: float = CLIP_FRACTION) -> Tensor:
    """x with its largest entries, by absolute value, cut to the size of the largest that remains."""
    n = max(1, round(fraction * x.numel()))
    limit = x.abs().flatten().topk(n + 1).values[-1]
    return x.clamp(-limit, limit)


@torch.no_grad()
def perturb(model: nn.Module, change: Callable[[Tensor], Tensor], target: str) -> nn.Module:
    """A copy whose decoder weights (once), linear inputs (at every pass) or both went through change(tensor) -> tensor.

    Args:
        target: weights, activations or both.
    """
    if target not in ("weights", "activations", "both"):
        raise ValueError(f"target is {target!r}; choose weights, activations or both")
    changed = (
        copy_model(model) if target == "activations" else quantize_linears(model, lambda W, H: change(W))
    )
    if target != "weights":
        for block in decoder_blocks(changed):
            wrap_linears(block, change)
    return changed
