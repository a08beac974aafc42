"""Which checkpoints the claims need, what they take, and which of them are here. Never uses the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from requant.catalog.entry import FindingClaim, MeasuredClaim
from requant.catalog.loader import Catalog
from requant.catalog.weights import PICKLE, Found, NotHere, locate

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
COPIES = 2  # a claim holds the unquantized model and the quantized one


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that claims name; `claims` are written `<entry>-<claim>`, None stands for unknown.

    Attributes:
        size_bytes: of the weight files: counted if they are here, else as the vocabulary knows it.
        cpu_bytes, gpu_bytes: memory to measure a claim on it, see `memory_bytes`.
        cached: it is on this machine; here: where (`cache`, `models-dir`, `model-path`), or None.
        form: `safetensors`, `gguf` or `pickle` (which is refused without --allow-pickle); None if it is not here.
    """

    id: str
    params: int | None
    license: str | None
    gated: bool | None
    revision: str | None
    size_bytes: int | None
    cpu_bytes: int | None
    gpu_bytes: int | None
    cached: bool
    here: str | None
    form: str | None
    n_claims: int
    claims: tuple[str, ...]

    @property
    def usable(self) -> bool:
        """Whether its claims are unlocked: it is here, and not only as a pickle."""
        return self.cached and self.form != PICKLE


def memory_bytes(params: int | None, device: str = "cpu") -> int | None:
    """Memory to measure a claim: two models, 4 bytes a parameter on a CPU (float32), 2 elsewhere (as published)."""
    return None if params is None else COPIES * params * (4 if device == "cpu" else 2)


def checkpoints(
    catalog: Catalog,
    cached: frozenset[str] | None = None,
    models_dir: str | Path | None = None,
    model_paths: Mapping[str, str] | None = None,
) -> list[Checkpoint]:
    """All checkpoints that claims name, those that unlock most claims first.

    Args:
        cached: ids that are in the Hugging Face cache (default: what `cached_models` finds).
        models_dir, model_paths: other places to look in, see weights.locate.
    """
    cached = cached_models() if cached is None else cached
    claims: dict[str, list[str]] = {}
    for paper in catalog.papers.values():
        for claim in paper.claims:
            if isinstance(claim, MeasuredClaim | FindingClaim) and claim.model is not None:
                claims.setdefault(claim.model, []).append(f"{paper.id}-{claim.id}")
    rows = []
    for name, named in claims.items():
        model = catalog.vocab.models[name]
        found = _find(name, models_dir, model_paths, model.revision)
        rows.append(
            Checkpoint(
                id=name, params=model.params, license=model.license, gated=model.gated, revision=model.revision,
                size_bytes=found.size_bytes if found else model.size_bytes,
                cpu_bytes=memory_bytes(model.params), gpu_bytes=memory_bytes(model.params, "cuda"),
                cached=found is not None or name in cached,
                here=found.place if found else "cache" if name in cached else None,
                form=found.form if found else None, n_claims=len(named), claims=tuple(named),
            )
        )  # fmt: skip
    return sorted(rows, key=lambda row: (-row.n_claims, row.id))


def _find(
    name: str, models_dir: str | Path | None, paths: Mapping[str, str] | None, revision: str | None
) -> Found | None:
    try:
        return locate(name, models_dir, paths, revision)
    except NotHere:  # a place was given that holds nothing
        return None


def cached_models(cache_dir: Path | None = None) -> frozenset[str]:
    """Ids of the models whose weights lie in the local Hugging Face cache (default: the user's)."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(cache_dir).repos
    except CacheNotFound:
        return frozenset()
    return frozenset(
        repo.repo_id
        for repo in repos
        if repo.repo_type == "model"
        and any(file.file_name.endswith(_WEIGHTS) for revision in repo.revisions for file in revision.files)
    )


def in_units(number: int | None, units: tuple[str, ...] = ("", " k", " M", " B", " T")) -> str:
    """`125000000` as `125 M`; `?` for None."""
    if number is None:
        return "?"
    value, index = float(number), 0
    while value >= 1000 and index < len(units) - 1:
        value, index = value / 1000, index + 1
    return f"{value:.4g}{units[index]}"


def in_bytes(number: int | None) -> str:
    """`26000000000` as `26 GB`; `?` for None."""
    return in_units(number, (" B", " kB", " MB", " GB", " TB"))
