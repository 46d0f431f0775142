"""Split-KV decode, or flash-decoding: one query token per sequence, the KV cells in chunks.

Threads share the chunks; each chunk keeps per head a maximum, a sum and a weighted sum of V, which
log-sum-exp joins. (Tri Dao et al., "Flash-Decoding for long-context inference", 2023; llama.cpp PR
19209.)
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from .masks import alibi_slopes
from .shapes import Floats, Sizes, sizes_of
from .softmax import AttentionParams, divide, grouped_sinks, soft_cap, top_scores
from .threads import blas, cpu_count, run_on_threads

Chunk: TypeAlias = tuple[int, int]  # first KV cell, and the one after the last

# How KV is cut changes how fast it is, not what; measured with OpenBLAS's AVX2 and AVX-512 kernels.
TILE_BYTES = 128 * 1024  # a tile is read several times over: it must fit well inside the L2 cache
CHUNK_BYTES = 16 * TILE_BYTES  # of one KV head: long enough to hide the cost of calling numpy
# t threads take work / t, plus, for each of their chunks, what its numpy calls cost in queueing for
# the interpreter's lock: least with as many threads as the root of work / cost. In products of Q·K.
CHUNK_COST = 2 << 20
# OpenBLAS reads a small matrix where it lies, without packing it first, only with these kernels
# and up to 1200 scores a call (its PR 3335); a larger tile takes up to twice as long.
IN_PLACE_KERNELS = frozenset({"SkylakeX", "Cooperlake", "SapphireRapids"})
IN_PLACE_SCORES = 1024
IN_PLACE_CELLS = 64  # of a tile, at least: a group so large that fewer fit is faster packed
# Elsewhere: up to such a group, reading a cached tile again is cheaper than packing it.
GEMV_GROUP_K = 10
GEMV_GROUP_V = 7


class Partials(NamedTuple):
    """What each chunk of KV cells knows, per query head: O(n_chunks · n_head · head_dim_v).

    A chunk that sees nothing has m = -inf, total 0 and summed 0.
    """

    m: Floats  # [n_seqs, n_chunks, n_head_kv, group]: maximum score
    total: Floats  # [n_seqs, n_chunks, n_head_kv, group]: l, the sum of exp(s - m)
    summed: Floats  # [n_seqs, n_chunks, n_head_kv, group, head_dim_v]: sum of exp(s - m) · v


def split_attention(
    q: Floats,
    k: Floats,
    v: Floats,
    mask: Floats | None,
    params: AttentionParams,
    chunks: Sequence[Chunk] | None = None,
    n_threads: int | None = None,
) -> Floats:
    """Shapes as in `attend.attention`, with n_tokens = 1.

    chunks: [start, end) ranges that cover n_kv in order, empty ones allowed; None plans them.
    n_threads: at most so many; None is every CPU of this process. Planned chunks get no more.
    Raises ValueError if there is more than one query token, or the chunks do not cover n_kv.
    """
    partials = split_partials(q, k, v, mask, params, chunks, n_threads)
    out = reduce_partials(partials, params.sinks)  # [n_seqs, n_head_kv, group, head_dim_v]
    return out.reshape(*q.shape[:3], v.shape[3])  # [n_seqs, n_head, 1, head_dim_v]


def split_partials(
    q: Floats,
    k: Floats,
    v: Floats,
    mask: Floats | None,
    params: AttentionParams,
    chunks: Sequence[Chunk] | None = None,
    n_threads: int | None = None,
) -> Partials:
    """The partial results of every chunk, without sinks; else as `split_attention`."""
    sizes = sizes_of(q, k, v, mask, params.sinks)
    if sizes.n_tokens != 1:
        raise ValueError(f"q: split-KV decode expects n_tokens 1, got {sizes.n_tokens}")
    if n_threads is not None and n_threads < 1:
        raise ValueError(f"n_threads: expected at least 1, got {n_threads}")
    workers = n_threads or cpu_count()
    tile = _tile_cells(sizes.group, k, v)
    if chunks is None:
        workers = _useful_threads(sizes, min(workers, cpu_count()))
        longest = CHUNK_BYTES // (max(sizes.head_dim, sizes.head_dim_v) * k.dtype.itemsize)
        chunks = plan_chunks(sizes.n_kv, tile, longest, -(-workers // sizes.n_seqs))
    _check_chunks(chunks, sizes.n_kv)
    heads = (sizes.n_head_kv, sizes.group)
    each = (sizes.n_seqs, len(chunks), *heads)  # in this order n_seqs, n_chunks, n_head_kv, group
    summed = np.empty((*each, sizes.head_dim_v), q.dtype)  # [..., group, head_dim_v]
    partials = Partials(np.empty(each, q.dtype), np.empty(each, q.dtype), summed)
    scaled = q * q.dtype.type(params.scale)  # [n_seqs, n_head, 1, head_dim]
    grouped = scaled.reshape(sizes.n_seqs, *heads, sizes.head_dim)  # [..., group, head_dim]
    slopes = alibi_slopes(sizes.n_head, params.max_alibi_bias).astype(q.dtype).reshape(heads)
    most_cells = max((end - start for start, end in chunks), default=0)
    n_tiles = max(1, most_cells // tile)
    todo = iter(list(itertools.product(range(sizes.n_seqs), range(len(chunks)))))

    def work() -> None:
        # Reused for all chunks of a thread: their size depends on a chunk, not on n_kv.
        scores = np.empty(sizes.n_head * most_cells, q.dtype)  # [n_head * cells], flat
        sums = np.empty(sizes.n_head * n_tiles * sizes.head_dim_v, q.dtype)  # flat
        for seq, i in todo:  # a list's iterator: next() is atomic, so threads can share it
            cells = slice(*chunks[i])
            seen = None if mask is None else mask[seq, 0, cells]  # [cells]
            own_k, own_v = k[seq, :, cells], v[seq, :, cells]  # [n_head_kv, cells, head_dim(_v)]
            into = Partials(*(part[seq, i] for part in partials))  # [n_head_kv, group, ...]
            _attend_chunk(grouped[seq], own_k, own_v, seen, slopes, params, (scores, sums), into)

    run_on_threads(work, min(workers, max(1, sizes.n_seqs * len(chunks))))
    return partials


def reduce_partials(partials: Partials, sinks: Floats | None) -> Floats:
    """Join chunks by log-sum-exp -> [n_seqs, n_head_kv, group, head_dim_v].

    M = max m_c; O = Σ exp(m_c - M) o_c; L = Σ exp(m_c - M) l_c; out = O / L (llama.cpp,
    flash_attn_ext_reduce_partials). sinks [n_head] enter M and L here and nowhere else: once.
    """
    m = partials.m  # [n_seqs, n_chunks, n_head_kv, group]
    own_sinks = grouped_sinks(sinks, m.shape[2], m.shape[3], m.dtype)  # [n_head_kv, group]
    top = top_scores(m, 1, own_sinks)  # [n_seqs, n_head_kv, group]
    weight = np.exp(m - top[:, None])  # [n_seqs, n_chunks, n_head_kv, group]
    total = np.sum(weight * partials.total, axis=1)  # [n_seqs, n_head_kv, group]
    total += np.exp(own_sinks - top)  # [n_seqs, n_head_kv, group]
    # [n_seqs, n_head_kv, group, head_dim_v]
    summed = np.einsum("sckg,sckgd->skgd", weight, partials.summed)
    return divide(summed, total)  # [n_seqs, n_head_kv, group, head_dim_v]


def plan_chunks(n_kv: int, tile: int, longest: int, n_threads: int) -> list[Chunk]:
    """Ranges over n_kv cells: as many for each thread, equal to a tile, as few as `longest` allows.

    The odd cells at the end, less than a tile, are a chunk of their own.
    """
    n_tiles = n_kv // tile
    each = -(-n_tiles // (n_threads * max(1, longest // tile)))  # chunks of a thread
    n_chunks = min(n_tiles, n_threads * each)
    bounds = [n_tiles * i // n_chunks * tile for i in range(n_chunks)] + [n_tiles * tile]
    return list(itertools.pairwise(bounds if bounds[-1] == n_kv else [*bounds, n_kv]))


def _useful_threads(sizes: Sizes, n_threads: int) -> int:
    busy = sizes.n_head_kv * max(sizes.group, 4)  # with few heads to a KV head, reading counts
    work = sizes.n_seqs * sizes.n_kv * busy * sizes.head_dim
    return min(n_threads, max(1, math.isqrt(work // CHUNK_COST)))


def _check_chunks(chunks: Sequence[Chunk], n_kv: int) -> None:
    """Every cell exactly once, in order."""
    at = 0
    for start, end in chunks:
        if start != at or end < start:
            raise ValueError(f"chunks: expected a range from {at} on, got ({start}, {end})")
        at = end
    if at != n_kv:
        raise ValueError(f"chunks: expected to end at n_kv {n_kv}, got {at}")


def _tile_cells(group: int, k: Floats, v: Floats) -> int:
    width = max(k.shape[-1], v.shape[-1])
    fitting: int = max(32, TILE_BYTES // (width * k.dtype.itemsize))
    in_place = IN_PLACE_SCORES // group
    if in_place < IN_PLACE_CELLS or not _reads_in_place():
        return fitting
    return min(fitting, in_place)


@functools.cache
def _reads_in_place() -> bool:
    return any(library.get("architecture") in IN_PLACE_KERNELS for library in blas().info())


def _over_and_rows(group: int, largest: int) -> tuple[int, int]:
    """Whether a group goes over the batch, a GEMV per query head and tile, or into rows: a GEMM."""
    by_head = group <= largest and not _reads_in_place()
    return (group, 1) if by_head else (1, group)


def _attend_chunk(
    q: Floats,
    k: Floats,
    v: Floats,
    mask: Floats | None,
    slopes: Floats,
    params: AttentionParams,
    scratch: tuple[Floats, Floats],
    into: Partials,
) -> None:
    """One chunk of one sequence, for all heads, written `into` the chunk's part of the partials.

    q [n_head_kv, group, head_dim], scaled; k [n_head_kv, cells, head_dim];
    v [n_head_kv, cells, head_dim_v]; mask [cells]; slopes, m, total [n_head_kv, group];
    summed [n_head_kv, group, head_dim_v]. scratch: flat, for scores and for the sums of tiles.
    """
    if v.shape[1] == 0 or (mask is not None and mask.max() == -np.inf):
        into.m.fill(-np.inf)  # not 0: real scores may all be far below it
        into.total.fill(0)
        into.summed.fill(0)
        return
    (n_head_kv, group, head_dim), cells = q.shape, k.shape[1]
    tile = _tile_cells(group, k, v)
    n_tiles, tile = (cells // tile, tile) if cells % tile == 0 else (1, cells)
    over, rows = _over_and_rows(group, GEMV_GROUP_K)
    k_tiles = k.reshape(n_head_kv, n_tiles, 1, tile, head_dim)  # a view
    flat = scratch[0][: n_head_kv * group * cells]
    by_rows = flat.reshape(n_head_kv, n_tiles, over, rows, tile)
    np.matmul(q.reshape(n_head_kv, 1, over, rows, head_dim), k_tiles.swapaxes(3, 4), out=by_rows)
    scores = flat.reshape(n_head_kv, n_tiles, group, tile)  # [n_head_kv, n_tiles, group, tile]
    soft_cap(scores, params.softcap)
    if mask is not None and params.max_alibi_bias <= 0:
        scores += mask.reshape(n_tiles, 1, tile)  # [n_head_kv, n_tiles, group, tile]
    elif mask is not None:
        for head_kv, slope in enumerate(slopes):  # slope [group]; one by one: a small product
            scores[head_kv] += slope[:, None] * mask.reshape(n_tiles, 1, tile)
    np.max(scores, axis=(1, 3), out=into.m)  # [n_head_kv, group]
    scores -= into.m[:, None, :, None]  # [n_head_kv, n_tiles, group, tile]
    np.exp(scores, out=scores)  # [n_head_kv, n_tiles, group, tile]
    np.sum(scores, axis=(1, 3), out=into.total)  # [n_head_kv, group]
    _weigh(scores, v, scratch[1], into.summed)


def _weigh(weights: Floats, v: Floats, scratch: Floats, summed: Floats) -> None:
    """Weights [n_head_kv, n_tiles, group, tile] · v [n_head_kv, cells, head_dim_v], over all cells.

    Into summed [n_head_kv, group, head_dim_v]; tiles first by themselves, in scratch.
    """
    n_head_kv, n_tiles, group, tile = weights.shape
    head_dim_v = v.shape[2]
    over, rows = _over_and_rows(group, GEMV_GROUP_V)
    v_tiles = v.reshape(n_head_kv, n_tiles, 1, tile, head_dim_v)  # a view
    flat = scratch[: n_head_kv * n_tiles * group * head_dim_v]
    sums = flat.reshape(n_head_kv, n_tiles, over, rows, head_dim_v)
    np.matmul(weights.reshape(n_head_kv, n_tiles, over, rows, tile), v_tiles, out=sums)
    np.sum(flat.reshape(n_head_kv, n_tiles, group, head_dim_v), axis=1, out=summed)
