"""Who sees whom, as what attention adds to the scores.

Positions are token indices in the own sequence, -1 for a cell without a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .shapes import Doubles, Ints


class Window(NamedTuple):
    """Which cells a query sees: the last n_swa of them; chunked: those of its chunk of n_swa."""

    n_swa: int
    chunked: bool = False


def padded_positions(lengths: Sequence[int], n_cells: int) -> NDArray[np.int64]:
    """Positions 0..length-1 of sequences of different length, then -1 -> [n_seqs, n_cells]."""
    if lengths and max(lengths) > n_cells:
        raise ValueError(f"lengths: expected at most {n_cells}, got {max(lengths)}")
    cell = np.arange(n_cells, dtype=np.int64)  # [n_cells]
    length = np.asarray(lengths, np.int64)[:, None]  # [n_seqs, 1]
    return np.where(cell < length, cell, -1)  # [n_seqs, n_cells]


def additive_mask(
    q_positions: Ints,
    k_positions: Ints,
    *,
    causal: bool = True,
    window: Window | None = None,
    alibi: bool = False,
) -> NDArray[np.float32]:
    """0 where a query sees a cell, -inf elsewhere -> [n_seqs, n_tokens, n_kv].

    q_positions [n_seqs, n_tokens], k_positions [n_seqs, n_kv]. causal: no cell after the query.
    A window hides p_q - p_k >= n_swa; a chunked one p_k < ⌊p_q / n_swa⌋ · n_swa
    (llama_hparams::is_masked_swa). alibi: -|p_q - p_k| instead of 0 (llama-kv-cache.cpp), which
    attention multiplies by each head's slope, see `alibi_slopes`. Raises ValueError if the shapes
    do not fit.
    """
    if q_positions.ndim != 2 or k_positions.ndim != 2 or len(q_positions) != len(k_positions):
        raise ValueError(
            "positions: expected (n_seqs, n_tokens) and (n_seqs, n_kv), "
            f"got {q_positions.shape} and {k_positions.shape}"
        )
    q, k = q_positions[:, :, None], k_positions[:, None, :]  # [n_seqs, n_tokens, 1], [.., 1, n_kv]
    visible = (k >= 0) & (q >= 0)  # [n_seqs, n_tokens, n_kv]
    if causal:
        visible &= k <= q  # [n_seqs, n_tokens, n_kv]
    if window is not None:
        visible &= k >= q // window.n_swa * window.n_swa if window.chunked else q - k < window.n_swa
    added = -np.abs(q - k).astype(np.float32) if alibi else np.float32(0)
    return np.where(visible, added, np.float32(-np.inf))  # [n_seqs, n_tokens, n_kv]


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
