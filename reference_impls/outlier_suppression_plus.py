"""Outlier Suppression+: centre each channel of a norm's output, then shrink those beyond one searched threshold.

Paper     Wei et al., EMNLP 2023, arXiv:2304.09145v3 (tables as public transcriptions give them)
Entry     papers/outlier_suppression_plus.yaml
Scope     weights and inputs of nn.Linear in decoder blocks, with static activations the four inputs of the attention
          products too; embeddings and lm_head untouched
Deviates  what the text leaves open (the negative side of Eq. 8, the steps of the grid, whose error) is as in the
          official code; thresholds come from `search_samples` sequences, the code's first batch having no stated
          size; ranges are averaged over sequences, not batches; attention products are not rounded while
          thresholds are searched; weight scales are rounded to float16. Token-wise clipping (BLOOM, BERT) and
          OPT-350M's post-norm blocks are not offered. A norm that feeds both sublayers (Phi) adds their errors
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as product

from requant.reference_impls import _quant
from requant.reference_impls._activation import QuantInput, Shared, transform_attention
from requant.reference_impls._anatomy import BlockAnatomy, anatomy, require_pre_norm
from requant.reference_impls._equivalence import Site, sites
from requant.reference_impls._quant import QuantizationError
from requant.reference_impls._walk import (
    Block,
    UnsupportedModelError,
    check_calib,
    copy_model,
    replace_module,
    visit_blocks,
    walk_blocks,
)


@dataclass(frozen=True)
class Config:
    """Defaults: the INT6 rows of OPT (Table 2). LLaMA (Table 3): per_token, no shift, lower_bound 0.1."""

    w_bits: int = 6  # Table 2 (also 8; 4 in Table 3)
    a_bits: int = 6  # Table 2
    symmetric: bool = False  # code, exp/opt/int6.yaml; True in int8.yaml
    w_granularity: str = "per_channel"  # code, int6.yaml; per_tensor in int8.yaml (INT8*)
    a_granularity: str = "per_tensor_static"  # code, int6.yaml; per_token for LLaMA; per_group with INT4 OPT
    group_size: int | None = None  # code, int4_group.yaml: 1024 values a scale; None: a row, a token
    shift: bool = True  # Sec. 4.1; False for LLaMA, which has no biases
    scale: bool = True  # Eq. 8; False: an ablation of Table 5
    attention_in_loss: bool = True  # Table 5; False: error of the linears alone
    n_grid: int = 100  # code: least number of thresholds
    max_step: float | None = 0.5  # code: more of them where max X exceeds n_grid / 2; None: never more
    lower_bound: float = 1.0  # code: last threshold; 0.1 for LLaMA
    search_samples: int = 1  # calibration sequences that decide; the first batch in the code
    scale_down: bool = False  # Table 10: up_proj takes a scale of down_proj's input
    quantize_down: bool = True  # False in Table 3, LLaMA (code, *_disable.yaml: nor its weight)
    quantize_bmm_input: bool = True  # code: q, k, v and probabilities; False for LLaMA and INT4 OPT

    def __post_init__(self) -> None:
        known = {"w_granularity": ("per_channel", "per_tensor"),
                 "a_granularity": ("per_tensor_static", "per_token", "per_group")}  # fmt: skip
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise QuantizationError(
                    f"{name} is {getattr(self, name)!r}; choose one of {', '.join(values)}"
                )
        if min(self.w_bits, self.a_bits) < 2 or self.n_grid < 1 or self.search_samples < 1:
            raise QuantizationError("w_bits, a_bits must be 2 or more, n_grid and search_samples 1 or more")
        if self.quantize_bmm_input and self.a_granularity != "per_tensor_static":
            raise QuantizationError(
                "with dynamic activations the attention products stay as they are: "
                "set quantize_bmm_input=False"
            )


TINY = {"n_grid": 4, "max_step": None}


# --- quantizers -------------------------------------------------------------------------------------------------------


def _grid(W: Tensor, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Groups [d_out, n_groups, group], scale and zero point [d_out or 1, n_groups or 1, 1]."""
    groups = _quant.grouped(W, cfg.group_size)
    choose = _quant.absmax_qparams if cfg.symmetric else _quant.choose_qparams
    source = W.reshape(1, 1, -1) if cfg.w_granularity == "per_tensor" else groups
    return groups, *choose(source, cfg.w_bits)


