"""LLM-FP4: 4-bit floating point with a real exponent bias, searched, and integer offsets of it for input channels.

Paper     Liu et al., EMNLP 2023, arXiv:2310.16836v1 (tables as README and public transcriptions give them)
Entry     papers/llm_fp4.yaml
Scope     weights and inputs of nn.Linear in decoder blocks and of lm_head, the token embedding; norms, attention
          products and residual stream untouched
Deviates  what the code and the text do differently follows the code (weights are searched first, offsets are counted
          from the rounded bias of each candidate, weights are rounded without the offsets); biases are rounded to
          float16, the precision they are stored in; the error of a search may be taken on evenly strided tokens
          (search_tokens). BERT's and ViT's variants (gradient-weighted error, attention products) are not offered
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as product

from requant.reference_impls import _quant
from requant.reference_impls._activation import QuantInput
from requant.reference_impls._quant import QuantizationError
from requant.reference_impls._residence import visit
from requant.reference_impls._rotation import untie_head
from requant.reference_impls._walk import (
    check_calib,
    copy_model,
    named_linears,
    replace_module,
    walk_blocks,
)


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
        None  # formats tried; None = code: 0 .. b - 2, from 8 bits on 2 .. b - 2
    )
    search: bool = True  # Table 1; False = MinMax: biases from the maxima, E2M1, from 8 bits on E4M3
    channel_shift: bool = True  # Fig. 3; False = the FPQ baseline of Table 1
    fold_shift: bool = False  # Fig. 3: weights take the offsets before they are rounded; not in the code
    n_rounds: int = 3  # code, search_round
    n_grid: int = 100  # code, eq_n: factors gamma_min + i (gamma_max - gamma_min) / n_grid, i < n_grid
    gamma_min: float = 0.01  # code, eq_alpha
    gamma_max: float = 1.2  # code, eq_beta, which is never tried
    search_tokens: int | None = None  # tokens that the error of a search is taken on; None = all

    def __post_init__(self) -> None:
        if min(self.w_bits, self.a_bits, self.embedding_bits) < 2:
            raise QuantizationError(
                "w_bits, a_bits and embedding_bits must be 2 or more: a sign and an exponent"
            )
        if self.n_rounds < 1 or self.n_grid < 1:
            raise QuantizationError("n_rounds and n_grid must be 1 or more")


TINY = {"n_grid": 6, "n_rounds": 1}


# --- the format -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """EeMm: a sign, e exponent bits, m mantissa bits; subnormals exist, no code is spent on infinity or NaN."""

    e: int
    m: int

    def bias(self, peak: Tensor) -> Tensor:
        """The real exponent bias B whose largest value is peak: 2^e - log2 c + log2(2 - 2^-m) - 1 (code)."""
        top = torch.tensor(2 - 2.0**-self.m)
        return 2**self.e - peak.clamp(min=1e-8).log2() + top.log2() - 1

    def peak(self, B: Tensor) -> Tensor:
        """The largest value, c = (2 - 2^-m) 2^(2^e - 1 - B); the text and the code, where Eq. 15 prints 2^(e-1)."""
        return (2 - 2.0**-self.m) * 2.0 ** (2**self.e - 1 - B)

    def step(self, x: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Exponent p = max(1, floor(log2|x| + B)) and step 2^(p - m - B) (code)."""
        p = (x.abs().log2() + B).floor().clamp(min=1)
        return p, 2.0 ** (p - self.m - B)

    def round(self, x: Tensor, B: Tensor) -> Tensor:
        """FP(x; e, m, B): clip to +-c, then to the nearest multiple of the step; B broadcasts against x."""
        c = self.peak(B)
        x = torch.minimum(torch.maximum(x, -c), c)
        _, step = self.step(x, B)
        return (x / step).round() * step

    def encode(self, x: Tensor, B: Tensor) -> Tensor:
        """Codes 0 .. 2^(1+e+m) - 1 of values that `round` gave: sign, exponent, mantissa; int64."""
        p, step = self.step(x, B)
        magnitude = (p - 1) * 2**self.m + (x.abs() / step).round()
        return magnitude.long() + (x < 0).long() * 2 ** (self.e + self.m)

    def decode(self, codes: Tensor, B: Tensor) -> Tensor:
        """Inverse of `encode`: float32."""
        size = 2 ** (self.e + self.m)
        sign, magnitude = 1 - 2 * (codes // size), codes % size
        exponent, mantissa = magnitude >> self.m, magnitude % 2**self.m
        mantissa = mantissa + (exponent > 0) * 2**self.m
        return sign * mantissa * 2.0 ** (exponent.clamp(min=1) - self.m - B)


def first_format(bits: int, cfg: Config) -> Format:
    """Where a search starts, and what MinMax uses: E2M1 at 4 bits, E4M3 at 8, or the only one that is to be tried."""
    e = min(bits - 1, 2 if bits < 8 else 4)
    if cfg.mantissa_bits is not None and len(cfg.mantissa_bits) == 1:
        e = bits - 1 - cfg.mantissa_bits[0]
    return Format(e, bits - 1 - e)


def formats(bits: int, cfg: Config) -> list[Format]:
    """The formats a search tries (code): all but E0 below 8 bits, at least two mantissa bits from there on."""
    if not cfg.search:
        return [first_format(bits, cfg)]
    tried = cfg.mantissa_bits or range(0 if bits < 8 else 2, bits - 1)
    found = [Format(bits - 1 - m, m) for m in tried if m < bits - 1]
    if not found:
        raise QuantizationError(f"mantissa_bits {tuple(tried)} leave no exponent bit at {bits} bits")
    return found


# --- the search -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Biases:
    """A format with the biases of one tensor: [d_out, 1] of a weight; rho + k [d_in] of an activation."""

    format: Format
    B: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return self.format.round(x, self.B)


def stored(B: Tensor) -> Tensor:
    """Round a bias to float16, as it is stored."""
    return B.half().float()


def factors(cfg: Config) -> list[float]:
    """The multiples of the first bias that are tried; 1.2 and 1 itself are not among the published ones (code)."""
    return [cfg.gamma_min + i * (cfg.gamma_max - cfg.gamma_min) / cfg.n_grid for i in range(cfg.n_grid)]


def channel_offsets(rho: Tensor, own: Tensor, format: Format) -> Tensor:
    """k_j = clip(round(B_j) - round(rho), 0, 2^e - 1) for every candidate rho (code): [d_in]."""
    return (own.round() - rho.round()).clamp(0, 2**format.e - 1)


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


def best_format(candidates: Iterable[Biases], error: Callable[[Biases], float]) -> Biases:
    """The candidate with the least error."""
    return min(candidates, key=error)


def search_weight(W: Tensor, X: Tensor, target: Tensor, cfg: Config) -> Biases:
    """Biases and format of W alone, by the error of X Q(W)^T against target [n_tokens, d_out]."""

    def error(Q: Tensor) -> Tensor:
        return (product(X, Q) - target).square().mean(0)

    found = [Biases(one, best_rows(W, one, error, cfg)) for one in formats(cfg.w_bits, cfg)]
    return best_format(found, lambda one: float(error(one(W)).mean()))


@torch.no_grad()
def search_linear(W: Tensor, X: Tensor, peaks: Tensor, cfg: Config) -> tuple[Biases, Biases | None]:
    """Biases and formats of a weight and of its input, in turns (order and grid of the code).

    Args:
        W: [d_out, d_in]; X: [n_tokens, d_in], inputs of the unquantized model; peaks: [d_in] max |X_j| over all tokens.
    Returns: those of the weight, and those of the input or None for 16 bits.
    """
    target = product(X, W)
    if cfg.a_bits >= 16:
        return search_weight(W, X, target, cfg), None
    options = formats(cfg.a_bits, cfg)
    own = {
        one: one.bias(peaks if cfg.channel_shift else peaks.max())
        for one in {*options, first_format(cfg.a_bits, cfg)}
    }

    def inputs(format: Format, rho: Tensor) -> Biases:
        return Biases(format, rho + channel_offsets(rho, own[format], format))

    def error(weight: Biases, given: Biases) -> float:
        return float((product(given(X), weight(W)) - target).square().mean())

    first = first_format(cfg.a_bits, cfg)
    given = inputs(first, stored(own[first].min()))
    start = first_format(cfg.w_bits, cfg)
    weight = Biases(start, stored(start.bias(W.abs().amax(1, keepdim=True))))
    for _ in range(cfg.n_rounds if cfg.search else 0):
        rounded, Q = given(X), weight(W)
        rows = [
            Biases(one, best_rows(W, one, _row_error(rounded, target), cfg))
            for one in formats(cfg.w_bits, cfg)
        ]
        tensors = []
        for one in options:
            tried = [inputs(one, stored(gamma * own[one].min())) for gamma in factors(cfg)]
            losses = [(product(candidate(X), Q) - target).square().mean() for candidate in tried]
            tensors.append(tried[int(torch.stack(losses).argmin())])
        weight = best_format(rows, lambda one, given=given: error(one, given))
        given = best_format(tensors, lambda one, weight=weight: error(weight, one))
    return weight, given


def _row_error(X: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda Q: (product(X, Q) - target).square().mean(0)


def quantize_linear(W: Tensor, X: Tensor, peaks: Tensor, cfg: Config) -> tuple[Tensor, Biases | None]:
    """The dequantized weight of a linear and the rounding of its input."""
    weight, given = search_linear(W, X, peaks, cfg)
    if given is None or not cfg.fold_shift:
        return weight(W), given
    k = (given.B - given.B.min()).round()  # [d_in]; a power of two moves through the product without rounding
    folded = W * 2.0**-k
    Q = search_weight(folded, given(X) * 2.0**k, product(X, W), cfg)(folded)
    return Q * 2.0**k, given


# --- one layer --------------------------------------------------------------------------------------------------------


def _weight_biases(W: Tensor, H: Tensor, cfg: Config) -> Biases:
    """The search without activations: tokens enter by H alone, whose square root stands in for them."""
    values, vectors = torch.linalg.eigh(H.double())
    X = (values.clamp(min=0).sqrt()[:, None] * vectors.T).float()  # X^T X = H
    return search_weight(W, X, product(X, W), cfg)


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

    def error(Q: Tensor) -> Tensor:
        return (Q - W).square().mean(1)

    found = [Biases(one, best_rows(W, one, error, how)) for one in formats(how.w_bits, how)]
    return best_format(found, lambda one: float(error(one(W)).mean()))(W)


class _Seen:
    """Inputs of one linear: all maxima, and some of the tokens."""

    def __init__(self) -> None:
        self.X: list[Tensor] = []

    def see(self, X: Tensor) -> None:
        self.X.append(X.flatten(0, -2).float())

    def quantize(self, linear: nn.Linear, cfg: Config) -> QuantInput:
        X = torch.cat(self.X)
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
    head, final = model.get_output_embeddings(), _Seen()
    handle = head.register_forward_pre_hook(lambda _module, args: final.see(args[0]))
    for batch in calib.split(8):
        model(batch.to(model.device), use_cache=False)
    handle.remove()
    for block in walk_blocks(model, calib, propagate="original"):
        linears = named_linears(block.module)
        seen = {name: _Seen() for name in linears}
        block.observe(linears, lambda name, X, seen=seen: seen[name].see(X))
        for name, linear in linears.items():
            replace_module(block.module, name, seen[name].quantize(linear, cfg))
    name = next(name for name, module in model.named_modules() if module is head)
    with visit(head):
        replace_module(model, name, final.quantize(head, cfg))
    if cfg.embedding_bits < 16:
        with visit(model.get_input_embeddings()) as embedding:
            embedding.weight.copy_(quantize_embedding(embedding.weight.float(), cfg))
    return model
