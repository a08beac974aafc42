"""Hidden states that wait in files while a model is walked through, for calibration sets larger than memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from torch import Tensor

from requant.reference_impls._quant import QuantizationError
from requant.reference_impls._residence import mapped

_OFFLOAD: ContextVar[Path | None] = ContextVar("offload", default=None)


@contextmanager
def activations_in(folder: str | Path | None) -> Iterator[None]:
    """Inside, walks keep the hidden states between blocks in files of this folder; None: in memory, as outside.

    Such tensors are mapped files: the system writes them out when memory is short, and nothing else changes. The files
    have no name, so that they vanish with the process.
    Raises: QuantizationError if the folder cannot be written.
    """
    if folder is not None and not (Path(folder).is_dir() and os.access(folder, os.W_OK)):
        raise QuantizationError(f"the folder for activations, {folder}, does not exist or cannot be written")
    token = _OFFLOAD.set(None if folder is None else Path(folder))
    try:
        yield
    finally:
        _OFFLOAD.reset(token)


def kept(hidden: Tensor) -> Tensor:
    """The same values, in a file if `activations_in` says so."""
    folder = _OFFLOAD.get()
    return hidden if folder is None else mapped(hidden, folder)
