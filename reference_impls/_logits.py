"""How far two models are apart on the same tokens: what claims that a transform changes no output measure."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def change_of_logits(before: nn.Module, after: nn.Module, tokens: Tensor) -> float:
    """Largest change of a logit on tokens int64 [n_samples, seqlen], as a share of the largest logit before."""
    plain, changed = (model(tokens, use_cache=False).logits for model in (before, after))
    return float((changed - plain).abs().max() / plain.abs().max())
