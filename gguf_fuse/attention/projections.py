"""From a hidden state to rows of Q, K and V, and from rows to heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from .shapes import Floats, expect_shape

Rows: TypeAlias = tuple[int, int, int]  # of Q, K and V


@dataclass(frozen=True, eq=False)
class Linear:
    """A projection: weight [rows, n_embd], one scale or None, bias [rows] or None."""

    weight: Floats  # [rows, n_embd]
    scale: float | None = None
    bias: Floats | None = None  # [rows]

    def project(self, x: Floats, clamp: float = 0.0) -> Floats:
        """x [..., n_embd] -> [..., rows].

        The order is llama.cpp's (llama-graph.cpp, build_lora_mm and build_qkv): matmul, times
        scale, plus bias, then clamped to ±clamp if clamp > 0. Raises ValueError if the shapes do
        not fit.
        """
        weight, bias = self.weight, self.bias
        if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:]:
            raise ValueError(f"weight: expected shape (rows, {x.shape[-1]}), got {weight.shape}")
        if bias is not None:
            expect_shape("bias", bias, weight.shape[:1])
        # Of several tokens all sequences in one GEMM; single tokens are a GEMV each: both faster.
        tokens = x.reshape(-1, x.shape[-1]) if x.shape[-2:-1] > (1,) else x
        y: Floats = (tokens @ weight.T).reshape(*x.shape[:-1], len(weight))  # [..., rows]
        if self.scale is not None:
            y *= y.dtype.type(self.scale)  # [..., rows]
        if bias is not None:
            y += bias  # [..., rows] + [rows]
        if clamp > 0:
            np.clip(y, -clamp, clamp, out=y)  # [..., rows]
        return y


@dataclass(frozen=True, eq=False)
class Projections:
    """Q, K and V: three weights, or one fused [q + k + v rows, n_embd]. rows: where it is split."""

    rows: Rows
    linears: tuple[Linear, ...]

    @property
    def fused(self) -> bool:
        return len(self.linears) == 1

    def project(self, x: Floats, clamp: float = 0.0) -> tuple[Floats, Floats, Floats]:
        """x [..., n_embd] -> [..., rows] of Q, K and V; clamp and errors as in `Linear.project`."""
        if self.fused:
            return split_rows(self.linears[0].project(x, clamp), self.rows)
        q, k, v = self.linears
        return q.project(x, clamp), k.project(x, clamp), v.project(x, clamp)


def split_rows(y: Floats, rows: Rows) -> tuple[Floats, Floats, Floats]:
    """Views of y [..., q + k + v] at row offsets -> [..., q], [..., k], [..., v].

    The three need not be equal (grouped-query, unequal K and V, Q with a gate), so thirds would
    be wrong. Raises ValueError if rows do not add up.
    """
    if min(rows) < 0 or sum(rows) != y.shape[-1]:
        raise ValueError(f"rows {rows}: expected a sum of {y.shape[-1]}, got {sum(rows)}")
    at_k, at_v = rows[0], rows[0] + rows[1]
    return y[..., :at_k], y[..., at_k:at_v], y[..., at_v:]


def split_heads(y: Floats, n_head: int) -> Floats:
    """View of y [n_seqs, n_tokens, n_head * head_dim] as [n_seqs, n_head, n_tokens, head_dim]."""
    if y.ndim != 3 or n_head < 1 or y.shape[2] % n_head:
        raise ValueError(f"y: expected (n_seqs, n_tokens, {n_head} * head_dim), got {y.shape}")
    n_seqs, n_tokens, n_rows = y.shape
    heads = y.reshape(n_seqs, n_tokens, n_head, n_rows // n_head)
    return heads.transpose(0, 2, 1, 3)  # [n_seqs, n_head, n_tokens, head_dim]


def split_gate(q: Floats) -> tuple[Floats, Floats]:
    """Q heads with a packed gate [..., 2 * head_dim] -> query, gate [..., head_dim] (views).

    Each head's rows are [query, gate] (llama.cpp, models/qwen35.cpp).
    """
    if q.shape[-1] % 2:
        raise ValueError(f"q: expected an even last axis for [query, gate], got {q.shape}")
    head_dim = q.shape[-1] // 2
    return q[..., :head_dim], q[..., head_dim:]


def apply_gate(out: Floats, gate: Floats) -> Floats:
    """Attention output times sigmoid(gate), before attn_output (llama.cpp, models/qwen35.cpp)."""
    expect_shape("gate", gate, out.shape)
    sigmoid: Floats = 0.5 * (np.tanh(0.5 * gate) + 1)  # shape of out; cannot overflow
    return out * sigmoid  # shape of out
