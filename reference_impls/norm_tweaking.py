"""Norm Tweaking: after a block is quantized, its norms are trained to restore the means and variances of its outputs.

Paper     Li et al., AAAI 2024, arXiv:2309.02784v2 (numbers below refer to v2)   Entry  papers/norm_tweaking.yaml
Scope     all weights and biases of norms in decoder blocks; the linears there are the host quantizer's; embeddings, the
          last norm and lm_head untouched
Deviates  reconstructed from descriptions of the paper, without official code: Adam's settings, one sample a step and
          the learning rate's growth with depth are such readings. A random first token is any token that occurs in
          calib, in place of the tokens of languages that dominate the training data, and follows the token that all
          rows of calib begin with, if there is one (BOS). The learning rate is given, not searched. The host rounds
          weights only (GPTQ or round-to-nearest), not activations
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from requant.reference_impls import gptq, rtn
from requant.reference_impls._generate import write_text
from requant.reference_impls._learn import descend, in_order, samples
from requant.reference_impls._quant import check_choices
from requant.reference_impls._walk import (
    Block,
    UnsupportedModelError,
    check_calib,
    copy_model,
    decoder_blocks,
    named_linears,
    walk_blocks,
)

TINY = {"lr": 1e-3}
HOSTS = {"gptq": gptq, "rtn": rtn}


@dataclass(frozen=True)
class Config:
    """Defaults: 4 bits on top of GPTQ, as recalled from the main table."""

    w_bits: int = 4  # main table, recalled; also 2 with groups
    group_size: int | None = None  # inputs per scale; None = whole row
    symmetric: bool = False
    host: str = "gptq"  # main table; rtn in the table of integrations
    generated: bool = True  # calibration text written by the model, as long as calib; off: calib itself
    n_iters: int = 1  # Algorithm 1: passes over the calibration text
    lr: float = 1e-5  # where the paper's grid search begins
    lr_scale: float = 5.0  # growth of lr with depth; the default of the unofficial code
    batch_size: int = 1  # Algorithm 1: samples for each step
    seed: int = 0  # of the text

    def __post_init__(self) -> None:
        check_choices(self, host=HOSTS)


def distance(original: Tensor, quantized: Tensor) -> Tensor:
    """Mean over channels of |difference of means| + |difference of variances|, both over all tokens (Eq. 3).

    Args: original, quantized: [..., channels].
    """
    first, second = (x.flatten(0, -2) for x in (original, quantized))
    means = (first.mean(0) - second.mean(0)).abs()
    return (means + (first.var(0, correction=0) - second.var(0, correction=0)).abs()).mean()


def norm_parameters(block: nn.Module) -> dict[str, Tensor]:
    """Weights and biases of all norms in a block by dotted name: vectors of modules that are no linears.

    Raises: UnsupportedModelError where norms have none.
    """
    found = {
        f"{path}.{name}": parameter
        for path, module in block.named_modules()
        if not isinstance(module, nn.Linear)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 1
    }
    if not found:
        raise UnsupportedModelError(f"the norms of {type(block).__name__} have no weights to tweak")
    return found


def _host(cfg: Config) -> tuple[ModuleType, object]:
    host = HOSTS[cfg.host]
    return host, host.Config(w_bits=cfg.w_bits, group_size=cfg.group_size, symmetric=cfg.symmetric)


def tweak(block: Block, targets: list[Tensor], n_samples: int, lr: float, cfg: Config) -> list[float]:
    """Train the norms of a quantized block, in place, towards the moments of targets (Algorithm 1, lines 6 to 11).

    Returns: the distance of each batch before its step.
    """
    original = norm_parameters(block.module)
    learned = {name: p.detach().float().clone().requires_grad_() for name, p in original.items()}

    def loss(batch: Tensor) -> Tensor:
        return distance(samples(targets, batch), block.forward(samples(block.inputs, batch), learned))

    batches = in_order(n_samples, cfg.batch_size, cfg.n_iters)
    losses = descend(loss, torch.optim.Adam(learned.values(), lr), batches)
    with torch.no_grad():
        for name, parameter in original.items():
            parameter.copy_(learned[name])
    return losses


def text_for(model: nn.Module, calib: Tensor, cfg: Config) -> Tensor:
    """The calibration text: calib, or as much written by the model itself (Sec. 3, after LLM-QAT)."""
    return write_text(model, calib, torch.Generator().manual_seed(cfg.seed)) if cfg.generated else calib


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Quantize and tweak block by block (Algorithm 1).

    Both outputs of a block, before and after, are on what the quantized and tweaked blocks before it give.
    """
    check_calib(calib)
    model = copy_model(model)
    text, depth = text_for(model, calib, cfg), len(decoder_blocks(model))
    host, host_cfg = _host(cfg)
    for block in walk_blocks(model, text):
        targets = block.run()
        hessians: Mapping[str, Tensor] = block.hessians() if cfg.host == "gptq" else {}
        for name, linear in named_linears(block.module).items():
            linear.weight.copy_(host.quantize_weight(linear.weight.float(), hessians.get(name), host_cfg))
        tweak(block, targets, len(text), cfg.lr * (1 + cfg.lr_scale * block.index / depth), cfg)
    return model


