"""Claims measured in several processes, which leave what they evaluate for one another (sharing.py).

The claims of one entry on checkpoints stay in one process, which then loads each checkpoint once, and so do findings of
one experiment, as a second process could only wait for it. Every process computes with one thread, so that the bits of
a result do not depend on how many there are. Each claim comes back as soon as it is measured. A process that dies costs
the claim it was at: a new one goes on with the next.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from requant.catalog.claims import Options, measure, measure_all
from requant.catalog.entry import Claim, Paper, reported
from requant.catalog.loader import load_catalog
from requant.catalog.measurement import NOT_RUN, Measurement
from requant.catalog.sharing import session

_SPAWN = multiprocessing.get_context("spawn")


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_thread() -> None:
    """Limit torch to one thread in this process, and make tiny numbers zero as the tests do."""
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


@dataclass
class _Task:
    """Claims of one entry that one process measures, those still to be measured; the one in flight first."""

    paper: Paper
    claims: deque[str]


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    task: _Task | None = field(default=None)

    def give(self, task: _Task) -> None:
        self.task = task
        self.pipe.send((task.paper.id, list(task.claims)))

    def stop(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()


def measure_many(
    papers: Iterable[Paper],
    folder: Path,
    options: Options | None = None,
    only: Callable[[Paper, Claim], bool] = lambda paper, claim: True,
    jobs: int = 1,
) -> Iterator[Measurement]:
    """Measurements of the claims of entries in `folder`, each as soon as it is made; several entries interleave.

    A claim whose process dies (out of memory, killed) gets a record that says so, like any other error.
    Closing the iterator ends the processes.
    """
    chosen = [task for paper in papers for task in _tasks(paper, only)]
    if jobs <= 1 or len(chosen) <= 1:
        one_thread()
        for task in chosen:
            wanted = frozenset(task.claims)
            yield from measure_all([task.paper], options, lambda claim, wanted=wanted: claim.id in wanted)
        return
    waiting, workers = deque(chosen), []
    with session():
        try:
            while waiting or any(worker.task for worker in workers):
                _hand_out(waiting, workers, min(jobs, len(chosen)), folder, options)
                for pipe in wait([worker.pipe for worker in workers if worker.task]):
                    worker = next(worker for worker in workers if worker.pipe is pipe)
                    yield _collect(worker, waiting, workers)
        finally:
            for worker in workers:
                worker.stop()


def _tasks(paper: Paper, only: Callable[[Paper, Claim], bool]) -> list[_Task]:
    """One task for each group of claims."""
    groups: dict[str, deque[str]] = {}
    for claim in paper.claims:
        if only(paper, claim):
            groups.setdefault(claim.group, deque()).append(claim.id)
    return [_Task(paper, claims) for claims in groups.values()]


def _hand_out(
    waiting: deque[_Task], workers: list[_Worker], jobs: int, folder: Path, options: Options | None
) -> None:
    """Give every idle process an entry, and start processes while there are entries for them."""
    for worker in workers:
        if worker.task is None and waiting:
            worker.give(waiting.popleft())
    while waiting and len(workers) < jobs:
        ours, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(target=_work, args=(theirs, folder, options), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        workers.append(_Worker(process, ours))
        workers[-1].give(waiting.popleft())


def _collect(worker: _Worker, waiting: deque[_Task], workers: list[_Worker]) -> Measurement:
    """The next measurement of a worker whose pipe has something to say; its death is one as well."""
    task = worker.task
    try:
        found = worker.pipe.recv()
    except (EOFError, OSError):
        workers.remove(worker)
        worker.stop()
        found = died(task.paper, task.paper.claim(task.claims[0]))
        if len(task.claims) > 1:
            waiting.appendleft(_Task(task.paper, deque(list(task.claims)[1:])))
        return found
    task.claims.popleft()
    if not task.claims:
        worker.task = None
    return found


def _work(pipe: Connection, folder: Path, options: Options | None) -> None:
    """What a process does: measure the entries it is given, until the pipe or the parent process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its processes
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process().sentinel,), daemon=True).start()
    one_thread()
    load = functools.cache(lambda name: load_catalog(folder, ids={name}).papers[name])
    while True:
        try:
            name, claims = pipe.recv()
        except EOFError:
            return
        paper = load(name)
        for claim in claims:
            pipe.send(measure(paper, paper.claim(claim), options))


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, also in the middle of a claim: nobody would read the result."""
    wait([parent])
    os._exit(1)


def died(paper: Paper, claim: Claim) -> Measurement:
    """The record of a claim whose process died."""
    return Measurement(
        paper=paper.id, claim=claim.id, kind=claim.kind, reported=reported(claim), measured=None, state=NOT_RUN,
        reason="error: the measuring process died (out of memory?); run this claim alone",
        protocol=getattr(claim, "protocol", None), failed=True, expected=claim.expected is not None,
    )  # fmt: skip
