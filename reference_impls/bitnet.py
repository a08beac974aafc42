"""BitNet: a decoder trained from scratch with weights of plus or minus one number a matrix and 8-bit activations.

Paper     Wang et al., 2023, arXiv:2310.11453v1 (numbers below refer to v1)   Entry  papers/bitnet.yaml
Scope     every linear of the decoder blocks, weights and inputs, trained from new random weights: of the model that is
          passed in only the architecture is used (with embeddings="kept" also everything outside the blocks), and
          calib is the training text; embeddings, head, remaining norms, residuals, softmax and both attention
          products stay in float32
Deviates  activations are rounded, which Eq. 4 and 6 leave out, and clamped after rounding so that they fit int8. Eq. 6
          (range [0, Qb] in front of a non-linearity) is used for the input of the linear that feeds the activation
          function: fc1, or gate_proj in a gated MLP, not up_proj; its gamma is max(x - eta), because max|x| would clip
          about half of a normalised input, and eta is added back after rounding. Biases, where the architecture has
          them, stay in float32. The weight matrix of a linear is split for model parallelism as Megatron does it:
          o and down along their inputs, the others along their outputs (the text says "the partition dimension").
          Not stated in the paper, chosen here: Xavier initialisation, the LN epsilon, a linear decay to zero,
          decoupled weight decay on all parameters, tokens drawn without replacement until calib is used up. Full
          float32 instead of mixed precision. The elastic and BMT ablations of Table 4 are not implemented
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from requant.reference_impls._anatomy import block_anatomies
from requant.reference_impls._calib import check_calib
from requant.reference_impls._from_scratch import new_model, train
from requant.reference_impls._quant import QuantizationError, check_choices, pack_bits, unpack_bits
from requant.reference_impls._walk import UnsupportedModelError, named_linears, replace_module, require_whole
from requant.reference_impls.parts.bitnet_linear import BitLinear, binarize, in_groups, restore

TINY = {"updates": 6, "warmup": 2, "tokens_per_update": 256}  # what the conformance tests run


@dataclass(frozen=True)
class Config:
    """Defaults: the 125M model of Tables 5 and 6. Larger ones: learning_rate 1.2e-3 at 350M to 4e-4 at 30B."""

    linear: str = (
        "bit"  # Sec. 2.1; "full": baseline of Sec. 3; "post": that, binarized after training (Table 3)
    )
    norm: str = (
        "sub"  # Eq. 11: LN in each BitLinear, not in front of sublayers; "pre": the model's own (Table 4)
    )
    a_bits: int = 8  # Sec. 2.1
    shift: bool = True  # Eq. 6
    n_groups: int = 1  # Eq. 13 to 15: devices a matrix is split over
    learning_rate: float = 2.4e-3  # Tables 5 and 6: peak, at 125M
    updates: int = 40000  # Table 6
    warmup: int = 750  # Table 6, updates
    decay_power: float = 1.0  # Table 6: polynomial decay, power not stated
    tokens_per_update: int = 262144  # Table 6: 256K
    weight_decay: float = 0.01  # Table 6; 0.05 at 13B and 30B
    adam_betas: tuple[float, float] = (0.9, 0.98)  # Table 6
    depth: int | None = None  # not in the paper: number of blocks; None = as the model passed in
    embeddings: str = (
        "new"  # "kept", not in the paper: train the blocks alone, all else frozen as it is in the model
    )
    seed: int = 0  # initial weights and order of the text


# --- the model --------------------------------------------------------------------------------------------------


def _insert(model: nn.Module, cfg: Config, sub_norm: bool) -> list[BitLinear]:
    """Replace every linear of the decoder blocks, in place; sub_norm moves the norms of the blocks into them."""
    inserted = []
    for parts in block_anatomies(model):
        before_activation = parts.up if parts.gate is None else parts.gate
        for name, linear in named_linears(parts.block).items():
            bit = BitLinear(
                linear, cfg, norm=sub_norm, shift=cfg.shift and linear is before_activation,
                split_inputs=linear is parts.o or linear is parts.down,
            )  # fmt: skip
            replace_module(parts.block, name, bit)
            inserted.append(bit)
        for name, module in list(parts.block.named_modules()):
            if sub_norm and (module is parts.attn_norm or module is parts.mlp_norm):
                replace_module(parts.block, name, nn.Identity())
    return inserted


def _check(model: nn.Module, calib: Tensor | None, cfg: Config) -> None:
    check_calib(calib)
    require_whole(model, "bitnet")
    check_choices(cfg, linear=("bit", "full", "post"), norm=("sub", "pre"), embeddings=("new", "kept"))
    if not 0 <= cfg.warmup < cfg.updates:
        raise ValueError(f"warmup {cfg.warmup}, updates {cfg.updates}: need 0 <= warmup < updates")
    if calib.shape[1] < 2:
        raise QuantizationError("calib is the training text and needs at least 2 tokens a sample")
    if getattr(model.config, "do_layer_norm_before", True) is False:
        raise UnsupportedModelError(
            "this model normalises after each sublayer (OPT-350M does); SubLN has no place"
        )


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Train a model of this architecture from new weights on calib, and binarize it.

    Args:
        model: gives family, sizes and device; its weights are not used.
        calib: the training text, int64 [n_samples, seqlen]; a sample is a training sequence.
    Raises: ValueError for options out of range; QuantizationError if calib is missing or the groups do not fit;
        UnsupportedModelError where norms follow the sublayers.
    """
    _check(model, calib, cfg)
    trained = new_model(model, cfg)
    bits = _insert(trained, cfg, sub_norm=cfg.norm == "sub") if cfg.linear == "bit" else []
    for bit in bits:
        bit.train()  # the rest stays in eval mode: no dropout
    train(trained, calib, cfg)
    if cfg.linear == "post":
        bits = _insert(trained, cfg, sub_norm=False)
    for bit in bits:
        bit.freeze()
    return trained.eval().requires_grad_(False).to(model.dtype)


# --- one matrix -------------------------------------------------------------------------------------------------


def quantize_weight(W: Tensor, H: Tensor | None, cfg: Config) -> Tensor:
    """The binarized weight, float32 [d_out, d_in]; H is not used, groups are groups of rows."""
    return restore(*binarize(W.float(), cfg.n_groups), 0)


def pack_weight(W: Tensor, H: Tensor | None, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer: a bit a weight and one float32 scale a group (or matrix)."""
    positive, beta = binarize(W.float(), cfg.n_groups)
    return {
        "shape": torch.tensor(W.shape, dtype=torch.int32),
        "codes": pack_bits(positive, 1),
        "scale": beta.flatten(),
    }


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    shape = tuple(packed["shape"].tolist())
    positive = in_groups(unpack_bits(packed["codes"], 1, shape).bool(), cfg.n_groups, 0)
    return restore(positive, packed["scale"].reshape(-1, 1, 1), 0)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """1, and 32 bits for every scale."""
    return (8 * -(-d_out * d_in // 8) + 32 * cfg.n_groups) / (d_out * d_in)
