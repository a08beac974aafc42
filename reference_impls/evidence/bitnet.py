"""Evidence on BitNet: the binarized layer against its equations, its gradient and groups, the energy of its products.

Entry     papers/bitnet.yaml
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from requant.reference_impls.bitnet import Config, quantize_weight
from requant.reference_impls.parts.bitnet_linear import BitLinear, binarize, fake_quant, normalize, restore

_LAYER = "model.layers.1.mlp.up_proj"


def _bit_linear(W: Tensor, **options) -> BitLinear:
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
    linear.weight.data = W.clone()
    options = {"norm": True, **options}
    return BitLinear(linear, Config(n_groups=options.pop("n_groups", 1)), **options).eval()


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def two_values_and_zero_is_negative(ctx) -> float:
    """Largest | |Q| / mean|W| - 1 |, plus the number of values beyond two; weights at the mean must give -beta."""
    W, _, _ = ctx.layer(_LAYER)
    with_zeros = torch.tensor([[1.0, -1.0, 0.0, 0.0]])
    zeros = quantize_weight(with_zeros, None, Config()) - torch.tensor([[0.5, -0.5, -0.5, -0.5]])
    errors = [float(zeros.abs().max())]
    for matrix in (W, W + 0.01, with_zeros):
        Q = quantize_weight(matrix, None, Config())
        errors.append(float((Q.abs() / matrix.abs().mean() - 1).abs().max()) + len(Q.unique()) - 2)
    return max(errors)


def beta_is_the_best_scale(ctx) -> float:
    """Squared error of beta * Sign(W) over the least among 401 scales around it, for W with mean zero (Sec. 2.1)."""
    W = ctx.layer(_LAYER)[0].double()
    W = W - W.mean()
    positive, beta = binarize(W)
    signs = restore(positive, torch.ones_like(beta), 0)
    errors = [float((factor * beta * signs - W).square().sum()) for factor in torch.linspace(0.5, 1.5, 401)]
    return float((beta * signs - W).square().sum()) / min(errors)


@torch.no_grad()
def input_scale_and_shift_cancel(ctx) -> float:
    """Relative change of y when x becomes 0.3 x or 3.7 x + 2, with one range a tensor and with one a token (Eq. 11)."""
    W, _, X = ctx.layer(_LAYER)
    changes = []
    for bit in (_bit_linear(W), _bit_linear(W).train()):
        changes += [_relative(bit(moved), bit(X)) for moved in (0.3 * X, 3.7 * X + 2.0)]
    return max(changes)


@torch.no_grad()
def weight_scale_is_output_scale(ctx) -> float:
    """Relative distance of y(5 W) from 5 y(W), and share of signs that change when a constant is added to W.

    1.0 if that constant leaves beta as it was.
    """
    W, _, X = (t.double() for t in ctx.layer(_LAYER))
    moved = [binarize(W), binarize(W + 0.05)]
    changed = float((moved[0][0] != moved[1][0]).double().mean())
    same_beta = float(torch.equal(moved[0][1], moved[1][1]))
    return max(_relative(_bit_linear(5 * W)(X), 5 * _bit_linear(W)(X)), changed, same_beta)


def activation_error_in_half_steps(ctx) -> float:
    """Largest rounding error over what is allowed: gamma/(2 Qb), or gamma/Qb where the largest integer is clamped."""
    x = normalize(ctx.layer(_LAYER)[2].double())
    worst = 0.0
    for bits in (4, 8):
        for shift in (False, True):
            low = x.amin(-1, keepdim=True) if shift else 0.0
            step = ((x - low).abs().amax(-1, keepdim=True)) / 2 ** (bits - 1)
            error = (fake_quant(x, bits, per_tensor=False, shift=shift) - x).abs() / step
            allowed = torch.where((x - low) / step > 2 ** (bits - 1) - 0.5, 1.0, 0.5)
            worst = max(worst, float((error / allowed).max()))
    return worst


@torch.enable_grad()
def gradient_is_a_plain_linear_s(ctx) -> float:
    """Relative distance of the gradients of W and x from those of F.linear at the quantized values (Sec. 2.2)."""
    W, _, X = ctx.layer(_LAYER)
    direction = torch.randn(len(X), len(W), generator=torch.Generator().manual_seed(ctx.seed))
    bit, x = _bit_linear(W, norm=False).train(), X.clone().requires_grad_()
    bit(x).backward(direction)
    plain_x = fake_quant(X, 8, per_tensor=True).requires_grad_()
    plain_W = quantize_weight(W, None, Config()).requires_grad_()
    F.linear(plain_x, plain_W).backward(direction)
    return max(_relative(bit.weight.grad, plain_W.grad), _relative(x.grad, plain_x.grad))


@torch.no_grad()
def groups_need_no_communication(ctx) -> float:
    """Relative distance of a layer split in 4 groups from 4 layers that know only their part (Eq. 13 to 15)."""
    W, _, X = ctx.layer(_LAYER)
    by_rows = torch.cat([_bit_linear(part)(X) for part in W.chunk(4)], 1)
    by_inputs = sum(_bit_linear(part)(x) for part, x in zip(W.chunk(4, 1), X.chunk(4, 1), strict=True))
    whole = (_bit_linear(W, n_groups=4)(X), _bit_linear(W, n_groups=4, split_inputs=True)(X))
    return max(_relative(whole[0], by_rows), _relative(whole[1], by_inputs))


@torch.no_grad()
def output_variance_in_octaves(ctx) -> float:
    """Largest |log2 Var(y)| with new Gaussian weights of variance 1/d_in, for inputs of very different size (Eq. 10).

    mean|W| of Gaussian weights is 0.80 standard deviations, so 0.65 octaves below 1 is what theory says.
    """
    generator, found = torch.Generator().manual_seed(ctx.seed), []
    for name in (_LAYER, "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"):
        X = ctx.layer(name)[2]
        W = torch.randn(512, X.shape[1], generator=generator) / X.shape[1] ** 0.5
        found += [float(_bit_linear(W)(scale * X).var().log2().abs()) for scale in (1.0, 100.0)]
    return max(found)


_PICOJOULES = {
    "fp32": (0.38, 1.31),
    "fp16": (0.16, 0.34),
    "int8": (0.007, 0.07),
}  # Table 2, 7nm: one ADD, one MUL
_TABLE_1 = {  # size: (hidden, layers, heads), then MUL and ADD in J for fp32, fp16, BitNet
    "6.7B": ((4096, 32, 32), (4.41, 1.28), (1.14, 0.54), (0.02, 0.04)),
    "13B": ((5120, 40, 40), (8.58, 2.49), (2.23, 1.05), (0.04, 0.06)),
    "30B": ((7168, 48, 56), (20.09, 5.83), (5.21, 2.45), (0.06, 0.14)),
}


def matmul_energy(m: int, n: int, p: int, add: str, mul: str, *, binary: bool = False) -> Tensor:
    """Joules of the multiplications and of the additions in (m x n)(n x p), Eq. 16 to 18; add, mul name formats."""
    muls, adds = m * p + m * n if binary else m * n * p, m * (n - 1) * p
    return torch.tensor([muls * _PICOJOULES[mul][1], adds * _PICOJOULES[add][0]], dtype=torch.float64) * 1e-12


def _decoder_energy(sizes: tuple[int, int, int], kind: str, tokens: int = 512) -> Tensor:
    """MUL and ADD of all matrix products of a decoder; BitNet's attention products are those of fp16."""
    hidden, layers, heads = sizes
    binary, high = kind == "bitnet", "fp16" if kind == "bitnet" else kind
    shapes = 4 * [(hidden, hidden)] + [(hidden, 4 * hidden), (4 * hidden, hidden)]
    linears = sum(
        matmul_energy(tokens, n, p, "int8" if binary else kind, high, binary=binary) for n, p in shapes
    )
    inner = ((hidden // heads, tokens), (tokens, hidden // heads))
    return layers * (linears + heads * sum(matmul_energy(tokens, n, p, high, high) for n, p in inner))


def energy_differs_from_table(_ctx) -> float:
    """Largest distance in joules between Eq. 16 to 18 and the 18 energies of Table 1, which has two decimals."""
    distances = [
        (_decoder_energy(sizes, kind) - torch.tensor(printed)).abs().max()
        for sizes, *rows in _TABLE_1.values()
        for kind, printed in zip(("fp32", "fp16", "bitnet"), rows, strict=True)
    ]
    return float(max(distances))
