"""What `requant new` writes: an entry and a module; what is still to be said is marked TODO(you)."""

from __future__ import annotations

import json
from pathlib import Path
from string import Template

from requant.catalog.files import write_atomic

_ENTRY = Template("""\
# yaml-language-server: $$schema=../catalog/schema/paper.schema.json
title: $title
authors: [TODO(you)]
venue: {name: TODO(you), year: TODO(you), track: null, url: null}    # name from catalog/vocab/venues.yaml
ids: {arxiv: $arxiv, openreview: null, acl: null, doi: null}    # quoted, or null
code: {url: TODO(you), license: null, commit: null, official: true}    # or: code: null
kind: method    # method | analysis | benchmark | baseline
tags: [TODO(you)]    # from catalog/vocab/tags.yaml
summary: >-
  TODO(you)
method:    # null for an analysis or a benchmark
  requires: [TODO(you)]    # calibration-data, generated-data, gradients, training or none
  bits: TODO(you)    # bits per weight as a formula, scales included
  hyperparameters: {}    # every default of Config
  pitfalls: []
  paper_vs_code: []
impl: $id    # or null; then delete reference_impls/$id.py
claims:
  - id: TODO(you)    # runs on the reference model in seconds; needs no checkpoint
    kind: ordering
    statement: TODO(you)
    source: {where: TODO(you), seen_at: TODO(you), evidence: primary}    # primary | secondary | recalled
    model: reference
    protocol: reference-kjv-256-spread/1
    runs: {$id: {}, rtn: {impl: rtn}}
    relation: $id < rtn
    margin: 0.0    # nats
    seeds: [0]
    baseline: {$id: rtn}    # with this replacement the relation must fail
  - id: TODO(you)    # a number of a published table
    kind: perplexity
    statement: TODO(you)
    source: {where: TODO(you), seen_at: TODO(you), evidence: primary}
    model: TODO(you)    # from catalog/vocab/models.yaml
    dataset: wikitext2
    setting: {w_bits: TODO(you), a_bits: 16, kv_bits: 16, group_size: null}
    metric: token_perplexity
    value: TODO(you)
    baselines: {fp16: TODO(you)}
    protocol: TODO(you)    # from catalog/vocab/protocols.yaml, or unstated with a protocol_note
    calibration: null
    config: null
    tolerance: null
independent_results: []
superseded_by: null
related: []
maintainers: []
""")

_MODULE = Template('''\
"""TODO(you): what the method does, in one sentence.

Paper     TODO(you): authors, venue, $cite with the version your numbers refer to   Entry  papers/$id.yaml
Scope     TODO(you): what is quantized, what is left alone
Deviates  none
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    w_bits: int = 4  # TODO(you): table or section of each default


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """A quantized copy of `model`; calib is int64 [n_samples, seqlen]."""
    model = copy.deepcopy(model)
    raise NotImplementedError("TODO(you)")


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """Bits stored per weight of a [d_out, d_in] layer, scales and zero points included."""
    raise NotImplementedError("TODO(you)")
''')


def create(name: str, papers: Path, impls: Path, arxiv: str | None, title: str | None) -> tuple[Path, Path]:
    """Write the two templates of a new entry; `name`, `arxiv` and `title` are valid already.

    Raises: FileExistsError, before anything is written, if a file is there; OSError if one cannot be written.
    """
    entry, module = papers / f"{name}.yaml", impls / f"{name}.py"
    for path in (entry, module):
        if path.exists() or path.is_symlink():
            raise FileExistsError(f"{path} exists already; nothing was written")
    values = {
        "id": name,
        "title": json.dumps(title, ensure_ascii=False) if title else "TODO(you)",
        "arxiv": f'"{arxiv}"' if arxiv else "TODO(you)",
        "cite": f"arXiv:{arxiv}" if arxiv else "arXiv:TODO(you)",
    }
    write_atomic(module, _MODULE.substitute(values))
    try:
        write_atomic(entry, _ENTRY.substitute(values))
    except OSError:
        module.unlink()
        raise
    return entry, module
