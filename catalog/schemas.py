"""Checking a parsed file against its JSON Schema and turning the outcome into one error a person can act on.

Good files are accepted by jsonschema-rs, forty times faster; only what it refuses is looked at by jsonschema, whose
errors can be explained. A test holds the two to one opinion. Each error a claim can cause lies under the `then`
of the branch its `kind` selects, so the errors of a file are flat and the one to report can be chosen: an unknown
key first (a misspelt key explains the missing one), then by line.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
from jsonschema import Draft202012Validator, ValidationError, validators

from requant.catalog.errors import CatalogError, nearest, shorten
from requant.catalog.strict_yaml import Document

SCHEMA_DIR = Path(__file__).parent / "schema"
_NAMES = {
    "string": "text",
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "a mapping",
}
_CONSIDERED = 200  # violations among which the one to report is chosen
_MISSING = re.compile(r"^'(.*)' is a required property$")
_EXPLAINED = frozenset(
    (
        "minProperties",
        "maxProperties",
        "not",
        "minItems",
        "maxItems",
        "uniqueItems",
        "pattern",
        "minLength",
        "minimum",
        "maximum",
        "exclusiveMinimum",
    )
)  # rules whose schema says in its description what is wanted


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.removesuffix("$") + (r"\Z" if pattern.endswith("$") else ""))


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """JSON Schema's `$` is the end of the text; Python's also matches before a final line break."""
    if isinstance(instance, str) and not _compiled(pattern).search(instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _unique(validator: Any, wanted: bool, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """Linear in the length, where jsonschema's own check is quadratic for lists of mixed types."""
    if (
        wanted
        and isinstance(instance, list)
        and len({json.dumps(item, sort_keys=True) for item in instance}) < len(instance)
    ):
        yield ValidationError(f"{instance!r} has an element twice")


def _is_integer(checker: Any, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_Validator = validators.extend(
    Draft202012Validator,
    validators={"pattern": _pattern, "uniqueItems": _unique},
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer),
)


@functools.cache
def validator(name: str) -> Any:
    """The compiled validator of `schema/<name>.schema.json`."""
    schema = json.loads((SCHEMA_DIR / f"{name}.schema.json").read_text(encoding="utf-8"))
    return _Validator(_inline(schema, schema.pop("$defs", {})))


@functools.cache
def _acceptor(name: str) -> tuple[Any, frozenset[str]]:
    """The fast validator of a schema, and the keys under which it wants whole numbers."""
    schema = json.loads((SCHEMA_DIR / f"{name}.schema.json").read_text(encoding="utf-8"))
    return jsonschema_rs.validator_for(schema), frozenset(_integer_keys(schema, ""))


def _integer_keys(schema: Any, key: str) -> Iterator[str]:
    if isinstance(schema, list):
        for part in schema:
            yield from _integer_keys(part, key)
    elif isinstance(schema, dict):
        if "integer" in (
            schema.get("type") if isinstance(schema.get("type"), list) else [schema.get("type")]
        ):
            yield key
        for word, part in schema.items():
            if word in ("properties", "$defs"):
                for name, inner in part.items():
                    yield from _integer_keys(inner, name)
            elif isinstance(part, dict | list):
                yield from _integer_keys(part, key)


def _accepted(doc: Document, name: str) -> bool:
    """Whether the file is certainly good. JSON Schema takes 1.0 for a whole number; we do not, and look closer."""
    validator, integer_keys = _acceptor(name)
    if not validator.is_valid(doc.value):
        return False
    last_names = (next((part for part in reversed(path) if isinstance(part, str)), "") for path in doc.raw)
    return not any(
        last in integer_keys and not text.lstrip("+-").isdigit()
        for last, text in zip(last_names, doc.raw.values(), strict=True)
    )


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    """The schema with every `{"$ref": "#/$defs/x"}` replaced by x, a third faster; there are no cycles."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inline(definitions[schema["$ref"].removeprefix("#/$defs/")], definitions)
        return {key: _inline(part, definitions) for key, part in schema.items()}
    return [_inline(part, definitions) for part in schema] if isinstance(schema, list) else schema


def check_schema(doc: Document, name: str) -> None:
    """Raises: CatalogError for the most telling violation of the schema `name`, if there is any."""
    if not isinstance(doc.value, dict):
        found = "is empty" if doc.value is None else f"holds {_type_name(doc.value)}"
        raise doc.error((), f"{found}, but an entry is a mapping of fields")
    if _accepted(doc, name):
        return
    problems = list(itertools.islice(validator(name).iter_errors(doc.value), _CONSIDERED))
    if problems:
        raise _explain(doc, min(problems, key=functools.partial(_rank, doc)))


def _rank(doc: Document, problem: ValidationError) -> tuple[int, int, int]:
    path = tuple(problem.absolute_path)
    unknown = problem.validator == "additionalProperties" or "propertyNames" in problem.schema_path
    return (0 if unknown else 1, doc.line(path) or 0, -len(path))


def _explain(doc: Document, problem: ValidationError) -> CatalogError:
    path, value, rule = tuple(problem.absolute_path), problem.instance, problem.validator
    about = problem.schema.get("description") if isinstance(problem.schema, dict) else None
    if rule == "additionalProperties":
        known = problem.schema["properties"]
        key = next(key for key in value if key not in known)
        return doc.error(
            (*path, key), "is not a known key", suggestion=nearest(key, known.keys() - value.keys())
        )
    if "propertyNames" in problem.schema_path:
        return doc.error(
            (*path, value), f"is not an allowed name: {about}", suggestion=_near_name(value, about)
        )
    if rule == "required":
        found = _MISSING.match(problem.message)
        key = found[1] if found else ""
        wanted = problem.schema.get("properties", {}).get(key, {}).get("description")
        return doc.error((*path, key), f"is missing{': ' + wanted if wanted else ''}", shown=path)
    if rule in ("enum", "const"):
        choices = problem.validator_value if rule == "enum" else [problem.validator_value]
        hint = nearest(value, choices)
        return doc.error(
            path, f"is not one of {', '.join(map(str, choices))}", value=shorten(value), suggestion=hint
        )
    if rule == "type":
        return doc.error(path, _type_message(doc, path, problem, about), value=shorten(value))
    message = f"does not fit: {about}" if rule in _EXPLAINED and about else problem.message
    return doc.error(path, message, value=shorten(value))


def _type_message(
    doc: Document, path: tuple[str | int, ...], problem: ValidationError, about: str | None
) -> str:
    types = (
        problem.validator_value if isinstance(problem.validator_value, list) else [problem.validator_value]
    )
    message = f"must be {' or '.join(_NAMES[name] for name in types)}, not {_type_name(problem.instance)}"
    if "string" in types and path in doc.raw:
        message += f'; put it in quotes: "{doc.raw[path]}"'
    return f"{message} ({about})" if about else message


def _type_name(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    names = {
        str: "text",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "a mapping",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def _near_name(value: Any, about: str | None) -> str | None:
    return nearest(value, [word for word in (about or "").split() if "_" in word or word == "symmetric"])
