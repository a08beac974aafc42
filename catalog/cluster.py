"""`requant run --engine ray`: the same claims as jobs on a Ray cluster, each with the resources its plan asks for.

The claims of one entry that run on the reference model are one job of one core: they share quantized models. A claim
on a checkpoint is a job of its own, with the memory of the plan and, on CUDA, one GPU. A job sends each measurement as
soon as it is made. If its worker or node dies, the rest of the job is given to another, with the claim in flight first;
a claim whose worker died three times gets a record that says so. Every claim ends in exactly one record, and since all
workers compute with one thread and have to have the same code, the records are those of the local engine.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.catalog.claims import Options, measure
from requant.catalog.entry import Paper
from requant.catalog.loader import load_catalog
from requant.catalog.measurement import NOT_RUN, Measurement
from requant.catalog.parallel import died, one_thread

if TYPE_CHECKING:
    from requant.catalog.plan import Planned

DEATHS = 3  # of the worker of one claim, after which the claim is given up
_PATIENCE = 10.0  # seconds without news after which it is checked whether a node can still take what waits


class ClusterError(RuntimeError):
    """Ray is missing, or the cluster cannot be reached or used; the message says what to do."""


@dataclass
class _Job:
    paper: Paper
    claims: deque[str]  # still to be measured, the one in flight first
    resources: dict[str, float]  # CPU, GPU, memory in bytes, in Ray's names
    deaths: int = 0  # of workers at the claim in flight
    records: Any = field(default=None, repr=False)  # Ray's generator of measurements, once submitted


def measure_on_ray(
    papers: Iterable[Paper],
    rows: Sequence[Planned],
    folder: Path | None,
    options: Options,
    *,
    address: str | None = None,
    jobs: int = 1,
) -> Iterator[Measurement]:
    """Measurements of the planned claims, each as soon as it is made. Closing the iterator cancels what is under way.

    Args:
        rows: the plan; what cannot run is recorded here without a job. Checkpoints are looked for on this machine, so
            the folders that hold them have to be shared with the workers.
        folder: of the entries, the same path on every node; None for those that are installed with requant.
        address: of a running cluster; None takes RAY_ADDRESS, else starts one here with `jobs` cores.
    Raises: ClusterError without Ray, without a cluster at the address, or for a worker with other code.
    """
    ray = _connect(address, jobs)
    by_id = {paper.id: paper for paper in papers}
    try:
        for row in rows:
            if not row.runs:
                paper = by_id[row.paper]
                yield measure(paper, paper.claim(row.claim), options)
        work = ray.remote(_work)
        arguments = (None if folder is None else str(folder), options, fingerprint())

        def submit(job: _Job) -> None:
            needs = {"num_cpus": job.resources["CPU"], "num_gpus": job.resources["GPU"]}
            needs["memory"] = job.resources["memory"] or None
            here = work.options(num_returns="streaming", max_retries=0, **needs)
            job.records = here.remote(job.paper.id, list(job.claims), *arguments)

        yield from _follow(ray, _jobs(by_id, rows, options.computes_on), submit)
    finally:
        ray.shutdown()


def fingerprint() -> str:
    """Versions of the packages and a hash of this machine's implementations: what two machines must share."""
    from requant.catalog import ledger
    from requant.catalog.code_hash import code_hash

    return f"{ledger.versions()} {code_hash()}"


def _connect(address: str | None, jobs: int):
    try:
        import ray
    except ImportError as error:
        raise ClusterError("--engine ray needs Ray: pip install 'requant[cluster]'") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # leave CUDA_VISIBLE_DEVICES to jobs with a GPU
    address = address or os.environ.get("RAY_ADDRESS")
    how: dict[str, Any] = {"address": address} if address else {"num_cpus": jobs, "include_dashboard": False}
    try:
        ray.init(**how, log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"no Ray cluster answers at {address}" if address else "no Ray cluster starts here"
        raise ClusterError(f"{where}: {error}") from error
    return ray


def _jobs(papers: dict[str, Paper], rows: Sequence[Planned], device: str) -> list[_Job]:
    """One job for the claims of an entry on the reference model, one for each claim on a checkpoint."""
    jobs: dict[str, _Job] = {}
    for row in rows:
        if not row.runs:
            continue
        gpus = 1.0 if row.memory_bytes and device.startswith("cuda") else 0.0
        memory = 0.0 if gpus else float(row.memory_bytes or 0)  # Ray counts a node's memory, not a GPU's
        key = f"{row.paper}-{row.claim}" if row.memory_bytes else row.paper
        needs = {"CPU": 1.0, "GPU": gpus, "memory": memory}
        jobs.setdefault(key, _Job(papers[row.paper], deque(), needs)).claims.append(row.claim)
    return sorted(jobs.values(), key=lambda job: -len(job.claims))  # longest first


def _follow(ray, jobs: list[_Job], submit: Callable[[_Job], None]) -> Iterator[Measurement]:
    """Submit all jobs and yield their measurements; give the rest of a job that died to another worker."""
    under_way: list[_Job] = []
    try:
        for job in jobs:
            submit(job)
            under_way.append(job)
        while under_way:
            ready, _ = ray.wait([job.records for job in under_way], num_returns=1, timeout=_PATIENCE)
            for records in ready:
                job = next(job for job in under_way if job.records is records)
                yield from _collect(ray, job, submit)
            if not ready:
                for job in under_way:
                    yield from _give_up_without_node(ray, job)
            under_way = [job for job in under_way if job.claims]
    finally:
        for job in under_way:
            ray.cancel(job.records, force=True)


def _collect(ray, job: _Job, submit: Callable[[_Job], None]) -> Iterator[Measurement]:
    """The next measurement of a job, if there is one; after the death of its worker the rest is submitted again."""
    try:
        found = ray.get(next(job.records))
    except ray.exceptions.RayTaskError as error:
        raise ClusterError(str(error.cause or error)) from error
    except (StopIteration, ray.exceptions.RayError):
        job.deaths += 1
        if job.deaths >= DEATHS:
            job.deaths = 0
            yield died(job.paper, job.paper.claim(job.claims.popleft()))
        if job.claims:
            submit(job)
        return
    job.claims.popleft()
    job.deaths = 0
    yield found


def _give_up_without_node(ray, job: _Job) -> Iterator[Measurement]:
    """If no living node can ever take the job: a record that says so for each of its claims."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(name, 0.0) >= need for name, need in job.resources.items()) for node in nodes):
        return
    needs = ", ".join(f"{_in_words(name, need)}" for name, need in job.resources.items() if need)
    ray.cancel(job.records, force=True)
    while job.claims:
        lost = died(job.paper, job.paper.claim(job.claims.popleft()))
        yield replace(lost, state=NOT_RUN, failed=False, reason=f"no node of the Ray cluster has {needs}")


def _in_words(name: str, need: float) -> str:
    return f"{need / 1e9:.1f} GB of memory" if name == "memory" else f"{need:g} {name}"


def _work(
    entry: str, claims: list[str], folder: str | None, options: Options, code: str
) -> Iterator[Measurement]:
    """What a worker does: measure the claims of one entry, one after the other."""
    one_thread()
    if fingerprint() != code:
        raise ClusterError(
            "a worker has other code or other package versions than this machine; install the same requant on all nodes"
        )
    papers = load_catalog(None if folder is None else Path(folder), ids={entry}).papers
    if entry not in papers:
        raise ClusterError(f"a worker finds no entry {entry} in {folder or 'its catalog'}; share that folder")
    for claim in claims:
        yield measure(papers[entry], papers[entry].claim(claim), options)
