"""`requant run`: measure claims, or say beforehand what a run would do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from requant.catalog.entry import Claim, Paper
from requant.catalog.loader import Catalog, load_catalog
from requant.catalog.terminal import (
    AllowPickleOption,
    DataOption,
    DeviceOption,
    DownloadOption,
    JsonOption,
    MaxMemoryOption,
    MeasuredOption,
    ModelPathOption,
    ModelsDirOption,
    OffloadOption,
    PapersOption,
    console,
    data_paths,
    known,
    max_memory,
    model_paths,
    offload_dir,
    stop,
)

if TYPE_CHECKING:
    from requant.catalog.claims import Options
    from requant.catalog.measurement import Measurement
    from requant.catalog.plan import Eta, Planned

app = typer.Typer()
Wanted = Callable[[Paper, Claim], bool]


class Engine(StrEnum):
    """Where claims are measured."""

    LOCAL = "local"
    RAY = "ray"


@app.command()
def run(
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[IDS]...", help="Entries to measure (default: all).")
    ] = None,
    claim: Annotated[
        str | None, typer.Option("--claim", metavar="GLOB", help="Only claims whose id matches.")
    ] = None,
    json_file: JsonOption = None,
    save: Annotated[
        bool, typer.Option("--save", help="Add each record to the ledger as soon as it is measured.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --save: keep records that still stand, measure the rest.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run, what not and why; measure nothing.")
    ] = False,
    models_dir: ModelsDirOption = None,
    model_path: ModelPathOption = None,
    download: DownloadOption = False,
    allow_pickle: AllowPickleOption = False,
    data: DataOption = None,
    offload: OffloadOption = None,
    device: DeviceOption = "cpu",
    memory: MaxMemoryOption = None,
    jobs: Annotated[
        int, typer.Option(min=0, metavar="N", help="Entries measured at once (0: one a core).")
    ] = 1,
    engine: Annotated[
        Engine, typer.Option("--engine", help="Where claims are measured: processes here, or a Ray cluster.")
    ] = Engine.LOCAL,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="With --engine ray: the cluster (default: RAY_ADDRESS, or one here)."
        ),
    ] = None,
    measured: MeasuredOption = None,
    papers: PapersOption = None,
) -> None:
    """Measure claims and print what was reported and measured. Exit code 1 if one is not as expected."""
    if resume and not save:
        stop("--resume goes with --save: it keeps what is in the ledger and adds the rest")
    if address and engine is not Engine.RAY:
        stop("--address goes with --engine ray")
    catalog = load_catalog(papers)
    chosen = _chosen(ids or [], catalog)

    from requant.catalog.claims import Options
    from requant.catalog.cluster import ClusterError, measure_on_ray
    from requant.catalog.ledger import LedgerError
    from requant.catalog.parallel import cores

    options = Options(
        str(models_dir) if models_dir else None, download, device, model_paths(model_path), allow_pickle,
        data_paths(data), offload_dir(offload), max_memory(memory, device),
    )  # fmt: skip
    session = _Session(catalog, chosen, claim, options, jobs or cores(), measured)
    if engine is Engine.RAY:
        folder = None if papers is None else papers.absolute()
        session.on = lambda rows: measure_on_ray(
            chosen, rows, folder, options, address=address, jobs=jobs or cores()
        )
    try:
        if dry_run:
            session.print_plan(json_file)
            return
        ok = session.measure(save, resume, json_file)
    except (LedgerError, ClusterError) as problem:
        stop(str(problem))
    if not ok:
        raise typer.Exit(1)


def _chosen(ids: Sequence[str], catalog: Catalog) -> list[Paper]:
    known(ids, catalog)
    for name in ids or catalog.files:
        if name in catalog.failed:
            stop(f"{catalog.failed[name]}")
    return [catalog.papers[name] for name in ids] if ids else list(catalog.papers.values())


class _Session:
    """One call of `requant run`: the claims it is about, how to measure them, and the ledger's folder."""

    def __init__(
        self,
        catalog: Catalog,
        chosen: Sequence[Paper],
        glob: str | None,
        options: Options,
        jobs: int,
        measured: Path | None,
    ) -> None:
        self.catalog, self.chosen, self.options = catalog, chosen, options
        self.jobs, self.measured, self.console = jobs, measured, console()
        self.on: Callable[[list[Planned]], Iterator[Measurement]] = self._here
        self.matches: Wanted = lambda paper, claim: glob is None or fnmatchcase(claim.id, glob)
        self.wanted = [(p.id, c.id) for p in chosen for c in p.claims if self.matches(p, c)]
        if not self.wanted:
            stop(f"no claim of {', '.join(p.id for p in chosen)} matches {glob!r}")

    def plan(self, rate: float | None) -> list[Planned]:
        from requant.catalog import ledger
        from requant.catalog.plan import plan

        saved = {paper.id: ledger.read(paper.id, self.measured) for paper in self.chosen}
        return plan(self.chosen, self.options, self.catalog.vocab, saved, rate, self.matches)

    def print_plan(self, json_file: Path | None) -> None:
        from requant.catalog.files import write_json
        from requant.catalog.parallel import one_thread
        from requant.catalog.plan import flop_rate

        one_thread()
        rate = flop_rate(self.options.computes_on)
        rows = self.plan(rate)
        print_plan(rows, rate, self.options, self.jobs)
        if json_file is not None:
            write_json(json_file, [row.record() for row in rows])

    def measure(self, save: bool, resume: bool, json_file: Path | None) -> bool:
        """Measure, save and report. Returns: whether everything was measured and is as expected."""
        from requant.catalog import ledger
        from requant.catalog.files import write_atomic
        from requant.catalog.plan import Eta
        from requant.catalog.report import print_report

        keys = self._keys() if save else {}
        done = self._kept(keys) if resume else []
        if done:
            self.console.print(Text(f"{len(done)} of {len(self.wanted)} claims kept from the ledger"))
        rows = self.plan(rate=None)
        self._measure_rest(rows, done, Eta(rows, self.jobs), keys, save)
        self.console.print()
        order = {name: index for index, name in enumerate(self.wanted)}
        done.sort(key=lambda item: (item.paper, order[item.paper, item.claim]))
        print_report(done, self.console)
        if json_file is not None:
            write_atomic(json_file, ledger.records_json(done))
        if save:
            for name in sorted({item.paper for item in done}):
                typer.echo(f"saved {name}.json")
        return len(done) == len(self.wanted) and all(item.ok for item in done)

    def _keys(self) -> dict[tuple[str, str], str]:
        from requant.catalog.resume import record_key

        device, vocab = self.options.computes_on, self.catalog.vocab
        return {
            (paper.id, claim.id): record_key(paper, claim, vocab, device)
            for paper in self.chosen
            for claim in paper.claims
        }

    def _kept(self, keys: dict[tuple[str, str], str]) -> list[Measurement]:
        from requant.catalog.resume import measured_before

        return measured_before(self.chosen, keys, self.matches, self.measured)

    def _here(self, rows: list[Planned]) -> Iterator[Measurement]:
        from requant.catalog.parallel import measure_many

        wanted, folder = {(row.paper, row.claim) for row in rows}, self.catalog.folders.papers
        return measure_many(self.chosen, folder, self.options, lambda p, c: (p.id, c.id) in wanted, self.jobs)

    def _measure_rest(
        self,
        rows: list[Planned],
        done: list[Measurement],
        eta: Eta,
        keys: dict[tuple[str, str], str],
        save: bool,
    ) -> None:
        """Measure what is not in `done` and append it, each saved before the next is waited for; Ctrl-C ends it."""
        from requant.catalog import ledger
        from requant.catalog.report import progress_text

        kept = {(item.paper, item.claim) for item in done}
        for item in done:
            eta.after(item)
        measurements = self.on([row for row in rows if (row.paper, row.claim) not in kept])
        try:
            with closing(measurements):
                for item in measurements:
                    if save:
                        ledger.save([item], self.measured, self.options.computes_on, keys)
                    done.append(item)
                    line = progress_text(item, len(done), len(self.wanted), eta.after(item))
                    self.console.print(line)
        except KeyboardInterrupt:
            self.console.print(Text("stopped; what was measured so far is kept", style="yellow"))


