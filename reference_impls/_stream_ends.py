"""What meets the residual stream outside the decoder blocks: embeddings, final norm, head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from requant.reference_impls._residence import visit
from requant.reference_impls._walk import UnsupportedModelError, decoder_blocks

_FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f")


@dataclass(frozen=True)
class Ends:
    """What meets the residual stream outside the blocks."""

    embeddings: list[nn.Embedding]
    final_norm: nn.Module
    head: nn.Linear


def stream_ends(model: nn.Module) -> Ends:
    """Embeddings, final norm and head.

    Raises: UnsupportedModelError where the stream has other ends than these.
    """
    blocks = decoder_blocks(model)
    stack = next(module for module in model.modules() if any(child is blocks for child in module.children()))
    children = dict(stack.named_children())
    final_norm = next((children[name] for name in _FINAL_NORMS if name in children), None)
    head = model.get_output_embeddings()
    if final_norm is None or not isinstance(head, nn.Linear):
        raise UnsupportedModelError(
            f"{type(model).__name__} lacks a final norm or a linear head; its stream cannot be rotated"
        )
    embeddings = [child for child in children.values() if isinstance(child, nn.Embedding)]
    if len({embedding.embedding_dim for embedding in embeddings} | {head.in_features}) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} projects between embeddings and blocks (OPT-350M does)"
        )
    return Ends(embeddings, final_norm, head)


def untie_head(model: nn.Module) -> None:
    """Give lm_head a weight of its own where it shares the embedding's: after fusion they differ."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        with visit(head):
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
