"""The implementation of an entry as text: its docstring, its source in colours, and the kernels' docstrings.

Files are read and parsed, never imported.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer, TextLexer
from pygments.token import Keyword, Name, Number, Operator, Punctuation, String, Text, Token

_PLAIN = (Name, Number, Operator, Punctuation, String.Doc, Text)
_SHOWN = (Name.Function, Name.Class, Name.Decorator, Keyword)


class _Formatter(HtmlFormatter):
    """Classes for what stands out only: spans around names and numbers would double the page."""

    def _get_css_class(self, ttype: object) -> str:
        plain = any(ttype in kind for kind in _PLAIN) and not any(ttype in kind for kind in _SHOWN)
        return "" if plain or ttype is Token else super()._get_css_class(ttype)


@dataclass(frozen=True)
class Source:
    """A module as it is shown: `html` is highlighted by classes, without inline styles."""

    name: str
    docstring: str | None
    html: Markup
    lines: int


@dataclass(frozen=True)
class Kernel:
    """A kernel module: its docstring, and name and first line of each public function."""

    name: str
    docstring: str | None
    functions: tuple[tuple[str, str], ...]


@cache
def module_source(path: Path, colours: bool = True) -> Source | None:
    """The module at `path`, or None where there is no file; without colours it is a third smaller."""
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    formatter = _Formatter(cssclass="highlight", wrapcode=True)
    lexer = PythonLexer(stripnl=False) if colours else TextLexer(stripnl=False)
    shown = highlight(text, lexer, formatter).replace("<pre>", '<pre tabindex="0">')
    return Source(path.stem, _docstring(text), Markup(shown), text.count("\n"))


def kernels(folder: Path) -> list[Kernel]:
    """The public modules of a folder of kernels, by name."""
    found = []
    for path in sorted(folder.glob("*.py")):
        if path.name.startswith("_"):
            continue
        text = path.read_text(encoding="utf-8")
        found.append(Kernel(path.stem, _docstring(text), tuple(_functions(text))))
    return found


def _docstring(text: str) -> str | None:
    try:
        return ast.get_docstring(ast.parse(text))
    except SyntaxError:
        return None


def _functions(text: str) -> list[tuple[str, str]]:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return []
    public = (
        node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    )
    return [(node.name, (ast.get_docstring(node) or "").split("\n")[0]) for node in public]
