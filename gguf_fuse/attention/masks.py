"""Who sees whom, as booleans, and what attention adds to the scores.

Visibility composes with `&`; `additive_mask` or `alibi_mask` turns it into what attention takes.
Positions are token indices in the own sequence, -1 for a cell without a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .shapes import Bools, Doubles, Ints, expect_shape


def padded_positions(lengths: Sequence[int], n_cells: int) -> NDArray[np.int64]:
    """Positions 0..length-1 of sequences of different length, then -1 -> [n_seqs, n_cells]."""
    if lengths and max(lengths) > n_cells:
        raise ValueError(f"lengths: expected at most {n_cells}, got {max(lengths)}")
    cell = np.arange(n_cells, dtype=np.int64)  # [n_cells]
    length = np.asarray(lengths, np.int64)[:, None]  # [n_seqs, 1]
    return np.where(cell < length, cell, -1)  # [n_seqs, n_cells]


def see_filled(q_positions: Ints, k_positions: Ints) -> Bools:
    """A query sees every cell that holds a token: non-causal -> [n_seqs, n_tokens, n_kv]."""
    q, k = _position_grid(q_positions, k_positions)
    return (k >= 0) & (q >= 0)  # [n_seqs, n_tokens, n_kv]


def see_past(q_positions: Ints, k_positions: Ints) -> Bools:
    """Causal: cells with a token, not after the query -> [n_seqs, n_tokens, n_kv]."""
    q, k = _position_grid(q_positions, k_positions)
    return (k >= 0) & (k <= q)  # [n_seqs, n_tokens, n_kv]


def see_window(q_positions: Ints, k_positions: Ints, n_swa: int) -> Bools:
    """Sliding window: hides p_q - p_k >= n_swa (llama-hparams.h) -> [n_seqs, n_tokens, n_kv]."""
    q, k = _position_grid(q_positions, k_positions)
    near: Bools = q - k < n_swa  # [n_seqs, n_tokens, n_kv]
    return near


def see_chunk(q_positions: Ints, k_positions: Ints, n_swa: int) -> Bools:
    """Chunked window: hides p_k < ⌊p_q / n_swa⌋ · n_swa -> [n_seqs, n_tokens, n_kv]."""
    q, k = _position_grid(q_positions, k_positions)
    same: Bools = k >= q // n_swa * n_swa  # [n_seqs, n_tokens, n_kv]
    return same


def additive_mask(visible: Bools) -> NDArray[np.float32]:
    """0 where visible, -inf elsewhere; the shape stays [n_seqs, n_tokens, n_kv]."""
    return np.where(visible, np.float32(0), np.float32(-np.inf))  # [n_seqs, n_tokens, n_kv]


def alibi_mask(visible: Bools, q_positions: Ints, k_positions: Ints) -> NDArray[np.float32]:
    """-|p_q - p_k| where visible, -inf elsewhere (llama-kv-cache.cpp) -> [n_seqs, n_tokens, n_kv].

    Attention multiplies it by each head's slope, see `alibi_slopes`.
    """
    q, k = _position_grid(q_positions, k_positions)
    distance = -np.abs(q - k).astype(np.float32)  # [n_seqs, n_tokens, n_kv]
    expect_shape("visible", visible, distance.shape)
    return np.where(visible, distance, np.float32(-np.inf))  # [n_seqs, n_tokens, n_kv]


def _position_grid(q_positions: Ints, k_positions: Ints) -> tuple[Ints, Ints]:
    """-> [n_seqs, n_tokens, 1] and [n_seqs, 1, n_kv], which broadcast to every pair."""
    if q_positions.ndim != 2 or k_positions.ndim != 2 or len(q_positions) != len(k_positions):
        raise ValueError(
            "positions: expected (n_seqs, n_tokens) and (n_seqs, n_kv), "
            f"got {q_positions.shape} and {k_positions.shape}"
        )
    return q_positions[:, :, None], k_positions[:, None, :]


def alibi_slopes(n_head: int, max_bias: float) -> Doubles:
    """ALiBi slope per query head -> [n_head]; all 1 if max_bias is 0 (ops.cpp, flash_attn_ext).

    With n2 the largest power of two <= n_head: 2^(-max_bias (h+1) / n2) for h < n2, then
    2^(-max_bias/2 · (2(h - n2) + 1) / n2).
    """
    if max_bias <= 0:
        return np.ones(n_head)  # [n_head]
    n2 = 1 << (n_head.bit_length() - 1)
    head = np.arange(n_head, dtype=np.float64)  # [n_head]
    first = -max_bias * (head + 1) / n2  # [n_head]
    rest = -max_bias / 2 * (2 * (head - n2) + 1) / n2  # [n_head]
    slopes: Doubles = np.exp2(np.where(head < n2, first, rest))  # [n_head]
    return slopes
