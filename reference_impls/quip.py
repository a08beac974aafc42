"""QuIP: rotate a weight matrix on both sides until it is incoherent, then round it with error feedback.

Paper     Chee et al., NeurIPS 2023, arXiv:2307.13304v2 (numbers below refer to v2)   Entry  papers/quip.yaml
Scope     weights of nn.Linear in decoder blocks, each matrix on its own; activations, embeddings and lm_head
          untouched
Deviates  float64 inside a layer, where the official code casts weights to float16 between steps; d_j and the
          scale are rounded to float16, the precision they are stored in, before any code is chosen; damping is
          the official code's two steps (Alg. 1 has one, before the rescaling); greedy passes clamp each code as
          it is chosen, where the official code clamps after a pass and keeps the error from before; H is summed
          in float32 and divided by tokens, not sequences (the scale cancels); the ADMM variant is left out
Size      longer than most: three roundings, two processings and the theorems are checked here
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant
from requant.reference_impls._hessian import damped
from requant.reference_impls._quant import QuantizationError
from requant.reference_impls._walk import copy_model, named_linears, walk_blocks

# Relative error left at any width: the grid ends at 2.4 root mean squares, and what it clips (about 0.3 % of
# a Gaussian's energy) is not fed back, in the paper's Alg. 1 as in the official code.
ERROR_FLOOR = 5e-3


@dataclass(frozen=True)
class Config:
    """Defaults: the 2-bit QuIP rows, LDLQ with incoherence processing."""

    w_bits: int = 2  # the headline setting; also 3 and 4
    incoherence: bool = True  # Sec. 4; False = "baseline processing": min-max grid per row, damping only
    rounding: str = "ldlq"  # Alg. 3; "nearest" = no feedback; "greedy" = greedy passes alone (code: allbal)
    blocked: bool = False  # official code: own rotations for every row and column, not two shared factors
    last_to_first: bool = False  # official code: columns from last to first; Alg. 3 goes first to last
    act_order: bool = False  # LDLQ-RG: columns in the order of falling diag(H)
    greedy_passes: int = 0  # LDLQ-RG: coordinate descent after LDLQ; official command line 0, its functions 9
    stochastic: bool = False  # unbiased rounding, Theorem 1; worse in perplexity than nearest
    rho: float = 2.4  # Alg. 1: half-width of the grid, in root mean squares of the rotated weights
    damp_ratio: float = 0.01  # Alg. 1, after OPTQ: fraction of mean(diag H)
    pre_damp_ratio: float = (
        0.01  # official code only: added to diag(H), H scaled to trace d_in, before the rotation
    )
    seed: int = 0  # of U, V and of stochastic rounding


# --- random orthogonal matrices (Sec. 4) --------------------------------------------------------------------


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


# --- incoherence processing (Alg. 1 and 2) ------------------------------------------------------------------


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


# --- rounding (Alg. 3) --------------------------------------------------------------------------------------


def ldl_upper(H: Tensor) -> tuple[Tensor, Tensor]:
    """A [n, n] strictly upper triangular and D [n] with H = (A + I) diag(D) (A + I)^T (Sec. 3).

    Raises: QuantizationError if H is not positive definite (never a silent fall-back to plain rounding).
    """
    factor, info = torch.linalg.cholesky_ex(H.flip(0, 1))
    if int(info):
        raise QuantizationError(
            f"the input second-moment matrix {list(H.shape)} is not positive definite at column "
            f"{len(H) - int(info)}; use more calibration tokens or a larger damp_ratio"
        )
    upper = factor.flip(0, 1)  # H = upper upper^T
    return (upper / upper.diagonal()).triu(1), upper.diagonal().square()


def round_codes(x: Tensor, top: int | None, generator: torch.Generator | None = None) -> Tensor:
    """Nearest integers, or with a generator stochastic ones; limited to 0..top unless top is None."""
    shift = 0.5 if generator is None else torch.rand(x.shape, generator=generator, dtype=x.dtype)
    codes = (x + shift).floor_()
    return codes if top is None else codes.clamp_(0, top)


def ldlq(
    z: Tensor, H: Tensor, top: int | None, generator: torch.Generator | None = None, block_size: int = 128
) -> Tensor:
    """Alg. 3: z'_k = clamp(round(z_k + (z - z')_{<k} A_{<k,k})), first column to last, in lazy batches.

    Args:
        z: [d_in, d_out] weights in units of the grid, transposed: a column of the layer is a row here.
        H: [d_in, d_in], positive definite, same dtype.
        top: largest code; None for the unbounded grid of Theorem 1.
        generator: if given, round stochastically.
        block_size: columns per lazy batch; changes nothing but the speed.
    Returns: integer-valued codes [d_in, d_out].
    """
    A, _ = ldl_upper(H)
    target, codes, error = z.clone(), torch.empty_like(z), torch.empty_like(z)
    for begin in range(0, len(z), block_size):
        end = min(begin + block_size, len(z))
        target[begin:end].addmm_(A[:begin, begin:end].T, error[:begin])
        for k in range(begin, end):
            codes[k] = round_codes(target[k], top, generator)
            torch.sub(z[k], codes[k], out=error[k])
            target[k + 1 : end].addr_(A[k, k + 1 : end], error[k])
    return codes


def greedy_pass(z: Tensor, codes: Tensor, H: Tensor, top: int | None, block_size: int = 128) -> Tensor:
    """One pass of coordinate descent: each column in turn to its best code, given all the others.

    Shapes as in `ldlq`; a new tensor. The proxy loss never rises, with or without a largest code.
    """
    codes, gradient = codes.clone(), H @ (codes - z)
    for begin in range(0, len(z), block_size):
        end = min(begin + block_size, len(z))
        moved = torch.empty_like(z[begin:end])
        for k in range(begin, end):
            best = round_codes(codes[k] - gradient[k] / H[k, k], top)
            torch.sub(best, codes[k], out=moved[k - begin])
            codes[k] = best
            gradient[k + 1 : end].addr_(H[k + 1 : end, k], moved[k - begin])
        gradient[end:].addmm_(H[end:, begin:end], moved)
    return codes


def round_weights(Z: Tensor, H: Tensor, cfg: Config, generator: torch.Generator) -> Tensor:
    """Codes 0..2^w_bits-1, float64 [d_out, d_in], for weights Z [d_out, d_in] in units of the grid."""
    top, order = 2**cfg.w_bits - 1, torch.arange(len(H))
    if cfg.act_order or cfg.rounding == "greedy":
        order = H.diagonal().argsort(descending=True)
    elif cfg.last_to_first:
        order = order.flip(0)
    z, H = Z.T[order].contiguous(), H[order][:, order]
    draw = generator if cfg.stochastic else None
    if cfg.rounding == "ldlq":
        codes = ldlq(z, H, top, draw)
    else:
        codes = round_codes(z, top, draw) if cfg.rounding == "nearest" else z
    for _ in range(cfg.greedy_passes):
        before, codes = codes, greedy_pass(z, codes, H, top)
        if torch.equal(before, codes):
            break
    return codes[order.argsort()].T


def _check(cfg: Config) -> None:
    if cfg.rounding not in ("ldlq", "nearest", "greedy"):
        raise ValueError(f"rounding must be 'ldlq', 'nearest' or 'greedy', got {cfg.rounding!r}")
    if cfg.rounding == "greedy" and cfg.greedy_passes < 1:
        raise ValueError(f"rounding 'greedy' needs greedy_passes of 1 or more, got {cfg.greedy_passes}")
    if cfg.stochastic and (cfg.greedy_passes or cfg.rounding == "greedy"):
        raise ValueError("greedy passes undo stochastic rounding; set greedy_passes=0 or stochastic=False")


# --- one layer, one model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounded:
    """What one layer is stored as, codes [d_out, d_in] not yet packed.

    With incoherence processing: scale [1], rescale [d_in] float16, and the seed of U and V; without it: scale
    and zero_point [d_out, 1].
    """

    codes: Tensor
    scale: Tensor
    rescale: Tensor | None = None
    seed: int | None = None
    zero_point: Tensor | None = None

    def dequantize(self, cfg: Config) -> Tensor:
        """The weight, float32 [d_out, d_in] (Alg. 2)."""
        if self.rescale is None:
            return _quant.dequantize(self.codes.float(), self.scale, self.zero_point)
        generator = torch.Generator().manual_seed(self.seed)
        basis = Basis.draw(self.rescale, len(self.codes), generator, cfg.blocked)
        unit = 2 * self.codes.double() / (2**cfg.w_bits - 1) - 1  # -1..1
        return basis.leave(self.scale.double() * unit).float().contiguous()


def round_layer(W: Tensor, H: Tensor, cfg: Config) -> Rounded:
    """QuIP on one layer (Alg. 1 and 3).

    Args:
        W: [d_out, d_in] float32; left unchanged.
        H: [d_in, d_in] float32, proportional to X^T X over calibration tokens; left unchanged.
    Raises: ValueError for options that exclude each other; QuantizationError if H + damping is not positive
        definite.
    """
    _check(cfg)
    generator, top = torch.Generator().manual_seed(cfg.seed), 2**cfg.w_bits - 1
    if not cfg.incoherence:
        scale, zero_point = _quant.choose_qparams(W, cfg.w_bits)
        alive = W.double() * (H.diagonal() != 0)
        Z = (alive / scale + zero_point).clamp(0, top)
        codes = round_weights(Z, damped(H.double(), cfg.damp_ratio), cfg, generator)
        return Rounded(codes, scale, zero_point=zero_point)
    rescale = rescaling(W, H)
    basis = Basis.draw(rescale, len(W), generator, cfg.blocked)
    rotated, H = basis.enter(W), basis.enter_hessian(H)
    H = H * (len(H) / H.trace().clamp(min=1e-30))
    H.diagonal().add_(cfg.pre_damp_ratio)  # I is the same in every basis
    scale = _quant.stored_scale(cfg.rho * rotated.square().mean().sqrt().reshape(1), cfg.w_bits)
    Z = ((rotated / scale + 1) / 2 * top).clamp(0, top)  # what is clipped here is not fed back
    return Rounded(round_weights(Z, damped(H, cfg.damp_ratio), cfg, generator), scale, rescale, cfg.seed)


def quantize_weight(W: Tensor, H: Tensor, cfg: Config) -> Tensor:
    """`round_layer`, dequantized: float32 [d_out, d_in]."""
    return round_layer(W, H, cfg).dequantize(cfg)


@torch.no_grad()
def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Quantize the decoder blocks first to last, each on the outputs of the quantized blocks before it.

    All linears of a block are measured before any is changed, and each draws its own U and V.
    """
    _check(cfg)
    model, n_done = copy_model(model), 0
    for block in walk_blocks(model, calib):
        hessians = block.hessians()
        for name, linear in named_linears(block.module).items():
            if name not in hessians:
                raise QuantizationError(f"no token of calib reached {block.name}.{name}; use more samples")
            layer = replace(cfg, seed=cfg.seed * 2**16 + n_done)
            linear.weight.copy_(quantize_weight(linear.weight.float(), hessians[name], layer))
            n_done += 1
    return model


