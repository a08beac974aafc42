"""BibTeX, CSV and JSON: read back by libraries that did not write them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import pytest
from pybtex.database import parse_string
from typer.testing import CliRunner

from requant.catalog import cli, export
from requant.catalog.loader import load_catalog
from requant.catalog.schemas import validator

CATALOG = load_catalog()
ENTRIES = list(CATALOG.papers.values())
RECORD = {"state": "contradicted", "reason": "off", "measured": 12.5, "expected": False, "seconds": 1.0}
HOSTILE = '}{ \\input{x} 100% & <script>alert("1")</script> #$_^~ =cmd()'


def run(*args: object):
    return CliRunner().invoke(cli.app, ["export", *map(str, args)])


def hostile():
    return dataclasses.replace(ENTRIES[0], title=HOSTILE, authors=(HOSTILE, "Ada Lovelace"))


def test_bibtex_reads_back() -> None:
    database = parse_string(export.bibtex(ENTRIES), "bibtex")
    published = [entry for entry in ENTRIES if entry.venue]
    assert set(database.entries) == {entry.id for entry in published}
    for entry in published:
        found = database.entries[entry.id]
        assert found.fields["year"] == str(entry.venue.year)
        assert len(found.persons["author"]) == len(entry.authors)
        assert found.fields.get("eprint") == entry.ids.arxiv


def test_bibtex_of_a_hostile_title_still_balances() -> None:
    database = parse_string(export.bibtex([hostile(), ENTRIES[1]]), "bibtex")
    assert len(database.entries) == 2
    assert "input{x}" not in export.bibtex_entry(hostile()).replace(" ", "")


def test_documents_fit_their_schemas() -> None:
    verdicts = {ENTRIES[0].id: {ENTRIES[0].claims[0].id: RECORD}}
    index = export.index_document(ENTRIES, verdicts)
    assert list(validator("api_index").iter_errors(index)) == []
    assert index["entries"][0]["states"]["contradicted"] == 1
    for entry in ENTRIES:
        document = export.paper_document(entry, CATALOG.vocab, verdicts)
        assert list(validator("api_entry").iter_errors(json.loads(json.dumps(document)))) == []
    first = export.paper_document(ENTRIES[0], CATALOG.vocab, verdicts)["claims"][0]
    assert first["verdict"]["state"] == "contradicted"
    assert first["verdict"]["measured"] == 12.5


def test_a_claim_without_implementation_says_so() -> None:
    planned = next(entry for entry in ENTRIES if entry.impl is None)
    assert export.verdict(planned, planned.claims[0], {})["reason"] == "no implementation yet"
    assert export.verdict(CATALOG.papers["gptq"], CATALOG.papers["gptq"].claims[0], {})["state"] == "not run"


def test_csv_has_a_line_a_claim_and_runs_no_formula() -> None:
    rows = list(csv.DictReader(io.StringIO(export.claims_csv([*ENTRIES], CATALOG.vocab, {}))))
    assert len(rows) == sum(len(entry.claims) for entry in ENTRIES)
    claim = dataclasses.replace(ENTRIES[0].claims[0], statement='=HYPERLINK("http://x")')
    (row,) = csv.DictReader(
        io.StringIO(export.claims_csv([dataclasses.replace(ENTRIES[0], claims=(claim,))], CATALOG.vocab, {}))
    )
    assert row["statement"].startswith("'=")


def test_command_writes_and_prints(tmp_path) -> None:
    result = run("json", "gptq", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "entries" / "gptq.json").read_text())["id"] == "gptq"
    assert run("bibtex", "gptq").stdout.startswith("@")
    assert run("csv", "gptq").stdout.startswith("entry,claim")


@pytest.mark.parametrize(
    ("words", "said"), [(["bibtxt"], "did you mean bibtex"), (["csv", "gptg"], "did you mean gptq")]
)
def test_wrong_words_are_answered(words: list[str], said: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert said in result.output
