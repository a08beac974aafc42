"""The number of groups of a linear that lend a bit to others: SliM-LLM's salience-determined bit allocation.

SliM-LLM, arXiv:2405.14917v2; "code" is its official repository @cfdf5ff. Of N bits on average the least salient groups
of inputs get N - 1 and as many of the most salient ones N + 1. How many is found by trying: each number is judged by
the outputs of the layer, rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from requant.reference_impls import _quant
from requant.reference_impls._hessian import inverse_cholesky

OBJECTIVES = ("kl", "kl_original", "mse")


def group_salience(W: Tensor, H: Tensor, group_size: int) -> Tensor:
    """Sum of w_ij^2 / U_jj^2 over each group of inputs and all rows, U the Cholesky factor of H^-1: [n_groups].

    Args:
        W: [d_out, d_in]; H: [d_in, d_in], damped.
    """
    U = inverse_cholesky(H)
    return _quant.grouped((W / U.diagonal()).square(), group_size).sum((0, 2))


def divergence_from(target: Tensor, objective: str) -> Callable[[Tensor], float]:
    """Sum over tokens of the divergence from target [n_tokens, d_out]; probabilities are at least 1e-6 (code)."""
    if objective == "mse":
        return lambda output: float((output - target).square().sum())
    original = target.softmax(-1).clamp_(min=1e-6)
    log_original = original.log()

    def divergence(output: Tensor) -> float:
        p = output.softmax(-1).clamp_(min=1e-6)
        if objective == "kl":
            return float(p.log().sub_(log_original).mul_(p).sum())
        return float((log_original - p.log_()).mul_(original).sum())

    return divergence


class WidthSearch:
    """How many groups to lower and raise in one linear, judged by its outputs.

    Args:
        W: [d_out, d_in]; bias: [d_out] or None.
        fake_quant: bits -> W rounded to nearest at that width in every group.
        salience: [n_groups], by which groups are lowered and raised while numbers are tried.
        final: [n_groups], by which they are once the number is chosen (the code has two saliences).
        objective: one of OBJECTIVES, from the original outputs to those of the rounded weight.
        both_ends: try uniform widths and half the groups raised too.
        same_bias: the outputs of the rounded weight have the bias too.
    Attributes:
        order, final_order: groups by salience, least first, [n_groups].
        counts: the numbers of groups lowered, and raised, that are tried.
        total: [n_counts] divergence from the original outputs, summed over the tokens seen.
    """

    def __init__(
        self,
        W: Tensor,
        fake_quant: Callable[[int], Tensor],
        w_bits: int,
        salience: Tensor,
        final: Tensor,
        *,
        bias: Tensor | None = None,
        objective: str = "kl",
        both_ends: bool = True,
        same_bias: bool = True,
    ):
        half = len(salience) // 2
        self.W, self.w_bits, self.objective = W, w_bits, objective
        self.bias, self.rounded_bias = bias, bias if same_bias else None
        self.order, self.final_order = salience.argsort(stable=True), final.argsort(stable=True)
        self.counts = list(range(half + 1) if both_ends or half < 2 else range(1, half))
        self.total = torch.zeros(len(self.counts), dtype=torch.float64)
        if len(self.counts) > 1:
            self.mid, low, high = (fake_quant(bits) for bits in (w_bits, w_bits - 1, w_bits + 1))
            self.lowered, self.raised = low - self.mid, high - self.mid

    def see(self, X: Tensor) -> None:
        """Add the divergences on inputs X [n_tokens, d_in]; each count changes two groups of the one before it."""
        if len(self.counts) == 1:
            return
        G = len(self.order)
        size = self.W.shape[1] // G
        target = torch.nn.functional.linear(X, self.W, self.bias)
        output = torch.nn.functional.linear(X, self.mid, self.rounded_bias)
        divergence = divergence_from(target, self.objective)
        for count in range(self.counts[-1] + 1):
            for rank, change in ((count - 1, self.lowered), (G - count, self.raised)) if count else ():
                begin = int(self.order[rank]) * size
                output.addmm_(X[:, begin : begin + size], change[:, begin : begin + size].T)
            if count >= self.counts[0]:
                self.total[count - self.counts[0]] += divergence(output)

    def widths(self) -> list[int]:
        """Bits of each group: N - 1 for the least salient, N + 1 for as many of the most salient, N for the rest."""
        count = self.counts[int(self.total.argmin())]
        widths = torch.full((len(self.order),), self.w_bits)
        widths[self.final_order[:count]] -= 1
        widths[self.final_order[len(self.order) - count :]] += 1
        return widths.tolist()
