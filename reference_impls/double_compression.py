"""Double compression: INT8 codes made to crowd near zero, pruned where activations are small, then entropy coded.

Paper     Wang et al., Findings of EMNLP 2024, arXiv:2502.15443v1   Entry  papers/double_compression.yaml
Scope     weights and inputs of nn.Linear in decoder blocks; embeddings, norms and lm_head untouched
Deviates  the full text could not be read, and there is no public code. Stated in the abstract and in summaries [S]:
          INT8 weights and activations, channels scaled before rounding, pruning by the l-infinity norm of activations,
          an entropy coder (ANS), only part of the model compressed where speed demands it. Reconstructed [R], and not
          the paper's word: the rule for the scales and where they are folded, one scale a matrix, the pruning score and
          its share, all defaults but the two widths, the coder's table and streams, the greedy choice of layers
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant
from requant.reference_impls._activation import wrap_linears
from requant.reference_impls._anatomy import anatomy, require_pre_norm
from requant.reference_impls._calib import check_calib
from requant.reference_impls._equivalence import sites
from requant.reference_impls._quant import QuantizationError
from requant.reference_impls._walk import copy_model, named_linears, visit_blocks
from requant.reference_impls.smoothquant import channel_peaks

_FLOOR = 1e-5  # lower clamp of activation maxima
_LOW, _WORD = 2**16, 16  # rANS: states lie in [2^16, 2^32), words of 16 bits
_LANES = 32  # [R] interleaved states of one stream


@dataclass(frozen=True)
class Config:
    """Defaults: DC-W8A8. Only the two widths are the paper's."""

    w_bits: int = 8  # [S] abstract: INT8
    a_bits: int | None = 8  # [S] the variant's name, DC-W8A8; None = activations stay as they are
    scale_power: float = (
        0.5  # [R] s_j = max|x_j| ^ power: SmoothQuant's Eq. 4 without weights, at its default
    )
    prune_fraction: float = 0.1  # [R] share of each row set to zero
    probability_bits: int = 14  # [R] precision of the coder's frequencies

    def __post_init__(self) -> None:
        widths = 2 <= self.w_bits <= 8 and self.w_bits <= self.probability_bits <= 14
        if not widths or not 0 <= self.prune_fraction < 1:
            raise QuantizationError(
                f"w_bits must be 2 to 8, probability_bits w_bits to 14 and prune_fraction in [0, 1): {self}"
            )


# --- step 1: compression-aware quantization, and step 2: pruning


def channel_factors(peak: Tensor, power: float) -> Tensor:
    """[R] s_j = max|x_j|^power, divided by the geometric mean of all: float32, same shape as peak [channels]."""
    logs = power * peak.clamp(min=_FLOOR).log()
    return (logs - logs.mean()).exp()


@torch.no_grad()
def rescale(model: nn.Module, calib: Tensor, power: float) -> tuple[nn.Module, dict[nn.Linear, Tensor]]:
    """A copy of the model that computes the same function with weight columns grown by `channel_factors`.

    Returns: the model, and max |x_j| of the new inputs of each linear of its blocks, float32 [d_in].
    Raises: UnsupportedModelError where a norm's output is not used by linears alone.
    """
    require_pre_norm(model)
    check_calib(calib)
    model = copy_model(model)
    peaks = channel_peaks(model, calib)
    for parts in map(anatomy, visit_blocks(model)):
        for site in sites(parts, model.config):
            s = channel_factors(site.written(peaks[site.linears[0]]), power)
            site.fold(s)
            peaks |= {linear: peaks[linear] / site.seen(s) for linear in site.linears}
    return model, peaks


def round_and_prune(W: Tensor, peak: Tensor, cfg: Config) -> tuple[Tensor, Tensor]:
    """Signed codes of W [d_out, d_in] on one grid for the whole matrix, the least important of each row zero.

    Args:
        peak: [d_in] max |x_j| of the inputs; a code's score is |q_ij| max|x_j| [R].
    Returns: codes (integer-valued float, same shape) and scale [1, 1].
    """
    scale = _quant.stored_scale(_quant.absmax_scale(W, cfg.w_bits, per_tensor=True), cfg.w_bits)
    limit = 2 ** (cfg.w_bits - 1) - 1
    codes = (W / scale).round().clamp(-limit, limit)
    lowest = (codes.abs() * peak).argsort(dim=-1, stable=True)[:, : int(cfg.prune_fraction * W.shape[1])]
    return codes.scatter(1, lowest, 0.0), scale


