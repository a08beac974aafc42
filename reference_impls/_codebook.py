"""Scalar codes with one free codebook per output channel: where to start, the best codebook, better codes, storage.

What SqueezeLLM, GPTVQ in one dimension and LNQ share. The objective is the sum over channels of
(q - w)^T H_k (q - w), with one H [d_in, d_in] for each of g contiguous groups of output channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from requant.reference_impls._hessian import coordinate_sweep
from requant.reference_impls._kmeans import weighted_kmeans
from requant.reference_impls._quant import QuantizationError, pack_bits, unpack_bits

_ROWS = 256  # output channels of one codebook step


@dataclass(frozen=True)
class Coded:
    """codes [d_out, d_in] int64 into codebook [d_out, 2^b] float32; history: the objective after each half-step."""

    codes: Tensor
    codebook: Tensor
    history: tuple[float, ...] = ()

    @property
    def weight(self) -> Tensor:
        """The weight with the codebook as it is: float32 [d_out, d_in]."""
        return self.codebook.gather(1, self.codes)

    def dequantize(self) -> Tensor:
        """The weight with the codebook as stored, in float16: float32 [d_out, d_in]."""
        return self.codebook.half().float().gather(1, self.codes)

    def pack(self, bits: int) -> dict[str, Tensor]:
        """The tensors stored: shape (int32 [2], not counted), packed codes, codebook (float16)."""
        shape = torch.tensor(self.codes.shape, dtype=torch.int32)
        return {"shape": shape, "codes": pack_bits(self.codes, bits), "codebook": self.codebook.half()}


def unpack(packed: dict[str, Tensor], bits: int) -> Tensor:
    """Inverse of `Coded.pack`: the dequantized weight, float32 [d_out, d_in]."""
    codes = unpack_bits(packed["codes"], bits, tuple(packed["shape"].tolist()))
    return Coded(codes, packed["codebook"].float()).dequantize()


def objective(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """Sum over output channels of (q - w)^T H_k (q - w), H [g, d_in, d_in]; float64."""
    E = (Q - W).double().unflatten(0, (len(H), -1))
    return float((E @ H.double() * E).sum())


def made_definite(H: Tensor) -> Tensor:
    """H [g, d_in, d_in], each with 0, 1e-5, 1e-4, ... of its mean diagonal added until it is positive definite."""
    found = []
    for one in H:
        steps = [0.0, *(10.0**power for power in range(-5, 1))]
        damped = (one + step * one.diagonal().mean() * torch.eye(len(one)) for step in steps)
        good = next((h for h in damped if not int(torch.linalg.cholesky_ex(h).info)), None)
        if good is None:
            raise QuantizationError(
                "a Hessian is not positive definite even when damped; does it hold inf or nan?"
            )
        found.append(good)
    return torch.stack(found)


def _boundaries(levels: Tensor) -> Tensor:
    """Half-way between ascending levels [..., m]: [..., m - 1]. As many as lie below x is the index of its level."""
    return (levels[..., 1:] + levels[..., :-1]) / 2


def kmeans(W: Tensor, weights: Tensor, bits: int, max_iterations: int, seed: int) -> Coded:
    """Weighted k-means over the weights of each output channel, from k-means++ (SqueezeLLM).

    Args:
        weights: [d_out, d_in], not negative; channels that have only zeros are weighted equally.
    """
    weights = weights / weights.mean(1, keepdim=True)
    weights = torch.where(weights.isfinite(), weights, 1.0)
    generator = torch.Generator().manual_seed(seed)
    centroids, _ = weighted_kmeans(W[:, None], weights, 2**bits, max_iterations, generator)
    levels = centroids[..., 0].sort(1).values
    return Coded(torch.searchsorted(_boundaries(levels), W.contiguous()), levels)


def fit_codebook(W: Tensor, H: Tensor, coded: Coded, ridge: float) -> Coded:
    """The same codes with argmin_c (P c - w)^T H (P c - w) + ridge |c|^2 for every channel, P its codes one-hot."""
    m, H, found = coded.codebook.shape[1], H.double(), []
    for w, codes, h in zip(*(x.unflatten(0, (len(H), -1)) for x in (W, coded.codes)), H, strict=True):
        for some, index in zip(w.double().split(_ROWS), codes.split(_ROWS), strict=True):
            P = functional.one_hot(index, m).double()  # [rows, d_in, m]
            HP = (h @ P.transpose(0, 1).flatten(1)).unflatten(1, (-1, m)).transpose(0, 1)  # [rows, d_in, m]
            A = P.mT @ HP + ridge * torch.eye(m, dtype=P.dtype)
            found.append(torch.linalg.solve(A, (HP.mT @ some[..., None])[..., 0]))
    return Coded(coded.codes, torch.cat(found).float())


def descend_codes(W: Tensor, H: Tensor, coded: Coded, cycles: int) -> Coded:
    """Cycles of coordinate descent on the codes, the values of the codebook held fixed (and put in order)."""
    by_group = (len(H), -1)
    levels = coded.codebook.sort(1).values.unflatten(0, by_group)  # [g, rows, m]
    codes = torch.empty_like(coded.codes).unflatten(0, by_group)  # all are set in the first cycle
    Q, boundaries = coded.weight.unflatten(0, by_group), _boundaries(levels)

    def nearest(j: int, best: Tensor) -> Tensor:
        index = torch.searchsorted(boundaries, best[..., None].contiguous())
        codes[..., j : j + 1] = index
        return levels.gather(-1, index)[..., 0]

    for _ in range(cycles):
        Q = coordinate_sweep(Q, W.unflatten(0, by_group), H, nearest)
    return Coded(codes.flatten(0, 1), levels.flatten(0, 1)) if cycles else coded
