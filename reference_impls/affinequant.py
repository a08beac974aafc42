"""AffineQuant: OmniQuant's learned scales widened to invertible matrices, opened from the diagonal outwards.

Paper     Ma et al., ICLR 2024, arXiv:2403.12544v1 (numbers below refer to v1)   Entry  papers/affinequant.yaml
Scope     weights of nn.Linear in decoder blocks; with a_bits their inputs and, in attention, q, k and v; embeddings,
          norms, biases, softmax outputs and lm_head untouched
Deviates  as OmniQuant here (see its module): float32, ranges that contain zero, float16 scales, initial scales from the
          magnitudes of all readers (the code: from signed maxima of q_proj and up_proj); shifts only where norm and
          linears have biases unless add_biases is set, which is the code; with grouped queries a group shares its
          matrix; no query-key matrix where the projection is fused or a norm follows it, nor under rotary
          embedding unless rotary_query_key is set, which is the code and no equivalence
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from requant.reference_impls import omniquant
from requant.reference_impls._equivalence import Site, add_missing_biases
from requant.reference_impls._folded import Folded
from requant.reference_impls._learn import floored
from requant.reference_impls._rotation import Rotation
from requant.reference_impls._walk import Block, replace_module

ERROR_FLOOR = omniquant.ERROR_FLOOR
TINY = {"epochs": 2, "batch_size": 8}


@dataclass(frozen=True)
class Config:
    """Defaults: W4A4 of Tables 2 and 3 with the settings of the scripts; weight-only runs set norm_matrix."""

    w_bits: int = 4  # Tables 2 and 3
    a_bits: int | None = 4  # Tables 2 and 3; None = not rounded, Table 1
    group_size: int | None = None  # Table 3: None = whole row; 128 in Table 1
    symmetric: bool = False  # code, --symmetric off
    norm_matrix: bool = False  # code, --use_ln_matrix: full matrices behind norms, for weight-only runs
    head_matrix: bool = True  # code, --use_matrix: a matrix a head for q and k; off in weight-only runs
    rotary_query_key: bool = False  # code: True, transforms q and k before rotary embedding
    add_biases: bool = False  # code: True, LLaMA's norms and linears get biases, whose shifts start at zero
    gradual: bool = True  # Sec. 3.3, Eq. 6: the mask opens epoch by epoch
    stability: float = 0.1  # scripts, --sf, W4A4 and OPT; 1e-2 for LLaMA weight-only (Sec. 3.3: alpha)
    lwc: bool = True  # code, --lwc: OmniQuant's clipping
    let: bool = True  # code, --let: transforms at all
    lwc_lr: float = 1e-2  # code, --lwc_lr
    let_lr: float = 5e-3  # code, --let_lr; 1e-3 for LLaMA-2 at W4A4
    epochs: int = 20  # code, --epochs; 40 at 2 bits
    batch_size: int = 1  # code, --batch_size
    weight_decay: float = 0.0  # code, --wd
    clip_init: float = 4.0  # code: logit, 0.982 of the range
    alpha: float = 0.5  # code, --alpha: the diagonal starts as in SmoothQuant; 0.75 for LLaMA-2-7B at W4A4
    all_readers: bool = True  # as OmniQuant here; the code: the weights of q and of up alone (False)
    min_scale: float = 1e-2  # code: smaller entries (but for zeros) are pushed to it
    aug_loss: bool = False  # code, --aug_loss
    tie_rotary: bool = False  # of OmniQuant's diagonal query-key scale, if rotary_query_key


def gradual_mask(size: int, epoch: int, cfg: Config) -> Tensor:
    """Eq. 6: 1 on the diagonal, the stability factor in a band around it that covers all in the last epoch."""
    steps = cfg.epochs - 1
    band = int((size - 1) / steps * epoch) + 1 if cfg.gradual and steps > 0 else size
    index = torch.arange(size)
    distance = (index[:, None] - index).abs()
    return torch.where(distance < band, cfg.stability, 0.0).fill_diagonal_(1.0)


class AffineLearner(omniquant.BlockLearner):
    """OmniQuant's learner with matrices in the place of some scales: [d, d] behind norms, [n_heads, d, d] for heads."""

    weight_only_shifts = True

    def __init__(self, model: nn.Module, block: Block, cfg: Config):
        bare = add_missing_biases(block.module, model.config) if cfg.let and cfg.add_biases else []
        super().__init__(model, block, cfg)
        for name in bare:
            self.shifts[name].data.zero_()
        self.inverses: dict[str, Rotation] = {}
        names = {id(module): name for name, module in block.module.named_modules()}
        for site in self.sites:
            s = self.scales[site.name].detach()
            if site.rows is not None:
                self.scales[site.name] = nn.Parameter(s.view(-1, site.head_dim).diag_embed())
            elif cfg.norm_matrix:
                self.scales[site.name] = nn.Parameter(s.diag())
                self.inverses[site.name] = Rotation(torch.eye(len(s)))
                replace_module(
                    block.module, names[id(site.writer)], nn.Sequential(site.writer, self.inverses[site.name])
                )
        if self.pair is not None and self.pair.rotary_dim and not cfg.rotary_query_key:
            self.pair = None
            del self.scales["query_key"]
        if self.pair is not None and cfg.head_matrix:
            heads = self.scales["query_key"].detach().view(-1, self.pair.head_dim)
            self.scales["query_key"] = nn.Parameter(heads.diag_embed())

    def matrix(self, name: str) -> Tensor:
        """A* of Eq. 7: the learned matrix times the mask of the present epoch, elementwise."""
        A = floored(self.scales[name], self.cfg.min_scale)
        return A * gradual_mask(A.shape[-1], self.epoch, self.cfg)

    def transformed(self) -> Folded:
        """The block with all transforms folded in, unrounded; behind a norm with a matrix its inverse runs (Eq. 3)."""
        now = Folded(self.block.module)
        for site in self.sites:
            shift = self.shifts.get(site.name, None)
            if self.scales[site.name].ndim == 1:
                site.fold_into(now, floored(self.scales[site.name], self.cfg.min_scale), shift)
                continue
            A = self.matrix(site.name)
            if site.rows is None:
                now[self.inverses[site.name].Q] = torch.linalg.inv(A)
            if shift is not None:
                _subtract(now, site, shift)
            if site.rows is not None:
                _multiply_rows(now, site.writer, site.rows, torch.linalg.inv(A))
            _multiply_columns(now, site, A)
        if self.pair is None:
            return now
        if self.scales["query_key"].ndim == 1:
            self.pair.fold_into(now, floored(self.scales["query_key"], self.cfg.min_scale))
            return now
        A, (q, k) = self.matrix("query_key"), (self.pair.q, self.pair.k)
        inverse = torch.linalg.inv(A).repeat_interleave(self.pair.repeat, 0)
        _multiply_rows(now, q, torch.arange(q.out_features), inverse)
        _multiply_rows(now, k, torch.arange(k.out_features), A.mT)
        return now