def print_plan(rows: Sequence[Planned], rate: float, options: Options, jobs: int) -> None:
    """What would run, why the rest would not, and the formulas behind the estimates."""
    from requant.catalog.inventory import in_bytes, in_units
    from requant.catalog.report import duration

    screen = console()
    table = Table("claim", "model", "memory", "time", box=None, pad_edge=False, header_style="bold")
    running = [row for row in rows if row.runs]
    for row in running:
        least = ">= " if row.basis == "formula" else ""
        memory = in_bytes(row.memory_bytes) if row.model and row.memory_bytes else "-"
        cells = (f"{row.paper}-{row.claim}", row.model or "-", memory, least + duration(row.seconds))
        table.add_row(*map(Text, cells))
    if running:
        screen.print(table)
    reasons = Counter(row.reason for row in rows if not row.runs)
    for reason, count in reasons.most_common():
        screen.print(Text(f"{count} not run: {reason}"))
    seconds = sum(row.seconds or 0.0 for row in running) / max(jobs, 1)
    unknown = sum(row.seconds is None for row in running)
    more = f", and {unknown} claims of unknown time" if unknown else ""
    screen.print(Text(f"{len(running)} of {len(rows)} claims would run, about {duration(seconds)}{more}"))
    print_large(running, options, screen)
    size = 4 if options.computes_on == "cpu" else 2
    screen.print(
        Text(
            f"memory: 2 models x parameters x {size} bytes. time: of the last run, where the ledger has one; else "
            f"(>=) 2 x parameters x (3 x evaluated + 2 x calibration tokens) / {in_units(int(rate))}FLOP/s, measured "
            "just now; what the method itself computes comes on top.",
            style="dim",
        )
    )


def print_large(running: Sequence[Planned], options: Options, screen: Console) -> None:
    """Which claims take more memory than the device has, and what happens then."""
    from requant.catalog.weights import AUTO

    large = Counter(row.model for row in running if row.fits is False)
    if not large:
        return
    named = ", ".join(f"{model} ({count})" for model, count in large.most_common())
    remedy = f"--device {AUTO} --offload-dir DIR loads them by accelerate's device map, the rest in files"
    if options.device == AUTO:
        remedy = f"loaded by accelerate's device map, what does not fit in files of {options.offload_dir}"
    screen.print(Text(f"more than the memory of {options.computes_on}: {named}; {remedy}", style="yellow"))
