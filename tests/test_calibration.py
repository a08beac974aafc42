"""Calibration samplers: which tokens are drawn, in which order, compared with loops written out here."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from requant.catalog import calibration
from requant.catalog.calibration import CalibrationError, calibration_tokens, draw
from requant.catalog.corpus import DatasetUnavailable
from requant.catalog.reference import models
from requant.catalog.vocabulary import Calibration, load_vocab

VOCAB = load_vocab()
TEXTS = [" ".join(str(i * 100 + j) for j in range(3 + (7 * i) % 40)) for i in range(60)]


def numbers(text: str, **_options: object) -> dict[str, list[int]]:
    """A tokenizer whose ids are the numbers in the text."""
    return {"input_ids": [int(word) for word in text.split()]}


def small(rule: str | None, **changes: object) -> Calibration:
    known = VOCAB.calibrations["c4-128x2048/1"]
    return replace(known, rule=rule, n_samples=8, seqlen=12, seed=3, **changes)


def test_crops_of_documents_follow_pythons_random_stream() -> None:
    texts = [text for text in TEXTS if len(text.split()) != 12]  # the original stops at exactly seqlen tokens
    random.seed(3)
    expected = []
    while len(expected) < 8:
        ids = numbers(texts[random.randint(0, len(texts) - 1)])["input_ids"]
        if len(ids) >= 12:
            start = random.randint(0, len(ids) - 12 - 1)
            expected.append(ids[start : start + 12])
    assert draw(small("crops-of-documents"), numbers, texts).tolist() == expected


def test_a_document_of_exactly_the_length_is_an_error_as_in_the_original() -> None:
    with pytest.raises(CalibrationError, match="exactly 12 tokens"):
        draw(small("crops-of-documents"), numbers, [" ".join("7" * 1 for _ in range(12))])


def test_crops_of_joined_text() -> None:
    joined = numbers("\n\n".join(TEXTS))["input_ids"]
    random.seed(3)
    starts = [random.randint(0, len(joined) - 12 - 1) for _ in range(8)]
    drawn = draw(small("crops-of-joined"), numbers, TEXTS)
    assert drawn.tolist() == [joined[start : start + 12] for start in starts]


def test_short_texts_are_packed_and_long_ones_skipped() -> None:
    order = np.random.default_rng(3).permutation(len(TEXTS))
    short = [ids for i in order if len(ids := numbers(TEXTS[i])["input_ids"]) <= 12][:8]
    flat = [token for ids in short for token in ids]
    blocks = draw(small("packed-short"), numbers, TEXTS)
    assert blocks.shape == (len(flat) // 12, 12)
    assert blocks.flatten().tolist() == flat[: blocks.numel()]


def test_truncated_texts_keep_their_lengths() -> None:
    """As the official loop over shuffled documents: the first 20, 12 tokens of each at most; here by length."""
    datasets = pytest.importorskip("datasets", reason="shuffles")
    rows = datasets.Dataset.from_dict({"text": TEXTS}).shuffle(seed=3)
    expected = [numbers(rows[i]["text"])["input_ids"][:12] for i in range(20)]
    parts = draw(replace(small("truncated"), n_samples=20), numbers, TEXTS)
    lengths = [part.shape[1] for part in parts]
    assert len(set(lengths)) == len(lengths) > 2 and max(lengths) == 12
    for part in parts:
        assert part.tolist() == [ids for ids in expected if len(ids) == part.shape[1]]
    with pytest.raises(CalibrationError, match="an empty one"):
        draw(small("truncated"), numbers, [""] * 8)


@pytest.mark.parametrize(
    "rule", ["crops-of-documents", "crops-of-joined", "packed-short", "truncated", "truncated-long"]
)
def test_too_little_text_is_an_error(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_ATTEMPTS", 100)
    with pytest.raises(CalibrationError):
        draw(small(rule), numbers, ["1 2 3"])


def test_a_set_without_a_sampler_is_refused() -> None:
    with pytest.raises(CalibrationError, match="packed-short"):
        draw(small(None), numbers, TEXTS)


def test_the_reference_set_is_the_one_claims_use() -> None:
    found = calibration_tokens(VOCAB.calibrations["reference-train-64x256/1"], VOCAB, numbers)
    assert torch.equal(found, models.calibration_tokens(64, 256, 0))


def test_absent_data_is_said_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DatasetUnavailable, match="c4"):
        calibration_tokens(VOCAB.calibrations["c4-128x2048/1"], VOCAB, numbers)
    with pytest.raises(DatasetUnavailable, match="no file"):
        calibration_tokens(VOCAB.calibrations["redpajama-1024x4096/1"], VOCAB, numbers)


def test_a_compressed_local_copy_gives_the_set(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    wanted = replace(VOCAB.calibrations["pile-val-awq-128x512/1"], n_samples=8, seqlen=12)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    with pyarrow.output_stream(str(tmp_path / "val.jsonl.zst"), compression="zstd") as file:
        file.write(rows.encode())
    paths = {"mit-han-lab/pile-val-backup:validation": tmp_path / "val.jsonl.zst"}
    found = calibration_tokens(wanted, VOCAB, numbers, paths=paths)
    assert torch.equal(found, draw(wanted, numbers, TEXTS))


def test_long_texts_are_truncated_and_repetitive_ones_dropped() -> None:
    texts = [*TEXTS, " ".join(["1"] * 4 + ["9"] * 16), " ".join(["1"] * 7 + ["9"] * 16)]
    found = draw(small("truncated-long"), numbers, texts).tolist()
    order = np.random.default_rng(3).permutation(len(texts))
    long = [numbers(texts[i])["input_ids"][:12] for i in order if i != 60 and len(texts[i].split()) >= 12]
    assert found == long[:8]


def test_every_rule_named_in_the_vocabulary_exists() -> None:
    rules = {item.rule for item in VOCAB.calibrations.values()} - {None, "reference"}
    assert rules <= set(calibration._RULES)
