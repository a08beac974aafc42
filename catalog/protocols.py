"""Evaluation protocols: every choice that decides a number, as immutable objects from vocab/protocols.yaml.

A protocol has an id `name/version`. Its definition is never edited once published, only superseded; a test
holds its `fingerprint`. What is known about it (check integers, values of unquantized models) may grow.
Two protocols are two quantities: nothing here or elsewhere converts a value of one into a value of the other.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jsonschema import Draft202012Validator

from requant.catalog.errors import nearest, shorten
from requant.catalog.strict_yaml import Document, read_yaml

PROTOCOLS_FILE = Path(__file__).parent / "vocab" / "protocols.yaml"
SCHEMA_FILE = Path(__file__).parent / "schema" / "protocols.schema.json"
REFERENCE_TEXT = "reference-text"  # dataset id of the embedded text
KNOWLEDGE = ("title", "summary", "expected", "baselines", "notes", "superseded_by")  # not the definition


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Where the text comes from; `file` is the path of the split inside the dataset repository."""

    id: str
    config: str | None
    revision: str | None
    split: str
    file: str | None
    field: str | None
    text_lines: str | None  # how a plain text file becomes rows: keep-newline | strip | whole-file


@dataclass(frozen=True, kw_only=True)
class TokenizerMode:
    unit: str  # joined: one call on the joined text | document: one call a document
    use_fast: bool | None  # tokenizer class of the original code; None = as loaded
    special_tokens: str  # default: the tokenizer's own | none


@dataclass(frozen=True, kw_only=True)
class WindowRule:
    rule: str  # disjoint | strided | rolling-disjoint | harness
    length: int | None  # tokens fed to the model at once; None = the model's own maximum
    stride: int | None  # tokens of the text by which a window moves
    last_partial: str  # drop | keep
    fed: str  # all | all-but-last: whether the last token of a window, a target only, is fed too


@dataclass(frozen=True, kw_only=True)
class Selection:
    rule: str  # all | random-crops | first-documents | first-windows | spread-windows (n at equal steps)
    n: int | None  # crops, documents or windows
    seed: int | None  # of Python's random.Random
    min_tokens: int | None  # a document with fewer tokens is drawn again
    max_tokens: int | None  # tokens of the text that are used


@dataclass(frozen=True, kw_only=True)
class Score:
    rule: str  # from-position: tokens `first`.. of each window | unseen: tokens not scored before | harness
    first: int | None  # position in the window, counted from 0, of the first target
    loss_dtype: str  # float32 | model: the dtype of the logits


@dataclass(frozen=True, kw_only=True)
class Metric:
    name: str
    unit: str
    aggregation: str  # window-mean | token-mean | document-sum | task-mean


@dataclass(frozen=True, kw_only=True)
class Harness:
    version: str  # lm-eval version the definition was read in
    task: str | None  # None = named by the claim
    metric: str
    n_shots: int


