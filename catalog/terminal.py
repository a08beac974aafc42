"""What the verbs of the command line share: options, the console, and the one line that ends a wrong call."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from requant.catalog.errors import nearest, one_line
from requant.catalog.loader import Catalog
from requant.catalog.weights import AUTO

PapersOption = Annotated[
    Path | None, typer.Option("--papers", metavar="DIR", help="Folder of entries (default: the catalog's).")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the records to FILE.")
]
MeasuredOption = Annotated[
    Path | None,
    typer.Option("--measured", metavar="DIR", help="Folder of the ledger (default: the catalog's)."),
]
ModelsDirOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of checkpoints: DIR/<organisation>/<name>.")
]
ModelPathOption = Annotated[
    list[str] | None,
    typer.Option("--model-path", metavar="ID=PATH", help="A checkpoint's folder or .gguf file. Repeatable."),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="ID:SPLIT=FILE", help="A local copy of a dataset's split. Repeatable."),
]
OffloadOption = Annotated[
    Path | None,
    typer.Option(
        "--offload-dir",
        metavar="DIR",
        help="Keep calibration activations, and with --device auto weights, in files of this folder.",
    ),
]
DownloadOption = Annotated[
    bool, typer.Option("--download", help="Fetch the checkpoints and data that are named.")
]
DeviceOption = Annotated[
    str,
    typer.Option(help="Where checkpoints run: cpu, cuda, ...; auto: spread by accelerate's device map."),
]
MaxMemoryOption = Annotated[
    list[str] | None,
    typer.Option(
        "--max-memory",
        metavar="DEVICE=SIZE",
        help="With --device auto: what weights may take, like 0=20GiB or cpu=64GiB. Repeatable.",
    ),
]
AllowPickleOption = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Also read pickled weights, plain tensors only (weights_only)."),
]


def stop(message: str) -> NoReturn:
    """End the command with one line on stderr and exit code 2."""
    typer.echo(f"requant: {one_line(message)}", err=True)
    raise SystemExit(2)


def known(ids: Iterable[str], catalog: Catalog) -> None:
    """Stop if one of the ids is not an entry's."""
    for name in ids:
        if name not in catalog.files:
            hint = nearest(name, catalog.files)
            stop(
                f"there is no entry {name!r} in {catalog.folders.papers}"
                + (f"; did you mean {hint}?" if hint else "")
            )


def console() -> Console:
    return Console(highlight=False, soft_wrap=False)


def data_paths(given: Iterable[str] | None) -> Mapping[str, str]:
    """`ID:SPLIT=FILE` options as a mapping; stops at one of another form, or whose file does not exist."""
    found = {}
    for text in given or ():
        name, equals, path = text.partition("=")
        dataset, colon, split = name.rpartition(":")
        if not (dataset and colon and split and equals and path):
            stop(f"--data {text!r} is not ID:SPLIT=FILE, like Salesforce/wikitext:test=wiki.parquet")
        if not Path(path).is_file():
            stop(f"--data {name}: there is no file {path}")
        found[name] = str(Path(path).absolute())
    return found


def offload_dir(given: Path | None) -> str | None:
    """The folder as text; stops where there is none."""
    if given is not None and not given.is_dir():
        stop(f"--offload-dir {given} is no folder")
    return None if given is None else str(given.absolute())


def max_memory(given: Iterable[str] | None, device: str) -> Mapping[int | str, int]:
    """`DEVICE=SIZE` options in accelerate's convention: number of an accelerator or `cpu` -> bytes."""
    if given and device != AUTO:
        stop("--max-memory goes with --device auto")
    found: dict[int | str, int] = {}
    for text in given or ():
        form = re.fullmatch(r"(\d+|cpu)=(\d+(?:\.\d+)?)([KMGT]i?B|B)?", text)
        if form is None:
            stop(f"--max-memory {text!r} is not DEVICE=SIZE, like 0=20GiB or cpu=64GiB")
        name, size, unit = form.groups()
        base = 1024 if unit and "i" in unit else 1000
        key = name if name == "cpu" else int(name)
        found[key] = int(float(size) * base ** (" KMGT".index(unit[0]) if unit and unit != "B" else 0))
    return found


def model_paths(given: Iterable[str] | None) -> Mapping[str, str]:
    """`ID=PATH` options as a mapping; stops at one without `=`, or whose path does not exist."""
    found = {}
    for text in given or ():
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            stop(f"--model-path {text!r} is not ID=PATH, like facebook/opt-125m=models/opt-125m")
        if not Path(path).exists():
            stop(f"--model-path {name}: {path} does not exist")
        found[name] = path
    return found
