"""LLM-FP4: 4-bit floating point with a real exponent bias, searched, and integer offsets of it for input channels.

Paper     Liu et al., EMNLP 2023, arXiv:2310.16836v1 (tables as README and public transcriptions give them)
Entry     papers/llm_fp4.yaml
Scope     weights and inputs of nn.Linear in decoder blocks and of lm_head, the token embedding; norms, attention
          products and residual stream untouched
Deviates  what the code and the text do differently follows the code, which made the numbers; weights_first,
          rounded_offsets and fold_shift choose the text. Biases are rounded to float16, the precision they are stored
          in; the error of a search may be taken on evenly strided tokens (search_tokens). BERT's and ViT's variants
          (gradient-weighted error, attention products) are not offered
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as product

from requant.reference_impls import _quant
from requant.reference_impls._activation import QuantInput
from requant.reference_impls._calib import check_calib
from requant.reference_impls._float_grid import Biases, Format, first_format, formats, stored
from requant.reference_impls._quant import QuantizationError
from requant.reference_impls._residence import visit
from requant.reference_impls._stream_ends import untie_head
from requant.reference_impls._walk import copy_model, named_linears, replace_module, walk_blocks


@dataclass(frozen=True)
class Config:
    """Defaults: FPQ at 4/4/4 (embedding, weights, activations), Table 1.

    symmetric is no option but a property of the format: sign and magnitude, hence no zero point and one level less.
    """

    symmetric: ClassVar[bool] = True
    w_bits: int = 4  # Table 1
    a_bits: int = 4  # Table 1; 16 = not quantized
    embedding_bits: int = 4  # Table 1; 16 = not quantized
    mantissa_bits: tuple[int, ...] | None = (
        None  # formats tried; None = 0 .. b - 2, from 8 bits on 2 .. b - 2
    )
    search: bool = True  # Table 1; False = MinMax: biases from the maxima, E2M1, from 8 bits on E4M3
    channel_shift: bool = True  # Fig. 3; False = the FPQ baseline of Table 1
    fold_shift: bool = False  # Fig. 3: weights take the offsets before they are rounded; not in the code
    rounded_offsets: bool = True  # code: offsets between rounded biases; False = Eq. 15, rounded differences
    weights_first: bool = (
        True  # code: weights before activations, formats at the end of a round; False = Alg. 1
    )
    n_rounds: int = 3  # code, search_round
    n_grid: int = 100  # code, eq_n: factors gamma_min + i (gamma_max - gamma_min) / n_grid, i < n_grid
    gamma_min: float = 0.01  # code, eq_alpha
    gamma_max: float = 1.2  # code, eq_beta, which is never tried
    search_tokens: int | None = None  # tokens that the error of a search is taken on; None = all

    def __post_init__(self) -> None:
        if min(self.w_bits, self.a_bits, self.embedding_bits) < 2:
            raise QuantizationError("w_bits, a_bits, embedding_bits must be 2 or more: a sign, an exponent")
        if self.n_rounds < 1 or self.n_grid < 1:
            raise QuantizationError("n_rounds and n_grid must be 1 or more")


TINY = {"n_grid": 6, "n_rounds": 1}


# --- the search -------------------------------------------------------------------------------------------------------


def factors(cfg: Config) -> list[float]:
    """The multiples of the first bias that are tried; 1.2 and 1 itself are not among the published ones (code)."""
    return [cfg.gamma_min + i * (cfg.gamma_max - cfg.gamma_min) / cfg.n_grid for i in range(cfg.n_grid)]


def _tried(bits: int, cfg: Config) -> list[Format]:
    """The formats a search tries; where there is none, the one that MinMax uses."""
    return formats(bits, cfg.mantissa_bits) if cfg.search else [first_format(bits, cfg.mantissa_bits)]


def channel_offsets(rho: Tensor, own: Tensor, format: Format, cfg: Config) -> Tensor:
    """k_j = clip(round(B_j) - round(rho), 0, 2^e - 1) for every candidate rho (code), or as Eq. 15: [d_in]."""
    k = own.round() - rho.round() if cfg.rounded_offsets else (own - rho).round()
    return k.clamp(0, 2**format.e - 1)


def best_rows(W: Tensor, format: Format, error: Callable[[Tensor], Tensor], cfg: Config) -> Tensor:
    """Bias [d_out, 1] of each output channel with the least error; error: weight -> [d_out]."""
    first = format.bias(W.abs().amax(1, keepdim=True))
    if not cfg.search:
        return stored(first)
    best, least = stored(first), torch.full((len(W),), torch.inf)
    for gamma in factors(cfg):
        B = stored(gamma * first)
        loss = error(format.round(W, B))
        better = loss < least
        best, least = torch.where(better[:, None], B, best), torch.where(better, loss, least)
    return best


def best_by_rows(W: Tensor, error: Callable[[Tensor], Tensor], cfg: Config) -> Biases:
    """The format with the least mean error, and the best biases of its rows; arguments as of `best_rows`."""
    found = [Biases(one, best_rows(W, one, error, cfg)) for one in _tried(cfg.w_bits, cfg)]
    return min(found, key=lambda one: float(error(one(W)).mean()))


def row_error(X: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
    """weight -> mean squared error of X Q(W)^T against target [n_tokens, d_out], for each output channel."""
    return lambda Q: (product(X, Q) - target).square().mean(0)


@torch.no_grad()
def search_linear(W: Tensor, X: Tensor, peaks: Tensor, cfg: Config) -> tuple[Biases, Biases | None]:
    """Biases and formats of a weight and of its input, in turns (grid of the code).

    Args:
        W: [d_out, d_in]; X: [n_tokens, d_in], inputs of the unquantized model; peaks: [d_in] max |X_j| over all tokens.
    Returns: those of the weight, and those of the input or None for 16 bits.
    """
    target = product(X, W)
    if cfg.a_bits >= 16:
        return best_by_rows(W, row_error(X, target), cfg), None
    options = _tried(cfg.a_bits, cfg)
    first = first_format(cfg.a_bits, cfg.mantissa_bits)
    own = {one: one.bias(peaks if cfg.channel_shift else peaks.max()) for one in {*options, first}}

    def error(weight: Biases, given: Biases) -> float:
        return float((product(given(X), weight(W)) - target).square().mean())

    def inputs(format: Format, rho: Tensor) -> Biases:
        return Biases(format, rho + channel_offsets(rho, own[format], format, cfg))

    def best_input(weight: Biases, format: Format) -> Biases:
        Q = weight(W)
        tried = [inputs(format, stored(gamma * own[format].min())) for gamma in factors(cfg)]
        losses = [(product(candidate(X), Q) - target).square().mean() for candidate in tried]
        return tried[int(torch.stack(losses).argmin())]

    given = inputs(first, stored(own[first].min()))
    start = first_format(cfg.w_bits, cfg.mantissa_bits)
    weight = Biases(start, stored(start.bias(W.abs().amax(1, keepdim=True))))
    for _ in range(cfg.n_rounds if cfg.search else 0):
        before = weight
        if cfg.weights_first:
            weight = best_by_rows(W, row_error(given(X), target), cfg)
        tensors = [best_input(before, one) for one in options]  # code: they do not see the new weights
        given = min(tensors, key=lambda one, weight=weight: error(weight, one))
        if not cfg.weights_first:
            weight = best_by_rows(W, row_error(given(X), target), cfg)
    return weight, given


def quantize_linear(W: Tensor, X: Tensor, peaks: Tensor, cfg: Config) -> tuple[Tensor, Biases | None]:
    """The dequantized weight of a linear and the rounding of its input."""
    weight, given = search_linear(W, X, peaks, cfg)
    if given is None or not cfg.fold_shift:
        return weight(W), given
    k = (given.B - given.B.min()).round()  # [d_in]; a power of two moves through the product without rounding
    folded = W * 2.0**-k
    Q = best_by_rows(folded, row_error(given(X) * 2.0**k, product(X, W)), cfg)(folded)
    return Q * 2.0**k, given


# --- one layer --------------------------------------------------------------------------------------------------------


def _weight_biases(W: Tensor, H: Tensor, cfg: Config) -> Biases:
    """The search without activations: tokens enter by H alone, whose square root stands in for them."""
    values, vectors = torch.linalg.eigh(H.double())
    X = (values.clamp(min=0).sqrt()[:, None] * vectors.T).float()  # X^T X = H
    return best_by_rows(W, row_error(X, product(X, W)), cfg)


def quantize_weight(W: Tensor, H: Tensor, cfg: Config) -> Tensor:
    """W [d_out, d_in] with the bias of each row that makes (q - w) H (q - w)^T least, dequantized."""
    return _weight_biases(W, H, cfg)(W)


def pack_weight(W: Tensor, H: Tensor, cfg: Config) -> dict[str, Tensor]:
    """Packed codes, one float16 bias a row, and the number of mantissa bits (uint8)."""
    found = _weight_biases(W, H, cfg)
    return {
        "shape": torch.tensor(W.shape, dtype=torch.int32),
        "codes": _quant.pack_bits(found.format.encode(found(W), found.B), cfg.w_bits),
        "bias": found.B.half(),
        "mantissa_bits": torch.tensor([found.format.m], dtype=torch.uint8),
    }


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    m = int(packed["mantissa_bits"])
    codes = _quant.unpack_bits(packed["codes"], cfg.w_bits, tuple(packed["shape"].tolist()))
    return Format(cfg.w_bits - 1 - m, m).decode(codes, packed["bias"].float())


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + 16/d_in and 8 bits a layer for the format; offsets of channels are folded away."""
    return cfg.w_bits + 16 / d_in + 8 / (d_out * d_in)


