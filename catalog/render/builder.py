"""MkDocs on the rendered folder, as a process of its own: strict, offline, the same output for the same input."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from requant.catalog.loader import Catalog
from requant.catalog.render.content import ROOT, Content, prepare
from requant.catalog.render.site import SiteError, render

SITE = ROOT / "site"
BUILD = ROOT / "build"
DEFAULT_URL = "https://requant.example/"
FIXED = {"NO_MKDOCS_2_WARNING": "1", "SOURCE_DATE_EPOCH": "0", "PYTHONHASHSEED": "0"}


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
    out.mkdir(parents=True, exist_ok=True)
    render(content, out / "docs", SITE / "docs", site_url, cards)
    shutil.copyfile(SITE / "mkdocs.yml", out / "mkdocs.yml")
    shutil.rmtree(out / "overrides", ignore_errors=True)
    shutil.copytree(SITE / "overrides", out / "overrides")
    run_mkdocs(out / "mkdocs.yml", site_url)
    return out / "site"


def checked(catalog: Catalog, measured: Path | None = None, skip_broken: bool = False) -> Content:
    """The content of a catalog without errors. Raises: SiteError naming every wrong entry."""
    if not (SITE / "mkdocs.yml").is_file():
        raise SiteError("the site is built from a checkout of the project; this is an installed copy")
    if catalog.errors and not skip_broken:
        listed = "\n".join(f"  {error}" for error in catalog.errors)
        raise SiteError(f"{len(catalog.errors)} entries are wrong, so no site is built:\n{listed}")
    return prepare(catalog, measured)


def run_mkdocs(config: Path, site_url: str) -> None:
    """Build what a configuration describes. Raises: SiteError with MkDocs' own words if it finds anything wrong."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", str(config)]
    environment = os.environ | FIXED | {"REQUANT_SITE_URL": site_url}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    if found.returncode:
        raise SiteError(f"mkdocs failed:\n{found.stdout}{found.stderr}")
