"""Every real entry loads, every kind of mistake is reported where it is, the verbs do what they say."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from requant.catalog import cli, entry
from requant.catalog.errors import CatalogError
from requant.catalog.loader import default_folders, load_catalog, load_paper, load_vocab, orphan_modules
from requant.catalog.schemas import validator

DATA = Path(__file__).parent / "data"
FOLDERS = default_folders()
ENTRIES = sorted(path.stem for path in FOLDERS.papers.glob("*.yaml"))
INVALID = sorted(path.stem for path in (DATA / "invalid").glob("*.yaml"))


@pytest.fixture(scope="module")
def catalog():
    return load_catalog()


@pytest.fixture(scope="module")
def toys():
    return load_catalog(DATA / "valid")


@pytest.fixture(scope="module")
def mistakes():
    return load_catalog(DATA / "invalid")


@pytest.fixture
def toy_folder(tmp_path):
    """A copy of the toy catalog that a test may change; returns its folder of entries."""
    for name in ("catalog", "reference_impls"):
        shutil.copytree(DATA / name, tmp_path / name)
    return shutil.copytree(DATA / "valid", tmp_path / "entries")


@pytest.mark.parametrize("name", ENTRIES)
def test_catalog_entry(catalog, name):
    assert name in catalog.papers, str(catalog.failed.get(name))


def test_every_module_is_named_by_an_entry(catalog):
    assert orphan_modules(catalog) == []


def test_toy_entries_load(toys):
    assert [str(error) for error in toys.errors] == []
    assert list(toys.papers) == ["toy_followup", "toy_nearest", "toy_rounding", "toy_survey"]
    assert orphan_modules(toys) == []
    kinds = {claim.kind for paper in toys.papers.values() for claim in paper.claims}
    assert kinds == set(entry.CLAIM_KINDS) - {"accuracy", "memory"}


@pytest.mark.parametrize("name", INVALID)
def test_mistake_is_reported(mistakes, name):
    """The first line of each file says which field must be named and what the message must hold."""
    first = mistakes.files[name].read_text(encoding="utf-8").splitlines()[0]
    field, _, fragment = first.removeprefix("# expect: ").partition(" | ")
    error = mistakes.failed[name]
    assert error.field == field.replace("-", "", field == "-")
    text = str(error)
    assert fragment in text and "\n" not in text and text.startswith(f"invalid/{name}.yaml")


def test_error_names_line_and_suggestion(mistakes):
    error = mistakes.failed["unknown_protocol"]
    lines = mistakes.files["unknown_protocol"].read_text(encoding="utf-8").splitlines()
    assert "toy-204/1" in lines[error.line - 1]
    assert (error.suggestion, error.value) == ("toy-2048/1", "'toy-204/1'")


def test_claims_are_resolved(toys):
    claim = toys.papers["toy_rounding"].claim("better_than_nearest")
    assert claim.order == ("plain", "ours", "nearest")
    assert claim.runs["ours"] == entry.Run(impl="toy_rounding", config={"w_bits": 3}, model="reference")
    assert (claim.runs["plain"].impl, claim.calib.n_samples, claim.seeds) == (entry.NO_IMPL, 32, (0, 1, 2))
    assert claim.runs_on_reference and not toys.papers["toy_survey"].claims[0].runs_on_reference
    tolerance = toys.papers["toy_rounding"].claim("w4").tolerance
    assert tolerance.allows(28.1, 28.9) and not tolerance.allows(28.1, 29.0)
    assert toys.vocab.leaks(toys.papers["toy_rounding"].claim("w4"))
    with pytest.raises(KeyError, match="it has w4, hours"):
        toys.papers["toy_rounding"].claim("w5")


def test_entries_are_immutable(toys):
    def walk(value):
        assert not isinstance(value, list | dict | set)
        if dataclasses.is_dataclass(value):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, dataclasses.fields(value)[0].name, None)
            value = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}.values()
        elif isinstance(value, Mapping):
            with pytest.raises(TypeError):
                value["new"] = 1
            value = value.values()
        elif not isinstance(value, tuple):
            return
        for part in value:
            walk(part)

    for item in (*toys.papers.values(), toys.papers):
        walk(item)
    assert (
        json.loads(json.dumps(entry.as_plain(toys.papers["toy_rounding"])))["claims"][0]["setting"]["w_bits"]
        == 4
    )


def test_broken_file_hides_nothing(toy_folder):
    (toy_folder / "toy_broken.yaml").write_text("title: [", encoding="utf-8")
    (toy_folder / "toy_other.yml").write_text("title: x", encoding="utf-8")
    catalog = load_catalog(toy_folder)
    assert len(catalog.papers) == 4 and [error.file for error in catalog.errors] == [
        "entries/toy_broken.yaml",
        "entries/toy_other.yml",
    ]


def test_superseding_in_a_circle(toy_folder):
    with (toy_folder / "toy_followup.yaml").open("a", encoding="utf-8") as file:
        file.write("superseded_by: toy_rounding\n")
    catalog = load_catalog(toy_folder)
    assert sorted(catalog.failed) == ["toy_followup", "toy_rounding"]
    assert "toy_rounding -> toy_followup -> toy_rounding" in str(catalog.failed["toy_rounding"])


def test_functions_of_claims_stand_in_one_file(toy_folder):
    """Where evidence/ has a module of the method's name, its claims find no function anywhere else."""
    module = toy_folder.parent / "reference_impls" / "toy_rounding.py"
    evidence = module.parent / "evidence" / module.name
    text = evidence.read_text(encoding="utf-8")
    evidence.write_text(text.replace("def identity_error", "def other"), encoding="utf-8")
    module.write_text("def identity_error(ctx):\n    return 0.0\n", encoding="utf-8")
    catalog = load_catalog(toy_folder)
    assert set(catalog.failed) == {"toy_rounding", "toy_followup"}
    error = catalog.failed["toy_followup"]
    assert error.message == "is not a function in reference_impls/evidence/toy_rounding.py"
    evidence.unlink()
    module.write_text(text, encoding="utf-8")
    assert not load_catalog(toy_folder).errors


