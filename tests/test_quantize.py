"""Leaving with a model: what is saved loads back to the same logits, and a damaged folder says so.

"The same" is bit for bit here, tolerance 0: weights are integers times float16 steps, whose products float32
holds exactly, so the loaded model has the very weights that were evaluated and runs the very same operations.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from requant.catalog import quantize
from requant.catalog.cli import app
from requant.catalog.context import load_impl
from requant.catalog.packed import load_packed
from requant.catalog.quantize import Done, Job, QuantizeError, quantize_to_folder
from requant.catalog.reference import models
from requant.catalog.settings import read_config

COMPRESSED = [
    ("rtn", {}),
    ("rtn", {"w_bits": 3, "symmetric": True, "group_size": 32}),
    ("rtn", {"w_bits": 8, "group_size": 16}),
    ("rtn", {"w_bits": 2, "group_size": 16}),
    ("gptq", {}),
    ("gptq", {"w_bits": 3, "group_size": 32, "act_order": True, "static_groups": True}),
    ("awq", {"group_size": 32}),
    ("quarot", {"a_bits": None, "kv_bits": None, "online": False}),
    ("smoothquant", {}),
    ("smoothquant", {"w_granularity": "per_channel", "quantize_bmm_input": False}),
]
OWN = [
    ("gptq", {"w_bits": 5, "group_size": 32, "act_order": True}),
    ("awq", {"group_size": 32, "w_bits": 3}),
    ("billm", {}),
    ("quip", {}),
    ("quarot", {"a_bits": None, "kv_bits": None, "online": False}),
    ("rtn", {"a_bits": 8}),
    ("smoothquant", {"a_granularity": "per_token"}),
    ("smoothquant", {}),
]


def random_llama(folder: Path, **config) -> Path:
    """A folder of a random bfloat16 Llama with the reference tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=None, pad_token_id=None,
        **config,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    models.load_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("tiny") / "random-llama")


