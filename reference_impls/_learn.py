"""Learn the parameters of a quantizer by gradient descent, one decoder block at a time.

What OmniQuant, AffineQuant, SignRound, Norm Tweaking and their relatives share: batches of calibration samples, the
descent itself, and what is left of a block's error. Rounding that lets gradients pass is in `_straight_through`. The
walk that gives inputs and targets is `_walk.walk_blocks(..., propagate="both")`; `Block.forward` runs a block with
other weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from requant.reference_impls._walk import Block


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy in nats of logits [n, seqlen, vocabulary] with tokens [n, seqlen], each with the next."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


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
