"""OmniQuant: learn how far to clip weight ranges, and which scales and shifts to move into weights, block by block.

Paper     Shao et al., ICLR 2024, arXiv:2308.13137v3 (numbers below refer to v3)   Entry  papers/omniquant.yaml
Scope     weights of nn.Linear in decoder blocks; with a_bits their inputs and, in attention, q, k and v; embeddings,
          norms, biases, softmax outputs and lm_head untouched
Deviates  float32 instead of automatic mixed precision; ranges always contain zero; gradients also reach the zero point
          (the official code cuts them there); finished scales are rounded to float16 and zero points follow; shifts
          wherever norm and linears have biases and activations are rounded (the code: for OPT); with grouped queries a
          group shares its scales (the code learns none); no query-key scale where the projection is fused or a norm
          follows it; under rotary embedding the two channels of a pair are tied unless tie_rotary is off
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from requant.reference_impls import _quant
from requant.reference_impls._activation import transform_attention, wrap_linears
from requant.reference_impls._anatomy import anatomy, require_pre_norm
from requant.reference_impls._calib import check_calib
from requant.reference_impls._equivalence import Site, channel_ranges, folded, sites
from requant.reference_impls._folded import Folded, query_key
from requant.reference_impls._learn import descend, reconstruct
from requant.reference_impls._straight_through import ClippingStrengths, token_ste
from requant.reference_impls._walk import Block, copy_model, named_linears, walk_blocks
from requant.reference_impls.smoothquant import smoothing_factors

ERROR_FLOOR = 0.01  # ranges start clipped to 0.982
TINY = {"epochs": 1, "batch_size": 8}
_LAYER_STEPS = 50  # of `quantize_weight`


@dataclass(frozen=True)
class Config:
    """Defaults: Sec. 4.1, W4A16."""

    w_bits: int = 4  # Table 1 (also 2 and 3); 4 and 6 with activations, Table 2
    a_bits: int | None = None  # None = not rounded (Table 1); 4, 6 in Table 2; also of q, k and v
    group_size: int | None = None  # Table 1: None = whole row; 64, 128
    symmetric: bool = False  # code, --symmetric off
    lwc: bool = True  # Sec. 3.2, learnable weight clipping
    let: bool = True  # Sec. 3.3; Sec. 4.1: off for LLaMA if only weights are rounded
    lwc_lr: float = 5e-3  # Sec. 4.1 (code and scripts: 1e-2)
    let_lr: float = 1e-2  # Sec. 4.1 (code and scripts: 5e-3)
    epochs: int = 20  # Sec. 4.1; 40 for W2A16
    batch_size: int = 1  # Sec. 4.1
    weight_decay: float = 0.0  # code, --wd
    clip_init: float = 4.0  # code: logit, 0.982 of the range
    alpha: float = 0.5  # code, --alpha: initial scales are SmoothQuant's; 0.75 in some W4A4 scripts
    all_readers: bool = (
        True  # SmoothQuant's Eq. 4; the code looks at the weights of q and of up alone (False)
    )
    min_scale: float = 1e-2  # code: scales below it in magnitude are pushed to it
    aug_loss: bool = False  # code, --aug_loss: second distance, from the original block on quantized inputs
    tie_rotary: bool = True  # Eq. 5 is an equivalence only then; the code leaves pairs free (False)


# --- learnable equivalent transformation (Sec. 3.3) -----------------------------------------------------------------


def initial_transform(block: Block, site: Site, cfg: Config) -> tuple[Tensor, Tensor]:
    """Scale and shift [channels written] of a site, from what its readers are fed in the original model.

    The scale is SmoothQuant's (its Eq. 4), the shift the running mean over samples of each channel's mid-range, as in
    Outlier Suppression+.
    """
    peak, middle = channel_ranges(block, site)
    readers = site.linears
    if not cfg.all_readers:
        readers = [readers[-1 if site.name == "mlp_norm" else 0]]
    scale = smoothing_factors(peak, [linear.weight for linear in readers], cfg.alpha)
    return site.written(scale), site.written(middle)


class BlockLearner(nn.Module):
    """The parameters learned for one block, and the block's tensors as functions of them."""

    weight_only_shifts = False

    def __init__(self, model: nn.Module, block: Block, cfg: Config):
        super().__init__()
        self.cfg, self.scales, self.shifts = cfg, nn.ParameterDict(), nn.ParameterDict()
        self.second = block.run() if cfg.aug_loss else None
        parts, module = anatomy(block.module), block.module
        self.sites, self.pair = [], None
        if cfg.let:
            self.sites = [site for site in sites(parts, model.config) if site.name != "up"]  # not before down
            self.pair = query_key(parts, model.config, block.kwargs)
            for site in self.sites:
                scale, shift = initial_transform(block, site, cfg)
                self.scales[site.name] = nn.Parameter(scale.clone())
                if site.can_learn_shift and (cfg.a_bits is not None or self.weight_only_shifts):
                    self.shifts[site.name] = nn.Parameter(shift.clone())
            if self.pair is not None:
                self.scales["query_key"] = nn.Parameter(torch.ones(self.pair.k.out_features))
        if cfg.a_bits is not None:
            wrap_linears(module, lambda x: token_ste(x, cfg.a_bits))
            transform_attention(model, parts.attn, lambda *qkv: tuple(token_ste(x, cfg.a_bits) for x in qkv))
        start = cfg.clip_init if cfg.lwc else math.inf  # sigmoid(inf) = 1: whole ranges
        self.linears: Mapping[str, nn.Linear] = named_linears(module)
        clips = {
            name: ClippingStrengths(_quant.grouped(linear.weight, cfg.group_size), start)
            for name, linear in self.linears.items()
        }
        self.clips = nn.ModuleDict({name.replace(".", "/"): clip for name, clip in clips.items()})
        self.block, self.epoch = block, 0

    def transformed(self) -> Folded:
        """The block with scales and shifts folded in (Eq. 3 and 5), unrounded."""
        return folded(self.block.module, self.sites, self.pair, self.scales, self.shifts, self.cfg)

    def rounded(self) -> Folded:
        """`transformed` with rounded weights (Eq. 2)."""
        now = self.transformed()
        for name, linear in self.linears.items():
            W = now[linear.weight]
            groups, clip = _quant.grouped(W, self.cfg.group_size), self.clips[name.replace(".", "/")]
            now[linear.weight] = clip.fake_quantize(groups, self.cfg.w_bits, self.cfg.symmetric).flatten(1)
        return now

    def learn(self) -> list[float]:
        """Minimise the block's output error (Eq. 1); returns the loss of each batch."""
        cfg = self.cfg
        scaling = [*self.scales.values(), *self.shifts.values()]
        clipping = list(self.clips.parameters()) if cfg.lwc else []
        groups = [{"params": scaling, "lr": cfg.let_lr}, {"params": clipping, "lr": cfg.lwc_lr}]
        groups = [group for group in groups if group["params"]]
        if not groups or not cfg.epochs:
            return []

        def tensors(epoch: int) -> dict[str, Tensor]:
            self.epoch = epoch
            return self.rounded().tensors

        optimizer = torch.optim.AdamW(groups, weight_decay=cfg.weight_decay)
        how = {"epochs": cfg.epochs, "batch_size": cfg.batch_size, "second_targets": self.second}
        return reconstruct(self.block, tensors, optimizer, **how)


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Algorithm 1: block after block, learn on outputs of quantized blocks, fold, round, go on.

    Raises: UnsupportedModelError for let where norm outputs are not read by linears alone, and for a_bits where
    attention does not use transformers' interface.
    """
    return learn_blocks(model, calib, cfg, BlockLearner)


def learn_blocks(
    model: nn.Module, calib: Tensor | None, cfg: Config, learner: type[BlockLearner]
) -> nn.Module:
    """The walk behind `quantize`, with the given kind of learner."""
    check_calib(calib)
    if cfg.let:
        require_pre_norm(model)
    model = copy_model(model)
    for block in walk_blocks(model, calib, propagate="both"):
        with torch.no_grad():
            learned = learner(model, block, cfg)
        learned.learn()
        with torch.no_grad():
            learned.rounded().write()
    return model


# --- one layer ------------------------------------------------------------------------------------------------------


def learn_clipping(W: Tensor, H: Tensor | None, cfg: Config) -> ClippingStrengths:
    """LWC for one layer alone: the loss is the error of its output, tr((Q - W) H (Q - W)^T)."""
    groups = _quant.grouped(W, cfg.group_size)
    clip = ClippingStrengths(groups, cfg.clip_init if cfg.lwc else math.inf)
    if not cfg.lwc or H is None:
        return clip
    size = (W @ H * W).sum()

    def loss(_step: int) -> Tensor:
        E = clip.fake_quantize(groups, cfg.w_bits, cfg.symmetric).flatten(1) - W
        return (E @ H * E).sum() / size

    optimizer = torch.optim.AdamW(clip.parameters(), cfg.lwc_lr, weight_decay=cfg.weight_decay)
    descend(loss, optimizer, range(_LAYER_STEPS), keep_best=True)
    return clip


def pack_weight(W: Tensor, H: Tensor | None, cfg: Config) -> dict[str, Tensor]:
    """The tensors stored for one layer; what was learned is in the scales and zero points, or in W itself."""
    groups = _quant.grouped(W, cfg.group_size)
    scale, zero_point = learn_clipping(W, H, cfg).stored_grid(groups, cfg.w_bits, cfg.symmetric)
    codes = _quant.quantize(groups, scale, zero_point, cfg.w_bits)
    return _quant.pack_affine(codes, scale, zero_point, cfg.w_bits, cfg.symmetric)


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    return _quant.unpack_affine(packed, cfg.w_bits, cfg.symmetric)


@torch.no_grad()
def quantize_weight(W: Tensor, H: Tensor | None, cfg: Config) -> Tensor:
    """LWC on one layer [d_out, d_in] by its own output error (blocks learn all layers jointly), dequantized."""
    clip = learn_clipping(W, H, cfg)
    return clip.fake_quantize(_quant.grouped(W, cfg.group_size), cfg.w_bits, cfg.symmetric).flatten(1)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + (16 + b)/g: clipping, scales and shifts leave nothing behind."""
    return _quant.affine_bits(cfg.w_bits, cfg.group_size, d_in, cfg.symmetric)
