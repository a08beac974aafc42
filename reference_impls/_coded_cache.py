"""Coded keys and values inside a transformers model: interception at the cache, window, and a cache of codes.

An attention module hands its new keys and values to `past_key_values.update(...)` and attends to what comes back. That
call is where everything here happens, whatever projections, norms and rotary embeddings come before it in a family.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from requant.reference_impls._anatomy import block_anatomies
from requant.reference_impls._coder import Coder
from requant.reference_impls._walk import UnsupportedModelError

Tables = tuple[Tensor, Tensor]  # cos, sin [batch or 1, seqlen, rotary_dim]


# --- interception ---------------------------------------------------------------------------------------------


def rotate(family: type, key: Tensor, tables: Tables | None, back: bool = False) -> Tensor:
    """The rotary embedding of key [batch, heads, seqlen, head_dim] by the family's own function, or its inverse.

    A family without rotary embedding (OPT, Bloom) leaves the key as it is; a partial one turns the first channels.

    Args:
        family: the attention class.
    Raises: UnsupportedModelError where there is such an embedding but no tables of cosines and sines are passed.
    """
    turn = getattr(sys.modules[family.__module__], "apply_rotary_pos_emb", None)
    if turn is None:
        return key
    if tables is None:
        raise UnsupportedModelError(
            f"{family.__name__} is not handed its rotary tables (position_embeddings)"
        )
    cos, sin = tables
    if back:
        square = cos.square() + sin.square()  # 1 but for rounding, or a squared attention factor (YaRN)
        cos, sin = cos / square, -sin / square
    turned, rest = key[..., : cos.shape[-1]], key[..., cos.shape[-1] :]
    return torch.cat([turn(turned, turned, cos, sin)[1].to(key.dtype), rest], dim=-1)


class _Intercept:
    """Stands in for the cache during one call of an attention module; its `update` calls `see` instead."""

    def __init__(self, see: Callable, cache: Cache | None, tables: Tables | None):
        self.see, self.cache, self.tables = see, cache, tables

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_args, **_kwargs) -> tuple[Tensor, Tensor]:
        return self.see(key, value, self.tables, self.cache, layer_idx)

    def __getattr__(self, name: str) -> object:
        return getattr(self.cache, name)


def intercept(attention: nn.Module, see_of: Callable[[nn.Module], Callable]) -> RemovableHandle:
    """Make each call of an attention module use see_of(attention) in the place of its cache's `update`.

    see(key, value, tables, cache, layer_idx) gets the new keys and values [batch, kv_heads, seqlen, head_dim], keys
    after the rotary embedding, and returns all that is to be attended to; cache is None where the call has none.
    """
    names = inspect.signature(attention.forward).parameters.keys() & {"past_key_values", "layer_past"}
    if len(names) != 1:
        raise UnsupportedModelError(f"{type(attention).__name__} takes no cache under a name known here")
    (name,) = names

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        stand_in = _Intercept(see_of(module), kwargs.get(name), kwargs.get("position_embeddings"))
        return args, kwargs | {name: stand_in}

    return attention.register_forward_pre_hook(hook, with_kwargs=True)


class CodedAttention(nn.Module):
    """The coders of one attention module, which holds it as `requant_coded`; `attach` puts it there."""

    def __init__(self, family: type, key: Coder, value: Coder, *, window: int, pre_rope: bool):
        super().__init__()
        self.family, self.key, self.value = family, key, value
        self.window, self.pre_rope = window, pre_rope

    def attach(self, attention: nn.Module) -> None:
        """Code all that this attention module attends to from now on."""
        attention.requant_coded = self
        intercept(attention, lambda module: module.requant_coded.see)

    def see(
        self, key: Tensor, value: Tensor, tables: Tables | None, cache: Cache | None, layer_idx: int
    ) -> tuple[Tensor, Tensor]:
        """Code what goes into a cache, or straight into attention; a `CoupledCache` keeps the codes themselves.

        With a window the exact keys and values follow as a second set of heads, for `use_windowed_attention`.
        """
        if isinstance(cache, CoupledCache):
            return cache.update(key, value, layer_idx, tables)
        coded = self.rotate(self.key(self.rotate(key, tables, back=True)), tables), self.value(value)
        if self.window:
            coded = _joined(coded, (key, value), dim=1)
        return coded if cache is None else cache.update(*coded, layer_idx)

    def rotate(self, key: Tensor, tables: Tables | None, back: bool = False) -> Tensor:
        """`rotate`, where keys are coded before the rotary embedding."""
        return rotate(self.family, key, tables, back) if self.pre_rope else key


# --- a window of exact keys -----------------------------------------------------------------------------------


def use_windowed_attention(model: nn.Module) -> None:
    """Let attention tell coded from exact heads, in place; needs transformers' own sdpa or eager interface."""
    base = model.config._attn_implementation
    if base not in ("eager", "sdpa") or not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} with {base}: a window needs the sdpa or eager interface"
        )
    name = f"requant_window_{base}"
    AttentionInterface.register(name, _windowed_attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.set_attn_implementation(name)


def _windowed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """For each query one softmax over the coded keys older than the window and the exact keys within it.

    key, value: [batch, 2 * kv_heads, n_key, head_dim], coded heads first, then exact ones.
    """
    n_query, n_key = query.shape[-2], key.shape[-2]
    base = module.config._attn_implementation.rpartition("_")[2]
    inner = ALL_ATTENTION_FUNCTIONS.get(base, None)
    if inner is None:  # eager attention is not in the registry: each model file defines its own
        inner = sys.modules[type(module).__module__].eager_attention_forward
    position = torch.arange(n_key, device=key.device)
    age = position[n_key - n_query :, None] - position  # [n_query, n_key]; 0: the query's own key
    recent, lowest = age < module.requant_coded.window, torch.finfo(query.dtype).min
    mask = age >= 0 if attention_mask is None else attention_mask[..., :n_key]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=key.device).masked_fill(~mask, lowest)
    mask = torch.cat([mask.masked_fill(recent, lowest), mask.masked_fill(~recent, lowest)], dim=-1)
    mask = mask.expand(len(query), 1, -1, -1)  # [batch, 1, n_query, 2 * n_key]
    key, value = (
        torch.cat(x.chunk(2, dim=1), dim=2) for x in (key, value)
    )  # [batch, kv_heads, 2 * n_key, ..]
    return inner(module, query, key, value, mask, *args, **kwargs)


