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

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig

from requant.reference_impls import _quant
from requant.reference_impls._anatomy import block_anatomies
from requant.reference_impls._coded_cache import (
    ELEMENTS,
    CodedAttention,
    Coder,
    CoupledCache,
    Tables,
    intercept,
    rotate,
    use_windowed_attention,
)
from requant.reference_impls._kmeans import relative_fall, weighted_kmeans
from requant.reference_impls._quant import QuantizationError
from requant.reference_impls._walk import check_calib, copy_model

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
    if cfg.codebook not in ("fisher", "kmeans", "integer"):
        raise QuantizationError(f"codebook {cfg.codebook!r} is unknown; choose fisher, kmeans or integer")
    if cfg.codebook == "integer" and cfg.channels != 1:
        raise QuantizationError(f"an integer grid couples nothing: channels must be 1, not {cfg.channels}")
    if not 1 <= cfg.code_bits <= 16:
        raise QuantizationError(f"code_bits must lie in 1..16, not {cfg.code_bits}")
    model = copy_model(model)
    return _code(model, record(model, calib, cfg), cfg)


def _code(model: nn.Module, samples: list[tuple[Samples, Samples]], cfg: Config) -> nn.Module:
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


# --- invariants and findings named in papers/coupled_quantization.yaml ----------------------------------------


def objective_rise(ctx) -> float:
    """Largest relative rise of a group's objective between k-means iterations, in keys and values of one layer."""
    cfg, rises = Config(channels=4, code_bits=4), []
    for vectors, weights in record(ctx.reference(), ctx.calib(4), cfg)[1]:
        points = vectors.permute(1, 2, 0).contiguous()
        _, objective = weighted_kmeans(
            points, weights.T, 2**cfg.code_bits, 20, torch.Generator().manual_seed(0)
        )
        rises.append(-relative_fall(objective[:-1], objective[1:]))
    return float(torch.cat(rises).max())


@torch.no_grad()
def error_with_enough_codes(ctx) -> float:
    """Largest change of a logit, relative to the largest logit, with 16 centroids for the 16 tokens they come from."""
    tokens, model = ctx.calib(1, 16), ctx.reference()
    logits = model(tokens).logits
    coded = quantize(model, tokens, Config(channels=4, code_bits=4))(tokens).logits
    return float((coded - logits).abs().max() / logits.abs().max())


@torch.no_grad()
def error_under_full_window(ctx) -> float:
    """Largest change of a logit, relative to the largest logit, at one bit under a window as long as the text."""
    tokens, model = ctx.test_windows(2)[:, :32], ctx.reference()
    logits = model(tokens).logits
    cfg = Config(channels=4, code_bits=4, codebook="kmeans", window=32, max_iterations=1)
    return float(
        (quantize(model, ctx.calib(2, 32), cfg)(tokens).logits - logits).abs().max() / logits.abs().max()
    )


@torch.no_grad()
def coded_cache_error(ctx) -> float:
    """Largest logit difference in float64 between one pass and pieces through a `CoupledCache`, windows 0 and 8."""
    tokens, errors = ctx.test_windows(2)[:, :32], []
    for window in (0, 8):
        cfg = Config(channels=4, code_bits=4, codebook="kmeans", window=window, max_iterations=5)
        model = quantize(ctx.reference(), ctx.calib(2), cfg).double()
        whole, cache = model(tokens, use_cache=False).logits, CoupledCache(model)
        pieces = [
            model(piece, past_key_values=cache).logits for piece in tokens.split([12, 1, 1, 9, 9], dim=1)
        ]
        errors.append((torch.cat(pieces, dim=1) - whole).abs().max())
    return float(max(errors))


@torch.no_grad()
def coded_cache_bits_error(ctx) -> float:
    """Largest difference between the bits a number in a filled `CoupledCache` and b/c, at 1, 1.5 and 2 bits."""
    tokens, errors = ctx.calib(2, 32), []
    for channels, code_bits in ((4, 4), (4, 6), (2, 4)):
        cfg = Config(channels=channels, code_bits=code_bits, codebook="kmeans", max_iterations=1)
        model = quantize(ctx.reference(), tokens, cfg)
        cache = CoupledCache(model)
        model(tokens, past_key_values=cache)
        size = model.config.num_hidden_layers * 2 * model.config.num_key_value_heads * model.config.head_dim
        errors.append(abs(8 * cache.code_bytes() / (tokens.numel() * size) - bits_per_number(cfg)))
    return max(errors)


def codebook_share_error(ctx) -> float:
    """Largest distance from the stated sizes of the codebooks, 0.232 to 3.984 percent of the weights, in percent.

    The formula is also compared with the codebooks of a quantized reference model: a difference would exceed 1.
    """
    cfg = Config(channels=4, code_bits=4, codebook="kmeans", max_iterations=1)
    model = quantize(ctx.reference(), ctx.calib(2, 32), cfg)
    stored = sum(module.centroids.numel() for module in model.modules() if isinstance(module, Coder))
    errors = [abs(stored - codebook_numbers(model.config, cfg))]
    llama, mistral = (
        LlamaConfig(),
        MistralConfig(),
    )  # the defaults of these classes are LLaMA-7B and Mistral-7B
    for config, code_bits, percent in ((llama, 8, 0.996), (llama, 10, 3.984), (mistral, 8, 0.232)):
        with torch.device("meta"):
            weights = AutoModelForCausalLM.from_config(config).num_parameters()
        errors.append(abs(100 * codebook_numbers(config, Config(code_bits=code_bits)) / weights - percent))
    return max(errors)


