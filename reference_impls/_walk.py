"""Go through a decoder block by block, with the calibration inputs of each block; one walk for every model family."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from requant.reference_impls._calib import Calib, batches_of, check_calib
from requant.reference_impls._hessian import gram
from requant.reference_impls._offload import kept
from requant.reference_impls._quant import QuantizationError
from requant.reference_impls._residence import FILES, HALF, away, homes_of_a_copy, placed, visit


class UnsupportedModelError(QuantizationError):
    """A method does not know the structure of a model; the message names both."""


class _Stop(Exception):
    """Ends a forward pass early once everything of interest was seen."""


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks: the ModuleList with as many entries as the config has hidden layers."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for _, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UnsupportedModelError(f"{type(model).__name__} has no list of {depth} decoder blocks")


def named_linears(module: nn.Module) -> dict[str, nn.Linear]:
    """All nn.Linear below a module, by their dotted name; raises if there is none."""
    found = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    if not found:
        raise UnsupportedModelError(f"{type(module).__name__} holds no nn.Linear")
    return found


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the submodule with this dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, new)


def copy_model(model: nn.Module) -> nn.Module:
    """An independent eval-mode copy without gradients: what every `quantize` starts from.

    The copy of a model that does not fit its device waits in files.
    """
    twin = copy.deepcopy(model, homes_of_a_copy(model)).eval().requires_grad_(False)
    for module in placed(twin):
        module.residence.store = FILES
    return twin


def visit_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Every decoder block, first to last, each on the device it computes on and in float32 until the next is asked for.

    What a caller changed by then, or put in a block's place, goes back to where blocks wait.
    """
    blocks = decoder_blocks(model)
    for index in range(len(blocks)):
        with _at_hand(blocks, index) as block:
            yield block


def _at_hand(blocks: nn.ModuleList, index: int):
    return visit(blocks[index], lambda: blocks[index])


def require_whole(model: nn.Module, what: str) -> None:
    """Raise UnsupportedModelError, naming the method, if parts of the model wait elsewhere than on their device.

    For what trains through all blocks at once, or holds a second copy of all weights.
    """
    if away(model):
        raise UnsupportedModelError(
            f"{what} needs all blocks of {type(model).__name__} on their device at once, and this one is kept in part "
            "in memory or on disk; use a larger device"
        )


