"""Libraries that ship methods of the catalog, one function each: a saved reference model in, a quantized model out.

A function takes the folder of the model, calibration tokens int64 [n_samples, seqlen], the seed and what the comparison
sets, and returns a model that computes with the weights (and activations) as the library rounds them. Nothing of a
library is imported before its function is called; `compare_libraries` says how each is installed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from requant.catalog.context import Context

BATCH = 8  # samples a forward pass, and a step of learned methods
BLOCK = "LlamaDecoderLayer"


def load(folder: Path) -> LlamaForCausalLM:
    """The saved model in float32, with the folder as its name: what a library's user starts from."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def batches(calib: Tensor) -> list[dict[str, Tensor]]:
    """Calibration tokens [n_samples, seqlen] as the keyword arguments of forward passes."""
    return [{"input_ids": part} for part in calib.split(BATCH)]


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
