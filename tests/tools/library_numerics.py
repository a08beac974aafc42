"""Reference implementations with the numerics of a library: what a difference of grids, not of methods, is worth.

The papers and their code fix some conventions that libraries choose otherwise. `with numerics(name, ...)` runs ours
with the library's choices; outside of it nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn

from requant.reference_impls import _hadamard, _quant, quarot, smoothquant


def _full_range_scale(x: Tensor, bits: int, *, per_tensor: bool = False, clip_ratio: float = 1.0) -> Tensor:
    """Step of a symmetric grid that uses all 2^bits levels: the largest magnitude lies half a step beyond the last."""
    peak = clip_ratio * x.abs().amax((-2, -1) if per_tensor else -1, keepdim=True)
    return peak.clamp(min=1e-5) / ((2**bits - 1) / 2)


def _full_range_fake_quant(x: Tensor, bits: int, scale: Tensor | None = None, **how) -> Tensor:
    middle = 2 ** (bits - 1)
    scale = _full_range_scale(x, bits, **how) if scale is None else scale
    return (x / scale).round().clamp(-middle, middle - 1) * scale


def _full_range_grid(x: Tensor, bits: int, symmetric: bool, ratio: float = 1.0) -> tuple[Tensor, Tensor]:
    scale = _quant.stored_scale(_full_range_scale(x, bits, clip_ratio=ratio), bits)
    return scale, torch.full_like(scale, 2.0 ** (bits - 1))


def _full_range_tokens(x: Tensor, bits: int, group_size: int | None, clip_ratio: float) -> Tensor:
    return _full_range_fake_quant(x, bits, clip_ratio=clip_ratio)


def _channel_ranges(model: nn.Module, calib: Tensor) -> dict[nn.Linear, Tensor]:
    """max X_j - min X_j over all calibration tokens, for each linear of the blocks: float32 [d_in]."""
    ends: dict[nn.Linear, tuple[Tensor, Tensor]] = {}

    def see(linear: nn.Linear, X: Tensor, _Y: Tensor) -> None:
        low, high = X.amin(0).float(), X.amax(0).float()
        seen = ends.get(linear, (low, high))
        ends[linear] = torch.minimum(seen[0], low), torch.maximum(seen[1], high)

    smoothquant.observe_linears(model, calib, see)
    return {linear: high - low for linear, (low, high) in ends.items()}


NUMERICS: dict[str, tuple[tuple[object, str, Callable], ...]] = {
    "float32 scales": ((_quant, "stored_scale", lambda scale, bits: scale),),
    "2^b levels": (
        (_quant, "absmax_scale", _full_range_scale),
        (_quant, "absmax_fake_quant", _full_range_fake_quant),
        (quarot, "grid_of_share", _full_range_grid),
        (quarot, "quantize_tokens", _full_range_tokens),
    ),
    "smoothing by ranges": ((smoothquant, "channel_peaks", _channel_ranges),),
    "Hadamard without signs": (
        (quarot, "random_hadamard", lambda n, generator: _hadamard.hadamard_matrix(n)),
    ),
}


@contextmanager
def numerics(*names: str) -> Iterator[None]:
    """Run reference implementations with the choices named, in this process.

    Raises: KeyError for a name that is not known.
    """
    with ExitStack() as stack:
        for name in names:
            for module, attribute, replacement in NUMERICS[name]:
                stack.enter_context(patch.object(module, attribute, replacement))
        yield
