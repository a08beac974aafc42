"""Scoring, against transformers' own loss, a loop over positions, and models whose answer is known."""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, made
from torch import nn

from requant.catalog import scoring
from requant.catalog.evaluate import EvaluationError, Windows, evaluate, ratio, token_windows, verify_checks
from requant.catalog.evaluate import documents as load_documents
from requant.catalog.protocols import get_protocol
from requant.catalog.reference.models import load_reference

SHORT = "reference-kjv-256-short/1"


class Bigram(nn.Module):
    """Logits that depend on the current token only: a table [vocab, vocab]."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)
        self.dropout = nn.Dropout(0.5)
        self.fed = []

    def forward(self, input_ids):
        self.fed.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.dropout(self.table[input_ids]))


class Plain(nn.Module):
    """A model that shows nothing but its logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.model(input_ids).logits)


class Digits:
    bos_token_id = 0

    def __call__(self, text, add_special_tokens, verbose):
        return {"input_ids": [int(character) for character in text]}


@pytest.fixture(scope="module")
def reference():
    return load_reference("reference")


@pytest.fixture(scope="module")
def few(reference) -> Windows:
    """Six windows of the short protocol."""
    protocol = get_protocol(SHORT)
    windows = token_windows(load_documents(protocol), reference.tokenizer, protocol)
    return dataclasses.replace(windows, windows=windows.windows[:6])


def small(name, length, stride, **changes):
    protocol = get_protocol(name)
    windows = dataclasses.replace(protocol.windows, length=length, stride=stride)
    return dataclasses.replace(protocol, windows=windows, **changes)


def test_short_protocol_on_the_reference_model(reference):
    found = evaluate(reference.model, reference.tokenizer, SHORT)
    assert not verify_checks(found, SHORT, "reference")
    assert (found.n_windows, found.n_tokens, found.first_tokens) == (64, 64 * 255, (0, 0))
    assert found.value == pytest.approx(math.exp(found.nll))
    assert 2.0 < found.nll < 4.0  # a trained model: chance is ln 2048 = 7.6
    assert 0.01 < found.standard_error < 0.2
    assert found.perplexity_standard_error == pytest.approx(found.value * found.standard_error)
    assert found.kl is None and found.top1_agreement is None


def test_equal_to_the_loss_of_transformers(reference, few):
    found = evaluate(reference.model, reference.tokenizer, SHORT, windows=few)
    ids = torch.stack([window.ids for window in few.windows])
    with torch.no_grad():
        losses = torch.tensor([float(reference.model(row[None], labels=row[None]).loss) for row in ids])
    assert found.nll == pytest.approx(float(losses.mean()), rel=1e-6)
    assert found.standard_error == pytest.approx(float(losses.std() / math.sqrt(6)), rel=1e-4)


def test_equal_to_a_loop_over_positions(reference):
    """Strided windows: each position on its own, from a fresh forward pass over its context."""
    protocol = small("hf-strided-wikitext2-1024-512/1", 24, 16)
    text = load_documents(get_protocol(SHORT))[0][:160]
    ids = torch.tensor(reference.tokenizer(text)["input_ids"])
    total, seen, start = 0.0, 1, 0
    with torch.no_grad():
        while seen < len(ids):
            for position in range(seen, min(start + 24, len(ids))):
                logits = reference.model(ids[None, start:position]).logits[0, -1]
                total -= float(logits.log_softmax(-1)[ids[position]])
            seen, start = min(start + 24, len(ids)), start + 16
    found = evaluate(reference.model, reference.tokenizer, protocol, documents=[text])
    assert found.n_tokens == len(ids) - 1
    assert found.nll * found.n_tokens == pytest.approx(total, rel=1e-5)


