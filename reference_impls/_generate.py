"""Calibration text that a model writes itself (LLM-QAT, arXiv:2305.17888v1, Sec. 2.1; Norm Tweaking)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

GREEDY = (3, 5)  # tokens after the first that are the most likely ones, at least and at most


@torch.no_grad()
def write_text(model: nn.Module, calib: Tensor, generator: torch.Generator) -> Tensor:
    """As many rows as calib has, as long: a random token, 3 to 5 greedy ones, the rest sampled from the model.

    Args:
        calib: int64 [n_samples, seqlen]. Random tokens are drawn evenly among those that occur in it, behind the token
            that all its rows begin with, if there is one (BOS).
    Returns: int64 [n_samples, seqlen].
    """
    n, seqlen = calib.shape
    begin = 1 if n > 1 and bool((calib[:, 0] == calib[0, 0]).all()) and seqlen > 1 else 0
    known = calib[:, begin:].unique()
    first = known[torch.randint(len(known), (n, 1), generator=generator)]
    n_greedy = torch.randint(GREEDY[0], GREEDY[1] + 1, (n, 1), generator=generator)
    text = torch.cat([calib[:, :begin], first], 1)
    fresh, cache = text.to(model.device), None
    for step in range(seqlen - begin - 1):
        output = model(fresh, past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[:, -1].float().cpu()
        sampled = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        token = torch.where(step < n_greedy, logits.argmax(-1, keepdim=True), sampled)
        text = torch.cat([text, token], 1)
        fresh = token.to(model.device)
    return text
