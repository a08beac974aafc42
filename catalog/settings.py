"""A method and its Config from the texts of a command line."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from requant.catalog.context import load_impl
from requant.catalog.errors import nearest
from requant.catalog.loader import default_folders

_LIMITS = {"w_bits": (1, 16), "a_bits": (2, 16), "kv_bits": (1, 16), "group_size": (1, 2**20)}
_BOOLS = {"true": True, "false": False}


class SettingsError(ValueError):
    """There is no such method, setting or value; one line that says which, and what there is."""


def find_method(name: str) -> ModuleType:
    """The implementation with this id. Raises: SettingsError with the nearest id."""
    known = sorted(path.stem for path in default_folders().impls.glob("[a-z]*.py"))
    if name not in known:
        raise SettingsError(f"there is no method {name!r}{hint(name, known)}; there are {', '.join(known)}")
    impl = load_impl(name)
    if not (hasattr(impl, "quantize") and hasattr(impl, "Config")):
        raise SettingsError(f"{name} is an analysis, it quantizes nothing")
    return impl


def read_config(impl: ModuleType, settings: Sequence[str], seed: int) -> Any:
    """impl.Config from `key=value` texts; seed goes where the Config has one. Raises: SettingsError."""
    name, kinds = impl.__name__.rpartition(".")[2], typing.get_type_hints(impl.Config)
    values: dict[str, Any] = {"seed": seed} if "seed" in kinds else {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise SettingsError(f"--config {text!r} is not of the form key=value")
        if key not in kinds:
            raise SettingsError(f"{name} has no setting {key!r}{hint(key, kinds)}; it has {', '.join(kinds)}")
        try:
            values[key] = _typed(value, kinds[key])
        except ValueError:
            kind = getattr(kinds[key], "__name__", None) or str(kinds[key])
            raise SettingsError(f"--config {key}={value}: {key} of {name} is of the type {kind}") from None
        low, high = _LIMITS.get(key, (None, None))
        if low is not None and values[key] is not None and not low <= values[key] <= high:
            raise SettingsError(f"--config {key}={value}: {key} must lie in {low}..{high}")
    try:
        return impl.Config(**values)
    except (ValueError, TypeError) as problem:
        raise SettingsError(f"{name}: {problem}") from problem


def _typed(text: str, kind: Any) -> Any:
    """The text as a value of this type. Raises: ValueError."""
    if isinstance(kind, types.UnionType):
        if type(None) in typing.get_args(kind) and text.lower() in ("none", "null"):
            return None
        kinds = [one for one in typing.get_args(kind) if one is not type(None)]
        return _typed(text, kinds[0])
    if typing.get_origin(kind) is tuple:
        parts, inner = text.split(","), typing.get_args(kind)
        inner = [inner[0]] * len(parts) if inner[-1] is Ellipsis else inner
        return tuple(_typed(part.strip(), one) for part, one in zip(parts, inner, strict=True))
    if kind is bool:
        if text.lower() not in _BOOLS:
            raise ValueError(text)
        return _BOOLS[text.lower()]
    if kind not in (int, float, str):
        raise ValueError(text)
    return kind(text)


def hint(name: str, choices: Sequence[str] | Mapping[str, Any]) -> str:
    """` (did you mean X?)`, or nothing where no choice is close."""
    found = nearest(name, choices)
    return f" (did you mean {found}?)" if found else ""