# --- the cache of codes ---------------------------------------------------------------------------------------


class CoupledLayer(DynamicLayer):
    """One layer of a `CoupledCache`: keys and values are packed codes, uint8 [batch, 1, seqlen, bytes a token]."""

    is_croppable = False

    def __init__(self, coded: CodedAttention):
        super().__init__()
        self.coded, self.coders = coded, (coded.key, coded.value)
        self.tables: Tables | None = None  # of all stored tokens
        self.exact: tuple[Tensor, ...] = ()  # latest keys and values [batch, kv_heads, <= window, head_dim]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys = self.values = torch.empty(0, dtype=torch.uint8, device=self.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, tables: Tables | None = None, *_args, **_kwargs
    ) -> tuple[Tensor, Tensor]:
        """Add tokens [batch, kv_heads, seqlen, head_dim]; return all as attention reads them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = (self.coded.rotate(key_states, tables, back=True), value_states)
        packed = tuple(coder.pack(x) for coder, x in zip(self.coders, new, strict=True))
        packed = _joined((self.keys, self.values), packed, dim=2) if self.keys.numel() else packed
        self.keys, self.values = packed
        if tables is not None:
            self.tables = tables if self.tables is None else _joined(self.tables, tables, dim=1)
        key, value = (
            coder.unpack(x, like.shape[-1]).to(self.dtype)
            for coder, x, like in zip(self.coders, packed, new, strict=True)
        )
        coded = self.coded.rotate(key, self.tables), value
        if not self.coded.window:
            return coded
        latest = (key_states, value_states)
        latest = _joined(self.exact, latest, dim=2) if self.exact else latest
        self.exact = tuple(x[:, :, -self.coded.window :] for x in latest)
        older = tuple(x[:, :, : -latest[0].shape[2]] for x in coded)  # never read: outside every new window
        return _joined(coded, _joined(older, latest, dim=2), dim=1)

    def reset(self) -> None:
        super().reset()
        self.tables, self.exact = None, ()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.exact = tuple(x.index_select(0, beam_idx.to(x.device)) for x in self.exact)

    def crop(self, *_args) -> None:
        raise NotImplementedError("a coded cache only grows; start a new one")

    batch_repeat_interleave = batch_select_indices = crop


class CoupledCache(Cache):
    """A transformers cache that stores codes and decodes them at every read.

    For a model whose attention modules are coded: `model.generate(..., past_key_values=CoupledCache(model))`. Tokens
    may come in pieces of any length; each query reads what it reads when the whole text goes through at once.
    """

    def __init__(self, model: nn.Module):
        super().__init__(layers=[CoupledLayer(part.attn.requant_coded) for part in block_anatomies(model)])

    def code_bytes(self) -> int:
        """Bytes of all codes; codebooks, exact window and rotary tables are not counted."""
        return sum(
            x.numel() for layer in self.layers if layer.is_initialized for x in (layer.keys, layer.values)
        )


def _joined(first: tuple[Tensor, ...], second: tuple[Tensor, ...], dim: int) -> tuple[Tensor, ...]:
    return tuple(torch.cat(pair, dim=dim) for pair in zip(first, second, strict=True))
