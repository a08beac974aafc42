"""Norm Tweaking: after a block is quantized, its norms are trained to restore the means and variances of its outputs.

Paper     Li et al., AAAI 2024, arXiv:2309.02784v2 (numbers below refer to v2)   Entry  papers/norm_tweaking.yaml
Scope     all weights and biases of norms in decoder blocks; the linears there are the host quantizer's; embeddings, the
          last norm and lm_head untouched
Deviates  reconstructed from descriptions of the paper, without official code: Adam's settings, one sample a step and
          the learning rate's growth with depth are such readings. A random first token is any token that occurs in
          calib, in place of the tokens of languages that dominate the training data, and follows the token that all
          rows of calib begin with, if there is one (BOS). How the learning rate is searched was not read: lr_grid takes
          the value with the least distance, over all blocks, on an eighth of the text that is held out. Activations are
          rounded per token, symmetrically
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant, gptq, rtn, smoothquant
from requant.reference_impls._activation import wrap_linears
from requant.reference_impls._calib import check_calib
from requant.reference_impls._generate import write_text
from requant.reference_impls._learn import descend, in_order, samples
from requant.reference_impls._quant import QuantizationError, check_choices
from requant.reference_impls._straight_through import straight_through
from requant.reference_impls._walk import (
    Block,
    UnsupportedModelError,
    copy_model,
    decoder_blocks,
    named_linears,
    walk_blocks,
)

TINY = {"lr": 1e-3}
HOSTS = {"gptq": gptq, "rtn": rtn, "smoothquant": rtn}  # the last one rounds to nearest what is smoothed


@dataclass(frozen=True)
class Config:
    """Defaults: 4 bits on top of GPTQ, as recalled from the main table."""

    w_bits: int = 4  # main table, recalled; also 2 with groups
    group_size: int | None = None  # inputs per scale; None = whole row
    symmetric: bool = False
    host: str = "gptq"  # main table; rtn and smoothquant in the table of integrations
    a_bits: int | None = None  # table of integrations; None = not rounded
    alpha: float = 0.5  # of host smoothquant
    generated: bool = True  # calibration text written by the model, as long as calib; off: calib itself
    n_iters: int = 1  # Algorithm 1: passes over the calibration text
    lr: float = 1e-5  # where the paper's grid search begins
    lr_grid: tuple[float, ...] = ()  # values of lr to search; none: lr as it is
    lr_scale: float = 5.0  # growth of lr with depth; the default of the unofficial code
    batch_size: int = 1  # Algorithm 1: samples for each step
    seed: int = 0  # of the text

    def __post_init__(self) -> None:
        object.__setattr__(self, "lr_grid", tuple(self.lr_grid))  # lists come from JSON
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


def round_block(block: Block, cfg: Config) -> None:
    """The host's rounding of a block, in place: its weights and, with a_bits, what its linears read."""
    host, host_cfg = _host(cfg)
    hessians: Mapping[str, Tensor] = block.hessians() if cfg.host == "gptq" else {}
    for name, linear in named_linears(block.module).items():
        linear.weight.copy_(host.quantize_weight(linear.weight.float(), hessians.get(name), host_cfg))
    if cfg.a_bits is not None:
        rounding = partial(_quant.absmax_fake_quant, bits=cfg.a_bits)
        wrap_linears(block.module, partial(straight_through, rounding=rounding))


@torch.no_grad()
def tweaked(model: nn.Module, text: Tensor, cfg: Config, n_held_out: int = 0) -> tuple[nn.Module, float]:
    """The quantized and tweaked model, and the distances of all blocks on the last rows of text, not trained on."""
    model, far, n = copy_model(model), 0.0, len(text) - n_held_out
    depth = len(decoder_blocks(model))
    for block in walk_blocks(model, text):
        targets = block.run()
        round_block(block, cfg)
        tweak(block, targets, n, cfg.lr * (1 + cfg.lr_scale * block.index / depth), cfg)
        if n_held_out:
            rest = torch.arange(n, len(text))
            outputs = block.forward(samples(block.inputs, rest))
            far += float(distance(samples(targets, rest), outputs))
    return model, far


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Quantize and tweak block by block (Algorithm 1).

    Both outputs of a block, before and after, are on what the quantized and tweaked blocks before it give.
    """
    check_calib(calib)
    text = text_for(model, calib, cfg)
    if cfg.host == "smoothquant":
        model = smoothquant.smooth(model, text, cfg.alpha)
    if cfg.lr_grid:
        cfg = replace(cfg, lr=search_lr(model, text, cfg))
    return tweaked(model, text, cfg)[0]


def search_lr(model: nn.Module, text: Tensor, cfg: Config) -> float:
    """The lr of the grid that leaves the least distance on the last eighth of the text."""
    n = max(1, len(text) // 8)
    if len(text) <= n:
        raise QuantizationError("lr_grid needs a second row of text to judge by; pass more samples")
    return min(cfg.lr_grid, key=lambda lr: tweaked(model, text, replace(cfg, lr=lr), n)[1])


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
