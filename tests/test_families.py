"""Model families as checkpoints on disk, through all that a published number takes: find, load, quantize, evaluate."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from families import FAMILIES, IMPLS, TRANSFORMING, UNLIKE, VOCABULARY, made, small, tokens, widest
from transformers import AutoModelForCausalLM, GPT2Config, T5Config, T5ForConditionalGeneration

from requant.catalog.claims import Options, measure
from requant.catalog.context import load_impl
from requant.catalog.entry import MeasuredClaim, Paper, Source, Tolerance
from requant.catalog.loader import load_catalog
from requant.catalog.measurement import CONTRADICTED, NOT_RUN, REPRODUCED
from requant.catalog.reference.models import load_tokenizer
from requant.reference_impls import smoothquant
from requant.reference_impls._quant import QuantizationError
from requant.reference_impls._walk import UnsupportedModelError

CLAIM = MeasuredClaim(
    id="made_up", kind="perplexity", statement="made up", model="toy/model", dataset="kjv",
    source=Source(where="nowhere", seen_at="a test", evidence="primary"), setting=MappingProxyType({"w_bits": 8}),
    metric="token_perplexity", value=1.0, baselines=MappingProxyType({}), protocol="reference-kjv-256-short/1",
    config=MappingProxyType({"w_bits": 8}), tolerance=Tolerance(why="a test", rel=0.01),
)  # fmt: skip


@pytest.fixture(scope="module")
def papers() -> dict[str, Paper]:
    return load_catalog(ids={"rtn", "gptq"}).papers


@pytest.fixture(scope="module", params=FAMILIES)
def models_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints with a tiny model of one family, its weights stored in bfloat16 as published ones are."""
    return save(AutoModelForCausalLM, request.param, tmp_path_factory.mktemp(request.param))


