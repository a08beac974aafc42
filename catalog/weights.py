"""Find the weights of a checkpoint and load them, by transformers' own loading.

A checkpoint is looked for where the caller says (a folder or a GGUF file), then below a folder of checkpoints, then in
the Hugging Face cache; only then, and only if allowed, it is fetched, at the pinned revision where one is known. No
code that comes with a checkpoint is run: no remote code, and pickled weights only on request and then by torch's
loader for plain tensors (weights_only).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

AUTO = "auto"  # as a device: accelerate's device map
SAFETENSORS, PICKLE, GGUF = "safetensors", "pickle", "gguf"
_SUFFIXES = {SAFETENSORS: (".safetensors",), PICKLE: (".bin", ".pt", ".pth"), GGUF: (".gguf",)}
_NEEDED = ["*.safetensors", "*.json", "*.txt", "*.model"]
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


class NotHere(RuntimeError):
    """A claim cannot be measured here; the text is the reason shown as `not run (reason)`."""


@dataclass(frozen=True)
class Found:
    """Where a checkpoint lies. place: model-path | models-dir | cache; form: safetensors | pickle | gguf | None."""

    path: Path
    place: str
    form: str | None

    @property
    def size_bytes(self) -> int:
        """Bytes of the weight files that would be read."""
        return sum(file.stat().st_size for file in _files(self.path, self.form))


def _files(path: Path, form: str | None) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.glob("*") if file.suffix in _SUFFIXES.get(form, ()))


def stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of every file there: what tells that a checkpoint was replaced."""
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.is_file())
    stats = ((file.name, file.stat()) for file in files)
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def weights_form(path: Path) -> str | None:
    """In which form a folder (or file) holds weights: the safest there is, or None for no weights."""
    forms = (form for form in _SUFFIXES if any(file.suffix in _SUFFIXES[form] for file in _files(path, form)))
    return next(forms, None)


def locate(
    model_id: str,
    models_dir: str | Path | None = None,
    model_paths: Mapping[str, str] | None = None,
    revision: str | None = None,
) -> Found | None:
    """The checkpoint on this machine, or None. Never uses the network.

    Raises: NotHere if `model_paths` gives a place where there is nothing.
    """
    if model_id in (model_paths or {}):
        path = Path(model_paths[model_id])
        if not path.exists() or weights_form(path) is None:
            raise NotHere(f"the path given for {model_id} holds no weights: {path.name}")
        return Found(path, "model-path", weights_form(path))
    if models_dir is not None:
        for name in (model_id, model_id.replace("/", "--")):
            folder = Path(models_dir) / name
            if (folder / "config.json").is_file():
                return Found(folder, "models-dir", weights_form(folder))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model_id, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    return Found(folder, "cache", weights_form(folder)) if weights_form(folder) else None


def find_checkpoint(
    model_id: str,
    models_dir: str | Path | None = None,
    download: bool = False,
    *,
    model_paths: Mapping[str, str] | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> Path:
    """Folder (or GGUF file) of a checkpoint, fetched if it is not here and `download` allows it.

    Raises: NotHere with what to do.
    """
    found = locate(model_id, models_dir, model_paths, revision)
    if found is not None and (found.place != "cache" or not download):
        return found.path
    if not download:
        raise NotHere(f"no checkpoint of {model_id} here; use --models-dir, --model-path or --download")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [*_NEEDED, "*.bin"] if allow_pickle else _NEEDED
    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=wanted))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise NotHere(f"{model_id} could not be fetched: {type(error).__name__}") from error


def require_loadable(path: Path, allow_pickle: bool = False) -> str:
    """The form in which weights would be loaded. Raises: NotHere with the reason where they would not."""
    form = weights_form(path)
    if form is None:
        raise NotHere(f"{path.name} has no safetensors weights, nor any other")
    if form == PICKLE and not allow_pickle:
        raise NotHere(
            f"{path.name} has no safetensors weights; pickled checkpoints are not loaded, because they can run code "
            "(--allow-pickle reads plain tensors from them and nothing else)"
        )
    return form


def load_checkpoint(
    path: Path,
    device: str = "cpu",
    allow_pickle: bool = False,
    max_memory: Mapping[int | str, int] | None = None,
    offload_dir: str | Path | None = None,
):
    """Model in eval mode without gradients, and tokenizer, of a folder or a GGUF file.

    On the CPU the weights become float32, elsewhere they keep the dtype they are stored in.

    Args:
        device: with `auto` the model may be larger than a device; it is spread as spread.py says.
        max_memory, offload_dir: of `auto`: bytes a device (default: what is free), and the folder for the rest.
    Raises: NotHere, naming the checkpoint, for pickled weights without `allow_pickle`, for an architecture that
    transformers does not know as a causal language model, without the package a GGUF file needs, and for a model that
    does not fit where it may be.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from requant.catalog.spread import load_spread

    form = require_loadable(path, allow_pickle)
    on_cpu = not torch.cuda.is_available() if device == AUTO else device == "cpu"
    how = {"dtype": torch.float32 if on_cpu else "auto", "local_files_only": True}
    folder = path
    if form == GGUF:
        file = _files(path, GGUF)[0]
        folder, how = file.parent, how | {"gguf_file": file.name}
    else:
        how |= {"use_safetensors": form == SAFETENSORS, "weights_only": True}
    try:
        if device == AUTO:
            model = load_spread(folder, how, max_memory or {}, offload_dir and Path(offload_dir))
        else:
            with _read_in_parts():
                model = AutoModelForCausalLM.from_pretrained(folder, **how).to(device)
        tokenizer = _tokenizer(folder, how.get("gguf_file"))
    except (ValueError, KeyError, ImportError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:160]
        raise NotHere(
            f"{path.name} cannot be loaded as a causal language model: {_architecture(folder)}{reason}"
        ) from error
    return model.eval().requires_grad_(False), tokenizer


@contextmanager
def _read_in_parts() -> Iterator[None]:
    """Inside, transformers reads one tensor after the other from safetensors, where it would map the whole file.

    Pages of a mapped file stay in memory beside the tensors that are made of them: half as much again in float32.
    """
    from safetensors import safe_open
    from transformers import modeling_utils

    def open_file(file: str, framework: str, device: str = "cpu", backend: str | None = None):
        return safe_open(file, framework=framework, device=device, backend="pread")

    with mock.patch.object(modeling_utils, "safe_open", open_file):
        yield


def _tokenizer(folder: Path, gguf_file: str | None):
    """The tokenizer files of the folder; a GGUF file brings its own, used where there are none."""
    from transformers import AutoTokenizer

    own = gguf_file and not any((folder / name).is_file() for name in _TOKENIZERS)
    return AutoTokenizer.from_pretrained(
        folder, local_files_only=True, **({"gguf_file": gguf_file} if own else {})
    )


def _architecture(folder: Path) -> str:
    import json

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return f"{', '.join(config.get('architectures') or [config.get('model_type', '?')])}: "
    except (OSError, ValueError, AttributeError):
        return ""
