"""Centres, scales and thresholds of a norm's output channels (Outlier Suppression+, arXiv:2304.09145v3, Sec. 4).

Where its official code @3ba97ae differs from the text, both ways are here; `cfg` is the method's Config.
"""

from __future__ import annotations

from torch import Tensor, aminmax


def shift_of(X: Tensor) -> Tensor:
    """z_j = (max X_j + min X_j) / 2 over all tokens of X [..., d_in] (code): [d_in]."""
    low, high = aminmax(X.flatten(0, -2), dim=0)
    return (high + low) / 2


def scale_of(X: Tensor, threshold: float, both_sides: bool = True) -> Tensor:
    """s_j = max(1, max X_j / t) of X [..., d_in], Eq. 8; both_sides: and min X_j / -t (code): [d_in].

    The two agree on centred channels.
    """
    low, high = aminmax(X.flatten(0, -2), dim=0)
    return ((high.maximum(-low) if both_sides else high) / threshold).clamp(min=1.0)


def thresholds(X: Tensor, cfg) -> list[float]:
    """Equal steps from max|X|, where every s_j is 1, down to lower_bound (code), or to max|X| / K (text)."""
    top = float(X.abs().max())
    n = cfg.n_grid if cfg.max_step is None else max(cfg.n_grid, int(float(X.max()) / cfg.max_step))
    if cfg.lower_bound is None:
        return [top * (n - i) / n for i in range(n)]
    return [top - (top - cfg.lower_bound) * i / n for i in range(n + 1)] if top > cfg.lower_bound else [top]