def quantize_weight(W: Tensor, H: Tensor | None, cfg: Config) -> Tensor:
    """Round W [d_out, d_in] (already scaled) to nearest; H is ignored. Dequantized, same shape."""
    groups, scale, zero_point = _grid(W, cfg)
    return _quant.dequantize(
        _quant.quantize(groups, scale, zero_point, cfg.w_bits), scale, zero_point
    ).flatten(1)


def pack_weight(W: Tensor, H: Tensor | None, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer; shift and scale live in W, in its bias and in the norm."""
    groups, scale, zero_point = _grid(W, cfg)
    codes = _quant.quantize(groups, scale, zero_point, cfg.w_bits)
    return _quant.pack_affine(codes, scale, zero_point, cfg.w_bits, cfg.symmetric)


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    return _quant.unpack_affine(packed, cfg.w_bits, cfg.symmetric)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + (16 + b)/g with g the weights a scale; static activation ranges, two numbers a tensor, are not counted."""
    group = d_out * d_in if cfg.w_granularity == "per_tensor" else cfg.group_size
    return _quant.affine_bits(cfg.w_bits, group, d_in, cfg.symmetric)


def round_between(x: Tensor, low: Tensor, high: Tensor, cfg: Config) -> Tensor:
    """Round x to the grid of a_bits from low to high, which is widened to hold 0; values beyond are clamped."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if cfg.symmetric:
        limit = 2 ** (cfg.a_bits - 1) - 1
        scale = (torch.maximum(high, -low) / limit).clamp(min=1e-9)
        return (x / scale).round().clamp(-limit, limit) * scale
    scale = ((high - low) / (2**cfg.a_bits - 1)).clamp(min=1e-9)
    zero_point = (-low / scale).round()
    return ((x / scale).round() + zero_point).clamp(0, 2**cfg.a_bits - 1).sub(zero_point) * scale


class Rounding:
    """Rounds a tensor [..., seqlen, d]; a static range is the mean of the ranges of the sequences seen so far.

    `seen` is None where the range is that of the present tensor: dynamic activations, and the search.
    """

    def __init__(self, cfg: Config, static: bool = False):
        self.cfg, self.seen, self.observing = cfg, [] if static else None, static

    def __call__(self, x: Tensor) -> Tensor:
        if self.cfg.a_granularity != "per_tensor_static":
            size = self.cfg.group_size if self.cfg.a_granularity == "per_group" else None
            groups = _quant.grouped(x.flatten(0, -2), size)
            low, high = torch.aminmax(groups, dim=-1, keepdim=True)
            return round_between(groups, low, high, self.cfg).view_as(x)
        if self.seen is None:
            return round_between(x, x.amin(), x.amax(), self.cfg)
        if self.observing:
            one = (
                x.flatten(1) if x.ndim > 2 else x.reshape(1, -1)
            )  # a sequence a row; OPT's MLP sees one tensor
            self.seen += torch.stack(torch.aminmax(one, dim=1), 1).tolist()
        low, high = torch.tensor(self.seen, device=x.device).mean(0)
        return round_between(x, low, high, self.cfg)


# --- the search -------------------------------------------------------------------------------------------------------


class _Caught(Exception):
    """A probe has what was wanted."""


class _Probe(nn.Module):
    """A linear with rounded input and weight during the search; may answer with `given`, or end the pass."""

    def __init__(self, linear: nn.Linear, cfg: Config | None):
        super().__init__()
        self.linear, self.cfg, self.given, self.caught = linear, cfg, None, None

    def forward(self, x: Tensor) -> Tensor:
        if self.caught is not None:
            self.caught.append(x)
            raise _Caught
        if self.given is not None:
            return self.given
        if self.cfg is None:
            return self.linear(x)
        W = quantize_weight(self.linear.weight, None, self.cfg)
        return product(Rounding(self.cfg)(x), W, self.linear.bias)

    def catch(self, run: Callable[[], object]) -> Tensor:
        """What reaches this linear when `run` is called."""
        self.caught = []
        with suppress(_Caught):
            run()
        (x,), self.caught = self.caught, None
        return x


def _replace(parts: BlockAnatomy, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules into the places of the old ones in a block."""
    names = {module: name for name, module in parts.block.named_modules()}
    for old, module in new.items():
        replace_module(parts.block, names[old], module)


def shift_of(X: Tensor) -> Tensor:
    """z_j = (max X_j + min X_j) / 2 over all tokens (code): [d_in]."""
    low, high = torch.aminmax(X.flatten(0, -2), dim=0)
    return (high + low) / 2


def scale_of(X: Tensor, threshold: float) -> Tensor:
    """s_j = max(1, max X_j / t, min X_j / -t), Eq. 8 for both signs as in the official code: [d_in]."""
    low, high = torch.aminmax(X.flatten(0, -2), dim=0)
    return (torch.maximum(high, -low) / threshold).clamp(min=1.0)


def thresholds(X: Tensor, cfg: Config) -> list[float]:
    """Equal steps from max|X|, where every s_j is 1, down to lower_bound (official code)."""
    top = float(X.abs().max())
    n = cfg.n_grid if cfg.max_step is None else max(cfg.n_grid, int(float(X.max()) / cfg.max_step))
    return [top - (top - cfg.lower_bound) * i / n for i in range(n + 1)] if top > cfg.lower_bound else [top]


@torch.no_grad()
def search_scale(
    X: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    behind: Callable[[list[Tensor]], Tensor],
    cfg: Config,
) -> tuple[Tensor, list[float]]:
    """The scale whose rounded outputs are nearest to the exact ones behind the operators that follow (code).

    Args:
        X: [n, seqlen, d_in] already shifted; weights: [d_out, d_in] of all readers; biases: theirs, W z included.
        behind: outputs of the readers -> what is compared, [..., d].
    Returns: s [d_in] and the loss at each of `thresholds(X, cfg)`.
    """
    target = behind([product(X, W, b) for W, b in zip(weights, biases, strict=True)])
    losses, best = [], None
    for t in thresholds(X, cfg):
        s = scale_of(X, t)
        if cfg.a_granularity == "per_tensor_static":  # code: the range is the threshold, not that of the data
            rounded = round_between(X / s, X.new_tensor(-t), X.new_tensor(t), cfg)
        else:
            rounded = Rounding(cfg)(X / s)
        outputs = [
            product(rounded, quantize_weight(W * s, None, cfg), b)
            for W, b in zip(weights, biases, strict=True)
        ]
        losses.append(float((behind(outputs) - target).square().sum(-1).mean()))
        if losses[-1] <= min(losses) and (best is None or losses[-1] < min(losses[:-1])):
            best = s
    if best is None:
        raise QuantizationError("no threshold gives a finite error; do the activations hold inf or nan?")
    return best, losses


def _behind(block: Block, parts: BlockAnatomy, site: Site, probes: dict, cfg: Config) -> Callable:
    """What the search compares (code): softmax(Q K^T) V, act(gate) * up of a gated MLP, else the outputs alone."""
    sublayers = [(parts.attn, parts.qkv, parts.o)]
    if _gated(parts):
        sublayers.append((parts.mlp, parts.ups, parts.down))
    replayed = []
    for module, readers, end in sublayers if cfg.attention_in_loss else []:
        if readers[0] in site.linears:
            calls: list[tuple] = []
            handle = module.register_forward_pre_hook(
                lambda _m, args, kwargs, calls=calls: calls.append((args, kwargs)), with_kwargs=True
            )
            probes[end].catch(lambda: block.forward(block.inputs[0]))
            handle.remove()
            args, kwargs = calls[0]
            replayed.append((partial(module, *args, **kwargs), readers, probes[end]))

    def behind(outputs: list[Tensor]) -> Tensor:
        left, seen = dict(zip(site.linears, outputs, strict=True)), []
        for call, readers, end in replayed:
            for reader in readers:
                probes[reader].given = left.pop(reader)
            seen.append(end.catch(call))
            for reader in readers:
                probes[reader].given = None
        return torch.cat([*seen, *left.values()], -1)

    return behind


def _gated(parts: BlockAnatomy) -> bool:
    return parts.gate is not None or parts.up.out_features == 2 * parts.down.in_features


def _sites(parts: BlockAnatomy, config, cfg: Config) -> list[Site]:
    """Both norms, and the input of down_proj where that is asked for and a gate lets the scale pass."""
    if cfg.scale_down and not _gated(parts):
        raise UnsupportedModelError("only a gated MLP takes a scale of down_proj's input into up_proj")
    wanted = ("attn_norm", "mlp_norm", "up") if cfg.scale_down else ("attn_norm", "mlp_norm")
    return [site for site in sites(parts, config) if site.name in wanted]


@torch.no_grad()
def migrate(model: nn.Module, calib: Tensor, cfg: Config) -> nn.Module:
    """A copy of the model that computes the same function with shifted and scaled activations (Sec. 4.1).

    One pass over the first sequences decides all: each site sees what the blocks and sites before it, quantized and
    already migrated, give (official code).
    """
    require_pre_norm(model)
    check_calib(calib)
    model = copy_model(model)
    first, placed = calib[: cfg.search_samples], []
    for block in walk_blocks(model, first, batch_size=len(first)):
        parts = anatomy(block.module)
        linears = (*parts.qkv, parts.o, *parts.ups, parts.down)
        probes = {
            linear: _Probe(linear, None if linear is parts.down and not cfg.quantize_down else cfg)
            for linear in linears
        }
        _replace(parts, probes)
        placed.append((parts, {probe: linear for linear, probe in probes.items()}))
        for site in _sites(parts, model.config, cfg):
            X = probes[site.linears[0]].catch(lambda block=block: block.forward(block.inputs[0]))
            z = shift_of(X) if cfg.shift and site.shifts else None
            s = torch.ones(X.shape[-1], device=X.device)
            if cfg.scale:
                weights = [linear.weight for linear in site.linears]
                biases = [_bias(linear, z) for linear in site.linears]
                behind = _behind(block, parts, site, probes, cfg)
                s, _ = search_scale(X if z is None else X - z, weights, biases, behind, cfg)
            site.fold(s, z)
    for parts, linears in placed:  # only now: the walk has run the blocks with their probes
        _replace(parts, linears)
    return model


def _bias(linear: nn.Linear, z: Tensor | None) -> Tensor | None:
    return linear.bias if z is None else (0 if linear.bias is None else linear.bias) + linear.weight @ z


# --- the model --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Migrate, round the weights, and round activations; static ranges come from all of calib with these weights.

    Args:
        calib: int64 [n_samples, seqlen]; the first search_samples of it decide shifts and scales.
    Raises: UnsupportedModelError where a norm's output is not used by linears alone.
    """
    model = migrate(model, calib, cfg)
    static, found = cfg.a_granularity == "per_tensor_static", []

    def rounding() -> Rounding:
        found.append(Rounding(cfg, static))
        return found[-1]

    for parts in map(anatomy, visit_blocks(model)):
        for readers in (parts.qkv, [parts.o], parts.ups, [parts.down] if cfg.quantize_down else []):
            shared = Shared(rounding())
            for linear in readers:
                linear.weight.copy_(quantize_weight(linear.weight.float(), None, cfg))
            _replace(parts, {linear: QuantInput(linear, shared) for linear in readers})
        if cfg.quantize_bmm_input:
            ways = [rounding() for _ in range(3)]
            transform_attention(
                model,
                parts.attn,
                lambda *qkv, ways=ways: tuple(way(x) for way, x in zip(ways, qkv, strict=True)),
                rounding(),
            )
    if static:
        for batch in calib.split(8):
            model(batch.to(model.device), use_cache=False)
    for one in found:
        one.observing = False
    return model
