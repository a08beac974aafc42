"""Uniform quantizers and bit packing shared by the methods.

Two conventions are in use in the literature, and both are here under their own name:
  affine   unsigned codes 0..2^b-1 with a scale and an integer zero point (GPTQ, AWQ); `symmetric` fixes the
           zero point at mid-range
  absmax   signed codes within +-(2^(b-1)-1) and a scale alone (SmoothQuant, activations almost everywhere)
All functions work along the last dimension: reshape first (`grouped`) to choose the granularity.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class QuantizationError(ValueError):
    """A quantizer's precondition does not hold; the message names the quantity and the remedy."""


def check_choices(cfg: object, **known: Iterable[str]) -> None:
    """Check that each named option of a Config has one of the values it may have.

    Raises: QuantizationError naming the first that has not.
    """
    for name, values in known.items():
        if getattr(cfg, name) not in values:
            raise QuantizationError(f"{name} is {getattr(cfg, name)!r}; choose one of {', '.join(values)}")


def grouped(W: Tensor, group_size: int | None) -> Tensor:
    """View W [d_out, d_in] as [d_out, n_groups, group_size]; None makes each row one group.

    Raises: QuantizationError if group_size does not divide d_in.
    """
    d_out, d_in = W.shape
    size = group_size or d_in
    if d_in % size:
        raise QuantizationError(f"group_size {size} does not divide d_in {d_in}; choose a divisor or None")
    return W.reshape(d_out, d_in // size, size)


def stored_scale(scale: Tensor, bits: int) -> Tensor:
    """Round a scale to the precision it is stored in: float16 up to 8-bit codes, float32 beyond.

    Quantizers compute codes with the stored scale, so that unpacking gives the very weights that were
    evaluated.
    """
    return scale.half().clamp(min=2.0**-24).float() if bits <= 8 else scale


def choose_qparams(x: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Min-max affine grid per last-dimension slice: the range always contains zero (GPTQ's quantizer).

    Args:
        x: [..., n] float32.
        bits: code width; codes are 0..2^bits-1.
        symmetric: make the range symmetric about zero, zero point 2^(bits-1).
    Returns: scale [..., 1] (stored precision) and zero_point [..., 1] (integer-valued float).
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    empty = (low == 0) & (high == 0)
    low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
    scale = stored_scale((high - low) / (2**bits - 1), bits)
    if symmetric:
        return scale, torch.full_like(scale, 2.0 ** (bits - 1))
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Integer-valued float codes in 0..2^bits-1, same shape as x."""
    return (x / scale).round_().add_(zero_point).clamp_(0, 2**bits - 1)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """(codes - zero_point) * scale."""
    return (codes - zero_point) * scale


def fake_quant(x: Tensor, bits: int, symmetric: bool = False) -> Tensor:
    """Round to nearest on the min-max affine grid of each last-dimension slice; same shape and dtype as x."""
    scale, zero_point = choose_qparams(x, bits, symmetric)
    return dequantize(quantize(x, scale, zero_point, bits), scale, zero_point)


def clipped_fake_quant(x: Tensor, bits: int, clip_ratio: float = 1.0) -> Tensor:
    """Asymmetric rounding of each last-dimension slice, both ends of its range times clip_ratio; same shape as x.

    For activations, whose scales are never stored: they keep x's precision. Not differentiable.
    """
    low, high = x.amin(-1, keepdim=True).clamp_(max=0), x.amax(-1, keepdim=True).clamp_(min=0)
    scale = (high - low).mul_(clip_ratio / (2**bits - 1))
    scale.masked_fill_(scale == 0, 1.0)
    zero_point = low.mul_(clip_ratio).div_(-scale).round_()
    codes = (x / scale).round_().add_(zero_point).clamp_(0, 2**bits - 1)
    return codes.sub_(zero_point).mul_(scale)


def power_(errors: Tensor, norm: float) -> Tensor:
    """errors^norm for errors >= 0, in the memory of `errors`; several times as fast as torch.pow."""
    return errors.clamp_(min=1e-12).log_().mul_(norm).exp_()


def absmax_scale(x: Tensor, bits: int, *, per_tensor: bool = False, clip_ratio: float = 1.0) -> Tensor:
    """clip_ratio * max|x| / (2^(bits-1)-1), over the last dimension or, per_tensor, over the last two; keepdim.

    For activations [batch, seqlen, d] per_tensor means one scale a sequence: what the papers' evaluations,
    which feed one window at a time, compute, and independent of the batch size used here.
    """
    peak = x.abs().amax((-2, -1) if per_tensor else -1, keepdim=True)
    return (clip_ratio * peak).clamp(min=1e-5) / (2 ** (bits - 1) - 1)


def absmax_fake_quant(x: Tensor, bits: int, scale: Tensor | None = None, **how) -> Tensor:
    """Round to nearest on a signed symmetric grid; `scale` is computed by `absmax_scale(x, bits, **how)` if absent."""
    limit = 2 ** (bits - 1) - 1
    scale = absmax_scale(x, bits, **how) if scale is None else scale
    return (x / scale).round().clamp(-limit, limit) * scale


def absmax_qparams(x: Tensor, bits: int, _symmetric: bool = True) -> tuple[Tensor, Tensor]:
    """The signed grid in affine form: max|x| / (2^(bits-1)-1) in stored precision, zero point 2^(bits-1); [..., 1].

    With GPTQ's call signature. Codes may reach the one level below -max|x|, as QUIK's and QuaRot's do.
    """
    scale = stored_scale(absmax_scale(x, bits), bits)
    return scale, torch.full_like(scale, 2.0 ** (bits - 1))


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes in 0..2^bits-1 (any shape, flattened row-major) into bytes, least significant bit first.

    No padding but in the last byte: uint8 [ceil(numel * bits / 8)].
    """
    flat = codes.reshape(-1).to(torch.int64)
    if flat.numel() and (flat.min() < 0 or flat.max() >= 2**bits):
        raise QuantizationError(f"codes must lie in 0..{2**bits - 1} to be packed in {bits} bits")
    stream = (flat[:, None] >> torch.arange(bits)) & 1  # [numel, bits]
    stream = torch.nn.functional.pad(stream.reshape(-1), (0, -flat.numel() * bits % 8))
    return (stream.reshape(-1, 8) << torch.arange(8)).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack_bits`: int64 codes of the given shape."""
    numel = int(torch.tensor(shape).prod())
    stream = ((packed[:, None].to(torch.int64) >> torch.arange(8)) & 1).reshape(-1)[: numel * bits]
    return (stream.reshape(numel, bits) << torch.arange(bits)).sum(1).reshape(shape)


def pack_affine(
    codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, symmetric: bool
) -> dict[str, Tensor]:
    """The tensors a grouped affine weight is stored as.

    Args:
        codes: [d_out, n_groups, group] integer-valued; scale, zero_point: [d_out, n_groups, 1].
    Returns: codes (packed uint8), scale (float16, or float32 beyond 8 bits), zero_point (packed; absent if
    symmetric)
        and shape (int32 [3], bookkeeping of 12 bytes that `storage_bits` leaves out).
    """
    packed = {
        "shape": torch.tensor(codes.shape, dtype=torch.int32),
        "codes": pack_bits(codes, bits),
        "scale": scale.half() if bits <= 8 else scale,
    }
    if not symmetric:
        packed["zero_point"] = pack_bits(zero_point, bits)
    return packed


def unpack_affine(packed: dict[str, Tensor], bits: int, symmetric: bool) -> Tensor:
    """Inverse of `pack_affine`: the dequantized weight, float32 [d_out, d_in]."""
    shape = tuple(packed["shape"].tolist())
    codes = unpack_bits(packed["codes"], bits, shape).float()
    scale = packed["scale"].float()
    if symmetric:
        zero_point = torch.full_like(scale, 2.0 ** (bits - 1))
    else:
        zero_point = unpack_bits(packed["zero_point"], bits, tuple(scale.shape)).float()
    return dequantize(codes, scale, zero_point).flatten(1)


def affine_bits(bits: int, group_size: int | None, d_in: int, symmetric: bool) -> float:
    """Bits per weight of `pack_affine`: b + (16 + b)/g, without the b-bit zero point if symmetric."""
    scale_bits = 16 if bits <= 8 else 32
    return bits + (scale_bits + (0 if symmetric else bits)) / (group_size or d_in)


def storage_bits(packed: dict[str, Tensor]) -> int:
    """Bits that the tensors of a packed layer occupy, shapes excluded."""
    return sum(8 * t.numel() * t.element_size() for key, t in packed.items() if key != "shape")
