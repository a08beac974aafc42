"""What the loss says about the outputs and the weights of each linear, and the Hessians that follow from it.

GuidedQuant, arXiv:2505.07004v4. `cfg` is the method's Config: `n_channel_groups` and `grad_scale` of it count here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from requant.reference_impls._gradients import output_gradients
from requant.reference_impls._hessian import gram
from requant.reference_impls._quant import QuantizationError
from requant.reference_impls._walk import Block, copy_model, decoder_blocks, named_linears

_BATCH_TOKENS = 2048  # of one backward pass


@dataclass
class Guide:
    """saliency [n_tokens, g]: mean over each group of channels of (dl/dz)^2; fisher [d_out, d_in]: (dl/dW)^2 summed
    over sequences. l is the mean loss of one sequence, gradients are times grad_scale."""

    saliency: Tensor
    fisher: Tensor


def grouped_saliency(G: Tensor, n_channel_groups: int) -> Tensor:
    """Mean of G^2 over contiguous groups of output channels: [..., d_out] -> [..., g]."""
    if G.shape[-1] % n_channel_groups:
        raise QuantizationError(
            f"n_channel_groups {n_channel_groups} does not divide the {G.shape[-1]} output channels of a layer"
        )
    return G.square().unflatten(-1, (n_channel_groups, -1)).mean(-1)


@torch.no_grad()
def guides(model: nn.Module, calib: Tensor, cfg) -> list[dict[str, Guide]]:
    """Saliency and Fisher diagonal of each linear, by block and name; one backward pass a batch."""
    model = copy_model(model).float()
    found: dict[nn.Linear, Guide] = {}
    for batch in calib.to(model.device).split(max(1, _BATCH_TOKENS // calib.shape[1])):
        for linear, (X, G) in output_gradients(model, batch).items():
            G = G * cfg.grad_scale
            saliency = grouped_saliency(G, cfg.n_channel_groups or 1).flatten(0, 1)
            fisher = (G.mT @ X).square().sum(0)
            if linear in found:
                saliency = torch.cat([found[linear].saliency, saliency])
                fisher += found[linear].fisher
            found[linear] = Guide(saliency, fisher)
    return [
        {name: found[linear] for name, linear in named_linears(block).items()}
        for block in decoder_blocks(model)
    ]


def guided_hessian(X: Tensor, saliency: Tensor) -> Tensor:
    """H_k = X^T diag(s_k) X for each channel group k: X [n_tokens, d_in], saliency [n_tokens, g] -> [g, d_in, d_in]."""
    return torch.stack([gram(X * s.sqrt()[:, None]) for s in saliency.unbind(1)])


def block_hessians(block: Block, guide: dict[str, Guide], cfg) -> dict[str, Tensor]:
    """H [g, d_in, d_in] of every linear of a block, summed over tokens; plain ones have g = 1."""
    linears = named_linears(block.module)
    if cfg.n_channel_groups is None:
        n_tokens = sum(batch.shape[0] * batch.shape[1] for batch in block.inputs)
        return {name: H[None] * n_tokens for name, H in block.hessians(linears).items()}
    sums, done = {}, dict.fromkeys(linears, 0)

    def see(name: str, X: Tensor) -> None:
        s = guide[name].saliency[done[name] : done[name] + len(X)]
        H = guided_hessian(X.float(), s)
        sums[name] = sums[name] + H if name in sums else H
        done[name] += len(X)

    block.observe(linears, see)
    return sums
