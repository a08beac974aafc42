"""Outlier Suppression+: centre each channel of a norm's output, then shrink those beyond one searched threshold.

Paper     Wei et al., EMNLP 2023, arXiv:2304.09145v3 (tables as public transcriptions give them)
Entry     papers/outlier_suppression_plus.yaml
Scope     weights and inputs of nn.Linear in decoder blocks, with static activations the four inputs of the attention
          products too; embeddings and lm_head untouched
Deviates  both sides of a channel count and thresholds end at a bound, as in the official code (text: one side, Eq. 8,
          `both_sides`, and k/K of the largest value, `lower_bound` None); what the text leaves open (whose error) is as
          in the code; thresholds come from `search_samples` sequences, the code's first batch having no stated size;
          ranges are averaged over sequences, not batches; attention products are not rounded while thresholds are
          searched; weight scales are rounded to float16. The ratio of token-wise clipping (BLOOM) is given, not
          searched, and holds for each sequence; OPT-350M's post-norm blocks are not offered. A norm that feeds both
          sublayers (Phi) adds their errors
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as product

from requant.reference_impls import _quant
from requant.reference_impls._activation import one_each, transform_attention, transform_inputs
from requant.reference_impls._anatomy import BlockAnatomy, anatomy, require_pre_norm
from requant.reference_impls._calib import check_calib
from requant.reference_impls._equivalence import Site, sites
from requant.reference_impls._probes import Probe, outputs_behind, replace_linears
from requant.reference_impls._quant import QuantizationError, check_choices
from requant.reference_impls._ranges import RangeRounding, round_between
from requant.reference_impls._walk import UnsupportedModelError, copy_model, visit_blocks, walk_blocks
from requant.reference_impls.parts.outlier_suppression_plus_thresholds import scale_of, shift_of, thresholds


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
    lower_bound: float | None = 1.0  # code: last threshold; 0.1 for LLaMA; None: the text, 1/K of the first
    both_sides: bool = True  # code; False: Eq. 8, where a channel's negative values do not count
    search_samples: int = 1  # calibration sequences that decide; the first batch in the code
    scale_down: bool = False  # Table 10: up_proj takes a scale of down_proj's input
    quantize_down: bool = True  # False in Table 3, LLaMA (code, *_disable.yaml: nor its weight)
    token_clip_ratio: float = 0.0  # BLOOM: 0.005 at 8 bits, 0.015 at 6; tokens that static ranges leave out
    quantize_bmm_input: bool = True  # code: q, k, v and probabilities; False for LLaMA and INT4 OPT

    def __post_init__(self) -> None:
        check_choices(
            self,
            w_granularity=("per_channel", "per_tensor"),
            a_granularity=("per_tensor_static", "per_token", "per_group"),
        )
        if min(self.w_bits, self.a_bits) < 2 or self.n_grid < 1 or self.search_samples < 1:
            raise QuantizationError("w_bits, a_bits must be 2 or more, n_grid and search_samples 1 or more")
        if not 0 <= self.token_clip_ratio < 1:
            raise QuantizationError(f"token_clip_ratio is {self.token_clip_ratio}; choose a share in [0, 1)")
        if self.quantize_bmm_input and self.a_granularity != "per_tensor_static":
            raise QuantizationError(
                "with dynamic activations the attention products stay as they are: set quantize_bmm_input=False"
            )


TINY = {"n_grid": 4, "max_step": None}


# --- quantizers -------------------------------------------------------------------------------------------------------


def _round(W: Tensor, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [d_out, n_groups, group], scale and zero point [d_out or 1, n_groups or 1, 1]."""
    groups = _quant.grouped(W, cfg.group_size)
    choose = _quant.absmax_qparams if cfg.symmetric else _quant.choose_qparams
    source = W.reshape(1, 1, -1) if cfg.w_granularity == "per_tensor" else groups
    scale, zero_point = choose(source, cfg.w_bits)
    return _quant.quantize(groups, scale, zero_point, cfg.w_bits), scale, zero_point


def quantize_weight(W: Tensor, H: Tensor | None, cfg: Config) -> Tensor:
    """Round W [d_out, d_in] (already scaled) to nearest; H is ignored. Dequantized, same shape."""
    return _quant.dequantize(*_round(W, cfg)).flatten(1)


