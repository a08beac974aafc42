"""Hadamard matrices, constructed rather than tabulated, and the transform they define.

An order n = base * 2^k is built as H_base (x) H_2 (x) ... (x) H_2 (Sylvester), with the smallest base that
one of these constructions reaches:
  Paley I    q + 1 for a prime power q = 3 mod 4: 4, 8, 12, 20, 24, 28, 44, 60, 108, 140, ...
  Paley II   2 (q + 1) for a prime power q = 1 mod 4: 12, 20, 28, 36, 52, 76, 100, 148, ...
  Goethals-Seidel   4 v from four circulant blocks of order v: 156 and 172, which no Paley matrix reaches
"""

from __future__ import annotations

import functools
import math
from itertools import product

import torch
from torch import Tensor

from requant.reference_impls._quant import QuantizationError

_LEAF = 64  # order up to which a product with the dense matrix beats splitting it further
# v -> (multiplier, where each of four blocks is -1). Entries are constant on the orbits of x -> multiplier * x
# mod v, and one representative of each negative orbit is named. The blocks' periodic autocorrelations cancel.
_CIRCULANTS = {
    39: (5, ((2, 4, 6, 12, 14), (0, 1, 2, 3, 4, 7), (0, 1, 6, 12, 14), (0, 1, 2, 4, 6, 7, 12))),
    43: (4, ((1, 2, 7), (2, 6, 7), (1, 3, 7), (0, 2, 3))),
}


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, m) with q = p^m and p prime, or None."""
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    m = round(math.log(q, p)) if q > 1 else 0
    return (p, m) if m and p**m == q else None


def _field(q: int) -> Tensor:
    """The powers 1, x, x^2, ... of a primitive element of GF(q), as digits base p: int64 [q - 1, m]."""
    p, m = _prime_power(q)
    for coefficients in product(range(p), repeat=m):  # x^m = sum of coefficients[i] x^i
        powers = [(1, *[0] * (m - 1))]
        while len(powers) < q:
            *low, top = powers[-1]
            powers.append(tuple((a + top * c) % p for a, c in zip((0, *low), coefficients, strict=True)))
            if powers[-1] == powers[0]:
                break
        if len(powers) == q and powers[-1] == powers[0]:
            return torch.tensor(powers[:-1])
    raise AssertionError(f"GF({q}) has a primitive element")


def _jacobsthal(q: int) -> Tensor:
    """chi(a - b) for all a, b in GF(q) [q, q]: 1 for non-zero squares, -1 for the others, 0 for zero."""
    p, m = _prime_power(q)
    powers, place = _field(q), p ** torch.arange(m)
    chi = torch.zeros(q, dtype=torch.float64)
    chi[powers[0::2] @ place], chi[powers[1::2] @ place] = 1.0, -1.0
    digits = torch.arange(q)[:, None] // place % p  # [q, m]
    return chi[(digits[:, None] - digits[None]) % p @ place]


def _bordered(Q: Tensor, corner: float) -> Tensor:
    """[[0, 1^T], [corner * 1, Q]]: a conference matrix [q + 1, q + 1]."""
    C = torch.zeros(len(Q) + 1, len(Q) + 1, dtype=torch.float64)
    C[0, 1:], C[1:, 0], C[1:, 1:] = 1.0, corner, Q
    return C


def _paley(n: int) -> Tensor | None:
    """Paley's first or second construction of order n, or None where neither applies."""
    if n % 4 == 0 and _prime_power(n - 1):  # q = 3 mod 4, Q is skew
        return torch.eye(n, dtype=torch.float64) + _bordered(_jacobsthal(n - 1), -1.0)
    if n % 4 == 0 and (n // 2 - 1) % 4 == 1 and _prime_power(n // 2 - 1):  # q = 1 mod 4, Q is symmetric
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        C = _bordered(_jacobsthal(n // 2 - 1), 1.0)
        return torch.kron(C, plus) + torch.kron(torch.eye(n // 2, dtype=torch.float64), minus)
    return None


def _goethals_seidel(n: int) -> Tensor | None:
    """Four circulants of order n/4 in the Goethals-Seidel array, or None where no blocks are known here."""
    v = n // 4
    if n % 4 or v not in _CIRCULANTS:
        return None
    multiplier, blocks = _CIRCULANTS[v]
    shift = (torch.arange(v)[None] - torch.arange(v)[:, None]) % v  # circulant[i, j] = row[j - i]
    circulants = []
    for representatives in blocks:
        row = torch.ones(v, dtype=torch.float64)
        row[[r * multiplier**k % v for r in representatives for k in range(v)]] = -1.0
        circulants.append(row[shift])
    A = circulants[0]
    B, C, D = (block.flip(1) for block in circulants[1:])  # times the exchange matrix R
    Bt, Ct, Dt = (block.T.flip(1) for block in circulants[1:])  # transposed, times R
    rows = [[A, B, C, D], [-B, A, Dt, -Ct], [-C, -Dt, A, Bt], [-D, Ct, -Bt, A]]
    return torch.cat([torch.cat(row, 1) for row in rows])


@functools.cache
def _base(n: int) -> Tensor | None:
    """A Hadamard matrix of order n that is no Sylvester doubling, float64 [n, n] of +-1, or None."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    found = _paley(n)
    return _goethals_seidel(n) if found is None else found


@functools.cache
def _split(n: int) -> tuple[int, int]:
    """(base, k) with n = base * 2^k and the smallest base that can be constructed.

    Raises: QuantizationError for an order without a Hadamard matrix, or without one known here.
    """
    if n < 1:
        raise QuantizationError(f"a Hadamard matrix has a positive order, not {n}")
    odd = n // (n & -n)
    if odd == 1:
        return 1, n.bit_length() - 1
    for doublings in range(2, (n & -n).bit_length()):
        base = odd * 2**doublings
        if _base(base) is not None:
            return base, (n // base).bit_length() - 1
    why = "it is not a multiple of 4" if n % 4 else "no construction known here reaches it"
    raise QuantizationError(f"there is no Hadamard matrix of order {n}: {why}")


def has_hadamard(n: int) -> bool:
    """Whether `hadamard_matrix(n)` exists."""
    try:
        _split(n)
    except QuantizationError:
        return False
    return True


@functools.cache
@torch.inference_mode(False)  # kept, and later part of passes that need gradients
def _factors(n: int) -> tuple[Tensor, ...]:
    """Orthonormal float64 factors, each the base or at most _LEAF, whose Kronecker product is hadamard_matrix(n)."""
    base, k = _split(n)
    orders = [base] if base > 1 else []
    n_leaves = -(-k // int(math.log2(_LEAF))) if k else 0
    orders += [2 ** (k // n_leaves + (i < k % n_leaves)) for i in range(n_leaves)]
    return tuple((_base(m) if m == base else _sylvester(m)) / math.sqrt(m) for m in orders)


def _sylvester(n: int) -> Tensor:
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _factors_like(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(F.to(device, dtype) for F in _factors(n))


def hadamard_matrix(n: int) -> Tensor:
    """A Hadamard matrix of order n, normalised: float64 [n, n], entries +-1/sqrt(n), H H^T = I.

    Raises: QuantizationError for an order without a Hadamard matrix, or without one known here.
    """
    return functools.reduce(torch.kron, _factors(n), torch.ones(1, 1, dtype=torch.float64))


def hadamard_transform(x: Tensor, dim: int = -1, inverse: bool = False) -> Tensor:
    """x H along one dimension (x H^T if inverse) with H = hadamard_matrix(x.shape[dim]); a new tensor.

    Costs the sum, not the product, of the factors' orders per element.
    """
    n = x.shape[dim]
    after = math.prod(x.shape[dim % x.ndim + 1 :])
    y, done = x, 1
    for F in _factors_like(n, x.dtype, x.device):
        m, done = len(F), done * len(F)
        rest = n // done * after
        left = F if inverse else F.T
        y = y.reshape(-1, m) @ left.T if rest == 1 else left @ y.reshape(-1, m, rest)
    return y.reshape(x.shape) if n > 1 else x.clone()


def random_hadamard(n: int, generator: torch.Generator) -> Tensor:
    """diag(+-1) H with random signs, float64 [n, n] orthogonal.

    In x Q the signs come first: x H diag(+-1) would only flip channels after mixing, which no symmetric
    quantizer notices.
    """
    signs = torch.randint(0, 2, (n, 1), generator=generator).double() * 2 - 1
    return signs * hadamard_matrix(n)


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """A Haar-distributed orthogonal matrix, float64 [n, n]: QR of a Gaussian matrix with fixed signs."""
    Q, R = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return Q * R.diagonal().sign()
