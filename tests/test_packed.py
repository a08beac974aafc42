"""Packed layers: codes read off weights, tensors kept while a method runs, and files that are not what was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from requant.catalog.grid import read_grid
from requant.catalog.packed import METADATA, WEIGHTS, NotPacked, PackedFileError, load_packed, save_packed
from requant.catalog.plain import NotPlain, take_apart
from requant.catalog.recording import Records, recording
from requant.reference_impls import _quant, billm, quarot, rtn


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture
def packed(tiny: nn.Module, tmp_path: Path) -> Path:
    cfg = rtn.Config(w_bits=3)
    with recording(rtn) as records:
        model = rtn.quantize(tiny, None, cfg)
    (tmp_path / "out").mkdir()
    save_packed(take_apart(model, tiny, cfg), rtn, cfg, records, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_grid_is_read_off_exactly(bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    scale = torch.rand(64, 8, 1, generator=generator) * 10.0 ** torch.randint(
        -6, 3, (64, 8, 1), generator=generator
    )
    scale = _quant.stored_scale(scale, bits)
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else torch.randint(0, 2**bits, scale.shape)
    W = _quant.dequantize(torch.randint(0, 2**bits, (64, 8, 4), generator=generator), scale, zero)
    W[0] = 0
    grid = read_grid(W, bits, symmetric)
    assert grid is not None
    assert torch.equal(grid.k * grid.scale, W)
    assert grid.k.amax(-1).sub(grid.k.amin(-1)).max() < 2**bits
    assert read_grid(torch.randn(4, 8, 16, generator=generator), bits, symmetric) is None


def test_a_recorded_run_gives_the_same_model_and_leaves_the_method_alone(tiny: nn.Module) -> None:
    before, tokens = rtn.quantize_weight, torch.arange(64)[None]
    with recording(rtn) as records, torch.no_grad():
        recorded = rtn.quantize(tiny, None, rtn.Config())(tokens).logits
    assert rtn.quantize_weight is before
    assert len(records.matrices) == 14
    with torch.no_grad():
        assert torch.equal(rtn.quantize(tiny, None, rtn.Config())(tokens).logits, recorded)
    with pytest.raises(_quant.QuantizationError), recording(rtn):
        rtn.quantize(tiny, None, rtn.Config(group_size=48))
    assert rtn.quantize_weight is before


def test_nothing_is_packed_where_it_is_needless(tiny: nn.Module) -> None:
    with recording(rtn, needless=lambda W: W.shape == (64, 64)) as records:
        rtn.quantize(tiny, None, rtn.Config())
    assert records.skipped
    assert not records.matrices


def test_what_was_not_recorded_and_has_no_grid_is_refused(tiny: nn.Module, tmp_path: Path) -> None:
    calib = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    plain = take_apart(billm.quantize(tiny, calib, billm.Config()), tiny, billm.Config())
    with pytest.raises(NotPacked, match=r"billm .* q_proj|billm .*layers\.0"):
        save_packed(plain, billm, billm.Config(), Records(), tmp_path)


def test_what_only_the_method_can_build_is_refused(tiny: nn.Module) -> None:
    cfg = quarot.Config(rounding="rtn", a_bits=None)
    with pytest.raises(NotPlain, match="cannot describe"):
        take_apart(quarot.quantize(tiny, None, cfg), tiny, cfg)
    hooked = rtn.quantize(tiny, None, rtn.Config())
    hooked.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(NotPlain, match="hooks"):
        take_apart(hooked, tiny, rtn.Config())


def test_altered_and_truncated_files_are_refused(packed: Path) -> None:
    whole = (packed / WEIGHTS).read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    for content in (bytes(flipped), whole[: len(whole) // 2], b""):
        (packed / WEIGHTS).write_bytes(content)
        with pytest.raises(PackedFileError, match="SHA-256"):
            load_packed(packed)
    (packed / WEIGHTS).unlink()
    with pytest.raises(PackedFileError, match=f"no {WEIGHTS}"):
        load_packed(packed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"), ({"format": "gguf"}, "format"), ({"method": "../x"}, "method"),
        ({"method": "nothing"}, "nothing"), ({"config": {"wbits": 3}}, "wbits"), ({"matrices": {}}, "missing"),
        ({"matrices": 3}, "describe"), ({"sha256": None}, "SHA-256"), ({"activations": {"x": {"input": {}}}}, "static"),
    ],
)  # fmt: skip
def test_metadata_that_does_not_fit_is_one_line(packed: Path, change: dict, message: str) -> None:
    path = packed / METADATA
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(PackedFileError, match=message) as caught:
        load_packed(packed)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_packed_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PackedFileError, match=METADATA):
        load_packed(tmp_path)
    (tmp_path / METADATA).write_text("[1]")
    with pytest.raises(PackedFileError, match="format"):
        load_packed(tmp_path)
