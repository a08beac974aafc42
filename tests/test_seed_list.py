"""The list this catalog grew from: every row has its entry, what it has wrong is recorded, its charts are traced."""

from __future__ import annotations

import hashlib

import pytest

from requant.catalog.charts import load_seed_list, same_number, seed_charts
from requant.catalog.loader import load_catalog
from requant.catalog.strict_yaml import read_yaml
from requant.catalog.vocabulary import VOCAB_DIR

SEED = load_seed_list()
CATALOG = load_catalog()


def test_the_rows_are_those_of_the_list() -> None:
    assert [row.row for row in SEED.rows] == list(range(1, 63))
    printed = "\n".join(f"{row.row} {row.title}" for row in SEED.rows)
    assert hashlib.sha256(printed.encode()).hexdigest()[:16] == "170304d907810624", "a printed title changed"


@pytest.mark.parametrize("row", SEED.rows, ids=lambda row: row.id)
def test_every_row_has_its_entry(row) -> None:
    assert row.id not in CATALOG.failed, CATALOG.failed[row.id]
    entry = CATALOG.papers.get(row.id)
    assert entry is not None, f"row {row.row} of the seed list ({row.title}) has no entry {row.id}.yaml"
    assert entry.seed_row == row.row


@pytest.mark.parametrize("row", SEED.rows, ids=lambda row: row.id)
def test_a_title_printed_wrong_is_recorded_as_a_correction(row) -> None:
    entry = CATALOG.papers[row.id]
    corrected = {correction.field for correction in entry.corrections}
    if _plain(entry.title) != _plain(row.title):
        assert "title" in corrected, f"the list prints {row.title!r}, the entry is called {entry.title!r}"


def _plain(title: str) -> str:
    return " ".join(title.split())


def test_no_two_entries_claim_one_row_or_one_arxiv_id() -> None:
    for key in (lambda entry: entry.seed_row, lambda entry: entry.ids.arxiv):
        values = [key(entry) for entry in CATALOG.papers.values() if key(entry) is not None]
        assert len(values) == len(set(values))


def test_every_printed_tag_is_known() -> None:
    doc = read_yaml(VOCAB_DIR / "tags.yaml").value
    known = {term["id"] for term in doc["tags"]} | {row["spelling"] for row in doc["dropped"]}
    known |= {alias for term in doc["tags"] for alias in term.get("aliases", ())}
    lost = {tag for row in SEED.rows for tag in row.tags} - known
    assert not lost, f"tags of the seed list that no tag has as an alias: {sorted(lost)}"


def test_each_chart_number_is_one_a_claim_prints_or_stays_hollow() -> None:
    charts = seed_charts(CATALOG.papers.values(), SEED)
    assert charts.keys() == {chart.id for chart in SEED.charts}
    for chart in SEED.charts:
        points = {(point.method, point.model): point for point in charts[chart.id]}
        assert points.keys() == chart.values.keys()
        for key, (value, drawn) in chart.values.items():
            point = points[key]
            assert (point.value, point.drawn) == (value, drawn)
            if point.claim is None:
                assert not point.seen, "a number without a claim has no seen source"
                continue
            claim = CATALOG.papers[point.entry].claim(point.claim)
            assert claim.model == point.model
            assert any(same_number(number, value) for number in (claim.value, *claim.baselines.values()))
            assert point.seen == (claim.source.evidence != "recalled")


def test_a_number_no_claim_prints_is_hollow() -> None:
    charts = seed_charts([], SEED)
    assert not any(point.seen for points in charts.values() for point in points)
