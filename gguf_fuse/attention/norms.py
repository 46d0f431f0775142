"""Norms of Q and K."""

from __future__ import annotations

import numpy as np

from .shapes import Floats


def rms_norm(x: Floats, weight: Floats | None, eps: float) -> Floats:
    """x / sqrt(mean(x²) + eps) · weight over the last axis (ggml, RMS_NORM then MUL).

    Per head: x [n_seqs, n_head, n_tokens, head_dim] with weight [head_dim] or [n_head, head_dim];
    whole row: x [n_seqs, n_tokens, rows] before `split_heads`, weight [rows]; weightless: None.
    Raises ValueError if the weight does not fit.
    """
    mean_square = np.mean(x * x, axis=-1, keepdims=True)  # [..., 1]
    y: Floats = x / np.sqrt(mean_square + x.dtype.type(eps))  # shape of x
    return y if weight is None else y * _norm_weight("weight", weight, x)


def layer_norm(x: Floats, weight: Floats | None, bias: Floats | None, eps: float) -> Floats:
    """(x - mean) / sqrt(variance + eps) · weight + bias over the last axis (ggml, NORM).

    Shapes of x, weight and bias as in `rms_norm`. Raises ValueError if one does not fit.
    """
    y = rms_norm(x - np.mean(x, axis=-1, keepdims=True), weight, eps)  # shape of x
    return y if bias is None else y + _norm_weight("bias", bias, x)


def _norm_weight(name: str, weight: Floats, x: Floats) -> Floats:
    """Weight [dim] as it is; one row per head [n_head, dim] as [n_head, 1, dim]."""
    if weight.shape == x.shape[-1:]:
        return weight
    if x.ndim == 4 and weight.shape == (x.shape[1], x.shape[3]):
        return weight[:, None, :]  # [n_head, 1, head_dim]: the same for every token
    per_head = f" or {(x.shape[1], x.shape[3])}" if x.ndim == 4 else ""
    raise ValueError(f"{name}: expected shape {x.shape[-1:]}{per_head}, got {weight.shape}")
