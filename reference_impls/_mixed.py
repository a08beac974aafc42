"""Codes of different widths in one matrix: grids, packing and size, for groups and for whole columns.

A width is the number of bits of a code. `widths` is an integer tensor that broadcasts against the codes it belongs to:
[d_in] for columns, [n_groups, 1] for groups of inputs shared by all rows, [d_out, n_groups, 1] for the groups of each
row. Codes of one width are one stream of bits, in row-major order; which code has which width is stored once, as an
index into the `choices` of the method.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from requant.reference_impls import _quant
from requant.reference_impls._quant import QuantizationError, pack_bits, unpack_bits


def check_widths(widths: Tensor, choices: Sequence[int]) -> None:
    """Raise QuantizationError if a width is not among the choices."""
    strange = set(widths.unique().tolist()) - set(choices)
    if strange:
        raise QuantizationError(f"widths {sorted(strange)} are not among the choices {tuple(choices)}")


def choose_qparams(x: Tensor, widths: Tensor, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """`_quant.choose_qparams` with a width for each last-dimension slice.

    Args:
        x: [..., n]; widths: broadcasts against [..., 1].
    Returns: scale, zero_point, [..., 1] each.
    """
    widths = widths.expand(*x.shape[:-1], 1)
    scale, zero_point = (torch.empty_like(x[..., :1]) for _ in range(2))
    for bits in widths.unique().tolist():
        chosen = widths[..., 0] == bits
        scale[chosen], zero_point[chosen] = _quant.choose_qparams(x[chosen], bits, symmetric)
    return scale, zero_point


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, widths: Tensor) -> Tensor:
    """Integer-valued float codes in 0..2^width-1, same shape as x."""
    return ((x / scale).round() + zero_point).clamp(min=0).minimum((1 << widths) - 1)


def fake_quant(x: Tensor, widths: Tensor, symmetric: bool = False) -> Tensor:
    """Round to nearest on the min-max affine grid of each last-dimension slice, at its own width; same shape as x."""
    scale, zero_point = choose_qparams(x, widths, symmetric)
    return _quant.dequantize(quantize(x, scale, zero_point, widths), scale, zero_point)


# --- storage


def _flag_bits(choices: Sequence[int]) -> int:
    return (len(choices) - 1).bit_length()


def pack_widths(widths: Tensor, choices: Sequence[int]) -> Tensor:
    """Widths as indices into the choices, packed: uint8; empty where there is one choice only."""
    check_widths(widths, choices)
    flags = sum(index * (widths == bits) for index, bits in enumerate(choices))
    return pack_bits(flags, _flag_bits(choices))


def unpack_widths(packed: Tensor, choices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack_widths`: int64 of the given shape."""
    return torch.tensor(choices)[unpack_bits(packed, _flag_bits(choices), shape)]


def pack_codes(
    codes: Tensor, widths: Tensor, choices: Sequence[int], name: str = "codes"
) -> dict[str, Tensor]:
    """One stream of bits for each choice, under `<name>_<bits>`; the widths themselves are not among them."""
    check_widths(widths, choices)
    widths = widths.expand(codes.shape)
    return {f"{name}_{bits}": pack_bits(codes[widths == bits], bits) for bits in choices}


def unpack_codes(
    packed: dict[str, Tensor],
    widths: Tensor,
    choices: Sequence[int],
    shape: tuple[int, ...],
    name: str = "codes",
) -> Tensor:
    """Inverse of `pack_codes`: int64 codes of the given shape."""
    codes, widths = torch.empty(shape, dtype=torch.int64), widths.expand(shape)
    for bits in choices:
        chosen = widths == bits
        codes[chosen] = unpack_bits(packed[f"{name}_{bits}"], bits, (int(chosen.sum()),))
    return codes


def pack_groups(
    codes: Tensor, scale: Tensor, zero_point: Tensor, widths: Tensor, choices: Sequence[int]
) -> dict[str, Tensor]:
    """The tensors of an affine weight whose groups have different widths.

    Args:
        codes: [d_out, n_groups, group]; scale, zero_point: [d_out, n_groups, 1].
        widths: [n_groups, 1], shared by all rows, or [d_out, n_groups, 1].
    Returns: a stream of codes and one of zero points (as wide as their codes) for each choice, scale (float16),
    widths, and shape (int32 [3], not counted as storage).
    """
    return {
        "shape": torch.tensor(codes.shape, dtype=torch.int32),
        "widths": pack_widths(widths, choices),
        "scale": scale.half(),
        **pack_codes(codes, widths, choices),
        **pack_codes(zero_point, widths, choices, "zero_point"),
    }


def unpack_groups(packed: dict[str, Tensor], choices: Sequence[int], *, by_row: bool = False) -> Tensor:
    """Inverse of `pack_groups`: the dequantized weight, float32 [d_out, d_in].

    Args:
        by_row: the widths were [d_out, n_groups, 1].
    """
    d_out, n_groups, size = packed["shape"].tolist()
    widths = unpack_widths(packed["widths"], choices, (d_out, n_groups, 1) if by_row else (n_groups, 1))
    codes = unpack_codes(packed, widths, choices, (d_out, n_groups, size)).float()
    zero_point = unpack_codes(packed, widths, choices, (d_out, n_groups, 1), "zero_point").float()
    return _quant.dequantize(codes, packed["scale"].float(), zero_point).flatten(1)


def group_bits(
    mean_width: float, group_size: int, d_out: int, choices: Sequence[int], *, by_row: bool = False
) -> float:
    """Bits per weight of `pack_groups`: mean width, a float16 scale and a zero point a group, and its flag."""
    flags = _flag_bits(choices) / (1 if by_row else d_out)
    return mean_width + (16 + mean_width + flags) / group_size