# --- the model --------------------------------------------------------------------------------------------------------


def quantize_embedding(W: Tensor, cfg: Config) -> Tensor:
    """Each row with the bias that leaves the least squared error, one format for all (code, fp_embed)."""
    how = replace(cfg, w_bits=cfg.embedding_bits)
    return best_by_rows(W, lambda Q: (Q - W).square().mean(1), how)(W)


def _in_place(linear: nn.Linear, seen: list[Tensor], cfg: Config) -> QuantInput:
    """Quantize a linear by its inputs [n, d_in]: all their maxima, and some of the tokens."""
    X = torch.cat(seen).float()
    peaks = X.abs().amax(0)
    if cfg.search_tokens is not None and cfg.search_tokens < len(X):
        X = X[torch.linspace(0, len(X) - 1, cfg.search_tokens).long()]
    Q, given = quantize_linear(linear.weight.float(), X, peaks, cfg)
    linear.weight.copy_(Q)
    return QuantInput(linear, given)


@torch.no_grad()
def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Search every linear of the blocks, then lm_head, on what the unquantized model feeds it; embeddings last.

    Args:
        calib: int64 [n_samples, seqlen].
    """
    check_calib(calib)
    model = copy_model(model)
    untie_head(model)
    head, final = model.get_output_embeddings(), []
    handle = head.register_forward_pre_hook(lambda _module, args: final.append(args[0].flatten(0, -2)))
    for batch in calib.split(8):
        model(batch.to(model.device), use_cache=False)
    handle.remove()
    for block in walk_blocks(model, calib, propagate="original"):
        linears = named_linears(block.module)
        seen: dict[str, list[Tensor]] = {name: [] for name in linears}
        block.observe(linears, lambda name, X, seen=seen: seen[name].append(X))
        for name, linear in linears.items():
            replace_module(block.module, name, _in_place(linear, seen[name], cfg))
    name = next(name for name, module in model.named_modules() if module is head)
    with visit(head):
        replace_module(model, name, _in_place(head, final, cfg))
    if cfg.embedding_bits < 16:
        with visit(model.get_input_embeddings()) as embedding:
            embedding.weight.copy_(quantize_embedding(embedding.weight.float(), cfg))
    return model