def test_batches_do_not_matter(reference, few):
    values = [
        evaluate(reference.model, reference.tokenizer, SHORT, windows=few, batch_size=n).nll
        for n in (1, 4, 6)
    ]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_made_a_few_at_a_time_are_those_of_the_whole_model(family, few, monkeypatch):
    """In each family, soft caps included; 64 logits at once are fewer than one position has."""
    model = made(family)
    if family == "gemma2":
        assert model.config.final_logit_softcapping
    worse = copy.deepcopy(model)
    for parameter in worse.parameters():
        parameter.mul_(0.5)
    whole = Plain(model), Plain(worse)
    protocol = get_protocol(SHORT)
    few = dataclasses.replace(few, windows=few.windows[:2])
    expected = evaluate(whole[0], None, protocol, windows=few, reference_model=whole[1])
    assert expected.kl > 0.001
    for at_once in (scoring.LOGITS_AT_ONCE, 3 * 2048 + 5):
        monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", at_once)
        found = evaluate(model, None, protocol, windows=few, reference_model=worse)
        assert (found.nll, found.kl) == pytest.approx((expected.nll, expected.kl), rel=1e-5)
        assert found.top1_agreement == expected.top1_agreement
    assert "forward" not in vars(model.get_decoder()) and not model.get_decoder()._forward_hooks


def test_no_more_logits_are_held_than_needed(reference, few, monkeypatch):
    """The head is given a few positions at a time, and only those that are scored."""
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 100 * 2048)
    given = []
    handle = reference.model.lm_head.register_forward_pre_hook(lambda _, args: given.append(args[0].shape[1]))
    try:
        evaluate(reference.model, reference.tokenizer, SHORT, windows=few)
    finally:
        handle.remove()
    assert max(given) <= 100 and sum(given) == few.n_scored


def test_divergence_from_the_unquantized_model(reference, few):
    same = evaluate(reference.model, reference.tokenizer, SHORT, windows=few, reference_model=reference.model)
    assert same.kl == pytest.approx(0.0, abs=1e-7) and same.top1_agreement == 1.0
    worse = copy.deepcopy(reference.model)
    worse.lm_head.weight.mul_(0.9)
    found = evaluate(worse, reference.tokenizer, SHORT, windows=few, reference_model=reference.model)
    with torch.no_grad():
        ids = torch.stack([window.ids for window in few.windows])
        p, q = (model(ids).logits[:, :-1].log_softmax(-1) for model in (reference.model, worse))
    expected = nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()
    assert found.kl == pytest.approx(float(expected), rel=1e-4) and found.kl > 0.001
    assert found.top1_agreement == 1.0  # scaling the logits moves no maximum
    assert found.nll != same.nll


def test_a_uniform_model_has_the_size_of_its_vocabulary_as_perplexity():
    for name, length, stride in (("gptq-wikitext2-2048/1", 4, 4), ("hf-strided-wikitext2-1024-512/1", 4, 2)):
        found = evaluate(
            Bigram(torch.zeros(10, 10)), Digits(), small(name, length, stride), documents=["31415926535"]
        )
        assert found.value == pytest.approx(10.0)
        assert found.standard_error == pytest.approx(0.0, abs=1e-7)


def test_windows_or_tokens_are_averaged_as_the_protocol_says():
    """Loss 0 after an even token, ln 2 after an odd one; two windows with 3 targets and a last one with 1."""
    table = torch.full((10, 10), -1e4)
    table[0::2] = table[0::2].scatter(1, torch.arange(5)[:, None] * 0 + 1, 0.0)  # even -> 1
    table[1::2, 1:3] = 0.0  # odd -> 1 or 2, equally likely
    protocol = small("gptq-wikitext2-2048/1", 4, 4)
    keep = dataclasses.replace(protocol, windows=dataclasses.replace(protocol.windows, last_partial="keep"))
    tokens = dataclasses.replace(keep, metric=dataclasses.replace(keep.metric, aggregation="token-mean"))
    text = "2121" + "1111" + "21"  # losses: 0 ln2 0 | ln2 ln2 ln2 | 0
    by_window, by_token = (evaluate(Bigram(table), Digits(), p, documents=[text]) for p in (keep, tokens))
    assert by_window.nll == pytest.approx((1 / 3 + 1 + 0) / 3 * math.log(2))
    assert by_token.nll == pytest.approx(4 / 7 * math.log(2))
    assert (by_token.n_tokens, by_token.n_windows) == (7, 3)


