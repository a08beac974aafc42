"""A residual stream that each sublayer reads in a basis of its own, at the price of a product between the two.

ResQ's code (arXiv:2412.14363, options per_layer and one_per_decoder) puts a linear on the skip connection. Here it is
added to what the sublayer writes, so that no family's block has to be written anew: x + (y + x C - x) = x C + y.
Conventions are those of `_rotation`: a row vector x becomes x Q.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from requant.reference_impls._activation import transform_output
from requant.reference_impls._anatomy import anatomy
from requant.reference_impls._quant import clipped_fake_quant
from requant.reference_impls._residence import visit
from requant.reference_impls._rotation import post_norms, turn_reader, turn_writer
from requant.reference_impls._stream_ends import stream_ends
from requant.reference_impls._walk import UnsupportedModelError, replace_module, visit_blocks


class ChangeOfBasis(nn.Module):
    """The norm in front of a sublayer, and x -> x C on the skip connection beside that sublayer.

    Args:
        norm: it sees the stream x [..., hidden] on its way to the sublayer.
        C: [hidden, hidden] orthogonal, from the basis in front of the sublayer to the one behind it.
    With `bits` set, x is rounded per token, asymmetrically, before it is multiplied.
    """

    def __init__(self, norm: nn.Module, C: Tensor):
        super().__init__()
        self.norm, self.bits, self._stream = norm, None, None
        self.register_buffer("C", C)

    def forward(self, x: Tensor) -> Tensor:
        self._stream = x
        return self.norm(x)

    def after(self, y: Tensor) -> Tensor:
        """What the sublayer has to write, so that adding the stream gives x C + y."""
        x, self._stream = self._stream, None
        return y + ((x if self.bits is None else clipped_fake_quant(x, self.bits)) @ self.C - x)


@torch.no_grad()
def rotate_sublayers(model: nn.Module, bases: Sequence[Tensor]) -> None:
    """Give every sublayer its own basis of the residual stream, in place; `fuse_norms` comes first.

    Args:
        bases: [hidden, hidden] orthogonal each: what the first attention reads, the first MLP, ..., the last MLP and
            the head. Where two in a row are the same tensor, nothing changes between them.
    Raises: UnsupportedModelError where attention and MLP share a norm, or a norm follows a sublayer (Gemma 2).
    """
    ends = stream_ends(model)
    for reader, basis in (*((embedding, bases[0]) for embedding in ends.embeddings), (ends.head, bases[-1])):
        with visit(reader):
            turn_reader(reader, basis.double())
    for index, parts in enumerate(map(anatomy, visit_blocks(model))):
        if parts.mlp_norm is None or post_norms(parts):
            raise UnsupportedModelError(
                f"{type(parts.block).__name__} does not have one norm in front of each sublayer and none behind it; "
                "its sublayers cannot read bases of their own"
            )
        names = {id(module): name for name, module in parts.block.named_modules()}
        sublayers = ((parts.attn_norm, parts.qkv, parts.o), (parts.mlp_norm, parts.ups, parts.down))
        for turn, (norm, readers, writer) in enumerate(sublayers, 2 * index):
            before, behind = bases[turn].double(), bases[turn + 1].double()
            for linear in readers:
                turn_reader(linear, before)
            turn_writer(writer, behind)
            if bases[turn] is not bases[turn + 1]:
                change = ChangeOfBasis(norm, (before.T @ behind).to(writer.weight))
                replace_module(parts.block, names[id(norm)], change)
                transform_output(parts.block, writer, change.after)
