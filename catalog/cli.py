"""The command `requant`. A verb imports what it needs itself, so `requant check` never loads torch."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from requant.catalog.entry import Paper
from requant.catalog.errors import CatalogError, nearest, one_line
from requant.catalog.loader import Catalog, check_id, default_folders, load_catalog, orphan_modules
from requant.catalog.site_cli import app as site_app

app = typer.Typer(
    name="requant",
    help="The LLM-quantization literature as executable claims.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(site_app)
PapersOption = Annotated[
    Path | None, typer.Option("--papers", metavar="DIR", help="Folder of entries (default: the catalog's).")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the records to FILE.")
]


def main() -> None:
    """Entry point: wrong use and unreadable files end in one line and exit code 2, not in a traceback."""
    try:
        app()
    except BrokenPipeError:  # `requant check | head`
        sys.stderr.close()
        raise SystemExit(1) from None
    except (CatalogError, OSError) as problem:
        _stop(str(problem))


def _stop(message: str) -> None:
    typer.echo(f"requant: {one_line(message)}", err=True)
    raise SystemExit(2)


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
        _stop(f"{name!r} is not an id: {problem}")
    if arxiv is not None and not re.fullmatch(r"[0-9]{4}\.[0-9]{4,5}", arxiv):
        _stop(f"--arxiv {arxiv!r} is not an arXiv id like 2210.17323 (without version)")
    if title is not None and not (title.strip() and title == title.strip() and title.isprintable()):
        _stop("--title must be one line of printable text")
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
    _known(ids or (), catalog)
    outcomes = check_outcomes(catalog, orphans=not ids)
    _print_check(outcomes)
    if json_file is not None:
        from requant.catalog.files import write_json

        write_json(json_file, [outcome.record() for outcome in outcomes])
    if any(outcome.error for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
def run(
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[IDS]...", help="Entries to measure (default: all).")
    ] = None,
    claim: Annotated[
        str | None, typer.Option("--claim", metavar="GLOB", help="Only claims whose id matches.")
    ] = None,
    json_file: JsonOption = None,
    save: Annotated[bool, typer.Option("--save", help="Add the records to the ledger.")] = False,
    models_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of checkpoints: DIR/<organisation>/<name>.")
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch the checkpoints and data that claims name.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where checkpoints run: cpu, cuda, ...")] = "cpu",
    jobs: Annotated[
        int, typer.Option(min=0, metavar="N", help="Entries measured at once (0: one a core).")
    ] = 1,
    papers: PapersOption = None,
) -> None:
    """Measure claims and print what was reported and measured. Exit code 1 if one is not as expected."""
    catalog = load_catalog(papers)
    _known(ids or (), catalog)
    for name in ids or catalog.files:
        if name in catalog.failed:
            _stop(f"{catalog.failed[name]}")
    chosen = [catalog.papers[name] for name in ids] if ids else list(catalog.papers.values())

    from requant.catalog import ledger
    from requant.catalog.claims import Options
    from requant.catalog.files import write_atomic
    from requant.catalog.parallel import cores, measure_many
    from requant.catalog.report import print_report, progress_text

    options = Options(str(models_dir) if models_dir else None, download, device)
    wanted = [c for paper in chosen for c in paper.claims if claim is None or fnmatchcase(c.id, claim)]
    if not wanted:
        _stop(f"no claim of {', '.join(p.id for p in chosen)} matches {claim!r}")
    console, done = _console(), []
    try:
        for item in measure_many(
            chosen,
            catalog.folders.papers,
            options,
            only=lambda c: claim is None or fnmatchcase(c.id, claim),
            jobs=jobs or cores(),
        ):
            done.append(item)
            console.print(progress_text(item, len(done), len(wanted)))
    except KeyboardInterrupt:
        console.print(Text("stopped; what was measured so far is kept", style="yellow"))
    console.print()
    done.sort(key=lambda item: item.paper)
    print_report(done, console)
    if json_file is not None:
        write_atomic(json_file, ledger.records_json(done))
    if save:
        for path in ledger.save(done, device=device):
            typer.echo(f"saved {path.name}")
    if len(done) < len(wanted) or not all(item.ok for item in done):
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
        _stop(f"{form!r} is not one of {', '.join(forms)}" + (f"; did you mean {hint}?" if hint else ""))
    catalog = load_catalog(papers, ids=set(ids) if ids else None)
    _known(ids or (), catalog)
    for error in catalog.errors:
        _stop(f"{error}")

    from requant.catalog.export import write_export

    for path in write_export(form, catalog, out):
        typer.echo(f"wrote {path}")


@app.command()
def models(json_file: JsonOption = None, papers: PapersOption = None) -> None:
    """List the checkpoints that claims name, and which of them are in the local Hugging Face cache."""
    from requant.catalog.inventory import checkpoints, in_units

    catalog = load_catalog(papers)
    rows = checkpoints(catalog)
    table = Table("checkpoint", "params", "licence", "gated", "size", "here", "claims")
    for row in rows:
        gated = {True: "yes", False: "no", None: "?"}[row.gated]
        size = in_units(row.size_bytes, (" B", " kB", " MB", " GB", " TB"))
        here = "yes" if row.cached else "-"
        cells = (row.id, in_units(row.params), row.license or "?", gated, size, here, str(row.n_claims))
        table.add_row(*map(Text, cells))
    _console().print(table)
    unlocked = sum(row.n_claims for row in rows if row.cached)
    here = sum(row.cached for row in rows)
    n_claims = sum(row.n_claims for row in rows)
    typer.echo(f"{len(rows)} checkpoints, {here} of them here, {unlocked} of {n_claims} claims unlocked")
    if json_file is not None:
        from requant.catalog.files import write_json

        write_json(json_file, [asdict(row) | {"claims": list(row.claims)} for row in rows])
    for error in catalog.errors:
        typer.echo(f"left out: {error}", err=True)


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
        _console().print(table)
    errors = [outcome.error for outcome in outcomes if outcome.error]
    for error in errors:
        typer.echo(str(error))
    n_claims = sum(len(outcome.paper.claims) for outcome in outcomes if outcome.paper)
    typer.echo(
        f"{len(outcomes)} checked, {n_claims} claims, {len(errors)} error{'' if len(errors) == 1 else 's'}"
    )


def _known(ids: list[str] | tuple[str, ...], catalog: Catalog) -> None:
    for name in ids:
        if name not in catalog.files:
            hint = nearest(name, catalog.files)
            _stop(
                f"there is no entry {name!r} in {catalog.folders.papers}"
                + (f"; did you mean {hint}?" if hint else "")
            )


def _console() -> Console:
    return Console(highlight=False, soft_wrap=False)


if __name__ == "__main__":
    main()