def _entropy(states: Tensor, n_states: int) -> Tensor:
    """Entropy in bits of integer states [n_groups, n_tokens] in 0..n_states-1: float64 [n_groups]."""
    ones = torch.ones(states.shape, dtype=torch.float64)
    shares = (
        torch.zeros(len(states), n_states, dtype=torch.float64).scatter_add_(1, states, ones)
        / states.shape[1]
    )
    return -torch.special.xlogy(shares, shares).sum(1) / math.log(2)


def _channel_bins(ctx, n_bins: int) -> Tensor:
    """Keys and values of the reference model in bins of equal width, four neighbours a row: [n_groups, 4, n_tokens]."""
    pairs = record(ctx.reference(), ctx.calib(8), Config(channels=4, codebook="kmeans"))
    points = torch.cat([vectors.permute(1, 2, 0) for pair in pairs for vectors, _ in pair])
    low, high = points.amin(-1, keepdim=True), points.amax(-1, keepdim=True)
    return ((points - low) / (high - low) * n_bins).long().clamp(max=n_bins - 1)


def joint_entropy_excess(ctx) -> float:
    """Largest H(X1, X2) - H(X1) - H(X2) in bits over neighbouring channels of keys and values, in 16 bins."""
    first, second = _channel_bins(ctx, 16)[:, :2].unbind(1)
    return float((_entropy(first * 16 + second, 256) - _entropy(first, 16) - _entropy(second, 16)).max())


def channel_dependence(ctx) -> list[dict]:
    """Mean joint entropy in bits of four neighbouring channels in 4 bins each: as they are, and shuffled apart.

    Shuffling the tokens of each channel keeps the marginals and the bias of the estimate, and removes the dependence.
    """
    bins = _channel_bins(ctx, 4)
    order = torch.rand(bins.shape, generator=torch.Generator().manual_seed(ctx.seed)).argsort(-1)
    place = 4 ** torch.arange(4)[:, None]
    return [
        {"name": name, "value": float(_entropy((x * place).sum(1), 256).mean())}
        for name, x in (("as_they_are", bins), ("shuffled", bins.gather(-1, order)))
    ]


def key_error_by_place(ctx) -> list[dict]:
    """Squared error of coded keys over their squared norm, on test tokens: coded before or after the rotary embedding.

    Codebooks of Eq. 5, four channels, four bits, learned on calibration tokens; mean over layers. The norm does not
    change under rotation, the variance does: the embedding turns a constant part of the keys into variance.
    """
    rows = []
    for name, pre_rope in (("before_rope", True), ("after_rope", False)):
        cfg, errors = (
            Config(channels=4, code_bits=4, codebook="kmeans", pre_rope=pre_rope, max_iterations=10),
            [],
        )
        learn, test = (record(ctx.reference(), tokens, cfg) for tokens in (ctx.calib(4), ctx.test_windows(2)))
        for (samples, _), ((vectors, _), _) in zip(learn, test, strict=True):
            coder = Coder(learn_centroids(*samples, cfg, torch.Generator().manual_seed(ctx.seed)))
            keys = vectors.flatten(1)[None, None]  # all heads in one row: [1, 1, n_tokens, n_groups * c]
            errors.append((coder(keys) - keys).square().sum() / keys.square().sum())
        rows.append({"name": name, "value": float(torch.stack(errors).mean())})
    return rows


@torch.no_grad()
def losses_with_sinks(ctx) -> list[dict]:
    """Loss in nats on 8 test windows of the model with attention sinks, with caches of one bit a number.

    One recording serves all codebooks. The exact window is a sixteenth of the text, like 128 of 2048 tokens.
    """
    tokens, rows = ctx.test_windows(8), []
    samples = record(ctx.reference("reference-sink"), ctx.calib(8), Config(channels=1))
    for name, cfg in (
        ("integer", Config(channels=1, code_bits=1, codebook="integer")),
        ("single", Config(channels=1, code_bits=1)),
        ("two", Config(channels=2, code_bits=2)),
        ("four", Config(channels=4, code_bits=4)),
    ):
        coupled = [tuple(_coupled(*each, cfg.channels) for each in pair) for pair in samples]
        model = _code(ctx.reference("reference-sink"), coupled, cfg)
        rows.append({"name": name, "value": float(model(tokens, labels=tokens, use_cache=False).loss)})
    use_windowed_attention(model)
    for part in block_anatomies(model):
        part.attn.requant_coded.window = 16
    rows.append(
        {"name": "four_and_window", "value": float(model(tokens, labels=tokens, use_cache=False).loss)}
    )
    return rows


def _coupled(vectors: Tensor, weights: Tensor, channels: int) -> Samples:
    """Samples of single channels [n_tokens, n_channels, 1] as samples of groups of c."""
    vectors = vectors.squeeze(-1).unflatten(-1, (-1, channels))
    return vectors, weights.unflatten(-1, (-1, channels)).sum(-1)
