"""Conformance: what every reference implementation must satisfy, found by discovery. No code here names a method.

A module takes part in a check by what it exposes: `quantize_weight` (weights only), `pack_weight` (a
    storage format),
`w_bits` in its Config, and what its entry says under `method`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from requant.catalog.context import load_evidence, load_impl
from requant.catalog.loader import load_catalog
from requant.reference_impls._quant import QuantizationError, storage_bits

CATALOG = load_catalog()
ENTRIES = {paper.impl: paper for paper in CATALOG.papers.values() if paper.impl and paper.id == paper.impl}
IMPLS = sorted(ENTRIES)
MODULES = {name: load_impl(name) for name in IMPLS}
VOCABULARY = {
    "nbits", "n_bit", "n_bits", "wbits", "abits", "bits", "gs", "groupsize", "percdamp", "sym",
    "zero", "blocksize", "nsamples",
}  # fmt: skip


def fields(name: str) -> set[str]:
    return {field.name for field in dataclasses.fields(MODULES[name].Config)}


def with_(attribute: str) -> list[str]:
    return [name for name in IMPLS if hasattr(MODULES[name], attribute)]


def requires(name: str) -> tuple[str, ...]:
    return ENTRIES[name].method.requires


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, bos_token_id=0, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def calib() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (16, 64), generator=generator)


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Tensor]:
    """W [64, 128] with a few large columns and H of correlated inputs."""
    generator = torch.Generator().manual_seed(2)
    W = torch.randn(64, 128, generator=generator) * (1 + 3 * (torch.arange(128) % 37 == 0))
    X = torch.randn(512, 128, generator=generator) @ torch.randn(128, 128, generator=generator) / 8
    return W, X.T @ X / len(X)


def small_config(name: str, **overrides):
    """The default Config, shrunk where its groups do not fit the tiny model."""
    if "group_size" in fields(name) and (MODULES[name].Config().group_size or 0) > 64:
        overrides.setdefault("group_size", 32)
    return MODULES[name].Config(**{**getattr(MODULES[name], "TINY", {}), **overrides})


@pytest.mark.parametrize("name", IMPLS)
def test_leaves_its_input_alone_and_repeats_itself(name: str, tiny: nn.Module, calib: Tensor) -> None:
    before = {key: value.clone() for key, value in tiny.state_dict().items()}
    first, second = (MODULES[name].quantize(tiny, calib, small_config(name)) for _ in range(2))
    assert all(torch.equal(value, before[key]) for key, value in tiny.state_dict().items()), (
        "the input model changed"
    )
    with torch.no_grad():
        expected, logits, again = (model(calib[:2]).logits for model in (tiny, first, second))
    assert logits.shape == expected.shape
    assert logits.dtype == expected.dtype
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, again), "the same seed gave other bits"


@pytest.mark.parametrize("name", IMPLS)
def test_calibration_is_asked_for_exactly_where_the_entry_says(
    name: str, tiny: nn.Module, calib: Tensor
) -> None:
    if requires(name) in ((), ("none",)):
        MODULES[name].quantize(tiny, None, small_config(name))
    else:
        with pytest.raises(QuantizationError, match="calib"):
            MODULES[name].quantize(tiny, None, small_config(name))


@pytest.mark.parametrize("name", with_("DATA_FREE"))
def test_data_free_means_that_neither_tokens_nor_seeds_matter(
    name: str, tiny: nn.Module, calib: Tensor
) -> None:
    assert requires(name) == ("none",)
    assert "seed" not in fields(name)
    with_tokens, without = (MODULES[name].quantize(tiny, x, small_config(name)) for x in (calib, None))
    with torch.no_grad():
        assert torch.equal(with_tokens(calib[:2]).logits, without(calib[:2]).logits)


@pytest.mark.parametrize("name", [name for name in with_("quantize_weight") if "w_bits" in fields(name)])
def test_error_falls_as_bits_grow(name: str, layer: tuple[Tensor, Tensor]) -> None:
    W, H = layer
    errors = []
    for bits in (2, 3, 4, 8):
        Q = MODULES[name].quantize_weight(W, H, small_config(name, w_bits=bits))
        assert Q.shape == W.shape
        assert torch.isfinite(Q).all()
        errors.append(float(((Q - W) @ H * (Q - W)).sum() / (W @ H * W).sum()))
    assert errors == sorted(errors, reverse=True), errors
    # a method that clips on purpose declares what that costs
    floor = getattr(MODULES[name], "ERROR_FLOOR", 2e-3)
    assert errors[-1] < floor, f"8 bits should be nearly exact, relative error {errors[-1]:.2g}"


@pytest.mark.parametrize("name", with_("quantize_weight"))
def test_objective_is_no_worse_than_rounding(name: str, layer: tuple[Tensor, Tensor]) -> None:
    """A calibrated weight method must not lose to round-to-nearest on its own objective at the same width."""
    if "calibration-data" not in requires(name) or "w_bits" not in fields(name):
        pytest.skip("no calibrated bit-width to compare at")
    W, H = layer
    rtn, cfg = MODULES["rtn"], small_config(name, w_bits=3)
    group = getattr(cfg, "group_size", None)
    plain = rtn.quantize_weight(
        W, None, rtn.Config(w_bits=3, group_size=group, symmetric=getattr(cfg, "symmetric", False))
    )
    rounded = MODULES[name].quantize_weight(W, H, cfg)
    if torch.equal(rounded, MODULES[name].quantize_weight(W, torch.eye(len(H)), cfg)):
        pytest.skip("calibration decides something else than the rounding of one layer's weights")
    loss = [float(((Q - W) @ H * (Q - W)).sum()) for Q in (rounded, plain)]
    assert loss[0] <= loss[1] * (1 + 1e-6), loss


@pytest.mark.parametrize("name", with_("pack_weight"))
def test_packed_layer_is_the_quantized_layer_and_has_the_stated_size(
    name: str, layer: tuple[Tensor, Tensor]
) -> None:
    module, (W, H), cfg = MODULES[name], layer, small_config(name)
    packed = module.pack_weight(W, H, cfg)
    assert torch.equal(module.unpack_weight(packed, cfg), module.quantize_weight(W, H, cfg))
    stored, stated = storage_bits(packed) / W.numel(), module.bits_per_weight(*W.shape, cfg)
    assert stored == pytest.approx(stated, abs=8 / W.numel()), "bits_per_weight is not what is stored"


@pytest.mark.parametrize("name", with_("quantize_weight"))
def test_weight_core_is_pure(name: str, layer: tuple[Tensor, Tensor]) -> None:
    W, H = (tensor.clone() for tensor in layer)
    MODULES[name].quantize_weight(W, H, small_config(name))
    assert torch.equal(W, layer[0])
    assert torch.equal(H, layer[1])


@pytest.mark.parametrize("name", [name for name in with_("quantize_weight") if "group_size" in fields(name)])
def test_group_that_does_not_divide_is_refused(name: str, layer: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(QuantizationError, match="group_size"):
        MODULES[name].quantize_weight(*layer, MODULES[name].Config(group_size=48))


@pytest.mark.parametrize("name", IMPLS)
def test_defaults_are_the_entry_s(name: str) -> None:
    defaults = dataclasses.asdict(MODULES[name].Config())
    defaults.pop("seed", None)
    stated = {
        key: list(v) if isinstance(v, tuple) else v for key, v in ENTRIES[name].method.hyperparameters.items()
    }
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in defaults.items()} == stated


@pytest.mark.parametrize("name", IMPLS)
def test_docstring_cites_its_source(name: str) -> None:
    text, arxiv = MODULES[name].__doc__ or "", ENTRIES[name].ids.arxiv
    for line in ("Paper ", "Entry ", "Scope ", "Deviates "):
        assert re.search(rf"(^|\s){line}", text), f"the module docstring lacks its `{line.strip()}` line"
    assert f"papers/{name}.yaml" in text
    assert arxiv is None or f"arXiv:{arxiv}v" in text, "cite the arXiv id with its version"
    assert re.search(r"\b(Eq|Sec|Alg|Algorithm|Table|App)\b\.? ?[A-Z0-9]", inspect.getsource(MODULES[name]))


@pytest.mark.parametrize("name", IMPLS)
def test_a_long_module_leaves_its_evidence_to_another_file(name: str) -> None:
    """And no method depends on evidence, so that changing what a claim measures changes no method."""
    source = inspect.getsource(MODULES[name])
    apart = load_evidence(name) is not MODULES[name]
    named = any(getattr(claim, "function", None) for claim in ENTRIES[name].claims)
    assert apart or not named or source.count("\n") <= 250, f"move them to reference_impls/evidence/{name}.py"
    assert "reference_impls.evidence" not in source
    if apart:
        taken = re.findall(
            r"^from requant\.reference_impls\.[a-z][\w.]* import (?:\(([^)]*)\)|(.*))",
            inspect.getsource(load_evidence(name)),
            re.MULTILINE,
        )
        names = re.findall(r"\w+", " ".join(map("".join, taken)))
        assert names and not [one for one in names if one.startswith("_")], "make what it needs public"
        assert f"papers/{name}.yaml" in (load_evidence(name).__doc__ or "")


FOLDER = Path(load_impl("rtn").__file__).parent
PARTS = sorted(file.stem for file in (FOLDER / "parts").glob("[a-z]*.py"))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_serves_the_method_it_is_named_for_alone(part: str) -> None:
    """What a second method needs is a shared module; what nobody imports is dead."""
    (owner,) = (name for name in IMPLS if part.startswith(f"{name}_"))
    users = {
        file.stem
        for file in FOLDER.rglob("*.py")
        if file.stem != part and re.search(rf"\b{part}\b", file.read_text(encoding="utf-8"))
    }
    assert users, "nothing uses it"
    assert all(user == owner or user.startswith(f"{owner}_") for user in users), f"used by {sorted(users)}"


@pytest.mark.parametrize("name", IMPLS)
def test_config_speaks_the_common_vocabulary(name: str) -> None:
    assert not fields(name) & VOCABULARY, (
        "use w_bits, a_bits, kv_bits, group_size, symmetric, damp_ratio, zero_point"
    )
    assert MODULES[name].Config.__dataclass_params__.frozen
    assert getattr(MODULES[name].Config(), "group_size", None) != -1, "a whole row is group_size=None"


@pytest.mark.parametrize("name", IMPLS)
def test_bits_per_weight_is_a_sane_number(name: str) -> None:
    bits = MODULES[name].bits_per_weight(256, 768, MODULES[name].Config())
    assert math.isfinite(bits)
    assert 0 < bits <= 33


def test_every_claimed_config_exists() -> None:
    """Config overrides in claims name fields that exist, so that a published setting can really be run."""
    for entry in CATALOG.papers.values():
        for claim in entry.claims:
            for key in getattr(claim, "config", None) or {}:
                assert key in fields(entry.impl), f"{entry.id}.{claim.id}: config has no field {key}"
