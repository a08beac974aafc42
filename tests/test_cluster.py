"""`--engine ray` against a real Ray cluster on this machine: a head that takes no jobs and two workers of one core."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from requant.catalog import cluster
from requant.catalog.claims import Options, measure
from requant.catalog.cli import app
from requant.catalog.cluster import ClusterError, measure_on_ray
from requant.catalog.entry import Paper
from requant.catalog.loader import load_catalog
from requant.catalog.measurement import NOT_RUN, Measurement
from requant.catalog.plan import Planned, plan

ray = pytest.importorskip("ray", reason="the cluster extra is not installed")
SMALL = {"object_store_memory": 80 * 2**20}
LOCAL = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}


@pytest.fixture(scope="module")
def papers() -> dict[str, Paper]:
    return load_catalog(ids={"rtn", "gptq"}).papers


@pytest.fixture(scope="module")
def vocab():
    return load_catalog(ids={"rtn"}).vocab


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch):
    """The cluster and its two worker nodes."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **SMALL})
    nodes = [found.add_node(num_cpus=1, **SMALL) for _ in range(2)]
    found.wait_for_nodes()
    yield found, nodes
    ray.shutdown()
    found.shutdown()


def rows_of(papers: dict[str, Paper], vocab, wanted: set[str]) -> list[Planned]:
    return plan(papers.values(), Options(), vocab, {}, None, lambda paper, claim: claim.id in wanted)


def key(found: Measurement) -> tuple[str, str]:
    return found.paper, found.claim


def test_a_killed_worker_loses_no_claim(papers: dict[str, Paper], vocab, workers) -> None:
    """One of two busy workers is killed; its entry goes on elsewhere, from the claim in flight."""
    found, nodes = workers
    wanted = {"fewer_bits_cost_more", "groups_help", "bits_w4_g128", "diagonal_hessian_is_rtn", "bits_w3_g128",
              "proxy_loss_below_rtn", "matches_explicit_obs", "opt125m_w4"}  # fmt: skip
    rows = rows_of(papers, vocab, wanted)
    assert {row.paper for row in rows} == {"rtn", "gptq"} and not all(row.runs for row in rows)
    records, killed = [], False
    for record in measure_on_ray(papers.values(), rows, None, Options(), address=found.address):
        records.append(record)
        if record.state != NOT_RUN and not killed:  # the cluster works; both nodes have a job
            found.remove_node(nodes[0], allow_graceful=False)
            killed = True
    assert killed
    assert sorted(map(key, records)) == sorted((row.paper, row.claim) for row in rows), "lost or doubled"
    for record in records:
        here = measure(papers[record.paper], papers[record.paper].claim(record.claim))
        assert replace(record, seconds=0.0) == replace(here, seconds=0.0)


def test_what_no_node_can_take_is_said(papers: dict[str, Paper], vocab, workers, monkeypatch) -> None:
    monkeypatch.setattr(cluster, "_PATIENCE", 0.2)
    (row,) = rows_of({"rtn": papers["rtn"]}, vocab, {"bits_w4_g128"})
    huge = replace(row, memory_bytes=10**15)
    found, _nodes = workers
    (record,) = measure_on_ray(papers.values(), [huge], None, Options(), address=found.address)
    assert record.state == NOT_RUN and not record.failed
    assert "no node of the Ray cluster has 1 CPU, 1000000.0 GB of memory" in record.reason


class Dying:
    """Stands for Ray: workers that die whenever they are at the claim `deadly`."""

    class exceptions:
        RayError, RayTaskError = type("RayError", (Exception,), {}), type("RayTaskError", (Exception,), {})

    @staticmethod
    def get(item: Measurement | str) -> Measurement:
        if item == "died":
            raise Dying.exceptions.RayError
        return item


def test_a_claim_that_kills_its_workers_is_given_up(papers: dict[str, Paper]) -> None:
    paper, tries = papers["rtn"], []
    claims = [claim.id for claim in paper.claims][:3]

    def submit(job) -> None:
        tries.append(list(job.claims))
        job.records = iter(
            ["died" if name == claims[1] else measure(paper, paper.claim(name)) for name in job.claims]
        )

    job = cluster._Job(paper, deque(claims), {"CPU": 1.0})
    submit(job)
    records = []
    while job.claims:
        records.extend(cluster._collect(Dying, job, submit))
    assert [record.claim for record in records] == claims
    assert [record.failed for record in records] == [False, True, False]
    assert len(tries) == cluster.DEATHS + 1 and tries[-1] == claims[2:]


def test_other_code_on_a_worker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "one_thread", lambda: None)
    with pytest.raises(ClusterError, match="other code"):
        next(cluster._work("rtn", ["bits_w4_g128"], None, Options(), "another fingerprint"))
    with pytest.raises(ClusterError, match="share that folder"):
        next(cluster._work("no_such", ["x"], None, Options(), cluster.fingerprint()))


def test_cluster_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", "rtn", "--address", "127.0.0.1:1"])
    assert result.exit_code == 2 and "--address goes with --engine ray" in result.output
