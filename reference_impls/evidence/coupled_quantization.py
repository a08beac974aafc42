"""Evidence on Coupled Quantization: the coded cache against plain attention, dependent channels, losses at one bit.

Entry     papers/coupled_quantization.yaml
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from requant.reference_impls._anatomy import block_anatomies
from requant.reference_impls._coded_cache import CoupledCache, use_windowed_attention
from requant.reference_impls._coder import Coder
from requant.reference_impls._kmeans import relative_fall, weighted_kmeans
from requant.reference_impls._logits import change_of_logits
from requant.reference_impls.coupled_quantization import (
    Config,
    Samples,
    bits_per_number,
    code_attention,
    codebook_numbers,
    learn_centroids,
    quantize,
    record,
)


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
    return change_of_logits(model, quantize(model, tokens, Config(channels=4, code_bits=4)), tokens)


@torch.no_grad()
def error_under_full_window(ctx) -> float:
    """Largest change of a logit, relative to the largest logit, at one bit under a window as long as the text."""
    tokens, model = ctx.test_windows(2)[:, :32], ctx.reference()
    cfg = Config(channels=4, code_bits=4, codebook="kmeans", window=32, max_iterations=1)
    return change_of_logits(model, quantize(model, ctx.calib(2, 32), cfg), tokens)


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
        model = code_attention(ctx.reference("reference-sink"), coupled, cfg)
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
