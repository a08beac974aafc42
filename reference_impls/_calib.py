"""Calibration tokens as methods take them: one tensor, or several where samples differ in length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from requant.reference_impls._quant import QuantizationError

Calib = Tensor | Sequence[Tensor]  # int64 [n_samples, seqlen], or several of different lengths


def check_calib(calib: Calib | None, several_lengths: bool = False) -> None:
    """Raise QuantizationError unless calib is a non-empty int64 [n_samples, seqlen], or a list of such if allowed."""
    if calib is None:
        raise QuantizationError("this method needs calibration data: pass calib as int64 [n_samples, seqlen]")
    if not isinstance(calib, Tensor):
        if not several_lengths:
            raise QuantizationError(
                f"this method needs samples of one length; these have {len(calib)} lengths"
            )
        for part in calib:
            check_calib(part)
        if len(calib):
            return
        raise QuantizationError("calib is an empty list")
    if calib.ndim != 2 or calib.dtype != torch.int64 or not calib.numel():
        raise QuantizationError(
            f"calib must be int64 [n_samples, seqlen], got {calib.dtype} {list(calib.shape)}"
        )


def batches_of(calib: Calib, size: int) -> list[Tensor]:
    """Calibration samples in batches of at most `size`, each of one length."""
    parts = [calib] if isinstance(calib, Tensor) else calib
    return [batch for part in parts for batch in part.split(size)]
