"""The operators of a Llama decoder block on integers (I-LLM, arXiv:2405.17849v2), and the block that is made of them.

DI-MatMul, DI-Exp, DI-ClippedSoftmax, DI-SwiGLU and DI-Norm take and return dyadic numbers (`_dyadic`). Their `cfg` is
i_llm.Config, or whatever else has a_bits, kv_bits, nonlinear_bits, residual_bits, softmax_clip, guard_bits and
about_zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls import _dyadic
from requant.reference_impls._dyadic import Dyadic, align, constant, divide, requantize, shift
from requant.reference_impls._quant import QuantizationError
from requant.reference_impls._rotation import Heads
from requant.reference_impls._walk import UnsupportedModelError, decoder_blocks

_BLOCKS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
Scaled = tuple[Tensor, Tensor, Tensor]  # integers [..., n] with m and k [..., 1]: integers * m / 2^k


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for integers, int64; computed in int32 unless that might overflow."""
    largest = int(a.abs().sum(-1).max()) * int(b.abs().max())
    kind = torch.int32 if largest < 2**31 else torch.int64
    return (a.to(kind) @ b.to(kind)).long()


def di_exp(x: Tensor, m: Tensor, k: Tensor, guard_bits: int) -> Tensor:
    """exp(x m / 2^k) for integers x <= 0, times an unstored constant (Algorithm 1): a power of two times a line.

    exp is 2^(x log2 e), log2 e is 1.4375 by two shifts, and 2^-f between two powers is 1 - f/2.
    """
    log2_e = m + (m >> 1) - (m >> 4)
    steps = divide(1 << (k + guard_bits).clamp(0, 60), log2_e).clamp(
        min=1
    )  # to halve; also what exp(0) gives
    x = -x << guard_bits
    q = torch.div(x, steps, rounding_mode="floor")
    return (steps - ((x - q * steps + 1) >> 1)) >> q.clamp(max=31)


