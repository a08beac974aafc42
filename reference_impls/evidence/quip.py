"""Evidence on QuIP: LDLQ and its bounds, incoherence processing, and the counterexample of the official script.

Entry     papers/quip.yaml
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from requant.reference_impls import _quant, gptq
from requant.reference_impls._hessian import damped, proxy_loss
from requant.reference_impls.quip import (
    Basis,
    Config,
    Rotation,
    greedy_pass,
    ldl_upper,
    ldlq,
    quantize_weight,
    rescaling,
    round_codes,
)

_LAYERS = ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj")


def _in_basis(ctx, name: str) -> tuple[Tensor, Tensor, Basis]:
    """W and damped H of a layer of the reference model, and the basis QuIP draws for it."""
    W, H, _ = ctx.layer(name)
    generator = torch.Generator().manual_seed(ctx.seed)
    return W.double(), damped(H.double(), 0.01), Basis.draw(rescaling(W, H), len(W), generator, False)


def _hessians(ctx) -> list[Tensor]:
    """Damped H of two layers, as measured and as rotated."""
    found = [_in_basis(ctx, name) for name in _LAYERS]
    return [H for _, H, _ in found] + [basis.enter_hessian(H) for _, H, basis in found]


def rotations_are_orthogonal(ctx) -> float:
    """Largest |R^T R - I| and |undo(R) - I| over odd, prime and even sizes, shared and blocked factors."""
    generator, errors = torch.Generator().manual_seed(ctx.seed), []
    for n in (1, 2, 13, 96, 256, 768):
        for blocked in (False, True):
            rotation, identity = Rotation.draw(n, generator, blocked), torch.eye(n, dtype=torch.float64)
            R = rotation.apply(identity)
            errors += [(R.T @ R - identity).abs().max(), (rotation.undo(R) - identity).abs().max()]
    return float(max(errors))


def proxy_loss_is_preserved(ctx) -> float:
    """Largest relative change of tr(W H W^T) from rescaling and rotating W and H (Sec. 4)."""
    changes = []
    for name in _LAYERS:
        W, H, basis = _in_basis(ctx, name)
        before = proxy_loss(W, torch.zeros_like(W), H)
        after = proxy_loss(basis.enter(W), torch.zeros_like(W), basis.enter_hessian(H))
        changes.append(abs(after / before - 1))
    return max(changes)


def undo_returns_the_weight(ctx) -> float:
    """Largest |W - undone W| in units of max|W|, when nothing is rounded between Alg. 1 and Alg. 2."""
    found = [_in_basis(ctx, name) for name in _LAYERS]
    return max(float((basis.leave(basis.enter(W)) - W).abs().max() / W.abs().max()) for W, _, basis in found)


def ldlq_is_gptq(ctx) -> float:
    """Share of codes that differ between LDLQ and GPTQ (column order as given), same H and clamped grid."""
    generator = torch.Generator().manual_seed(ctx.seed)
    W, X = torch.rand(400, 64, generator=generator), torch.rand(64, 64, generator=generator)
    cases = [(W, X.T @ X, 3), (*ctx.layer(_LAYERS[0])[:2], 2), (*ctx.layer(_LAYERS[0])[:2], 3)]
    shares = []
    for W, H, bits in cases:
        scale, zero_point = _quant.choose_qparams(W, bits)
        z = (W.double() / scale + zero_point).T.contiguous()
        codes = ldlq(z, damped(H.double(), 0.01), 2**bits - 1)
        theirs = gptq.round_columns(W, H, gptq.Config(w_bits=bits, damp_ratio=0.01, act_order=False)).codes
        shares.append(float((codes != theirs).double().mean()))
    return max(shares)


def diagonal_hessian_is_nearest(ctx) -> float:
    """Share of codes in which LDLQ with a diagonal H differs from rounding to nearest."""
    _, H, _ = _in_basis(ctx, _LAYERS[0])
    z = 3 * torch.rand(len(H), 200, generator=torch.Generator().manual_seed(ctx.seed), dtype=torch.float64)
    return float((ldlq(z, torch.diag(H.diagonal()), 3) != round_codes(z, 3)).double().mean())


def trace_ratio(ctx) -> float:
    """Largest tr(D) / tr(H) over two layers, as measured and rotated; below 1 unless H is diagonal."""
    return max(float(ldl_upper(H)[1].sum() / H.trace()) for H in _hessians(ctx))


def average_loss_error(ctx) -> float:
    """Relative error of m/12 tr(D) and, stochastic, m/6 tr(D) as LDLQ's loss on m = 8,000 uniform rows."""
    _, H, _ = _in_basis(ctx, _LAYERS[0])
    H, generator = H[:64, :64], torch.Generator().manual_seed(ctx.seed)
    z = torch.rand(64, 8000, generator=generator, dtype=torch.float64)
    expected = z.shape[1] * float(ldl_upper(H)[1].sum()) / 12
    nearest, stochastic = (proxy_loss(z.T, ldlq(z, H, None, draw).T, H) for draw in (None, generator))
    return max(abs(nearest / expected - 1), abs(stochastic / (2 * expected) - 1))


def worst_row_loss(ctx) -> float:
    """Largest loss of one of 8,000 random rows under LDLQ on the integers, in units of its bound tr(D)/4."""
    _, H, _ = _in_basis(ctx, _LAYERS[0])
    H, generator = H[:64, :64], torch.Generator().manual_seed(ctx.seed)
    z = torch.rand(64, 8000, generator=generator, dtype=torch.float64)
    error = ldlq(z, H, None) - z
    return float((error * (H @ error)).sum(0).max() / (ldl_upper(H)[1].sum() / 4))


