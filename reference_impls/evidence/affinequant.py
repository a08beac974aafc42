"""Evidence on AffineQuant: matrices change no output and stay dominant, what they gain over OmniQuant.

Entry     papers/affinequant.yaml
"""

from __future__ import annotations

import math

import torch
from torch import nn

from requant.reference_impls import omniquant
from requant.reference_impls._learn import output_error
from requant.reference_impls._walk import walk_blocks
from requant.reference_impls.affinequant import AffineLearner, Config
from requant.reference_impls.evidence.omniquant import held_out_block, small_opt


def _learner(ctx, model: nn.Module, cfg, kind: type = AffineLearner) -> omniquant.BlockLearner:
    """A learner for the first block."""
    block = next(iter(walk_blocks(model, ctx.calib(16, 128), propagate="both")))
    with torch.no_grad():
        return kind(model, block, cfg)


@torch.no_grad()
def _change_of_output(ctx, model: nn.Module, cfg: Config, n_shifts: int = 0) -> float:
    """Largest change of the first block's output, as a share of its largest, by random matrices, scales and shifts.

    Each is moved by a tenth of its largest entry (of 1 where all are zero). Infinite with fewer than n_shifts shifts.
    """
    learner, generator = _learner(ctx, model, cfg), torch.Generator().manual_seed(0)
    if len(learner.shifts) < n_shifts:
        return math.inf
    for parameter in (*learner.scales.values(), *learner.shifts.values()):
        size = parameter.abs().max() if parameter.any() else 1.0  # shifts in added biases start at zero
        parameter += torch.randn(parameter.shape, generator=generator) * size / 10
    now = learner.block.forward(learner.block.inputs[0], learner.transformed().tensors)
    original = learner.block.targets[0]
    return float((now - original).abs().max() / original.abs().max())


@torch.no_grad()
def transforms_keep_the_function(ctx) -> float:
    """Change of a block's output, as a share of its largest, by random matrices and shifts at every place.

    Full matrices in a small OPT (all places) and behind the norms of the reference model, mask fully open.
    """
    cases = ((small_opt(), True), (ctx.reference(), False))
    return max(
        _change_of_output(
            ctx, model, Config(a_bits=None, norm_matrix=True, head_matrix=head_matrix, gradual=False)
        )
        for model, head_matrix in cases
    )


@torch.no_grad()
def shifts_in_added_biases_keep_the_function(ctx) -> float:
    """The same change in the reference model, which has no biases, with and without matrices behind its norms.

    Infinite where one of the three places has got no shift.
    """
    worst = 0.0
    for norm_matrix in (False, True):
        cfg = Config(a_bits=None, norm_matrix=norm_matrix, gradual=False, add_biases=True)
        worst = max(worst, _change_of_output(ctx, ctx.reference(), cfg, n_shifts=3))
    return worst


def no_band_is_omniquant(ctx) -> float:
    """Largest relative difference of the losses of OmniQuant and of AffineQuant with a stability factor of 0, W4A4.

    In float64: in float32 a difference in the last bit turns the rounding of some value within a few steps, after
    which the losses of two equal methods differ by up to 2 percent.
    """
    shared, usual = {"a_bits": 4, "epochs": 1, "lwc_lr": 1e-2, "let_lr": 5e-3}, torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        ours = _learner(ctx, small_opt().double(), Config(**shared, stability=0.0)).learn()
        other = omniquant.Config(**shared), omniquant.BlockLearner
        theirs = _learner(ctx, small_opt().double(), *other).learn()
    finally:
        torch.set_default_dtype(usual)
    return max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))


def matrices_stay_dominant(ctx) -> float:
    """Largest ratio, over the rows of all learned matrices, of the sum off the diagonal to the diagonal entry."""
    worst = 0.0
    for cfg in (Config(epochs=2), Config(w_bits=2, a_bits=None, norm_matrix=True, stability=0.01, epochs=2)):
        learner = _learner(ctx, ctx.reference(), cfg)
        learner.learn()
        for name, parameter in learner.scales.items():
            if parameter.ndim > 1:
                A = learner.matrix(name).detach().abs()
                diagonal = A.diagonal(dim1=-2, dim2=-1)
                worst = max(worst, float((A.sum(-1) / diagonal - 1).max()))
    return worst


def block_errors(ctx) -> list[dict]:
    """Held-out output error of the first block at 2 bits after 64 steps, in units of what OmniQuant leaves.

    The stability factor is the text's for small models, 1; at_once has the whole matrix from the first epoch on.
    """
    shared = {"w_bits": 2, "a_bits": None, "epochs": 4, "lwc_lr": 0.1, "let_lr": 5e-3}
    matrices = {"norm_matrix": True, "head_matrix": False, "stability": 1.0}
    kinds = {
        "omniquant": (omniquant.Config(**shared), omniquant.BlockLearner),
        "affine": (Config(**shared, **matrices), AffineLearner),
        "at_once": (Config(**shared, **matrices, gradual=False), AffineLearner),
    }
    held_out, errors = held_out_block(ctx), {}
    for name, (cfg, kind) in kinds.items():
        learner = _learner(ctx, ctx.reference(), cfg, kind)
        learner.learn()
        errors[name] = output_error(held_out, learner.rounded().tensors, learner.block)
    return [{"name": name, "value": error / errors["omniquant"]} for name, error in errors.items()]
