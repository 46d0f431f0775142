"""Attention of one call: the path a runtime takes, the plain one, and a float64 reference."""

from __future__ import annotations

import itertools

import numpy as np

from .masks import alibi_slopes
from .shapes import Doubles, Floats, group_heads, sizes_of
from .softmax import AttentionParams, divide, grouped_sinks, soft_cap, top_scores
from .split import split_attention

SPLIT_MIN_KV = 512  # llama.cpp splits KV from here on (ggml-cpu/ops.cpp, flash_attn_ext)
SCORE_BYTES = 64 * 1024 * 1024  # scores that exist at one time in `broadcast_attention`


def attention(
    q: Floats,
    k: Floats,
    v: Floats,
    mask: Floats | None,
    params: AttentionParams,
    n_threads: int | None = None,
) -> Floats:
    """The path a runtime takes: split-KV for one query token and n_kv >= SPLIT_MIN_KV, else plain.

    q [n_seqs, n_head, n_tokens, head_dim], k [n_seqs, n_head_kv, n_kv, head_dim],
    v [n_seqs, n_head_kv, n_kv, head_dim_v], mask [n_seqs, n_tokens, n_kv] or None (all visible)
    -> [n_seqs, n_head, n_tokens, head_dim_v]. A query that sees nothing gives zeros. n_threads
    counts for the split path; None is every CPU of this process.
    Raises ValueError, naming the argument, if shapes or types do not fit.
    """
    sizes = sizes_of(q, k, v, mask, params.sinks)
    if sizes.n_tokens == 1 and sizes.n_kv >= SPLIT_MIN_KV:
        return split_attention(q, k, v, mask, params, n_threads=n_threads)
    return broadcast_attention(q, k, v, mask, params)