def incoherence_bound_ratio(ctx) -> float:
    """Largest tr(D) / (mu^2/n tr(H^1/2)^2), mu = sqrt(n) max|Q_ij| over the eigenvectors Q of H (Lemma 2)."""
    ratios = []
    for H in _hessians(ctx):
        values, vectors = torch.linalg.eigh(H)
        bound = vectors.abs().max() ** 2 * values.sqrt().sum() ** 2
        ratios.append(float(ldl_upper(H)[1].sum() / bound))
    return max(ratios)


def greedy_pass_ratio(ctx) -> float:
    """Largest proxy loss after a greedy pass over that before, from LDLQ and from nearest, clamped or not."""
    W, H, basis = _in_basis(ctx, _LAYERS[0])
    W, H = basis.enter(W), basis.enter_hessian(H)
    z, ratios = 1.5 * (W / (2.4 * W.square().mean().sqrt()) + 1).T.contiguous(), []
    for top in (3, None):
        for codes in (ldlq(z, H, top), round_codes(z, top)):
            for _ in range(3):
                before, codes = codes, greedy_pass(z, codes, H, top)
                ratios.append(proxy_loss(z.T, codes.T, H) / proxy_loss(z.T, before.T, H))
    return max(ratios)


def _counterexample() -> dict[str, float]:
    """Proxy loss per row of LDLQ and of nearest on the W and H of the official script (n = 256, c = 0.01)."""
    n, c = 256, 0.01
    H = torch.ones(n, n, dtype=torch.float64) + torch.eye(n, dtype=torch.float64)
    H[-1, -1] = 1.0
    H[0, 1:-1] += 2 * c
    H[1:-1, 0] += 2 * c
    H[0, -1] += c
    H[-1, 0] += c
    H[0, 0] += 4 * c + n * c**2
    z = (0.499 + 0.002 * (torch.arange(n, dtype=torch.float64) % 2))[:, None]
    return {"nearest": proxy_loss(z.T, round_codes(z, 3).T, H), "ldlq": proxy_loss(z.T, ldlq(z, H, 3).T, H)}


def counterexample(ctx) -> list[dict]:
    """Rows: proxy loss per row on the clamped 2-bit grid."""
    return [{"name": name, "value": value} for name, value in _counterexample().items()]


def counterexample_error(ctx) -> float:
    """Largest relative difference from 15937.2 (LDLQ), 63.51 (nearest) and their ratio 251."""
    loss = _counterexample()
    pairs = ((loss["ldlq"], 15937.2), (loss["nearest"], 63.51), (loss["ldlq"] / loss["nearest"], 251))
    return max(abs(value / stated - 1) for value, stated in pairs)


def weight_spread(ctx) -> list[dict]:
    """Rows: max|W| sqrt(mn) / ||W||_F (Definition 1) of a layer with outliers and a Gaussian, rotated or not."""
    outlier, _, _ = ctx.layer("model.layers.1.mlp.up_proj", "reference-outlier")
    gaussian = torch.randn(outlier.shape, generator=torch.Generator().manual_seed(ctx.seed))
    rows = {}
    for name, W in {"outlier": outlier, "gaussian": gaussian}.items():
        basis = Basis.draw(torch.ones(W.shape[1]), len(W), torch.Generator().manual_seed(ctx.seed), False)
        for label, M in ((name, W.double()), (f"{name}_rotated", basis.enter(W))):
            rows[label] = float(M.abs().max() * math.sqrt(M.numel()) / M.norm())
    return [{"name": name, "value": value} for name, value in rows.items()]


def gaussian_spread_change(ctx) -> float:
    """|log| of how much rotating a Gaussian matrix changes its max|W| sqrt(mn) / ||W||_F."""
    rows = {row["name"]: row["value"] for row in weight_spread(ctx)}
    return abs(math.log(rows["gaussian_rotated"] / rows["gaussian"]))


def proxy_losses(ctx) -> list[dict]:
    """Rows: proxy loss at 2 bits in units of that of LDLQ with incoherence, geometric mean of two layers."""
    variants = {
        "ldlq": {}, "ldlq_rg": {"act_order": True, "greedy_passes": 10},
        "ldlq_stochastic": {"stochastic": True}, "nearest": {"rounding": "nearest"},
        "plain_ldlq": {"incoherence": False},
        "plain_nearest": {"incoherence": False, "rounding": "nearest"},
    }  # fmt: skip
    logs = dict.fromkeys(variants, 0.0)
    for layer in _LAYERS:
        W, H, _ = ctx.layer(layer)
        for name, options in variants.items():
            Q = quantize_weight(W, H, Config(seed=ctx.seed, **options))
            logs[name] += math.log(proxy_loss(W, Q, H)) / len(_LAYERS)
    return [{"name": name, "value": math.exp(value - logs["ldlq"])} for name, value in logs.items()]


def incoherence_gain(ctx) -> list[dict]:
    """Rows: loss of LDLQ without incoherence processing minus loss with it, in nats a token, by bits."""
    rows = []
    for bits in (4, 2):
        plain, incoherent = (
            ctx.run("quip", {"w_bits": bits, "incoherence": on}, calib=(32, 256)).nll for on in (False, True)
        )
        rows.append({"name": f"w{bits}", "value": plain - incoherent})
    return rows
