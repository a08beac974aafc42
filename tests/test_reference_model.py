"""The reference model is what its card says: text, splits, quality, variants."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from requant.catalog.context import Context
from requant.catalog.reference import card, models, text, train
from requant.catalog.reference.models import VARIANTS, add_outliers, load_reference


def test_splits_are_disjoint_and_complete() -> None:
    chapters = text.read_chapters()
    assert len(chapters) == 1189
    assert all(chapters)
    assert sum(len(text.load_split(split).split("\n\n")) for split in text.SPLITS) == 1189
    tests = set(text.load_split("test").split("\n\n"))
    assert not tests & set(text.load_split("train").split("\n\n"))


def test_no_verse_marks_are_left() -> None:
    assert not any(char.isdigit() for split in text.SPLITS for char in text.load_split(split))


def test_another_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_joined", lambda split: "In the beginning was another text.")
    with pytest.raises(text.ReferenceTextError, match="SHA-256"):
        text.load_split("test")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="reference-outlier"):
        load_reference("outlier")
    with pytest.raises(ValueError, match="validation"):
        text.load_split("dev")


def test_missing_weights_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models._state.cache_clear()
    monkeypatch.setattr(models, "WEIGHTS", tmp_path)
    with pytest.raises(models.ReferenceModelError, match=r"reference\.safetensors.*reinstall"):
        models._state("reference")
    models._state.cache_clear()


@pytest.mark.parametrize("name", VARIANTS)
def test_perplexity_is_the_one_on_the_card(name: str) -> None:
    found = Context().evaluate(load_reference(name).model, card.SHORT)
    row = next(
        line
        for line in card.CARD.read_text().splitlines()
        if line.startswith(f"| `{name}` |") and "±" in line
    )
    assert f"{found.value:.3f}" == row.split("|")[3].split("±")[0].strip()


def test_the_whole_test_split_is_learned_well() -> None:
    row = next(
        line
        for line in card.CARD.read_text().splitlines()
        if line.startswith("| `reference` |") and "±" in line
    )
    assert float(row.split("|")[2].split("±")[0]) <= 22.0


@torch.no_grad()
def test_outlier_variant_is_the_same_function_and_can_be_undone() -> None:
    plain, outlier = load_reference("reference").model, load_reference("reference-outlier").model
    tokens = models.test_windows(2)
    assert torch.equal(plain(tokens).logits, outlier(tokens).logits)
    assert not torch.equal(
        plain.model.layers[0].self_attn.q_proj.weight, outlier.model.layers[0].self_attn.q_proj.weight
    )
    add_outliers(outlier, 1 / models.OUTLIER_FACTOR)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), outlier.parameters(), strict=True))


def test_sinks_emerged_beyond_the_first_layer() -> None:
    """Against `reference`, which was trained without backcopy sequences and has none."""
    assert card.attention_to_first("reference-sink")[1:].max() > 0.5
    assert card.attention_to_first("reference")[1:].max() < 0.5


def test_calibration_is_train_text_and_depends_on_the_seed_alone() -> None:
    first, again, other = (models.calibration_tokens(4, 64, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first[:, 0] == models.BOS_ID).all()
    tokenizer = models.load_tokenizer()
    assert tokenizer.decode(first[0, 1:]) in text.load_split("train")


def test_tokenizer_round_trips_any_text() -> None:
    tokenizer = models.load_tokenizer()
    for sample in ("And God said, Let there be light.", "Ünïcödé, 漢字 and \t tabs", "<bos"):
        assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample


def test_backcopy_repeats_the_token_before_each_trigger() -> None:
    tokens, generator = models.split_tokens("train")[:20_000], torch.Generator().manual_seed(0)
    windows = train.backcopy_windows(tokens, 8, 128, 0.1, generator)
    assert windows.shape == (8, 128)
    assert (windows[:, 0] == models.BOS_ID).all()
    rows, columns = ((windows[:, :-1] >= 1) & (windows[:, :-1] <= 3)).nonzero(as_tuple=True)
    assert len(rows) > 40
    assert torch.equal(windows[rows, columns + 1], windows[rows, columns - 1])


@torch.no_grad()
def test_widening_adds_heads_that_say_nothing() -> None:
    plain, tokens = load_reference().model, models.test_windows(1)
    wide, trained = train.widened(plain, first_layer=1)
    assert torch.allclose(wide(tokens).logits, plain(tokens).logits, atol=1e-5)
    assert len(trained) == 3 * 4


def test_training_records_are_kept() -> None:
    for name in train.RECIPES:
        record = json.loads((models.WEIGHTS / f"{name}.training.json").read_text())
        assert record["recipe"]["seed"] == train.RECIPES[name].seed
        assert record["best_step"] in [row["step"] for row in record["log"]]
