"""The command `requant`. A verb imports what it needs itself, so `requant check` never loads torch."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from requant.catalog.checks import EVIDENCE
from requant.catalog.doctor import doctor
from requant.catalog.entry import Paper
from requant.catalog.errors import CatalogError, nearest, one_line
from requant.catalog.eval_cli import app as eval_app
from requant.catalog.loader import Catalog, check_id, default_folders, load_catalog, orphan_modules
from requant.catalog.models_cli import app as models_app
from requant.catalog.quantize_cli import quantize
from requant.catalog.run_cli import app as run_app
from requant.catalog.site_cli import app as site_app
from requant.catalog.terminal import JsonOption, PapersOption, console, known, stop

app = typer.Typer(
    name="requant",
    help="The LLM-quantization literature as executable claims.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(site_app)
app.command()(quantize)
app.command()(doctor)
app.add_typer(run_app)
app.add_typer(models_app)
app.add_typer(eval_app)


def main() -> None:
    """Entry point: wrong use and unreadable files end in one line and exit code 2, not in a traceback."""
    try:
        app()
    except BrokenPipeError:  # `requant check | head`
        sys.stderr.close()
        raise SystemExit(1) from None
    except (CatalogError, OSError) as problem:
        stop(str(problem))


def _version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"requant {version('requant')}")
        except PackageNotFoundError:
            typer.echo("requant (not installed)")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before the verb."""


@app.command()
def new(
    name: Annotated[
        str, typer.Argument(metavar="ID", help="Id of the entry: lower-case letters, digits, underscores.")
    ],
    arxiv: Annotated[str | None, typer.Option(metavar="X", help="arXiv id, like 2210.17323.")] = None,
    title: Annotated[str | None, typer.Option(metavar="T", help="Title.")] = None,
    papers: PapersOption = None,
) -> None:
    """Write papers/ID.yaml and reference_impls/ID.py with TODO(you) where something is missing."""
    from requant.catalog.scaffold import create

    if problem := check_id(name):
        stop(f"{name!r} is not an id: {problem}")
    if arxiv is not None and not re.fullmatch(r"[0-9]{4}\.[0-9]{4,5}", arxiv):
        stop(f"--arxiv {arxiv!r} is not an arXiv id like 2210.17323 (without version)")
    if title is not None and not (title.strip() and title == title.strip() and title.isprintable()):
        stop("--title must be one line of printable text")
    folders = default_folders(papers)
    for path in create(name, folders.papers, folders.impls, arxiv, title):
        typer.echo(f"wrote {path}")
    typer.echo(f"next: fill in every TODO(you), then run: requant check {name}")


@app.command()
def check(
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[IDS]...", help="Entries to check (default: all).")
    ] = None,
    json_file: JsonOption = None,
    papers: PapersOption = None,
) -> None:
    """Check entries: schema, vocabularies, and that the parts fit together. Exit code 1 if one is wrong."""
    catalog = load_catalog(papers, ids=set(ids) if ids else None)
    known(ids or (), catalog)
    outcomes = check_outcomes(catalog, orphans=not ids)
    _print_check(outcomes)
    if json_file is not None:
        from requant.catalog.files import write_json

        write_json(json_file, [outcome.record() for outcome in outcomes])
    if any(outcome.error for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
def export(
    form: Annotated[str, typer.Argument(metavar="bibtex|json|csv", help="What to write.")],
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[IDS]...", help="Entries to export (default: all).")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="File, or for json a folder (default: print to the terminal)."),
    ] = None,
    papers: PapersOption = None,
) -> None:
    """Write the catalog as BibTeX, as JSON (an index and one document an entry), or as CSV (a line a claim)."""
    forms = ("bibtex", "json", "csv")
    if form not in forms:
        hint = nearest(form, forms)
        stop(f"{form!r} is not one of {', '.join(forms)}" + (f"; did you mean {hint}?" if hint else ""))
    catalog = load_catalog(papers, ids=set(ids) if ids else None)
    known(ids or (), catalog)
    for error in catalog.errors:
        stop(f"{error}")

    from requant.catalog.export import write_export

    for path in write_export(form, catalog, out):
        typer.echo(f"wrote {path}")


@dataclass(frozen=True)
class Outcome:
    """What `requant check` found out about one file: the entry it holds, or what is wrong."""

    id: str
    path: Path
    paper: Paper | None
    error: CatalogError | None

    def record(self) -> dict[str, Any]:
        """One record of `requant check --json` (schema/check.schema.json)."""
        return {
            "id": one_line(self.id),
            "file": one_line("/".join(self.path.parts[-2:])),
            "kind": self.paper.kind if self.paper else None,
            "ok": self.error is None,
            "error": self.error.record() if self.error else None,
            "n_claims": len(self.paper.claims) if self.paper else None,
        }


def check_outcomes(catalog: Catalog, orphans: bool = True) -> list[Outcome]:
    """One outcome for every entry that was loaded, then one for every module that no entry names."""
    files = {
        name: path for name, path in catalog.files.items() if name in catalog.papers or name in catalog.failed
    }
    outcomes = [
        Outcome(name, path, catalog.papers.get(name), catalog.failed.get(name))
        for name, path in files.items()
    ]
    for name in orphan_modules(catalog) if orphans else ():
        path = catalog.folders.impls / f"{name}.py"
        message = f"no entry names this module; write papers/{name}.yaml, or let its name begin with _"
        if name.startswith(EVIDENCE):
            message = f"there is no method {path.name} beside this folder; rename or delete one of the two"
        outcomes.append(Outcome(name, path, None, CatalogError(path, "", message)))
    return outcomes


def _print_check(outcomes: list[Outcome]) -> None:
    table = Table("id", "kind", "claims", "state")
    for outcome in outcomes:
        record = outcome.record()
        claims = "-" if record["n_claims"] is None else str(record["n_claims"])
        state = Text("ok", style="green") if record["ok"] else Text("error", style="bold red")
        table.add_row(Text(record["id"]), Text(record["kind"] or "-"), Text(claims), state)
    if outcomes:
        console().print(table)
    errors = [outcome.error for outcome in outcomes if outcome.error]
    for error in errors:
        typer.echo(str(error))
    n_claims = sum(len(outcome.paper.claims) for outcome in outcomes if outcome.paper)
    typer.echo(
        f"{len(outcomes)} checked, {n_claims} claims, {len(errors)} error{'' if len(errors) == 1 else 's'}"
    )


if __name__ == "__main__":
    main()
