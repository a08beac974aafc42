"""GuidedQuant: each token counts in a layer's Hessian by how the loss reacts to the layer's outputs there; LNQ rounds.

Paper     Kim et al., ICML 2025, arXiv:2505.07004v4 (numbers below refer to v4)   Entry  papers/guidedquant.yaml
Scope     weights of nn.Linear in decoder blocks; activations, embeddings and lm_head untouched
Deviates  the codebook solves the normal equations in float64 (the code: least squares on a Cholesky factor, float32);
          everything is float32 (the code: bfloat16 model and saliencies); k-means is Lloyd's from k-means++, at most
          50 rounds, ended earlier where it stands still; SpinQuant as a host takes the Hessians of all layers from the
          unquantized rotated model, as the others do; the host QTIP is not offered, plain GPTQ is
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from requant.reference_impls import _codebook, _quant, gptq, spinquant
from requant.reference_impls._calib import check_calib
from requant.reference_impls._codebook import Coded, made_definite, objective
from requant.reference_impls._quant import QuantizationError, check_choices
from requant.reference_impls._walk import copy_model, named_linears, require_whole, walk_blocks
from requant.reference_impls.parts.guidedquant_guidance import block_hessians, guides

_KMEANS_ROUNDS = 50  # code, flash1dkmeans call


@dataclass(frozen=True)
class Config:
    """Defaults: LNQ + GuidedQuant at 2 bits, the 7B and 13B rows of Table 3."""

    w_bits: int = 2  # Table 3 (also 3 and 4)
    quantizer: str = (
        "lnq"  # Table 3; kmeans: its start, SqueezeLLM; gptq: even levels a row; spinquant: Table 5
    )
    n_channel_groups: int | None = 4  # g of the 7B and 13B rows; 2 for 70B, 1 in W4A4; None = plain X^T X
    n_iters: int = 2  # T of the 7B and 13B rows; 1 for 70B (code: 3, of which one fits the codebook only)
    cd_cycles: int = 4  # K of all published rows
    codebook_ridge: float = 1e-7  # code, update_C
    grad_scale: float = 1e3  # code, gradients.py: factor of gradients before they are squared
    damp_ratio: float = 0.01  # quantizers gptq and spinquant: fraction of mean(diag H)
    a_bits: int | None = 4  # Table 5; quantizer spinquant only, as the next two
    kv_bits: int | None = 4  # Table 5; None = 16 bits
    rotation_steps: int = 100  # SpinQuant's: steps of learning rotations
    seed: int = 0  # k-means++; SpinQuant's initial rotations

    def __post_init__(self) -> None:
        check_choices(self, quantizer=("lnq", "kmeans", "gptq", "spinquant"))


# --- LNQ: layer-wise non-uniform quantization -------------------------------------------------------------------------


def lnq(W: Tensor, H: Tensor, fisher: Tensor, cfg: Config) -> Coded:
    """Alternate exact codebooks and descent on the codes; the objective never rises (Proposition 4.1).

    Args:
        W: [d_out, d_in] float32; left unchanged. fisher: [d_out, d_in], the weights of k-means.
        H: [g, d_in, d_in], one for each contiguous group of output channels.
    """
    H = made_definite(H)  # code: 1e-5, 1e-4, ... of the mean diagonal
    now = best = kmeans_start(W, fisher, cfg)
    history = [objective(W, now.weight, H)]
    least = history[0]
    for iteration in range(cfg.n_iters + 1):
        if iteration:
            now = _codebook.descend_codes(W, H, now, cfg.cd_cycles)
            history.append(objective(W, now.weight, H))
        now = _codebook.fit_codebook(W, H, now, cfg.codebook_ridge)
        history.append(objective(W, now.weight, H))
        if history[-1] >= least:
            break  # code: no gain, the best so far is kept
        best, least = now, history[-1]
    return replace(best, history=tuple(history))


def kmeans_start(W: Tensor, fisher: Tensor, cfg: Config) -> Coded:
    return _codebook.kmeans(W, fisher, cfg.w_bits, _KMEANS_ROUNDS, cfg.seed)


# --- weights and models -----------------------------------------------------------------------------------------------


def _code(W: Tensor, H: Tensor, cfg: Config, fisher: Tensor | None) -> Coded:
    if fisher is None:  # its expectation where tokens are independent, averaged over the group of channels
        fisher = H.diagonal(dim1=-2, dim2=-1).repeat_interleave(len(W) // len(H), 0)
    return kmeans_start(W, fisher, cfg) if cfg.quantizer == "kmeans" else lnq(W, H, fisher, cfg)


def _affine(W: Tensor, H: Tensor, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """GPTQ of each channel group on its own Hessian: codes [d_out, 1, d_in], scale and zero point [d_out, 1, 1]."""
    host = gptq.Config(cfg.w_bits, damp_ratio=cfg.damp_ratio)
    parts = [gptq.round_columns(w, h, host) for w, h in zip(W.unflatten(0, (len(H), -1)), H, strict=True)]
    codes, scale, zero = (
        torch.cat([getattr(p, n).T for p in parts]) for n in ("codes", "scale", "zero_point")
    )
    return codes[:, None], scale[..., None], zero[..., None]


def quantize_weight(W: Tensor, H: Tensor, cfg: Config, fisher: Tensor | None = None) -> Tensor:
    """Round W [d_out, d_in] for the Hessian H, dequantized: float32 [d_out, d_in].

    Args:
        H: [d_in, d_in], or [g, d_in, d_in] for g contiguous groups of output channels.
        fisher: [d_out, d_in] weights of k-means; None: the diagonal of H.
    """
    H = H[None] if H.ndim == 2 else H
    if cfg.quantizer == "gptq":
        return _quant.dequantize(*_affine(W, H, cfg)).flatten(1)
    if cfg.quantizer == "spinquant":
        parts = zip(W.unflatten(0, (len(H), -1)), H, strict=True)
        return torch.cat([spinquant.quantize_weight(w, h, _spinquant(cfg)) for w, h in parts])
    return _code(W, H, cfg, fisher).dequantize()


def _spinquant(cfg: Config) -> spinquant.Config:
    return spinquant.Config(
        cfg.w_bits,
        cfg.a_bits,
        cfg.kv_bits,
        damp_ratio=cfg.damp_ratio,
        steps=cfg.rotation_steps,
        seed=cfg.seed,
    )


@torch.no_grad()
def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Gradients of the loss once, then every linear on the inputs that the unquantized model gives it.

    With quantizer spinquant that model is the rotated one; activations and cache are rounded in the end.
    """
    check_calib(calib)
    require_whole(model, "guidedquant")
    spins = cfg.quantizer == "spinquant"
    if spins:
        how = _spinquant(cfg)
        model = spinquant.rotate(model, spinquant.learn_rotations(model, calib, how), how)
    found = guides(model, calib, cfg)
    model = copy_model(model)
    for block, guide in zip(walk_blocks(model, calib, propagate="original"), found, strict=True):
        hessians = block_hessians(block, guide, cfg) if cfg.quantizer != "kmeans" else {}
        for name, linear in named_linears(block.module).items():
            W, H = linear.weight.float(), hessians.get(name, torch.empty(1, 0, 0))
            linear.weight.copy_(quantize_weight(W, H, cfg, guide[name].fisher))
    if spins:
        spinquant.quantize_flow(model, how)
    return model


