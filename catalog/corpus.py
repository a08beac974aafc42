"""From a protocol and a text to the windows of tokens that a model is scored on.

`documents` finds the rows of a dataset; `token_windows`, a pure function, makes windows of them.

Source    GPTQ variants: IST-DASLab/gptq@2d65066 datautils.py; rolling windows: lm-eval 0.4.13 utils.py;
          strided windows: transformers documentation; half-scored chunks: llama.cpp perplexity tool.
"""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from requant.catalog.protocols import REFERENCE_TEXT, Dataset, Protocol
from requant.catalog.reference.text import load_split

Tokenizer = Callable[..., Mapping[str, Any]]  # a Hugging Face tokenizer, or what is called the same way


class EvaluationError(RuntimeError):
    """An evaluation that cannot give a meaningful number."""


class DatasetUnavailable(EvaluationError):
    """The text of a protocol is not on this machine, and nothing was downloaded."""


class Window(NamedTuple):
    """ids int64 [n]; the targets are ids[first_scored:], each predicted from what precedes it there."""

    ids: Tensor
    first_scored: int


@dataclass(frozen=True)
class Checks:
    """The cheap integers that expose a wrong text or tokenizer before any model runs."""

    characters: int | None = None
    tokens: int | None = None  # after tokenization, before anything is cut off
    windows: int | None = None
    bytes_per_word: float | None = None  # lm-eval protocols only


@dataclass(frozen=True)
class Windows:
    protocol: str
    windows: tuple[Window, ...]
    checks: Checks

    @property
    def n_scored(self) -> int:
        """Scored tokens over all windows."""
        return sum(len(window.ids) - window.first_scored for window in self.windows)


def documents(
    protocol: Protocol, *, paths: Mapping[str, str | Path] | None = None, download: bool = False
) -> list[str]:
    """The rows of the protocol's dataset, in order; only as many as its selection can use.

    Args:
        paths: dataset `id:split` or `id` -> local file to read instead: .parquet, .jsonl, .json, .txt, .raw; .gz and
            .zst too.
        download: fetch the file from the Hugging Face hub if need be; otherwise only its cache is looked at.
    Raises: DatasetUnavailable if the text is not here; ValueError for a file of unknown kind.
    """
    if protocol.dataset.id == REFERENCE_TEXT and REFERENCE_TEXT not in (paths or {}):
        return load_split(protocol.dataset.split).split("\n\n")
    limit = protocol.selection.n if protocol.selection.rule == "first-documents" else None
    return rows_of_dataset(protocol.dataset, protocol.id, paths=paths, download=download, limit=limit)


def rows_of_dataset(
    dataset: Dataset,
    wanted_by: str,
    *,
    paths: Mapping[str, str | Path] | None = None,
    download: bool = False,
    limit: int | None = None,
) -> list[str]:
    """The first `limit` rows of a dataset file, see `documents`; `wanted_by` names who asks, for errors."""
    path = text_file(dataset, wanted_by, paths, download)
    return list(islice(_rows(path, dataset.field or "text", dataset.text_lines), limit))


def local_file(dataset: Dataset, wanted_by: str, paths: Mapping[str, str | Path] | None) -> Path | None:
    """The file given for this split of the dataset, or for the dataset; None if none is.

    Raises: DatasetUnavailable if the file does not exist.
    """
    keys = (f"{dataset.id}:{dataset.split}", dataset.id)
    given = next((key for key in keys if key in (paths or {})), None)
    if given is None:
        return None
    path = Path(paths[given])
    if not path.is_file():
        raise DatasetUnavailable(f"{wanted_by}: the file {path} given for {given} does not exist")
    return path.resolve()


def text_file(
    dataset: Dataset,
    wanted_by: str,
    paths: Mapping[str, str | Path] | None = None,
    download: bool = False,
) -> Path:
    """The file given for the dataset, else the hub's. Raises: DatasetUnavailable."""
    return local_file(dataset, wanted_by, paths) or hub_file(dataset, wanted_by, download)


