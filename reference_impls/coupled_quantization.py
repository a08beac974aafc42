"""Coupled Quantization: neighbouring channels of a key or value share one code from a codebook learned offline.

Paper     Zhang et al., NeurIPS 2024, arXiv:2405.03917v1; tables, figures and equations below are numbered as in the
          NeurIPS version, which was read in public transcriptions only   Entry  papers/coupled_quantization.yaml
Scope     keys (before the rotary embedding) and values of all attention layers; weights, other activations untouched
Deviates  no code is public, so these are ours: when k-means stops; empty clusters keep their centroid; the window
          counts the query's own token. Keys are taken where attention hands them to its cache and the rotary
          embedding is inverted there, which costs a rounding error but fits every family; keys with a norm of their
          own (Qwen3, Gemma 3) are thus coded after it. `CoupledCache` decodes into whole tensors at every read, where
          the NeurIPS version has fused kernels, and keeps each position's rotary table, which is not counted
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig

from requant.reference_impls import _quant
from requant.reference_impls._anatomy import block_anatomies
from requant.reference_impls._calib import check_calib
from requant.reference_impls._coded_cache import (
    CodedAttention,
    Tables,
    intercept,
    rotate,
    use_windowed_attention,
)
from requant.reference_impls._coder import ELEMENTS, Coder
from requant.reference_impls._kmeans import weighted_kmeans
from requant.reference_impls._quant import QuantizationError, check_choices
from requant.reference_impls._walk import copy_model, require_whole

Samples = tuple[Tensor, Tensor]  # vectors [n_tokens, n_groups, c], weights [n_tokens, n_groups]


@dataclass(frozen=True)
class Config:
    """Defaults: CQ-8c8b, one bit a number. CQ-<c>c<b>b has channels c and code_bits b; also 2c8b, 4c8b, 8c10b."""

    channels: int = 8  # c, contiguous channels of one head that share a code (Table 1)
    code_bits: int = 8  # b (Table 1); b/c bits a number
    codebook: str = "fisher"  # Eq. 6; "kmeans": Eq. 5; "integer": min-max grid, the INT rows of Table 1
    pre_rope: bool = True  # keys are coded before the rotary embedding
    window: int = 0  # latest keys and values that a query reads unquantized; 0 in Table 1, 128 in Fig. 1
    max_iterations: int = 100  # of k-means; the paper's number is not known
    seed: int = 0  # k-means++


# --- codebooks ------------------------------------------------------------------------------------------------


def learn_centroids(vectors: Tensor, weights: Tensor, cfg: Config, generator: torch.Generator) -> Tensor:
    """The codebook of one layer's keys or values.

    Args:
        vectors: [n_tokens, n_groups, c].
        weights: [n_tokens, n_groups]; they count for codebook="fisher" only.
    Returns: [n_groups, 2^code_bits, c] float16, as stored.
    """
    points = vectors.float().permute(1, 2, 0).contiguous()  # [n_groups, c, n_tokens]
    if cfg.codebook == "integer":
        scale, zero_point = _quant.choose_qparams(points, cfg.code_bits)  # [n_groups, 1, 1]
        codes = torch.arange(2.0**cfg.code_bits).to(scale)[:, None]
        return _quant.dequantize(codes, scale, zero_point).half()
    weights = weights.T.contiguous() if cfg.codebook == "fisher" else torch.ones_like(points[:, 0])
    at_once = max(1, ELEMENTS // (2**cfg.code_bits * points.shape[-1]))
    learned = [
        weighted_kmeans(some, w, 2**cfg.code_bits, cfg.max_iterations, generator)[0]
        for some, w in zip(points.split(at_once), weights.split(at_once), strict=True)
    ]
    return torch.cat(learned).half()


# --- calibration ----------------------------------------------------------------------------------------------


def record(model: nn.Module, calib: Tensor, cfg: Config) -> list[tuple[Samples, Samples]]:
    """Keys and values of each layer on calib, with the Fisher weight w = g^T g of every vector (Eq. 6).

    g is the gradient of the summed next-token loss; only codebook="fisher" needs it, otherwise all weights are 1. The
    last token of a sample has weight 0: no loss depends on its key and value.
    """
    attentions, fisher = [part.attn for part in block_anatomies(model)], cfg.codebook == "fisher"
    kept = [([], []) for _ in attentions]
    seen: dict[int, tuple[Tensor, Tensor, Tables | None]] = {}

    def watch(index: int) -> Callable:
        def see(key: Tensor, value: Tensor, tables: Tables | None, *_rest) -> tuple[Tensor, Tensor]:
            if fisher:  # weights are frozen, so the first layer's keys and values are leaves
                key, value = (x if x.requires_grad else x.requires_grad_() for x in (key, value))
            seen[index] = key, value, tables
            return key, value

        return see

    def samples(index: int, what: int, grad: Tensor | None) -> Samples:
        pair, tables = (seen[index][what].detach(), grad), seen[index][2]
        if cfg.pre_rope and what == 0:
            # gradients turn back as keys do: the transpose of a rotation is its inverse
            pair = (x if x is None else rotate(type(attentions[index]), x, tables, back=True) for x in pair)
        vectors, g = (x if x is None else _grouped(x, cfg.channels) for x in pair)
        return vectors, torch.ones_like(vectors[..., 0]) if g is None else g.float().square().sum(-1)

    handles = [intercept(attention, lambda _module, i=i: watch(i)) for i, attention in enumerate(attentions)]
    try:
        for batch in calib.to(model.device).split(max(1, 4096 // calib.shape[1])):
            with torch.set_grad_enabled(fisher):
                logits = model(batch, use_cache=False).logits
                tensors = [x for *pair, _ in seen.values() for x in pair]
                grads = iter(_gradients(logits, batch, tensors) if fisher else [None] * len(tensors))
            for index in seen:
                for what in (0, 1):
                    kept[index][what].append(samples(index, what, next(grads)))
    finally:
        for handle in handles:
            handle.remove()
    return [tuple(tuple(map(torch.cat, zip(*parts, strict=True))) for parts in pair) for pair in kept]


def _gradients(logits: Tensor, tokens: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the summed next-token loss; a sum, so that all batches count alike."""
    loss = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum"
    )
    return torch.autograd.grad(loss, tensors)


