"""I-LLM: smoothing between all operators of a block, learned, and then every operator of the block on integers.

Paper     Hu et al., 2024, arXiv:2405.17849v2 (numbers below refer to v2)   Entry  papers/i_llm.yaml
Scope     decoder blocks of Llama, Mistral and Qwen2, all operators; embeddings, final norm and lm_head stay float
Deviates  FSBR follows the official code, but q/k factors are tied over rotary pairs (tie_rotary); ranges of
          activations include 0, and weights end on dyadic grids. The code has no integer operator: those here are
          reconstructed from implementations by others of Algorithms 1-4 and Eqs. 2-8. DI-Exp gets guard bits (0 = as
          printed), and M of DI-SwiGLU is at least 0. The residual stream has 16-bit codes a token, from which DI-Norm
          reads (the paper: 8 bits a channel); the input of rotary embedding stays wide, its tables have 14 bits;
          values are brought to one scale a head before they are summed; eps and biases are kept. Embeddings, final
          norm and head are float, and no KV cache is kept between calls. OPT is not offered
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls import _learn, _quant
from requant.reference_impls._activation import QuantInput, SmoothedSiLU, one_each, transform_attention
from requant.reference_impls._anatomy import anatomy, block_anatomies
from requant.reference_impls._dyadic import Dyadic, constant
from requant.reference_impls._equivalence import Folded, query_key, sites
from requant.reference_impls._integer_block import DIMatMul, IntegerBlock, require_integer_operators
from requant.reference_impls._quant import QuantizationError, check_choices
from requant.reference_impls._rotation import heads
from requant.reference_impls._walk import (
    Block,
    check_calib,
    copy_model,
    decoder_blocks,
    replace_module,
    walk_blocks,
)
from requant.reference_impls.smoothquant import channel_peaks, smoothing_factors

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
_SMALLEST = 0.01  # code: factors are pushed away from 0 to this


@dataclass(frozen=True)
class Config:
    """Defaults: W4A4 with integer operators (abstract)."""

    w_bits: int = 4  # abstract
    a_bits: int = 4  # abstract: inputs of linears and queries, per token
    kv_bits: int = 4  # code: keys and values, per token and head, as activations
    nonlinear_bits: int = 8  # Algorithms 2, 3: p_out, and the inputs of SwiGLU and softmax
    residual_bits: int = 16  # code: n_bits 16 of additions and norm inputs
    softmax_clip: int | None = 15  # Eq. 10, c; None = the whole range of a row
    guard_bits: int = 16  # ours: left shift of what DI-Exp gets; 0 = Algorithm 1 as printed
    about_zero: bool = False  # Eqs. 2-8 round about the minimum; True, ours: about 0, as fake quantizers do
    smoothing: str = "full"  # FSBR; "partial": norms and values, as OmniQuant; "none"
    alpha: float = 0.5  # code, initial factors max|X|^alpha / max|W|^(1 - alpha)
    n_epochs: int = 20  # code, --epochs; 0 = initial factors
    batch_size: int = 1  # code, --batch_size
    let_lr: float = 5e-3  # code, --let_lr
    lwc_lr: float = 1e-2  # code, --lwc_lr
    tie_rotary: bool = True  # query-key factors cancel only then; the code leaves pairs free (False)
    integer: bool = True  # False: fake quantization, all that the code can evaluate
    seed: int = 0  # order of the samples (code: 2)

    def __post_init__(self) -> None:
        check_choices(self, smoothing=("full", "partial", "none"))
        if not (2 <= self.w_bits <= 8 and 2 <= self.a_bits <= 8 and 2 <= self.kv_bits <= 8):
            raise QuantizationError("w_bits, a_bits and kv_bits must be from 2 to 8")


TINY = {"n_epochs": 1, "batch_size": 8}
ERROR_FLOOR = 5e-3  # weight clipping starts at 0.982 of the range


# --- FSBR: smoothing and clipping, learned ---------------------------------------------------------------------------


class Smoothing(nn.Module):
    """The learned factors and clipping strengths of one block, and what the block becomes with them.

    The block gets a SmoothedSiLU, and with `quantizers` those of the code at every place it has them.
    """

    def __init__(
        self, block: Block, config, peaks: Mapping[nn.Linear, Tensor], cfg: Config, quantizers: bool = True
    ):
        super().__init__()
        self.cfg, self.parts = cfg, anatomy(block.module)
        self.block = (block,)  # a tuple, so that its parameters are not taken for learned ones
        self.linears = {name: getattr(self.parts, name) for name in ROLES}
        self.sites = {site.name: site for site in sites(self.parts, config)}
        self.query_key = query_key(self.parts, config, block.kwargs)
        factors = {"qk": torch.ones(self.parts.k.out_features), "act": torch.ones(self.parts.up.out_features)}
        for name, site in self.sites.items():
            reader = site.linears[-1 if name == "mlp_norm" else 0]  # code: q, up, o, down
            s = smoothing_factors(peaks[reader].clamp(min=1e-5), [reader.weight], cfg.alpha)
            factors[name] = s.view(-1, site.repeat, site.head_dim)[:, 0].flatten() if site.repeat > 1 else s
        partial_sites = {"attn_norm", "mlp_norm", "value"}
        used = {"full": set(factors), "partial": partial_sites, "none": set()}[cfg.smoothing]
        self.factors = nn.ParameterDict()
        for name, s in factors.items():
            s = s if name in used else torch.ones_like(s)
            self.factors[name] = nn.Parameter(s.clone(), requires_grad=name in used)
        self.strengths = nn.ModuleDict(
            {name: _learn.ClippingStrengths(linear.weight) for name, linear in self.linears.items()}
        )
        self.push_away()
        self._wrap(quantizers)

    def _wrap(self, quantizers: bool) -> None:
        cfg, root, attn = self.cfg, self.block[0].module, self.parts.attn
        inner = partial(_learn.token_ste, bits=cfg.nonlinear_bits) if quantizers else nn.Identity()
        self.act_fn = (SmoothedSiLU(self.parts.down.in_features, inner),)
        self.parts.mlp.act_fn = self.act_fn[0]
        if not quantizers:
            return
        names = {id(module): name for name, module in root.named_modules()}
        for role, linear in self.linears.items():
            before = partial(_learn.token_ste, bits=cfg.a_bits)
            replace_module(
                root, names[id(linear)], QuantInput(linear, before, inner if role == "up" else None)
            )
        widths = (cfg.a_bits, cfg.kv_bits, cfg.kv_bits)
        attn.requant_transform = one_each(*(partial(_learn.token_ste, bits=bits) for bits in widths))

    @torch.no_grad()
    def push_away(self) -> None:
        """Keep every factor at least 0.01 from 0 (code)."""
        for s in self.factors.values():
            _learn.floored(s, _SMALLEST)

    def smoothed(self) -> Folded:
        """The block's parameters with all factors folded in, which leave its function unchanged; differentiable."""
        now, f = Folded(self.block[0].module), self.factors
        for name, site in self.sites.items():
            site.fold_into(now, f[name])
        self.query_key.fold_into(now, self.query_key.tie(f["qk"]) if self.cfg.tie_rotary else f["qk"])
        every = torch.arange(self.parts.up.out_features)
        now.scale_rows(self.parts.gate, every, 1 / f["act"])
        now.scale_rows(self.parts.up, every, f["act"])
        now[self.act_fn[0].a] = f["act"]
        return now

    def rounded(self) -> Mapping[str, Tensor]:
        """The same with weights fake-quantized at the present clipping; what `Block.forward` takes."""
        now = self.smoothed()
        for role, linear in self.linears.items():
            W = now[linear.weight]
            now[linear.weight] = _learn.affine_ste(
                W, *self.strengths[role].grid(W, self.cfg.w_bits), self.cfg.w_bits
            )
        return now.tensors

    def train_block(self, generator: torch.Generator) -> None:
        """AdamW on the block's output error; ends with the epoch of the lowest mean loss (code)."""
        block, cfg = self.block[0], self.cfg
        X, Y = torch.cat(block.inputs), torch.cat(block.targets)
        factors = [s for s in self.factors.values() if s.requires_grad]
        groups = [{"params": list(self.strengths.parameters()), "lr": cfg.lwc_lr}]
        groups += [{"params": factors, "lr": cfg.let_lr}] if factors else []
        optimizer, best, state = torch.optim.AdamW(groups, weight_decay=0.0), float("inf"), None

        def loss(chosen: Tensor) -> Tensor:
            return (block.forward(X[chosen], self.rounded()) - Y[chosen]).square().mean()

        for _ in range(cfg.n_epochs):
            batches = torch.randperm(len(X), generator=generator).split(cfg.batch_size)
            losses = _learn.descend(loss, optimizer, batches, project=self.push_away)
            mean = sum(losses) / len(losses)
            if mean < best:
                best, state = mean, {key: value.clone() for key, value in self.state_dict().items()}
        if state is not None:
            self.load_state_dict(state)

    @torch.no_grad()
    def settle(self, config) -> IntegerBlock:
        """Write the final parameters into the block, weights on their dyadic grids; returns the block on integers."""
        now, linears, parts, block = self.smoothed(), {}, self.parts, self.block[0].module
        for role, linear in self.linears.items():
            codes = weight_codes(now[linear.weight], self.cfg, self.strengths[role])
            linears[role] = DIMatMul(codes, None if linear.bias is None else now[linear.bias])
            now[linear.weight] = codes.to_float()
        gains = now[parts.attn_norm.weight], now[parts.mlp_norm.weight]
        eps, scaling = float(config.rms_norm_eps), float(parts.attn.scaling)  # 1 / sqrt(head_dim)
        made = IntegerBlock(linears, gains, eps, self.factors["act"], scaling, heads(parts, config), self.cfg)
        made.attention_type = getattr(block, "attention_type", None)  # some models choose the mask by it
        now.write()
        return made


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Smooth and clip block by block (FSBR), then put integer blocks in the place of all decoder blocks.

    Args:
        calib: int64 [n_samples, seqlen].
    Raises: UnsupportedModelError for blocks other than Llama's, Mistral's and Qwen2's; QuantizationError without calib.
    """
    check_calib(calib)
    require_integer_operators(model)
    model, generator = copy_model(model), torch.Generator().manual_seed(cfg.seed)
    peaks = channel_peaks(model, calib)
    for parts in block_anatomies(model):
        transform_attention(model, parts.attn, lambda q, k, v: (q, k, v))
    blocks = decoder_blocks(model)
    for block in walk_blocks(
        model, calib, propagate="both"
    ):  # the next one is fed by `block.module`, in floats
        fsbr = Smoothing(block, model.config, peaks, cfg)
        fsbr.train_block(generator)
        made = fsbr.settle(model.config)
        if cfg.integer:
            blocks[block.index] = made
    return model


# --- weights ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def weight_codes(W: Tensor, cfg: Config, strengths: nn.Module | None = None) -> Dyadic:
    """W [d_out, d_in] on a dyadic grid a row; without strengths clipping is where it starts."""
    scale, zero_point = (strengths or _learn.ClippingStrengths(W)).grid(W, cfg.w_bits)
    m, k = constant(scale)
    step = torch.ldexp(m.float(), -k.float())
    codes = ((W / step).round() + zero_point).clamp(0, 2**cfg.w_bits - 1)
    return Dyadic(codes.long(), zero_point.long(), m, k)


def quantize_weight(W: Tensor, H: Tensor | None, cfg: Config) -> Tensor:
    """Round W [d_out, d_in] as before any training; smoothing is outside of it. H is ignored."""
    return weight_codes(W, cfg).to_float()


def pack_weight(W: Tensor, H: Tensor | None, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer: packed codes, and zero point, m and k of each row in a byte each."""
    rounded = weight_codes(W, cfg)
    small = {"zero_point": torch.uint8, "m": torch.uint8, "k": torch.int8}
    return {
        "shape": torch.tensor(W.shape, dtype=torch.int32),
        "codes": _quant.pack_bits(rounded.codes, cfg.w_bits),
        **{name: getattr(rounded, name).to(dtype) for name, dtype in small.items()},
    }


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    codes = _quant.unpack_bits(packed["codes"], cfg.w_bits, tuple(packed["shape"].tolist()))
    return Dyadic(codes, *(packed[name].long() for name in ("zero_point", "m", "k"))).to_float()


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + 24/d_in: codes, and three bytes a row."""
    return cfg.w_bits + 24 / d_in
