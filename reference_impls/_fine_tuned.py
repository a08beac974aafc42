"""A fine-tuned reference model, for methods about what fine-tuning changes: the same text, in capital letters.

The reference tokenizer has few tokens in capitals, so the text falls apart into letters that the reference model has
hardly seen in a row: a second task, learned in seconds and measured on text that was not trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from requant.reference_impls._learn import at_random, descend
from requant.reference_impls._walk import decoder_blocks, named_linears


def capitals(ctx, windows: Tensor, seqlen: int) -> Tensor:
    """The text of token windows [n, seqlen] in capital letters, tokenized and cut anew: int64 [m, seqlen] with BOS."""
    tokenizer = ctx.tokenizer()
    text = tokenizer.decode(windows[:, 1:].flatten().tolist()).upper()
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    body = tokens[: len(tokens) // (seqlen - 1) * (seqlen - 1)].view(-1, seqlen - 1)
    return torch.cat([torch.zeros(len(body), 1, dtype=torch.int64), body], 1)


def loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean next-token loss (nats) on windows int64 [n, seqlen], differentiable."""
    logits = model(windows).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def fine_tuned(ctx, n_steps: int = 30) -> nn.Module:
    """The reference model after some steps of AdamW on the train split in capitals; only decoder linears move.

    Batches of 8 windows of 96 tokens, learning rate 1e-3 falling to zero, no weight decay; drawn with the seed of ctx.
    """
    model, data = ctx.reference(), capitals(ctx, ctx.calib(64), 96)
    weights = [linear.weight for block in decoder_blocks(model) for linear in named_linears(block).values()]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / n_steps)
    batches = at_random(len(data), 8, n_steps, torch.Generator().manual_seed(ctx.seed))
    descend(lambda batch: loss(model, data[batch]), optimizer, batches, schedule=schedule)
    return model.requires_grad_(False)