def save(maker, family: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = maker.from_config(copy.deepcopy(FAMILIES[family])) if family in FAMILIES else maker
    model.to(torch.bfloat16).save_pretrained(folder / "toy" / "model")
    load_tokenizer().save_pretrained(folder / "toy" / "model")
    return folder


def test_a_family_runs_from_disk_to_verdict(papers: dict[str, Paper], models_dir: Path) -> None:
    """At 8 bits both methods give nearly the unquantized model; a wrong number is contradicted."""
    options = Options(models_dir=str(models_dir))
    first = measure(papers["rtn"], CLAIM, options)
    assert first.state == CONTRADICTED, first.reason
    assert first.reason.startswith("unquantized ")
    plain = float(first.reason.split()[-1])
    assert first.measured == pytest.approx(plain, rel=0.01)
    assert 0 < first.details["kl"] < 0.01
    calibrated = replace(CLAIM, value=float(first.measured), calibration="reference-train-64x256/1")
    second = measure(papers["gptq"], calibrated, options)
    assert second.state == REPRODUCED, second.reason
    assert second.measured != first.measured and second.details["kl"] < 0.01


@pytest.mark.parametrize("family", UNLIKE)
@pytest.mark.parametrize("name", IMPLS)
def test_every_method_runs_on_a_family_or_says_why_not(name: str, family: str) -> None:
    """Random models with grouped queries where the family has them: finite logits, or one error that names both.

    Methods that transform a model first are given 16 bits: what is left then is the transform, which changes no logit,
    and what some clip all the same. Two have no 16 bits.
    """
    model, module = made(family), load_impl(name)
    exact = name in TRANSFORMING - {"double_compression", "i_llm"}
    try:
        settings = widest(module) if exact else small(module)
        quantized = module.quantize(model, tokens(), module.Config(**settings))
    except UnsupportedModelError as reason:
        named = type(model).__name__ in str(reason) or any(
            type(part).__name__ in str(reason) for part in model.modules()
        )
        assert named or "this model" in str(reason), f"does not name what it cannot quantize: {reason}"
        return
    with torch.no_grad():
        logits = quantized(tokens(2)).logits
        before = model(tokens(2)).logits
    assert logits.shape == (2, 32, VOCABULARY) and torch.isfinite(logits).all()
    if exact:
        clips = (
            hasattr(module, "ERROR_FLOOR") or name == "outlier_suppression_plus"
        )  # whose ranges are means of ranges
        bound = 0.2 if clips else 0.01
        assert (logits - before).norm() < bound * before.norm()


@pytest.mark.parametrize("name", IMPLS)
def test_samples_of_several_lengths_are_taken_or_refused(name: str) -> None:
    """SmoothQuant's samples have them. One method or the other can do with that; all others say so at once."""
    model, module = made("llama"), load_impl(name)
    if getattr(module, "DATA_FREE", False):
        return
    several = [tokens(), tokens(2, 20)]
    try:
        quantized = module.quantize(model, several, module.Config(**small(module)))
    except QuantizationError as reason:
        assert "samples of one length; these have 2 lengths" in str(reason)
        assert name not in ("gptq", "smoothquant")
        return
    assert torch.isfinite(quantized(tokens(2)).logits).all()


def test_smoothing_factors_come_from_samples_of_all_lengths() -> None:
    """Channel maxima over parts of different lengths are those over one sample after the other."""
    model, several = made("opt"), [tokens(), tokens(3, 20), tokens(1, 5)]
    together = smoothquant.channel_peaks(model, several)
    one_by_one = [smoothquant.channel_peaks(model, sample[None]) for part in several for sample in part]
    for linear, peak in together.items():
        expected = torch.stack([peaks[linear] for peaks in one_by_one]).amax(0)
        assert torch.allclose(peak, expected, rtol=1e-5)


def test_what_no_method_knows_is_named(papers: dict[str, Paper], tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=0
    )
    folder = save(AutoModelForCausalLM.from_config(config), "gpt2", tmp_path)
    found = measure(papers["rtn"], CLAIM, Options(models_dir=str(folder)))
    assert found.state == NOT_RUN and found.ok
    assert found.reason.startswith("rtn does not support GPT2LMHeadModel (gpt2): ")


def test_a_missing_calibration_set_is_a_reason_and_no_error(papers: dict[str, Paper], tmp_path: Path) -> None:
    folder = save(AutoModelForCausalLM, "llama", tmp_path)
    found = measure(papers["gptq"], replace(CLAIM, calibration=None), Options(models_dir=str(folder)))
    assert found.state == NOT_RUN and found.ok and "no calibration set is named" in found.reason


def test_what_is_no_causal_language_model_is_named(papers: dict[str, Paper], tmp_path: Path) -> None:
    config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    folder = save(T5ForConditionalGeneration(config), "t5", tmp_path)
    found = measure(papers["rtn"], CLAIM, Options(models_dir=str(folder)))
    assert found.state == NOT_RUN and "T5ForConditionalGeneration" in found.reason
    path = folder / "toy" / "model" / "config.json"
    path.write_text(json.dumps({"model_type": "from_tomorrow", "architectures": ["TomorrowForCausalLM"]}))
    found = measure(papers["rtn"], CLAIM, Options(models_dir=str(folder)))
    assert found.state == NOT_RUN and "TomorrowForCausalLM" in found.reason


def test_pickled_weights_only_on_request_and_then_only_tensors(
    papers: dict[str, Paper], tmp_path: Path
) -> None:
    folder = save(AutoModelForCausalLM, "llama", tmp_path) / "toy" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    refused = measure(papers["rtn"], CLAIM, Options(models_dir=str(tmp_path)))
    assert refused.state == NOT_RUN and "--allow-pickle" in refused.reason
    allowed = Options(models_dir=str(tmp_path), allow_pickle=True)
    assert measure(papers["rtn"], CLAIM, allowed).state == CONTRADICTED
    torch.save({"x": Trap()}, folder / "pytorch_model.bin")
    trapped = measure(papers["rtn"], CLAIM, replace(allowed, model_paths={"toy/model": str(folder)}))
    assert trapped.state == NOT_RUN and not Trap.sprung, trapped.reason


class Trap:
    """Runs code when it is unpickled without weights_only."""

    sprung = False

    def __reduce__(self):
        return setattr, (Trap, "sprung", True)


def test_a_gguf_file_is_read(papers: dict[str, Paper], tmp_path: Path) -> None:
    """The same float32 weights, written by the gguf package, give the same number."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    folder = save(AutoModelForCausalLM, "llama", tmp_path) / "toy" / "model"
    file = tmp_path / "toy.gguf"
    write_gguf(gguf, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), file)
    load_tokenizer().save_pretrained(tmp_path)  # tokenizer files beside the GGUF are used first
    theirs = measure(papers["rtn"], CLAIM, Options(model_paths={"toy/model": str(file)}))
    ours = measure(papers["rtn"], CLAIM, Options(models_dir=str(tmp_path)))
    assert theirs.measured == pytest.approx(ours.measured, rel=1e-4), theirs.reason


def write_gguf(gguf, model, file: Path) -> None:
    """A Llama as llama.cpp stores it: its names, and rows of q and k permuted for its rotary embedding."""
    config, writer = model.config, gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                rows, d_in = tensor.shape
                tensor = tensor.view(heads, 2, rows // heads // 2, d_in).transpose(1, 2).reshape(rows, d_in)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
