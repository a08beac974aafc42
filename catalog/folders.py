"""Writing a folder so that others see all of it or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def in_use(out: Path) -> str | None:
    """Why a new folder cannot have this name, and what to do; None if it can."""
    if out.exists() and not out.is_dir():
        return f"{out} is a file; name a new folder"
    if out.is_dir() and any(out.iterdir()):
        return f"{out} is not empty; name a new folder, or remove that one first"
    return None


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that gets its name if nothing fails, and vanishes otherwise."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield folder
        mask = os.umask(0)
        os.umask(mask)
        for path in folder.iterdir():  # some writers make files that only their owner can read
            path.chmod(0o666 & ~mask)
        folder.chmod(0o777 & ~mask)
        if problem := in_use(out):  # someone may have filled it meanwhile
            raise FileExistsError(problem)
        folder.replace(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
