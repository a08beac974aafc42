"""Gradients of the model's loss with respect to what its linear layers put out: which tokens and channels matter."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from requant.reference_impls._walk import decoder_blocks, named_linears


def sequence_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean next-token loss of each sequence: logits [n, seqlen, vocabulary], tokens [n, seqlen] -> [n]."""
    losses = functional.cross_entropy(logits[:, :-1].mT.float(), tokens[:, 1:], reduction="none")
    return losses.mean(1)


def output_gradients(model: nn.Module, tokens: Tensor) -> dict[nn.Linear, tuple[Tensor, Tensor]]:
    """X and dl/dz of every linear z = X W^T of the decoder blocks, l the mean loss of each sequence by itself.

    Args:
        model: its parameters must not require gradients; the graph begins at the embeddings.
        tokens: int64 [n, seqlen].
    Returns: linear -> (X [n, seqlen, d_in], dl/dz [n, seqlen, d_out]), float32.
    """
    seen: dict[nn.Linear, tuple[Tensor, Tensor]] = {}

    def keep(linear: nn.Linear, args: tuple, output: Tensor) -> None:
        seen[linear] = args[0].detach(), output

    linears = [linear for block in decoder_blocks(model) for linear in named_linears(block).values()]
    handles = [linear.register_forward_hook(keep) for linear in linears]
    handles.append(
        model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out.requires_grad_())
    )
    try:
        with torch.enable_grad():
            loss = sequence_losses(model(tokens, use_cache=False).logits, tokens).sum()
            gradients = torch.autograd.grad(loss, [output for _, output in seen.values()])
    finally:
        for handle in handles:
            handle.remove()
    inputs = [X for X, _ in seen.values()]
    # OPT feeds its MLP with one flat sequence of tokens
    flat = [
        tuple(part.float().reshape(*tokens.shape, -1) for part in pair)
        for pair in zip(inputs, gradients, strict=True)
    ]
    return dict(zip(seen, flat, strict=True))
