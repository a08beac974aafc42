"""The table of ops and peers that `python -m requant.kernels.bench` times: a new kernel is one row of `OPS`.

A row makes, for a linear shape and a number of rows of x, a `Case`: what to run, what it must agree with, the bytes
that have to move and the operations that have to be done. Codes are random: speed does not depend on them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from requant.kernels import bench_codes as codes_of
from requant.kernels._binary import BinaryWeight, TernaryWeight
from requant.kernels._float4 import OUTER_BLOCK, Float4Weight
from requant.kernels.binary_matmul import binary_matmul, binary_matmul_ref
from requant.kernels.codebook_matmul import codebook_matmul, codebook_matmul_ref
from requant.kernels.hadamard import hadamard, hadamard_quantize, hadamard_quantize_ref, hadamard_ref
from requant.kernels.int8_matmul import (
    int8_matmul,
    int8_matmul_ref,
    quantize_per_token,
    quantize_per_token_ref,
)
from requant.kernels.int_matmul import int_matmul, int_matmul_ref
from requant.kernels.nf4_matmul import nf4_matmul, nf4_matmul_ref
from requant.kernels.pack import PackedWeight, n_words
from requant.kernels.trellis_matmul import trellis_matmul, trellis_matmul_ref
from requant.kernels.w4a8_matmul import pack_integer_scale, w4a8_matmul, w4a8_matmul_ref


@dataclass(frozen=True)
class Linear:
    """A linear layer of a model: its shape and where it stands."""

    model: str
    layers: str
    d_out: int
    d_in: int


LINEARS = (
    Linear("llama-2-7b", "q, k, v, o", 4096, 4096),
    Linear("llama-2-7b", "gate, up", 11008, 4096),
    Linear("llama-2-7b", "down", 4096, 11008),
    Linear("llama-3-70b", "q, o", 8192, 8192),
    Linear("llama-3-70b", "k, v", 1024, 8192),
    Linear("llama-3-70b", "gate, up", 28672, 8192),
    Linear("llama-3-70b", "down", 8192, 28672),
)
BATCHES = (1, 16, 256, 2048)
"""Rows of x."""


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        run: the op, on tensors made beforehand.
        truth: float result to compare with, or None.
        weight_bytes: bytes of the stored weight (0 for ops without one); io_bytes: bytes of inputs and outputs.
        operations: floating-point or integer operations, a multiply-add as two.
        dense: whether a bf16 matmul of the shape is the thing to beat.
        integer: whether the ceiling is that of int8 products.
    """

    run: Callable[[], Tensor]
    truth: Callable[[], Tensor] | None
    weight_bytes: int
    io_bytes: int
    operations: int
    dense: bool = True
    integer: bool = False


@dataclass(frozen=True)
class Op:
    """A row of the table: a name, and what makes a case of a shape; None where the shape does not apply."""

    name: str
    make: Callable[[Linear, int, torch.device], Case | None]


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def activations(shape: Linear, rows: int, device: torch.device) -> Tensor:
    """x [rows, d_in] bfloat16."""
    return torch.randn(rows, shape.d_in, device=device).bfloat16()


def packed_weight(shape: Linear, bits: int, group_size: int | None, symmetric: bool, device) -> PackedWeight:
    """A weight of random codes."""

    def words(columns: int) -> Tensor:
        bytes_ = torch.randint(0, 256, (shape.d_out, n_words(columns, bits) * 4), device=device)
        return bytes_.to(torch.uint8).view(torch.int32)

    n_groups = shape.d_in // (group_size or shape.d_in)
    scale = (torch.rand(shape.d_out, n_groups, device=device) + 0.5) * 0.02 / 2**bits
    zeros = None if symmetric else words(n_groups)
    return PackedWeight(words(shape.d_in), scale.half(), zeros, bits, shape.d_in, group_size)


def weight_only(bits: int, group_size: int | None = 128, symmetric: bool = True) -> Callable[..., Case]:
    """Maker of a W{bits}A16 case."""

    def make(shape: Linear, rows: int, device: torch.device) -> Case:
        x, weight = (
            activations(shape, rows, device),
            packed_weight(shape, bits, group_size, symmetric, device),
        )
        return Case(
            run=lambda: int_matmul(x, weight),
            truth=lambda: int_matmul_ref(x.float(), weight),
            weight_bytes=weight.stored_bytes,
            io_bytes=_bytes(x) + 2 * rows * shape.d_out,
            operations=2 * rows * shape.d_out * shape.d_in,
        )

    return make


