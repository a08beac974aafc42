"""Rotate a decoder without changing its function: fused norms, residual-stream and per-head rotations.

Everything works in place on a model the caller owns, in float64 rounded back to the model's dtype.
Conventions: a row vector x becomes x Q, so a weight that reads it becomes W Q and one that writes it Q^T W.
Norms that commute with rotations are SliceGPT's idea (arXiv:2401.15024v2, Sec. 3); QuaRot, SpinQuant and
their successors rotate the same places.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from requant.reference_impls._activation import transform_inputs
from requant.reference_impls._anatomy import BlockAnatomy, Heads, anatomy, gain_offset, require_pre_norm
from requant.reference_impls._hadamard import hadamard_transform, has_hadamard
from requant.reference_impls._residence import visit
from requant.reference_impls._stream_ends import stream_ends, untie_head
from requant.reference_impls._walk import UnsupportedModelError, replace_module, visit_blocks

_POST_NORMS = (
    "post_attention_layernorm",
    "post_feedforward_layernorm",
    "post_self_attn_layernorm",
    "post_mlp_layernorm",
)


class Rotation(nn.Module):
    """x -> x Q as a module of its own, for the places where Q does not fold into a weight."""

    def __init__(self, Q: Tensor):
        super().__init__()
        self.register_buffer("Q", Q)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.Q


def post_norms(parts: BlockAnatomy) -> dict[str, nn.Module]:
    """Norms between a sublayer and the residual sum (Gemma 2), by their name in the block."""
    children = {name: getattr(parts.block, name, None) for name in _POST_NORMS}
    return {name: norm for name, norm in children.items() if norm is not None and norm is not parts.mlp_norm}


def _write(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype))


@torch.no_grad()
def _subtracts_mean(norm: nn.Module) -> bool:
    """Whether it is a LayerNorm; found by asking it to normalise a constant vector."""
    like = next(norm.parameters(), torch.empty(0))
    size = like.numel() or norm.normalized_shape[0]
    y = norm(torch.ones(1, size, dtype=like.dtype, device=like.device))
    bias = getattr(norm, "bias", None)
    return float((y if bias is None else y - bias).abs().max()) < 1e-2 * float(
        like.abs().max() if like.numel() else 1
    )


def _fold_norm(norm: nn.Module, linears: list[nn.Linear]) -> None:
    """Move the norm's gain and bias into the linears it feeds, and leave a gain of one."""
    gain, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    offset = 0.0 if gain is None else gain_offset(norm)
    for linear in linears:
        W = linear.weight.double()
        if bias is not None:
            old = 0.0 if linear.bias is None else linear.bias.double()
            linear.bias = nn.Parameter((old + W @ bias.double()).to(linear.weight.dtype), requires_grad=False)
        if gain is not None:
            _write(linear.weight, W * (gain.double() + offset))
    if gain is not None:
        gain.fill_(1.0 - offset)
    if bias is not None:
        bias.zero_()


def _plain_rms_norm(norm: nn.Module, head: nn.Linear) -> nn.RMSNorm:
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    if eps is None:
        raise UnsupportedModelError(
            f"{type(norm).__name__} does not say its epsilon (eps or variance_epsilon)"
        )
    plain = nn.RMSNorm(head.in_features, eps=eps, dtype=head.weight.dtype, device=head.weight.device)
    return plain.requires_grad_(False)


def _centre_output(linear: nn.Linear) -> None:
    """Subtract the mean over output channels: what the LayerNorms behind it would do."""
    _write(linear.weight, linear.weight.double() - linear.weight.double().mean(0))
    if linear.bias is not None:
        _write(linear.bias, linear.bias.double() - linear.bias.double().mean())


@torch.no_grad()
def fuse_norms(model: nn.Module) -> None:
    """Fold every norm's gain and bias into the linears behind it; LayerNorms become RMSNorms. In place.

    LayerNorm(x) = RMSNorm(x - mean(x)), and the mean can be taken out where it is written: embeddings, o
    and down. RMSNorm models keep their means, since their norms do not remove them.
    """
    require_pre_norm(model)
    untie_head(model)
    ends = stream_ends(model)
    names = {id(module): name for name, module in model.named_modules()}
    final = names[id(ends.final_norm)]
    with visit(ends.final_norm, lambda: model.get_submodule(final)) as norm, visit(ends.head) as head:
        layer_norm = _subtracts_mean(norm)
        _fuse(model, final, norm, [head], layer_norm)
    for parts in map(anatomy, visit_blocks(model)):
        for norm, linears in parts.norm_groups:
            _fuse(model, names[id(norm)], norm, linears, layer_norm)
        for linear in (parts.o, parts.down) if layer_norm else ():
            _centre_output(linear)
    if layer_norm:
        centre_embeddings(model)


@torch.no_grad()
def centre_embeddings(model: nn.Module) -> None:
    """Subtract the mean of each embedding row, in place.

    LayerNorms do so anyway, RMSNorms do not; the codes of QuaRot and its descendants do it in front of both.
    """
    untie_head(model)
    for embedding in stream_ends(model).embeddings:
        with visit(embedding):
            rows = embedding.weight.double()
            _write(embedding.weight, rows - rows.mean(1, keepdim=True))


