"""Load the reference model and its two variants, and draw calibration tokens for them.

reference           a 4.5 M-parameter Llama trained on the reference text (train.py); the default of every
                    offline claim
reference-outlier   the same function with channel outliers made explicit (`add_outliers`, exactly invertible)
reference-sink      with added heads, trained until attention sinks emerge on the first token (train.py)
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from requant.catalog.reference.text import load_split

WEIGHTS = Path(__file__).parent / "weights"
VARIANTS = ("reference", "reference-outlier", "reference-sink")
BOS, BOS_ID = "<bos>", 0
OUTLIER_CHANNELS, OUTLIER_FACTOR, OUTLIER_SEED = 4, 64.0, 0


class ReferenceModelError(RuntimeError):
    """The weights of a reference variant are missing or unreadable."""


@dataclass(frozen=True)
class ReferenceModel:
    """A variant with its tokenizer; `model` is float32, in eval mode, and the caller's own copy."""

    name: str
    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast


def model_config(name: str = "reference") -> LlamaConfig:
    """4.5 M parameters; `reference-sink` has 8 heads in place of 4, and 5.5 M.

    768 = 12 * 64, so Hadamard transforms of the MLP need a constructed base of order 12.
    """
    heads = 8 if name == "reference-sink" else 4
    return LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=64,
        max_position_embeddings=1024, rms_norm_eps=1e-5,
        rope_theta=10000.0, tie_word_embeddings=False, attention_dropout=0.0,
        bos_token_id=BOS_ID, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def load_tokenizer() -> PreTrainedTokenizerFast:
    """The 2,048-entry byte-level BPE of the reference models; it adds no special token by itself."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(WEIGHTS / "tokenizer.json"), bos_token=BOS, clean_up_tokenization_spaces=False
    )


@functools.cache
def _state(name: str) -> dict[str, Tensor]:
    path = WEIGHTS / f"{name}.safetensors"
    try:
        return {key: value.float() for key, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ReferenceModelError(
            f"cannot read {path.name} in {path.parent}: {error}; reinstall requant or run "
            f"`python -m requant.catalog.reference.train {name}`"
        ) from error


def load_reference(name: str = "reference") -> ReferenceModel:
    """A fresh copy of one variant.

    Raises: ValueError for an unknown name; ReferenceModelError if its weights cannot be read.
    """
    if name not in VARIANTS:
        raise ValueError(f"unknown reference model {name!r}; choose one of {', '.join(VARIANTS)}")
    return ReferenceModel(name, copy.deepcopy(_made(name)), load_tokenizer())


@functools.cache
def _made(name: str) -> LlamaForCausalLM:
    """Made once in a process: drawing the random weights that it begins with takes longer than a copy."""
    model = LlamaForCausalLM(model_config(name))
    model.load_state_dict(_state("reference-sink" if name == "reference-sink" else "reference"))
    if name == "reference-outlier":
        add_outliers(model)
    return model.eval().requires_grad_(False)


@functools.cache
def split_tokens(split: str) -> Tensor:
    """The split tokenized once, without BOS: int64 [n_tokens]. Treat as read-only."""
    backend = load_tokenizer().backend_tokenizer  # without offsets, which take a third of the time
    return torch.tensor(backend.encode_batch_fast([load_split(split)], add_special_tokens=False)[0].ids)


def calibration_tokens(n_samples: int = 64, seqlen: int = 256, seed: int = 0) -> Tensor:
    """Calibration set: BOS + (seqlen - 1) consecutive tokens of the train split at random offsets.

    Returns: int64 [n_samples, seqlen].
    """
    tokens = split_tokens("train")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(tokens) - seqlen + 2, (n_samples,), generator=generator)
    windows = tokens[starts[:, None] + torch.arange(seqlen - 1)]  # [n_samples, seqlen - 1]
    return torch.cat([torch.full((n_samples, 1), BOS_ID), windows], dim=1)


def test_windows(n: int | None = None, seqlen: int = 256) -> Tensor:
    """The first n (all, if None) disjoint windows of the test split, BOS first: int64 [n, seqlen]."""
    tokens = split_tokens("test")
    available = len(tokens) // (seqlen - 1)
    n = available if n is None else min(n, available)
    body = tokens[: n * (seqlen - 1)].view(n, seqlen - 1)
    return torch.cat([torch.full((n, 1), BOS_ID), body], dim=1)


@torch.no_grad()
def first_token_attention(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Mean attention that queries 16.. give to position 0, on windows int64 [n, seqlen]: [layers, heads]."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the one that returns its weights
    attentions = model(windows, output_attentions=True).attentions
    model.set_attn_implementation(before)
    return torch.stack([layer[:, :, 16:, 0].mean((0, 2)) for layer in attentions])


def outlier_sites(model: LlamaForCausalLM) -> list[tuple[nn.Module, list[nn.Linear], Tensor]]:
    """Where `add_outliers` acts: (producer, consumers, channels) for each norm, value and up projection.

    A producer's output channel (its gain, or its weight row) is scaled up, the same column of every
    consumer down.
    """
    generator = torch.Generator().manual_seed(OUTLIER_SEED)
    sites = []
    for block in model.model.layers:
        attn, mlp = block.self_attn, block.mlp
        for producer, consumers in (
            (block.input_layernorm, [attn.q_proj, attn.k_proj, attn.v_proj]),
            (attn.v_proj, [attn.o_proj]),
            (block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
            (mlp.up_proj, [mlp.down_proj]),
        ):
            width = consumers[0].in_features
            channels = torch.randperm(width, generator=generator)[:OUTLIER_CHANNELS]
            sites.append((producer, consumers, channels))
    return sites


@torch.no_grad()
def add_outliers(model: LlamaForCausalLM, factor: float = OUTLIER_FACTOR) -> None:
    """Scale a few channels up and undo it in the consumers, in place; `factor=1/OUTLIER_FACTOR` inverts it.

    The factor is a power of two, so the function computed is bit for bit the same: only the ranges change.
    """
    for producer, consumers, channels in outlier_sites(model):
        producer.weight[channels] *= factor
        for consumer in consumers:
            consumer.weight[:, channels] /= factor
