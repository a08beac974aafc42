"""Random orthogonal bases in which weights are incoherent, cheap to apply: Kronecker factors between permutations.

QuIP (arXiv:2307.13304v2), Sec. 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def two_factors(n: int) -> tuple[int, int]:
    """p, q with p * q = n, both near sqrt(n): the sorted prime factors of n, dealt in turn."""
    primes, divisor = [], 2
    while n > 1:
        while n % divisor == 0:
            primes.append(divisor)
            n //= divisor
        divisor += 1
    return math.prod(primes[0::2]), math.prod(primes[1::2])


def haar_orthogonal(count: int, n: int, generator: torch.Generator, special: bool = False) -> Tensor:
    """Uniformly distributed orthogonal matrices, float64 [count, n, n]; determinant +1 if `special`."""
    Q, R = torch.linalg.qr(torch.randn(count, n, n, generator=generator, dtype=torch.float64))
    Q = Q * R.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    if special:
        Q[:, :, 0] *= torch.linalg.det(Q).sign()[:, None]
    return Q


@dataclass(frozen=True)
class Rotation:
    """Permute, view n = p * q numbers as a p x q array, mix its columns, mix its rows, permute.

    left [1, p, p] and right [1, q, q] make this a Kronecker product; left [q, p, p] and right [p, q, q] give
    each column and row of the array its own matrix (`blocked`). first, last [n] are the permutations.
    """

    left: Tensor
    right: Tensor
    first: Tensor
    last: Tensor

    @classmethod
    def draw(cls, n: int, generator: torch.Generator, blocked: bool) -> Rotation:
        p, q = two_factors(n)
        left = haar_orthogonal(q if blocked else 1, p, generator, special=blocked)
        right = haar_orthogonal(p if blocked else 1, q, generator, special=blocked)
        return cls(left, right, *(torch.randperm(n, generator=generator) for _ in range(2)))

    def apply(self, M: Tensor) -> Tensor:
        """The rotation times M [n, k], float64."""
        p, q = self.left.shape[-1], self.right.shape[-1]
        M = M[self.first].reshape(p, q, -1).transpose(0, 1)  # [q, p, k]
        M = (self.left @ M).transpose(0, 1)  # [p, q, k]
        return (self.right @ M).reshape(p * q, -1)[self.last]

    def undo(self, M: Tensor) -> Tensor:
        """The transpose of the rotation times M [n, k]."""
        p, q = self.left.shape[-1], self.right.shape[-1]
        M = M[self.last.argsort()].reshape(p, q, -1)
        M = (self.right.mT @ M).transpose(0, 1)  # [q, p, k]
        return (self.left.mT @ M).transpose(0, 1).reshape(p * q, -1)[self.first.argsort()]


@dataclass(frozen=True)
class Basis:
    """The change of basis of one layer: W -> U (W diag(rescale)) V^T; rescale [d_in] float64."""

    U: Rotation
    V: Rotation
    rescale: Tensor

    @classmethod
    def draw(cls, rescale: Tensor, d_out: int, generator: torch.Generator, blocked: bool) -> Basis:
        U = Rotation.draw(d_out, generator, blocked)
        return cls(U, Rotation.draw(len(rescale), generator, blocked), rescale.double())

    def enter(self, W: Tensor) -> Tensor:
        """Weights [d_out, d_in] in the new basis."""
        return self.V.apply(self.U.apply(W.double() * self.rescale).T).T

    def leave(self, W: Tensor) -> Tensor:
        """Inverse of `enter` (Alg. 2)."""
        return self.V.undo(self.U.undo(W).T).T / self.rescale

    def enter_hessian(self, H: Tensor) -> Tensor:
        """H [d_in, d_in] in the new basis, where tr(W H W^T) is what it was."""
        H = H.double() / self.rescale / self.rescale[:, None]
        return self.V.apply(self.V.apply(H).T)


def rescaling(W: Tensor, H: Tensor) -> Tensor:
    """Alg. 1: d_j = (H_jj / (W^T W)_jj)^(1/4), with the largest entry of H as unit; float16 [d_in]."""
    energy = W.double().square().sum(0).clamp(min=1e-8)
    importance = (H.diagonal().double() / H.abs().max().clamp(min=1e-30)).clamp(min=1e-8)
    return (importance / energy).sqrt().sqrt().clamp(2.0**-24, 2.0**15).half()
