"""Gradient descent on the Stiefel manifold: matrices with orthonormal rows stay orthonormal.

Cayley SGD of Li, Fuxin and Todorovic (ICLR 2020, arXiv:2002.01113), in the form that SpinQuant's code uses (without
momentum) and ResQ's (with it): a fixed-point iteration in the place of the inverse in (I - a/2 W)^-1 (I + a/2 W).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

_EPS = 1e-8


def orthonormalized(R: Tensor) -> Tensor:
    """The orthogonal matrix next to R [n, n] by a QR decomposition with positive diagonal; float64."""
    Q, T = torch.linalg.qr(R.double().T)
    return (Q * T.diagonal().sign()).T.contiguous()


def skew_direction(R: Tensor, gradient: Tensor) -> Tensor:
    """The skew matrix W [n, n] for which W R^T is the projected descent direction of R^T; zero at stationary points.

    Args:
        R: [p, n], p <= n, orthonormal rows; gradient: dL/dR [p, n].
    """
    M = -gradient.T @ R  # [n, n]
    M = M - 0.5 * R.T @ (R @ M)
    return M - M.T


class CayleySGD(Optimizer):
    """R <- Cayley(a W) R^T, transposed, with the step a = min(lr, 1 / max column sum of |W|).

    Args:
        params: float32 [p, n] each, p <= n, with orthonormal rows.
        iterations: of Y <- R^T + a/2 W (R^T + Y), which stand in for the inverse.
        qr_chance: probability that a matrix is orthonormalized anew before its step.
        momentum: share of the last step's direction W R^T that is added to the next.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        iterations: int = 5,
        qr_chance: float = 1 / 101,
        generator: torch.Generator | None = None,
        momentum: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.iterations, self.qr_chance, self.generator = iterations, qr_chance, generator

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                R = parameter / (parameter.norm(dim=1, keepdim=True) + _EPS)
                if float(torch.rand((), generator=self.generator)) < self.qr_chance:
                    R = orthonormalized(R).to(R)
                state, gradient = self.state[parameter], parameter.grad
                if "direction" in state:
                    gradient = gradient - group["momentum"] * state["direction"].T
                W = skew_direction(R, gradient)
                a = min(group["lr"], 1.0 / (float(W.abs().sum(0).max()) + _EPS))
                X = R.T
                if group["momentum"]:
                    state["direction"] = W @ X
                Y = X - a * gradient.T
                for _ in range(self.iterations):
                    Y = X + (a / 2) * W @ (X + Y)
                parameter.copy_(Y.T)