def pack_weight(W: Tensor, H: Tensor, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer: packed codes and a float16 codebook per output channel (gptq: a scale)."""
    H = H[None] if H.ndim == 2 else H
    if cfg.quantizer == "gptq":
        return _quant.pack_affine(*_affine(W, H, cfg), cfg.w_bits, symmetric=False)
    if cfg.quantizer == "spinquant":
        if len(H) > 1:
            raise QuantizationError("quantizer spinquant stores a matrix of one channel group: give one H")
        return spinquant.pack_weight(W, H[0], _spinquant(cfg))
    return _code(W, H, cfg, None).pack(cfg.w_bits)


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    if cfg.quantizer == "gptq":
        return _quant.unpack_affine(packed, cfg.w_bits, symmetric=False)
    if cfg.quantizer == "spinquant":
        return spinquant.unpack_weight(packed, _spinquant(cfg))
    return _codebook.unpack(packed, cfg.w_bits)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + 16 * 2^b / d_in, the codebook of each channel; with gptq b + (16 + b) / d_in, with spinquant its own."""
    if cfg.quantizer == "gptq":
        return _quant.affine_bits(cfg.w_bits, None, d_in, symmetric=False)
    if cfg.quantizer == "spinquant":
        return spinquant.bits_per_weight(d_out, d_in, _spinquant(cfg))
    return cfg.w_bits + 16 * 2**cfg.w_bits / d_in
