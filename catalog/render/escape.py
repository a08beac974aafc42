"""The one path on which text of an entry reaches a page.

Templates are Jinja2 with autoescape, so whatever an entry holds becomes text; `clean` takes out what no reader
can see; `embed` folds the finished HTML onto one line, where no Markdown rule can find anything to act on.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"
_LINE_ENDS = re.compile(r"\r\n?|[\u0085\u2028\u2029\v\f]")
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
_PRE = re.compile(r"(<pre\b.*?</pre>)", re.DOTALL)
_FOLD = re.compile(r"\s*\n\s*")
_UNSAFE = str.maketrans({"<": "\u2039", ">": "\u203a", "&": "\uff06", '"': "\u201d", "{": "(", "}": ")"})


def clean(value: Any) -> Any:
    """Text without control characters, bidirectional overrides and lone surrogates; None as nothing."""
    if value is None:
        return ""
    if not isinstance(value, str):
        return value
    return type(value)(_INVISIBLE.sub("", _LINE_ENDS.sub("\n", value)))


def safe_url(url: str | None) -> str | None:
    """The address if it is an absolute http(s) one without anything hidden in it, else None (shown as text)."""
    if not url or url != clean(url) or re.search(r"\s", url):
        return None
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
    except ValueError:
        return None
    return url if valid else None


def plain(text: str, limit: int = 300) -> str:
    """One line without a character that means something to HTML, for titles and descriptions of page heads."""
    line = " ".join(str(clean(text)).split()).translate(_UNSAFE)
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "\u2026"


def front_matter(values: Mapping[str, Any]) -> str:
    """Page settings as YAML, every value as JSON on a line of its own."""
    lines = []
    for key, value in values.items():
        items = (
            [f"  - {json.dumps(item, ensure_ascii=False)}" for item in value]
            if isinstance(value, list)
            else []
        )
        lines += [f"{key}:", *items] if items else [f"{key}: {json.dumps(value, ensure_ascii=False)}"]
    return "\n".join(["---", *lines, "---", ""])


def embed(html: str) -> str:
    """Finished HTML as one line that starts with a block tag: Markdown hands it through untouched."""
    parts = _PRE.split(html.strip())
    folded = [
        part.replace("\n", "&#10;") if part.startswith("<pre") else _FOLD.sub(" ", part) for part in parts
    ]
    return f'<div class="rq">{"".join(folded)}</div>'


@cache
def environment() -> Environment:
    """The only template environment: autoescape on, an undefined name is an error."""
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"safe_url": safe_url, "num": number, "breaks": breaks}
    return env


def number(value: object) -> str:
    """A number as a reader writes it, at most six figures; text as it stands."""
    if isinstance(value, bool) or value is None:
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return str(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def breaks(text: str) -> Markup:
    """Escaped text in which long names may wrap after a slash or an underscore."""
    return Markup("<wbr>").join(re.split(r"(?<=[/_])(?=\w)", clean(text)))


def slug(text: str) -> str:
    """A name as part of an address: ASCII letters and digits in lower case, hyphens between."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text.lower()).strip("-") or "x"
