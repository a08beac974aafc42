"""Tiny models of every standard family, and settings of the methods that fit them: what several test files share."""

from __future__ import annotations

import copy
import re
from dataclasses import fields
from types import ModuleType

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from requant.catalog.loader import load_catalog

VOCABULARY = 2048  # of the reference tokenizer
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}  # fmt: skip
GATED = SIZES | {"intermediate_size": 128, "num_key_value_heads": 2}
FAMILIES = {
    "opt": OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64),
    "llama": LlamaConfig(**GATED),
    "qwen2": Qwen2Config(**GATED),
    "qwen3": Qwen3Config(**GATED, head_dim=16),
    "gemma2": Gemma2Config(**GATED, head_dim=16),
    "gemma3": Gemma3TextConfig(**GATED, head_dim=16),
    "mistral": MistralConfig(**GATED),
    "phi": PhiConfig(**SIZES, intermediate_size=128),
    "phi3": Phi3Config(**GATED),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=128),
    "bloom": BloomConfig(
        vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=None,
        pad_token_id=None,
    ),
}  # fmt: skip
UNLIKE = (
    "opt",
    "llama",
    "qwen3",
    "gemma2",
    "phi",
    "gpt_neox",
    "bloom",
)  # the others are built like one of these
PAPERS = [paper for paper in load_catalog().papers.values() if paper.impl]
IMPLS = sorted({paper.impl for paper in PAPERS})
TRANSFORMING = {paper.impl for paper in PAPERS if {"rotation", "equivalent-transformation"} & set(paper.tags)}


def made(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random model of a family, always the same; in eval mode and without gradients.

    Its weights can be held in bfloat16; rotary frequencies stay float32, as when transformers loads a model.
    """
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])  # saving in bfloat16 leaves its mark on a config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # gains and biases that differ from 1 and 0, as trained models have
            parameter += 0.1 * torch.randn(parameter.shape)
        parameter.data = parameter.data.to(dtype)
    return model


def tokens(n_samples: int = 8, seqlen: int = 32) -> torch.Tensor:
    """Random calibration tokens int64 [n_samples, seqlen], always the same."""
    return torch.randint(1, VOCABULARY, (n_samples, seqlen), generator=torch.Generator().manual_seed(0))


def widest(module: ModuleType) -> dict[str, object]:
    """`small`, with 16 bits for all that is rounded and nothing clipped, as far as the Config has fields for it."""
    names = {field.name for field in fields(module.Config)}
    bits = {name for name in names if re.fullmatch(r"(w|a|kv|qk|embedding)_bits", name)}
    clips = {name for name in names if name.endswith("clip_ratio")}
    clips = {
        name for name in clips if getattr(module.Config(), name)
    }  # at 0, one is a share that is left out
    return small(module) | dict.fromkeys(bits, 16) | dict.fromkeys(clips, 1.0)


def small(module: ModuleType) -> dict[str, object]:
    """The module's own settings for tiny models, with groups that fit 64 inputs."""
    names = {field.name for field in fields(module.Config)}
    groups = {"group_size": 32} if "group_size" in names and (module.Config().group_size or 0) > 64 else {}
    return groups | getattr(module, "TINY", {})
