"""Which modules of a decoder block play which role, for every standard family; the only place that knows their names.

Covers OPT, Llama, Qwen, Gemma, Mistral, Phi, GPT-NeoX, Bloom and what shares their naming. Fused projections
(query_key_value, qkv_proj, gate_up_proj) appear as one linear in `qkv` or `up`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from requant.reference_impls._walk import UnsupportedModelError, decoder_blocks

_ROLES = {
    "attn": ("self_attn", "self_attention", "attention", "attn"),
    "attn_norm": ("input_layernorm", "self_attn_layer_norm", "ln_1"),
    "mlp_norm": ("pre_feedforward_layernorm", "post_attention_layernorm", "final_layer_norm", "ln_2"),
    "q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",),
    "fused_qkv": ("query_key_value", "qkv_proj", "Wqkv"),
    "o": ("o_proj", "out_proj", "dense"),
    "gate": ("gate_proj",),
    "up": ("up_proj", "fc1", "dense_h_to_4h", "gate_up_proj"),
    "down": ("down_proj", "fc2", "dense_4h_to_h"),
}  # fmt: skip


@dataclass(frozen=True)
class BlockAnatomy:
    """The parts of one decoder block; q, k, v are None where `fused_qkv` is set, gate where the MLP has none.

    mlp_norm is None where attn_norm feeds the MLP as well (Phi).
    """

    block: nn.Module
    attn: nn.Module
    mlp: nn.Module
    attn_norm: nn.Module
    mlp_norm: nn.Module | None
    q: nn.Linear | None
    k: nn.Linear | None
    v: nn.Linear | None
    fused_qkv: nn.Linear | None
    o: nn.Linear
    gate: nn.Linear | None
    up: nn.Linear
    down: nn.Linear

    @property
    def qkv(self) -> list[nn.Linear]:
        """The linears that read the attention norm's output."""
        return [self.fused_qkv] if self.fused_qkv is not None else [self.q, self.k, self.v]

    @property
    def gated(self) -> bool:
        """Whether a gate multiplies the MLP's inner activation, in a linear of its own or fused with up."""
        return self.gate is not None or self.up.out_features == 2 * self.down.in_features

    @property
    def ups(self) -> list[nn.Linear]:
        """The linears that read the MLP norm's output."""
        return [self.up] if self.gate is None else [self.gate, self.up]

    @property
    def norm_groups(self) -> list[tuple[nn.Module, list[nn.Linear]]]:
        """(norm, the linears it feeds): where a per-channel scale can move from activations to weights."""
        if self.mlp_norm is None:
            return [(self.attn_norm, [*self.qkv, *self.ups])]
        return [(self.attn_norm, self.qkv), (self.mlp_norm, self.ups)]


def _find(parents: list[nn.Module], role: str, required: bool) -> nn.Module | None:
    for name in _ROLES[role]:
        for parent in parents:
            child = getattr(parent, name, None)
            if isinstance(child, nn.Module):
                return child
    if required:
        raise UnsupportedModelError(
            f"{type(parents[0]).__name__} has no module for the role {role!r} ({', '.join(_ROLES[role])})"
        )
    return None


def anatomy(block: nn.Module) -> BlockAnatomy:
    """Name the parts of a decoder block. Raises UnsupportedModelError where one is missing."""
    attn = _find([block], "attn", True)
    mlp = block.mlp if isinstance(getattr(block, "mlp", None), nn.Module) else block
    found = {role: _find([attn], role, False) for role in ("q", "k", "v", "fused_qkv")}
    if found["fused_qkv"] is None and None in (found["q"], found["k"], found["v"]):
        raise UnsupportedModelError(
            f"{type(attn).__name__} has neither q_proj, k_proj, v_proj nor a fused projection"
        )
    return BlockAnatomy(
        block=block, attn=attn, mlp=mlp,
        attn_norm=_find([block], "attn_norm", True), mlp_norm=_find([block], "mlp_norm", False),
        o=_find([attn], "o", True), gate=_find([mlp], "gate", False),
        up=_find([mlp], "up", True), down=_find([mlp], "down", True), **found,
    )  # fmt: skip


def block_anatomies(model: nn.Module) -> list[BlockAnatomy]:
    """`anatomy` of every decoder block, first to last."""
    return [anatomy(block) for block in decoder_blocks(model)]


def require_pre_norm(model: nn.Module) -> None:
    """Raise where a norm's output is not used by linears alone: nothing can be folded into such a norm."""
    if getattr(model.config, "do_layer_norm_before", True) is False:
        raise UnsupportedModelError(
            "this model normalises after each sublayer (OPT-350M does); a scale cannot be folded into its norms"
        )
    if getattr(model.config, "apply_residual_connection_post_layernorm", False):  # a Bloom option
        raise UnsupportedModelError(
            "this model adds norm outputs to its residual stream (a Bloom option); they cannot be scaled"
        )


@torch.no_grad()
def gain_offset(norm: nn.Module) -> float:
    """1.0 where the norm multiplies by 1 + weight (Gemma), else 0.0; found by asking the norm, not by its name."""
    kept = norm.weight.detach().clone()
    norm.weight.zero_()
    probe = norm(torch.linspace(-1, 1, kept.numel(), dtype=kept.dtype, device=kept.device)[None])
    if getattr(norm, "bias", None) is not None:
        probe = probe - norm.bias
    norm.weight.copy_(kept)
    return float(probe.abs().max() > 0)


@torch.no_grad()
def scale_norm(norm: nn.Module, factor: Tensor) -> None:
    """Multiply the norm's output channels by factor [hidden], in place."""
    offset = gain_offset(norm)
    norm.weight.copy_((norm.weight + offset) * factor - offset)
    if getattr(norm, "bias", None) is not None:
        norm.bias *= factor


@torch.no_grad()
def fold_channel_scale(norm: nn.Module, linears: list[nn.Linear], s: Tensor) -> None:
    """Divide the norm's output by s [hidden] and multiply the consuming weight columns by it, in place.

    The function computed stays the same: SmoothQuant Eq. 3, AWQ Eq. 4 and relatives.
    """
    scale_norm(norm, 1.0 / s)
    for linear in linears:
        linear.weight *= s


@dataclass(frozen=True)
class Heads:
    """Head geometry of one attention module; value_rows [n_kv_heads * head_dim] are v's rows in `value`."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    value: nn.Linear
    value_rows: Tensor


def heads(parts: BlockAnatomy, config) -> Heads:
    """Geometry of separate, concatenated (qkv_proj) or per-head (query_key_value) projections."""
    config = config.get_text_config()
    size = getattr(parts.attn, "head_dim", None) or getattr(parts.attn, "head_size", None)
    size = size or config.hidden_size // config.num_attention_heads
    n_heads, value = parts.o.in_features // size, parts.v if parts.fused_qkv is None else parts.fused_qkv
    rows = torch.arange(value.out_features)
    if parts.fused_qkv is not None and hasattr(parts.attn, "query_key_value"):
        if value.out_features != 3 * n_heads * size:
            raise UnsupportedModelError(
                f"{type(parts.attn).__name__} shares key and value heads inside one projection"
            )
        rows = rows.view(n_heads, 3, size)[:, 2].flatten()
    elif parts.fused_qkv is not None:
        rows = rows[(value.out_features + n_heads * size) // 2 :]
    return Heads(n_heads, len(rows) // size, size, value, rows)