def _fuse(model: nn.Module, name: str, norm: nn.Module, linears: list[nn.Linear], layer_norm: bool) -> None:
    """Fold one norm, called `name` in the model, into what it feeds; a LayerNorm becomes an RMSNorm."""
    if _subtracts_mean(norm) != layer_norm:
        raise UnsupportedModelError(
            f"{type(model).__name__} mixes norms that subtract the mean with others that do not"
        )
    _fold_norm(norm, linears)
    if layer_norm:
        replace_module(model, name, _plain_rms_norm(norm, linears[0]))


def turn_reader(reader: nn.Module, Q: Tensor) -> None:
    """Let a linear read x Q, or an embedding give it, in the place of x; in place, Q in float64."""
    _write(reader.weight, reader.weight.double() @ Q.to(reader.weight.device))


def turn_writer(linear: nn.Linear, Q: Tensor) -> None:
    """Let a linear write y Q in the place of y; in place, Q in float64."""
    here = Q.to(linear.weight.device)
    _write(linear.weight, here.T @ linear.weight.double())
    if linear.bias is not None:
        _write(linear.bias, linear.bias.double() @ here)


@torch.no_grad()
def rotate_stream(model: nn.Module, Q: Tensor) -> None:
    """Rotate the residual stream by Q [hidden, hidden], in place; `fuse_norms` comes first.

    Where a norm stands between a sublayer and the sum, its gain does not commute with Q: the sublayer is
    left as it is, and Q is applied online behind that norm.
    """
    ends = stream_ends(model)
    Q = Q.double()
    for reader in (*ends.embeddings, ends.head):
        with visit(reader):
            turn_reader(reader, Q)
    for parts in map(anatomy, visit_blocks(model)):
        for linear in (*parts.qkv, *parts.ups):
            turn_reader(linear, Q)
        behind = post_norms(parts)
        for name, norm in behind.items():
            online = Rotation(Q.to(parts.down.weight.device, parts.down.weight.dtype))
            replace_module(parts.block, name, nn.Sequential(norm, online))
        for linear in () if behind else (parts.o, parts.down):
            turn_writer(linear, Q)


@torch.no_grad()
def rotate_values(parts: BlockAnatomy, geometry: Heads, R: Tensor) -> None:
    """Rotate every value head by R [head_dim, head_dim], or by its own R [n_kv_heads, head_dim, head_dim], in place.

    o's columns undo it.
    """
    value, size = geometry.value, geometry.head_dim
    rows, R = geometry.value_rows.to(value.weight.device), R.double().to(value.weight.device)
    V = value.weight[rows].double().view(geometry.n_kv_heads, size, -1)  # [n_kv_heads, head_dim, d_in]
    value.weight[rows] = (R.mT @ V).flatten(0, 1).to(value.weight.dtype)
    if value.bias is not None:
        b = value.bias[rows].double().view(-1, size)
        b = b @ R if R.ndim == 2 else (b[:, None] @ R)[:, 0]
        value.bias[rows] = b.flatten().to(value.bias.dtype)
    columns, R = parts.o.weight.double().view(-1, geometry.n_heads, size), R.to(parts.o.weight.device)
    if R.ndim == 2:
        columns = columns @ R  # [hidden, n_heads, head_dim]
    else:
        R = R.repeat_interleave(geometry.n_heads // geometry.n_kv_heads, 0)
        columns = (columns.transpose(0, 1) @ R).transpose(0, 1)
    _write(parts.o.weight, columns.flatten(1))


@torch.no_grad()
def hadamard_before(root: nn.Module, linear: nn.Linear, remedy: str = "") -> None:
    """Put a Hadamard transform in front of a linear below root and its inverse into the weight, in place.

    Raises: UnsupportedModelError where no such matrix is known; the message ends with the remedy.
    """
    if not has_hadamard(linear.in_features):
        raise UnsupportedModelError(f"no Hadamard matrix is known for {linear.in_features} inputs{remedy}")
    _write(linear.weight, hadamard_transform(linear.weight.double()))
    transform_inputs(root, [linear], hadamard_transform)


@contextmanager
def same_function(model: nn.Module) -> Iterator[None]:
    """Around in-place surgery: at the end the logits of a few tokens must be what they were at the start.

    A family with a detail this module does not know (another multiplier, another layout) fails here instead
    of silently.
    Raises: UnsupportedModelError.
    """
    tokens = (torch.arange(16) * 7919 + 13).view(2, 8) % model.get_input_embeddings().num_embeddings

    @torch.no_grad()
    def logits() -> Tensor:
        return model(tokens.to(model.device), use_cache=False).logits.float()

    before = logits()
    yield
    error, size = float((logits() - before).abs().max()), float(before.abs().max())
    if not error <= (1e-3 if model.dtype.itemsize >= 4 else 0.1) * size:
        raise UnsupportedModelError(
            f"rotating {type(model).__name__} changed its logits by {error:.2g} (largest {size:.2g}): "
            "this family is built in a way that the rotation does not know"
        )
