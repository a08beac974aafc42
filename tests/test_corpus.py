"""Windows of every protocol on invented text with hand-computed answers. One token a character, BOS is 1."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random

import pytest

from requant.catalog.corpus import DatasetUnavailable, EvaluationError, documents, local_file, token_windows
from requant.catalog.protocols import get_protocol

BOS = 1


class Characters:
    """Tokenizer with one token a character; `adds_bos` as LLaMA's does, or not, as GPT-2's."""

    bos_token_id = BOS
    eos_token_id = 2

    def __init__(self, adds_bos: bool = True):
        self.adds_bos = adds_bos

    def __call__(self, text, add_special_tokens, verbose):
        start = [BOS] if add_special_tokens and self.adds_bos else []
        return {"input_ids": start + [ord(character) for character in text]}


def short(name, length, stride=None, *, selection=None, first=None):
    """A protocol with small windows and otherwise as published."""
    protocol = get_protocol(name)
    windows = dataclasses.replace(
        protocol.windows, length=length, stride=length if stride is None else stride
    )
    chosen = dataclasses.replace(protocol.selection, **(selection or {}))
    score = dataclasses.replace(protocol.score, first=first or protocol.score.first)
    return dataclasses.replace(protocol, windows=windows, selection=chosen, score=score)


def show(windows):
    """Windows as (text, first scored position), BOS as ^."""
    return [
        ("".join("^" if i == BOS else chr(i) for i in ids.tolist()), first) for ids, first in windows.windows
    ]


def test_gptq_joins_rows_and_drops_the_remainder():
    found = token_windows(["ab\n", "", "cd\n"], Characters(), short("gptq-wikitext2-2048/1", 4))
    assert show(found) == [("^ab\n", 1), ("\n\n\n\n", 1)]  # "cd\n" is the remainder
    assert (found.checks.characters, found.checks.tokens, found.checks.windows) == (10, 11, 2)
    assert found.n_scored == 6  # the first token of a window is never scored


def test_without_bos_every_token_moves_by_one():
    found = token_windows(["ab\n", "", "cd\n"], Characters(), short("gptq-wikitext2-2048-nobos/1", 4))
    assert show(found) == [("ab\n\n", 1), ("\n\n\nc", 1)]


@pytest.mark.parametrize(("name", "expected"), [("old", ["^ab\n", "\ncd\n"]), ("new", ["^ab ", "cd e"])])
def test_ptb_variants_join_differently(name, expected):
    found = token_windows(["ab", "cd", "ef"], Characters(), short(f"gptq-ptb-{name}-2048/1", 4))
    assert [text for text, _ in show(found)] == expected


def test_c4_new_takes_the_first_documents_and_cuts_the_text():
    protocol = short("gptq-c4-new-2048/1", 3, selection={"n": 2, "max_tokens": 6})
    found = token_windows(["abc", "defgh", "ijk"], Characters(), protocol)
    assert show(found) == [("^ab", 1), ("c d", 1)]
    assert found.checks.tokens == 10  # before the cut, which is what exposes a wrong tokenizer


def test_bos_over_each_first_token():
    protocol = short("bosfirst-c4-new-2048/1", 4)
    found = token_windows(["abcdefg"], Characters(), protocol)
    assert show(found) == [("^abc", 2), ("^efg", 2)]


def test_c4_old_draws_as_the_official_loop_does():
    """The same stream of random numbers as a loop over Python's own generator, seeded with 0."""
    rng = random.Random(5)
    texts = ["".join(rng.choices("abcdefgh", k=n)) for n in (3, 9, 30, 2, 17, 6, 25, 4, 12, 40)]
    length, expected = 8, []
    state = random.getstate()
    random.seed(0)
    for _ in range(20):
        while True:
            text = "^" + texts[random.randint(0, len(texts) - 1)]
            if len(text) >= length:
                break
        start = random.randint(0, len(text) - length - 1)
        expected.append(text[start : start + length])
    random.setstate(state)
    protocol = short("gptq-c4-old-2048/1", length, selection={"n": 20, "min_tokens": length})
    found = token_windows(texts, Characters(), protocol)
    assert [text for text, _ in show(found)] == expected
    assert random.getstate() == state


def test_c4_old_stops_where_the_official_code_stops():
    protocol = short("gptq-c4-old-2048/1", 4, selection={"n": 2, "min_tokens": 4})
    with pytest.raises(EvaluationError, match="exactly 4 tokens"):
        token_windows(["abc"], Characters(), protocol)  # BOS + 3
    with pytest.raises(EvaluationError, match="none of 2 documents has 4 tokens"):
        token_windows(["a", "b"], Characters(), protocol)


def test_strided_windows_score_each_token_once():
    found = token_windows(["abcdefg"], Characters(False), short("hf-strided-wikitext2-1024-512/1", 4, 2))
    assert show(found) == [("abcd", 1), ("cdef", 2), ("efg", 2)]
    assert found.n_scored == 6


