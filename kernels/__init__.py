"""Shared Triton kernels, each beside the torch code it must agree with.

Importing this package imports neither torch nor triton; the names below are loaded when first used. Ops live in
the module of their name: `from requant.kernels.int_matmul import int_matmul`.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "QuantLinear": "quant_linear",
    "load_layers": "quant_linear",
    "save_layers": "quant_linear",
    "with_layers": "quant_linear",
    "PackedWeight": "pack",
    "pack_weight": "pack",
}
"""Name -> module that defines it."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
