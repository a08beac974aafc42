"""A page of the site: front matter, fixed Markdown headings, and HTML from templates between them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from requant.catalog.render.escape import embed, environment, front_matter, plain, slug
from requant.catalog.render.verdicts import ICONS


@dataclass(frozen=True)
class Page:
    """One Markdown page.

    Attributes:
        path: address without suffix, from the root of the site, like `papers/gptq`.
        title, description: texts of the page head; made harmless here.
        parts: Markdown headings and lines of HTML, in order.
        hide: what the theme leaves out: navigation, toc.
    """

    path: str
    title: str
    description: str
    parts: tuple[str, ...]
    hide: tuple[str, ...] = ("navigation",)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """The file's text."""
        head = {"title": plain(self.title, 200), "description": plain(self.description)}
        settings = head | ({"hide": list(self.hide)} if self.hide else {}) | dict(self.meta)
        return front_matter(settings) + "\n" + "\n\n".join(self.parts) + "\n"

    @property
    def root(self) -> str:
        """The way from this page to the root of the site."""
        return "../" * self.path.count("/")


def heading(text: str, anchor: str) -> str:
    """A Markdown heading, so that it stands in the table of contents. For fixed texts only, never an entry's."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z ,'-]*", text) or not re.fullmatch(r"[a-z][a-z0-9-]*", anchor):
        raise ValueError(
            f"{text!r} ({anchor!r}) is not a fixed heading; texts of entries go through a template"
        )
    return f"## {text} {{ #{anchor} }}"


def html(template: str, root: str = "", **values: Any) -> str:
    """A template as a line of HTML for a page; `root` is the way to the root of the site."""
    found = environment().get_template(template)
    return embed(found.render(root=root, icons=ICONS, slug=slug, **values))
