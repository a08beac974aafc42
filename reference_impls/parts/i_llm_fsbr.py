"""Fully-Smooth Block-Reconstruction (I-LLM, arXiv:2405.17849v2): factors between all operators of a block, learned.

`cfg` is i_llm.Config, or whatever else has its fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from requant.reference_impls._activation import QuantInput, SmoothedSiLU, one_each
from requant.reference_impls._anatomy import anatomy
from requant.reference_impls._equivalence import channel_ranges, sites
from requant.reference_impls._folded import Folded, query_key
from requant.reference_impls._learn import descend, floored
from requant.reference_impls._straight_through import ClippingStrengths, affine_ste, token_ste
from requant.reference_impls._walk import Block, replace_module
from requant.reference_impls.smoothquant import smoothing_factors

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
_SMALLEST = 0.01  # code: factors are pushed away from 0 to this


class Smoothing(nn.Module):
    """The learned factors, shifts and clipping strengths of one block, and what the block becomes with them.

    A gated block gets a SmoothedSiLU, and with `quantizers` those of the code stand at every place it has them. Shifts
    are learned where norm and linears have biases, which is OPT (code).
    """

    def __init__(self, block: Block, config, peaks: Mapping[nn.Linear, Tensor], cfg, quantizers: bool = True):
        super().__init__()
        self.cfg, self.parts = cfg, anatomy(block.module)
        self.block = (block,)  # a tuple, so that its parameters are not taken for learned ones
        roles = {role: getattr(self.parts, role) for role in ROLES}
        self.linears = {role: linear for role, linear in roles.items() if linear is not None}
        self.sites = {site.name: site for site in sites(self.parts, config)}
        self.query_key = query_key(self.parts, config, block.kwargs)
        factors = {"qk": torch.ones(self.parts.k.out_features)}
        if self.parts.gated:
            factors["act"] = torch.ones(self.parts.up.out_features)
        for name, site in self.sites.items():
            reader = site.linears[-1 if name == "mlp_norm" else 0]  # code: q, up, o, down
            s = smoothing_factors(peaks[reader].clamp(min=1e-5), [reader.weight], cfg.alpha)
            factors[name] = s.view(-1, site.repeat, site.head_dim)[:, 0].flatten() if site.repeat > 1 else s
        partial_sites = {"attn_norm", "mlp_norm", "value"}
        used = {"full": set(factors), "partial": partial_sites, "none": set()}[cfg.smoothing]
        self.factors = nn.ParameterDict()
        for name, s in factors.items():
            s = s if name in used else torch.ones_like(s)
            self.factors[name] = nn.Parameter(s.clone(), requires_grad=name in used)
        self.shifts = nn.ParameterDict()
        for name, site in self.sites.items():
            if name in used and site.can_learn_shift:
                self.shifts[name] = nn.Parameter(site.written(channel_ranges(block, site)[1]).clone())
        self.strengths = nn.ModuleDict(
            {name: ClippingStrengths(linear.weight) for name, linear in self.linears.items()}
        )
        self.push_away()
        self._wrap(quantizers)

    def _wrap(self, quantizers: bool) -> None:
        cfg, root, attn = self.cfg, self.block[0].module, self.parts.attn
        inner = partial(token_ste, bits=cfg.nonlinear_bits) if quantizers else nn.Identity()
        if self.parts.gated:
            self.act_fn = (SmoothedSiLU(self.parts.down.in_features, inner),)
            self.parts.mlp.act_fn = self.act_fn[0]
        if not quantizers:
            return
        names = {id(module): name for name, module in root.named_modules()}
        for role, linear in self.linears.items():
            after = inner if role == "up" and self.parts.gated else None
            before = partial(token_ste, bits=cfg.a_bits)
            replace_module(root, names[id(linear)], QuantInput(linear, before, after))
        widths = (cfg.a_bits, cfg.kv_bits, cfg.kv_bits)
        attn.requant_transform = one_each(*(partial(token_ste, bits=bits) for bits in widths))

    @torch.no_grad()
    def push_away(self) -> None:
        """Keep every factor at least 0.01 from 0 (code)."""
        for s in self.factors.values():
            floored(s, _SMALLEST)

    def smoothed(self) -> Folded:
        """The block's parameters with factors and shifts folded in: the same function, differentiable in them."""
        now, f = Folded(self.block[0].module), self.factors
        for name, site in self.sites.items():
            site.fold_into(now, f[name], self.shifts.get(name, None))
        self.query_key.fold_into(now, self.query_key.tie(f["qk"]) if self.cfg.tie_rotary else f["qk"])
        if self.parts.gated:
            every = torch.arange(self.parts.up.out_features)
            now.scale_rows(self.parts.gate, every, 1 / f["act"])
            now.scale_rows(self.parts.up, every, f["act"])
            now[self.act_fn[0].a] = f["act"]
        return now

    def rounded(self) -> Mapping[str, Tensor]:
        """The same with weights fake-quantized at the present clipping; what `Block.forward` takes."""
        now = self.smoothed()
        for role, linear in self.linears.items():
            W = now[linear.weight]
            now[linear.weight] = affine_ste(
                W, *self.strengths[role].grid(W, self.cfg.w_bits), self.cfg.w_bits
            )
        return now.tensors

    def train_block(self, generator: torch.Generator) -> None:
        """AdamW on the block's output error; ends with the epoch of the lowest mean loss (code)."""
        block, cfg = self.block[0], self.cfg
        X, Y = torch.cat(block.inputs), torch.cat(block.targets)
        factors = [s for s in (*self.factors.values(), *self.shifts.values()) if s.requires_grad]
        groups = [{"params": list(self.strengths.parameters()), "lr": cfg.lwc_lr}]
        groups += [{"params": factors, "lr": cfg.let_lr}] if factors else []
        optimizer, best, state = torch.optim.AdamW(groups, weight_decay=0.0), float("inf"), None

        def loss(chosen: Tensor) -> Tensor:
            return (block.forward(X[chosen], self.rounded()) - Y[chosen]).square().mean()

        for _ in range(cfg.n_epochs):
            batches = torch.randperm(len(X), generator=generator).split(cfg.batch_size)
            losses = descend(loss, optimizer, batches, project=self.push_away)
            mean = sum(losses) / len(losses)
            if mean < best:
                best, state = mean, {key: value.clone() for key, value in self.state_dict().items()}
        if state is not None:
            self.load_state_dict(state)
