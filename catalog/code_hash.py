"""A hash of the source that decides what a reference implementation computes: its module and all that it reaches.

A module reaches what it imports from reference_impls, and the methods it names in a string, which is how an experiment
asks for a run of another method. Nothing is imported here; the source is read.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

_PACKAGE = "requant.reference_impls"


def code_hash(modules: Iterable[str] | None = None, folder: Path | None = None) -> str:
    """SHA-256, hexadecimal.

    Args:
        modules: names below reference_impls, such as `gptq` or `evidence/quip`; None: all there are.
        folder: to be read in place of the installed reference_impls.
    """
    if folder is None:
        import requant.reference_impls

        folder = Path(requant.reference_impls.__file__).parent
    names = sorted(_all(folder)) if modules is None else _reached(frozenset(modules), folder)
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode() + b"\0" + (folder / f"{name}.py").read_bytes())
    return digest.hexdigest()


@functools.cache
def _reached(modules: frozenset[str], folder: Path) -> tuple[str, ...]:
    """The given modules, and those they reach in any number of steps, sorted."""
    known, found, waiting = _all(folder), set(), set(modules)
    while waiting:
        name = waiting.pop()
        if name in known and name not in found:
            found.add(name)
            waiting |= _neighbours(name, folder)
    return tuple(sorted(found))


@functools.cache
def _all(folder: Path) -> frozenset[str]:
    files = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.py"))
    return frozenset(path.as_posix() for path in files)


@functools.cache
def _neighbours(name: str, folder: Path) -> frozenset[str]:
    """What one module reaches in one step, among other strings and names that are no modules."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((folder / f"{name}.py").read_bytes())):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{_PACKAGE}."):
            inside = node.module.removeprefix(_PACKAGE).lstrip(".").replace(".", "/")
            found |= {inside} | {f"{inside}/{alias.name}".lstrip("/") for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return frozenset(found)