@pytest.fixture(autouse=True)
def small_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every calibration set is the tokens of `calib()`: what is tested is saving, not drawing."""
    known = {name: replace(one, seqlen=64) for name, one in quantize._calibrations().items()}
    monkeypatch.setattr(quantize, "_calibrations", lambda: known)
    monkeypatch.setattr(quantize, "calibration_tokens", lambda *_: calib())
    monkeypatch.setattr(models, "calibration_tokens", lambda **_: calib())


def calib() -> Tensor:
    return torch.randint(0, 2048, (8, 64), generator=torch.Generator().manual_seed(1))


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def save(folder: Path, out: Path, method: str, settings: dict, **how) -> tuple[Done, Tensor]:
    """Run the job, and the method in memory: what was done, and the logits to expect."""
    texts = [f"{key}={value}" for key, value in settings.items()]
    set_ = {} if method == "rtn" else {"calibration": "c4-128x2048/1"}
    done = quantize_to_folder(Job(method, str(folder), out, texts, **set_, **how))
    impl = load_impl(method)
    return done, logits(impl.quantize(load(folder), calib(), impl.Config(**settings)), calib()[:2])


@pytest.mark.parametrize(("method", "settings"), COMPRESSED, ids=str)
def test_transformers_loads_the_same_logits(method: str, settings: dict, tiny: Path, tmp_path: Path) -> None:
    done, expected = save(tiny, tmp_path / "out", method, settings)
    assert done.layout == "compressed-tensors", done.remark
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), calib()[:2]), expected)
    form = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["format"]
    assert form == ("int-quantized" if method == "smoothquant" else "pack-quantized")
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"tokenizer.json", "provenance.json"}


@pytest.mark.parametrize(("method", "settings"), OWN, ids=str)
def test_own_layout_comes_back_bit_for_bit(method: str, settings: dict, tiny: Path, tmp_path: Path) -> None:
    done, expected = save(tiny, tmp_path / "out", method, settings, layout="requant")
    assert done.layout == "requant"
    assert torch.equal(logits(load_packed(tmp_path / "out"), calib()[:2]), expected)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    folder = random_llama(tmp_path / "tied", tie_word_embeddings=True)
    for layout, loader in (
        ("requant", load_packed),
        ("compressed-tensors", AutoModelForCausalLM.from_pretrained),
    ):
        done, expected = save(folder, tmp_path / layout, "gptq", {}, layout=layout)
        loaded = loader(tmp_path / layout)
        assert done.layout == layout
        assert torch.equal(logits(loaded, calib()[:2]), expected)
        assert loaded.get_input_embeddings().weight.data_ptr() == loaded.lm_head.weight.data_ptr()
        size = sum(file.stat().st_size for file in (tmp_path / layout).glob("*.safetensors"))
        assert size < 2 * 2048 * 64 * 2, "the embedding is stored once, in 16 bits"


def test_stored_bits_are_the_stated_bits(tiny: Path, tmp_path: Path) -> None:
    done, _ = save(tiny, tmp_path / "out", "rtn", {"group_size": 32}, layout="requant")
    impl = load_impl("rtn")
    assert done.bits == pytest.approx(impl.bits_per_weight(64, 64, impl.Config(group_size=32)))


def test_auto_says_why_it_chose_the_own_layout(tiny: Path, tmp_path: Path) -> None:
    done, _ = save(tiny, tmp_path / "a", "gptq", {"group_size": 32, "act_order": True})
    assert done.layout == "requant"
    assert "q_proj" in done.remark
    done, _ = save(tiny, tmp_path / "b", "rtn", {"a_bits": 8})
    assert done.layout == "requant"
    assert "dynamic activations" in done.remark


def test_dynamic_activations_in_the_other_layout_differ_a_little(tiny: Path, tmp_path: Path) -> None:
    """The format divides by 127.5 where the method divides by 127: other roundings, errors of the same size."""
    settings = {"w_bits": 8, "a_bits": 8}
    done, expected = save(tiny, tmp_path / "out", "rtn", settings, layout="compressed-tensors")
    loaded = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), calib()[:2])
    error = (expected - logits(load(tiny), calib()[:2])).square().mean().sqrt()
    assert "differ" in done.remark
    assert 0 < (loaded - expected).square().mean().sqrt() < 2 * error


def test_reference_model_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    result = CliRunner().invoke(app, ["quantize", "rtn", "--model", "reference", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "compressed-tensors" in result.output
    rtn, tokens = load_impl("rtn"), models.test_windows(2)
    expected = logits(rtn.quantize(models.load_reference().model, None, rtn.Config()), tokens)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out), tokens), expected)
    assert [path.name for path in out.parent.iterdir()] == ["out"], "something temporary was left behind"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gptqq"], "did you mean gptq"),
        (["gptq", "--config", "wbits=3"], "did you mean w_bits"),
        (["gptq", "--config", "w_bits"], "key=value"),
        (["gptq", "--config", "w_bits=many"], "type int"),
        (["gptq", "--config", "w_bits=0"], "1..16"),
        (["gptq", "--config", "act_order=1"], "type bool"),
        (["gptq", "--config", "group_size=48"], "does not divide"),
        (["gptq", "--layout", "gguf"], "compressed-tensors"),
        (["gptq", "--calibration", "c5-128x2048/1"], "did you mean c4-128x2048/1"),
        (["gptq", "--model", "no/such-model"], "--models-dir"),
        (["gptq", "--model", "./nowhere/at/all"], "no such folder"),
        (["rtn", "--config", "w_bits=16", "--layout", "compressed-tensors"], "w_bits is 16"),
        (["smoothquant", "--config", "alpha=2"], "alpha"),
        (["quarot", "--config", "rounding=rtn"], "no layout can hold that"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_wrong_use_is_one_line_and_leaves_nothing(arguments: list[str], message: str, tmp_path: Path) -> None:
    model = [] if "--model" in arguments else ["--model", "reference"]
    result = CliRunner().invoke(app, ["quantize", *arguments, *model, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_a_real_model_needs_a_calibration_set(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="--calibration ID"):
        quantize_to_folder(Job("gptq", str(tiny), tmp_path / "out"))
    with pytest.raises(QuantizeError, match="reference models"):
        quantize_to_folder(Job("gptq", str(tiny), tmp_path / "out", calibration="reference-train-64x256/1"))


def test_a_checkpoint_that_cannot_be_used_is_one_line(tiny: Path, tmp_path: Path) -> None:
    quantize_to_folder(Job("rtn", str(tiny), tmp_path / "once"))
    broken = tmp_path / "broken"
    for change, message in (
        (None, "quantized already"),
        (lambda: (broken / "config.json").write_text("{"), "cannot be loaded"),
        (lambda: (broken / "config.json").write_text('{"model_type": "nothing"}'), "cannot be loaded"),
        (lambda: (broken / "model.safetensors").write_bytes(b"1234"), "cannot be loaded"),
        (lambda: (broken / "model.safetensors").unlink(), "no safetensors"),
        (lambda: (broken / "tokenizer.json").write_text("["), "cannot be loaded"),
    ):
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(tiny, broken)
        if change is not None:
            change()
        with pytest.raises(QuantizeError, match=message) as caught:
            quantize_to_folder(Job("rtn", str(broken if change else tmp_path / "once"), tmp_path / "out"))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for out, message in ((tmp_path, "not empty"), (tmp_path / "notes.txt", "is a file")):
        with pytest.raises(QuantizeError, match=message):
            quantize_to_folder(Job("rtn", str(tiny), out))
    with pytest.raises(QuantizeError, match=r"no config\.json"):
        quantize_to_folder(Job("rtn", str(tmp_path), tmp_path / "out"))


def test_settings_take_the_type_of_their_field() -> None:
    gptq = load_impl("gptq")
    made = read_config(gptq, ["w_bits=3", "group_size=none", "damp_ratio=0.1", "act_order=True"], seed=0)
    assert made == gptq.Config(w_bits=3, group_size=None, damp_ratio=0.1, act_order=True)
    bitnet = load_impl("bitnet")
    assert read_config(bitnet, ["adam_betas=0.9, 0.95"], seed=7) == bitnet.Config(
        adam_betas=(0.9, 0.95), seed=7
    )
