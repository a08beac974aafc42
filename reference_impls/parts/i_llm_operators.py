"""The operators of I-LLM on integers (arXiv:2405.17849v2): products, exponential, softmax, SwiGLU and norms.

They take and return dyadic numbers (`i_llm_dyadic`). Their `cfg` is i_llm.Config, or whatever else has nonlinear_bits,
softmax_clip and guard_bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from requant.reference_impls._integer_product import integer_product
from requant.reference_impls.parts import i_llm_dyadic as dyadic
from requant.reference_impls.parts.i_llm_dyadic import Dyadic, align, constant, divide, shift

Scaled = tuple[Tensor, Tensor, Tensor]  # integers [..., n] with m and k [..., 1]: integers * m / 2^k


def di_exp(x: Tensor, m: Tensor, k: Tensor, guard_bits: int) -> Tensor:
    """exp(x m / 2^k) for integers x <= 0, times an unstored constant (Algorithm 1): a power of two times a line.

    exp is 2^(x log2 e), log2 e is 1.4375 by two shifts, and 2^-f between two powers is 1 - f/2.
    """
    log2_e = m + (m >> 1) - (m >> 4)
    steps = divide(1 << (k + guard_bits).clamp(0, 60), log2_e).clamp(
        min=1
    )  # to halve; also what exp(0) gives
    x = -x << guard_bits
    q = torch.div(x, steps, rounding_mode="trunc")  # both are positive
    return (steps - ((x - q * steps + 1) >> 1)) >> q.clamp(max=31)


def di_clipped_softmax(scores: Scaled, valid: Tensor, cfg) -> Tensor:
    """Probabilities times 2^(b-1), int32 [..., n] (Algorithm 2, clipped by Eq. 10); entries that are not valid are 0.

    Scores more than softmax_clip below the largest one are moved up to there, and the rest has 8-bit codes.
    """
    x, m, k = dyadic.narrow(*scores)
    bits, top = cfg.nonlinear_bits, 2**cfg.nonlinear_bits - 1
    hidden = (~valid).to(x.dtype) * (torch.iinfo(x.dtype).min >> 2)
    below = ((x + hidden).amax(-1, keepdim=True) - x).mul_(valid)
    if cfg.softmax_clip is None:
        span = below.amax(-1, keepdim=True).clamp(min=1)
    else:
        span = divide(shift(torch.full_like(k, cfg.softmax_clip), -k.clamp(max=40)), m).clamp(min=1)
    m_level, k_level = dyadic.normalize((span * m << 16) // top, k + 16)
    n = (dyadic.ilog2(span) - 20).clamp(min=0)
    below, span = (shift(t, n).to(torch.int32) for t in (below.minimum(span), span))
    levels = divide(below * top, span)
    e = di_exp(-levels.long(), m_level, k_level, cfg.guard_bits).mul_(valid)
    return divide(e << (bits - 1), e.sum(-1, keepdim=True).clamp(min=1)).to(torch.int32)


def di_swiglu(gate: Dyadic, up: Dyadic, inverse: tuple[Tensor, Tensor], cfg) -> Scaled:
    """x1 sigmoid(x1 / a) x2 (Algorithm 3); `inverse` is 1/a as m, k [d_ff]."""
    x, k = align(gate.centered, *(t[None] for t in inverse), -1)
    k = gate.k + k
    peak = x.amax(-1, keepdim=True).clamp(min=0)
    e, one = (di_exp(t, gate.m, k, cfg.guard_bits) for t in (x - peak, -peak))
    sigmoid = divide(e << (cfg.nonlinear_bits - 1), (e + one).clamp(min=1))
    m, k = dyadic.normalize(gate.m * up.m, gate.k + up.k + cfg.nonlinear_bits - 1)
    return gate.centered * sigmoid * up.centered, m, k


def di_norm(x: Dyadic, gain: tuple[Tensor, Tensor], eps: tuple[Tensor, Tensor]) -> Scaled:
    """x / rms(x) * gain (Algorithm 4): a bitwise square root, and one division an entry."""
    c = x.centered.long()
    mean = divide(c.square().sum(-1, keepdim=True), c.shape[-1])
    down = eps[1] - 2 * x.k  # eps in squared units of x, in two shifts, as one alone might overflow
    mean = mean + shift(
        divide(shift(eps[0], down.clamp(min=-50)), x.m * x.m), (down + 50).clamp(min=-16, max=0)
    )
    fine = ((58 - dyadic.ilog2(mean.clamp(min=1))) // 2).clamp(0, 20)
    root = dyadic.isqrt(mean << 2 * fine).clamp(min=1)
    y, k = align(divide(c << (fine + 14), root), *(t[None] for t in gain), -1)
    return y, torch.ones_like(x.m), k + 14


def about_mean(x: Dyadic) -> Dyadic:
    """x minus the mean of each slice, in units fine enough for a 23-bit mean: what LayerNorm does before `di_norm`."""
    c = x.centered.long()
    n = (22 - dyadic.ilog2(c.abs().amax(-1, keepdim=True).clamp(min=1))).clamp(min=0)
    c = c << n
    c = c - divide(c.sum(-1, keepdim=True), c.shape[-1])
    return Dyadic(c, torch.zeros_like(n), x.m, x.k + n)


@dataclass(frozen=True)
class ChannelGrids:
    """Static codes 0..2^bits-1 of each channel: zero_point, m and k, all int64 [hidden]."""

    zero_point: Tensor
    m: Tensor
    k: Tensor
    bits: int

    @classmethod
    def of(cls, X: Tensor, bits: int) -> ChannelGrids:
        """Those of the ranges of float X [n_tokens, hidden], 0 included; made offline."""
        low, high = X.amin(0).clamp(max=0), X.amax(0).clamp(min=0)
        m, k = constant(((high - low) / (2**bits - 1)).clamp(min=1e-8))
        return cls((-low / torch.ldexp(m.float(), -k.float())).round().long(), m, k, bits)

    def round(self, x: Dyadic) -> Dyadic:
        """x [..., hidden] on these grids, which saturate; as integers of 22 bits with one scale a token."""
        codes = divide(shift(x.centered * x.m, x.k - self.k), self.m) + self.zero_point
        centered = codes.clamp(0, 2**self.bits - 1) - self.zero_point
        y, k = align(centered, self.m, self.k, -1)
        y, m, k = dyadic.narrow(y, torch.ones_like(x.m), k, bits=22)  # so that a sum of squares fits
        return Dyadic(y, torch.zeros_like(k), m, k)


class DINorm(nn.Module):
    """A norm on integers: `di_norm` with the constants of RMSNorm or LayerNorm, input codes of channels if given."""

    def __init__(self, norm: nn.Module, grids: ChannelGrids | None = None):
        """norm: the float RMSNorm or LayerNorm, with its final gain and bias."""
        super().__init__()
        self.gain, self.grids, self.centers = constant(norm.weight, 16), grids, isinstance(norm, nn.LayerNorm)
        bias = getattr(norm, "bias", None)
        self.bias = None if bias is None else constant(bias, 16)
        self.eps = constant(torch.tensor(float(norm.eps if self.centers else norm.variance_epsilon)))

    def forward(self, x: Dyadic) -> Scaled:
        x = x if self.grids is None else self.grids.round(x)
        y, m, k = di_norm(about_mean(x) if self.centers else x, self.gain, self.eps)
        if self.bias is not None:
            y = y + shift(self.bias[0], self.bias[1] - k)  # m is 1
        return y, m, k


class DIMatMul(nn.Module):
    """(X - zp)(W - zp)^T in int32, then the output channels brought to one scale a token (Eqs. 2-8)."""

    def __init__(self, weight: Dyadic, bias: Tensor | None):
        """weight: [d_out, d_in]; bias: float [d_out]."""
        super().__init__()
        self.register_buffer("centered", weight.centered.to(torch.int32))
        self.register_buffer("m", weight.m.T)
        self.register_buffer("k", weight.k.T)
        self.bias = None if bias is None else constant(bias, 16)

    def forward(self, x: Dyadic) -> Scaled:
        y, k = align(integer_product(x.centered, self.centered.T).long(), self.m, self.k, -1)
        k = x.k + k
        if self.bias is not None:
            y = y + divide(shift(self.bias[0], self.bias[1] - k), x.m)
        return y, x.m, k


def rotate(y: Scaled, cos: Tensor, sin: Tensor) -> Scaled:
    """Rotary embedding of integers [..., seqlen, head_dim]; the tables are integers of 14 bits behind the point."""
    x, m, k = dyadic.narrow(*y)
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin, m, k + 14


def rotary_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [batch, seqlen, head_dim] as integers of 14 bits behind the point, with a dimension for heads."""
    return tuple((t.double() * 2**14).round().long()[:, None] for t in (cos, sin))
