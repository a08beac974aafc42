"""What a machine is like, as far as numbers, speed and room depend on it: the findings of `requant doctor`."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

OK, NOTE, BAD = "ok", "note", "bad"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. state: ok, note (read it), bad (numbers cannot be trusted)."""

    state: str
    name: str
    text: str


def machine() -> Iterator[Finding]:
    """Threads, arithmetic, accelerator, memory and disk."""
    yield from _arithmetic()
    yield from _accelerator()
    yield from _room()


def installed(name: str) -> str | None:
    """The version of a package without its build, None if it is not here."""
    try:
        return public(metadata.version(name))
    except metadata.PackageNotFoundError:
        return None


def public(version: str | None) -> str | None:
    """Without the build: 2.13.0+cpu and 2.13.0 are one version."""
    return version and version.partition("+")[0]


def _arithmetic() -> Iterator[Finding]:
    import torch

    threads, cores = (
        torch.get_num_threads(),
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
    )
    text = (
        f"{threads} of {cores} cores; tests and ledger use 1 a process, more moves the last digits of a sum"
    )
    yield Finding(NOTE if threads > cores else OK, "threads", text)
    flushed = bool((torch.tensor([1e-39]) * 1.0 == 0).item())
    text = "flushed to zero" if flushed else "kept (tests flush them: faster, same to four digits)"
    yield Finding(OK, "denormals", text)
    blas = "mkl" if torch.backends.mkl.is_available() else "another BLAS than mkl"
    onednn = "oneDNN" if torch.backends.mkldnn.is_available() else "no oneDNN"
    yield Finding(
        OK, "cpu", f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {blas}, {onednn}"
    )


def _accelerator() -> Iterator[Finding]:
    import torch

    triton = installed("triton")
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        text = f"{torch.cuda.get_device_name(0)}, {total:.0f} GiB"
        yield Finding(
            OK if triton else NOTE, "cuda", text + ("" if triton else "; no triton, so no kernels on it")
        )
    else:
        yield Finding(OK, "cuda", "none: claims run on the CPU, kernels by their torch reference")
    yield Finding(OK, "triton", triton or "not installed: kernels by their torch reference")


def _room() -> Iterator[Finding]:
    free = free_memory()
    if free is not None:
        enough = free >= 2 * 2**30
        text = f"{free / 2**30:.1f} GiB free" + (
            "" if enough else ": tests in several processes take about 2 GiB"
        )
        yield Finding(OK if enough else NOTE, "memory", text)
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    place = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    disk = shutil.disk_usage(place).free / 2**30
    n_models = sum(1 for _ in cache.glob("models--*")) if cache.is_dir() else 0
    holds = f"{n_models} checkpoints" if cache.is_dir() else "not there yet"
    yield Finding(OK, "checkpoints", f"{cache} ({holds}), {disk:.0f} GiB of disk free")


def free_memory(device: str = "cpu") -> int | None:
    """Bytes that can be used on a device (on the CPU without swapping), where the system says so."""
    if device != "cpu":
        import torch

        return (
            torch.cuda.mem_get_info(device)[0]
            if device.startswith("cuda") and torch.cuda.is_available()
            else None
        )
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, LookupError, StopIteration):
        return None