def w8a8(shape: Linear, rows: int, device: torch.device) -> Case:
    """int8 x int8, codes of x given (`quantize_per_token` is a row of its own)."""
    x, x_scale = quantize_per_token(activations(shape, rows, device))
    w = torch.randint(-127, 128, (shape.d_out, shape.d_in), device=device).to(torch.int8)
    w_scale = torch.rand(shape.d_out, device=device) * 1e-4
    return Case(
        run=lambda: int8_matmul(x, w, x_scale, w_scale, out_dtype=torch.bfloat16),
        truth=lambda: int8_matmul_ref(x, w, x_scale, w_scale),
        weight_bytes=_bytes(w, w_scale),
        io_bytes=_bytes(x, x_scale) + 2 * rows * shape.d_out,
        operations=2 * rows * shape.d_out * shape.d_in,
        integer=True,
    )


def w4a8(shape: Linear, rows: int, device: torch.device) -> Case:
    """int8 x 4 bits in groups of 128 with integer scales."""
    x, x_scale = quantize_per_token(activations(shape, rows, device))
    codes = torch.randint(0, 16, (shape.d_out, shape.d_in), device=device)
    scale = torch.rand(shape.d_out, shape.d_in // 128, device=device) * 0.005 + 0.002
    weight = pack_integer_scale(codes, scale, 128)
    return Case(
        run=lambda: w4a8_matmul(x, weight, x_scale, out_dtype=torch.bfloat16),
        truth=lambda: w4a8_matmul_ref(x, weight, x_scale),
        weight_bytes=weight.stored_bytes,
        io_bytes=_bytes(x, x_scale) + 2 * rows * shape.d_out,
        operations=2 * rows * shape.d_out * shape.d_in,
        integer=True,
    )


def per_token(shape: Linear, rows: int, device: torch.device) -> Case:
    """The quantization of activations that comes before W8A8."""
    x = activations(shape, rows, device)
    size = rows * shape.d_in
    return Case(
        run=lambda: quantize_per_token(x)[0],
        truth=lambda: quantize_per_token_ref(x)[0].float(),
        weight_bytes=0,
        io_bytes=_bytes(x) + size + 4 * rows,
        operations=4 * size,
        dense=False,
    )


def transform(shape: Linear, rows: int, device: torch.device) -> Case:
    """The orthonormal Hadamard transform of x."""
    x = activations(shape, rows, device)
    return Case(
        run=lambda: hadamard(x),
        truth=lambda: hadamard_ref(x.float()),
        weight_bytes=0,
        io_bytes=2 * _bytes(x),
        operations=rows * shape.d_in * max(1, (shape.d_in - 1).bit_length()),
        dense=False,
    )


def transform_and_quantize(shape: Linear, rows: int, device: torch.device) -> Case:
    """The same, to int8 codes with a scale a token."""
    x = activations(shape, rows, device)
    plain = transform(shape, rows, device)
    return replace(
        plain,
        run=lambda: hadamard_quantize(x)[0],
        truth=lambda: hadamard_quantize_ref(x.float())[0].float(),
        io_bytes=_bytes(x) + x.numel() + 4 * rows,
    )


def _words(*shape: int, device: torch.device) -> Tensor:
    """Random bits, int32."""
    return (
        torch.randint(0, 256, (*shape[:-1], 4 * shape[-1]), device=device).to(torch.uint8).view(torch.int32)
    )


def nf4(shape: Linear, device: torch.device) -> Float4Weight:
    """Blocks of 64, doubly quantized scales."""
    n_blocks = shape.d_out * shape.d_in // 64
    absmax = torch.randint(0, 256, (n_blocks,), device=device).to(torch.uint8)
    outer = torch.full((-(-n_blocks // OUTER_BLOCK),), 0.01, device=device)
    mean = torch.full((1,), 0.03, device=device)
    words = _words(shape.d_out, n_words(shape.d_in, 4), device=device)
    return Float4Weight(words, absmax, outer, mean, None, shape.d_in)


def fp4(shape: Linear, device: torch.device) -> Float4Weight:
    """E2M1 with a scale a row, as LLM-FP4 stores weights."""
    absmax = torch.rand(shape.d_out, device=device) * 0.05
    words = _words(shape.d_out, n_words(shape.d_in, 4), device=device)
    return Float4Weight(words, absmax, None, None, None, shape.d_in, None, "fp4_e2m1")


def binary(shape: Linear, device: torch.device) -> BinaryWeight:
    """Signs and one scale (BitNet)."""
    words = _words(shape.d_out, n_words(shape.d_in, 1), device=device)
    return BinaryWeight(words, torch.full((1, 1, 1), 0.02, device=device), shape.d_in)


def two_planes(shape: Linear, device: torch.device) -> BinaryWeight:
    """Two planes, a salient column in sixteen, four levels a row and 128 columns (BiLLM)."""
    signs, flags = (_words(shape.d_out, n_words(shape.d_in, 1), device=device) for _ in range(2))
    salient = torch.full((n_words(shape.d_in, 1),), 0x00010001, dtype=torch.int32, device=device)
    scale = torch.rand(4, shape.d_out, shape.d_in // 128, device=device).half() * 0.02
    return BinaryWeight(signs, scale, shape.d_in, flags, salient, group_size=128)


def ternary(shape: Linear, device: torch.device) -> TernaryWeight:
    """Five ternary values a byte and one scale."""
    codes = torch.randint(0, 243, (shape.d_out, -(-shape.d_in // 5)), device=device).to(torch.uint8)
    return TernaryWeight(codes, torch.full((1, 1, 1), 0.02, device=device), shape.d_in)


def decoded(
    weight_of: Callable, matmul: Callable[..., Tensor], ref: Callable[..., Tensor]
) -> Callable[..., Case]:
    """Maker of a case for a weight that is decoded as it is read, and bfloat16 activations."""

    def make(shape: Linear, rows: int, device: torch.device) -> Case:
        x, weight = activations(shape, rows, device), weight_of(shape, device)
        return Case(
            run=lambda: matmul(x, weight),
            truth=lambda: ref(x.float(), weight),
            weight_bytes=weight.stored_bytes,
            io_bytes=_bytes(x) + 2 * rows * shape.d_out,
            operations=2 * rows * shape.d_out * shape.d_in,
        )

    return make


def bitnet(shape: Linear, rows: int, device: torch.device) -> Case:
    """Signs and one scale, int8 activations."""
    x, x_scale = quantize_per_token(activations(shape, rows, device))
    x_scale = x_scale.reshape(rows, 1).float()
    weight = binary(shape, device)
    return Case(
        run=lambda: binary_matmul(x, weight, x_scale),
        truth=lambda: binary_matmul_ref(x, weight, x_scale),
        weight_bytes=weight.stored_bytes,
        io_bytes=_bytes(x, x_scale) + 4 * rows * shape.d_out,
        operations=2 * rows * shape.d_out * shape.d_in,
        integer=True,
    )


def vectors(weight_of: Callable) -> Callable[..., Case]:
    """Maker of a case for vector codes."""
    return decoded(weight_of, codebook_matmul, codebook_matmul_ref)


def trellis(code: str, bits: int) -> Callable[..., Case]:
    """Maker of a case for QTIP's codes."""
    return decoded(codes_of.qtip(code, bits), trellis_matmul, trellis_matmul_ref)


def attention(fields_of: Callable) -> Callable[..., Case | None]:
    """Maker of a case of attention: not compared with a matmul."""

    def make(shape: Linear, rows: int, device: torch.device) -> Case | None:
        fields = fields_of(shape, rows, device)
        return None if fields is None else Case(*fields, dense=False)

    return make


OPS = (
    Op("W2A16 g128 asymmetric", weight_only(2, symmetric=False)),
    Op("W3A16 g128 asymmetric", weight_only(3, symmetric=False)),
    Op("W4A16 g128", weight_only(4)),
    Op("W4A16 g128 asymmetric", weight_only(4, symmetric=False)),
    Op("W4A16 per channel", weight_only(4, None)),
    Op("W8A16 per channel", weight_only(8, None)),
    Op("W8A8", w8a8),
    Op("W4A8 g128 integer scales", w4a8),
    Op("int8 per-token quantization", per_token),
    Op("Hadamard transform", transform),
    Op("Hadamard transform to int8", transform_and_quantize),
    Op("NF4 b64 double quantization", decoded(nf4, nf4_matmul, nf4_matmul_ref)),
    Op("FP4 E2M1 per channel", decoded(fp4, nf4_matmul, nf4_matmul_ref)),
    Op("W1A16 BitNet", decoded(binary, binary_matmul, binary_matmul_ref)),
    Op("W1A8 BitNet", bitnet),
    Op("W1A16 BiLLM g128", decoded(two_planes, binary_matmul, binary_matmul_ref)),
    Op("W1.6A16 ternary", decoded(ternary, binary_matmul, binary_matmul_ref)),
    Op("AQLM 1x16", vectors(codes_of.aqlm(16))),
    Op("AQLM 2x8", vectors(codes_of.aqlm(8, 8))),
    Op("VPTQ v6 k4096", vectors(codes_of.vptq)),
    Op("VPTQ v12 residual, outliers", vectors(codes_of.vptq_outliers)),
    Op("QTIP 1MAD 2 bits", trellis("1mad", 2)),
    Op("QTIP 3INST 2 bits", trellis("3inst", 2)),
    Op("QTIP HYB 2 bits", trellis("hyb", 2)),
    Op("QTIP HYB 4 bits", trellis("hyb", 4)),
    Op("decode bf16 (torch)", attention(codes_of.decode(None))),
    Op("decode KV8", attention(codes_of.decode(codes_of.affine_cache(8)))),
    Op("decode KV4", attention(codes_of.decode(codes_of.affine_cache(4)))),
    Op("decode KV2", attention(codes_of.decode(codes_of.affine_cache(2)))),
    Op("decode CQ 8c8b, rotary", attention(codes_of.decode(codes_of.coupled_cache(8, 8), rope=True))),
    Op("prefill bf16 (torch)", attention(codes_of.prefill("torch"))),
    Op("prefill bf16", attention(codes_of.prefill("triton"))),
    Op("prefill FP8", attention(codes_of.prefill("fp8"))),
)
"""All ops: a new kernel is one row more."""


@dataclass(frozen=True)
class Peer:
    """Another library's 4-bit matmul: its module, and what makes a call from W [d_out, d_in] and x (bfloat16)."""

    name: str
    module: str
    make: Callable[[Tensor, Tensor], Callable[[], Tensor]]


def _gemlite(W: Tensor, x: Tensor) -> Callable[[], Tensor]:
    helper = importlib.import_module("gemlite.helper")
    linear = torch.nn.Linear(W.shape[1], W.shape[0], bias=False, device=W.device, dtype=W.dtype)
    linear.weight.data.copy_(W)
    layer = helper.A16W4_HQQ_INT(device=str(W.device), dtype=W.dtype).from_linear(linear)
    return lambda: layer(x)


def _bitsandbytes(W: Tensor, x: Tensor) -> Callable[[], Tensor]:
    bnb = importlib.import_module("bitsandbytes")
    packed, state = bnb.functional.quantize_4bit(W, quant_type="nf4")
    return lambda: bnb.matmul_4bit(x, packed.t(), quant_state=state)


def _torchao(W: Tensor, x: Tensor) -> Callable[[], Tensor]:
    ao = importlib.import_module("torchao.quantization")
    linear = torch.nn.Linear(W.shape[1], W.shape[0], bias=False, device=W.device, dtype=W.dtype)
    linear.weight.data.copy_(W)
    ao.quantize_(linear, ao.Int4WeightOnlyConfig(group_size=128))
    return lambda: linear(x)


PEERS = (
    Peer("gemlite A16W4", "gemlite", _gemlite),
    Peer("bitsandbytes NF4", "bitsandbytes", _bitsandbytes),
    Peer("torchao int4 g128", "torchao", _torchao),
)
"""Peers that are timed where they can be imported."""
