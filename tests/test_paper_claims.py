"""Every claim of every entry, measured. `pytest -k paper` runs exactly this file; `-k gptq` one entry's claims.

A claim that cannot run here is skipped with its reason. One that is contradicted fails, unless the entry
expects it (xfail, strict: an unexpected success fails too).
"""

from __future__ import annotations

import pytest

from requant.catalog.claims import Options, measure, without_method
from requant.catalog.entry import Claim, FindingClaim, OrderingClaim, Paper
from requant.catalog.loader import load_catalog
from requant.catalog.measurement import CONTRADICTED, NOT_RUN, REPRODUCED

CLAIMS = [(paper, claim) for paper in load_catalog().papers.values() for claim in paper.claims]


def _params(pairs: list[tuple[Paper, Claim]]) -> list:
    return [pytest.param(paper, claim, id=f"{paper.id}-{claim.id}") for paper, claim in pairs]


@pytest.fixture(scope="session")
def options(request: pytest.FixtureRequest) -> Options:
    return Options(
        models_dir=request.config.getoption("--models-dir"), download=request.config.getoption("--download")
    )


@pytest.mark.parametrize(("entry", "claim"), _params(CLAIMS))
def test_claim(entry: Paper, claim: Claim, options: Options, keep) -> None:
    result = measure(entry, claim, options)
    keep(result)
    assert not result.failed, result.reason
    if result.state == NOT_RUN:
        pytest.skip(result.reason)
    if claim.expected and result.state == CONTRADICTED:
        pytest.xfail(claim.expected.reason)
    assert not claim.expected, (
        f"expected to be contradicted ({claim.expected.reason}), but reproduced: update the entry"
    )
    assert result.state == REPRODUCED, (
        f"reported {result.reported}, measured {result.measured} ({result.reason})"
    )


COMPARING = [
    (paper, claim)
    for paper, claim in CLAIMS
    if isinstance(claim, OrderingClaim) or (isinstance(claim, FindingClaim) and claim.function)
]


@pytest.mark.parametrize(("entry", "claim"), _params(COMPARING))
def test_power(entry: Paper, claim: Claim) -> None:
    """With its method replaced by the stated baseline, the claim must fail; a claim that cannot fail says nothing."""
    result = measure(entry, without_method(claim))
    assert not result.failed, result.reason
    assert result.state == CONTRADICTED, f"{claim.relation} holds even without the method: {result.reason}"
