"""Learn the parameters of a quantizer by gradient descent, one decoder block at a time.

What OmniQuant, AffineQuant, SignRound, Norm Tweaking and their relatives share: rounding that lets gradients pass,
learnable clipping of a weight's range, batches of calibration samples, and the descent itself. The walk that gives
inputs and targets is `_walk.walk_blocks(..., propagate="both")`; `Block.forward` runs a block with other weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from requant.reference_impls._quant import clipped_fake_quant, stored_scale
from requant.reference_impls._walk import Block


def round_ste(x: Tensor) -> Tensor:
    """Round to nearest; the gradient passes as if nothing had been rounded (straight-through estimator)."""
    return x + (x.round() - x).detach()


def straight_through(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """rounding(x) with the gradient of the identity, where it clips as well."""
    rounded = rounding(x.detach())
    return x + (rounded - x.detach()) if x.requires_grad else rounded


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy in nats of logits [n, seqlen, vocabulary] with tokens [n, seqlen], each with the next."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class _AffineSTE(torch.autograd.Function):
    """`affine_ste` in few passes over memory, where learned methods spend their time: one node in place of seven."""

    @staticmethod
    def forward(
        ctx, x: Tensor, scale: Tensor, zero_point: Tensor, offset: Tensor | None, bits: int
    ) -> Tensor:
        steps = x / scale
        codes = (steps.round() if offset is None else (steps + offset).round_()).add_(zero_point)
        clamped = codes.clamp(0, 2**bits - 1)
        inside = codes == clamped
        codes = clamped.sub_(zero_point)
        rest = None
        if ctx.needs_input_grad[1]:  # d(output) / d(scale)
            rest = codes - torch.where(inside, steps, 0.0)
        ctx.save_for_backward(inside, rest, scale)
        ctx.shapes = [t.shape if isinstance(t, Tensor) else None for t in (x, scale, zero_point, offset)]
        return codes.mul_(scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        inside, rest, scale = ctx.saved_tensors
        to_x = torch.where(inside, grad, 0.0)
        found = [
            to_x if ctx.needs_input_grad[0] else None,
            grad * rest if ctx.needs_input_grad[1] else None,
            (to_x - grad) * scale if ctx.needs_input_grad[2] else None,
            to_x * scale if ctx.needs_input_grad[3] else None,
        ]
        return *(
            None if one is None else one.sum_to_size(shape)
            for one, shape in zip(found, ctx.shapes, strict=True)
        ), None


def affine_ste(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, offset: Tensor | None = None
) -> Tensor:
    """Fake-quantize x [..., n] on an affine grid, differentiable in x, scale, zero_point and offset.

    Args:
        offset: added to x / scale before it is rounded (SignRound's learned rounding), in steps of the grid.
    Returns: (clamp(round(x / scale + offset) + zero_point, 0, 2^bits - 1) - zero_point) * scale, dequantized like x;
        rounding has the gradient of the identity (straight-through), clamping its own.
    """
    return _AffineSTE.apply(x, scale, zero_point, offset, bits)


def clipped_grid(x: Tensor, bits: int, low: Tensor | float, high: Tensor | float) -> tuple[Tensor, Tensor]:
    """Scale and zero point [..., 1] of the range from low * min(x, 0) to high * max(x, 0); differentiable.

    Args:
        x: [..., n] float32; low, high: numbers or [..., 1], share of each end of the range that is kept, in (0, 1].
    """
    bottom = low * x.amin(-1, keepdim=True).clamp(max=0)
    top = high * x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((top - bottom) / (2**bits - 1)).clamp(min=1e-5)
    return scale, round_ste(-bottom / scale)


@torch.no_grad()
def floored(s: Tensor, least: float) -> Tensor:
    """s with its entries of smaller magnitude pushed to +-least, zeros left alone; in place."""
    return s.copy_(torch.where(s.abs() < least, least * s.sign(), s))


def in_order(n_samples: int, batch_size: int, epochs: int) -> Iterator[Tensor]:
    """Sample indices [batch_size] epoch after epoch, always in the same order; the last batch may be shorter."""
    for _ in range(epochs):
        yield from torch.arange(n_samples).split(batch_size)


def samples(batches: Sequence[Tensor], indices: Tensor) -> Tensor:
    """The samples [n, ...] with these indices, counted through equal batches (a block's inputs or targets)."""
    size = len(batches[0])
    return torch.stack([batches[i // size][i % size] for i in indices.tolist()])


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


def cosine_decay(optimizer: Optimizer, n_steps: int, end: float) -> LRScheduler:
    """From each group's learning rate to the share `end` of it along half a cosine over n_steps steps."""
    return LambdaLR(
        optimizer, lambda t: end + (1 - end) * (1 + math.cos(math.pi * min(t / max(n_steps, 1), 1))) / 2
    )


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

    def grid(self, groups: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
        """`clipped_grid` of groups [..., n] with the present strengths; symmetric: zero point 2^(bits-1)."""
        low, high = self.low_logit.sigmoid(), self.high_logit.sigmoid()
        if not symmetric:
            return clipped_grid(groups, bits, low, high)
        peak = torch.maximum(-low * groups.amin(-1, keepdim=True), high * groups.amax(-1, keepdim=True))
        scale = (peak / (2 ** (bits - 1) - 1)).clamp(min=1e-5)
        return scale, torch.full_like(scale, 2.0 ** (bits - 1))

    @torch.no_grad()
    def stored_grid(self, groups: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
        """`grid` in the precision it is stored in: float16 scale, zero point within the codes."""
        exact, zero_point = self.grid(groups, bits, symmetric)
        scale = stored_scale(exact, bits)
        if not symmetric:
            bottom = self.low_logit.sigmoid() * groups.amin(-1, keepdim=True).clamp(max=0)
            zero_point = (-bottom / scale).round()
        return scale, zero_point.clamp(0, 2**bits - 1)

    def fake_quantize(self, groups: Tensor, bits: int, symmetric: bool = False) -> Tensor:
        """groups rounded on `grid` while gradients are recorded, elsewhere on `stored_grid`; same shape."""
        grid = self.grid if torch.is_grad_enabled() else self.stored_grid
        return affine_ste(groups, *grid(groups, bits, symmetric), bits)


def token_ste(x: Tensor, bits: int, clip_ratio: float = 1.0) -> Tensor:
    """Asymmetric rounding of each last-dimension slice, differentiable in x and through its range (activations)."""
    if not x.requires_grad:
        return clipped_fake_quant(x, bits, clip_ratio)
    return affine_ste(x, *clipped_grid(x, bits, clip_ratio, clip_ratio), bits)


def reconstruct(
    block: Block,
    parameters: Callable[[int], Mapping[str, Tensor]],
    optimizer: Optimizer,
    *,
    epochs: int,
    batch_size: int,
    second_targets: list[Tensor] | None = None,
) -> list[float]:
    """Descend on the mean squared distance of the block's output on `inputs` from `targets` (walk "both").

    Args:
        parameters: (epoch) -> what `Block.forward` takes in the place of parameters, differentiable.
        second_targets: a further distance is added, from these (OmniQuant's aug_loss).
    Returns: the loss of each batch, samples in the same order every epoch.
    """
    inputs, *wanted = (
        torch.cat(part).detach() for part in (block.inputs, block.targets, second_targets or []) if part
    )
    batches = list(in_order(len(inputs), batch_size, epochs))
    steps = iter(range(len(batches)))

    def loss(batch: Tensor) -> Tensor:
        epoch = next(steps) * epochs // len(batches)
        output = block.forward(inputs[batch], parameters(epoch))
        return sum((output - target[batch]).square().mean() for target in wanted)

    return descend(loss, optimizer, batches)


@torch.no_grad()
def output_error(
    data: Block, parameters: Mapping[str, Tensor] | None = None, block: Block | None = None
) -> float:
    """Mean squared distance of the outputs of a block (default: data itself) on data.inputs from data.targets."""
    run = (data if block is None else block).forward
    errors = [
        (run(x, parameters) - y).square().mean() for x, y in zip(data.inputs, data.targets, strict=True)
    ]
    return float(torch.stack(errors).mean())
