"""Finding, reading, checking and building entries: YAML file -> validated -> frozen dataclasses.

`load_catalog` never fails for a bad entry: it keeps one CatalogError for each and loads the rest. Nothing
here imports an implementation, runs code from a file, writes, or uses the network.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from requant.catalog import entry
from requant.catalog.checks import EVIDENCE, PARTS, Implementations, cross_checks, unfinished
from requant.catalog.entry import MEASURED_KINDS, NO_IMPL, Paper, freeze
from requant.catalog.errors import CatalogError, nearest, shorten
from requant.catalog.schemas import check_schema
from requant.catalog.strict_yaml import Document, read_yaml
from requant.catalog.vocabulary import VOCAB_DIR, Vocab, load_vocab

__all__ = [
    "Catalog",
    "CatalogError",
    "check_id",
    "default_folders",
    "load_catalog",
    "load_paper",
    "load_vocab",
    "orphan_modules",
]

_ROOT = Path(__file__).parent.parent
_ID = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True)
class Folders:
    papers: Path
    vocab: Path
    impls: Path


@dataclass(frozen=True)
class Catalog:
    """All entries of a folder.

    Attributes:
        papers: the entries that loaded, by id, sorted.
        errors: one error for each that did not, in the order of their ids.
        vocab: the vocabularies they were checked against.
        folders: where everything was read.
        files: the file of every entry, good or bad, by id.
        failed: `errors` by id.
    """

    papers: Mapping[str, Paper]
    errors: tuple[CatalogError, ...]
    vocab: Vocab
    folders: Folders
    files: Mapping[str, Path]
    failed: Mapping[str, CatalogError]


def default_folders(papers_dir: Path | None = None) -> Folders:
    """The folders that belong together: beside `papers_dir` where they exist, else the installed ones."""
    if papers_dir is None:
        return Folders(_ROOT / "papers", VOCAB_DIR, _ROOT / "reference_impls")
    papers = Path(papers_dir)
    vocab, impls = papers.parent / "catalog" / "vocab", papers.parent / "reference_impls"
    installed = default_folders()
    return Folders(
        papers, vocab if vocab.is_dir() else installed.vocab, impls if impls.is_dir() else installed.impls
    )


def load_catalog(
    papers_dir: Path | None = None,
    vocab_dir: Path | None = None,
    impls_dir: Path | None = None,
    ids: Collection[str] | None = None,
) -> Catalog:
    """Load every entry of `papers_dir` (or only `ids`), sorted by id.

    Raises: CatalogError only for a broken vocabulary or a missing folder; a bad entry ends up in `errors`.
    """
    beside = default_folders(papers_dir)
    folders = Folders(beside.papers, Path(vocab_dir or beside.vocab), Path(impls_dir or beside.impls))
    if not folders.papers.is_dir():
        raise CatalogError(folders.papers, "", "is not a folder")
    vocab, impls = load_vocab(folders.vocab), Implementations(folders.impls)
    found = (path for path in folders.papers.glob("*.y*ml") if not path.name.startswith("."))
    files = {path.name.removesuffix(".yaml"): path for path in sorted(found)}
    papers: dict[str, Paper] = {}
    failed: dict[str, CatalogError] = {}
    for name, path in files.items():
        if ids is not None and name not in ids:
            continue
        try:
            doc = _read(path)
            papers[name] = _build(doc, vocab, impls)
            _check_links(doc, files.keys())
        except CatalogError as error:
            papers.pop(name, None)
            failed[name] = error
    for name, message in _cycles(papers):
        failed[name] = CatalogError(files[name], "superseded_by", message)
        del papers[name]
    proxies = (
        MappingProxyType(papers),
        MappingProxyType(files),
        MappingProxyType(dict(sorted(failed.items()))),
    )
    return Catalog(proxies[0], tuple(proxies[2].values()), vocab, folders, proxies[1], proxies[2])


def load_paper(path: Path, vocab: Vocab, impls: Implementations | None = None) -> Paper:
    """Load one entry; `impls` defaults to the modules of the folder beside it.

    Links to other entries (`related`, `superseded_by`) are checked by `load_catalog` only.
    Raises: CatalogError, and nothing else, whatever `path` is or holds.
    """
    doc = _read(Path(path))
    return _build(doc, vocab, impls or Implementations(default_folders(Path(path).parent).impls))


def check_id(name: str) -> str | None:
    """What is wrong with an id, or None."""
    if not _ID.fullmatch(name):
        return (
            "an id is a lower-case letter followed by at most 63 lower-case letters, digits and underscores"
        )
    return f"{name} is a reserved word" if name in (NO_IMPL, EVIDENCE, PARTS) else None


def orphan_modules(catalog: Catalog) -> list[str]:
    """Public modules of reference_impls that no entry names, and `evidence/<name>` on no module there.

    A broken entry counts as naming its namesake.
    """
    impls = Implementations(catalog.folders.impls)
    named = {paper.impl for paper in catalog.papers.values()} | set(catalog.failed)
    return sorted(impls.public - named) + sorted(
        f"{EVIDENCE}/{name}" for name in impls.evidence - impls.public
    )


def _read(path: Path) -> Document:
    if path.suffix != ".yaml":
        raise CatalogError(path, "", "is not read: an entry is called <id>.yaml")
    if problem := check_id(path.stem):
        raise CatalogError(path, "", f"has a bad name: {problem}", value=shorten(path.stem))
    return read_yaml(path)


def _build(doc: Document, vocab: Vocab, impls: Implementations) -> Paper:
    for error in unfinished(doc):
        raise error
    check_schema(doc, "paper")
    for error in cross_checks(doc, vocab, impls):
        raise error
    value = doc.value
    many = {
        "corrections": entry.Correction,
        "independent_results": entry.IndependentResult,
    }
    fields = {key: freeze(item) for key, item in value.items()}
    fields |= {key: tuple(maker(**freeze(row)) for row in value.get(key, ())) for key, maker in many.items()}
    fields |= {
        key: _maybe(maker, value[key])
        for key, maker in (("venue", entry.Venue), ("ids", entry.Ids), ("code", entry.Code))
    }
    fields["method"] = _method(value["method"])
    fields["claims"] = tuple(_claim(claim, value["impl"]) for claim in value["claims"])
    return Paper(id=doc.file.stem, **fields)


def _maybe(maker: Any, value: dict[str, Any] | None) -> Any:
    return None if value is None else maker(**freeze(value))


def _method(value: dict[str, Any] | None) -> entry.Method | None:
    if value is None:
        return None
    differences = tuple(entry.Difference(**row) for row in value.get("paper_vs_code", ()))
    return entry.Method(**{**freeze(value), "paper_vs_code": differences})


def _claim(value: dict[str, Any], impl: str | None) -> entry.Claim:
    fields = {**freeze(value), "source": entry.Source(**value["source"])}
    fields |= {"expected": _maybe(entry.Expected, value.get("expected"))}
    if "tolerance" in value:
        fields["tolerance"] = _maybe(entry.Tolerance, value["tolerance"])
    if value["kind"] in MEASURED_KINDS:
        return entry.MeasuredClaim(**fields)
    if value["kind"] == "ordering":
        runs = {name: _run(run, impl, value["model"]) for name, run in value["runs"].items()}
        baseline = {
            name: run
            if isinstance(run, str)
            else _run(run, impl, value["runs"][name].get("model", value["model"]))
            for name, run in value["baseline"].items()
        }
        fields |= {"runs": MappingProxyType(runs), "baseline": MappingProxyType(baseline)}
        fields["calib"] = entry.CalibSize(**value.get("calib", {}))
        return entry.OrderingClaim(**fields)
    makers = {"invariant": entry.InvariantClaim, "bits": entry.BitsClaim, "finding": entry.FindingClaim}
    return makers[value["kind"]](**fields)


def _run(value: dict[str, Any], impl: str | None, model: str) -> entry.Run:
    config = MappingProxyType(dict(freeze(value.get("config", {}))))
    return entry.Run(impl=value.get("impl", impl), config=config, model=value.get("model", model))


def _check_links(doc: Document, known: Collection[str]) -> None:
    links = [(("related", index), name) for index, name in enumerate(doc.value.get("related", ()))]
    if doc.value.get("superseded_by") is not None:
        links.append((("superseded_by",), doc.value["superseded_by"]))
    for path, name in links:
        if name not in known or name == doc.file.stem:
            message = "is this entry itself" if name == doc.file.stem else "is not the id of an entry"
            raise doc.error(
                path, message, value=shorten(name), suggestion=nearest(name, set(known) - {doc.file.stem})
            )


def _cycles(papers: Mapping[str, Paper]) -> list[tuple[str, str]]:
    """Entries that supersede each other in a circle."""
    found = []
    for start in papers:
        seen, name = [start], papers[start].superseded_by
        while name in papers and name not in seen:
            seen.append(name)
            name = papers[name].superseded_by
        if name == start:
            found.append((start, f"leads back to this entry: {' -> '.join([*seen, start])}"))
    return found