@dataclass(frozen=True, kw_only=True)
class Expected:
    """An integer (or the ratio bytes_per_word) that a right text and tokenizer must give."""

    check: str  # characters | tokens | windows | bytes_per_word
    family: str | None  # tokenizer family; None = any
    value: float
    tolerance: float
    evidence: str  # seen | recalled | measured
    source: str


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Value of the unquantized model; `tolerance` is absolute, in the unit of the metric."""

    model: str
    dtype: str
    value: float
    tolerance: float
    evidence: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Protocol:
    id: str
    title: str
    summary: str
    engine: str  # requant | lm-eval
    dataset: Dataset
    join: str | None  # text between two documents; None = documents stay apart
    detokenizer: str
    tokenizer: TokenizerMode
    bos: str  # once (the tokenizer's own) | none | every-window | overwrite-first | first-window
    windows: WindowRule
    selection: Selection
    score: Score
    metric: Metric
    harness: Harness | None
    expected: tuple[Expected, ...] = ()
    baselines: tuple[Baseline, ...] = ()
    notes: tuple[str, ...] = ()
    superseded_by: str | None = None

    def definition(self) -> dict[str, Any]:
        """What decides the number, without what is known about it."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in KNOWLEDGE}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the definition, 16 hexadecimal digits."""
        text = json.dumps(self.definition(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def baseline(self, model_id: str) -> Baseline | None:
        """The known value of this unquantized model, a recalled one only if there is no other."""
        known = [entry for entry in self.baselines if entry.model.casefold() == model_id.casefold()]
        return min(known, key=lambda entry: entry.evidence == "recalled", default=None)


def load_protocols(path: Path = PROTOCOLS_FILE) -> Mapping[str, Protocol]:
    """All protocols by id, in the order of the file.

    Raises: CatalogError naming file, line and field of the first thing that is wrong.
    """
    return _load(path)


def get_protocol(protocol_id: str) -> Protocol:
    """The protocol with this id.

    Raises: ValueError with the nearest id if there is none.
    """
    protocols = load_protocols()
    if protocol_id not in protocols:
        close = nearest(protocol_id, protocols)
        hint = f"; did you mean {close}?" if close else ""
        raise ValueError(f"unknown protocol {shorten(protocol_id)}{hint} Known: {', '.join(protocols)}")
    return protocols[protocol_id]


@functools.cache
def _load(path: Path) -> Mapping[str, Protocol]:
    doc = read_yaml(path)
    validator = Draft202012Validator(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))
    for problem in sorted(
        validator.iter_errors(doc.value), key=lambda problem: list(map(str, problem.absolute_path))
    ):
        raise doc.error(tuple(problem.absolute_path), problem.message)
    found: dict[str, Protocol] = {}
    for index, raw in enumerate(doc.value["protocols"]):
        protocol = _build(raw)
        if protocol.id in found:
            raise doc.error(
                ("protocols", index, "id"), "is given twice; ids are name/version", value=shorten(protocol.id)
            )
        _check(protocol, doc, index)
        found[protocol.id] = protocol
    for index, protocol in enumerate(found.values()):
        if protocol.superseded_by is not None and protocol.superseded_by not in found:
            where, value = ("protocols", index, "superseded_by"), protocol.superseded_by
            raise doc.error(where, "is no protocol", value=shorten(value), suggestion=nearest(value, found))
    return MappingProxyType(found)


_PARTS = {
    "dataset": Dataset, "tokenizer": TokenizerMode, "windows": WindowRule, "selection": Selection,
    "score": Score, "metric": Metric, "harness": Harness,
}  # fmt: skip
_LISTS = {"expected": Expected, "baselines": Baseline}


def _build(raw: Mapping[str, Any]) -> Protocol:
    values = dict(raw)
    values.update({key: cls(**raw[key]) for key, cls in _PARTS.items() if raw[key] is not None})
    values.update({key: tuple(cls(**item) for item in raw[key]) for key, cls in _LISTS.items()})
    return Protocol(**values | {"notes": tuple(raw["notes"])})


def _check(protocol: Protocol, doc: Document, index: int) -> None:
    """What a schema cannot say: fields that must agree with each other."""
    for field, wrong in _contradictions(protocol):
        raise doc.error(("protocols", index, *field.split(".")), wrong)


def _contradictions(p: Protocol) -> list[tuple[str, str]]:
    windows, selection, special = p.windows, p.selection, p.tokenizer.special_tokens
    step = None if windows.length is None else windows.length - (p.bos == "every-window")
    needed = {"random-crops": ("n", "seed", "min_tokens")}
    needed |= dict.fromkeys(("first-documents", "first-windows", "spread-windows"), ("n",))
    missing = [name for name in needed.get(selection.rule, ()) if getattr(selection, name) is None]
    by_harness = (
        p.engine == "lm-eval",
        windows.rule == "harness",
        p.score.rule == "harness",
        bool(p.harness),
    )
    unstepped = windows.rule == "disjoint" and windows.stride != step
    too_wide = windows.rule == "strided" and not 0 < (windows.stride or 0) < (step or 0)
    crops = selection.rule == "random-crops"
    rules = [
        ("engine", any(by_harness) != all(by_harness), "only lm-eval protocols have a harness and its rules"),
        ("windows.length", p.engine == "requant" and not windows.length, "a length in tokens is needed"),
        ("windows.stride", unstepped, f"disjoint windows of this length move by {step}"),
        ("windows.stride", too_wide, "must be positive and below the length"),
        ("bos", p.bos in ("every-window", "none") and special != "none", "needs special_tokens: none"),
        ("bos", p.bos in ("once", "overwrite-first") and special == "none", "needs special_tokens: default"),
        ("score.first", p.score.rule == "from-position" and p.score.first is None, "a position is needed"),
        ("tokenizer.unit", crops and p.tokenizer.unit != "document", "crops come from one document each"),
        ("selection", bool(missing), f"{selection.rule} needs {', '.join(missing)}"),
    ]
    return [(field, message) for field, wrong, message in rules if wrong]
