"""MkDocs on the rendered folder, as a process of its own: strict, offline, the same output for the same input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from requant.catalog.loader import Catalog
from requant.catalog.render.content import ROOT, Content, prepare
from requant.catalog.render.site import SiteError, render

SITE = ROOT / "site"
BUILD = ROOT / "build"
DEFAULT_URL = "https://requant.example/"
_NEEDS_NOTHING_NEWER = {"NO_MKDOCS_2_WARNING": "1", "SOURCE_DATE_EPOCH": "0", "PYTHONHASHSEED": "0"}


def build(
    catalog: Catalog,
    *,
    measured: Path | None = None,
    out: Path | None = None,
    site_url: str = DEFAULT_URL,
    cards: bool = True,
    skip_broken: bool = False,
) -> Path:
    """Render a catalog and build the site; returns its folder.

    Raises: SiteError for an entry with errors (unless they are skipped), for a missing checkout, or where
    MkDocs finds something wrong; its own words are in the message.
    """
    content = checked(catalog, measured, skip_broken)
    out = out or BUILD
    docs, site = out / "docs", out / "site"
    out.mkdir(parents=True, exist_ok=True)
    render(content, docs, SITE / "docs", site_url, cards)
    run_mkdocs(["build", "--strict", "--quiet", "--site-dir", str(site.resolve())], docs, site_url)
    return site


def checked(catalog: Catalog, measured: Path | None = None, skip_broken: bool = False) -> Content:
    """The content of a catalog without errors. Raises: SiteError naming every wrong entry."""
    if not (SITE / "mkdocs.yml").is_file():
        raise SiteError("the site is built from a checkout of the project; this is an installed copy")
    if catalog.errors and not skip_broken:
        listed = "\n".join(f"  {error}" for error in catalog.errors)
        raise SiteError(f"{len(catalog.errors)} entries are wrong, so no site is built:\n{listed}")
    return prepare(catalog, measured)


def run_mkdocs(arguments: list[str], docs: Path, site_url: str, capture: bool = True) -> None:
    """Run MkDocs with the project's configuration. Raises: SiteError with its output if it fails."""
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        arguments[0],
        "--config-file",
        str(SITE / "mkdocs.yml"),
        *arguments[1:],
    ]
    places = {"REQUANT_DOCS_DIR": str(docs.resolve()), "REQUANT_SITE_URL": site_url}
    found = subprocess.run(
        command, env=os.environ | _NEEDS_NOTHING_NEWER | places, capture_output=capture, text=True
    )
    if found.returncode:
        raise SiteError(f"mkdocs failed:\n{(found.stdout or '') + (found.stderr or '')}")
