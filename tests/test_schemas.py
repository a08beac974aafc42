"""The fast validator and the one that explains must be of one opinion about every file."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from requant.catalog import schemas
from requant.catalog.errors import CatalogError
from requant.catalog.strict_yaml import Document, parse_yaml, read_yaml

ENTRIES = sorted((Path(__file__).parent.parent / "papers").glob("*.yaml"))
DOC = read_yaml(next(path for path in ENTRIES if path.stem == "bitnet"))


def places(value, path=()):
    """Every path into nested lists and mappings, at most the first two items of a list."""
    yield path
    items = (
        value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    )
    for key, item in items:
        yield from places(item, (*path, key))


PLACES = list(places(DOC.value))[1:]
VALUES = (
    st.none() | st.booleans() | st.integers(-3, 3000)
    | st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)
    | st.text(max_size=6)
    | st.sampled_from(["gptq\n", "2210.17323", "ordering", "none", " x", "https://a/b", [], {}, [1, 1]])
)  # fmt: skip


@settings(derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(where=st.sampled_from(PLACES), value=VALUES, gone=st.booleans())
def test_two_validators_one_opinion(where, value, gone) -> None:
    changed = copy.deepcopy(DOC.value)
    holder = changed
    for part in where[:-1]:
        holder = holder[part]
    if gone and isinstance(holder, dict):
        del holder[where[-1]]
    else:
        holder[where[-1]] = value
    raw = {where: str(value)} if isinstance(value, int | float) and not gone else {}
    doc = Document(DOC.file)
    doc.value = changed
    doc.raw.update(raw)
    fast = schemas._accepted(doc, "paper")
    slow = not list(schemas.validator("paper").iter_errors(changed))
    assert slow == fast or (slow and isinstance(value, float | bool)), (where, value)


@pytest.mark.parametrize("text", ["1.0", "1.5", "true", '"1"'])
def test_a_whole_number_is_written_as_one(text: str) -> None:
    good = DOC.file.read_text(encoding="utf-8")
    bad = good.replace("seed_row: 8\n", f"seed_row: {text}\n")
    assert bad != good
    with pytest.raises(CatalogError, match="seed_row"):
        schemas.check_schema(parse_yaml(DOC.file, bad.encode()), "paper")
