"""The linear layer of BitNet (arXiv:2310.11453v1, Sec. 2): weights of one bit, activations of a few, latent weights.

`cfg` is the method's Config: `a_bits` and `n_groups` of it count here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from requant.reference_impls._quant import QuantizationError

_LN_EPS = 1e-5


def in_groups(x: Tensor, n_groups: int, dim: int) -> Tensor:
    """Split one dimension in two, [..., n_groups, size, ...]."""
    if n_groups < 1 or x.shape[dim] % n_groups:
        raise QuantizationError(f"n_groups {n_groups} does not divide {x.shape[dim]}; choose a divisor, or 1")
    return x.unflatten(dim, (n_groups, -1))


def binarize(W: Tensor, n_groups: int = 1, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Signs and scales of a weight matrix (Eq. 1 to 3 and 12, in groups Eq. 13).

    Args:
        W: [d_out, d_in]; left unchanged.
        dim: which dimension is split in n_groups parts, 0 or 1.
    Returns: positive, bool, W with dim split in two (False where W equals its mean); beta, 1 x n_groups broadcastable.
    """
    grouped = in_groups(W.detach(), n_groups, dim)
    within = [d for d in range(3) if d != dim]
    alpha = grouped.mean(within, keepdim=True)
    return grouped > alpha, grouped.abs().mean(within, keepdim=True)


def restore(positive: Tensor, beta: Tensor, dim: int) -> Tensor:
    return ((2 * positive.to(beta.dtype) - 1) * beta).flatten(dim, dim + 1)


def normalize(x: Tensor, n_groups: int = 1) -> Tensor:
    """LN without gain and bias over the last dimension (Eq. 12), or over each of its groups (Eq. 15)."""
    grouped = in_groups(x, n_groups, -1)
    return F.layer_norm(grouped, grouped.shape[-1:], eps=_LN_EPS).flatten(-2)


def fake_quant(x: Tensor, bits: int, *, per_tensor: bool, shift: bool = False, n_groups: int = 1) -> Tensor:
    """Round activations [..., d_in] to integers between -Qb and Qb - 1, Qb = 2^(bits-1), and back (Eq. 4, 5 and 14).

    Args:
        per_tensor: one range for the whole tensor (training) instead of one a token (inference), Sec. 2.1.
        shift: integers 0..Qb-1 above the minimum eta instead (Eq. 6).
    """
    grouped, Qb = in_groups(x.detach(), n_groups, -1), 2 ** (bits - 1)
    within = [d for d in range(grouped.ndim) if d != grouped.ndim - 2] if per_tensor else [-1]
    if shift:
        eta = grouped.amin(within, keepdim=True)
        gamma, lowest = (grouped.amax(within, keepdim=True) - eta), 0
    else:
        eta, gamma, lowest = 0.0, grouped.abs().amax(within, keepdim=True), -Qb
    step = gamma.clamp(min=1e-9) / Qb
    return (((grouped - eta) / step).round().clamp(lowest, Qb - 1) * step + eta).flatten(-2)


class _StraightThrough(torch.autograd.Function):
    """Forward: the quantized value. Backward: as if it were the latent one (Sec. 2.2)."""

    @staticmethod
    def forward(_ctx, latent: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(_ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class BitLinear(nn.Module):
    """Eq. 11, with beta, gamma and Qb multiplied in before the product instead of after it.

    Holds the latent weight until `freeze` puts the binarized one in its place. In train mode the range of the
    activations is that of the whole tensor, in eval mode that of each token.
    """

    def __init__(
        self, linear: nn.Linear, cfg, *, norm: bool, shift: bool = False, split_inputs: bool = False
    ):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.a_bits, self.norm, self.shift, self.latent = cfg.a_bits, norm, shift, True
        self.split = cfg.n_groups, int(split_inputs)  # of the weight
        self.n_groups = cfg.n_groups if split_inputs else 1  # of the activations
        binarize(self.weight, *self.split)  # raises where the groups do not fit

    def forward(self, x: Tensor) -> Tensor:
        x = normalize(x, self.n_groups) if self.norm else x
        ranges = {"per_tensor": self.training, "shift": self.shift, "n_groups": self.n_groups}
        W = _StraightThrough.apply(self.weight, self.binarized()) if self.latent else self.weight
        return F.linear(_StraightThrough.apply(x, fake_quant(x, self.a_bits, **ranges)), W, self.bias)

    def binarized(self) -> Tensor:
        """The weight that takes part in the product, [d_out, d_in]."""
        return restore(*binarize(self.weight, *self.split), self.split[1])

    @torch.no_grad()
    def freeze(self) -> None:
        """Throw the latent weight away (Sec. 2.2)."""
        self.weight.copy_(self.binarized())
        self.latent = False