def _grouped(x: Tensor, channels: int) -> Tensor:
    """[batch, kv_heads, seqlen, head_dim] -> [n_tokens, n_groups, c]; no group reaches across heads."""
    if x.shape[-1] % channels:
        raise QuantizationError(f"channels {channels} does not divide the head dimension {x.shape[-1]}")
    return x.transpose(1, 2).flatten(0, 1).unflatten(-1, (-1, channels)).flatten(1, 2)


# --- the quantized model --------------------------------------------------------------------------------------


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """A copy of the model in which every attention read, of a token's own key too, sees coded keys and values.

    Args:
        calib: int64 [n_samples, seqlen]; the paper takes 16 x 2048 tokens of the WikiText-2 train split.
    Raises: QuantizationError for a Config that does not fit; UnsupportedModelError where keys cannot be reached.
    """
    check_calib(calib)
    check_choices(cfg, codebook=("fisher", "kmeans", "integer"))
    if cfg.codebook == "integer" and cfg.channels != 1:
        raise QuantizationError(f"an integer grid couples nothing: channels must be 1, not {cfg.channels}")
    if not 1 <= cfg.code_bits <= 16:
        raise QuantizationError(f"code_bits must lie in 1..16, not {cfg.code_bits}")
    if cfg.codebook == "fisher":
        require_whole(model, "coupled_quantization with codebook fisher")
    model = copy_model(model)
    return code_attention(model, record(model, calib, cfg), cfg)


def code_attention(model: nn.Module, samples: list[tuple[Samples, Samples]], cfg: Config) -> nn.Module:
    """Learn codebooks from what `record` returned and put them into the model, in place."""
    generator = torch.Generator().manual_seed(cfg.seed)
    if cfg.window:
        use_windowed_attention(model)
    for part, pair in zip(block_anatomies(model), samples, strict=True):
        key, value = (Coder(learn_centroids(*each, cfg, generator)) for each in pair)
        CodedAttention(type(part.attn), key, value, window=cfg.window, pre_rope=cfg.pre_rope).attach(
            part.attn
        )
    return model


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """16: weights are left alone, in the half precision that the paper runs them in."""
    return 16.0


def bits_per_number(cfg: Config) -> float:
    """b/c bits a cached number; the codebooks (`codebook_numbers`) and an exact window come on top."""
    return cfg.code_bits / cfg.channels


def codebook_numbers(config: PreTrainedConfig, cfg: Config) -> int:
    """float16 numbers in all codebooks of a model with this transformers config: 2^b a channel, whatever c is."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * 2 * heads * head_dim * 2**cfg.code_bits
