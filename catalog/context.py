"""What a claim may use while it is measured: reference models, tokens, layers, and cached evaluations."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor, nn

from requant.catalog.corpus import Checks
from requant.catalog.evaluate import Evaluation, evaluate
from requant.catalog.protocols import get_protocol
from requant.catalog.reference import models
from requant.catalog.sharing import shared
from requant.reference_impls._walk import first_input

ORDERING_PROTOCOL = "reference-kjv-256-spread/1"  # of orderings and findings


def load_impl(name: str) -> ModuleType:
    """The reference implementation with this id, imported when first asked for."""
    return importlib.import_module(f"requant.reference_impls.{name}")


def load_evidence(name: str) -> ModuleType:
    """Where the functions are that claims on this implementation name: evidence/<name>.py, or else its own module."""
    module = f"requant.reference_impls.evidence.{name}"
    return importlib.import_module(module) if importlib.util.find_spec(module) else load_impl(name)


def make_config(impl: ModuleType, overrides: Mapping[str, object]) -> object:
    """impl.Config with some fields replaced.

    Raises: ValueError naming the first field that does not exist and those that do.
    """
    names = [field.name for field in dataclasses.fields(impl.Config)]
    for key in overrides:
        if key not in names:
            raise ValueError(
                f"{impl.__name__.rpartition('.')[2]}.Config has no field {key!r}; it has {', '.join(names)}"
            )
    return impl.Config(**overrides)


class Context:
    """Reference models and data for one seed. What is returned is the caller's own, or to be treated as read-only."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def reference(self, name: str = "reference") -> nn.Module:
        """A fresh float32 reference model in eval mode."""
        return models.load_reference(name).model

    def tokenizer(self):
        """The reference tokenizer."""
        return models.load_tokenizer()

    def calib(self, n_samples: int = 64, seqlen: int = 256) -> Tensor:
        """Calibration tokens of the train split, drawn with this context's seed: int64 [n_samples, seqlen]."""
        return models.calibration_tokens(n_samples, seqlen, self.seed)

    def test_windows(self, n: int | None = 64) -> Tensor:
        """The first n test windows (None: all): int64 [n, 256]."""
        return models.test_windows(n)

    def layer(
        self, name: str, model: str = "reference", n_tokens: int = 4096
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One linear of a reference model with its calibration inputs.

        Returns: W [d_out, d_in], H = X^T X / n_tokens [d_in, d_in], X [n_tokens, d_in]; all float32, fresh
        copies.
        """
        W, X = _layer(name, model, n_tokens, self.seed)
        return W.clone(), X.T @ X / len(X), X.clone()

    def nll(self, model: nn.Module, protocol: str = ORDERING_PROTOCOL) -> float:
        """Mean next-token loss in nats of a model that uses the reference tokenizer."""
        return self.evaluate(model, protocol).nll

    def evaluate(self, model: nn.Module, protocol: str = ORDERING_PROTOCOL) -> Evaluation:
        """The full evaluation behind `nll`."""
        return evaluate(model, self.tokenizer(), get_protocol(protocol))

    def run(
        self,
        impl: str,
        config: Mapping[str, object],
        model: str = "reference",
        protocol: str = ORDERING_PROTOCOL,
        calib: tuple[int, int] = (64, 256),
        *,
        wait: bool = True,
    ) -> Evaluation:
        """Quantize a reference model with a method (`none`: leave it) and evaluate it, once in a session.

        This context's seed draws the calibration tokens and, where the method has a seed, is the method's
        as well. Runs of data-free methods are shared by all seeds and calibration sizes.
        Raises: sharing.Busy, if another process is at this run and `wait` is false.
        """
        data_free = impl == "none" or getattr(load_impl(impl), "DATA_FREE", False)
        sampling = ((0, 0), 0) if data_free else (calib, self.seed)
        what = (impl, json.dumps(dict(config), sort_keys=True), model, protocol, *sampling)
        found = shared(repr(what), lambda: dataclasses.asdict(_run(*what)), wait=wait)
        checks, first_tokens = Checks(**found["checks"]), tuple(found["first_tokens"])
        return Evaluation(**found | {"checks": checks, "first_tokens": first_tokens})


@functools.lru_cache(maxsize=16)
@torch.no_grad()
def _layer(name: str, model: str, n_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    network = models.load_reference(model).model
    linear = network.get_submodule(name)
    X = first_input(network, linear, models.calibration_tokens(-(-n_tokens // 256), 256, seed))
    return linear.weight.detach(), X.flatten(0, -2)[:n_tokens]


def _run(impl: str, config: str, model: str, protocol: str, calib: tuple[int, int], seed: int) -> Evaluation:
    context = Context(seed)
    network = context.reference(model)
    if impl != "none":
        module = load_impl(impl)
        overrides = json.loads(config)
        if "seed" in {field.name for field in dataclasses.fields(module.Config)}:
            overrides.setdefault("seed", seed)
        tokens = context.calib(*calib) if calib[0] else None
        network = module.quantize(network, tokens, make_config(module, overrides))
    return context.evaluate(network, protocol)
