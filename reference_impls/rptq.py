"""RPTQ: channels with similar ranges move next to each other, and each such cluster has a static grid of its own.

Paper     Yuan et al., 2023, arXiv:2304.01089v4 (equations are not cited: the official code was read instead)
Entry     papers/rptq.yaml
Scope     weights and inputs of nn.Linear in decoder blocks, all inputs of the attention products; embeddings, final
          norm and lm_head untouched
Deviates  queries and keys are not moved: rotary embedding does not commute with that, and where it could be done the
          numbers are the same; a gated MLP moves the rows of both projections; with grouped-query attention the heads
          that share a value head share its clusters; k-means is our own, not scikit-learn's; GPTQ sees the inputs of
          linears unquantized (the quantizers of the code pass everything while they calibrate); weight steps are
          rounded to float16. A layer on its own clusters inputs by second moments in place of extremes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant, gptq
from requant.reference_impls._activation import QuantInput, one_each, transform_attention
from requant.reference_impls._anatomy import BlockAnatomy, anatomy, heads, require_pre_norm
from requant.reference_impls._calib import check_calib
from requant.reference_impls._quant import QuantizationError
from requant.reference_impls._walk import Block, copy_model, replace_module, walk_blocks
from requant.reference_impls.parts.rptq_channel_order import reader_groups, reorder_channels
from requant.reference_impls.parts.rptq_clusters import (
    Ranges,
    Rounding,
    cluster,
    cluster_heads,
    codes_of,
    grid,
    spread,
)


@dataclass(frozen=True)
class Config:
    """Defaults: the W4A4 rows of the official README. W4A4KV: a_bits 16 and kv_bits 4."""

    w_bits: int = 4  # code, --wbits
    a_bits: int = (
        4  # code, --abits; 16 = not quantized, with probabilities and norm outputs (--only_quant_kv)
    )
    kv_bits: int | None = None  # keys and values; None = a_bits
    norm_bits: int = 8  # code: outputs of norms have max(8, a_bits); OmniQuant's rerun (its Table A25): 4
    hidden_clusters: int = 32  # code, --R1_clusters, --R4_clusters: outputs of norms
    qk_clusters: int = 4  # code, --R2_clusters, a head
    v_clusters: int = 4  # code, --R3_clusters, a head
    down_clusters: int = 32  # code, --R5_clusters: inputs of the last projection
    ema: float = 0.99  # code, --metric ema_minmax: share of the range so far when a new sequence comes
    kmeans_restarts: int = 10  # code, n_init
    damp_ratio: float = 0.01  # code, --percdamp
    block_size: int = 128  # code, blocksize of GPTQ
    seed: int = 0  # code, random_state of k-means

    def __post_init__(self) -> None:
        if min(self.w_bits, self.a_bits, self.norm_bits, self.kv_bits or 2) < 2:
            raise QuantizationError("w_bits, a_bits, kv_bits and norm_bits must be 2 or more")
        if min(self.hidden_clusters, self.qk_clusters, self.v_clusters, self.down_clusters) < 1:
            raise QuantizationError("every number of clusters must be 1 or more")


TINY = {"kmeans_restarts": 2, "hidden_clusters": 8, "down_clusters": 8}


# --- one layer --------------------------------------------------------------------------------------------------------


def round_weight(W: Tensor, H: Tensor, labels: Tensor, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """GPTQ on fixed grids, one for each row and input cluster, from the minimum to the maximum there.

    Returns: signed codes [d_out, d_in], scale and zero point [d_out, n_clusters] (stored precision).
    """
    low, high = spread(labels, W, W)
    scale, zero_point = grid(low, high, cfg.w_bits)
    scale = _quant.stored_scale(scale, cfg.w_bits)
    grids = iter(zip(scale.T[..., None], zero_point.T[..., None], strict=True))  # asked for column by column
    how = gptq.Config(cfg.w_bits, 1, damp_ratio=cfg.damp_ratio, block_size=cfg.block_size, static_groups=True)
    rounded = gptq.round_columns(W, H, how, lambda _x, _bits, _symmetric: next(grids), quantize=codes_of)
    first = torch.stack([(labels == one).nonzero()[0, 0] for one in range(int(labels.max()) + 1)])
    return rounded.codes.T, scale[:, first], zero_point[:, first]


def _labels(H: Tensor, cfg: Config) -> Tensor:
    rms = H.diagonal().sqrt()
    return cluster(torch.stack([rms, -rms], -1), min(cfg.hidden_clusters, len(H)), cfg)


def quantize_weight(W: Tensor, H: Tensor, cfg: Config) -> Tensor:
    """`round_weight` with clusters of inputs of like second moment, dequantized: float32 [d_out, d_in]."""
    labels = _labels(H, cfg)
    codes, scale, zero_point = round_weight(W, H, labels, cfg)
    return _quant.dequantize(codes, scale[:, labels], zero_point[:, labels])


def pack_weight(W: Tensor, H: Tensor, cfg: Config) -> dict[str, Tensor]:
    """Codes in cluster order, float16 scale and 16-bit zero point a row and cluster, cluster sizes, and the order."""
    labels = _labels(H, cfg)
    codes, scale, zero_point = round_weight(W, H, labels, cfg)
    order = labels.argsort(stable=True)
    return {
        "shape": torch.tensor(W.shape, dtype=torch.int32),
        "codes": _quant.pack_bits(codes[:, order] + 2 ** (cfg.w_bits - 1), cfg.w_bits),
        "scale": scale.half() if cfg.w_bits <= 8 else scale,
        "zero_point": zero_point.to(torch.int16),
        "counts": torch.bincount(labels).to(torch.int32),
        "order": order.to(torch.int32),
    }


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    shape, counts = tuple(packed["shape"].tolist()), packed["counts"].long()
    codes = _quant.unpack_bits(packed["codes"], cfg.w_bits, shape).float() - 2 ** (cfg.w_bits - 1)
    scale, zero_point = (
        packed[name].float().repeat_interleave(counts, 1) for name in ("scale", "zero_point")
    )
    return _quant.dequantize(codes, scale, zero_point)[:, packed["order"].long().argsort()]


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + 32 k/d_in for k clusters, and 32 (d_in + k) bits a layer for the order (a norm's in a model) and sizes."""
    k = min(cfg.hidden_clusters, d_in)
    return cfg.w_bits + (32 if cfg.w_bits <= 8 else 48) * k / d_in + 32 * (d_in + k) / (d_out * d_in)


