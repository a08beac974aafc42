"""Lens of perturbation: noise in the place of rounding shows what hurts, and rounding cube roots follows from it.

Paper     Gong et al., AAAI 2024, arXiv:2403.06408v1 (numbers below refer to v1)
          Entry  papers/lens_of_perturbation.yaml
Scope     weights of nn.Linear in decoder blocks and, with a_bits, their inputs; embeddings, norms and lm_head untouched
Deviates  reconstructed from the abstract and from notes on the paper, without official code. Granularity is not known:
          weights have one grid a row, activations one a token. Noise that shrinks with the value has a deviation
          proportional to max|x| - |x|; intensity is the norm of the noise as a share of the tensor's; one batch of
          windows is one tensor. Scales are rounded to float16, the precision they are stored in
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
}


def noise(x: Tensor, kind: str, intensity: float, generator: torch.Generator) -> Tensor:
    """Noise of the given kind with the norm intensity * |x|, whatever the kind; same shape as x.

    Args:
        kind: gaussian, uniform or rademacher; growing or shrinking: Gaussian, with a deviation that grows
            or shrinks with |x|.
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
    """A copy whose decoder weights (once) or linear inputs (at every pass) went through change(tensor) -> tensor."""
    if target == "weights":
        return quantize_linears(model, lambda W, H: change(W))
    model = copy_model(model)
    for block in decoder_blocks(model):
        wrap_linears(block, change)
    return model


# --- invariants and findings named in papers/lens_of_perturbation.yaml ------------------------------------------------


def _weight(ctx) -> Tensor:
    return ctx.reference().get_submodule("model.layers.1.mlp.down_proj").weight


def transform_inverts(ctx) -> float:
    """Largest |x - back(forth(x))| on a real layer, as a share of the largest |x|."""
    W = _weight(ctx)
    return float((back(forth(W, Config()), Config()) - W).abs().max() / W.abs().max())


def half_step_error(ctx) -> float:
    """Largest rounding error of a cube root on a real layer, in units of half a step: nothing is clipped."""
    W = _weight(ctx)
    roots, cfg = forth(W, Config()), Config(transform="identity")
    scale, _ = _quant.choose_qparams(roots, cfg.w_bits)
    return float(((quantize_weight(roots, None, cfg) - roots).abs() / (scale / 2)).max())


def steps_follow_two_thirds(ctx) -> float:
    """Largest relative distance of a gap of the 8-bit grid from 3 |x|^(2/3) step, over the larger half of levels."""
    step = 2 / 255
    roots = torch.arange(0.5, 1, step, dtype=torch.float64)
    gaps, middle = (roots + step) ** 3 - roots**3, (roots + step / 2) ** 3
    return float((gaps / (3 * middle ** (2 / 3) * step) - 1).abs().max())


def error_follows_size(ctx) -> list[dict]:
    """Correlation of |error| with |w| over the weights of a layer rounded to 4 bits, by quantizer."""
    W = _weight(ctx)
    rows = []
    for name in ("identity", "cube_root"):
        error = (quantize_weight(W, None, Config(transform=name)) - W).abs()
        correlation = torch.corrcoef(torch.stack([error.flatten(), W.abs().flatten()]))[0, 1]
        rows.append({"name": name, "value": float(correlation)})
    return rows


def _loss(model: nn.Module, tokens: Tensor) -> float:
    with torch.no_grad():
        return float(model(tokens, labels=tokens, use_cache=False).loss)


def _increases(
    ctx, target: str, changes: dict[str, Callable], n_draws: int, model: str = "reference", n: int = 4
) -> dict[str, float]:
    """Mean increase of the loss on n test windows by each change(x, generator), over n_draws generators."""
    reference, tokens = ctx.reference(model), ctx.test_windows(n)
    base, found = _loss(reference, tokens), {}
    for name, change in changes.items():
        losses = []
        for draw in range(n_draws):
            generator = torch.Generator().manual_seed(draw)
            perturbed = perturb(reference, lambda x, c=change, g=generator: c(x, g), target)
            losses.append(_loss(perturbed, tokens) - base)
        found[name] = sum(losses) / n_draws
    return found


def _kind(kind: str, intensity: float = 0.25) -> Callable[[Tensor, torch.Generator], Tensor]:
    return lambda x, generator: x + noise(x, kind, intensity, generator)


def _rows(found: dict[str, float]) -> list[dict]:
    return [{"name": name, "value": value} for name, value in found.items()]


def increases_by_noise(ctx, target: str) -> list[dict]:
    """Increase of the loss by kind of noise at intensity 0.25, Gaussian also at 0.125; and how kinds differ."""
    changes = {kind: _kind(kind) for kind in ("gaussian", "uniform", "rademacher", "growing", "shrinking")}
    found = _increases(ctx, target, changes | {"half": _kind("gaussian", 0.125)}, n_draws=3)
    shapes = [found[name] for name in ("gaussian", "uniform", "rademacher")]
    found |= {
        "between_shapes": max(shapes) - min(shapes),
        "between_intensities": found["gaussian"] - found["half"],
    }
    return _rows(found)


def increases_on_weights(ctx) -> list[dict]:
    """`increases_by_noise` with noise on weights."""
    return increases_by_noise(ctx, "weights")


def increases_on_activations(ctx) -> list[dict]:
    """`increases_by_noise` with noise on the inputs of linears."""
    return increases_by_noise(ctx, "activations")


def increases_with_outliers(ctx) -> list[dict]:
    """Increase of the loss by Gaussian noise on the inputs of linears with outliers: even, or growing with |x|."""
    changes = {kind: _kind(kind) for kind in ("gaussian", "growing")}
    return _rows(_increases(ctx, "activations", changes, n_draws=2, model="reference-outlier"))


def increases_by_clipping(ctx) -> list[dict]:
    """Increase of the loss by clipping the inputs of linears, and by Gaussian noise of the very same norm.

    On reference-sink, whose large activations were not planted but came with training.
    """

    def same_norm(x: Tensor, generator: torch.Generator) -> Tensor:
        D = clip(x) - x
        return x + noise(D, "gaussian", 1.0, generator) if D.any() else x

    changes = {"clipping": lambda x, _generator: clip(x), "noise": same_norm}
    found = _increases(ctx, "activations", changes, 3, "reference-sink", n=16)
    return _rows(found)