def pack_weight(W: Tensor, H: Tensor, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer; of U and V only the seed they are drawn from."""
    rounded = round_layer(W, H, cfg)
    if rounded.rescale is None:
        grid = rounded.scale[..., None], rounded.zero_point[..., None]
        return _quant.pack_affine(rounded.codes[:, None], *grid, cfg.w_bits, symmetric=False)
    return {
        "shape": torch.tensor(W.shape, dtype=torch.int32),
        "codes": _quant.pack_bits(rounded.codes, cfg.w_bits),
        "scale": rounded.scale.half() if cfg.w_bits <= 8 else rounded.scale.float(),
        "rescale": rounded.rescale,
        "seed": torch.tensor([rounded.seed]),
    }


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    if "seed" not in packed:
        return _quant.unpack_affine(packed, cfg.w_bits, symmetric=False)
    codes = _quant.unpack_bits(packed["codes"], cfg.w_bits, tuple(packed["shape"].tolist()))
    return Rounded(codes, packed["scale"], packed["rescale"], int(packed["seed"])).dequantize(cfg)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + 16/d_out for the d_j, a 16-bit scale and a 64-bit seed; b + (16 + b)/d_in without incoherence."""
    if not cfg.incoherence:
        return _quant.affine_bits(cfg.w_bits, None, d_in, symmetric=False)
    code_bits, scale_bits = 8 * math.ceil(d_out * d_in * cfg.w_bits / 8), 16 if cfg.w_bits <= 8 else 32
    return (code_bits + 16 * d_in + scale_bits + 64) / (d_out * d_in)
