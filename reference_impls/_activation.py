"""Activation and KV-cache quantization: modules that fake-quantize what flows through them."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from requant.reference_impls._anatomy import BlockAnatomy
from requant.reference_impls._walk import UnsupportedModelError, named_linears, replace_module

_PREFIX = "requant_"


class Shared:
    """A transform that linears fed the very same tensor (q, k, v; gate, up) run once while that tensor lives."""

    def __init__(self, transform: Callable[[Tensor], Tensor]):
        self.transform, self.latest, self.result = transform, None, None

    def __call__(self, x: Tensor) -> Tensor:
        if self.latest is None or self.latest() is not x:
            self.latest, self.result = weakref.ref(x, self._forget), self.transform(x)
        return self.result

    def _forget(self, dead: weakref.ref) -> None:
        if dead is self.latest:
            self.latest = self.result = None


class QuantInput(nn.Module):
    """A linear layer whose input passes through `transform` first, and whose output may pass through `after`.

    Both may compute in float32; what they give has the dtype of what they got.
    """

    def __init__(
        self,
        linear: nn.Linear,
        transform: Callable[[Tensor], Tensor] | None,
        after: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.linear, self.transform, self.after = linear, transform, after

    @property
    def weight(self) -> Tensor:
        """The wrapped weight, so that model code which looks at it still works."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """The wrapped bias."""
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x if self.transform is None else self.transform(x).to(x.dtype))
        return y if self.after is None else self.after(y).to(y.dtype)


class SmoothedSiLU(nn.Module):
    """x1 sigmoid(x1 / a): SiLU of a gate whose rows were multiplied by a; the result is a times as large.

    After I-LLM's code; x1 passes through `transform` first.
    """

    def __init__(self, size: int, transform: Callable[[Tensor], Tensor]):
        super().__init__()
        self.a, self.transform = nn.Parameter(torch.ones(size), requires_grad=False), transform

    def forward(self, x: Tensor) -> Tensor:
        x = self.transform(x)
        return x * (x / self.a).sigmoid()


def transform_inputs(
    root: nn.Module, linears: Iterable[nn.Linear], transform: Callable[[Tensor], Tensor]
) -> None:
    """Run `transform` on what these linears below root read, after the transform of a QuantInput; in place.

    Linears that read the very same tensor share one run of it.
    """
    around = {id(module.linear): module for module in root.modules() if isinstance(module, QuantInput)}
    names = {id(linear): name for name, linear in named_linears(root).items()}
    shared = Shared(transform)
    for linear in linears:
        wrapper = around.get(id(linear))
        if wrapper is None:
            replace_module(root, names[id(linear)], QuantInput(linear, shared))
        else:
            first = wrapper.transform
            wrapper.transform = shared if first is None else lambda x, first=first: shared(first(x))


def transform_output(root: nn.Module, linear: nn.Linear, after: Callable[[Tensor], Tensor]) -> None:
    """Run `after` on what this linear below root writes; in place."""
    for module in root.modules():
        if isinstance(module, QuantInput) and module.linear is linear:
            module.after = after
            return
    names = {id(each): name for name, each in named_linears(root).items()}
    replace_module(root, names[id(linear)], QuantInput(linear, None, after))


def bare(parts: BlockAnatomy) -> BlockAnatomy:
    """The same anatomy with the linears themselves in the place of QuantInputs around them."""
    linears = {name: part.linear for name, part in vars(parts).items() if isinstance(part, QuantInput)}
    return dataclasses.replace(parts, **linears)


def wrap_linears(
    root: nn.Module, transform: Callable[[Tensor], Tensor], names: Iterable[str] | None = None
) -> None:
    """Put a QuantInput with this transform round every linear below root (or round the named ones), in place."""
    linears = named_linears(root)
    for name in linears if names is None else names:
        replace_module(root, name, QuantInput(linears[name], transform))


def transform_attention(
    model: nn.Module,
    attention: nn.Module,
    transform: Callable[[Tensor, Tensor, Tensor], tuple],
    weigh: Callable[[Tensor], Tensor] | None = None,
    score: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Run transform(query, key, value) -> (query, key, value) inside one attention module, after rotary embedding.

    Shapes are [batch, heads, seqlen, head_dim] (kv heads for key and value). Goes through transformers' own
    attention interface, so it works for every family that has moved to it. With `weigh` the attention
    probabilities [batch, heads, seqlen, seqlen] pass through it on their way to the values, with `score` as well the
    scaled products of queries and keys on their way to mask and softmax.

    Raises: UnsupportedModelError for a family whose attention does not use that interface.
    """
    base = model.config._attn_implementation
    if not base.startswith(_PREFIX):
        if not getattr(model, "_supports_attention_backend", False):
            raise UnsupportedModelError(
                f"the attention of {type(model).__name__} does not use transformers' attention interface"
            )
        _register(base)
        model.set_attn_implementation(_PREFIX + base)
    attention.requant_transform, attention.requant_weigh = transform, weigh
    attention.requant_score = score


def one_each(*ways: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """For `transform_attention`: one function for queries, one for keys and one for values."""
    return lambda *qkv: tuple(way(x) for way, x in zip(ways, qkv, strict=True))


def _register(base: str) -> None:
    def attention_forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
        transform = getattr(module, "requant_transform", None)
        if transform is not None:
            dtype = query.dtype
            query, key, value = (x.to(dtype) for x in transform(query, key, value))
        weigh = getattr(module, "requant_weigh", None)
        if weigh is not None:
            score = getattr(module, "requant_score", None)
            return _weighed_attention(query, key, value, *args, weigh=weigh, score=score, **kwargs)
        # eager attention is not in the registry: each model file defines its own (Gemma 2 adds a soft cap
        # in it)
        inner = (
            sys.modules[type(module).__module__].eager_attention_forward
            if base == "eager"
            else ALL_ATTENTION_FUNCTIONS[base]
        )
        return inner(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(_PREFIX + base, attention_forward)
    AttentionMaskInterface.register(_PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])


def _weighed_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, weigh: Callable,
    score: Callable | None, scaling: float | None = None, softcap: float | None = None, **_unused: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention written out, probabilities changed by `weigh`, scores by `score`; without a mask it is causal."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores if score is None else score(scores)
    if attention_mask is None:
        attention_mask = torch.ones_like(scores[:1, :1], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    if attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    else:
        scores = scores + attention_mask
    weights = weigh(scores.softmax(-1, dtype=torch.float32).to(query.dtype))
    return (weights @ value).transpose(1, 2).contiguous(), weights
