"""Per-channel scales and shifts that move difficulty between activations and weights, and change no output.

With s a positive scale and d a shift, both [channels], X W^T + b = ((X - d) / s) (s W)^T + (b + W d). The readers of X
take s and d at a cost of nothing; what wrote X must be able to take the rest. A `Site` is such a place in a block.
SmoothQuant and AWQ scale, Outlier Suppression+ and OmniQuant scale and shift, at some or all of these sites.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls._anatomy import BlockAnatomy, scale_norm
from requant.reference_impls._quant import QuantizationError
from requant.reference_impls._rotation import heads
from requant.reference_impls._walk import replace_module


class ShiftedNorm(nn.Module):
    """A norm without bias (RMSNorm) and a bias behind it; looks like a norm with both."""

    def __init__(self, norm: nn.Module, bias: Tensor):
        super().__init__()
        self.norm, self.bias = norm, nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The gain of the wrapped norm."""
        return self.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.bias


class ScaledInput(nn.Module):
    """A linear whose input is divided by s when it runs, for want of an operator that absorbs s (GELU)."""

    def __init__(self, linear: nn.Linear, s: Tensor):
        super().__init__()
        self.linear = linear
        self.register_buffer("s", s.to(linear.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x / self.s)


@dataclass(frozen=True)
class Site:
    """Linears that read one tensor X, and the operator that can give (X - d) / s in its place.

    Attributes:
        name: attn_norm, mlp_norm, value or up, after what writes X.
        linears: all readers of X.
        write: (s, d or None) -> None, changes the writer in place.
        repeat: readers see each channel of s this many times, head by head (grouped-query attention); else 1.
    """

    name: str
    linears: list[nn.Linear]
    write: Callable[[Tensor, Tensor | None], None]
    shifts: bool
    head_dim: int = 1
    repeat: int = 1

    def seen(self, vector: Tensor) -> Tensor:
        """A vector [channels written] as the readers index it: [d_in]."""
        if self.repeat == 1:
            return vector
        return vector.view(-1, 1, self.head_dim).expand(-1, self.repeat, -1).reshape(-1)

    @torch.no_grad()
    def fold(self, s: Tensor, d: Tensor | None = None) -> None:
        """Divide what is read by s [channels written] after subtracting d, and undo it in the readers; in place.

        Raises: QuantizationError for a shift at a site that has none.
        """
        if d is not None and not self.shifts:
            raise QuantizationError(f"no shift passes the nonlinearity before the readers of {self.name}")
        self.write(s, d)
        for linear in self.linears:
            if d is not None:
                add_bias(linear, linear.weight.double() @ self.seen(d).double())
            linear.weight *= self.seen(s)


@torch.no_grad()
def add_bias(linear: nn.Linear, b: Tensor) -> None:
    """Add b [d_out] to the bias, which is made where there is none; in place."""
    old = 0.0 if linear.bias is None else linear.bias
    linear.bias = nn.Parameter((old + b).to(linear.weight.dtype), requires_grad=False)


def _write_norm(block: nn.Module, norm: nn.Module, s: Tensor, d: Tensor | None) -> None:
    scale_norm(norm, 1.0 / s)
    if d is None:
        return
    if getattr(norm, "bias", None) is not None:
        norm.bias -= d / s
        return
    name = next(name for name, module in block.named_modules() if module is norm)
    replace_module(block, name, ShiftedNorm(norm, -d / s))


def _write_rows(linear: nn.Linear, rows: Tensor, s: Tensor, d: Tensor | None) -> None:
    if d is not None:
        shift = torch.zeros(linear.out_features, dtype=d.dtype, device=d.device)
        shift[rows] = -d
        add_bias(linear, shift)
    linear.weight[rows] /= s[:, None]
    if linear.bias is not None:
        linear.bias[rows] /= s


def _write_at_run_time(block: nn.Module, linear: nn.Linear, s: Tensor, _d: Tensor | None) -> None:
    name = next(name for name, module in block.named_modules() if module is linear)
    replace_module(block, name, ScaledInput(linear, s))


def sites(parts: BlockAnatomy, config) -> list[Site]:
    """The sites of one block in the order of the forward pass: norms, values, and the MLP's inner activation.

    Shifts pass everywhere but `up`; a shift of the values passes because attention weights sum to one. The inner
    activation takes a scale through ReLU or a gate; elsewhere (GELU) the input is divided when the model runs.
    """
    names = ["attn_norm", "mlp_norm"]
    found = [
        Site(name, linears, partial(_write_norm, parts.block, norm), shifts=True)
        for name, (norm, linears) in zip(names, parts.norm_groups, strict=False)
    ]
    geometry = heads(parts, config)
    write = partial(_write_rows, geometry.value, geometry.value_rows)
    repeat = geometry.n_heads // geometry.n_kv_heads
    found.insert(1, Site("value", [parts.o], write, True, geometry.head_dim, repeat))
    gated = parts.gate is not None or parts.up.out_features == 2 * parts.down.in_features
    relu = any(isinstance(module, nn.ReLU) for module in parts.mlp.modules())
    write = partial(_write_at_run_time, parts.block, parts.down)
    if gated or relu:  # the input is linear in up's output, or ReLU(x / s) = ReLU(x) / s
        # the last rows: where a fused gate and up projection has its up half
        rows = torch.arange(parts.up.out_features)[-parts.down.in_features :]
        write = partial(_write_rows, parts.up, rows)
    found.append(Site("up", [parts.down], write, shifts=False))
    return found
