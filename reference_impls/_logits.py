"""How far two models are apart on the same tokens, in logits or in their loss: what claims about transforms measure."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from requant.reference_impls._learn import next_token_loss


@torch.no_grad()
def change_of_logits(before: nn.Module, after: nn.Module, tokens: Tensor) -> float:
    """Largest change of a logit on tokens int64 [n_samples, seqlen], as a share of the largest logit before."""
    plain, changed = (model(tokens, use_cache=False).logits for model in (before, after))
    return float((changed - plain).abs().max() / plain.abs().max())


@torch.no_grad()
def cost_in_nats(before: nn.Module, after: nn.Module, tokens: Tensor) -> float:
    """Loss of the second model on tokens int64 [n_samples, seqlen], less that of the first."""
    plain, changed = (next_token_loss(model(tokens).logits, tokens) for model in (before, after))
    return float(changed) - float(plain)
