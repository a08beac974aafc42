"""The vocabularies: tags, venues, causes, models, datasets, protocols, calibration sets; each id is defined once."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from requant.catalog.entry import Claim, MeasuredClaim, freeze
from requant.catalog.errors import CatalogError, nearest, shorten
from requant.catalog.schemas import check_schema
from requant.catalog.strict_yaml import read_yaml

VOCAB_DIR = Path(__file__).parent / "vocab"


@dataclass(frozen=True, kw_only=True)
class Term:
    """A tag, a venue or a cause."""

    id: str
    description: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint. `params` is the number its name states; None stands for unknown everywhere.

    linears: (d_out, d_in, how many) of the linears of one of its `n_blocks` decoder blocks; empty if unknown.
    embeddings: parameters of embeddings and head.
    """

    id: str
    description: str
    family: str
    params: int | None
    license: str | None
    gated: bool | None
    revision: str | None
    size_bytes: int | None
    evidence: str
    linears: tuple[tuple[int, int, int], ...] = ()
    n_blocks: int | None = None
    embeddings: int | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A text or a task; `lm_eval_task` is the task of lm-eval that measures accuracy on it."""

    id: str
    description: str
    repo: str | None
    config: str | None
    revision: str | None
    availability: str
    replacement: str | None
    evidence: str
    lm_eval_task: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A calibration set: `n_samples` texts of `seqlen` tokens, drawn by `sampling`, `rng` and `seed`.

    `rule` is the sampler of calibration.py that does it, None where there is none; `file` the file it reads.
    """

    id: str
    description: str
    dataset: str
    split: str
    n_samples: int
    seqlen: int
    seed: int | None
    rng: str
    sampling: str
    rule: str | None
    file: str | None
    evidence: str


@dataclass(frozen=True, kw_only=True)
class ForeignResult:
    """A measurement by others of a method without an entry, or of an unquantized model.

    reported: the published number it was compared with; value: what was measured.
    """

    method: str
    model: str | None
    model_name: str | None
    dataset: str | None
    setting: str
    metric: str
    reported: float | None
    value: float | None
    cause: str | None
    cause_status: str | None
    verdict: str | None
    note: str | None
    url: str | None
    seen_at: str | None
    evidence: str


@dataclass(frozen=True, kw_only=True)
class Vocab:
    """All vocabularies by id. A protocol stays the mapping of its file; `protocols.py` gives it meaning.

    independent: measurements that belong to no entry.
    """

    tags: Mapping[str, Term]
    venues: Mapping[str, Term]
    causes: Mapping[str, Term]
    models: Mapping[str, Model]
    datasets: Mapping[str, Dataset]
    protocols: Mapping[str, Mapping[str, Any]]
    calibrations: Mapping[str, Calibration]
    independent: tuple[ForeignResult, ...] = ()

    def suggest(self, kind: str, value: object) -> str | None:
        """The id of vocabulary `kind` most like `value`, where an alias counts as its id."""
        terms = getattr(self, kind)
        names = {alias: key for key, term in terms.items() for alias in getattr(term, "aliases", ())}
        names.update({key: key for key in terms})
        found = nearest(value, names)
        return names[found] if found else None

    def leaks(self, claim: Claim) -> bool:
        """Whether the claim's number was calibrated on the corpus it was measured on."""
        if not isinstance(claim, MeasuredClaim) or claim.calibration is None:
            return False
        return self.calibrations[claim.calibration].dataset == claim.dataset


_TERMS: dict[str, Any] = {
    "tags": Term,
    "venues": Term,
    "causes": Term,
    "models": Model,
    "datasets": Dataset,
    "calibrations": Calibration,
}


def load_vocab(folder: Path | None = None) -> Vocab:
    """Read the vocabularies of `folder` (default: the catalog's own, read once in a process).

    Raises: CatalogError for the first file that is missing or wrong; without it no entry could be checked.
    """
    return _own_vocab() if folder is None else _read_vocab(Path(folder))


@functools.cache
def _own_vocab() -> Vocab:
    return _read_vocab(VOCAB_DIR)


def _read_vocab(folder: Path) -> Vocab:
    parts: dict[str, Any] = {
        kind: _load(folder / f"{kind}.yaml", kind, maker) for kind, maker in _TERMS.items()
    }
    vocab = Vocab(protocols=_load_protocols(folder / "protocols.yaml"), **parts)
    vocab = replace(vocab, independent=_load_independent(folder / "independent.yaml", vocab))
    for calibration in vocab.calibrations.values():
        if calibration.dataset not in vocab.datasets:
            message = f"{calibration.id} names the dataset {calibration.dataset!r}, not in datasets.yaml"
            raise CatalogError(folder / "calibrations.yaml", "calibrations", message)
    return vocab


def _load(file: Path, kind: str, maker: Any) -> Mapping[str, Any]:
    doc = read_yaml(file)
    check_schema(doc, kind)
    terms: dict[str, Any] = {}
    names: set[str] = set()
    for index, row in enumerate(doc.value[kind]):
        for name in (row["id"], *row.get("aliases", ())):
            if name in names:
                raise doc.error((kind, index, "id"), f"the name {name!r} is defined twice")
            names.add(name)
        terms[row["id"]] = maker(**freeze(row))
    return MappingProxyType(terms)


def _load_independent(file: Path, vocab: Vocab) -> tuple[ForeignResult, ...]:
    """The file is optional: a small catalog may have no such results."""
    if not file.exists():
        return ()
    doc = read_yaml(file)
    check_schema(doc, "independent")
    for index, row in enumerate(doc.value["results"]):
        for key, terms in (("model", vocab.models), ("dataset", vocab.datasets), ("cause", vocab.causes)):
            if row[key] is not None and row[key] not in terms:
                hint = vocab.suggest(f"{key}s", row[key])
                message = f"is not in vocab/{key}s.yaml"
                raise doc.error(("results", index, key), message, value=shorten(row[key]), suggestion=hint)
    return tuple(ForeignResult(**row) for row in doc.value["results"])


def _load_protocols(file: Path) -> Mapping[str, Mapping[str, Any]]:
    doc = read_yaml(file)
    rows = doc.value.get("protocols") if isinstance(doc.value, dict) else None
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("id"), str) for row in rows
    ):
        raise doc.error(("protocols",), "must be a list of mappings with an id each")
    return MappingProxyType({row["id"]: freeze(row) for row in rows})
