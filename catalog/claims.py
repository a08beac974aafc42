"""Measure one claim: dispatch by kind, return what was measured and the verdict.

A verdict is `reproduced`, `contradicted` or `not run`, and `not run` always says why. A claim whose
measurement raises an error is `not run` with `failed` set: it is never counted as anything else, and it
makes the run fail.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import torch

from requant.catalog.checkpoints import NotHere, measure_checkpoint
from requant.catalog.context import Context, load_evidence, load_impl, make_config
from requant.catalog.entry import (
    NO_IMPLEMENTATION,
    BitsClaim,
    Claim,
    FindingClaim,
    InvariantClaim,
    MeasuredClaim,
    OrderingClaim,
    Paper,
    Run,
    reported,
)
from requant.catalog.files import sha256
from requant.catalog.measurement import CONTRADICTED, NOT_RUN, REPRODUCED, Measurement
from requant.catalog.sharing import all_of, shared
from requant.catalog.weights import AUTO

Values = dict[str, float]


@dataclass(frozen=True)
class Options:
    """How to find checkpoints and where to run. No field changes a verdict on the reference model.

    model_paths: checkpoint id -> folder or .gguf file, looked at first; allow_pickle: see weights.py.
    data_paths: dataset `id:split` -> local file to read in its place; its SHA-256 goes into the record.
    device: where checkpoints compute; `auto` places each by accelerate's device map, so that it may be larger than
        a device, see spread.py. max_memory: of that map, number of an accelerator or `cpu` -> bytes.
    offload_dir: folder on disk for the calibration activations of methods that walk block by block, and with `auto`
        for weights that do not fit.
    """

    models_dir: str | None = None
    download: bool = False
    device: str = "cpu"
    model_paths: Mapping[str, str] = field(default_factory=dict)
    allow_pickle: bool = False
    data_paths: Mapping[str, str] = field(default_factory=dict)
    offload_dir: str | None = None
    max_memory: Mapping[int | str, int] = field(default_factory=dict)

    @property
    def computes_on(self) -> str:
        """The device that computes: `auto` stands for the first accelerator, or the CPU."""
        if self.device != AUTO:
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"


def measure(paper: Paper, claim: Claim, options: Options | None = None) -> Measurement:
    """Measure one claim. Errors of the measurement end in the returned record, not in an exception."""
    began = time.perf_counter()
    try:
        if paper.impl is None:
            raise NotHere(NO_IMPLEMENTATION)
        result = _MEASURES[type(claim)](paper, claim, options or Options())
    except NotHere as reason:
        result = _outcome(paper, claim, None, NOT_RUN, str(reason))
    except Exception as error:  # whatever a method raises is the verdict on that method, with its words kept
        result = replace(
            _outcome(paper, claim, None, NOT_RUN, f"error: {type(error).__name__}: {error}"), failed=True
        )
    return replace(result, seconds=time.perf_counter() - began)


def measure_all(
    papers: Iterable[Paper],
    options: Options | None = None,
    only: Callable[[Claim], bool] = lambda claim: True,
) -> Iterator[Measurement]:
    """Measurements of all claims of the given entries, one after the other, in the order of the entries."""
    for paper in papers:
        for claim in paper.claims:
            if only(claim):
                yield measure(paper, claim, options)


def without_method(claim: Claim) -> Claim:
    """The claim with its method replaced by its stated baseline: it must then fail, or it says nothing.

    Raises: TypeError for a kind that compares nothing.
    """
    if isinstance(claim, OrderingClaim):
        swapped = {name: by if isinstance(by, Run) else claim.runs[by] for name, by in claim.baseline.items()}
        return replace(claim, runs={**claim.runs, **swapped}, expected=None)
    if isinstance(claim, FindingClaim) and claim.order:
        return replace(
            claim, relation=" < ".join(claim.baseline.get(name, name) for name in claim.order), expected=None
        )
    raise TypeError(f"a claim of kind {claim.kind} has no baseline to be replaced by")


def _outcome(
    paper: Paper, claim: Claim, measured: float | Values | None, state: str, reason: str, **details
) -> Measurement:
    return Measurement(
        paper=paper.id, claim=claim.id, kind=claim.kind, reported=reported(claim), measured=measured, state=state,
        reason=reason, protocol=getattr(claim, "protocol", None), expected=claim.expected is not None, details=details,
    )  # fmt: skip


def _verdict(holds: bool) -> str:
    return REPRODUCED if holds else CONTRADICTED


def _in_order(
    paper: Paper, claim: OrderingClaim | FindingClaim, measured: Values, low: Values, high: Values, **details
) -> Measurement:
    """The verdict: does each name's highest value lie below the next one's lowest by at least the margin?"""
    gaps = {f"{a} < {b}": low[b] - high[a] for a, b in pairwise(claim.order)}
    margin = claim.margin or 0.0
    holds = all(math.isfinite(gap) and gap > 0 and gap >= margin for gap in gaps.values())
    reason = "; ".join(f"{pair} by {gap:.4f}" for pair, gap in gaps.items())
    return _outcome(paper, claim, measured, _verdict(holds), reason, gaps=gaps, **details)


def _ordering(paper: Paper, claim: OrderingClaim, _options: Options) -> Measurement:
    size = (claim.calib.n_samples, claim.calib.seqlen)
    wanted = list(product(claim.runs.items(), claim.seeds))
    evaluations = all_of(
        [
            partial(Context(seed).run, run.impl, run.config, run.model, claim.protocol, size)
            for (_name, run), seed in wanted
        ]
    )
    losses: dict[str, list[float]] = {}
    for ((name, _run), _seed), evaluation in zip(wanted, evaluations, strict=True):
        losses.setdefault(name, []).append(evaluation.nll)
    low, high = ({name: pick(values) for name, values in losses.items()} for pick in (min, max))
    means = {name: math.fsum(values) / len(values) for name, values in losses.items()}
    spread = {name: high[name] - low[name] for name in losses} if len(claim.seeds) > 1 else {}
    return _in_order(paper, claim, means, low, high, seeds=list(claim.seeds), spread=spread)


def _invariant(paper: Paper, claim: InvariantClaim, _options: Options) -> Measurement:
    value = float(getattr(load_evidence(paper.impl), claim.function)(Context()))
    return _outcome(paper, claim, value, _verdict(math.isfinite(value) and value <= claim.bound), "")


def _bits(paper: Paper, claim: BitsClaim, _options: Options) -> Measurement:
    impl = load_impl(paper.impl)
    value, held = stored_bits_per_weight(impl, make_config(impl, claim.config), *claim.layer)
    reason = "bits of the stored tensors"
    if held is not None:
        reason += f"; a QuantLinear holds {held:.4g}, its rows filled up to whole words"
    return _outcome(
        paper, claim, value, _verdict(claim.tolerance.allows(claim.value, value)), reason, quant_linear=held
    )


def stored_bits_per_weight(impl, cfg: object, d_out: int, d_in: int) -> tuple[float, float | None]:
    """Bits per weight of the tensors that `pack_weight` makes of a Gaussian [d_out, d_in] layer with random inputs.

    Returns: the bits of those tensors, and those a QuantLinear really holds where they are codes on an affine grid
    (None elsewhere). They differ by the filling of rows of codes and zero points to 32 codes.
    Raises: ValueError if that layer has another weight than `unpack_weight` gives, or is larger than that.
    """
    from requant.reference_impls._quant import storage_bits

    generator = torch.Generator().manual_seed(0)
    W = torch.randn(d_out, d_in, generator=generator) / math.sqrt(d_in)
    X = torch.randn(256, d_in, generator=generator)
    H = X.T @ X / len(X)
    H.diagonal().add_(1.0)  # as if of many more inputs: positive definite, and quickly made
    packed = impl.pack_weight(W, H, cfg)
    bits, layer = storage_bits(packed) / W.numel(), _quant_linear(packed, cfg)
    if layer is None:
        return bits, None
    if not torch.equal(layer.dequantize(), impl.unpack_weight(packed, cfg)):
        raise ValueError("a QuantLinear with these tensors has another weight than unpack_weight gives")
    filling = 2 * 31 * cfg.w_bits / d_in  # codes and zero points of a row, at most 31 places each
    if not bits <= layer.bits_per_weight <= bits + filling:
        raise ValueError(
            f"a QuantLinear holds {layer.bits_per_weight} bits a weight, the tensors have {bits}"
        )
    return bits, layer.bits_per_weight


def _quant_linear(packed: Mapping[str, torch.Tensor], cfg: object):
    """A QuantLinear with these tensors, or None where they are no affine grid of a width it packs."""
    from requant.kernels.pack import WIDTHS
    from requant.kernels.quant_linear import QuantLinear

    bits, symmetric = getattr(cfg, "w_bits", None), getattr(cfg, "symmetric", False)
    affine = {"shape", "codes", "scale"} | (set() if symmetric else {"zero_point"})
    if bits not in WIDTHS or set(packed) != affine or packed["shape"].numel() != 3:
        return None
    return QuantLinear.from_affine(packed, bits, symmetric)


def _finding(paper: Paper, claim: FindingClaim, _options: Options) -> Measurement:
    if claim.function is None:
        raise NotHere("no experiment on a small model is written for this finding")
    values = dict(shared(f"{paper.impl}.{claim.function}", partial(_experiment, paper.impl, claim.function)))
    return _in_order(paper, claim, values, values, values)


def _experiment(impl: str, function: str) -> list[tuple[str, float]]:
    rows = getattr(load_evidence(impl), function)(Context())
    return [(row["name"], float(row["value"])) for row in rows]


def _published(paper: Paper, claim: MeasuredClaim, options: Options) -> Measurement:
    evaluation, reason = measure_checkpoint(paper, claim, options)
    state = _verdict(claim.tolerance.allows(claim.value, evaluation.value))
    details = {
        "standard_error": evaluation.standard_error,
        "kl": evaluation.kl,
        "n_tokens": evaluation.n_tokens,
    }
    if options.data_paths:
        files = {key: Path(path) for key, path in options.data_paths.items()}
        details["data_sha256"] = {key: _checksum(f, f.stat().st_mtime_ns) for key, f in files.items()}
    if evaluation.tasks:
        details |= {"engine": evaluation.engine, "tasks": evaluation.tasks}
    return _outcome(paper, claim, evaluation.value, state, reason, **details)


@functools.cache
def _checksum(path: Path, _time: int) -> str:
    """SHA-256 of a data file, read once for all claims while its time of change stays the same."""
    return sha256(path)


_MEASURES: dict[type[Claim], Callable[..., Measurement]] = {
    OrderingClaim: _ordering,
    InvariantClaim: _invariant,
    BitsClaim: _bits,
    FindingClaim: _finding,
    MeasuredClaim: _published,
}
