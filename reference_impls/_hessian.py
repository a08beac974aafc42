"""Second moments of layer inputs, and the Cholesky factors that GPTQ and its relatives need."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from requant.reference_impls._quant import QuantizationError

_LEAF = 192  # columns below which a plain product is as fast as splitting


def gram(X: Tensor) -> Tensor:
    """X^T X for X [n_tokens, d_in], float32 [d_in, d_in]; about half the work of the plain product.

    Splits the columns in two and computes the off-diagonal block once.
    """
    d_in = X.shape[1]
    if d_in <= _LEAF:
        return X.T @ X
    half = d_in // 2
    left, right = X[:, :half], X[:, half:]
    corner = left.T @ right
    return torch.cat([torch.cat([gram(left), corner], 1), torch.cat([corner.T, gram(right)], 1)])


def damped(H: Tensor, damp_ratio: float) -> Tensor:
    """H + damp_ratio * mean(diag H) * I, with zero diagonal entries (dead inputs) set to one first; a new tensor."""
    H = H.clone()
    diagonal = H.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damp_ratio * diagonal.mean()
    return H


def inverse_cholesky(H: Tensor) -> Tensor:
    """Upper-triangular U with H^-1 = U^T U.

    Raises: QuantizationError if H is not positive definite (never a silent fall-back to plain rounding).
    """
    factor, info = torch.linalg.cholesky_ex(H)
    if int(info):
        raise _not_definite(H, int(info))
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if int(info) or not torch.isfinite(upper).all():
        raise QuantizationError(
            "the inverse of the input second-moment matrix is not positive definite; raise damp_ratio"
        )
    return upper


def ldl_upper(H: Tensor) -> tuple[Tensor, Tensor]:
    """A [n, n] strictly upper triangular and D [n] with H = (A + I) diag(D) (A + I)^T (QuIP, Sec. 3).

    Raises: as `inverse_cholesky`.
    """
    factor, info = torch.linalg.cholesky_ex(H.flip(0, 1))
    if int(info):
        raise _not_definite(H, len(H) - int(info))
    upper = factor.flip(0, 1)  # H = upper upper^T
    return (upper / upper.diagonal()).triu(1), upper.diagonal().square()


def _not_definite(H: Tensor, column: int) -> QuantizationError:
    return QuantizationError(
        f"the input second-moment matrix {list(H.shape)} is not positive definite at column {column}; "
        "use more calibration tokens or a larger damp_ratio"
    )


def proxy_loss(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """tr((Q - W) H (Q - W)^T), the layer objective all Hessian-based methods minimise; float64."""
    error = (Q - W).double()
    return float((error @ H.double() * error).sum())


def coordinate_sweep(
    Q: Tensor, W: Tensor, H: Tensor, nearest: Callable[[int, Tensor], Tensor], block_size: int = 128
) -> Tensor:
    """One pass of cyclic coordinate descent over the inputs on tr((Q - W) H (Q - W)^T), which does not rise.

    Args:
        Q: [..., d_out, d_in] float32, the present weights, each among its own allowed values; W: alike, the target.
        H: [..., d_in, d_in] float32 with a positive diagonal.
        nearest: (column j, best values [..., d_out] with the other columns as they are) -> allowed values.
        block_size: columns per lazy batch; the result does not depend on it, up to float error.
    Returns: the new weights [..., d_out, d_in].
    """
    ratio = H / H.diagonal(dim1=-2, dim2=-1)[..., None]  # row j: H_jk / H_jj
    Q = Q.mT.contiguous()  # [..., d_in, d_out]: a column of the weight is a contiguous row here
    E, columns = Q - W.mT, Q.unbind(-2)
    for begin in range(0, H.shape[-1], block_size):
        rows = slice(begin, min(begin + block_size, H.shape[-1]))
        slope = ratio[..., rows, :] @ E  # as of the start of the batch, [..., block, d_out]
        moved = torch.zeros_like(slope)
        inside = ratio[..., rows, rows]
        for i, (steps, moves) in enumerate(zip(slope.unbind(-2), moved.unbind(-2), strict=True)):
            column = columns[begin + i]
            best = column - steps - (inside[..., i : i + 1, :i] @ moved[..., :i, :]).squeeze(-2)
            new = nearest(begin + i, best)
            torch.sub(new, column, out=moves)
            column.copy_(new)
        E[..., rows, :] += moved
    return Q.mT
