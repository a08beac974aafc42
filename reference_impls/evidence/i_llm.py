"""Evidence on I-LLM: the integer operators against exact arithmetic, and what smoothing and integers cost.

Entry     papers/i_llm.yaml
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from requant.kernels.int8_matmul import has_fast_int_mm
from requant.reference_impls import _learn
from requant.reference_impls._activation import transform_attention
from requant.reference_impls._anatomy import block_anatomies
from requant.reference_impls._logits import change_of_logits, cost_in_nats
from requant.reference_impls._walk import copy_model, walk_blocks
from requant.reference_impls.evidence.omniquant import small_opt
from requant.reference_impls.i_llm import Config, quantize, settle, weight_codes
from requant.reference_impls.parts import i_llm_dyadic as dyadic
from requant.reference_impls.parts.i_llm_dyadic import Dyadic, constant
from requant.reference_impls.parts.i_llm_fsbr import Smoothing
from requant.reference_impls.parts.i_llm_operators import (
    ChannelGrids,
    DIMatMul,
    DINorm,
    di_clipped_softmax,
    di_exp,
    rotary_tables,
)
from requant.reference_impls.smoothquant import channel_peaks


@torch.no_grad()
def _any_factors(ctx, model: nn.Module, cfg: Config = Config()) -> Iterator[Smoothing]:  # noqa: B008 frozen
    """Block by block, FSBR with its initial factors times random ones between 1/2 and 2, at every kind of site.

    Shifts, where there are any, move by a tenth of their largest.
    """
    tokens, generator = ctx.calib(2), torch.Generator().manual_seed(ctx.seed)
    peaks = channel_peaks(model, tokens)
    for block in walk_blocks(model, tokens, propagate="both"):
        fsbr = Smoothing(block, model.config, peaks, cfg, quantizers=False)
        for s in fsbr.factors.values():
            s *= 2 ** (2 * torch.rand(s.shape, generator=generator) - 1)
        for d in fsbr.shifts.values():
            d += torch.randn(d.shape, generator=generator) * d.abs().max() / 10
        yield fsbr


@torch.no_grad()
def _change_of_logits(ctx, model: nn.Module, cfg: Config) -> float:
    changed = copy_model(model)
    for fsbr in _any_factors(ctx, changed, cfg):
        fsbr.smoothed().write()
    return change_of_logits(model, changed, ctx.test_windows(2))


def smoothing_keeps_the_function(ctx) -> float:
    """Largest change of a logit by all six kinds of factors, without rounding, as a share of the largest logit."""
    return _change_of_logits(ctx, ctx.reference("reference-outlier"), Config())


def opt_smoothing_keeps_the_function(ctx) -> float:
    """The same on a small OPT by the five kinds of factors that it has, and by shifts at norms and values."""
    return _change_of_logits(ctx, small_opt(), Config())


def query_key_factors(ctx) -> list[dict]:
    """The same change with the query-key factors of a rotary pair tied, and left free as the code does."""
    ways = {"tied": Config(), "free": Config(tie_rotary=False)}
    return [
        {"name": name, "value": _change_of_logits(ctx, ctx.reference("reference-outlier"), cfg)}
        for name, cfg in ways.items()
    ]


def _integer_input(ctx, name: str, bits: int) -> tuple[Tensor, Dyadic]:
    W, _, X = ctx.layer(f"model.layers.1.{name}", n_tokens=256)
    return W, dyadic.from_float(X[None], bits)


def integer_product_is_exact(ctx) -> float:
    """Largest relative difference between DI-MatMul before requantization and float64, at 4 and 8 bits."""
    worst = 0.0
    for bits in (4, 8):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            W, x = _integer_input(ctx, name, bits)
            weight = weight_codes(W, Config(w_bits=bits, a_bits=bits))
            y, m, k = DIMatMul(weight, None)(x)
            expected = x.to_float(torch.float64) @ weight.to_float(torch.float64).T
            found = y.double() * torch.ldexp(m.double(), -k.double())
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst


def _exponentials(guard_bits: int) -> tuple[Tensor, Tensor]:
    """Codes 0, -1, ..., -255 of [-15, 0] and what DI-Exp makes of them."""
    m, k = constant(torch.tensor([15 / 255]))
    x = -torch.arange(256)
    return x, di_exp(x, m, k, guard_bits)


def error_of_di_exp(ctx) -> float:
    """Largest |DI-Exp(x) / DI-Exp(0) - exp(x)| over the 256 codes of [-15, 0]; the line alone is off by 0.043."""
    x, e = _exponentials(Config().guard_bits)
    return float((e / e[0] - (x * 15 / 255).double().exp()).abs().max())


def di_exp_falls_and_halves(ctx) -> float:
    """Codes at which DI-Exp as printed rises with |x|, or does not halve after DI-Exp(0) steps, rounded down."""
    _, e = _exponentials(0)
    steps = int(e[0])
    return float((e.diff() > 0).sum() + (e[steps:] != e[:-steps] >> 1).sum())


def no_float_inside_blocks(ctx) -> float:
    """Operations of an integer block that return a float, from the codes of its input to those of its output."""

    class Count(TorchDispatchMode):
        floats = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.floats += any(isinstance(t, Tensor) and t.is_floating_point() for t in tree_leaves(out))
            return out

    angles = torch.arange(256)[None, :, None] / 10000 ** (torch.arange(64) % 32 / 32)
    cases = ((ctx.reference(), rotary_tables(angles.cos(), angles.sin())), (small_opt(), ()))
    floats, cfg = 0.0, Config(norm_bits=8)
    has_fast_int_mm()  # of products of integers: found out once in a process, by timing it against floats
    for model, tables in cases:
        block = settle(next(_any_factors(ctx, model, cfg)), model.config)
        inputs = torch.randn(1, 256, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        x = dyadic.from_float(inputs, cfg.residual_bits)
        with torch.no_grad(), Count() as count:
            y = block.run(x, tables, torch.ones(256, 256, dtype=torch.bool).tril())
        floats += count.floats + any(t.is_floating_point() for t in (y.codes, y.zero_point, y.m, y.k))
    return floats


_W8A8 = Config(w_bits=8, a_bits=8, kv_bits=8, n_epochs=0)


@torch.no_grad()
def _cost_in_nats(ctx, cfg: Config) -> float:
    """What a quantized reference model loses on 4 test windows, factors not trained."""
    model, windows = ctx.reference(), ctx.test_windows(4)
    return cost_in_nats(model, quantize(model, ctx.calib(2), cfg), windows)


def cost_of_integers_at_8_bits(ctx) -> float:
    """Nats that W8A8 with every operator of the blocks on integers costs on 4 test windows, factors not trained."""
    return _cost_in_nats(ctx, _W8A8)


def cost_of_8_bit_norm_inputs(ctx) -> float:
    """The same with 8-bit codes a channel as the inputs of norms, their ranges those of 2 calibration samples."""
    return _cost_in_nats(ctx, replace(_W8A8, norm_bits=8))


@torch.no_grad()
def opt_on_integers(ctx) -> float:
    """Relative change of the logits of a small random OPT by W8A8 with every operator of the blocks on integers.

    On 32 tokens: its attention is nearly even, and 8-bit probabilities cannot be even over more than 128.
    """
    model, windows = small_opt(), ctx.test_windows(2)[:, :32]
    plain = model(windows).logits
    return float((quantize(model, ctx.calib(2), _W8A8)(windows).logits - plain).norm() / plain.norm())


@torch.no_grad()
def _norm_inputs(ctx) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    """(norm, inputs of calibration tokens, inputs of test tokens [n_tokens, hidden]) of two blocks; RMSNorm."""
    model, seen = ctx.reference(), {}
    names = [f"{i}.{kind}" for i in (0, 2) for kind in ("input_layernorm", "post_attention_layernorm")]
    norms = {name: model.model.layers.get_submodule(name) for name in names}
    for norm in norms.values():
        norm.register_forward_pre_hook(
            lambda norm, args: seen.setdefault(norm, []).append(args[0].flatten(0, 1))
        )
    for tokens in (ctx.calib(16), ctx.test_windows(4)):
        model(tokens, use_cache=False)
    for norm in norms.values():
        yield norm, *seen[norm]


@torch.no_grad()
def _error_of_norm(norm: nn.Module, x: Dyadic, X: Tensor, grids: ChannelGrids | None = None) -> float:
    """Relative error of DI-Norm on the codes x of X against the float norm on X."""
    y, m, k = DINorm(norm, grids)(x)
    exact = norm(X)
    return float((y.double() * torch.ldexp(m.double(), -k.double()) - exact).norm() / exact.norm())


@torch.no_grad()
def norms_are_near_float(ctx) -> float:
    """Largest relative error of RMSNorm and LayerNorm on integers, 16-bit codes a token, against floats.

    On inputs as they are, and a thousandth of them, where eps decides.
    """
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for norm, _, X in _norm_inputs(ctx):
        layer_norm = nn.LayerNorm(X.shape[1], eps=1e-5)
        layer_norm.weight.copy_(norm.weight)
        layer_norm.bias.copy_(torch.randn(X.shape[1], generator=generator))
        for kind, inputs in ((norm, X), (norm, X / 1000), (layer_norm, X + X.std()), (layer_norm, X / 1000)):
            worst = max(worst, _error_of_norm(kind, dyadic.from_float(inputs, 16), inputs))
    return worst


@torch.no_grad()
def _norm_errors(ctx, outlier: float) -> list[dict]:
    """Relative error of DI-Norm on test tokens by the codes of its input, mean of four norms.

    per_channel: 8 bits on static grids from calibration tokens; per_token: 8 bits a token; wide: 16 bits a token.

    Args:
        outlier: the first channel of the residual stream is so much larger, its gain in the norm so much smaller.
    """
    errors = {"per_channel": [], "per_token": [], "wide": []}
    for norm, calib, X in _norm_inputs(ctx):
        calib[:, 0] *= outlier
        X[:, 0] *= outlier
        norm.weight[0] /= outlier
        x = dyadic.from_float(X, 16)
        errors["wide"].append(_error_of_norm(norm, x, X))
        errors["per_channel"].append(_error_of_norm(norm, x, X, ChannelGrids.of(calib, 8)))
        errors["per_token"].append(_error_of_norm(norm, dyadic.from_float(X, 8), X))
    return [{"name": name, "value": sum(values) / len(values)} for name, values in errors.items()]


def norm_errors(ctx) -> list[dict]:
    """`_norm_errors` on the residual stream as it is."""
    return _norm_errors(ctx, 1.0)


def norm_errors_with_an_outlier(ctx) -> list[dict]:
    """`_norm_errors` with one channel of the residual stream 64 times as large."""
    return _norm_errors(ctx, 64.0)


def _probabilities(ctx, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """DI-ClippedSoftmax of real scores (a head, no rotary embedding), float probabilities, and who sees whom."""
    W, _, X = ctx.layer("model.layers.1.self_attn.q_proj", n_tokens=256)
    keys = X @ ctx.layer("model.layers.1.self_attn.k_proj", n_tokens=256)[0][:64].T
    scores = (X @ W[:64].T @ keys.T / 8).double()
    valid, ones = torch.ones(256, 256, dtype=torch.bool).tril(), torch.ones(256, 1, dtype=torch.int64)
    integers = ((scores * 2**20).round().long(), 128 * ones, 27 * ones)
    return di_clipped_softmax(integers, valid, cfg), scores.masked_fill(~valid, -torch.inf).softmax(-1), valid


def softmax_rows_sum_to_one(ctx) -> float:
    """Largest |row sum - 128| of 8-bit probabilities, in units of half a step for each position that is seen."""
    p, _, valid = _probabilities(ctx, Config())
    return float(((p.sum(-1) - 128).abs() / (valid.sum(-1) / 2)).max() + p.masked_fill(valid, 0).abs().max())


def softmax_errors(ctx) -> list[dict]:
    """Half the summed |difference| to float probabilities, mean over rows: c = 3 and 15, no clip, no guard bits."""
    variants = {
        "c15": {},
        "c3": {"softmax_clip": 3},
        "unclipped": {"softmax_clip": None},
        "as_printed": {"guard_bits": 0},
    }
    rows = []
    for name, over in variants.items():
        p, exact, _ = _probabilities(ctx, Config(**over))
        rows.append({"name": name, "value": float((p / 128 - exact).abs().sum(-1).mean() / 2)})
    return rows


def reconstruction_errors(ctx) -> list[dict]:
    """Output error of the first block on 4 samples FSBR did not see, after 4 epochs over 8 others; initially 1."""
    model, calib = copy_model(ctx.reference("reference-outlier")), ctx.calib(12)
    peaks = channel_peaks(model, calib[:8])
    transform_attention(model, block_anatomies(model)[0].attn, lambda q, k, v: (q, k, v))
    block = next(walk_blocks(model, calib, propagate="both"))
    (X, Y), fsbr = (
        (torch.cat(t) for t in (block.inputs, block.targets)),
        Smoothing(block, model.config, peaks, Config(n_epochs=4)),
    )
    unseen = replace(block, inputs=[X[8:]], targets=[Y[8:]])
    block.inputs, block.targets = [X[:8]], [Y[:8]]
    before = _learn.output_error(unseen, fsbr.rounded())
    fsbr.train_block(torch.Generator().manual_seed(ctx.seed))
    trained = _learn.output_error(unseen, fsbr.rounded()) / before
    return [{"name": "trained", "value": trained}, {"name": "initial", "value": 1.0}]
