"""Evidence on GuidedQuant: an objective that falls as Proposition 4.1 says, limiting cases, what gradients predict.

Entry     papers/guidedquant.yaml
"""

from __future__ import annotations

from itertools import pairwise, product

import torch
from torch import Tensor, nn
from torch.nn import functional

from requant.reference_impls import _codebook, _quant, spinquant
from requant.reference_impls._codebook import made_definite, objective
from requant.reference_impls._gradients import output_gradients, sequence_losses
from requant.reference_impls._hessian import gram
from requant.reference_impls._walk import copy_model
from requant.reference_impls.guidedquant import Config, kmeans_start, lnq, quantize, quantize_weight
from requant.reference_impls.parts.guidedquant_guidance import grouped_saliency, guided_hessian

_LAYER = "model.layers.1.self_attn.o_proj"


def _observed(
    ctx, tokens: Tensor, names: list[str], model: nn.Module | None = None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """W, X [n_tokens, d_in] and scaled gradients G [n_tokens, d_out] of layers of a model; None: the reference."""
    model = copy_model(ctx.reference() if model is None else model)
    seen, scale = output_gradients(model, tokens), Config().grad_scale
    found = [(model.get_submodule(name), *seen[model.get_submodule(name)]) for name in names]
    return [(linear.weight, X.flatten(0, 1), G.flatten(0, 1) * scale) for linear, X, G in found]


def lnq_never_rises(ctx) -> float:
    """Largest relative rise of the objective from one half-step of LNQ to the next (Proposition 4.1)."""
    [(W, X, G)] = _observed(ctx, ctx.calib(8), [_LAYER])
    H = guided_hessian(X, grouped_saliency(G, 4))
    coded = lnq(W, H, (G.T @ X).square(), Config(n_iters=3))
    return max(after / before - 1 for before, after in pairwise(coded.history))


def codebook_is_least_squares(ctx) -> float:
    """Largest difference of codebook values from least squares on a Cholesky factor of H, per unit of max|w|."""
    W, H, _ = ctx.layer(_LAYER)
    W, H = W[:32], made_definite(H[None] * 4096)
    coded = kmeans_start(W, torch.ones_like(W), Config())
    L = torch.linalg.cholesky(H[0].double())
    A = L.T @ functional.one_hot(coded.codes, 4).double()  # [rows, d_in, 4]
    expected = torch.linalg.lstsq(A, (W.double() @ L)[..., None]).solution[..., 0]
    return float((_codebook.fit_codebook(W, H, coded, 0.0).codebook - expected).abs().max() / W.abs().max())


def unit_gradients_give_the_gram(ctx) -> float:
    """Largest entry of H_k - X^T X when all gradients are one, as a share of the largest of X^T X."""
    _, _, X = ctx.layer(_LAYER)
    plain = X.T @ X
    H = guided_hessian(X, grouped_saliency(torch.ones(len(X), 256), 4))
    return float((H - plain).abs().max() / plain.abs().max())


def one_group_a_channel_is_first_order(ctx) -> float:
    """Relative difference of the objective with g = d_out from the sum of (g_j X (w_j - q_j))^2."""
    [(W, X, G)] = _observed(ctx, ctx.calib(4), [_LAYER])
    W, G = W[:16], G[:, :16]
    Q = _quant.fake_quant(W, 3)
    exact = float((G * (X @ (Q - W).T)).double().square().sum())
    return abs(objective(W, Q, guided_hessian(X, grouped_saliency(G, 16))) / exact - 1)


def gradients_predict_the_loss(ctx) -> float:
    """Relative error of sum g dz as the change of the loss, for a step of 1e-3 of |W| down the gradient."""
    tokens = ctx.calib(4)
    [(W, X, G)] = _observed(ctx, tokens, [_LAYER])
    G, model = G / Config().grad_scale, ctx.reference()
    step = G.T @ X
    step *= -1e-3 * W.norm() / step.norm()
    predicted = float((G * (X @ step.T)).double().sum())
    with torch.no_grad():
        before = sequence_losses(model(tokens).logits, tokens).double().sum()
        model.get_submodule(_LAYER).weight += step
        after = sequence_losses(model(tokens).logits, tokens).double().sum()
    return abs(float(after - before) / predicted - 1)


def layer_objectives(ctx) -> list[dict]:
    """tr(E H E^T) at 2 bits, of round-to-nearest, of k-means and of LNQ on the plain H, as shares of the first."""
    W, H, _ = ctx.layer(_LAYER)
    H = H[None] * 4096
    rounded = {"rtn": _quant.fake_quant(W, 2)}
    rounded |= {name: quantize_weight(W, H, Config(quantizer=name)) for name in ("kmeans", "lnq")}
    return [
        {"name": k, "value": objective(W, Q, H) / objective(W, rounded["rtn"], H)} for k, Q in rounded.items()
    ]


def first_order_errors(ctx) -> list[dict]:
    """Sum of (g_j X (w_j - q_j))^2 by the Hessian minimised, as a share of that of the plain one; two layers.

    LNQ at 2 bits with one and four groups, GPTQ at 3 bits (gptq); on the calibration tokens, and on test text (_test).
    """
    names = [_LAYER, "model.layers.2.self_attn.q_proj"]
    seen, unseen = (_observed(ctx, tokens, names) for tokens in (ctx.calib(16), ctx.test_windows(16)))
    lnq_, gptq_ = Config(n_iters=1), Config(3, "gptq")
    pairs = {"one_group": (1, lnq_), "four_groups": (4, lnq_), "gptq": (4, gptq_)}
    totals: dict[str, float] = {}
    for (W, X, G), (_, X_test, G_test) in zip(seen, unseen, strict=True):
        H = {g: guided_hessian(X, grouped_saliency(G, g)) for g in (1, 4)} | {0: gram(X)[None]}
        for name, (groups, cfg) in ({"lnq": (0, lnq_), "gptq_plain": (0, gptq_)} | pairs).items():
            E = quantize_weight(W, H[groups], cfg, (G.T @ X).square()) - W
            for row, x, g in ((name, X, G), (f"{name}_test", X_test, G_test)):
                totals[row] = totals.get(row, 0.0) + float((g * (x @ E.T)).double().square().sum())
    rows = {"plain": 1.0}
    for name, end in product(pairs, ("", "_test")):
        rows[name + end] = totals[name + end] / totals[("gptq_plain" if name == "gptq" else "lnq") + end]
    return [{"name": name, "value": value} for name, value in rows.items()]


def guided_spinquant_at_8_bits(ctx) -> float:
    """Change of the loss (nats, 4 test windows) by SpinQuant's rotations and guided 8-bit weights, nothing else.

    On the first block of the reference model between its embedding and its head.
    """
    cfg = Config(8, "spinquant", 1, a_bits=None, kv_bits=None, rotation_steps=0)
    tokens, losses, shallow = ctx.test_windows(4), [], ctx.reference()
    shallow.model.layers, shallow.config.num_hidden_layers = shallow.model.layers[:1], 1
    for model in (quantize(shallow, ctx.calib(4, 128), cfg), shallow):
        with torch.no_grad():
            losses.append(float(sequence_losses(model(tokens).logits, tokens).mean()))
    return abs(losses[0] - losses[1])


def first_order_errors_rotated(ctx) -> list[dict]:
    """`first_order_errors` of 4-bit GPTQ in SpinQuant's rotated basis, one group, as a share of that of the plain H."""
    names = [_LAYER, "model.layers.2.self_attn.q_proj"]
    how, model = spinquant.Config(steps=0, seed=ctx.seed), ctx.reference()
    rotated = spinquant.rotate(model, spinquant.initial_rotations(model, how), how)
    cfg, errors = Config(4, "spinquant", 1), {"guided": 0.0, "plain": 0.0}
    for W, X, G in _observed(ctx, ctx.calib(16), names, rotated):
        H = {"guided": guided_hessian(X, grouped_saliency(G, 1)), "plain": gram(X)[None]}
        for name in errors:
            E = quantize_weight(W, H[name], cfg) - W
            errors[name] += float((G * (X @ E.T)).double().square().sum())
    return [{"name": name, "value": error / errors["plain"]} for name, error in errors.items()]