def test_llamacpp_scores_the_second_half():
    protocol = short("llamacpp-wiki-512/1", 6, first=4)
    assert show(token_windows(["abcdefghijklm"], Characters(), protocol)) == [("^abcde", 4), ("^ghijk", 4)]
    plain = token_windows(["abcdefghijklm"], Characters(adds_bos=False), protocol)
    assert show(plain) == [("abcdef", 4), ("ghijkl", 4)]


def test_reference_puts_bos_before_every_window():
    found = token_windows(["abcd", "efg"], Characters(), short("reference-kjv-256/1", 4, 3))
    assert show(found) == [("^abc", 1), ("^d\n\n", 1), ("^efg", 1)]
    protocol = short("reference-kjv-256-short/1", 4, 3, selection={"n": 2})
    assert show(token_windows(["abcd", "efg"], Characters(), protocol)) == [("^abc", 1), ("^d\n\n", 1)]


def test_spread_windows_lie_at_equal_steps():
    protocol = short("reference-kjv-256-spread/1", 2, 1, selection={"n": 3})
    found = token_windows(["abcdefghijk"], Characters(), protocol)
    assert show(found) == [("^a", 1), ("^d", 1), ("^h", 1)]


def test_rolling_windows_score_every_token_once():
    """Length 3: the first after BOS, full ones after one token, the last moved back to full length."""
    found = token_windows(["abcdefg", "xy", ""], Characters(), short("reference-kjv-rolling-256/1", 3))
    assert show(found) == [("^abc", 1), ("cdef", 1), ("defg", 3), ("^xy", 1)]
    assert found.n_scored == found.checks.tokens == 9


def test_too_little_text_and_a_missing_bos_are_errors():
    with pytest.raises(EvaluationError, match="4 tokens do not fill one window of 2048"):
        token_windows(["abc"], Characters(), get_protocol("gptq-wikitext2-2048/1"))
    tokenizer = Characters()
    tokenizer.bos_token_id = None
    with pytest.raises(EvaluationError, match="no BOS token"):
        token_windows(["abcdefgh"], tokenizer, short("reference-kjv-256/1", 4, 3))
    with pytest.raises(EvaluationError, match="makes its own windows"):
        token_windows(["abc"], Characters(), get_protocol("lm-eval-wikitext-word/1"))


def test_local_files_stand_in_for_datasets(tmp_path):
    wiki = get_protocol("gptq-wikitext2-2048/1")
    raw = tmp_path / "wiki.test.raw"
    raw.write_text(" \n = A = \n \n text \n", encoding="utf-8")
    assert documents(wiki, paths={wiki.dataset.id: raw}) == ["", " = A = \n", "", " text \n"]
    chunks = get_protocol("llamacpp-wiki-512/1")
    assert documents(chunks, paths={chunks.dataset.id: raw}) == [" \n = A = \n \n text \n"]
    ptb = get_protocol("gptq-ptb-new-2048/1")
    sentences = tmp_path / "ptb.test.txt"
    sentences.write_text(" a b \n c \n", encoding="utf-8")
    assert documents(ptb, paths={ptb.dataset.id: sentences}) == ["a b", "c"]
    c4 = get_protocol("gptq-c4-new-2048/1")
    shard = tmp_path / "shard.json.gz"
    with gzip.open(shard, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": f"doc {i}", "url": ""}) + "\n" for i in range(1200))
    assert documents(c4, paths={c4.dataset.id: shard})[-1] == "doc 1099"


def test_a_file_given_for_a_split_serves_that_split_alone(tmp_path):
    wiki = get_protocol("gptq-wikitext2-2048/1")
    test, other = tmp_path / "test.raw", tmp_path / "other.raw"
    test.write_text(" test \n", encoding="utf-8")
    other.write_text(" other \n", encoding="utf-8")
    paths = {f"{wiki.dataset.id}:test": test, f"{wiki.dataset.id}:train": other}
    assert documents(wiki, paths=paths) == documents(wiki, paths={wiki.dataset.id: test})
    assert local_file(wiki.dataset, "a test", {f"{wiki.dataset.id}:train": other}) is None


def test_a_parquet_file_is_read_by_column(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    wiki = get_protocol("gptq-wikitext2-2048/1")
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["", " a \n"]}), tmp_path / "rows.parquet")
    assert documents(wiki, paths={wiki.dataset.id: tmp_path / "rows.parquet"}) == ["", " a \n"]


def test_absent_data_says_what_to_do_and_fetches_nothing(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DatasetUnavailable, match=r"not in the Hugging Face cache.*download=True.*--data"):
        documents(get_protocol("gptq-wikitext2-2048/1"))
    with pytest.raises(DatasetUnavailable, match="no file on the hub"):
        documents(get_protocol("llamacpp-wiki-512/1"))
    wiki = get_protocol("gptq-wikitext2-2048/1")
    with pytest.raises(DatasetUnavailable, match="does not exist"):
        documents(wiki, paths={wiki.dataset.id: tmp_path / "absent.raw"})
    (tmp_path / "rows.csv").write_text("text\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.csv"):
        documents(wiki, paths={wiki.dataset.id: tmp_path / "rows.csv"})
