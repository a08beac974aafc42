"""Next-token training of a new model of a given architecture, for methods that quantize while they train (BitNet).

Everywhere `cfg` is the method's Config: the fields named after Table 6 of BitNet (arXiv:2310.11453v1), depth,
embeddings and seed of it count here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from requant.reference_impls._walk import UnsupportedModelError, decoder_blocks, named_linears


def new_model(model: nn.Module, cfg) -> nn.Module:
    """A model of the same family and sizes with new weights from cfg.seed, cut to cfg.depth; float32, eval mode.

    With cfg.embeddings "kept" all outside the blocks is that of the model, and frozen.
    Raises: ValueError for a depth that there is not; UnsupportedModelError where a new model lacks something of it.
    """
    config = copy.deepcopy(model.config)
    if cfg.depth is not None:
        if not 1 <= cfg.depth <= config.num_hidden_layers:
            raise ValueError(
                f"depth {cfg.depth} is not between 1 and the model's {config.num_hidden_layers} blocks"
            )
        config.num_hidden_layers = cfg.depth
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: cfg.depth]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        fresh = type(model)(config).float()
        for block in decoder_blocks(fresh):
            for linear in named_linears(block).values():
                nn.init.xavier_normal_(
                    linear.weight
                )  # Sec. 2.1: "standard initialization", on which Eq. 10 rests
    fresh = fresh.to(model.device).eval().requires_grad_(True)
    if cfg.embeddings == "kept":
        blocks = next(name for name, module in model.named_modules() if module is decoder_blocks(model))
        outside = {
            key: value for key, value in model.state_dict().items() if not key.startswith(f"{blocks}.")
        }
        if unknown := fresh.load_state_dict(outside, strict=False).unexpected_keys:
            raise UnsupportedModelError(
                f"a new {type(model).__name__} has no {unknown[0]}; pass the model unchanged"
            )
        fresh.requires_grad_(False)
        decoder_blocks(fresh).requires_grad_(True)
    return fresh


def _batches(tokens: Tensor, cfg) -> Iterator[Tensor]:
    """Batches of about tokens_per_update tokens, each window once before any is seen again."""
    generator, size = (
        torch.Generator().manual_seed(cfg.seed),
        max(1, cfg.tokens_per_update // tokens.shape[1]),
    )
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(tokens), generator=generator)])
        yield tokens[order[:size]]
        order = order[size:]


@torch.enable_grad()
def train(model: nn.Module, tokens: Tensor, cfg) -> None:
    """Next-token training in place: Adam, warm-up, polynomial decay, no dropout, no clipping (Table 6)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=cfg.adam_betas, weight_decay=cfg.weight_decay, fused=True)
    batches = _batches(tokens.to(model.device), cfg)
    for step in range(cfg.updates):
        decay = ((cfg.updates - step) / (cfg.updates - cfg.warmup)) ** cfg.decay_power
        for group in optimizer.param_groups:
            group["lr"] = cfg.learning_rate * min((step + 1) / max(cfg.warmup, 1), decay)
        batch = next(batches)
        targets = F.pad(batch[:, 1:], (0, 1), value=-100)  # nothing to predict after the last token
        loss = F.cross_entropy(
            model(batch, use_cache=False).logits.flatten(0, 1), targets.flatten(), ignore_index=-100
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
