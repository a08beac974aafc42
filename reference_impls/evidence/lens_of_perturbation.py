"""Evidence on the lens of perturbation: the quantizer against its definition, what noise of which shape costs.

Entry     papers/lens_of_perturbation.yaml
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant
from requant.reference_impls.lens_of_perturbation import (
    Config,
    back,
    clip,
    forth,
    noise,
    perturb,
    quantize_weight,
)

SHAPES = ("gaussian", "uniform", "rademacher")
KINDS = (*SHAPES, "growing", "shrinking", "inverse")


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


def increases_by_noise(ctx, target: str, kinds: tuple[str, ...] = KINDS) -> list[dict]:
    """Increase of the loss by kind of noise at intensity 0.25, Gaussian also at 0.125; and how the shapes differ."""
    changes = {kind: _kind(kind) for kind in kinds}
    found = _increases(ctx, target, changes | {"half": _kind("gaussian", 0.125)}, n_draws=3)
    shapes = [found[name] for name in SHAPES]
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


def increases_on_both(ctx) -> list[dict]:
    """`increases_by_noise` with noise on weights and on the inputs of linears at once, by shape alone."""
    return increases_by_noise(ctx, "both", SHAPES)


def noise_keeps_its_intensity(ctx) -> float:
    """Largest relative error of the norm of the noise, over six kinds, on a weight and on inputs with outliers."""
    tensors = (_weight(ctx), ctx.layer("model.layers.1.self_attn.q_proj", "reference-outlier", 256)[2])
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for x in tensors:
        for kind in KINDS:
            share = noise(x, kind, 0.25, generator).norm() / x.norm()
            worst = max(worst, float((share / 0.25 - 1).abs()))
    return worst


def _with_outliers(ctx, target: str) -> list[dict]:
    """Increase of the loss by Gaussian noise with outliers: even, growing with |x|, or falling as 1 / (|x| + c)."""
    changes = {kind: _kind(kind) for kind in ("gaussian", "growing", "inverse")}
    return _rows(_increases(ctx, target, changes, n_draws=2, model="reference-outlier"))


def increases_with_outliers(ctx) -> list[dict]:
    """`_with_outliers` with noise on the inputs of linears."""
    return _with_outliers(ctx, "activations")


def joint_increases_with_outliers(ctx) -> list[dict]:
    """`_with_outliers` with noise on weights and on the inputs of linears at once."""
    return _with_outliers(ctx, "both")


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
