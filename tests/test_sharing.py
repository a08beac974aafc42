"""Results that processes of one session leave for one another: computed once, never waited for without need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from requant.catalog import sharing
from requant.catalog.context import Context
from requant.catalog.sharing import FOLDER, Busy, all_of, session, shared

IN_ANOTHER_PROCESS = """
import sys
from requant.catalog.sharing import shared
print(shared("made", lambda: print("computed") or [1.1, "two"]))
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No session, and nothing known, whatever ran before in this process."""
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setattr(sharing, "_known", {})


def test_a_result_is_computed_once_by_all_processes_of_a_session() -> None:
    with session():
        outputs = [
            subprocess.run(
                [sys.executable, "-c", IN_ANOTHER_PROCESS], capture_output=True, text=True, check=True
            ).stdout.split("\n")
            for _ in range(2)
        ]
        assert outputs == [["computed", "[1.1, 'two']", ""], ["[1.1, 'two']", ""]]
        assert shared("made", pytest.fail) == [1.1, "two"]


def test_nothing_outlives_a_session_and_an_inner_one_is_the_outer_one() -> None:
    with session():
        folder = Path(os.environ[FOLDER])
        with session():
            assert Path(os.environ[FOLDER]) == folder
        assert folder.is_dir()
    assert FOLDER not in os.environ and not folder.exists()


def test_an_error_is_not_kept() -> None:
    with session():
        with pytest.raises(ZeroDivisionError):
            shared("fails", lambda: 1 / 0)
        assert shared("fails", lambda: 2.0) == 2.0


def test_what_another_process_is_at_comes_last() -> None:
    """The lock of `b` is held as another process would; it is let go once `c` is there."""
    with session():
        shared("b", lambda: 0)  # only to learn the name of its lock
        [file] = Path(os.environ[FOLDER]).glob("*.json")
        file.unlink()
        sharing._known.clear()
        lock, done = sharing.FileLock(file.with_suffix(".lock")), []
        lock.acquire()

        def result(name: str, *, wait: bool) -> str:
            if name == "b" and wait:
                lock.release()
            return shared(name, lambda: done.append(name) or name, wait=wait)

        with pytest.raises(Busy):
            result("b", wait=False)
        names = ("a", "b", "c")
        assert all_of([lambda wait, name=name: result(name, wait=wait) for name in names]) == list(names)
        assert done == ["a", "c", "b"]


def test_an_evaluation_is_the_same_read_back_as_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = Context().run("none", {}, protocol="reference-kjv-256-short/1")
    json_text = json.dumps(next(iter(sharing._known.values())))
    monkeypatch.setattr(sharing, "_known", {next(iter(sharing._known)): json.loads(json_text)})
    assert Context(1).run("none", {}, protocol="reference-kjv-256-short/1") == computed
    assert computed.checks.tokens and isinstance(computed.first_tokens, tuple)
