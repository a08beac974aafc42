"""The decoder block of Llama and its like, or of OPT, made of integer operators (I-LLM, arXiv:2405.17849v2).

`cfg` is i_llm.Config, or whatever else has a_bits, kv_bits, nonlinear_bits, residual_bits, softmax_clip, guard_bits and
about_zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls._anatomy import Heads, block_anatomies, require_pre_norm
from requant.reference_impls._integer_product import integer_product
from requant.reference_impls._quant import QuantizationError
from requant.reference_impls._walk import UnsupportedModelError, decoder_blocks
from requant.reference_impls.parts import i_llm_dyadic as dyadic
from requant.reference_impls.parts.i_llm_dyadic import Dyadic, align, constant, requantize
from requant.reference_impls.parts.i_llm_operators import (
    DIMatMul,
    DINorm,
    Scaled,
    di_clipped_softmax,
    di_swiglu,
    rotary_tables,
    rotate,
)

_BLOCKS = {
    "LlamaDecoderLayer": "silu",
    "MistralDecoderLayer": "silu",
    "Qwen2DecoderLayer": "silu",
    "OPTDecoderLayer": "relu",
}


def require_integer_operators(model: nn.Module) -> None:
    """Raise UnsupportedModelError unless an `IntegerBlock` computes what the blocks of this model do."""
    kind = type(decoder_blocks(model)[0]).__name__
    act = getattr(model.config, "hidden_act", getattr(model.config, "activation_function", None))
    if _BLOCKS.get(kind) != act or act is None:
        known = ", ".join(f"{name} with {needed}" for name, needed in _BLOCKS.items())
        raise UnsupportedModelError(
            f"{type(model).__name__}: integer operators are written for {known}, not for {kind} with {act}"
        )
    require_pre_norm(model)
    if any(norm.weight is None for parts in block_anatomies(model) for norm, _ in parts.norm_groups):
        raise UnsupportedModelError(
            f"{type(model).__name__}: this model's norms have no gain to fold factors into"
        )


class IntegerBlock(nn.Module):
    """A decoder block whose operators all run on integers; takes the place of the float block.

    Between blocks the residual stream travels as its codes (`dyadic`, on the tensor that is passed on); the float
    values of that tensor are for what follows the last block.
    """

    def __init__(
        self,
        linears: Mapping[str, DIMatMul],
        norms: Sequence[DINorm],
        a: Tensor | None,
        scaling: float,
        geometry: Heads,
        cfg,
    ):
        """linears by role; norms of attention and MLP; a of the SwiGLU [d_ff], None = ReLU; scaling of the scores."""
        super().__init__()
        self.linears, self.norms = nn.ModuleDict(linears), nn.ModuleList(norms)
        self.geometry, self.cfg, self.scaling = geometry, cfg, constant(torch.tensor(scaling))
        self.inverse = None if a is None else constant(1 / a)
        self.requantize = partial(requantize, about_zero=cfg.about_zero)

    def _head(self, name: str, n: int, h: Dyadic, tables: tuple[Tensor, ...], bits: int) -> Dyadic:
        x, m, k = self.linears[name](h)
        y = x.unflatten(-1, (n, -1)).transpose(1, 2), m[:, None], k[:, None]  # [batch, n, seqlen, head_dim]
        y = self.requantize(*(rotate(y, *tables) if tables else y), bits)
        groups = self.geometry.n_heads // n
        return Dyadic(*(t.repeat_interleave(groups, 1) for t in (y.codes, y.zero_point, y.m, y.k)))

    def _attend(self, h: Dyadic, tables: tuple[Tensor, ...], valid: Tensor) -> Dyadic:
        n, n_kv, cfg = self.geometry.n_heads, self.geometry.n_kv_heads, self.cfg
        q = self._head("q", n, h, tables, cfg.a_bits)
        k = self._head("k", n_kv, h, tables, cfg.kv_bits)
        v = self._head("v", n_kv, h, (), cfg.kv_bits)
        scores, k_keys = align(
            integer_product(q.centered, k.centered.mT).long(), k.m.mT, k.k.mT, -1
        )  # [batch, n, seqlen, seqlen]
        scale = dyadic.normalize(q.m * self.scaling[0], q.k + k_keys + self.scaling[1])
        weights = di_clipped_softmax((scores, *scale), valid, cfg)
        # one scale for all tokens of a head, since it is them that are summed over
        values, coarsest = align(v.centered << 4, v.m, v.k, -2, coarse=True)
        mixed, k = align(
            integer_product(weights, values).long(),
            torch.ones_like(coarsest),
            coarsest + 4 + cfg.nonlinear_bits - 1,
            1,
        )
        return self.requantize(mixed.transpose(1, 2).flatten(2), torch.ones_like(h.m), k[:, 0], cfg.a_bits)

    def run(self, x: Dyadic, tables: tuple[Tensor, ...], valid: Tensor) -> Dyadic:
        """The block on the codes of the residual stream: integers in, integers out.

        Args:
            x: [batch, seqlen, hidden]; tables: cos and sin times 2^14, int64 [batch, 1, seqlen, head_dim]; or none.
            valid: bool, broadcasts against [batch, heads, seqlen, seqlen]; True where a query sees a key.
        """
        h = self._norm(x, 0)
        x = self._add(x, self.linears["o"](self._attend(h, tables, valid)))
        h = self._norm(x, 1)
        h = self.requantize(*self._activate(h), self.cfg.a_bits)
        return self._add(x, self.linears["down"](h))

    def _activate(self, h: Dyadic) -> Scaled:
        if self.inverse is None:
            y, m, k = self.linears["up"](h)
            return y.clamp(min=0), m, k  # ReLU
        gate, up = (
            self.requantize(*self.linears[name](h), self.cfg.nonlinear_bits) for name in ("gate", "up")
        )
        return di_swiglu(gate, up, self.inverse, self.cfg)

    def _norm(self, x: Dyadic, which: int) -> Dyadic:
        return self.requantize(*self.norms[which](x), self.cfg.a_bits)

    def _add(self, x: Dyadic, y: Scaled) -> Dyadic:
        return self.requantize(*dyadic.add((x.centered, x.m, x.k), y), self.cfg.residual_bits)

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
            x = dyadic.from_float(hidden_states, self.cfg.residual_bits)
        n = hidden_states.shape[1]
        valid = attention_mask
        if valid is None:
            valid = torch.ones(n, n, dtype=torch.bool, device=hidden_states.device).tril()
        if valid.dtype != torch.bool:
            valid = valid >= 0  # additive mask
        tables = () if position_embeddings is None else rotary_tables(*position_embeddings)
        output = self.run(x, tables, valid)
        y = output.to_float(hidden_states.dtype)
        y.dyadic = output
        return y
