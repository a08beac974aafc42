"""What a run would do: which claims run and which do not, why, on which model, in how much memory, for how long.

Memory    2 x parameters x bytes a parameter: the unquantized model and the quantized one are held side by side, in
          4 bytes each on a CPU (float32) and 2 elsewhere (as published: bfloat16 or float16); activations, Hessians
          and what a method keeps for itself come on top. What is free now, or --max-memory, decides whether that fits
Seconds   as the ledger has them; else 2 x parameters x tokens / the FLOP rate of a one-second probe, for 3 passes over
          the evaluated tokens (unquantized, quantized, unquantized again for the KL divergence) and 2 over the
          calibration tokens. The method's own work is not in it, so it is a lower bound
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

from requant.catalog.calibration import source_of
from requant.catalog.checkpoints import protocol_of, tasks_for
from requant.catalog.claims import Options
from requant.catalog.corpus import DatasetUnavailable, text_file
from requant.catalog.entry import (
    NO_IMPL,
    NO_IMPLEMENTATION,
    UNSTATED,
    Claim,
    FindingClaim,
    MeasuredClaim,
    OrderingClaim,
    Paper,
)
from requant.catalog.gate import tokenizer_family
from requant.catalog.inventory import memory_bytes
from requant.catalog.machine import free_memory
from requant.catalog.measurement import NOT_RUN, Measurement
from requant.catalog.protocols import REFERENCE_TEXT, Protocol, get_protocol
from requant.catalog.vocabulary import Vocab
from requant.catalog.weights import AUTO, NotHere, locate, require_loadable

EVALUATIONS, CALIBRATIONS = 3, 2  # passes over the evaluated and over the calibration tokens
REFERENCE_PARAMS = 4_500_000
Ledger = Mapping[str, Mapping[str, Mapping]]


@dataclass(frozen=True)
class Planned:
    """One claim of a plan.

    Attributes:
        reason: why it would not run; empty if it would.
        seconds: estimate, None for unknown; basis: `ledger`, `formula` (a lower bound), or empty.
        fits: whether that memory is there; if not, it takes a device map (`--device auto`). None for unknown.
    """

    paper: str
    claim: str
    kind: str
    runs: bool
    reason: str
    model: str | None
    memory_bytes: int | None
    seconds: float | None
    basis: str
    fits: bool | None = None

    def record(self) -> dict[str, object]:
        return asdict(self)


def plan(
    papers: Iterable[Paper],
    options: Options,
    vocab: Vocab,
    saved: Ledger,
    rate: float | None,
    only: Callable[[Paper, Claim], bool] = lambda paper, claim: True,
) -> list[Planned]:
    """The plan of a run, in the order of the entries.

    Args:
        saved: the ledger, entry -> claim -> record.
        rate: FLOP a second (`flop_rate`); None leaves out what only the formula would tell.
    """
    rows = []
    for paper in papers:
        for claim in paper.claims:
            if only(paper, claim):
                reason = obstacle(paper, claim, options, vocab)
                row = saved.get(paper.id, {}).get(claim.id)
                rows.append(_planned(paper, claim, reason, options, vocab, row, rate))
    return rows


def _planned(
    paper: Paper,
    claim: Claim,
    reason: str | None,
    options: Options,
    vocab: Vocab,
    row: Mapping | None,
    rate: float | None,
) -> Planned:
    model = getattr(claim, "model", None)
    known = vocab.models.get(model)
    seconds, basis = None, ""
    if reason is None and row is not None and row["state"] != NOT_RUN:
        seconds, basis = row["seconds"], "ledger"
    elif reason is None and rate is not None and (work := _flop(claim, vocab)) is not None:
        seconds, basis = work / rate, "formula"
    memory = memory_bytes(known.params, options.computes_on) if known else None
    return Planned(
        paper.id, claim.id, claim.kind, reason is None, reason or "", model, memory, seconds, basis,
        fits(memory, options),
    )  # fmt: skip


def fits(memory: int | None, options: Options) -> bool | None:
    """Whether the device that computes has this much memory for weights; None where one of the two is unknown."""
    free = next(iter(options.max_memory.values()), None) or free_memory(options.computes_on)
    return None if memory is None or free is None else memory <= free


def obstacle(paper: Paper, claim: Claim, options: Options, vocab: Vocab) -> str | None:
    """Why a claim would not run here, or None. Looks only for what is on this machine, and loads nothing."""
    if paper.impl is None:
        return NO_IMPLEMENTATION
    if isinstance(claim, FindingClaim) and claim.function is None:
        return "no experiment on a small model is written for this finding"
    if not isinstance(claim, MeasuredClaim):
        return None
    try:
        protocol = protocol_of(paper, claim)
        tasks_for(claim, protocol, vocab)
        model = vocab.models.get(claim.model)
        found = locate(
            claim.model, options.models_dir, options.model_paths, model.revision if model else None
        )
        if found is not None:
            require_loadable(found.path, options.allow_pickle)
            room = fits(memory_bytes(model.params if model else None, options.computes_on), options)
            if options.device == AUTO and options.offload_dir is None and room is False:
                return f"two models of {claim.model} do not fit here; give --offload-dir, a folder on disk"
        if options.download:
            return None
        if found is None:
            return f"no checkpoint of {claim.model} here; use --models-dir, --model-path or --download"
        if protocol.engine == "requant" and protocol.dataset.id != REFERENCE_TEXT:
            text_file(protocol.dataset, protocol.id, options.data_paths)
        calibration = vocab.calibrations.get(claim.calibration)
        if calibration is not None and calibration.rule != "reference":
            text_file(source_of(calibration, vocab), calibration.id, options.data_paths)
    except (NotHere, DatasetUnavailable) as reason:
        return str(reason)
    return None


def _flop(claim: Claim, vocab: Vocab) -> float | None:
    """Floating-point operations of the forward passes, 2 a parameter and token; None where tokens are unknown."""
    if getattr(claim, "protocol", None) in (None, UNSTATED):
        return None
    protocol = get_protocol(claim.protocol)
    if isinstance(claim, OrderingClaim):
        tokens = evaluated_tokens(protocol, "reference") or 0
        calib = claim.calib.n_samples * claim.calib.seqlen
        passes = [tokens + CALIBRATIONS * calib * (run.impl != NO_IMPL) for run in claim.runs.values()]
        return 2.0 * REFERENCE_PARAMS * sum(passes) * len(claim.seeds)
    if not isinstance(claim, MeasuredClaim) or vocab.models[claim.model].params is None:
        return None
    tokens = evaluated_tokens(protocol, tokenizer_family(claim.model))
    if tokens is None:
        return None
    calibration = vocab.calibrations.get(claim.calibration)
    calib = calibration.n_samples * calibration.seqlen if calibration else 0
    return 2.0 * vocab.models[claim.model].params * (EVALUATIONS * tokens + CALIBRATIONS * calib)


def evaluated_tokens(protocol: Protocol, family: str | None) -> int | None:
    """Tokens fed in one evaluation: windows x length where both are known for the tokenizer, or for any; else None."""
    length = protocol.windows.length
    if protocol.engine != "requant" or length is None:
        return None
    windows = [item for item in protocol.expected if item.check == "windows"]
    same = [item.value for item in windows if item.family in (None, family)]
    n = next(iter(same or [item.value for item in windows]), protocol.selection.n)
    return None if n is None else int(n) * length


def flop_rate(device: str = "cpu", seconds: float = 1.0) -> float:
    """FLOP a second of matrix products as a decoder block makes them, measured here for about `seconds`.

    float32 with the threads torch has now on a CPU, bfloat16 elsewhere.
    """
    import torch

    on_cpu = device == "cpu"
    size, dtype = (1024, torch.float32) if on_cpu else (8192, torch.bfloat16)
    X = torch.ones(256 if on_cpu else size, size, dtype=dtype, device=device)
    W = torch.ones(size, size, dtype=dtype, device=device)
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    X @ W
    wait()
    began, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        X @ W
        wait()
        done += 1
    return done * 2.0 * X.shape[0] * size * size / spent


class Eta:
    """Seconds that are left, from what the plan expects and from what claims of a kind have taken so far."""

    def __init__(self, rows: Iterable[Planned], jobs: int = 1):
        self._left = {(row.paper, row.claim): row for row in rows if row.runs}
        self._seen: dict[str, list[float]] = {}
        self._jobs = max(jobs, 1)

    def after(self, item: Measurement) -> float | None:
        """Seconds left once this claim is done; None while there is nothing to judge by."""
        if self._left.pop((item.paper, item.claim), None) is not None:
            self._seen.setdefault(item.kind, []).append(item.seconds)
        every = [seconds for taken in self._seen.values() for seconds in taken]
        left = 0.0
        for row in self._left.values():
            taken = self._seen.get(row.kind) or every
            if row.seconds is None and not taken:
                return None
            left += sum(taken) / len(taken) if row.seconds is None else row.seconds
        return left / min(self._jobs, max(len({row.paper for row in self._left.values()}), 1))