def broadcast_attention(
    q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams
) -> Floats:
    """Grouped-query attention in which K and V stay at n_head_kv; shapes as in `attention`.

    The group folds into the rows, so K and V need no group axis and BLAS runs one GEMM per KV
    head. Query tokens go in blocks, so that scores never take more than about SCORE_BYTES.
    """
    sizes = sizes_of(q, k, v, mask, params.sinks)
    grouped = group_heads(q, sizes.n_head_kv)  # [n_seqs, n_head_kv, group, n_tokens, head_dim]
    # [n_seqs, n_head_kv, group, n_tokens, head_dim_v]
    out = np.empty((*grouped.shape[:4], sizes.head_dim_v), q.dtype)
    token_bytes = sizes.n_head * max(sizes.n_kv, 1) * q.dtype.itemsize
    block = max(1, SCORE_BYTES // token_bytes)
    for seq, start in itertools.product(range(sizes.n_seqs), range(0, sizes.n_tokens, block)):
        tokens = slice(start, start + block)
        seen = None if mask is None else mask[seq, tokens]  # [block, n_kv]
        rows = grouped[seq, :, :, tokens]  # [n_head_kv, group, block, head_dim]
        out[seq, :, :, tokens] = _attend_block(rows, k[seq], v[seq], seen, params)
    return out.reshape(*q.shape[:3], sizes.head_dim_v)  # [n_seqs, n_head, n_tokens, head_dim_v]


def _attend_block(
    q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams
) -> Floats:
    """One sequence: q [n_head_kv, group, n_tokens, head_dim], k [n_head_kv, n_kv, head_dim],
    v [n_head_kv, n_kv, head_dim_v], mask [n_tokens, n_kv]
    -> [n_head_kv, group, n_tokens, head_dim_v].
    """
    n_head_kv, group, n_tokens, head_dim = q.shape
    scaled = q * q.dtype.type(params.scale)  # [n_head_kv, group, n_tokens, head_dim]
    rows = scaled.reshape(n_head_kv, group * n_tokens, head_dim)  # [n_head_kv, rows, head_dim]
    scores: Floats = rows @ k.swapaxes(1, 2)  # [n_head_kv, rows, n_kv]
    by_head = scores.reshape(n_head_kv, group, n_tokens, -1)  # [n_head_kv, group, n_tokens, n_kv]
    soft_cap(by_head, params.softcap)
    if mask is not None and params.max_alibi_bias > 0:
        slopes = alibi_slopes(n_head_kv * group, params.max_alibi_bias).astype(q.dtype)  # [n_head]
        by_head += slopes.reshape(n_head_kv, group, 1, 1) * mask  # [..., n_tokens, n_kv]
    elif mask is not None:
        by_head += mask  # [n_head_kv, group, n_tokens, n_kv] + [n_tokens, n_kv]
    sinks = grouped_sinks(params.sinks, n_head_kv, group, q.dtype)  # [n_head_kv, group]
    m = top_scores(by_head, -1, sinks[..., None])  # [n_head_kv, group, n_tokens]
    by_head -= m[..., None]  # [n_head_kv, group, n_tokens, n_kv]
    np.exp(by_head, out=by_head)  # [n_head_kv, group, n_tokens, n_kv]; a view: `scores` too
    total = np.sum(by_head, axis=-1) + np.exp(sinks[..., None] - m)  # [n_head_kv, group, n_tokens]
    summed = (scores @ v).reshape(*q.shape[:3], -1)  # [n_head_kv, group, n_tokens, head_dim_v]
    return divide(summed, total)  # [n_head_kv, group, n_tokens, head_dim_v]


def expanded_attention(
    q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams
) -> Floats:
    """The same with K and V copied out to n_head heads: only to compare with, and to time."""
    sizes = sizes_of(q, k, v, mask, params.sinks)
    out = np.empty((*q.shape[:3], sizes.head_dim_v), q.dtype)  # [n_seqs, n_head, n_tokens, ...]
    for at in range(sizes.n_seqs):
        seq = slice(at, at + 1)
        k_all = np.repeat(k[seq], sizes.group, axis=1)  # [1, n_head, n_kv, head_dim]
        v_all = np.repeat(v[seq], sizes.group, axis=1)  # [1, n_head, n_kv, head_dim_v]
        seen = None if mask is None else mask[seq]  # [1, n_tokens, n_kv]
        out[seq] = broadcast_attention(q[seq], k_all, v_all, seen, params)
    return out


def reference_attention(
    q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams
) -> Doubles:
    """float64, no blocks, chunks or threads: llama.cpp's `use_ref`. Slow.

    Shapes as in `attention`. Shares with the fast paths only the checks and `alibi_slopes`.
    """
    sizes = sizes_of(q, k, v, mask, params.sinks)
    out = np.zeros((*q.shape[:3], sizes.head_dim_v))  # [n_seqs, n_head, n_tokens, head_dim_v]
    slopes = alibi_slopes(sizes.n_head, params.max_alibi_bias)  # [n_head]
    sinks = np.full(sizes.n_head, -np.inf) if params.sinks is None else params.sinks  # [n_head]
    for seq, head_kv in itertools.product(range(sizes.n_seqs), range(sizes.n_head_kv)):
        heads = slice(head_kv * sizes.group, (head_kv + 1) * sizes.group)  # that read this KV head
        q_heads = q[seq, heads].astype(np.float64)  # [group, n_tokens, head_dim]
        k_head = k[seq, head_kv].astype(np.float64, copy=False)  # [n_kv, head_dim]
        v_head = v[seq, head_kv].astype(np.float64, copy=False)  # [n_kv, head_dim_v]
        scores = params.scale * (q_heads @ k_head.T)  # [group, n_tokens, n_kv]
        if params.softcap > 0:
            scores = params.softcap * np.tanh(scores / params.softcap)  # [group, n_tokens, n_kv]
        if mask is not None:
            scores += slopes[heads, None, None] * mask[seq].astype(np.float64)  # [.., n_kv]
        # A sink is one more cell, whose V is zero.
        one_more = np.broadcast_to(sinks[heads, None, None], (*scores.shape[:2], 1))
        logits = np.concatenate([scores, one_more], axis=2)  # [group, n_tokens, n_kv + 1]
        top = logits.max(axis=2, keepdims=True)  # [group, n_tokens, 1]
        weights = np.exp(logits - np.where(top == -np.inf, 0, top))  # [group, n_tokens, n_kv + 1]
        total = weights.sum(axis=2, keepdims=True)  # [group, n_tokens, 1]
        # Who sees nothing has weights of 0, and gets zeros.
        out[seq, heads] = weights[:, :, :-1] @ v_head / np.where(total == 0, 1, total)
    return out