def _subtract(now: Folded, site: Site, d: Tensor) -> None:
    """Take the shift d from what is written, and give it back in the readers' biases."""
    bias = now[site.writer.bias]
    now[site.writer.bias] = bias - d if site.rows is None else bias.index_add(0, site.rows, -d)
    for linear in site.linears:
        now[linear.bias] = now[linear.bias] + now[linear.weight] @ site.seen(d)


def _multiply_rows(now: Folded, linear: nn.Linear, rows: Tensor, M: Tensor) -> None:
    """Make these outputs y [n_heads * d] of a linear y M, head by head; M [n_heads, d, d]."""
    W, size = now[linear.weight], M.shape[-1]
    changed = (M.mT @ W[rows].unflatten(0, (-1, size))).flatten(0, 1)
    now[linear.weight] = W.index_copy(0, rows, changed)
    if linear.bias is not None:
        b = now[linear.bias]
        now[linear.bias] = b.index_copy(0, rows, (b[rows].view(-1, 1, size) @ M).flatten())


def _multiply_columns(now: Folded, site: Site, A: Tensor) -> None:
    """W A^T in all readers, for A [d, d] or, head by head, [n_kv_heads, d, d]."""
    for linear in site.linears:
        W = now[linear.weight]
        if A.ndim == 2:
            now[linear.weight] = W @ A.T
        else:
            columns = W.unflatten(1, (-1, 1, A.shape[-1]))  # [d_out, n_heads, 1, head_dim]
            now[linear.weight] = (columns @ A.repeat_interleave(site.repeat, 0).mT).flatten(1)


def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Learn matrices, shifts and clipping block after block (Eq. 4), fold, round, go on.

    Raises: UnsupportedModelError where norm outputs are not read by linears alone, and for a_bits where attention does
    not use transformers' interface.
    """
    return omniquant.learn_blocks(model, calib, cfg, AffineLearner)


# --- one layer, or all readers of a norm stacked --------------------------------------------------------------------


def quantize_weight(W: Tensor, H: Tensor | None, cfg: Config) -> Tensor:
    """Round a transformed weight [d_out, d_in] with learned clipping; see `omniquant.quantize_weight`."""
    return omniquant.quantize_weight(W, H, cfg)


def pack_weight(W: Tensor, H: Tensor | None, cfg: Config) -> dict[str, Tensor]:
    """Codes, scales, zero points; float16 as well: with norm_matrix the inverse (here of the identity) that must run,
    with add_biases the bias (here zero).
    """
    packed = omniquant.pack_weight(W, H, cfg)
    inverse = {"inverse": torch.eye(W.shape[1]).half()} if cfg.norm_matrix else {}
    return packed | inverse | ({"bias": torch.zeros(len(W)).half()} if cfg.let and cfg.add_biases else {})


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    return omniquant.unpack_weight(packed, cfg)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """b + (16 + b)/g, with norm_matrix 16 d_in / d_out, where d_out counts the rows of all readers of the norm, and
    with add_biases 16 / d_in.
    """
    inverse = 16 * d_in / d_out if cfg.norm_matrix else 0
    bias = 16 / d_in if cfg.let and cfg.add_biases else 0
    return omniquant.bits_per_weight(d_out, d_in, cfg) + inverse + bias
