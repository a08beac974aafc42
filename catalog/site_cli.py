"""`requant site build` and `requant site serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from requant.catalog.loader import load_catalog

app = typer.Typer(name="site", help="Build the site, or serve it while you write.", no_args_is_help=True)

PapersOption = Annotated[
    Path | None, typer.Option("--papers", metavar="DIR", help="Folder of entries (default: the catalog's).")
]
MeasuredOption = Annotated[
    Path | None,
    typer.Option("--measured", metavar="DIR", help="Folder of the ledger (default: the catalog's)."),
]
SkipOption = Annotated[
    bool, typer.Option("--skip-broken", help="Leave out entries with errors instead of stopping.")
]


@app.command()
def build(
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where docs/ and site/ go (default: build/).")
    ] = None,
    url: Annotated[
        str, typer.Option(envvar="REQUANT_SITE_URL", help="Address at which the site will lie.")
    ] = "https://requant.example/",
    cards: Annotated[bool, typer.Option(help="Draw a preview picture for every entry.")] = True,
    skip_broken: SkipOption = False,
    papers: PapersOption = None,
    measured: MeasuredOption = None,
) -> None:
    """Render entries, vocabularies and ledger, and build build/site. Needs no network; stops at anything wrong."""
    site, errors = _builder()
    url = url if url.endswith("/") else f"{url}/"
    try:
        folder = site.build(
            load_catalog(papers),
            measured=measured,
            out=out,
            site_url=url,
            cards=cards,
            skip_broken=skip_broken,
        )
    except errors as problem:
        typer.echo(f"requant: {problem}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"built {folder / 'index.html'}")


@app.command()
def serve(
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 8000,
    skip_broken: SkipOption = False,
    papers: PapersOption = None,
    measured: MeasuredOption = None,
) -> None:
    """Build the site and serve it on this machine only; run it again after a change."""
    import functools
    import http.server

    site, errors = _builder()
    try:
        folder = site.build(
            load_catalog(papers), measured=measured, site_url=f"http://127.0.0.1:{port}/", cards=False,
            skip_broken=skip_broken,
        )  # fmt: skip
    except errors as problem:
        typer.echo(f"requant: {problem}", err=True)
        raise typer.Exit(1) from None
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        typer.echo(f"serving http://127.0.0.1:{server.server_port}/ until Ctrl-C")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            typer.echo("stopped")


def _builder() -> tuple:
    """The builder, imported only here: it needs the extra `site`."""
    try:
        from requant.catalog.ledger import LedgerError
        from requant.catalog.render import builder
    except ModuleNotFoundError as missing:
        typer.echo(f'requant: {missing.name} is missing; install it with: pip install -e ".[site]"', err=True)
        raise typer.Exit(2) from None
    return builder, (builder.SiteError, LedgerError)
