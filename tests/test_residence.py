"""Models that wait elsewhere than they compute (in memory, on disk, in 16 bits), through every method."""

from __future__ import annotations

import copy
import functools
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import IMPLS, UNLIKE, made, small, tokens, widest
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from requant.catalog import spread
from requant.catalog.claims import Options, measure
from requant.catalog.context import load_impl
from requant.catalog.entry import MeasuredClaim, Source, Tolerance
from requant.catalog.loader import load_catalog
from requant.catalog.measurement import NOT_RUN
from requant.catalog.reference.models import load_tokenizer
from requant.catalog.spread import NoRoom, load_spread
from requant.reference_impls import _residence
from requant.reference_impls._offload import activations_in
from requant.reference_impls._residence import FILES, away, placed, visit
from requant.reference_impls._walk import (
    UnsupportedModelError,
    copy_model,
    decoder_blocks,
    visit_blocks,
    walk_blocks,
)

HOW = {"dtype": torch.float32, "local_files_only": True}
BLOCK = 200_000  # bytes of a block of these models, about
QUANTIZING = [name for name in IMPLS if hasattr(load_impl(name), "quantize")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


@functools.cache
def saved(family: str, folder: Path) -> Path:
    """A checkpoint with bfloat16 weights, as published ones are."""
    made(family, torch.bfloat16).save_pretrained(folder / family)
    return folder / family


def plain_model(family: str) -> nn.Module:
    """What that checkpoint holds, in float32."""
    return made(family, torch.bfloat16).float()


@functools.cache
def spread_model(family: str, folder: Path, limit: int = BLOCK) -> nn.Module:
    offload = folder / "offload"
    offload.mkdir(exist_ok=True)
    model = load_spread(saved(family, folder), HOW, {"cpu": limit}, offload)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def logits(model: nn.Module) -> Tensor:
    return model(tokens()).logits


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", UNLIKE)
def test_a_model_in_memory_and_on_disk_computes_the_same(family: str, folder: Path) -> None:
    model, plain = spread_model(family, folder, 4 * BLOCK), plain_model(family)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert {module.residence.store for module in placed(model)} == {None, FILES}
    assert torch.equal(logits(model), logits(plain))
    twin = copy_model(model)
    assert {module.residence.store for module in placed(twin)} == {FILES}
    assert torch.equal(logits(twin), logits(plain))
    with visit(decoder_blocks(twin)[0]) as block:
        next(iter(block.parameters())).add_(1)
    assert not torch.equal(logits(twin), logits(plain)) and torch.equal(logits(model), logits(plain))
    assert not list((folder / "offload").iterdir())


def test_what_has_room_is_loaded_as_always_and_what_has_none_needs_a_folder(folder: Path) -> None:
    path = saved("llama", folder)
    assert not placed(load_spread(path, HOW, {"cpu": 10**9}, None))
    size = plain_model("llama").get_memory_footprint()
    with pytest.raises(NoRoom, match="--offload-dir"):  # one model has room, but its quantized copy has not
        load_spread(path, HOW, {"cpu": 2 * size - 1}, None)
    model = load_spread(path, HOW, {"cpu": 2 * size - 1}, folder)
    assert not away(model) and away(copy_model(model))


def test_a_claim_is_measured_the_same_on_a_model_larger_than_its_memory(tmp_path: Path) -> None:
    """`--device auto`, from disk to verdict; without a folder for the rest the claim says what it needs."""
    made("gemma2", torch.bfloat16).save_pretrained(tmp_path / "toy" / "model")
    load_tokenizer().save_pretrained(tmp_path / "toy" / "model")
    offload = tmp_path / "offload"
    offload.mkdir()
    here = Options(models_dir=str(tmp_path))
    there = replace(here, device="auto", max_memory={"cpu": BLOCK}, offload_dir=str(offload))
    claim = MeasuredClaim(
        id="made_up", kind="perplexity", statement="made up", model="toy/model", dataset="kjv",
        source=Source(where="nowhere", seen_at="a test", evidence="primary"), setting={}, metric="token_perplexity",
        value=1.0, baselines={}, protocol="reference-kjv-256-short/1", config={"w_bits": 3},
        tolerance=Tolerance(why="a test", rel=1.0), calibration="reference-train-64x256/1",
    )  # fmt: skip
    paper = load_catalog(ids={"gptq"}).papers["gptq"]
    found = [measure(paper, claim, options) for options in (here, there)]
    assert found[0].measured is not None and found[0].reason == found[1].reason
    assert found[0].measured == found[1].measured and found[0].details == found[1].details
    short = measure(paper, claim, replace(there, offload_dir=None))
    assert short.state == NOT_RUN and short.ok and "--offload-dir" in short.reason


# --- bringing and taking back -----------------------------------------------------------------------------------------


def shown(module: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]


def test_a_forward_pass_leaves_everything_where_it_was_also_when_it_is_ended_early(folder: Path) -> None:
    model = spread_model("llama", folder)
    before = shown(model)
    logits(model)
    for block in walk_blocks(model, tokens()):
        block.hessians()  # ends each pass before the last linear
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 4), 10**6))
    assert shown(model) == before and not any(module.residence._guests for module in placed(model))


