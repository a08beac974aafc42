"""SliM-LLM: GPTQ in which the least salient groups of a matrix lend one bit to the most salient ones.

Paper     Huang et al., ICML 2025, arXiv:2405.14917v2 (numbers below refer to v2)   Entry  papers/slim_llm.yaml
Scope     weights of nn.Linear in decoder blocks; activations, embeddings, norms and lm_head untouched
Deviates  the layer's bias takes part in the search (the released code leaves it out of one side); both ends of the
          search are tried, uniform widths and half the groups raised (the code tries neither, `both_ends`); the grid
          search sums the errors of all weights, because the code weighs its salient and its other part alike; the
          absolute 0.01 that the code adds to H is left out; scales, and the means of 1-bit groups, are rounded to
          float16, the precision they are stored in; where only H is known and no inputs (`pack_weight` alone), the rows
          of a factor of H stand in for them. SliM-LLM+ (`plus`) searches widths on what its own blocks give, in
          float32; a layer on its own has the ranges that learning starts from
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from requant.reference_impls import _mixed, _quant, gptq
from requant.reference_impls._clipping import MixedClippedWeight, learn_ranges
from requant.reference_impls._hessian import damped, inverse_cholesky
from requant.reference_impls._quant import QuantizationError, check_choices
from requant.reference_impls._walk import Block, check_calib, copy_model, named_linears, walk_blocks

TINY = {"w_bits": 3, "group_size": 16, "n_grid": 10}
OBJECTIVES = ("kl", "kl_original", "mse")


@dataclass(frozen=True)
class Config:
    """Defaults: 2 bits in groups of 128, Tables 1 and 8. "code" is the official repository @cfdf5ff."""

    w_bits: int = 2  # mean width N, Tables 1 and 8; also 3
    group_size: int = 128  # Table 1; 64 and 32 in Table 7
    damp_ratio: float = 0.01  # code, --percdamp
    block_size: int = 128  # code: columns per lazy batch
    allocation: bool = True  # salience-determined bit allocation; off: N bits everywhere
    objective: str = "kl"  # code: KL(quantized || original); "kl_original": the text's order; "mse": Table 6
    both_ends: bool = True  # the text; code: off
    calibration: bool = True  # salience-weighted quantizer calibration; off: min-max grids
    tau_range: float = 0.1  # code: factors of a group's range in [1 - tau_range, 1 + tau_range]
    n_grid: int = 100  # code: factors tried besides 1, half of them above and half below
    clip_norm: float = 2.4  # code: power of the errors
    plus: bool = False  # SliM-LLM+, Table 2: OmniQuant's learned clipping at these widths instead of GPTQ
    lwc_lr: float = 1e-2  # code, --lwc_lr of SliM-LLM+
    epochs: int = 50  # scripts of SliM-LLM+
    batch_size: int = 1  # code
    aug_loss: bool = False  # code, on in its scripts for LLaMA: second distance, as OmniQuant's
    clip_init: float = 4.0  # code: logit, 0.982 of the range


def _check(cfg: Config) -> None:
    check_choices(cfg, objective=OBJECTIVES)
    if cfg.w_bits < 2:
        raise QuantizationError(f"w_bits {cfg.w_bits} leaves nothing to lend; choose 2 or more")


# --- grids


def choose_qparams(x: Tensor, bits: int, cfg: Config, *, calibrate: bool) -> tuple[Tensor, Tensor]:
    """The grid of each last-dimension slice of x [..., n]: scale and zero point, [..., 1] each.

    One bit stands for mean + or - mean |x| (code), which makes the zero point a fraction. Wider codes have a min-max
    grid; calibrate: its range times the factor near 1 that rounds x best.
    """
    if bits == 1:
        scale = _quant.stored_scale(2 * x.abs().mean(-1, keepdim=True), bits)
        return scale, (0.5 - x.mean(-1, keepdim=True) / scale).half().float()
    top = 2**bits - 1
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    step = torch.where(high == low, 2.0, high - low) / top
    zero = (-low / step).round()
    best_scale = _quant.stored_scale(step, 8)
    if not calibrate:
        return best_scale, zero
    best, q, x = torch.full_like(step, torch.inf), torch.empty_like(x), x.contiguous()
    factors = 1 + torch.linspace(-cfg.tau_range, cfg.tau_range, cfg.n_grid // 2 * 2 + 1)
    for factor in sorted(factors.tolist(), key=lambda f: abs(f - 1)):  # ties go to the factor next to 1
        scale = _quant.stored_scale(factor * step, 8)
        torch.div(x, scale, out=q).add_(zero).round_().clamp_(0, top).sub_(zero).mul_(scale).sub_(x)
        error = _quant.power_(q.abs_(), cfg.clip_norm).sum(-1, keepdim=True)
        better = error < best
        best, best_scale = torch.where(better, error, best), torch.where(better, scale, best_scale)
    return best_scale, zero


def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    return (x / scale + zero_point).round().clamp(0, 2**bits - 1)


def _fake_quant(W: Tensor, bits: int, cfg: Config) -> Tensor:
    x = _quant.grouped(W, cfg.group_size)
    scale, zero = choose_qparams(x, bits, cfg, calibrate=False)
    return _quant.dequantize(_quantize(x, scale, zero, bits), scale, zero).flatten(1)


# --- widths


def group_salience(W: Tensor, H: Tensor, cfg: Config) -> Tensor:
    """Sum of w_ij^2 / U_jj^2 over each group of inputs and all rows, U the Cholesky factor of H^-1: [n_groups]."""
    U = inverse_cholesky(damped(H, cfg.damp_ratio))
    return _quant.grouped((W / U.diagonal()).square(), cfg.group_size).sum((0, 2))


def divergence_from(target: Tensor, objective: str) -> Callable[[Tensor], float]:
    """Sum over tokens of the divergence from target [n_tokens, d_out]; probabilities are at least 1e-6 (code)."""
    if objective == "mse":
        return lambda output: float((output - target).square().sum())
    original = target.softmax(-1).clamp_(min=1e-6)
    log_original = original.log()

    def divergence(output: Tensor) -> float:
        p = output.softmax(-1).clamp_(min=1e-6)
        if objective == "kl":
            return float(p.log().sub_(log_original).mul_(p).sum())
        return float((log_original - p.log_()).mul_(original).sum())

    return divergence


class Search:
    """How many groups to lower and raise in one linear, judged by its outputs (salience-determined bit allocation).

    Attributes:
        order: groups by salience, least first, [n_groups].
        counts: the numbers of groups lowered, and raised, that are tried.
        total: [n_counts] divergence from the original outputs, summed over the tokens seen.
    """

    def __init__(self, W: Tensor, salience: Tensor, cfg: Config, bias: Tensor | None = None):
        half = len(salience) // 2
        self.cfg, self.W, self.bias = cfg, W, bias
        self.order = salience.argsort(stable=True)
        self.counts = list(range(half + 1) if cfg.both_ends or half < 2 else range(1, half))
        self.total = torch.zeros(len(self.counts), dtype=torch.float64)
        if len(self.counts) > 1:
            N = cfg.w_bits
            self.mid, low, high = (_fake_quant(W, bits, cfg) for bits in (N, N - 1, N + 1))
            self.lowered, self.raised = low - self.mid, high - self.mid

    def see(self, X: Tensor) -> None:
        """Add the divergences on inputs X [n_tokens, d_in]; each count changes two groups of the one before it."""
        if len(self.counts) == 1:
            return
        size, G = self.cfg.group_size, len(self.order)
        target = torch.nn.functional.linear(X, self.W, self.bias)
        output = torch.nn.functional.linear(X, self.mid, self.bias)
        divergence = divergence_from(target, self.cfg.objective)
        for count in range(self.counts[-1] + 1):
            for rank, change in ((count - 1, self.lowered), (G - count, self.raised)) if count else ():
                begin = int(self.order[rank]) * size
                output.addmm_(X[:, begin : begin + size], change[:, begin : begin + size].T)
            if count >= self.counts[0]:
                self.total[count - self.counts[0]] += divergence(output)

    def widths(self) -> list[int]:
        """Bits of each group: N - 1 for the least salient, N + 1 for as many of the most salient, N for the rest."""
        count = self.counts[int(self.total.argmin())]
        widths = torch.full((len(self.order),), self.cfg.w_bits)
        widths[self.order[:count]] -= 1
        widths[self.order[len(self.order) - count :]] += 1
        return widths.tolist()


def choose_widths(W: Tensor, H: Tensor, cfg: Config, X: Tensor | None = None) -> list[int]:
    """Bits of each group of a linear with inputs X [n_tokens, d_in]; without X, rows of a factor of H stand for it."""
    _check(cfg)
    if not cfg.allocation:
        return [cfg.w_bits] * _quant.grouped(W, cfg.group_size).shape[1]
    search = Search(W, group_salience(W, H, cfg), cfg)
    search.see(torch.linalg.cholesky(damped(H, cfg.damp_ratio)).T * len(H) ** 0.5 if X is None else X)
    return search.widths()


# --- one linear


def pack_weight(W: Tensor, H: Tensor, cfg: Config, widths: list[int] | None = None) -> dict[str, Tensor]:
    """The tensors stored for one layer; widths: bits of each group, None: `choose_widths`.

    Zero points are as wide as their codes; at a mean of 2 bits, where 1-bit groups have fractions, all are float16.
    """
    _check(cfg)
    widths = choose_widths(W, H, cfg) if widths is None else widths
    if cfg.plus:
        codes, scale, zero = MixedClippedWeight(W, widths, cfg.group_size, cfg.clip_init).stored(W)
    else:
        how = gptq.Config(cfg.w_bits, cfg.group_size, damp_ratio=cfg.damp_ratio, block_size=cfg.block_size)

        def choose(x: Tensor, bits: int, _symmetric: bool) -> tuple[Tensor, Tensor]:
            return choose_qparams(x, bits, cfg, calibrate=cfg.calibration)

        rounded = gptq.round_columns(W, H, how, choose, quantize=_quantize, widths=widths)
        codes = _quant.grouped(rounded.codes.T, cfg.group_size)
        scale, zero = rounded.scale.T[..., None], rounded.zero_point.T[..., None]
    packed = _mixed.pack_groups(codes, scale, zero.floor(), torch.tensor(widths)[:, None], _choices(cfg))
    if cfg.w_bits > 2:
        return packed
    return {key: t for key, t in packed.items() if "zero" not in key} | {"zero_point": zero.half()}


def _choices(cfg: Config) -> tuple[int, ...]:
    return (cfg.w_bits - 1, cfg.w_bits, cfg.w_bits + 1)


def unpack_weight(packed: dict[str, Tensor], cfg: Config) -> Tensor:
    """Inverse of `pack_weight`: float32 [d_out, d_in]."""
    if cfg.w_bits > 2:
        return _mixed.unpack_groups(packed, _choices(cfg))
    shape = tuple(packed["shape"].tolist())
    widths = _mixed.unpack_widths(packed["widths"], _choices(cfg), (shape[1], 1))
    codes = _mixed.unpack_codes(packed, widths, _choices(cfg), shape).float()
    return _quant.dequantize(codes, packed["scale"].float(), packed["zero_point"].float()).flatten(1)


def quantize_weight(W: Tensor, H: Tensor, cfg: Config, widths: list[int] | None = None) -> Tensor:
    """The dequantized weight, float32 [d_out, d_in]; arguments as for `pack_weight`."""
    return unpack_weight(pack_weight(W, H, cfg, widths), cfg)


def bits_per_weight(d_out: int, d_in: int, cfg: Config) -> float:
    """N + (16 + N)/g and 2 bits a group for its width; 16 + 16 instead of 16 + N where N is 2 (`pack_weight`)."""
    bits = _mixed.group_bits(cfg.w_bits, cfg.group_size, d_out, _choices(cfg))
    return bits + ((16 - cfg.w_bits) / cfg.group_size if cfg.w_bits == 2 else 0)


# --- a model


def search_block(block: Block, hessians: dict[str, Tensor], cfg: Config) -> dict[str, list[int]]:
    linears, searches = named_linears(block.module), {}
    for name, linear in linears.items():
        W, bias = linear.weight.float(), None if linear.bias is None else linear.bias.float()
        searches[name] = Search(W, group_salience(W, hessians[name], cfg), cfg, bias)
    block.observe(linears, lambda name, X: searches[name].see(X.float()))
    return {name: search.widths() for name, search in searches.items()}


@torch.no_grad()
def quantize(model: nn.Module, calib: Tensor | None, cfg: Config) -> nn.Module:
    """Quantize block by block, each on the outputs of the quantized blocks before it: widths first, then GPTQ.

    With `plus` ranges are learned in the place of GPTQ, on the block's output error.
    """
    check_calib(calib)
    _check(cfg)
    model = copy_model(model)
    for block in walk_blocks(model, calib, propagate="both" if cfg.plus else "quantized"):
        hessians = block.hessians()
        widths = search_block(block, hessians, cfg) if cfg.allocation else {}
        if cfg.plus:
            learn_block(block, widths, cfg)
            continue
        for name, linear in named_linears(block.module).items():
            linear.weight.copy_(quantize_weight(linear.weight.float(), hessians[name], cfg, widths.get(name)))
    return model


def learn_block(block: Block, widths: dict[str, list[int]], cfg: Config) -> list[float]:
    """SliM-LLM+ on one block, in place: learned clipping of groups with these widths (default: N), then rounding."""
    quantizers = {}
    for name, linear in named_linears(block.module).items():
        uniform = [cfg.w_bits] * (linear.in_features // cfg.group_size)
        W, own = linear.weight.float(), widths.get(name, uniform)
        quantizers[name] = MixedClippedWeight(W, own, cfg.group_size, cfg.clip_init)
    how = {"lr": cfg.lwc_lr, "epochs": cfg.epochs, "batch_size": cfg.batch_size}
    return learn_ranges(block, quantizers, **how, second_targets=block.run() if cfg.aug_loss else None)