@dataclass
class Block:
    """One decoder block during a walk.

    Attributes:
        inputs: hidden states [n_samples, seqlen, hidden], one tensor per batch.
        kwargs: the other arguments the model calls the block with (mask, position embeddings, ...).
        kwargs_of: the same by sequence length, where samples have several.
        original_inputs, targets: with propagate="both", the inputs that unchanged blocks give, and the outputs of
            this block as it was on them; batched like `inputs`. Elsewhere empty.
    """

    index: int
    name: str
    module: nn.Module
    inputs: list[Tensor]
    kwargs: Mapping[str, object]
    kwargs_of: Mapping[int, Mapping[str, object]] = field(default_factory=dict)
    original_inputs: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)

    def run(self) -> list[Tensor]:
        """Outputs of the block as it now is, for every batch of inputs."""
        return [kept(self.forward(batch)) for batch in self.inputs]

    def forward(self, batch: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Output of the block for hidden states [n, seqlen, hidden].

        Args:
            parameters: dotted name in the block -> tensor used in the place of that parameter in this pass, through
                which gradients flow (torch.func.functional_call).
        """
        # recorded for one sample: leading dimensions of 1 broadcast, Bloom's alibi [heads, 1, seqlen] is
        # batch-major
        kwargs = {
            key: value.repeat(len(batch), *[1] * (value.ndim - 1))
            if isinstance(value, Tensor) and value.ndim >= 3 and len(value) > 1
            else value
            for key, value in self.kwargs_of.get(batch.shape[1], self.kwargs).items()
        }
        if parameters:
            output = torch.func.functional_call(self.module, dict(parameters), (batch,), kwargs)
        else:
            output = self.module(batch, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def observe(self, modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> None:
        """Run the block and call see(name, input [n_tokens, d_in]) for each named module and batch.

        The pass ends as soon as each module was seen, so the outputs are not returned.
        """
        for batch in self.inputs:
            waiting = set(modules)

            def hook(name: str, waiting: set[str] = waiting) -> Callable:
                def seen(_module: nn.Module, args: tuple) -> None:
                    see(name, args[0].flatten(0, -2))
                    waiting.discard(name)
                    if not waiting:
                        raise _Stop

                return seen

            handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
            try:
                self.forward(batch)
            except _Stop:
                pass
            finally:
                for handle in handles:
                    handle.remove()

    def hessians(self, linears: Mapping[str, nn.Linear] | None = None) -> dict[str, Tensor]:
        """H = X^T X / n_tokens of every linear (or of the given ones), float32 [d_in, d_in].

        Linears that are fed the same tensor (q, k, v; gate, up) share one H object.
        """
        sums: dict[str, Tensor] = {}
        owner: dict[str, str] = {}  # linear -> the first linear that is fed the same tensor
        latest: dict[str, Tensor] = {}
        n_tokens = sum(batch.shape[0] * batch.shape[1] for batch in self.inputs)

        def see(name: str, X: Tensor) -> None:
            if name not in owner:
                same = (
                    first
                    for first, seen in latest.items()
                    if seen.data_ptr() == X.data_ptr() and seen.shape == X.shape
                )
                owner[name] = next(same, name)
            if owner[name] == name:
                latest[name] = X  # kept alive, so that its address stays its own
                sums[name] = sums[name] + gram(X.float()) if name in sums else gram(X.float())

        self.observe(named_linears(self.module) if linears is None else linears, see)
        means = {name: total / n_tokens for name, total in sums.items()}
        return {name: means[first] for name, first in owner.items()}


@torch.no_grad()
def walk_blocks(
    model: nn.Module,
    calib: Calib,
    *,
    batch_size: int = 16,
    propagate: str = "quantized",
    several_lengths: bool = False,
) -> Iterator[Block]:
    """Yield every decoder block, first to last, with its calibration inputs.

    Args:
        calib: int64 [n_samples, seqlen].
        propagate: "quantized" feeds a block with the outputs of the blocks before it as the caller left
            them (GPTQ); "original" with their outputs before the caller changed them (AWQ); "both" gives the
            first as `inputs` and the second as `original_inputs`, with `targets` to be reconstructed (OmniQuant).
        several_lengths: the caller can do with batches of different sequence lengths, as a list of tensors gives them.
    """
    check_calib(calib, several_lengths)
    blocks = decoder_blocks(model)
    names = {id(module): name for name, module in model.named_modules()}
    batches = batches_of(calib, batch_size)
    kwargs = {batch.shape[1]: batch for batch in batches}  # one batch of each length
    kwargs = {length: _block_kwargs(model, blocks, batch) for length, batch in kwargs.items()}
    inputs = [kept(_full(first_input(model, blocks[0], batch))) for batch in batches]
    originals = inputs
    for index in range(len(blocks)):
        with _at_hand(blocks, index) as module:
            kwargs_of = {length: found[index] for length, found in kwargs.items()}
            block = Block(index, names[id(module)], module, inputs, kwargs_of[batches[0].shape[1]], kwargs_of)
            if propagate == "both":
                block.original_inputs = originals
                originals = block.targets = [kept(block.forward(batch)) for batch in originals]
            ahead = block.run() if propagate == "original" else None
            yield block
        if index + 1 < len(blocks):
            if ahead is None:  # with the weights as they are kept: in 16 bits they were rounded just now
                with visit(block.module):
                    ahead = block.run()
            inputs = ahead


def _full(value: Any) -> Any:
    """Floating tensors of 16 bits in float32, also in tuples: blocks are walked through in float32."""
    if isinstance(value, tuple):
        return tuple(_full(item) for item in value)
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


def first_input(model: nn.Module, block: nn.Module, batch: Tensor) -> Tensor:
    """What a block or any module inside a decoder is fed for tokens [n_samples, seqlen]; the pass ends there."""
    seen: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    handle = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model.base_model(batch.to(model.device), use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    return seen[0]


def _block_kwargs(model: nn.Module, blocks: nn.ModuleList, batch: Tensor) -> list[dict]:
    """What the model passes to each block besides hidden states; taken from a one-sample forward pass.

    Without padding these depend on the sequence length alone, so that all blocks but the first may pass on what that
    one gave instead of computing something.
    """
    seen: list[dict] = [{} for _ in blocks]
    first: list[Any] = []
    handles = [blocks[0].register_forward_hook(lambda _module, _args, output: first.append(output))]
    for index, block in enumerate(blocks):

        def keep(_module: nn.Module, args: tuple, kwargs: dict, index: int = index) -> None:
            seen[index] = {key: _full(value) for key, value in kwargs.items() if key != "hidden_states"}
            if len(args) > 1:
                raise UnsupportedModelError(
                    f"{type(_module).__name__} takes positional arguments beyond hidden states"
                )

        handles.append(block.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        with ExitStack() as idle:
            for block in list(blocks)[1:]:
                idle.enter_context(mock.patch.object(block, "forward", lambda *_args, **_kwargs: first[0]))
            model.base_model(batch[:1].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen
