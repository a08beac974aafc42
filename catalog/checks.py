"""Checks that no schema can make: that names exist, that parts of an entry fit together.

Every function yields CatalogErrors, the most telling first; the loader raises the first of all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from requant.catalog import bits
from requant.catalog.entry import MEASURED_KINDS, NO_IMPL, UNSTATED, split_relation
from requant.catalog.errors import CatalogError, field_name, nearest, shorten
from requant.catalog.strict_yaml import Document, Where, read_bytes
from requant.catalog.vocabulary import Vocab

TODO = "TODO(you)"
PARTS = "parts"  # the folder in reference_impls with parts of one method each
EVIDENCE = "evidence"  # the folder in reference_impls with the functions for claims of methods that are long themselves
Errors = Iterator[CatalogError]


class Implementations:
    """The modules of a reference_impls folder, known by their files; none is imported.

    Attributes:
        public: the methods.
        evidence: those whose functions for claims are in evidence/<name>.py, all of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.public = _public_modules(folder)
        self.evidence = _public_modules(folder / EVIDENCE)
        self._sources: dict[str, str] = {}

    def files(self, name: str) -> tuple[str, ...]:
        """The files of one method, relative to the folder: its module, then its evidence where that is apart."""
        return (f"{name}.py", *([f"{EVIDENCE}/{name}.py"] if name in self.evidence else []))

    def source(self, file: str) -> str:
        """Text of one file. Raises: CatalogError if it cannot be read."""
        if file not in self._sources:
            self._sources[file] = read_bytes(self.folder / file).decode("utf-8", errors="replace")
        return self._sources[file]

    def functions(self, name: str) -> list[str]:
        """The functions that claims on a method may name."""
        return re.findall(r"^(?:async )?def ([a-z]\w*)", self.source(self.files(name)[-1]), re.MULTILINE)


