"""`requant quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from requant.catalog.errors import one_line
from requant.catalog.terminal import DownloadOption, ModelsDirOption, stop


def quantize(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="Id of an implementation, like gptq.")],
    model: Annotated[
        str,
        typer.Option(metavar="M", help="Folder or id of a Hugging Face model, or reference[-outlier|-sink]."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="New folder for the quantized model.")],
    config: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A setting of the method; may be repeated.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Calibration set (default: the reference text, for reference models)."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the method and of reference calibration.")] = 0,
    layout: Annotated[
        str, typer.Option(metavar="auto|compressed-tensors|requant", help="How weights are stored.")
    ] = "auto",
    models_dir: ModelsDirOption = None,
    download: DownloadOption = False,
) -> None:
    """Quantize a model and save packed weights that transformers (or requant) loads back to the same logits."""
    from transformers.utils import logging

    from requant.catalog.quantize import Job, QuantizeError, quantize_to_folder

    logging.disable_progress_bar()
    where = str(models_dir) if models_dir else None
    job = Job(method, model, out, config or (), calibration, seed, layout, where, download)
    try:
        done = quantize_to_folder(job)
    except (QuantizeError, OSError) as problem:
        stop(str(problem))
    if done.remark:
        typer.echo(f"note: {one_line(done.remark)}")
    typer.echo(
        f"wrote {out}: {done.n_linears} linears, {done.bits:.3f} bits a weight, layout {done.layout}, "
        f"{method} took {done.seconds:.1f} s"
    )
    loader = {
        "compressed-tensors": f'transformers.AutoModelForCausalLM.from_pretrained("{out}")',
        "requant": f'requant.catalog.packed.load_packed("{out}")',
    }
    typer.echo(f"load it with: {loader[done.layout]}")
