"""`requant models`: the checkpoints that claims name, what they take, and whether they are here."""

from __future__ import annotations

from dataclasses import asdict

import typer
from rich.table import Table
from rich.text import Text

from requant.catalog.loader import load_catalog
from requant.catalog.terminal import (
    JsonOption,
    ModelPathOption,
    ModelsDirOption,
    PapersOption,
    console,
    model_paths,
)

app = typer.Typer()


@app.command()
def models(
    json_file: JsonOption = None,
    models_dir: ModelsDirOption = None,
    model_path: ModelPathOption = None,
    papers: PapersOption = None,
) -> None:
    """List the checkpoints that claims name: size, licence, memory, whether they are here, claims they unlock."""
    from requant.catalog.inventory import checkpoints, in_bytes

    catalog = load_catalog(papers)
    rows = checkpoints(catalog, models_dir=models_dir, model_paths=model_paths(model_path))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("checkpoint", overflow="fold", min_width=22)
    for name in ("claims", "size", "CPU", "GPU", "here", "licence"):
        table.add_column(name, no_wrap=name not in ("here", "licence"), min_width=12 * (name == "licence"))
    for row in rows:
        gated = {True: ", gated", False: "", None: ", gated?"}[row.gated]
        about = row.size_bytes is None and row.params is not None
        size = f"~{in_bytes(2 * row.params)}" if about else in_bytes(row.size_bytes)
        here = (row.here or "-") if row.usable or not row.cached else f"{row.here}: {row.form}, refused"
        memory = (in_bytes(row.cpu_bytes), in_bytes(row.gpu_bytes))
        cells = (row.id, str(row.n_claims), size, *memory, here)
        table.add_row(*map(Text, cells), Text((row.license or "?") + gated))
    console().print(table)
    unlocked = sum(row.n_claims for row in rows if row.usable)
    here = sum(row.cached for row in rows)
    n_claims = sum(row.n_claims for row in rows)
    typer.echo(f"{len(rows)} checkpoints, {here} of them here, {unlocked} of {n_claims} claims unlocked")
    typer.echo(
        "CPU, GPU: memory to measure a claim: 2 models (unquantized, quantized) x params x 4 bytes (float32) or "
        "2 bytes (bfloat16). ~: 2 bytes a parameter, not looked up."
    )
    if json_file is not None:
        from requant.catalog.files import write_json

        write_json(json_file, [asdict(row) | {"claims": list(row.claims)} for row in rows])
    for error in catalog.errors:
        typer.echo(f"left out: {error}", err=True)