def test_a_visit_widens_16_bits_and_takes_back_what_changed() -> None:
    model = made("llama", torch.bfloat16)
    weights = copy.deepcopy(model.state_dict())
    for block in visit_blocks(model):
        assert {parameter.dtype for parameter in block.parameters()} == {torch.float32}
        block.mlp.gate_proj.weight.mul_(1 + 2.0**-12)  # below what 16 bits tell apart
        block.mlp.up_proj.weight.mul_(2)
        block.mlp.down_proj.bias = nn.Parameter(torch.ones(64), requires_grad=False)
        block.mlp.register_buffer("codes", torch.arange(3))
    for block in decoder_blocks(model):
        assert block.mlp.down_proj.bias.dtype == torch.bfloat16 and block.mlp.codes.dtype == torch.int64
        assert {parameter.dtype for parameter in block.parameters()} == {torch.bfloat16}
    for name, weight in weights.items():
        assert torch.equal(model.state_dict()[name], weight * (2 if "up_proj" in name else 1))


def test_a_block_put_in_the_place_of_another_waits_like_it(folder: Path) -> None:
    model = copy_model(spread_model("llama", folder))
    for index, block in enumerate(visit_blocks(model)):
        decoder_blocks(model)[index] = copy.copy(block)
        decoder_blocks(model)[index].__dict__.pop("residence", None)
    assert {block.residence.store for block in decoder_blocks(model)} == {FILES}
    assert torch.equal(logits(model), logits(spread_model("llama", folder)))


# --- every method -----------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Notes every operation on a tensor that waits in a file, but for those that bring it or take it back.

    On one device such an operation is slow at worst; with weights that wait in memory and compute on a GPU it fails.
    """

    FREE = (
        "detach",
        "alias",
        "view",
        "t",
        "transpose",
        "slice",
        "select",
        "empty_like",
        "has_compatible_shallow",
    )

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.files: set[int] = set()
        self.found: list[str] = []
        self.quiet = 0
        for name in ("mapped", "_bring", "_take_back"):
            monkeypatch.setattr(_residence, name, self._unwatched(getattr(_residence, name)))
        monkeypatch.setattr(spread, "mapped", _residence.mapped)

    def _unwatched(self, function):
        @functools.wraps(function)
        def run(*args, **kwargs):
            self.quiet += 1
            try:
                result = function(*args, **kwargs)
            finally:
                self.quiet -= 1
            if isinstance(result, Tensor) and result.numel():
                self.files.add(result.untyped_storage().data_ptr())
            return result

        return run

    def waits(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self.files

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        free = any(name in func._schema.name for name in self.FREE)
        if not self.quiet and not free and any(map(self.waits, tree_leaves((args, kwargs)))):
            ours = [frame for frame in traceback.extract_stack() if "reference_impls" in frame.filename]
            self.found.append(f"{func._schema.name} at {Path(ours[-1].filename).name}:{ours[-1].lineno}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    yield Watch(monkeypatch)


@pytest.mark.parametrize("name", QUANTIZING)
def test_a_method_gives_the_same_bits_on_a_model_kept_on_disk_or_says_why_not(
    name: str, folder: Path, watch: Watch
) -> None:
    """Weights are touched only while they are at hand, and no quantized block stays in memory; nor do activations."""
    module = load_impl(name)
    cfg = module.Config(**small(module))
    offload = folder / name
    offload.mkdir()
    model = load_spread(saved("llama", folder), HOW, {"cpu": BLOCK}, offload).requires_grad_(False)
    with watch:
        try:
            with activations_in(offload):
                there = module.quantize(model, tokens(), cfg)
        except UnsupportedModelError as reason:
            assert name in str(reason) and "LlamaForCausalLM" in str(reason)
            return
        here = module.quantize(plain_model("llama"), tokens(), cfg)
    assert not watch.found
    for block in decoder_blocks(there):
        assert all(
            watch.waits(tensor) for tensor in (*block.parameters(), *block.buffers()) if tensor.numel()
        )
    assert torch.equal(logits(there), logits(here))


@pytest.mark.parametrize("name", QUANTIZING)
def test_a_method_works_on_a_model_held_in_16_bits(name: str) -> None:
    """Within a tenth of what it gives in float32, rounded finely, nothing clipped: values near a tie jump by a step.

    The unquantized model itself moves by 0.005.
    """
    module, half = load_impl(name), made("llama", torch.bfloat16)
    finer = {"w_bits": 6, "a_bits": 8, "kv_bits": 8, "qk_bits": 8, "embedding_bits": 8}
    finer = {key: value for key, value in finer.items() if key not in small(module)}
    settings = {key: finer.get(key, value) for key, value in widest(module).items()} | small(module)
    cfg = module.Config(**settings)
    full = logits(module.quantize(plain_model("llama"), tokens(), cfg))
    quantized = module.quantize(half, tokens(), cfg)
    found = logits(quantized)
    assert found.dtype == torch.bfloat16 and torch.isfinite(found).all()
    assert (found.float() - full).norm() < 0.1 * full.norm()
    assert {tensor.dtype for tensor in quantized.parameters() if tensor.is_floating_point()} == {
        torch.bfloat16
    }
    before = made("llama", torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(half.parameters(), before.parameters(), strict=True))
