"""One decoder block of MobileQuant: scales between operators and clipped ranges of weights, to be learned.

MobileQuant, arXiv:2408.13933v1. `cfg` is the method's Config: what it says about weights and scales counts here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from requant.reference_impls._anatomy import anatomy, gain_offset
from requant.reference_impls._equivalence import folded, sites
from requant.reference_impls._folded import Folded, query_key
from requant.reference_impls._straight_through import ClippingStrengths
from requant.reference_impls._walk import Block, named_linears
from requant.reference_impls.parts.mobilequant_ranges import StaticRange


class MobileBlock(nn.Module):
    """Scales and clipping learned for one block, all scales 1 at the start, and the block's tensors under them."""

    def __init__(self, block: Block, config, cfg):
        super().__init__()
        self.cfg, self.block = cfg, block
        parts = anatomy(block.module)
        pair, places = query_key(parts, config, block.kwargs), sites(parts, config)
        self.pair = pair if pair is not None and pair.repeat == 1 else None
        places = [site for site in places if site.writer is not None and site.repeat == 1]
        self.sites = [site for site in places if cfg.scale_up or site.name != "up"]
        sizes = {site.name: site.linears[0].in_features for site in self.sites}
        sizes |= {} if self.pair is None else {"query_key": self.pair.k.out_features}
        self.scales = nn.ParameterDict({name: nn.Parameter(torch.ones(size)) for name, size in sizes.items()})
        per_tensor, linears = cfg.w_granularity == "per_tensor", named_linears(block.module).values()
        self.linears = [(linear, per_tensor and linear is not parts.down) for linear in linears]
        groups = [whole_or_rows(linear.weight, whole) for linear, whole in self.linears]
        self.clips = nn.ModuleList(ClippingStrengths(each, cfg.clip_init) for each in groups)
        norms = [norm for norm, _ in parts.norm_groups] if cfg.norm_weights else []
        self.norms = [(norm, gain_offset(norm)) for norm in norms]
        gains = [whole_or_rows(norm.weight + offset, True) for norm, offset in self.norms]
        self.norm_clips = nn.ModuleList(ClippingStrengths(each, cfg.clip_init) for each in gains)

    def transformed(self) -> Folded:
        """The block with its scales folded in (Sec. 3.2), unrounded."""
        return folded(self.block.module, self.sites, self.pair, self.scales, {}, self.cfg)

    def rounded(self) -> Folded:
        """`transformed` with rounded weights."""
        now = self.transformed()
        for (linear, per_tensor), clip in zip(self.linears, self.clips, strict=True):
            W = now[linear.weight]
            groups = clip.fake_quantize(whole_or_rows(W, per_tensor), self.cfg.w_bits, self.cfg.symmetric)
            now[linear.weight] = groups.reshape(W.shape)
        for (norm, offset), clip in zip(self.norms, self.norm_clips, strict=True):  # gains 1 + w too (Gemma)
            gains = whole_or_rows(now[norm.weight] + offset, True)
            gains = clip.fake_quantize(gains, self.cfg.wide_bits, self.cfg.symmetric)
            now[norm.weight] = gains.flatten() - offset
        return now

    def forward(self, x: Tensor) -> Tensor:
        return self.block.forward(x, self.rounded().tensors)

    def strengths(self) -> list[Tensor]:
        """What clips weights, of linears and of norms."""
        return [*self.clips.parameters(), *self.norm_clips.parameters()]

    def ranges(self) -> list[Tensor]:
        """Scales and offsets of the block's activations."""
        found = [module for module in self.block.module.modules() if isinstance(module, StaticRange)]
        return [p for module in found for p in (module.scale, module.offset)]


def whole_or_rows(W: Tensor, per_tensor: bool) -> Tensor:
    """[d_out, 1, d_in], one grid a row, or [1, 1, d_out * d_in]."""
    return W.reshape(1, 1, -1) if per_tensor else W[:, None]
