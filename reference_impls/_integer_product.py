"""Matrix products of integers, exact, in the integer instructions that a CPU is quick at."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_INT8 = 127


@functools.cache
def _has_vnni() -> bool:
    """Whether torch multiplies int8 with the instructions made for it; without them its int32 product is quicker."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for integers: a [..., m, k], b [k, n] or [..., k, n] alike; int32, or int64 where int32 might overflow.

    The dtype of the result depends on the values, its entries never do.
    """
    peaks = int(a.abs().max()), int(b.abs().max())
    width = a.shape[-1]
    small = max(peaks) <= _INT8 and width * _INT8**2 < 2**31
    if small and width > 1 and a.is_cpu and _has_vnni():  # torch 2.13 errs where k is 1
        a, b = a.to(torch.int8), b.to(torch.int8)
        if b.ndim == 2:
            return torch._int_mm(a.flatten(0, -2), b).unflatten(0, a.shape[:-1])
        pairs = zip(a.flatten(0, -3), b.flatten(0, -3), strict=True)
        return torch.stack([torch._int_mm(x, y) for x, y in pairs]).unflatten(0, a.shape[:-2])
    if not small and int(a.abs().sum(-1).max()) * peaks[1] >= 2**31:
        return a.long() @ b.long()
    return a.int() @ b.int()