def test_unfinished_evidence_is_named(toy_folder):
    evidence = toy_folder.parent / "reference_impls" / "evidence" / "toy_rounding.py"
    evidence.write_text(f"# one\n# TODO(you)\n{evidence.read_text()}", encoding="utf-8")
    error = load_catalog(toy_folder).failed["toy_rounding"]
    message = "reference_impls/evidence/toy_rounding.py still says TODO(you) on line 2"
    assert (error.field, error.message) == ("impl", message)


@pytest.mark.parametrize("kind", ["tags", "venues", "models", "datasets", "calibrations"])
def test_vocabulary_is_described(kind):
    terms = getattr(load_vocab(), kind)
    assert len({term.description for term in terms.values()}) == len(terms)
    assert all(key == term.id for key, term in terms.items())


def test_broken_vocabulary_names_the_file(toy_folder):
    (toy_folder.parent / "catalog" / "vocab" / "tags.yaml").write_text(
        "tags: [{id: a b, description: No.}]", encoding="utf-8"
    )
    with pytest.raises(CatalogError, match=r"vocab/tags.yaml:1: tags\[0\].id = 'a b'"):
        load_catalog(toy_folder)


def test_schemas_are_schemas():
    for path in sorted((Path(cli.__file__).parent / "schema").glob("*.schema.json")):
        schema = json.loads(path.read_text(encoding="utf-8"))
        assert schema["$schema"].endswith("2020-12/schema"), path.name
        validator("paper").check_schema(schema)


def test_load_one(toys):
    assert load_paper(DATA / "valid" / "toy_survey.yaml", toys.vocab) == toys.papers["toy_survey"]
