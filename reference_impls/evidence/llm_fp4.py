"""Evidence on LLM-FP4: its formats against their definition, offsets that fold into weights, errors by format.

Entry     papers/llm_fp4.yaml
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear as product

from requant.reference_impls._float_grid import Format
from requant.reference_impls.llm_fp4 import Config, best_by_rows, channel_offsets, row_error, search_linear

_ALL = [Format(bits - 1 - m, m) for bits in (4, 6, 8) for m in range(max(0, bits - 6), bits - 1)]
_TWO = ("0.self_attn.q_proj", "1.self_attn.o_proj")


def _random(n: int = 20000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, generator=generator) * 2.0 ** torch.randint(-8, 8, (n,), generator=generator)


def format_is_a_format(ctx) -> float:
    """Over 14 formats, the largest breach of: idempotent, odd, 0 to 0, c to c, 2^(1+e+m) - 1 values, exact codes."""
    worst, x = 0.0, _random()
    for one in _ALL:
        B = torch.tensor(2.25)
        y, c = one.round(x, B), one.peak(B)
        ends = one.round(torch.stack([c, -c, 0 * c]), B) - torch.stack([c, -c, 0 * c])
        codes = torch.arange(2 ** (1 + one.e + one.m))
        values = one.decode(codes, B)
        breaches = (
            one.round(y, B) - y,
            one.round(-x, B) + y,
            ends / c,
            one.decode(one.encode(y, B), B) - y,
            one.round(values, B) - values,
            torch.tensor([len(values.unique()) - (len(codes) - 1.0)]),
        )
        worst = max(worst, *(float(breach.abs().max()) for breach in breaches))
    return worst


def one_exponent_bit_is_an_integer_grid(ctx) -> float:
    """Largest difference of E1Mm to round(x/s) s clamped to +-(2^(m+1) - 1) s, in units of s = 2^(1 - m - B)."""
    worst, x, B = 0.0, _random(), torch.tensor(0.5)
    for m in range(1, 7):
        s, limit = 2.0 ** (1 - m - B), 2 ** (m + 1) - 1
        worst = max(
            worst, float((Format(1, m).round(x, B) / s - (x / s).round().clamp(-limit, limit)).abs().max())
        )
    return worst


def bias_is_a_power_of_two(ctx) -> float:
    """Largest difference of FP(2^k x; B - k) and 2^k FP(x; B): offsets of channels cost no rounding."""
    x, B = _random(), torch.tensor(1.375)
    pairs = ((one.round(x * 2.0**k, B - k), 2.0**k * one.round(x, B)) for one in _ALL for k in (-3, 1, 4))
    return max(float((a - b).abs().max()) for a, b in pairs)


def offsets_fold_into_weights(ctx) -> float:
    """Largest relative change of a product when X_j takes 2^k_j and W_j its inverse, X rounded on both sides."""
    W, _, X = ctx.layer("model.layers.1.self_attn.q_proj", "reference-outlier", 256)
    given = search_linear(W, X, X.abs().amax(0), Config(search=False))[1]
    k = (given.B - given.B.min()).round()
    outside = product(given(X), W)
    moved = product(given.format.round(X * 2.0**k, given.B.min()), W * 2.0**-k)
    return float((outside - moved).abs().max() / outside.abs().max())


def offsets_differ_by_one(ctx) -> float:
    """Largest difference between offsets counted from rounded biases and as Eq. 15, over tensor biases and formats."""
    X = ctx.layer("model.layers.1.self_attn.q_proj", "reference-outlier", 256)[2]
    code, text, worst = Config(), Config(rounded_offsets=False), 0.0
    for one in _ALL:
        own = one.bias(X.abs().amax(0))
        for rho in own.min() * torch.linspace(0.5, 1.2, 50):
            apart = channel_offsets(rho, own, one, code) - channel_offsets(rho, own, one, text)
            worst = max(worst, float(apart.abs().max()))
    return worst


def weights_fit_the_inputs(ctx) -> list[dict]:
    """Error of the weights found above that of weights searched anew for the inputs found, as a share, by order.

    One round, mean of two layers; the error is the search's own, on the 64 tokens it is given.
    """
    layers = [ctx.layer(f"model.layers.{name}", "reference-outlier", 64) for name in _TWO]
    rows = []
    for name, first in (("text", False), ("code", True)):
        cfg, excess = Config(weights_first=first, n_grid=20, n_rounds=1), []
        for W, _, X in layers:
            weight, given = search_linear(W, X, X.abs().amax(0), cfg)
            error = row_error(given(X), product(X, W))
            best = best_by_rows(W, error, cfg)
            excess.append(float(error(weight(W)).mean() / error(best(W)).mean()) - 1)
        rows.append({"name": name, "value": sum(excess) / len(excess)})
    return rows


def tails_decide(ctx) -> list[dict]:
    """Squared error of E2M1 over that of E1M2, an integer grid, both to the maximum: Student t (3), and uniform."""
    generator = torch.Generator().manual_seed(ctx.seed)
    normal = torch.randn(4, 64, 256, generator=generator)
    heavy = normal[0] / (normal[1:].square().mean(0)).sqrt()
    rows = [{"name": "even", "value": 1.0}]
    for name, x in (("heavy", heavy), ("uniform", torch.rand(64, 256, generator=generator) - 0.5)):
        peak = x.abs().amax(1, keepdim=True)
        errors = [
            float((one.round(x, one.bias(peak)) - x).square().sum()) for one in (Format(2, 1), Format(1, 2))
        ]
        rows.append({"name": name, "value": errors[0] / errors[1]})
    return rows


def products_by_variant(ctx) -> list[dict]:
    """Relative error of 4-bit products on unseen tokens: offsets of channels, one bias a tensor, and no search."""
    base = Config(n_grid=50, n_rounds=1)
    variants = {"offsets": base, "searched": replace(base, channel_shift=False)}
    variants["minmax"] = replace(base, channel_shift=False, search=False)
    errors = dict.fromkeys(variants, 0.0)
    names = ("0.self_attn.q_proj", "1.self_attn.o_proj", "2.self_attn.v_proj", "3.self_attn.k_proj")
    for name in names:
        W, _, X = ctx.layer(f"model.layers.{name}", "reference-outlier", 512)
        seen, unseen = X.chunk(2)
        exact = product(unseen, W)
        for row, cfg in variants.items():
            weight, given = search_linear(W, seen, seen.abs().amax(0), cfg)
            error = (product(given(unseen), weight(W)) - exact).square().sum() / exact.square().sum()
            errors[row] += float(error) / len(names)
    return [{"name": row, "value": error} for row, error in errors.items()]