# --- the model --------------------------------------------------------------------------------------------------------


def _observe(block: Block, parts: BlockAnatomy, model: nn.Module, cfg: Config) -> dict[object, Ranges]:
    """Ranges of the inputs of the linears (by the first of each group) and of q, k, v, in one pass."""
    first = [group[0] for group in reader_groups(parts)]
    found: dict[object, Ranges] = {key: Ranges() for key in (*first, *"qkv")}
    seqlen = block.inputs[0].shape[1]

    def see(*qkv: Tensor) -> tuple[Tensor, ...]:
        for name, x in zip("qkv", qkv, strict=True):
            found[name].see(x.transpose(1, 2).flatten(2))
        return qkv

    transform_attention(model, parts.attn, see, _probabilities if cfg.a_bits < 16 else None)
    readers = {str(i): linear for i, linear in enumerate(first)}
    block.observe(readers, lambda name, X: found[readers[name]].see(X.unflatten(0, (-1, seqlen))))
    return found


def _probabilities(x: Tensor) -> Tensor:
    """The fixed grid of 256 levels from 0 to 1 (code, fix0to1)."""
    return (x * 255).round() / 255


def _by_head(features: Tensor, n_heads: int) -> Tensor:
    return features.unflatten(0, (n_heads, -1))  # [n_heads, head_dim, f]


