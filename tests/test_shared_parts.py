"""The shared parts of the implementations: packing, quantizers, second moments, and the walk over model families."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, SIZES, made
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, OPTConfig

from requant.kernels import int8_matmul
from requant.reference_impls import _quant
from requant.reference_impls._activation import transform_attention
from requant.reference_impls._anatomy import anatomy, block_anatomies, fold_channel_scale, require_pre_norm
from requant.reference_impls._calib import check_calib
from requant.reference_impls._equivalence import add_missing_biases, sites
from requant.reference_impls._folded import Folded
from requant.reference_impls._hessian import damped, gram, inverse_cholesky
from requant.reference_impls._integer_product import integer_product
from requant.reference_impls._quant import QuantizationError
from requant.reference_impls._walk import UnsupportedModelError, decoder_blocks, named_linears, walk_blocks


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest) -> torch.nn.Module:
    return made(request.param)


TOKENS = torch.randint(0, 128, (3, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_walk_with_samples_of_several_lengths(family: torch.nn.Module) -> None:
    """Every block sees what it sees in the model, sample by sample, and second moments count every token once."""
    parts = [TOKENS[:2], TOKENS[2:, :7], TOKENS[:1, :1]]
    seen: dict[object, list[Tensor]] = {}

    def keep(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        seen.setdefault(module, []).append(args[0] if args else kwargs["hidden_states"])

    blocks = decoder_blocks(family)
    name = next(iter(named_linears(blocks[1])))
    watched = [*blocks, blocks[1].get_submodule(name)]
    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in watched]
    for part in parts:
        family(part, use_cache=False)
    for handle in handles:
        handle.remove()
    with pytest.raises(QuantizationError, match="one length"):
        next(walk_blocks(family, parts))
    for block in walk_blocks(family, parts, several_lengths=True):
        for ours, theirs in zip(block.inputs, seen[block.module], strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)
        H = block.hessians()[name]
    X = torch.cat([x.flatten(0, -2) for x in seen[watched[-1]]])
    assert torch.allclose(H, X.T @ X / len(X), atol=1e-5) and len(X) == 40 + 7 + 1


@torch.no_grad()
def test_walk_gives_each_block_the_inputs_it_has_in_the_model(family: torch.nn.Module) -> None:
    seen: list[Tensor] = []

    def keep(_module, _args, output) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in decoder_blocks(family)]
    family(TOKENS, use_cache=False)
    for handle in handles:
        handle.remove()
    blocks = list(walk_blocks(family, TOKENS, batch_size=2))
    assert len(blocks) == 2
    for block, expected in zip(blocks, seen, strict=True):
        assert torch.allclose(torch.cat(block.run()), expected, atol=1e-6)


@torch.no_grad()
def test_hessians_are_second_moments_of_what_the_linears_see(family: torch.nn.Module) -> None:
    block = next(walk_blocks(family, TOKENS, batch_size=2))
    inputs: dict[str, list[Tensor]] = {}
    names = {id(module): name for name, module in block.module.named_modules()}
    linears = [module for module in block.module.modules() if isinstance(module, torch.nn.Linear)]
    handles = [
        m.register_forward_pre_hook(
            lambda m, args: inputs.setdefault(names[id(m)], []).append(args[0].flatten(0, -2))
        )
        for m in linears
    ]
    block.run()
    for handle in handles:
        handle.remove()
    for name, H in block.hessians().items():
        X = torch.cat(inputs[name])
        assert torch.allclose(H, X.T @ X / len(X), atol=1e-5), name


@torch.no_grad()
def test_channel_scales_fold_without_changing_the_function(family: torch.nn.Module) -> None:
    before = family(TOKENS).logits
    generator = torch.Generator().manual_seed(3)
    for parts in block_anatomies(family):
        for norm, linears in parts.norm_groups:
            fold_channel_scale(norm, linears, torch.rand(linears[0].in_features, generator=generator) + 0.5)
    assert torch.allclose(family(TOKENS).logits, before, atol=1e-5)


@torch.no_grad()
def test_missing_biases_change_nothing_and_take_shifts(family: torch.nn.Module) -> None:
    """Afterwards a shift goes through every norm and every value, in families with and without biases of their own."""
    model, generator = copy.deepcopy(family), torch.Generator().manual_seed(3)
    before = family(TOKENS).logits
    for block in decoder_blocks(model):
        bare = add_missing_biases(block, model.config)
        assert add_missing_biases(block, model.config) == []
        assert torch.allclose(model(TOKENS).logits, before, atol=1e-5), bare
        now = Folded(block)
        for site in sites(anatomy(block), model.config):
            assert site.can_learn_shift == site.shifts
            if site.shifts:
                d = torch.randn(site.written(site.linears[0].weight[0]).shape, generator=generator)
                site.fold_into(now, torch.ones_like(d), d)
        now.write()
    assert torch.allclose(model(TOKENS).logits, before, atol=1e-4)


@torch.no_grad()
def test_attention_transform_sees_queries_keys_and_values(family: torch.nn.Module) -> None:
    before, shapes = family(TOKENS).logits, []

    def double_then_halve(q: Tensor, k: Tensor, v: Tensor):
        shapes.append((q.shape, k.shape, v.shape))
        return q * 2, k / 2, v

    try:
        for parts in block_anatomies(family):
            transform_attention(family, parts.attn, double_then_halve)
    except UnsupportedModelError:
        assert (
            family.config.model_type == "bloom"
        )  # the one family here without transformers' attention interface
        return
    assert torch.allclose(family(TOKENS).logits, before, atol=1e-5)
    assert [shape[0] for shape in shapes] == [(3, 4, 20, 16)] * 2


def test_post_norm_models_are_refused() -> None:
    config = OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64, do_layer_norm_before=False)
    with pytest.raises(UnsupportedModelError, match="OPT-350M"):
        require_pre_norm(AutoModelForCausalLM.from_config(config))


def test_bloom_that_adds_norm_outputs_to_the_stream_is_refused() -> None:
    config = BloomConfig(
        hidden_size=64, n_layer=1, n_head=4, vocab_size=128, apply_residual_connection_post_layernorm=True
    )
    with pytest.raises(UnsupportedModelError, match="residual stream"):
        require_pre_norm(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    "calib", [None, torch.zeros(4, dtype=torch.long), torch.zeros(2, 3), torch.zeros(0, 4, dtype=torch.long)]
)
def test_bad_calibration_is_refused(calib: Tensor | None) -> None:
    with pytest.raises(QuantizationError, match="calib"):
        check_calib(calib)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=70))
def test_packing_round_trips_without_waste(bits: int, values: list[int]) -> None:
    codes = torch.tensor([value % 2**bits for value in values], dtype=torch.int64)
    packed = _quant.pack_bits(codes, bits)
    assert packed.numel() == -(-len(values) * bits // 8)
    assert torch.equal(_quant.unpack_bits(packed, bits, (len(values),)), codes)


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(QuantizationError, match=r"0\.\.7"):
        _quant.pack_bits(torch.tensor([8]), 3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 8), st.booleans(), st.integers(0, 10_000), st.sampled_from([1e-3, 1.0, 50.0]))
def test_affine_grid_contains_zero_and_stays_within_half_a_step(
    bits: int, symmetric: bool, seed: int, size: float
) -> None:
    x = torch.randn(3, 17, generator=torch.Generator().manual_seed(seed)) * size
    scale, zero_point = _quant.choose_qparams(x, bits, symmetric)
    codes = _quant.quantize(x, scale, zero_point, bits)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    assert torch.equal(zero_point, zero_point.round())  # so that 0.0 is a point of the grid
    steps = ((_quant.dequantize(codes, scale, zero_point) - x) / scale).abs().max()
    assert (
        steps <= (1.01 if symmetric or bits == 2 else 0.51) + 2**bits * 2**-10
    )  # float16 scales; clipped top code


def test_absmax_per_tensor_does_not_depend_on_the_batch() -> None:
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    together = _quant.absmax_fake_quant(x, 8, per_tensor=True)
    assert torch.equal(
        together, torch.cat([_quant.absmax_fake_quant(part, 8, per_tensor=True) for part in x.split(1)])
    )


@pytest.mark.parametrize("d_in", [1, 5, 192, 193, 500])
def test_gram_is_the_plain_product(d_in: int) -> None:
    X = torch.randn(300, d_in, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(gram(X), X.T @ X, rtol=1e-4, atol=1e-3)
    assert torch.allclose(gram(X), gram(X).T, rtol=1e-5)


def test_inverse_cholesky_inverts_or_raises() -> None:
    X = torch.randn(200, 30, generator=torch.Generator().manual_seed(0))
    H = damped(X.T @ X, 0.01)
    U = inverse_cholesky(H)
    assert torch.allclose(U.T @ U @ H, torch.eye(30), atol=1e-4)
    assert torch.equal(U, U.triu())
    with pytest.raises(QuantizationError, match="damp_ratio"):
        inverse_cholesky(-torch.eye(3))


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("peak", [1, 127, 128, 2**20, 2**40])
@pytest.mark.parametrize(
    ("left", "right"),
    [((3, 5), (5, 4)), ((3, 1), (1, 4)), ((2, 3, 70), (70, 9)), ((2, 3, 4, 6), (2, 3, 6, 5))],
)
def test_integer_products_are_exact(left, right, peak: int, vnni: bool, monkeypatch) -> None:
    """In every width, with the largest values each may have, with int8 instructions and without."""
    monkeypatch.setattr(int8_matmul, "has_fast_int_mm", lambda: vnni)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-peak, peak + 1, size, generator=generator) for size in (left, right))
    a[..., 0, :] = peak
    b = b.clamp(-(2**16), 2**16)
    expected = (a[..., None].long() * b.unsqueeze(-3).long()).sum(-2)
    assert torch.equal(integer_product(a, b).long(), expected)
