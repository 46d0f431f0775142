"""What turns Q·K into weights: the steps that the plain and the split path share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .shapes import Floats


@dataclass(frozen=True, eq=False)
class AttentionParams:
    """s = scale Q·K; softcap tanh(s / softcap); + slope · mask.

    softcap and max_alibi_bias: 0 is off. sinks [n_head] or None: raw logits, unscaled and
    uncapped, that join each head's softmax once and add nothing to the output.
    """

    scale: float
    softcap: float = 0.0
    max_alibi_bias: float = 0.0
    sinks: Floats | None = None  # [n_head]


def grouped_sinks(sinks: Floats | None, n_head_kv: int, group: int, dtype: np.dtype[Any]) -> Floats:
    """Sinks [n_head] -> [n_head_kv, group]; without any -inf, whose exp adds nothing to a sum."""
    if sinks is None:
        return np.full((n_head_kv, group), -np.inf, dtype)  # [n_head_kv, group]
    return sinks.astype(dtype).reshape(n_head_kv, group)  # [n_head_kv, group]


def soft_cap(scores: Floats, softcap: float) -> None:
    """cap · tanh(s / cap), in place; the shape stays."""
    if softcap <= 0:
        return
    scores /= scores.dtype.type(softcap)
    np.tanh(scores, out=scores)
    scores *= scores.dtype.type(softcap)


def top_scores(scores: Floats, axis: int, sinks: Floats) -> Floats:
    """The maximum to subtract, without `axis`; sinks broadcast to that.

    Finite also where nothing is visible, since -inf - -inf is nan.
    """
    visible = np.max(scores, axis=axis, initial=np.finfo(scores.dtype).min)
    top: Floats = np.maximum(visible, sinks)  # shape of scores, without axis
    return top


def divide(summed: Floats, total: Floats) -> Floats:
    """summed [..., head_dim_v] / total [...]; zeros where the total is 0."""
    divisor = np.where(total == 0, total.dtype.type(1), total)  # [...]
    return summed / divisor[..., None]  # [..., head_dim_v]