@torch.no_grad()
def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Rescale, round and prune the weights, round activations per token; the lossless stage changes no number."""
    check_calib(calib)
    model, peaks = rescale(model, calib, cfg.scale_power)
    for block in visit_blocks(model):
        for linear in named_linears(block).values():
            codes, scale = round_and_prune(linear.weight.float(), peaks[linear], cfg)
            linear.weight.copy_(codes * scale)
        if cfg.a_bits is not None:
            wrap_linears(block, partial(_quant.absmax_fake_quant, bits=cfg.a_bits))
    return model


# --- step 3: lossless coding


def entropy(codes: Tensor) -> float:
    """Order-0 entropy of integer codes, in bits a code: what no memoryless coder can go below."""
    p = torch.bincount((codes - codes.min()).flatten().long()).double() / codes.numel()
    return float(-torch.special.xlogy(p, p).sum() / math.log(2))


def frequencies(symbols: Tensor, n_symbols: int, probability_bits: int) -> Tensor:
    """Counts scaled to a sum of 2^probability_bits, 1 or more for every symbol that occurs: int64 [n_symbols]."""
    counts, total = torch.bincount(symbols, minlength=n_symbols), 2**probability_bits
    scaled = (counts * total // len(symbols)).clamp(min=1) * (counts > 0)
    scaled[scaled.argmax()] += total - scaled.sum()  # where the change is relatively smallest
    return scaled


def encode(codes: Tensor, scale: Tensor, cfg: Config) -> dict[str, Tensor]:
    """Range asymmetric numeral system (rANS) with one static table for the matrix and interleaved states.

    Args:
        codes: integer-valued [d_out, d_in] within +-(2^(b-1) - 1).
    Returns: frequencies (int16), words (int16, in the order in which they are read), states (int32), scale
        (float16), and shape (int32, not counted as storage).
    """
    symbols = codes.flatten().long() + 2 ** (cfg.w_bits - 1)
    table = frequencies(symbols, 2**cfg.w_bits, cfg.probability_bits)
    starts = table.cumsum(0) - table
    states = torch.full((_LANES,), _LOW, dtype=torch.int64)
    words: list[Tensor] = []
    for row in reversed(symbols.split(_LANES)):  # last first: a stack, read from its top
        f, x = table[row], states[: len(row)]
        full = x >= f << (32 - cfg.probability_bits)
        words.append(x[full] & (2**_WORD - 1))
        x = torch.where(full, x >> _WORD, x)
        states[: len(row)] = (x // f << cfg.probability_bits) + x % f + starts[row]
    stream = torch.cat(words[::-1])
    return {
        "shape": torch.tensor(codes.shape, dtype=torch.int32),
        "frequencies": table.to(torch.int16),
        "words": (stream - 2**15).to(torch.int16),  # shifted into the signed range
        "states": (states - 2**31).to(torch.int32),
        "scale": scale.half(),
    }


def decode(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `encode`: the codes, float32 [d_out, d_in]."""
    shape, table = packed["shape"].tolist(), packed["frequencies"].long()
    starts, symbol_at = table.cumsum(0) - table, torch.repeat_interleave(table)
    words, states = packed["words"].long() + 2**15, packed["states"].long() + 2**31
    rows, read = [], 0
    for begin in range(0, math.prod(shape), _LANES):
        x = states[: min(_LANES, math.prod(shape) - begin)]
        slot = x & (2**cfg.probability_bits - 1)
        row = symbol_at[slot]
        x = table[row] * (x >> cfg.probability_bits) + slot - starts[row]
        short = x < _LOW
        n_words = int(short.sum())
        x[short] = (x[short] << _WORD) | words[read : read + n_words]
        states[: len(x)], read = x, read + n_words
        rows.append(row)
    return (torch.cat(rows) - 2 ** (cfg.w_bits - 1)).float().view(shape)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """An upper bound, reached where nothing is coded: b, and a float16 scale a matrix.

    What coding leaves depends on the codes: `_quant.storage_bits(encode(...))`, near their `entropy`.
    """
    return cfg.w_bits + 16 / (d_out * d_in)


# --- step 4: which layers to keep compressed


def choose_layers(
    plain: Sequence[int], coded: Sequence[int], *, load_rate: float, decode_rate: float, slowdown: float
) -> list[bool]:
    """[R] Layers to keep compressed: most bytes saved per added second first, while the time added stays allowed.

    Args:
        plain, coded: bytes of each layer as INT8 and as coded.
        load_rate: bytes loaded a second; decode_rate: INT8 bytes decoded a second, one after the other.
        slowdown: allowed added time as a fraction of the time to load all layers plain.
    """
    added = [c / load_rate + p / decode_rate - p / load_rate for p, c in zip(plain, coded, strict=True)]
    left = slowdown * sum(plain) / load_rate
    order = sorted(range(len(plain)), key=lambda i: added[i] / max(plain[i] - coded[i], 1e-9))
    chosen = [False] * len(plain)
    for i in order:
        if coded[i] < plain[i] and added[i] <= left:
            chosen[i], left = True, left - max(added[i], 0.0)
    return chosen