def _public_modules(folder: Path) -> frozenset[str]:
    return frozenset(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def unfinished(doc: Document) -> Errors:
    """One error naming every field that still holds the template's mark."""
    places = [path for path, text in _texts(doc.value, ()) if TODO in text]
    if places:
        names = ", ".join(field_name(path) for path in places)
        yield doc.error(places[0], f"{len(places)} field(s) still say {TODO}: {names}")


def _texts(value: Any, path: Where) -> Iterator[tuple[Where, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, list | dict):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str) and TODO in key:
                yield (*path, key), key
            yield from _texts(item, (*path, key))


def cross_checks(doc: Document, vocab: Vocab, impls: Implementations) -> Errors:
    """Everything about one entry that the schema accepted."""
    yield from _vocabulary(doc, vocab)
    yield from _years(doc)
    yield from _implementation(doc, impls)
    yield from _bits_formula(doc, vocab)
    yield from _claim_ids(doc)
    for index, claim in enumerate(doc.value["claims"]):
        yield from _claim(doc, ("claims", index), claim, vocab, impls)
    yield from _runs_somewhere(doc)


def _unknown(doc: Document, path: Where, value: str, kind: str, vocab: Vocab) -> Errors:
    if value not in getattr(vocab, kind):
        message = f"is not in vocab/{kind}.yaml"
        yield doc.error(path, message, value=shorten(value), suggestion=vocab.suggest(kind, value))


def _vocabulary(doc: Document, vocab: Vocab) -> Errors:
    for index, tag in enumerate(doc.value["tags"]):
        yield from _unknown(doc, ("tags", index), tag, "tags", vocab)
    if doc.value["venue"] is not None:
        yield from _unknown(doc, ("venue", "name"), doc.value["venue"]["name"], "venues", vocab)
    for index, result in enumerate(doc.value.get("independent_results", ())):
        if result.get("cause") is not None:
            yield from _unknown(
                doc, ("independent_results", index, "cause"), result["cause"], "causes", vocab
            )


def _years(doc: Document) -> Errors:
    arxiv, venue = doc.value["ids"]["arxiv"], doc.value["venue"]
    if arxiv is None or venue is None:
        return
    if not 1 <= int(arxiv[2:4]) <= 12:
        yield doc.error(
            ("ids", "arxiv"),
            "is not an arXiv id: the third and fourth digit are a month",
            value=shorten(arxiv),
        )
    if venue["year"] < 2000 + int(arxiv[:2]) and not venue.get("note"):
        message = f"is before the year of the arXiv id {arxiv}; correct one, or say in venue.note why"
        yield doc.error(("venue", "year"), message, value=shorten(venue["year"]))


def _implementation(doc: Document, impls: Implementations) -> Errors:
    impl = doc.value["impl"]
    if impl is None:
        return
    if doc.value.get("planned"):
        yield doc.error(("planned",), "is only for entries with impl: null")
    yield from _module(doc, ("impl",), impl, impls)
    for file in impls.files(impl) if impl in impls.public else ():
        before, mark, _ = impls.source(file).partition(TODO)
        if mark:
            line = before.count("\n") + 1
            message = f"reference_impls/{file} still says {TODO} on line {line}"
            yield doc.error(("impl",), message, value=shorten(impl))


def _bits_formula(doc: Document, vocab: Vocab) -> Errors:
    """The formulas can be read, and no claim contradicts its own silently."""
    common = (doc.value["method"] or {}).get("bits_formula")
    where: Where = ("method", "bits_formula")
    try:
        if common is not None:
            bits.names_of(common)
        for index, claim in enumerate(doc.value["claims"]):
            own = claim.get("bits_formula")
            formula = common if own is None else own
            where = ("method", "bits_formula") if own is None else ("claims", index, "bits_formula")
            if formula is None:
                continue
            bits.names_of(formula)
            linears = bits.linears_of(claim.get("model"), vocab.models)
            off = bits.mismatch(formula, claim.get("setting", {}), linears)
            if off is not None and not claim.get("bits_note"):
                name = "method.bits_formula" if own is None else "its bits_formula"
                message = f"is {off[0]:g}, but {name} gives {off[1]:.4g}; correct one or add bits_note"
                yield doc.error(("claims", index, "setting", "effective_bits"), message)
    except bits.FormulaError as problem:
        yield doc.error(where, str(problem))


def _module(doc: Document, path: Where, impl: str, impls: Implementations) -> Errors:
    if impl not in impls.public:
        hint = nearest(impl, impls.public)
        yield doc.error(path, "is not a module in reference_impls/", value=shorten(impl), suggestion=hint)


def _function(doc: Document, path: Where, name: str, impls: Implementations) -> Errors:
    impl = doc.value["impl"]
    if impl is None:
        yield doc.error(path, "needs an implementation, but impl is null", value=shorten(name))
    elif name not in (known := impls.functions(impl)):
        message = f"is not a function in reference_impls/{impls.files(impl)[-1]}"
        yield doc.error(path, message, value=shorten(name), suggestion=nearest(name, known))


def _claim_ids(doc: Document) -> Errors:
    first: dict[str, int] = {}
    for index, claim in enumerate(doc.value["claims"]):
        if claim["id"] in first:
            message = f"is the id of claims[{first[claim['id']]}] too"
            yield doc.error(("claims", index, "id"), message, value=shorten(claim["id"]))
        first.setdefault(claim["id"], index)
    for index, result in enumerate(doc.value.get("independent_results", ())):
        name = result["claim"]
        if name is not None and name not in first:
            hint = nearest(name, first)
            path = ("independent_results", index, "claim")
            yield doc.error(
                path, "is not the id of a claim of this entry", value=shorten(name), suggestion=hint
            )


def _claim(doc: Document, path: Where, claim: dict[str, Any], vocab: Vocab, impls: Implementations) -> Errors:
    kind = claim["kind"]
    names = {"model": "models", "dataset": "datasets", "protocol": "protocols", "calibration": "calibrations"}
    for key, vocabulary in names.items():
        known = (UNSTATED,) if key == "protocol" and kind != "ordering" else ()
        value = claim.get(key)
        if value is not None and value not in known and not (kind == "ordering" and key == "model"):
            yield from _unknown(doc, (*path, key), value, vocabulary, vocab)
    if claim.get("function") is not None:
        yield from _function(doc, (*path, "function"), claim["function"], impls)
    if kind in MEASURED_KINDS:
        yield from _measured(doc, path, claim)
    elif kind == "bits" and doc.value["impl"] is None:
        yield doc.error((*path, "kind"), "needs an implementation, but impl is null", value="'bits'")
    elif kind == "ordering":
        yield from _ordering(doc, path, claim, impls)
    elif kind == "finding" and claim.get("relation"):
        yield from _relation(doc, path, claim)


def _measured(doc: Document, path: Where, claim: dict[str, Any]) -> Errors:
    if claim.get("config") is None:
        return
    if doc.value["impl"] is None:
        yield doc.error((*path, "config"), "needs an implementation, but impl is null; write config: null")
    if claim["kind"] in ("perplexity", "accuracy") and claim.get("tolerance") is None:
        yield doc.error(
            (*path, "tolerance"),
            "is missing: a claim with a config can run, so say how close is close enough",
        )


def _ordering(doc: Document, path: Where, claim: dict[str, Any], impls: Implementations) -> Errors:
    runs = claim["runs"]
    for name, run in runs.items():
        yield from _run(doc, (*path, "runs", name), run, impls)
    yield from _relation(doc, path, claim, runs)
    order = split_relation(claim["relation"])
    for name, run in claim["baseline"].items():
        if isinstance(run, dict):
            yield from _run(doc, (*path, "baseline", name), run, impls)
    idle = runs.keys() - set(order) - {run for run in claim["baseline"].values() if isinstance(run, str)}
    for name in sorted(idle):
        yield doc.error((*path, "runs", name), "is used neither by relation nor by baseline")


def _run(doc: Document, path: Where, run: dict[str, Any], impls: Implementations) -> Errors:
    impl = run.get("impl", doc.value["impl"])
    if impl is None:
        yield doc.error((*path, "impl"), "is missing, and this entry has no implementation of its own")
    elif impl == NO_IMPL:
        if run.get("config"):
            yield doc.error((*path, "config"), f"has no meaning for impl: {NO_IMPL}")
    elif "impl" in run:
        yield from _module(doc, (*path, "impl"), impl, impls)


def _relation(
    doc: Document, path: Where, claim: dict[str, Any], runs: Collection[str] | None = None
) -> Errors:
    """Names of the relation and the baseline; `runs` are the names there are (None: its own)."""
    order = split_relation(claim["relation"])
    for name in order:
        if runs is not None and name not in runs:
            hint = nearest(name, runs)
            yield doc.error((*path, "relation"), f"names {name!r}, which is not in runs", suggestion=hint)
    if len(set(order)) < len(order):
        yield doc.error((*path, "relation"), "names one thing twice", value=shorten(claim["relation"]))
    for name, other in claim.get("baseline", {}).items():
        if name not in order:
            hint = nearest(name, order)
            yield doc.error(
                (*path, "baseline", name), "replaces something that relation does not name", suggestion=hint
            )
        elif other == name:
            yield doc.error(
                (*path, "baseline", name), "replaces a run by itself, so the relation would still hold"
            )
        elif isinstance(other, str) and other not in (order if runs is None else runs):
            hint = nearest(other, order if runs is None else runs)
            yield doc.error(
                (*path, "baseline", name), "is not a known name", value=shorten(other), suggestion=hint
            )


def _runs_somewhere(doc: Document) -> Errors:
    if doc.value["impl"] is None:
        return
    kinds = ("ordering", "invariant", "bits")
    if not any(claim["kind"] in kinds or claim.get("function") for claim in doc.value["claims"]):
        wanted = "ordering, invariant, bits, or a finding with a function"
        message = f"need at least one that runs on the reference model: {wanted}"
        yield doc.error(("claims",), message)