def quantize_weight(W: Tensor, H: Tensor, cfg: Config) -> Tensor:
    """The host's weight, float32 [d_out, d_in]: no linear is changed by tweaking."""
    host, host_cfg = _host(cfg)
    return host.quantize_weight(W, H, host_cfg)


def pack_weight(W: Tensor, H: Tensor, cfg: Config) -> dict[str, Tensor]:
    """What the host stores for one layer."""
    host, host_cfg = _host(cfg)
    return host.pack_weight(W, H, host_cfg)


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    host, host_cfg = _host(cfg)
    return host.unpack_weight(packed, host_cfg)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """The host's; norms have 16 bits before and after."""
    host, host_cfg = _host(cfg)
    return host.bits_per_weight(d_out, d_in, host_cfg)


# --- invariants and findings named in papers/norm_tweaking.yaml -------------------------------------------------------


def only_norms_change(ctx) -> float:
    """Share of tensors outside the norms of blocks that differ from those of the host alone, rounding to nearest."""
    cfg = Config(w_bits=3, host="rtn", lr=1e-3, generated=False)
    tweaked = quantize(ctx.reference(), ctx.calib(8, 64), cfg)
    alone = rtn.quantize(ctx.reference(), None, rtn.Config(w_bits=3)).state_dict()
    norms = {id(p) for block in decoder_blocks(tweaked) for p in norm_parameters(block).values()}
    others = [name for name, p in tweaked.named_parameters() if id(p) not in norms]
    state = tweaked.state_dict()
    return sum(not torch.equal(state[name], alone[name]) for name in others) / len(others)


def no_steps_is_the_host(ctx) -> float:
    """Largest difference of any tensor from the host's alone with a learning rate of 0."""
    cfg = Config(w_bits=3, host="rtn", lr=0.0, generated=False)
    idle = quantize(ctx.reference(), ctx.calib(8, 64), cfg).state_dict()
    alone = rtn.quantize(ctx.reference(), None, rtn.Config(w_bits=3)).state_dict()
    return max(float((idle[name] - alone[name]).abs().max()) for name in alone)


def distance_sees_no_order(ctx) -> float:
    """Distance of a layer's inputs from themselves in another order of tokens, relative to that from their doubles."""
    _, _, X = ctx.layer("model.layers.1.mlp.down_proj")
    shuffled = X[torch.randperm(len(X), generator=torch.Generator().manual_seed(0))]
    return float(distance(X, shuffled) / distance(X, 2 * X))


def mean_gaps(ctx) -> list[dict]:
    """Mean |difference of channel means| from the unquantized model after the first and the last block.

    Rounding to nearest at 2 bits a row; on corpus text, while the tweaked model saw its own.
    """
    models = {"tweaked": quantize(ctx.reference(), ctx.calib(32, 64), Config(2, host="rtn", lr=1e-3))}
    models["plain"] = rtn.quantize(ctx.reference(), None, rtn.Config(w_bits=2))
    tokens = ctx.test_windows(8)
    means = {name: _channel_means(model, tokens) for name, model in models.items()}
    exact = _channel_means(ctx.reference(), tokens)
    return [
        {"name": f"{name}_{place}", "value": float((found[index] - exact[index]).abs().mean())}
        for name, found in means.items()
        for place, index in (("first", 0), ("last", -1))
    ]


def _channel_means(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    return [torch.cat(block.run()).mean((0, 1)) for block in walk_blocks(model, tokens)]


def held_out_distances(ctx) -> list[dict]:
    """`distance` of the second block on corpus text, at 2 bits a row, by learning rate; as a share of the untweaked."""
    text, values = text_for(ctx.reference(), ctx.calib(32, 64), Config()), {}
    for name, lr in {"untweaked": 0.0, "small": 1e-5, "medium": 1e-3}.items():
        model, other, cfg = copy_model(ctx.reference()), ctx.calib(48, 64)[32:], Config(w_bits=2)
        block = next(
            b for b in walk_blocks(model, torch.cat([text, other]), propagate="original") if b.index == 1
        )
        targets = block.run()
        for linear in named_linears(block.module).values():
            linear.weight.data = rtn.quantize_weight(linear.weight, None, rtn.Config(w_bits=2))
        tweak(block, targets, len(text), lr, cfg)
        with torch.no_grad():
            values[name] = float(distance(targets[-1], block.forward(block.inputs[-1])))
    return [{"name": name, "value": value / values["untweaked"]} for name, value in values.items()]
