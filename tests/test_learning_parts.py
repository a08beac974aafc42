"""Shared parts of methods that learn or keep outliers: descent, folding of scales and shifts, containers, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, OPTConfig, PhiConfig

from requant.reference_impls import _learn, _outliers, _quant, gptq
from requant.reference_impls._anatomy import block_anatomies
from requant.reference_impls._equivalence import sites
from requant.reference_impls._hadamard import hadamard_transform, random_orthogonal
from requant.reference_impls._offload import activations_in
from requant.reference_impls._quant import QuantizationError, storage_bits
from requant.reference_impls._rotation import fuse_norms
from requant.reference_impls._stiefel import CayleySGD
from requant.reference_impls._straight_through import affine_ste, clipped_grid, range_ends
from requant.reference_impls._walk import UnsupportedModelError, copy_model, walk_blocks
from requant.reference_impls.parts.resq_basis_change import ChangeOfBasis, rotate_sublayers

SIZES = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SIZES, intermediate_size=128, num_key_value_heads=2),
    "opt": OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64),
    "phi": PhiConfig(**SIZES, intermediate_size=128),
    "bloom": BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4),
}
TOKENS = torch.randint(0, 128, (6, 20), generator=torch.Generator().manual_seed(0))


def made(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family]).eval().requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_and_shifts_leave_the_logits_alone(family: str) -> None:
    model, generator = made(family), torch.Generator().manual_seed(1)
    with torch.no_grad():
        before = model(TOKENS).logits
        for parts in block_anatomies(model):
            for site in sites(parts, model.config):
                n = site.linears[0].in_features // site.repeat
                shift = torch.randn(n, generator=generator) if site.shifts else None
                site.fold(0.5 + torch.rand(n, generator=generator), shift)
        assert (model(TOKENS).logits - before).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_sublayers_with_bases_of_their_own_leave_the_logits_alone(family: str) -> None:
    """But for the rounding of what changes its basis, where that is asked for."""
    model, generator = made(family), torch.Generator().manual_seed(1)
    with torch.no_grad():
        before = model(TOKENS).logits
        fuse_norms(model)
        rotate_sublayers(model, [random_orthogonal(64, generator) for _ in range(5)])
        assert (model(TOKENS).logits - before).abs().max() < 1e-5
        changes = [module for module in model.modules() if isinstance(module, ChangeOfBasis)]
        assert len(changes) == 4
        for change in changes:
            change.bits = 4
        assert (copy_model(model)(TOKENS).logits - before).abs().max() > 1e-2


def test_one_norm_for_both_sublayers_has_no_place_for_two_bases() -> None:
    model = made("phi")
    fuse_norms(model)
    with pytest.raises(UnsupportedModelError, match="PhiDecoderLayer"):
        rotate_sublayers(model, [torch.eye(64)] * 5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_descent_on_the_manifold_finds_the_nearest_rotation(momentum: float) -> None:
    """Least squares: from the identity to a rotation by small angles, always orthogonal."""
    A = 0.1 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    target, R = torch.matrix_exp(A - A.T), torch.nn.Parameter(torch.eye(16))
    optimizer = CayleySGD([R], lr=0.1, momentum=momentum, generator=torch.Generator().manual_seed(0))
    for _ in range(60):
        optimizer.zero_grad()
        (R - target).square().sum().backward()
        optimizer.step()
    assert (R - target).abs().max() < 0.02
    assert (R @ R.T - torch.eye(16)).abs().max() < 1e-4


def test_a_shift_where_none_passes_is_refused() -> None:
    model = made("llama")
    up = sites(block_anatomies(model)[0], model.config)[-1]
    with pytest.raises(QuantizationError, match="no shift passes"):
        up.fold(torch.ones(128), torch.ones(128))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.data())
def test_outliers_come_back_and_cost_what_is_stated(d_out: int, d_in: int, data: st.DataObject) -> None:
    W = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(d_in)).half().float()
    n = data.draw(st.integers(0, d_in))
    columns = _outliers.top_columns(W.square().sum(0), n)
    packed = _outliers.pack_columns(W, columns)
    rest = W[:, _outliers.other_columns(columns, d_in)]
    assert torch.equal(_outliers.join_columns(rest, packed), W)
    assert storage_bits(packed) / W.numel() == pytest.approx(_outliers.column_bits(n, d_out, d_in))
    mask = W.median() < W
    packed = _outliers.pack_entries(W, mask)
    assert torch.equal(_outliers.place_entries(W * ~mask, packed), W)
    expected = _outliers.entry_bits(int(mask.sum()), d_out, d_in)
    assert storage_bits(packed) / W.numel() == pytest.approx(expected)


def test_without_clipping_the_learnable_grid_is_the_plain_one() -> None:
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    one = torch.ones(8, 1)
    (scale, zero), (plain_scale, plain_zero) = (
        clipped_grid(x, 4, one, one),
        _quant.choose_qparams(x, 4),
    )
    assert torch.equal(_quant.stored_scale(scale, 4), plain_scale) and torch.equal(zero, plain_zero)
    rounded = affine_ste(x, plain_scale, plain_zero, 4)
    assert (rounded - _quant.fake_quant(x, 4)).abs().max() < 1e-6


def test_signed_steps_are_as_long_as_the_rate() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.0]))
    optimizer = _learn.SignSGD([weight], lr=0.25)
    _learn.descend(lambda _: (weight * torch.tensor([5.0, 1e-3, 0.0])).sum(), optimizer, [TOKENS[0]])
    assert weight.tolist() == [0.75, -2.25, 0.0]


def test_the_best_parameters_are_kept_and_infinite_losses_refused() -> None:
    weight = torch.nn.Parameter(torch.tensor(0.3))
    optimizer = torch.optim.SGD([weight], lr=1.5)  # overshoots: every step is worse than the one before
    losses = _learn.descend(lambda _: weight.square(), optimizer, [TOKENS[0]] * 4, keep_best=True)
    assert losses == sorted(losses) and weight.item() == pytest.approx(0.3)
    with pytest.raises(FloatingPointError, match="step 0"):
        _learn.descend(lambda _: weight / 0, optimizer, [TOKENS[0]])


def test_transforms_first_used_in_an_evaluation_still_pass_gradients() -> None:
    """Evaluations run in inference mode; what the transform keeps there must not poison later learning."""
    with torch.inference_mode():
        hadamard_transform(torch.ones(2, 36))
    x = torch.ones(2, 36, requires_grad=True)
    weight = torch.ones(36, requires_grad=True)
    (hadamard_transform(x * weight) * x).sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(weight.grad).all()


def test_both_streams_of_a_walk() -> None:
    """Targets are the untouched model's hidden states, inputs those of the blocks as they were left."""
    model = made("llama")
    with torch.no_grad():
        states = model(TOKENS, output_hidden_states=True).hidden_states
    work = copy_model(model)
    for block in walk_blocks(work, TOKENS, propagate="both", batch_size=4):
        assert torch.equal(torch.cat(block.original_inputs), states[block.index])
        assert torch.equal(torch.cat(block.inputs), states[0]) == (block.index == 0)
        if block.index == 0:
            assert (torch.cat(block.targets) - states[1]).abs().max() < 1e-6
        block.module.mlp.down_proj.weight.mul_(1.5)


def test_activations_on_disk_change_no_bit_and_leave_no_file(tmp_path: Path) -> None:
    model = made("llama")
    here = gptq.quantize(model, TOKENS, gptq.Config(w_bits=3))
    with activations_in(tmp_path):
        there = gptq.quantize(model, TOKENS, gptq.Config(w_bits=3))
    state = here.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in there.state_dict().items())
    assert not list(tmp_path.iterdir())
    with (
        pytest.raises(QuantizationError, match="does not exist or cannot be written"),
        activations_in(tmp_path / "no"),
    ):
        pass


def test_range_ends_have_the_gradient_of_amin_and_amax() -> None:
    """Where several entries are the least or the largest, they share it."""
    x = torch.randn(6, 3, 40, generator=torch.Generator().manual_seed(0))
    x[0, 0, :5], x[1] = 9.0, 0.0
    x.requires_grad_()
    weights = torch.randn(2, 6, 3, 1, generator=torch.Generator().manual_seed(1))
    plain = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    found, expected = (torch.autograd.grad(ends, x, tuple(weights)) for ends in (range_ends(x), plain))
    assert torch.allclose(found[0], expected[0], rtol=1e-6, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(range_ends(x), plain, strict=True))