def test_what_is_fed_and_in_which_batches():
    model = Bigram(torch.zeros(10, 10))
    rolling = small("reference-kjv-rolling-256/1", 4, 4)
    evaluate(model, Digits(), rolling, documents=["123456789", "12"])
    assert model.fed == [(2, 4), (1, 4), (1, 2)]  # windows of one shape together, never padded
    model.fed.clear()
    evaluate(model, Digits(), small("gptq-wikitext2-2048/1", 4, 4), documents=["1" * 16], batch_size=3)
    assert model.fed == [(3, 4), (1, 4)]  # the last token of a window is fed although it predicts nothing


def test_the_loss_in_the_dtype_of_the_model_is_rounded():
    logits = torch.randn(10, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    protocol = small("gptq-wikitext2-2048/1", 8, 8)
    exact = dataclasses.replace(protocol, score=dataclasses.replace(protocol.score, loss_dtype="float32"))
    rounded, full = (evaluate(Bigram(logits), Digits(), p, documents=["31415926"]) for p in (protocol, exact))
    assert rounded.nll == float(torch.tensor(rounded.nll).bfloat16()) != full.nll
    assert rounded.nll == pytest.approx(full.nll, rel=0.02)


def test_the_model_is_left_as_it_was():
    model = Bigram(torch.randn(10, 10, generator=torch.Generator().manual_seed(0)))
    model.train()
    model.dropout.eval()
    before = model.table.detach().clone()
    first, second = (
        evaluate(model, Digits(), small("gptq-wikitext2-2048/1", 4, 4), documents=["3141592653"])
        for _ in "ab"
    )
    assert first == second  # no dropout while evaluating
    assert model.training and not model.dropout.training
    assert torch.equal(before, model.table) and model.table.requires_grad and model.table.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_name_the_window(bad):
    table = torch.zeros(10, 10)
    table[7, 3] = bad
    model = Bigram(table).train()
    with pytest.raises(
        EvaluationError, match=r"gptq-wikitext2-2048/1: the logits of window 2 are not finite"
    ):
        evaluate(model, Digits(), small("gptq-wikitext2-2048/1", 4, 4), documents=["111122227111"])
    assert model.training


def test_progress_counts_windows():
    seen = []
    evaluate(
        Bigram(torch.zeros(10, 10)), Digits(), small("gptq-wikitext2-2048/1", 4, 4), documents=["1" * 20],
        batch_size=2, progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_arguments_that_do_not_fit_are_refused(reference, few):
    with pytest.raises(EvaluationError, match="2048 tokens at once, but the model has 1024 positions"):
        evaluate(reference.model, reference.tokenizer, "gptq-wikitext2-2048/1", documents=["word " * 4000])
    with pytest.raises(ValueError, match="cut for reference-kjv-256-short/1"):
        evaluate(reference.model, reference.tokenizer, "reference-kjv-256/1", windows=few)
    with pytest.raises(ValueError, match="takes no tasks"):
        evaluate(reference.model, reference.tokenizer, SHORT, windows=few, tasks=["piqa"])
    with pytest.raises(ValueError, match="did you mean reference-kjv-256/1"):
        evaluate(reference.model, reference.tokenizer, "reference-kvj-256/1")


def test_check_integers_expose_another_text(reference):
    protocol = get_protocol("reference-kjv-256/1")
    windows = token_windows(load_documents(protocol)[:-1], reference.tokenizer, protocol)
    wrong = verify_checks(windows, protocol, "reference")
    assert [mismatch.check for mismatch in wrong] == ["characters", "tokens", "windows"]
    assert "expected 398971 (measured)" in str(wrong[0])
    assert not verify_checks(windows, protocol, "llama-2")  # nothing known for this family


def test_ratio_and_its_standard_error():
    sums, counts = torch.tensor([2.0, 6.0, 4.0]), torch.tensor([1.0, 2.0, 1.0])
    mean, error = ratio(sums, counts)  # residuals -1, 0, 1
    assert (mean, error) == (3.0, pytest.approx(math.sqrt(2 * 3 / 2) / 4))
    assert ratio(sums[:1], counts[:1]) == (2.0, None)
