"""Results that the processes of one session leave for one another, so that none is computed twice.

The claims of an entry are spread over all cores, and compare the same quantized models. What one process has evaluated,
the others read from a folder that lives as long as the session. Every process computes with one thread, so that it does
not matter which of them computed a result.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from requant.catalog.files import write_atomic

FOLDER = "REQUANT_SESSION"  # environment variable, so that child processes inherit it
_known: dict[str, Any] = {}


class Busy(Exception):
    """Another process of this session is computing the result."""


@contextmanager
def session() -> Iterator[None]:
    """Inside, this process and those that it starts share results; nothing outlives the session."""
    if FOLDER in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="requant-") as folder:
        os.environ[FOLDER] = folder
        try:
            yield
        finally:
            del os.environ[FOLDER]


def shared(key: str, compute: Callable[[], Any], *, wait: bool = True) -> Any:
    """compute(), or what it gave before in this process or, inside a session, in any other.

    Args:
        key: what decides the result, within one state of the code.
        compute: gives something that JSON can hold. What it raises is not kept.
        wait: whether to wait for a process that is computing the same.
    Raises: Busy, if there is one and `wait` is false.
    """
    if key in _known:
        return _known[key]
    folder = os.environ.get(FOLDER)
    if folder is None:
        _known[key] = compute()
        return _known[key]
    file = Path(folder) / f"{sha256(key.encode()).hexdigest()[:32]}.json"
    try:
        with FileLock(file.with_suffix(".lock"), timeout=-1 if wait else 0):
            if not file.exists():
                write_atomic(file, json.dumps(compute()))
    except Timeout:
        raise Busy(key) from None
    _known[key] = json.loads(file.read_text(encoding="utf-8"))
    return _known[key]


def all_of(results: Sequence[Callable[..., Any]]) -> list[Any]:
    """The given results in their order, but computed in whichever order keeps this process from waiting.

    Args:
        results: each called with wait=False first, and with wait=True once all others are there.
    """
    found: dict[int, Any] = {}
    for wait in (False, True):
        for index, result in enumerate(results):
            if index not in found:
                try:
                    found[index] = result(wait=wait)
                except Busy:
                    continue
    return [found[index] for index in range(len(results))]