def pack_weight(W: Tensor, H: Tensor | None, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer; shift and scale live in W, in its bias and in the norm."""
    return _quant.pack_affine(*_round(W, cfg), cfg.w_bits, cfg.symmetric)


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    return _quant.unpack_affine(packed, cfg.w_bits, cfg.symmetric)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + (16 + b)/g with g the weights a scale; static activation ranges, two numbers a tensor, are not counted."""
    group = d_out * d_in if cfg.w_granularity == "per_tensor" else cfg.group_size
    return _quant.affine_bits(cfg.w_bits, group, d_in, cfg.symmetric)


def _rounding(cfg: Config, static: bool = False, token_clip_ratio: float = 0.0) -> RangeRounding:
    return RangeRounding(
        cfg.a_bits, cfg.symmetric, cfg.a_granularity, cfg.group_size, static, token_clip_ratio
    )


# --- the search -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def search_scale(
    X: Tensor,
    readers: list[tuple[Tensor, Tensor | None]],
    behind: Callable[[list[Tensor]], Tensor],
    cfg: Config,
) -> Tensor:
    """The scale s [d_in] whose rounded outputs are nearest to the exact ones behind the operators that follow (code).

    Args:
        X: [n, seqlen, d_in] already shifted; readers: weight [d_out, d_in] and bias, W z included, of each.
        behind: outputs of the readers -> what is compared, [..., d].
    Raises: QuantizationError if no threshold gives a finite error.
    """
    target = behind([product(X, W, b) for W, b in readers])
    best, least = None, float("inf")
    for t in thresholds(X, cfg):
        s = scale_of(X, t, cfg.both_sides)
        if cfg.a_granularity == "per_tensor_static":  # code: the range is the threshold, not that of the data
            rounded = round_between(X / s, X.new_tensor(-t), X.new_tensor(t), cfg.a_bits, cfg.symmetric)
        else:
            rounded = _rounding(cfg)(X / s)
        outputs = [product(rounded, quantize_weight(W * s, None, cfg), b) for W, b in readers]
        loss = float((behind(outputs) - target).square().sum(-1).mean())
        if loss < least:
            best, least = s, loss
    if best is None:
        raise QuantizationError("no threshold gives a finite error; do the activations hold inf or nan?")
    return best


def _sites(parts: BlockAnatomy, config, cfg: Config) -> list[Site]:
    """Both norms, and the input of down_proj where that is asked for and a gate lets the scale pass."""
    if cfg.scale_down and not parts.gated:
        raise UnsupportedModelError("only a gated MLP takes a scale of down_proj's input into up_proj")
    wanted = ("attn_norm", "mlp_norm", "up") if cfg.scale_down else ("attn_norm", "mlp_norm")
    return [site for site in sites(parts, config) if site.name in wanted]


def _sublayers(parts: BlockAnatomy, cfg: Config) -> list[tuple]:
    """Whose ends the search compares (code): softmax(Q K^T) V, act(gate) * up of a gated MLP; else readers alone."""
    gated = [(parts.mlp, parts.ups, parts.down)] if parts.gated else []
    return [(parts.attn, parts.qkv, parts.o), *gated] if cfg.attention_in_loss else []


def _rounded(linear: nn.Linear, cfg: Config, rounding: bool) -> Callable[[Tensor], Tensor]:
    """The linear as it is when it runs; with `rounding`, input and weight are rounded."""
    if not rounding:
        return linear
    return lambda x: product(_rounding(cfg)(x), quantize_weight(linear.weight, None, cfg), linear.bias)


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
            linear: Probe(linear, _rounded(linear, cfg, cfg.quantize_down or linear is not parts.down))
            for linear in linears
        }
        replace_linears(parts, probes)
        placed.append((parts, {probe: linear for linear, probe in probes.items()}))
        for site in _sites(parts, model.config, cfg):
            X = probes[site.linears[0]].catch(lambda block=block: block.forward(block.inputs[0]))
            z = shift_of(X) if cfg.shift and site.shifts else None
            s = torch.ones(X.shape[-1], device=X.device)
            if cfg.scale:
                readers = [(linear.weight, _bias(linear, z)) for linear in site.linears]
                behind = outputs_behind(block, site.linears, _sublayers(parts, cfg), probes)
                s = search_scale(X if z is None else X - z, readers, behind, cfg)
            site.fold(s, z)
    for parts, linears in placed:  # only now: the walk has run the blocks with their probes
        replace_linears(parts, linears)
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

    def rounding(clip_ratio: float = cfg.token_clip_ratio) -> RangeRounding:
        found.append(_rounding(cfg, static, clip_ratio))
        return found[-1]

    for parts in map(anatomy, visit_blocks(model)):
        for readers in (parts.qkv, [parts.o], parts.ups, [parts.down] if cfg.quantize_down else []):
            for linear in readers:
                linear.weight.copy_(quantize_weight(linear.weight.float(), None, cfg))
            transform_inputs(parts.block, readers, rounding())
        if cfg.quantize_bmm_input:
            ways = one_each(*(rounding() for _ in range(3)))
            transform_attention(model, parts.attn, ways, weigh=rounding(0.0))  # probabilities: not clipped
    if static:
        for batch in calib.split(8):
            model(batch.to(model.device), use_cache=False)
    for one in found:
        one.observing = False
    return model
