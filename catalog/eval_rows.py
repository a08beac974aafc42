"""The numbers of `requant eval`: one row a protocol, or one a metric of each lm-eval task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from requant.catalog.terminal import console

if TYPE_CHECKING:
    from requant.catalog.claims import Options
    from requant.catalog.evaluate import Evaluation


@dataclass(frozen=True)
class Row:
    """One number: of a protocol, or of one metric of an lm-eval task. kl in nats a token, to the unquantized model."""

    method: str
    name: str
    version: Any
    metric: str
    value: float
    standard_error: float | None
    kl: float | None
    n: int


def protocol_rows(
    versions: Sequence[tuple[str, Any, Any]], protocol: str, tasks: Sequence[str], options: Options
) -> Iterable[Row]:
    """The protocol's number for each (method, model, tokenizer), the unquantized one first; then each task's."""
    from requant.catalog.evaluate import evaluate
    from requant.catalog.protocols import get_protocol

    chosen, plain = get_protocol(protocol), versions[0][1]
    for method, model, tokenizer in versions:
        found = evaluate(
            model, tokenizer, chosen, tasks=tasks or None, download=options.download, paths=options.data_paths,
            reference_model=plain if model is not plain else None,
        )  # fmt: skip
        yield _row(method, found)
        if len(found.tasks) > 1:
            for task, part in found.tasks.items():
                yield Row(
                    method,
                    task,
                    part["version"],
                    found.metric,
                    part["value"],
                    None,
                    None,
                    part["n_documents"],
                )


def _row(method: str, found: Evaluation) -> Row:
    version = ", ".join(f"{task} {part['version']}" for task, part in found.tasks.items()) or None
    return Row(
        method, found.protocol, version, found.metric, found.value, found.value_standard_error, found.kl,
        found.n_windows,
    )  # fmt: skip


def task_rows(
    versions: Sequence[tuple[str, Any, Any]],
    tasks: Sequence[str],
    n_shots: int | None,
    max_length: int | None,
    download: bool,
) -> Iterable[Row]:
    """Every metric that every task reports."""
    from requant.catalog.harness import n_documents, simple_evaluate

    how = {"n_shots": n_shots, "max_length": max_length, "download": download}
    for method, model, tokenizer in versions:
        results = simple_evaluate(model, tokenizer, tasks, **how)
        for task, row in results["results"].items():
            for key, value in row.items():
                metric, comma, filtered = key.partition(",")
                if comma and isinstance(value, int | float) and not metric.endswith("_stderr"):
                    name = metric if filtered == "none" else f"{metric} ({filtered})"
                    version, n = results["versions"].get(task), n_documents(results, task)
                    yield Row(method, task, version, name, float(value), None, None, n)


def print_rows(rows: Sequence[Row], model: str) -> None:
    """The rows as a table under the model's name."""
    table = Table("method", "on", "version", "metric", "value", "+-", "KL", "n", box=None, pad_edge=False)
    for row in rows:
        error = "" if row.standard_error is None else f"{row.standard_error:.2g}"
        kl = "" if row.kl is None else f"{row.kl:.4f}"
        version = "" if row.version is None else str(row.version)
        method = "unquantized" if row.method == "none" else row.method
        cells = (method, row.name, version, row.metric, f"{row.value:.5g}", error, kl, str(row.n))
        table.add_row(*map(Text, cells))
    screen = console()
    screen.print(Text(model, style="bold"))
    screen.print(table)
