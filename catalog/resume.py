"""Which saved measurements still stand, so that a run which was stopped can go on where it was.

A measurement has a key: a hash of what decides it and is known before it is made. That is the claim's content but for
its words, the protocol's definition, the pinned checkpoint revision, the source of the implementations it runs, of the
evidence if it names a function, and of all that these reach, the versions of the packages, and the kind of device. The
commit is not part of it: a commit that changes none of these changes no number. Neither is the place of a checkpoint;
weights that were swapped under one name have to be measured again without --resume.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from requant.catalog import ledger
from requant.catalog.checks import EVIDENCE
from requant.catalog.code_hash import code_hash
from requant.catalog.entry import NO_IMPL, UNSTATED, Claim, OrderingClaim, Paper, Run, as_plain
from requant.catalog.measurement import NOT_RUN, Measurement
from requant.catalog.protocols import get_protocol
from requant.catalog.vocabulary import Vocab

_WORDS = ("statement", "source", "note", "bits_note", "baselines_note", "protocol_note")
_NOT_OF_THE_MEASUREMENT = ("environment", "key")
Key = tuple[str, str]  # entry, claim


def record_key(paper: Paper, claim: Claim, vocab: Vocab, device: str = "cpu") -> str:
    """The key of a measurement of this claim on this machine: 32 hexadecimal digits."""
    protocol = getattr(claim, "protocol", None)
    model = vocab.models.get(getattr(claim, "model", None))
    impls = {paper.impl}
    if isinstance(claim, OrderingClaim):
        impls |= {
            run.impl for run in (*claim.runs.values(), *claim.baseline.values()) if isinstance(run, Run)
        }
    if getattr(claim, "function", None):
        impls.add(f"{EVIDENCE}/{paper.impl}")
    parts = {
        "entry": paper.id,
        "claim": {name: value for name, value in as_plain(claim).items() if name not in _WORDS},
        "protocol": get_protocol(protocol).fingerprint if protocol not in (None, UNSTATED) else None,
        "revision": model.revision if model else None,
        "code": code_hash(impls - {None, NO_IMPL}),
        "versions": ledger.versions(),
        "device": device_kind(device),
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def device_kind(device: str) -> str:
    """`cpu/x86_64`, or the accelerator's name without its number: `cuda/NVIDIA H200`."""
    import platform

    kind = device.partition(":")[0]
    if kind != "cuda":
        return f"{kind}/{platform.machine()}"
    import torch

    return f"{kind}/{torch.cuda.get_device_name(device) if torch.cuda.is_available() else 'absent'}"


def measured_before(
    papers: Iterable[Paper],
    keys: dict[Key, str],
    only: Callable[[Paper, Claim], bool],
    folder: Path | None = None,
) -> list[Measurement]:
    """The saved measurements whose key is still the claim's.

    Claims that were not run, or ended in an error, are left out: what they lacked may be here now.
    Raises: LedgerError for a ledger that cannot be read.
    """
    found = []
    for paper in papers:
        saved = ledger.read(paper.id, folder)
        for claim in paper.claims:
            row = saved.get(claim.id)
            if row is None or not only(paper, claim) or row["state"] == NOT_RUN or row.get("failed"):
                continue
            if row.get("key") == keys[paper.id, claim.id]:
                found.append(
                    Measurement(**{k: v for k, v in row.items() if k not in _NOT_OF_THE_MEASUREMENT})
                )
    return found