def di_clipped_softmax(scores: Scaled, valid: Tensor, cfg) -> Tensor:
    """Probabilities times 2^(b-1), int32 [..., n] (Algorithm 2, clipped by Eq. 10); entries that are not valid are 0.

    Scores more than softmax_clip below the largest one are moved up to there, and the rest has 8-bit codes.
    """
    x, m, k = _dyadic.narrow(*scores)
    bits, top = cfg.nonlinear_bits, 2**cfg.nonlinear_bits - 1
    below = x.masked_fill(~valid, torch.iinfo(x.dtype).min >> 2).amax(-1, keepdim=True) - x
    below = below.masked_fill(~valid, 0)
    if cfg.softmax_clip is None:
        span = below.amax(-1, keepdim=True).clamp(min=1)
    else:
        span = divide(shift(torch.full_like(k, cfg.softmax_clip), -k.clamp(max=40)), m).clamp(min=1)
    m_level, k_level = _dyadic.normalize((span * m << 16) // top, k + 16)
    n = (_dyadic.ilog2(span) - 20).clamp(min=0)
    below, span = (shift(t, n).to(torch.int32) for t in (below.minimum(span), span))
    levels = divide(below * top, span)
    e = di_exp(-levels.long(), m_level, k_level, cfg.guard_bits).masked_fill(~valid, 0)
    return divide(e << (bits - 1), e.sum(-1, keepdim=True).clamp(min=1)).to(torch.int32)


def di_swiglu(gate: Dyadic, up: Dyadic, inverse: tuple[Tensor, Tensor], cfg) -> Scaled:
    """x1 sigmoid(x1 / a) x2 (Algorithm 3); `inverse` is 1/a as m, k [d_ff]."""
    x, k = align(gate.centered, *(t[None] for t in inverse), -1)
    k = gate.k + k
    peak = x.amax(-1, keepdim=True).clamp(min=0)
    e, one = (di_exp(t, gate.m, k, cfg.guard_bits) for t in (x - peak, -peak))
    sigmoid = divide(e << (cfg.nonlinear_bits - 1), (e + one).clamp(min=1))
    m, k = _dyadic.normalize(gate.m * up.m, gate.k + up.k + cfg.nonlinear_bits - 1)
    return gate.centered * sigmoid * up.centered, m, k


def di_norm(x: Dyadic, gain: tuple[Tensor, Tensor], eps: tuple[Tensor, Tensor]) -> Scaled:
    """x / rms(x) * gain (Algorithm 4): a bitwise square root, and one division an entry."""
    c = x.centered.long()
    mean = divide(c.square().sum(-1, keepdim=True), c.shape[-1])
    mean = mean + divide(shift(eps[0], (eps[1] - 2 * x.k).clamp(min=-50)), x.m * x.m)  # in squared units of x
    fine = ((58 - _dyadic.ilog2(mean.clamp(min=1))) // 2).clamp(0, 20)
    root = _dyadic.isqrt(mean << 2 * fine).clamp(min=1)
    y, k = align(divide(c << (fine + 14), root), *(t[None] for t in gain), -1)
    return y, torch.ones_like(x.m), k + 14


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
        y, k = align(_product(x.centered, self.centered.T), self.m, self.k, -1)
        k = x.k + k
        if self.bias is not None:
            y = y + divide(shift(self.bias[0], self.bias[1] - k), x.m)
        return y, x.m, k


def _rotate(y: Scaled, cos: Tensor, sin: Tensor) -> Scaled:
    """Rotary embedding of integers [..., seqlen, head_dim]; the tables are integers of 14 bits behind the point."""
    x, m, k = _dyadic.narrow(*y)
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin, m, k + 14


def require_integer_operators(model: nn.Module) -> None:
    """Raise UnsupportedModelError unless an `IntegerBlock` computes what the blocks of this model do."""
    kind = type(decoder_blocks(model)[0]).__name__
    if kind not in _BLOCKS or getattr(model.config, "hidden_act", None) != "silu":
        raise UnsupportedModelError(
            f"{type(model).__name__}: integer operators are written for {', '.join(_BLOCKS)} with SiLU, not for {kind}"
        )


class IntegerBlock(nn.Module):
    """A Llama decoder block whose operators all run on integers; takes the place of the float block.

    Between blocks the residual stream travels as its codes (`dyadic`, on the tensor that is passed on); the float
    values of that tensor are for what follows the last block.
    """

    def __init__(
        self,
        linears: Mapping[str, DIMatMul],
        gains: tuple[Tensor, Tensor],
        eps: float,
        a: Tensor,
        scaling: float,
        geometry: Heads,
        cfg,
    ):
        """linears by role; gains of both norms [hidden], their eps, a of the SwiGLU [d_ff]; scaling of the scores."""
        super().__init__()
        self.linears, self.geometry, self.cfg = nn.ModuleDict(linears), geometry, cfg
        self.gains, self.inverse = [constant(gain, 16) for gain in gains], constant(1 / a)
        self.eps, self.scaling = constant(torch.tensor(eps)), constant(torch.tensor(scaling))
        self.requantize = partial(requantize, about_zero=cfg.about_zero)

    def _head(self, name: str, n: int, h: Dyadic, tables: tuple[Tensor, ...], bits: int) -> Dyadic:
        x, m, k = self.linears[name](h)
        y = x.unflatten(-1, (n, -1)).transpose(1, 2), m[:, None], k[:, None]  # [batch, n, seqlen, head_dim]
        y = self.requantize(*(_rotate(y, *tables) if tables else y), bits)
        groups = self.geometry.n_heads // n
        return Dyadic(*(t.repeat_interleave(groups, 1) for t in (y.codes, y.zero_point, y.m, y.k)))

    def _attend(self, h: Dyadic, tables: tuple[Tensor, ...], valid: Tensor) -> Dyadic:
        n, n_kv, cfg = self.geometry.n_heads, self.geometry.n_kv_heads, self.cfg
        q = self._head("q", n, h, tables, cfg.a_bits)
        k = self._head("k", n_kv, h, tables, cfg.kv_bits)
        v = self._head("v", n_kv, h, (), cfg.kv_bits)
        scores, k_keys = align(
            _product(q.centered, k.centered.mT), k.m.mT, k.k.mT, -1
        )  # [batch, n, seqlen, seqlen]
        scale = _dyadic.normalize(q.m * self.scaling[0], q.k + k_keys + self.scaling[1])
        weights = di_clipped_softmax((scores, *scale), valid, cfg)
        # one scale for all tokens of a head, since it is them that are summed over
        values, coarsest = align(v.centered << 4, v.m, v.k, -2, coarse=True)
        mixed, k = align(
            _product(weights, values), torch.ones_like(coarsest), coarsest + 4 + cfg.nonlinear_bits - 1, 1
        )
        return self.requantize(mixed.transpose(1, 2).flatten(2), torch.ones_like(h.m), k[:, 0], cfg.a_bits)

    def run(self, x: Dyadic, tables: tuple[Tensor, Tensor], valid: Tensor) -> Dyadic:
        """The block on the codes of the residual stream: integers in, integers out.

        Args:
            x: [batch, seqlen, hidden]; tables: cos and sin times 2^14, int64 [batch, 1, seqlen, head_dim].
            valid: bool, broadcasts against [batch, heads, seqlen, seqlen]; True where a query sees a key.
        """
        h = self._norm(x, 0)
        x = self._add(x, self.linears["o"](self._attend(h, tables, valid)))
        h = self._norm(x, 1)
        gate, up = (
            self.requantize(*self.linears[name](h), self.cfg.nonlinear_bits) for name in ("gate", "up")
        )
        h = self.requantize(*di_swiglu(gate, up, self.inverse, self.cfg), self.cfg.a_bits)
        return self._add(x, self.linears["down"](h))

    def _norm(self, x: Dyadic, which: int) -> Dyadic:
        return self.requantize(*di_norm(x, self.gains[which], self.eps), self.cfg.a_bits)

    def _add(self, x: Dyadic, y: Scaled) -> Dyadic:
        return self.requantize(*_dyadic.add((x.centered, x.m, x.k), y), self.cfg.residual_bits)

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        position_ids: Tensor | None = None,
        **_unused,
    ) -> Tensor:
        if position_ids is not None and int(position_ids[0, 0]) != 0:
            raise QuantizationError("integer blocks keep no cache; pass the whole text and use_cache=False")
        x = getattr(hidden_states, "dyadic", None)
        if x is None:  # the first block: where integers begin
            x = _dyadic.from_float(hidden_states, self.cfg.residual_bits)
        n = hidden_states.shape[1]
        valid = attention_mask
        if valid is None:
            valid = torch.ones(n, n, dtype=torch.bool, device=hidden_states.device).tril()
        if valid.dtype != torch.bool:
            valid = valid >= 0  # additive mask
        output = self.run(x, rotary_tables(*position_embeddings), valid)
        y = output.to_float(hidden_states.dtype)
        y.dyadic = output
        return y


def rotary_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [batch, seqlen, head_dim] as integers of 14 bits behind the point, with a dimension for heads."""
    return tuple((t.double() * 2**14).round().long()[:, None] for t in (cos, sin))
