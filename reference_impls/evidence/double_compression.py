"""Evidence on double compression: coding is lossless and near the entropy of real codes, what choosing layers costs.

Entry     papers/double_compression.yaml
"""

from __future__ import annotations

import bz2
import lzma
import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant
from requant.reference_impls._logits import change_of_logits
from requant.reference_impls._walk import decoder_blocks, named_linears
from requant.reference_impls.double_compression import (
    Config,
    choose_layers,
    decode,
    encode,
    entropy,
    rescale,
    round_and_prune,
)


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [linear for block in decoder_blocks(model) for linear in named_linears(block).values()]


def _coded_layer(ctx) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes of a real layer without rescaling, and the layer as stored."""
    W, _, X = ctx.layer("model.layers.1.mlp.down_proj")
    codes, scale = round_and_prune(W, X.abs().amax(0), Config())
    return codes, encode(codes, scale, Config())


def coding_is_lossless(ctx) -> float:
    """Number of codes that decoding gets wrong: of a real layer, of one symbol repeated, and of uniform noise."""
    noise = torch.randint(-127, 128, (33, 65), generator=torch.Generator().manual_seed(0)).float()
    codes, packed = _coded_layer(ctx)
    wrong = int((decode(packed, Config()) != codes).sum())
    for codes in (torch.full((7, 5), 3.0), noise):
        wrong += int((decode(encode(codes, torch.ones(1, 1), Config()), Config()) != codes).sum())
    return float(wrong)


def coded_size_over_entropy(ctx) -> float:
    """How far the stored bits of a real layer, table and states included, lie above its entropy (or below): a ratio."""
    codes, packed = _coded_layer(ctx)
    return abs(_quant.storage_bits(packed) / (codes.numel() * entropy(codes)) - 1)


def rescaling_keeps_the_function(ctx) -> float:
    """Largest change of a logit by rescaling alone, as a share of the largest logit."""
    model, tokens = ctx.reference("reference-outlier"), ctx.calib(8)
    scaled, _ = rescale(model, tokens, Config().scale_power)
    return change_of_logits(model, scaled, tokens[:2])


def _memory(ctx, slowdowns: Sequence[float]) -> list[tuple[float, float]]:
    """For each allowed slow-down the share of INT8 bytes kept, and the time added.

    Layers have the size of their entropy, and decoding all of them would add half of the loading time.
    """
    model, peaks = rescale(ctx.reference(), ctx.calib(8), Config().scale_power)
    codes = [round_and_prune(linear.weight, peaks[linear], Config())[0] for linear in _linears(model)]
    plain = [c.numel() for c in codes]
    coded = [math.ceil(c.numel() * entropy(c) / 8) for c in codes]
    decode_rate, found = sum(plain) / (1.5 * sum(plain) - sum(coded)), []  # loading is at rate 1
    for slowdown in slowdowns:
        chosen = choose_layers(plain, coded, load_rate=1.0, decode_rate=decode_rate, slowdown=slowdown)
        kept = sum(c if yes else p for p, c, yes in zip(plain, coded, chosen, strict=True))
        decoded = sum(p for p, yes in zip(plain, chosen, strict=True) if yes)
        found.append((kept / sum(plain), (kept + decoded / decode_rate) / sum(plain) - 1))
    return found


def choice_respects_the_limit(ctx) -> float:
    """Largest added time in units of what is allowed, over three limits."""
    limits = (0.1, 0.25, 0.4)
    return max(added / limit for (_, added), limit in zip(_memory(ctx, limits), limits, strict=True))


def memory_against_slowdown(ctx) -> list[dict]:
    """Share of the INT8 memory that remains if no slow-down is allowed, a quarter, or the half that decoding adds."""
    limits = {"none": 0.0, "quarter": 0.25, "half": 0.51}  # with room for float error
    kept = _memory(ctx, list(limits.values()))
    return [{"name": name, "value": share} for name, (share, _) in zip(limits, kept, strict=True)]


def entropy_of_codes(ctx) -> list[dict]:
    """Order-0 entropy (bits a weight) of INT8 codes over all linears of reference, or (outlier_*) reference-outlier."""
    rows: dict[str, list[Tensor]] = {}
    for prefix, name in (("", "reference"), ("outlier_", "reference-outlier")):
        plain = ctx.reference(name)
        scaled, peaks = rescale(plain, ctx.calib(8), Config().scale_power)
        weights = [linear.weight for linear in _linears(plain)]
        rows[f"{prefix}per_channel"] = [(W / _quant.absmax_scale(W, 8)).round() for W in weights]
        rows[f"{prefix}per_tensor"] = [(127 * W / W.abs().max()).round() for W in weights]
        for label, share in (("rescaled", 0.0), ("pruned_10", 0.1), ("pruned_30", 0.3)):
            cfg = Config(prune_fraction=share)
            rows[prefix + label] = [round_and_prune(m.weight, peaks[m], cfg)[0] for m in _linears(scaled)]
    values = {
        name: math.fsum(entropy(c) * c.numel() for c in codes) / sum(c.numel() for c in codes)
        for name, codes in rows.items()
    }
    return [{"name": name, "value": value} for name, value in (values | {"published": 8 / 2.2}).items()]


def coders(ctx) -> list[dict]:
    """Bits a weight of one real layer under rANS and under dictionary and block-sorting coders, headers included."""
    codes, packed = _coded_layer(ctx)
    raw = codes.to(torch.int8).numpy().tobytes()
    others = {"deflate": zlib.compress, "lzma": lzma.compress, "bzip2": bz2.compress}
    bits = {name: 8 * len(compress(raw)) / codes.numel() for name, compress in others.items()}
    bits |= {"best_other": min(bits.values()), "ans": _quant.storage_bits(packed) / codes.numel()}
    return [{"name": name, "value": value} for name, value in bits.items()]


def pruning_scores(ctx) -> list[dict]:
    """Output error of a layer with 30 % pruned, scored with activations or not, in units of the latter."""
    W, _, X = ctx.layer("model.layers.1.mlp.down_proj")
    errors = {}
    for name, peak in (("by_activation", X.abs().amax(0)), ("by_magnitude", torch.ones(W.shape[1]))):
        codes, scale = round_and_prune(W, peak, Config(prune_fraction=0.3))
        errors[name] = float((X @ (codes * scale - W).T).square().sum())
    return [{"name": name, "value": error / errors["by_magnitude"]} for name, error in errors.items()]
