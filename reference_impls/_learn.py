"""Learn the parameters of a quantizer by gradient descent, one decoder block at a time.

What OmniQuant, AffineQuant, SignRound, Norm Tweaking and their relatives share: rounding that lets gradients pass,
learnable clipping of a weight's range, batches of calibration samples, and the descent itself. The walk that gives
inputs and targets is `_walk.walk_blocks(..., propagate="both")`; `Block.forward` runs a block with other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def round_ste(x: Tensor) -> Tensor:
    """Round to nearest; the gradient passes as if nothing had been rounded (straight-through estimator)."""
    return x + (x.round() - x).detach()


def affine_ste(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, offset: Tensor | float = 0.0
) -> Tensor:
    """Fake-quantize x [..., n] on an affine grid, differentiable in x, scale, zero_point and offset.

    Args:
        offset: added to x / scale before it is rounded (SignRound's learned rounding), in steps of the grid.
    Returns: (clamp(round(x / scale + offset) + zero_point, 0, 2^bits - 1) - zero_point) * scale, dequantized like x.
    """
    codes = (round_ste(x / scale + offset) + zero_point).clamp(0, 2**bits - 1)
    return (codes - zero_point) * scale


def clipped_grid(x: Tensor, bits: int, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point [..., 1] of the range from low * min(x, 0) to high * max(x, 0); differentiable.

    Args:
        x: [..., n] float32; low, high: [..., 1] share of each end of the range that is kept, in (0, 1].
    """
    bottom = low * x.amin(-1, keepdim=True).clamp(max=0)
    top = high * x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((top - bottom) / (2**bits - 1)).clamp(min=1e-5)
    return scale, round_ste(-bottom / scale)


def in_order(n_samples: int, batch_size: int, epochs: int) -> Iterator[Tensor]:
    """Sample indices [batch_size] epoch after epoch, always in the same order; the last batch may be shorter."""
    for _ in range(epochs):
        yield from torch.arange(n_samples).split(batch_size)


def at_random(n_samples: int, batch_size: int, n_steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """n_steps times batch_size different samples, drawn anew at every step."""
    for _ in range(n_steps):
        yield torch.randperm(n_samples, generator=generator)[:batch_size]


class SignSGD(Optimizer):
    """p <- p - lr * sign(dL/dp): no momentum, no weight decay, and the size of the gradient does not matter."""

    def __init__(self, params: Iterable[Tensor] | Iterable[dict], lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])


def descend(
    loss: Callable[[Tensor], Tensor],
    optimizer: Optimizer,
    batches: Iterable[Tensor],
    *,
    schedule: LRScheduler | None = None,
    project: Callable[[], None] | None = None,
    keep_best: bool = False,
) -> list[float]:
    """One optimizer step for each batch of sample indices.

    Args:
        loss: (indices [batch]) -> scalar, differentiable in the optimizer's parameters.
        project: called without gradients after each step, to put parameters back into their domain.
        keep_best: end with the parameters that had the lowest loss, as they were before that batch's step.
    Returns: the loss of each batch before its step.
    Raises: FloatingPointError if a loss is not finite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses: list[float] = []
    best: list[Tensor] = []
    with torch.enable_grad():
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            value = loss(batch)
            if not torch.isfinite(value):
                raise FloatingPointError(
                    f"the loss of step {len(losses)} is {value.item()}; a smaller learning rate may help"
                )
            if keep_best and (not losses or value.item() < min(losses)):
                best = [p.detach().clone() for p in parameters]
            losses.append(value.item())
            value.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            if project is not None:
                with torch.no_grad():
                    project()
    if best:
        with torch.no_grad():
            for parameter, value in zip(parameters, best, strict=True):
                parameter.copy_(value)
    return losses


class ClippingStrengths(nn.Module):
    """Learnable weight clipping (OmniQuant, arXiv:2308.13137v3, Sec. 3.2): sigmoid(logit) of both ends of each range.

    Logits are [..., 1], one for each last-dimension slice of the grouped weight, and start at `init` (4: 0.982).
    """

    def __init__(self, groups: Tensor, init: float = 4.0):
        super().__init__()
        shape = (*groups.shape[:-1], 1)
        self.low_logit = nn.Parameter(torch.full(shape, init))
        self.high_logit = nn.Parameter(torch.full(shape, init))

    def grid(self, groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """`clipped_grid` of groups [..., n] with the present strengths."""
        return clipped_grid(groups, bits, self.low_logit.sigmoid(), self.high_logit.sigmoid())
