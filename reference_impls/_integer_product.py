"""Matrix products of integers, exact, in the integer instructions that a CPU is quick at."""

from __future__ import annotations

import torch
from torch import Tensor

from requant.kernels import int8_matmul

_INT8 = 127


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for integers: a [..., m, k], b [k, n] or [..., k, n] alike; int32, or int64 where int32 might overflow.

    The dtype of the result depends on the values, its entries never do.
    """
    peaks = int(a.abs().max()), int(b.abs().max())
    small = max(peaks) <= _INT8 and a.shape[-1] <= int8_matmul.MAX_INNER
    if small and a.is_cpu and int8_matmul.has_fast_int_mm():  # its other way on a CPU goes through floats
        a, b = a.to(torch.int8), b.to(torch.int8)
        if b.ndim == 2:
            return int8_matmul.integer_product(a.flatten(0, -2), b.T).unflatten(0, a.shape[:-1])
        pairs = zip(a.flatten(0, -3), b.mT.flatten(0, -3), strict=True)
        products = [int8_matmul.integer_product(x, y) for x, y in pairs]
        return torch.stack(products).unflatten(0, a.shape[:-2])
    if not small and int(a.abs().sum(-1).max()) * peaks[1] >= 2**31:
        return a.long() @ b.long()
    return a.int() @ b.int()
