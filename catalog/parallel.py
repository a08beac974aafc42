"""Claims measured in several processes, one entry each at a time: claims of one entry share quantized models.

Every process computes with one thread, so that the bits of a result do not depend on how many there are.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from requant.catalog.claims import NOT_RUN, Measurement, Options, measure, measure_all, reported
from requant.catalog.entry import Claim, Paper
from requant.catalog.loader import load_catalog


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_thread() -> None:
    """Limit torch to one thread in this process, and make tiny numbers zero as the tests do."""
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def measure_many(
    papers: Iterable[Paper],
    folder: Path,
    options: Options | None = None,
    only: Callable[[Claim], bool] = lambda claim: True,
    jobs: int = 1,
) -> Iterator[Measurement]:
    """Measurements of the claims of entries in `folder`; with jobs > 1 entries in the order in which they are done.

    An entry whose process dies (out of memory, killed) gets records that say so, like any other error.
    """
    chosen = [(paper, [claim.id for claim in paper.claims if only(claim)]) for paper in papers]
    chosen = [(paper, names) for paper, names in chosen if names]
    if jobs <= 1 or len(chosen) <= 1:
        one_thread()
        yield from measure_all([paper for paper, _ in chosen], options, only)
        return
    chosen.sort(key=lambda item: -sum(claim.runs_on_reference for claim in item[0].claims))  # longest first
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(chosen)), mp_context=context, initializer=one_thread)
    try:
        futures = {
            pool.submit(_measure_entry, folder, paper.id, names, options): paper for paper, names in chosen
        }
        for future in as_completed(futures):
            try:
                yield from future.result()
            except BrokenProcessPool:
                paper = futures[future]
                yield from (_died(paper, claim) for claim in paper.claims if only(claim))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _measure_entry(folder: Path, name: str, claims: list[str], options: Options | None) -> list[Measurement]:
    paper = load_catalog(folder, ids={name}).papers[name]
    return [measure(paper, paper.claim(claim), options) for claim in claims]


def _died(paper: Paper, claim: Claim) -> Measurement:
    return Measurement(
        paper=paper.id, claim=claim.id, kind=claim.kind, reported=reported(claim), measured=None, state=NOT_RUN,
        reason="error: a measuring process died (out of memory?); run this entry alone",
        protocol=getattr(claim, "protocol", None), failed=True, expected=claim.expected is not None,
    )  # fmt: skip