def _clusters(parts: BlockAnatomy, config, found: dict, cfg: Config) -> dict[object, Tensor]:
    """Labels of the channels of every tensor observed. v has those of o's input, which keeps each head together."""
    geometry = heads(parts, config)
    n_kv, repeat = geometry.n_kv_heads, geometry.n_heads // geometry.n_kv_heads
    labels = {
        readers[0]: cluster(found[readers[0]].features(), cfg.hidden_clusters, cfg)
        for _norm, readers in parts.norm_groups
    }
    labels[parts.down] = cluster(found[parts.down].features(), cfg.down_clusters, cfg)
    shared = _by_head(found[parts.o].features(), n_kv).unflatten(
        1, (repeat, -1)
    )  # [n_kv, repeat, head_dim, 2]
    outermost = torch.stack([shared[..., 0].amax(1), shared[..., 1].amin(1)], -1)
    labels["v"] = cluster_heads(outermost, cfg.v_clusters, cfg)
    labels[parts.o] = _repeated(labels["v"], n_kv, repeat)
    q = _by_head(found["q"].features(), n_kv).unflatten(1, (repeat, -1)).transpose(1, 2).flatten(2)
    k = _by_head(found["k"].features(), n_kv)
    labels["k"] = cluster_heads(torch.cat([q, k], -1), cfg.qk_clusters, cfg)
    labels["q"] = _repeated(labels["k"], n_kv, repeat)
    return labels


def _repeated(labels: Tensor, n_kv: int, repeat: int) -> Tensor:
    return labels.view(n_kv, 1, -1).expand(-1, repeat, -1).flatten()


def _heads_first(one: Rounding | None, n_heads: int) -> Callable[[Tensor], Tensor]:
    if one is None:
        return lambda x: x
    shape = (n_heads, 1, -1)
    return Rounding(one.scale.view(shape), one.zero_point.view(shape), one.bits)


@torch.no_grad()
def reorder(model: nn.Module, calib: Tensor | None, cfg: Config, rounding: bool = False) -> nn.Module:
    """A copy of the model with its channels in cluster order, which computes the same; with `rounding` all of RPTQ.

    Each block is observed as it was on what the blocks before it, already quantized, give.
    """
    require_pre_norm(model)
    check_calib(calib)
    model = copy_model(model)
    for block in walk_blocks(model, calib):
        parts = anatomy(block.module)
        found = _observe(block, parts, model, cfg)
        labels = _clusters(parts, model.config, found, cfg)
        hessians = block.hessians() if rounding else {}
        names = {linear: name for name, linear in block.module.named_modules()}
        orders = reorder_channels(parts, model.config, labels)
        parts.attn.requant_transform = parts.attn.requant_weigh = None
        if not rounding:
            continue
        for readers in reader_groups(parts):
            key = readers[0]
            order, bits = orders[key], cfg.a_bits
            if key in (parts.qkv[0], parts.ups[0]) and bits < 16:
                bits = max(cfg.norm_bits, bits)
            moved, H = labels[key][order], hessians[names[key]][order][:, order]
            together = torch.cat([linear.weight.float() for linear in readers])
            codes, scale, zero_point = round_weight(together, H, moved, cfg)
            Q = _quant.dequantize(codes, scale[:, moved], zero_point[:, moved])
            static = found[key].rounding(labels[key], bits, cfg.ema)
            if static is not None:
                static = replace(static, scale=static.scale[order], zero_point=static.zero_point[order])
            for linear, rows in zip(readers, Q.split([one.out_features for one in readers]), strict=True):
                linear.weight.copy_(rows)
                replace_module(block.module, names[linear], QuantInput(linear, static))
        _round_attention(model, parts, found, labels, orders, cfg)
    return model


def _round_attention(
    model, parts: BlockAnatomy, found: dict, labels: dict, orders: dict, cfg: Config
) -> None:
    geometry = heads(parts, model.config)
    n_heads = {"q": geometry.n_heads, "k": geometry.n_kv_heads, "v": geometry.n_kv_heads}
    kv_bits = cfg.a_bits if cfg.kv_bits is None else cfg.kv_bits
    ways: list[Callable] = []
    for name, bits in (("q", cfg.a_bits), ("k", kv_bits), ("v", kv_bits)):
        static = found[name].rounding(labels[name], bits, cfg.ema)
        if static is not None and name == "v":
            static = replace(
                static, scale=static.scale[orders["v"]], zero_point=static.zero_point[orders["v"]]
            )
        ways.append(_heads_first(static, n_heads[name]))

    transform_attention(model, parts.attn, one_each(*ways), _probabilities if cfg.a_bits < 16 else None)


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Reorder and quantize the decoder blocks first to last.

    Raises: UnsupportedModelError where a norm's output is not used by linears alone, or attention is out of reach.
    """
    return reorder(model, calib, cfg, rounding=True)