def hub_file(dataset: Dataset, wanted_by: str, download: bool = False) -> Path:
    """The dataset's file in the Hugging Face cache, or fetched into it. Raises: DatasetUnavailable."""
    remedy = f"give a local copy with --data {dataset.id}:{dataset.split}=FILE"
    if dataset.file is None:
        raise DatasetUnavailable(f"{wanted_by} reads {dataset.id}, which has no file on the hub; {remedy}")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise DatasetUnavailable(
            f"{wanted_by} needs the hub extra: pip install 'requant[hub]'; or {remedy}"
        ) from error
    place = f"{dataset.file} of {dataset.id}" + (f" at {dataset.revision}" if dataset.revision else "")
    try:
        found = hf_hub_download(
            dataset.id,
            dataset.file,
            repo_type="dataset",
            revision=dataset.revision,
            local_files_only=not download,
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        cause = (
            f"cannot be fetched ({type(error).__name__})" if download else "is not in the Hugging Face cache"
        )
        allow = "check the connection" if download else "allow the download (download=True)"
        raise DatasetUnavailable(f"{wanted_by}: {place} {cause}; {allow} or {remedy}") from error
    return Path(found)


def _rows(path: Path, field: str, text_lines: str | None) -> Iterator[str]:
    kind = path.name.lower().removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    if kind == "parquet":
        yield from _parquet_rows(path, field)
        return
    if kind not in ("json", "jsonl", "txt", "raw") or (kind in ("txt", "raw") and text_lines is None):
        raise ValueError(
            f"cannot read rows from {path.name}: give a .parquet or .jsonl file with the column {field!r}"
        )
    with ExitStack() as stack:
        lines = stack.enter_context(_opened(path))
        if kind in ("json", "jsonl"):
            yield from (json.loads(line)[field] for line in lines if line.strip())
        elif text_lines == "whole-file":
            yield lines.read()
        elif text_lines == "strip":
            yield from (line.strip() for line in lines)
        else:  # keep-newline: a blank line is an empty row, as in the published data set
            yield from (line if line.strip() else "" for line in lines)


def _opened(path: Path) -> IO[str]:
    """The file's text, unpacked where its name ends in .gz or .zst."""
    how = {"encoding": "utf-8", "newline": "\n"}
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", **how)
    if path.suffix.lower() == ".zst":
        try:
            import pyarrow
        except ImportError as error:
            raise DatasetUnavailable(
                f"reading {path.name} needs pyarrow: pip install 'requant[hub]'"
            ) from error
        return io.TextIOWrapper(pyarrow.input_stream(str(path), compression="zstd"), **how)
    return path.open("rt", **how)


def _parquet_rows(path: Path, field: str) -> Iterator[str]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DatasetUnavailable(f"reading {path.name} needs pyarrow: pip install 'requant[hub]'") from error
    yield from parquet.read_table(path, columns=[field]).column(field).to_pylist()


def join_text(texts: Sequence[str], protocol: Protocol) -> str:
    """The documents as one text, with nothing stripped and nothing dropped."""
    return (protocol.join or "").join(texts)


def token_windows(texts: Sequence[str], tokenizer: Tokenizer, protocol: Protocol) -> Windows:
    """Cut documents into the protocol's windows.

    Args:
        tokenizer: called as tokenizer(text, add_special_tokens=..., verbose=False)["input_ids"]; its
            `bos_token_id` is read where the protocol places BOS itself.
    Raises: EvaluationError if the text fills no window, or a rule needs a BOS token that is not there.
    """
    if protocol.engine != "requant":
        raise EvaluationError(f"{protocol.id} is run by {protocol.engine}, which makes its own windows")
    selection = protocol.selection
    if selection.rule == "first-documents":
        texts = texts[: selection.n]
    special = protocol.tokenizer.special_tokens == "default"

    def encode(text: str) -> Tensor:
        return torch.tensor(
            tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"], dtype=torch.long
        )

    if selection.rule == "random-crops":
        parts = _random_crops(texts, encode, protocol)
        characters = None  # depends on the documents drawn
    else:
        joined = protocol.tokenizer.unit == "joined"
        units = [join_text(texts, protocol)] if joined else list(texts)
        parts, characters = [encode(text) for text in units], sum(map(len, units))
    found = [window for part in parts for window in _cut(part[: selection.max_tokens], tokenizer, protocol)]
    if selection.rule == "first-windows":
        found = found[: selection.n]
    elif selection.rule == "spread-windows":
        n = min(selection.n, len(found))
        found = [found[i * len(found) // n] for i in range(n)]
    n_tokens = sum(map(len, parts))
    if not found:
        length = protocol.windows.length
        raise EvaluationError(
            f"{protocol.id}: {n_tokens} tokens do not fill one window of {length}; give more text"
        )
    return Windows(protocol.id, tuple(found), Checks(characters, n_tokens, len(found)))


def _cut(ids: Tensor, tokenizer: Tokenizer, protocol: Protocol) -> list[Window]:
    rule = {"disjoint": _disjoint, "strided": _strided, "rolling-disjoint": _rolling}[protocol.windows.rule]
    return rule(ids, tokenizer, protocol)


def _disjoint(ids: Tensor, tokenizer: Tokenizer, protocol: Protocol) -> list[Window]:
    """Windows without overlap; a remainder is dropped and nothing is carried from window to window."""
    step = protocol.windows.stride
    pieces = [ids[start : start + step] for start in range(0, len(ids) - step + 1, step)]
    if protocol.windows.last_partial == "keep" and len(ids) % step:
        pieces.append(ids[len(ids) - len(ids) % step :])
    if protocol.bos == "every-window":
        bos = ids.new_tensor([_bos_id(tokenizer, protocol)])
        pieces = [torch.cat([bos, piece]) for piece in pieces]
    elif (
        protocol.bos == "overwrite-first" and len(ids) and ids[0] == getattr(tokenizer, "bos_token_id", None)
    ):
        pieces = [
            torch.cat([ids[:1], piece[1:]]) for piece in pieces
        ]  # only where the tokenizer adds BOS itself
    return [Window(piece, protocol.score.first) for piece in pieces if len(piece) > protocol.score.first]


def _strided(ids: Tensor, _tokenizer: Tokenizer, protocol: Protocol) -> list[Window]:
    """Overlapping windows; a token is scored in the first window that holds it."""
    windows, seen = [], 0
    for start in range(0, len(ids), protocol.windows.stride):
        end = min(start + protocol.windows.length, len(ids))
        if end - start < protocol.windows.length and protocol.windows.last_partial == "drop":
            break
        windows.append(Window(ids[start:end], max(seen - start, 1)))
        seen = end
        if end == len(ids):
            break
    return [window for window in windows if window.first_scored < len(window.ids)]


def _rolling(ids: Tensor, tokenizer: Tokenizer, protocol: Protocol) -> list[Window]:
    """lm-eval's rolling windows made disjoint: every token is a target once, the first after BOS.

    A full window has one token of context. A last, partial one is moved back to full length and so has more.
    """
    length, n = protocol.windows.length, len(ids)
    bos = _bos_id(tokenizer, protocol, fallback="eos_token_id")
    text = torch.cat([ids.new_tensor([bos]), ids])  # token i of the document sits at i + 1
    windows = []
    for start in range(0, n, length):
        end = min(start + length, n)
        first = max(end - length, 0)  # position in `text` of the first token fed
        windows.append(Window(text[first : end + 1], start + 1 - first))
    return windows


def _random_crops(texts: Sequence[str], encode: Callable[[str], Tensor], protocol: Protocol) -> list[Tensor]:
    """One crop each from documents drawn at random, in the order in which the official code draws."""
    selection, length = protocol.selection, protocol.windows.length
    stream, too_short, crops = random.Random(selection.seed), set(), []
    while len(crops) < selection.n:
        if len(too_short) == len(texts):
            raise EvaluationError(
                f"{protocol.id}: none of {len(texts)} documents has {selection.min_tokens} tokens"
            )
        index = stream.randint(0, len(texts) - 1)
        if index in too_short:
            continue
        ids = encode(texts[index])
        if len(ids) < selection.min_tokens:
            too_short.add(index)
            continue
        if len(ids) == length:
            raise EvaluationError(
                f"{protocol.id}: document {index} has exactly {length} tokens, which leaves no crop to "
                "draw; the official code stops here too, and going on would be another test set"
            )
        start = stream.randint(0, len(ids) - length - 1)  # the last possible start is never drawn
        crops.append(ids[start : start + length])
    return crops


def _bos_id(tokenizer: Tokenizer, protocol: Protocol, fallback: str | None = None) -> int:
    found = getattr(tokenizer, "bos_token_id", None)
    if found is None and fallback:
        found = getattr(tokenizer, fallback, None)
    if found is None:
        raise EvaluationError(
            f"{protocol.id} puts BOS in front of windows, but the tokenizer has no BOS token"
        )
    return found
