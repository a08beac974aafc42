"""Per-channel scales and shifts that move difficulty between activations and weights, and change no output.

With s a positive scale and d a shift, both [channels], X W^T + b = ((X - d) / s) (s W)^T + (b + W d). The readers of X
take s and d at a cost of nothing; what wrote X must be able to take the rest. A `Site` is such a place in a block.
SmoothQuant and AWQ scale, Outlier Suppression+ and OmniQuant scale and shift, at some or all of these sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls._anatomy import BlockAnatomy, anatomy, heads, scale_norm
from requant.reference_impls._folded import Folded, QueryKey
from requant.reference_impls._learn import floored
from requant.reference_impls._quant import QuantizationError
from requant.reference_impls._walk import Block, replace_module


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
    writer: nn.Module | None = None  # what writes X, and which of its rows (None: a norm); for `fold_into`
    rows: Tensor | None = None

    def seen(self, vector: Tensor) -> Tensor:
        """A vector [channels written] as the readers index it: [d_in]."""
        if self.repeat == 1:
            return vector
        return vector.view(-1, 1, self.head_dim).expand(-1, self.repeat, -1).reshape(-1)

    def written(self, vector: Tensor) -> Tensor:
        """The largest value that readers have for each channel of what is written: [d_in] -> [channels written]."""
        if self.repeat == 1:
            return vector
        return vector.view(-1, self.repeat, self.head_dim).amax(1).flatten()

    @property
    def can_learn_shift(self) -> bool:
        """Whether the writer and all readers have a bias already."""
        modules = [self.writer, *self.linears]
        return self.shifts and all(getattr(module, "bias", None) is not None for module in modules)

    def fold_into(self, now: Folded, s: Tensor, d: Tensor | None = None) -> None:
        """`fold` as a function: puts the new tensors into `now`, and gradients flow to s and d.

        Raises: QuantizationError where nothing can absorb s, or d has no biases to go to.
        """
        if self.writer is None or (d is not None and not self.can_learn_shift):
            raise QuantizationError(f"what writes {self.name} cannot absorb this scale or shift")
        if self.rows is None:
            now.scale_norm(self.writer, s, d)
        else:
            now.scale_rows(self.writer, self.rows, s, d)
        for linear in self.linears:
            W = now[linear.weight]
            if d is not None:
                now[linear.bias] = now[linear.bias] + W @ self.seen(d)
            now[linear.weight] = W * self.seen(s)

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


def value_site(parts: BlockAnatomy, writer: nn.Linear, rows: Tensor) -> Site:
    """The site between the values, which are these rows of `writer`, and o; without grouped queries."""
    write = partial(_write_rows, writer, rows)
    return Site("value", [parts.o], write, shifts=True, writer=writer, rows=rows)


def up_site(parts: BlockAnatomy) -> Site:
    """The site of the MLP's inner activation, before down; see `sites`."""
    relu = any(isinstance(module, nn.ReLU) for module in parts.mlp.modules())
    if not (parts.gated or relu):
        return Site("up", [parts.down], partial(_write_at_run_time, parts.block, parts.down), shifts=False)
    # the input is linear in up's output, or ReLU(x / s) = ReLU(x) / s; the last rows: where a fused gate and up
    # projection has its up half
    rows = torch.arange(parts.up.out_features)[-parts.down.in_features :]
    write = partial(_write_rows, parts.up, rows)
    return Site("up", [parts.down], write, shifts=False, writer=parts.up, rows=rows)


def sites(parts: BlockAnatomy, config) -> list[Site]:
    """The sites of one block in the order of the forward pass: norms, values, and the MLP's inner activation.

    Shifts pass everywhere but `up`; a shift of the values passes because attention weights sum to one. The inner
    activation takes a scale through ReLU or a gate; elsewhere (GELU) the input is divided when the model runs.
    """
    names = ["attn_norm", "mlp_norm"]
    found = [
        Site(name, linears, partial(_write_norm, parts.block, norm), shifts=True, writer=norm)
        for name, (norm, linears) in zip(names, parts.norm_groups, strict=False)
    ]
    geometry = heads(parts, config)
    repeat = geometry.n_heads // geometry.n_kv_heads
    value = value_site(parts, geometry.value, geometry.value_rows)
    found.insert(1, replace(value, head_dim=geometry.head_dim, repeat=repeat))
    found.append(up_site(parts))
    return found


@torch.no_grad()
def add_missing_biases(block: nn.Module, config) -> list[str]:
    """Zero biases where a shift needs one, in norms and linears of a block that has none; in place, for `fold_into`.

    Returns: the names of the sites (of `sites`) that can learn a shift now and could not before.
    """
    bare = [site for site in sites(anatomy(block), config) if site.shifts and not site.can_learn_shift]
    for site in bare:
        zeros = torch.zeros_like(site.written(site.linears[0].weight[0]))
        site.fold(zeros + 1, zeros)
    return [site.name for site in bare]


def channel_ranges(block: Block, site: Site) -> tuple[Tensor, Tensor]:
    """What readers of a site are fed in the original model (walk "both"), by channel [d_in].

    Returns: max |X_j| over all tokens, and the running mean over samples of (max X_j + min X_j) / 2, the mid-range
    that Outlier Suppression+ takes for a shift, with a weight of 0.01 for the latest sample.
    """
    seen: list[Tensor] = []
    original = replace(block, inputs=block.original_inputs)
    original.observe({site.name: site.linears[0]}, lambda _name, X: seen.append(X))
    samples = torch.cat(seen).unflatten(0, (-1, block.inputs[0].shape[1]))  # [n_samples, seqlen, d_in]
    middle, *others = (samples.amax(1) + samples.amin(1)) / 2
    for latest in others:
        middle = 0.99 * middle + 0.01 * latest
    return samples.abs().amax((0, 1)), middle


def folded(
    root: nn.Module,
    places: Iterable[Site],
    pair: QueryKey | None,
    scales: Mapping[str, Tensor],
    shifts: Mapping[str, Tensor],
    cfg,
) -> Folded:
    """A block with the learned scales and shifts of its sites and of its query-key pair folded in; differentiable.

    Args:
        scales, shifts: by site, and scales["query_key"] if there is a pair; sites without a shift have none.
        cfg: what has min_scale, the least magnitude of a scale, and tie_rotary.
    """
    now = Folded(root)
    for site in places:
        shift = shifts.get(site.name, None)
        site.fold_into(now, floored(scales[site.name], cfg.min_scale), shift)
    if pair is not None:
        s = floored(scales["query_key"], cfg.min_scale)
        pair.fold_into(now, pair.tie(s) if cfg.tie_rotary else s)
    return now
