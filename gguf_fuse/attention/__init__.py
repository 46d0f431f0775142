"""Attention as llama.cpp computes it, in numpy: projections, norms, RoPE, masks, grouped-query
attention by broadcast, and split-KV decode. Imports nothing of the package.

Axis legend. Every array line says its shape in these words:

    n_seqs      sequences in the batch, each with its own length and positions
    n_tokens    query tokens per sequence: the prompt in prefill, 1 in decode
    n_kv        cells of the KV cache; padding cells are masked
    n_head      query heads
    n_head_kv   K and V heads; n_head is a multiple of it
    group       n_head / n_head_kv query heads share one KV head: query head h reads h // group
    head_dim    width of one head of Q and K
    head_dim_v  width of one head of V, and of the output
    n_embd      width of the hidden state
    n_rot       rotated dimensions of a head, <= head_dim; n_pairs = n_rot / 2
    n_chunks    chunks of KV cells in split-KV decode
    n_tiles     tiles of a chunk: one BLAS call reads one tile, which stays in the cache
    tile        cells of a tile

Shapes are numpy order (GGUF's `ne` reversed): a weight is [rows, n_embd].

A float32 input is computed in float32, a float64 input in float64. Masks are additive and in
llama.cpp's form: 0 where a query sees a cell, -inf where it does not, and -distance instead of 0
under ALiBi. K and V must be finite in masked cells too: 0 * nan is nan.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped, unused-ignore]

Floats: TypeAlias = NDArray[np.floating[Any]]  # float32, or float64 for a reference
Doubles: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.integer[Any]]
Bools: TypeAlias = NDArray[np.bool_]
Chunk: TypeAlias = tuple[int, int]  # first KV cell, and the one after the last

SPLIT_MIN_KV = 512  # llama.cpp splits KV from here on (ggml-cpu/ops.cpp, flash_attn_ext)
# How KV is cut changes how fast it is, not what; measured with OpenBLAS's AVX2 and AVX-512 kernels.
TILE_BYTES = 128 * 1024  # a tile is read several times over: it must fit well inside the L2 cache
CHUNK_BYTES = 16 * TILE_BYTES  # of one KV head: long enough to hide the cost of calling numpy
MIN_CHUNK_MACS = 4 << 20  # of Q·K: below, waking a second thread costs more than it saves
# Where OpenBLAS has kernels that read a small matrix where it lies instead of packing it first:
# only up to 1200 scores a call (its PR 3335); a larger tile takes up to twice as long.
IN_PLACE_KERNELS = frozenset({"SkylakeX", "Cooperlake", "SapphireRapids"})
IN_PLACE_SCORES = 1024
IN_PLACE_CELLS = 64  # of a tile, at least: a group so large that fewer fit is faster packed
MAX_GEMV_GROUP = 7  # elsewhere: up to here re-reading a cached V tile is cheaper than packing it
SCORE_BYTES = 64 * 1024 * 1024  # scores that exist at one time in `broadcast_attention`

DEFAULT_THREADS = min(4, os.cpu_count() or 1)  # of the commands that compute


# --- projections -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Linear:
    """A projection: weight [rows, n_embd], one scale or None, bias [rows] or None."""

    weight: Floats  # [rows, n_embd]
    scale: float | None = None
    bias: Floats | None = None  # [rows]


def project(
    x: Floats,
    weight: Floats,
    scale: float | None = None,
    bias: Floats | None = None,
    clamp: float = 0.0,
) -> Floats:
    """x [..., n_embd] through weight [rows, n_embd] -> [..., rows].

    The order is llama.cpp's (llama-graph.cpp, build_lora_mm and build_qkv): matmul, times scale,
    plus bias, then clamped to ±clamp if clamp > 0. Raises ValueError if the shapes do not fit.
    """
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"weight: expected shape (rows, {x.shape[-1]}), got {weight.shape}")
    if bias is not None:
        _expect("bias", bias, weight.shape[:1])
    y: Floats = x @ weight.T  # [..., n_embd] @ [n_embd, rows] -> [..., rows]
    if scale is not None:
        y *= y.dtype.type(scale)  # [..., rows]
    if bias is not None:
        y += bias  # [..., rows] + [rows]
    if clamp > 0:
        np.clip(y, -clamp, clamp, out=y)  # [..., rows]
    return y


def project_separate(
    x: Floats, q: Linear, k: Linear, v: Linear, clamp: float = 0.0
) -> tuple[Floats, Floats, Floats]:
    """x [..., n_embd] through three weights -> [..., q rows], [..., k rows], [..., v rows]."""
    outputs = [project(x, w.weight, w.scale, w.bias, clamp) for w in (q, k, v)]
    return outputs[0], outputs[1], outputs[2]


def project_fused(
    x: Floats, qkv: Linear, rows: tuple[int, int, int], clamp: float = 0.0
) -> tuple[Floats, Floats, Floats]:
    """x [..., n_embd] through one weight [q + k + v rows, n_embd], split at row offsets."""
    return split_rows(project(x, qkv.weight, qkv.scale, qkv.bias, clamp), rows)


def split_rows(y: Floats, rows: tuple[int, int, int]) -> tuple[Floats, Floats, Floats]:
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


def join_heads(x: Floats) -> Floats:
    """x [n_seqs, n_head, n_tokens, head_dim] -> [n_seqs, n_tokens, n_head * head_dim]."""
    if x.ndim != 4:
        raise ValueError(f"x: expected (n_seqs, n_head, n_tokens, head_dim), got {x.shape}")
    n_seqs, n_head, n_tokens, head_dim = x.shape
    tokens: Floats = x.transpose(0, 2, 1, 3)  # [n_seqs, n_tokens, n_head, head_dim]
    return tokens.reshape(n_seqs, n_tokens, n_head * head_dim)


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
    _expect("gate", gate, out.shape)
    sigmoid: Floats = 0.5 * (np.tanh(0.5 * gate) + 1)  # shape of out; cannot overflow
    return out * sigmoid  # shape of out


# --- norms of Q and K ------------------------------------------------------------------------


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
    centred = x - np.mean(x, axis=-1, keepdims=True)  # shape of x
    variance = np.mean(centred * centred, axis=-1, keepdims=True)  # [..., 1]
    y: Floats = centred / np.sqrt(variance + x.dtype.type(eps))  # shape of x
    if weight is not None:
        y = y * _norm_weight("weight", weight, x)
    return y if bias is None else y + _norm_weight("bias", bias, x)


def _norm_weight(name: str, weight: Floats, x: Floats) -> Floats:
    """Weight [dim] as it is; one row per head [n_head, dim] as [n_head, 1, dim]."""
    if weight.shape == x.shape[-1:]:
        return weight
    if x.ndim == 4 and weight.shape == (x.shape[1], x.shape[3]):
        return weight[:, None, :]  # [n_head, 1, head_dim]: the same for every token
    per_head = f" or {(x.shape[1], x.shape[3])}" if x.ndim == 4 else ""
    raise ValueError(f"{name}: expected shape {x.shape[-1:]}{per_head}, got {weight.shape}")


# --- RoPE ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rope:
    """How a model rotates Q and K. Angles are radians; the names are llama.cpp's.

    layout: norm turns the pairs (2j, 2j+1), the others (j, j + n_rot/2). mrope and imrope have
    four positions per token; for text the first three are equal and the fourth is 0, which is
    neox but for the pairs of the fourth section.
    freq_scale: 1 / factor of linear scaling and YaRN; 1 for scaling type none.
    ext_factor: 1 for YaRN, 0 otherwise. attn_factor: what `context_attn_factor` returns.
    """

    layout: Literal["norm", "neox", "mrope", "imrope"]
    n_rot: int
    freq_base: float = 10000.0
    freq_scale: float = 1.0
    ext_factor: float = 0.0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    n_ctx_orig: int = 0  # trained context in tokens, for YaRN
    freq_factors: Floats | None = None  # [n_pairs], from rope_freqs or rope_factors_*
    sections: tuple[int, int, int, int] = (0, 0, 0, 0)  # pairs per position, mrope and imrope

    def __post_init__(self) -> None:
        if self.n_rot < 0 or self.n_rot % 2:
            raise ValueError(f"n_rot: expected an even number >= 0, got {self.n_rot}")
        if self.freq_factors is not None:
            _expect("freq_factors", self.freq_factors, (self.n_rot // 2,))
        if self.ext_factor != 0 and self.n_ctx_orig <= 0:
            raise ValueError(f"n_ctx_orig: expected > 0 for YaRN, got {self.n_ctx_orig}")
        if self.layout in ("mrope", "imrope") and sum(self.sections) <= 0:
            raise ValueError(f"sections: expected a positive sum, got {self.sections}")


def context_attn_factor(
    freq_scale: float, ext_factor: float, attn_factor: float = 1.0, yarn_log_mul: float = 0.0
) -> float:
    """The attn_factor that reaches RoPE (llama-context.cpp, constructor).

    RoPE itself multiplies by 1 + 0.1 ln(1/freq_scale) under YaRN; the context first divides by
    the same, so that the factor counts once (or, with yarn_log_mul 1, not at all).
    attn_factor and yarn_log_mul are `rope.scaling.attn_factor` and `.yarn_log_multiplier`.
    """
    if ext_factor == 0:
        return attn_factor
    factor = 1.0 / freq_scale
    context_factor = _yarn_magnitude(factor, 1.0)
    if yarn_log_mul != 0:
        context_factor /= _yarn_magnitude(factor, yarn_log_mul)
    return attn_factor * context_factor / (1.0 + 0.1 * math.log(factor))


def _yarn_magnitude(factor: float, multiplier: float) -> float:
    return 1.0 if factor <= 1 else 1.0 + 0.1 * multiplier * math.log(factor)


def rope_angles(rope: Rope, positions: Ints) -> Doubles:
    """Angles in radians: positions [n_seqs, n_tokens] -> [n_seqs, n_tokens, n_pairs].

    ggml-cpu/ops.cpp, ggml_rope_cache_init and rope_yarn. ggml multiplies up the powers of
    freq_base in float32; here they are float64, exact to its rounding.
    """
    pair = np.arange(rope.n_rot // 2, dtype=np.float64)  # [n_pairs]
    frequency = rope.freq_base ** (-2.0 * pair / max(rope.n_rot, 1))  # [n_pairs]
    if rope.freq_factors is not None:
        frequency = frequency / rope.freq_factors  # [n_pairs]
    mix = _yarn_mix(rope, pair)  # [n_pairs]: 1 keeps the trained frequency, 0 scales it
    frequency = frequency * (rope.freq_scale * (1 - mix) + mix)  # [n_pairs]
    frequency = np.where(_turning_pairs(rope), frequency, 0.0)  # [n_pairs]
    return np.asarray(positions, np.float64)[..., None] * frequency  # [n_seqs, n_tokens, n_pairs]


def _yarn_mix(rope: Rope, pair: Doubles) -> Doubles:
    """Share of the unscaled angle per pair (rope_yarn_ramp, ggml_rope_yarn_corr_dims)."""
    if rope.ext_factor == 0:
        return np.zeros_like(pair)  # [n_pairs]

    def pair_with(n_turns: float) -> float:  # the pair that makes n_turns over the context
        turns = rope.n_ctx_orig / (n_turns * 2 * math.pi)
        return rope.n_rot * math.log(turns) / (2 * math.log(rope.freq_base))

    low = max(0.0, math.floor(pair_with(rope.beta_fast)))
    high = min(rope.n_rot - 1.0, math.ceil(pair_with(rope.beta_slow)))
    ramp = np.clip((pair - low) / max(0.001, high - low), 0, 1)  # [n_pairs]
    return rope.ext_factor * (1 - ramp)  # [n_pairs]


def _turning_pairs(rope: Rope) -> Bools:
    """False for pairs of mrope's fourth position, which is 0 in text (ggml_mrope_cache_init)."""
    n_pairs = rope.n_rot // 2
    if rope.layout not in ("mrope", "imrope"):
        return np.ones(n_pairs, np.bool_)  # [n_pairs]
    sector = np.arange(n_pairs) % sum(rope.sections)  # [n_pairs]
    if rope.layout == "mrope":
        turning: Bools = sector < sum(rope.sections[:3])  # [n_pairs]
        return turning
    limit = 3 * np.asarray(rope.sections)[[0, 1, 2]][sector % 3]  # [n_pairs]: t, h, w in turn
    interleaved: Bools = sector < limit  # [n_pairs]
    return interleaved


def apply_rope(x: Floats, positions: Ints, rope: Rope) -> Floats:
    """Rotate x [n_seqs, n_head, n_tokens, head_dim] by positions [n_seqs, n_tokens].

    (a, b) -> m (a cos θ - b sin θ), m (a sin θ + b cos θ) (ggml-cpu/ops.cpp, rotate_pairs), where
    m = attn_factor, times 1 + 0.1 ln(1/freq_scale) under YaRN. Dimensions from n_rot on are
    copied, not scaled by m. Raises ValueError if shapes do not fit.
    """
    if x.ndim != 4 or x.shape[-1] < rope.n_rot:
        raise ValueError(f"x: expected (n_seqs, n_head, n_tokens, >= {rope.n_rot}), got {x.shape}")
    _expect("positions", positions, (x.shape[0], x.shape[2]))
    angles = rope_angles(rope, positions)[:, None]  # [n_seqs, 1, n_tokens, n_pairs]
    magnitude = rope.attn_factor
    if rope.ext_factor != 0:
        magnitude *= 1.0 + 0.1 * math.log(1.0 / rope.freq_scale)
    cos = (magnitude * np.cos(angles)).astype(x.dtype)  # [n_seqs, 1, n_tokens, n_pairs]
    sin = (magnitude * np.sin(angles)).astype(x.dtype)  # [n_seqs, 1, n_tokens, n_pairs]
    first, second = _pair_slices(rope)
    a, b = x[..., first], x[..., second]  # [n_seqs, n_head, n_tokens, n_pairs] each
    y = x.copy()  # [n_seqs, n_head, n_tokens, head_dim]
    y[..., first] = a * cos - b * sin  # [n_seqs, n_head, n_tokens, n_pairs]
    y[..., second] = a * sin + b * cos  # [n_seqs, n_head, n_tokens, n_pairs]
    return y


def _pair_slices(rope: Rope) -> tuple[slice, slice]:
    if rope.layout == "norm":
        return slice(0, rope.n_rot, 2), slice(1, rope.n_rot, 2)
    return slice(0, rope.n_rot // 2), slice(rope.n_rot // 2, rope.n_rot)


# --- masks -----------------------------------------------------------------------------------
# Visibility is boolean and composes with `&`; `additive_mask` or `alibi_mask` turns it into what
# attention takes. Positions are token indices in the own sequence, -1 for a cell without a token.


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
    _expect("visible", visible, distance.shape)
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


# --- attention -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AttentionParams:
    """What turns Q·K into weights: s = scale Q·K; softcap tanh(s / softcap); + slope · mask.

    softcap and max_alibi_bias: 0 is off. sinks [n_head] or None: raw logits, unscaled and
    uncapped, that join each head's softmax once and add nothing to the output.
    """

    scale: float
    softcap: float = 0.0
    max_alibi_bias: float = 0.0
    sinks: Floats | None = None  # [n_head]


class _Shape(NamedTuple):
    n_seqs: int
    n_head: int
    n_head_kv: int
    group: int
    n_tokens: int
    n_kv: int
    head_dim: int
    head_dim_v: int


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
    shape = _check(q, k, v, mask, params)
    if shape.n_tokens == 1 and shape.n_kv >= SPLIT_MIN_KV:
        return split_attention(q, k, v, mask, params, n_threads=n_threads)
    return broadcast_attention(q, k, v, mask, params)


def group_heads(q: Floats, n_head_kv: int) -> Floats:
    """q [n_seqs, n_head, n_tokens, head_dim] -> [n_seqs, n_head_kv, group, n_tokens, head_dim]."""
    n_seqs, n_head, n_tokens, head_dim = q.shape
    if n_head_kv < 1 or n_head % n_head_kv:
        raise ValueError(f"q: expected n_head a multiple of {n_head_kv}, got {n_head}")
    return q.reshape(n_seqs, n_head_kv, n_head // n_head_kv, n_tokens, head_dim)


def broadcast_attention(
    q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams
) -> Floats:
    """Grouped-query attention in which K and V stay at n_head_kv; shapes as in `attention`.

    The group folds into the rows, so K and V need no group axis and BLAS runs one GEMM per KV
    head. Query tokens go in blocks, so that scores never take more than about SCORE_BYTES.
    """
    shape = _check(q, k, v, mask, params)
    grouped = group_heads(q, shape.n_head_kv)  # [n_seqs, n_head_kv, group, n_tokens, head_dim]
    out = np.empty(
        (*grouped.shape[:4], shape.head_dim_v), q.dtype
    )  # [n_seqs, n_head_kv, group, n_tokens, head_dim_v]
    token_bytes = shape.n_head * max(shape.n_kv, 1) * q.dtype.itemsize
    block = max(1, SCORE_BYTES // token_bytes)
    for seq, start in itertools.product(range(shape.n_seqs), range(0, shape.n_tokens, block)):
        tokens = slice(start, start + block)
        seen = None if mask is None else mask[seq, tokens]  # [block, n_kv]
        rows = grouped[seq, :, :, tokens]  # [n_head_kv, group, block, head_dim]
        out[seq, :, :, tokens] = _attend_block(rows, k[seq], v[seq], seen, params)
    return out.reshape(*q.shape[:3], shape.head_dim_v)  # [n_seqs, n_head, n_tokens, head_dim_v]


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
    _soft_cap(by_head, params.softcap)
    if mask is not None:
        by_head += _head_mask(mask, n_head_kv, group, params.max_alibi_bias, q.dtype)
    m = np.max(by_head, axis=-1, initial=-np.inf)  # [n_head_kv, group, n_tokens]
    sinks = _grouped_sinks(params.sinks, n_head_kv, group, q.dtype)  # [n_head_kv, group, 1]
    if sinks is not None:
        m = np.maximum(m, sinks)  # [n_head_kv, group, n_tokens]
    m = _finite_max(m)  # [n_head_kv, group, n_tokens]
    by_head -= m[..., None]  # [n_head_kv, group, n_tokens, n_kv]
    np.exp(by_head, out=by_head)  # [n_head_kv, group, n_tokens, n_kv]; a view: `scores` too
    total = np.sum(by_head, axis=-1)  # [n_head_kv, group, n_tokens]
    if sinks is not None:
        total = total + np.exp(sinks - m)  # [n_head_kv, group, n_tokens]
    summed = (scores @ v).reshape(*q.shape[:3], -1)  # [n_head_kv, group, n_tokens, head_dim_v]
    return _divide(summed, total)  # [n_head_kv, group, n_tokens, head_dim_v]


def expanded_attention(
    q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams
) -> Floats:
    """The same with K and V copied out to n_head heads: only to compare with, and to time."""
    shape = _check(q, k, v, mask, params)
    k_all = np.repeat(k, shape.group, axis=1)  # [n_seqs, n_head, n_kv, head_dim]
    v_all = np.repeat(v, shape.group, axis=1)  # [n_seqs, n_head, n_kv, head_dim_v]
    return broadcast_attention(q, k_all, v_all, mask, params)


def reference_attention(
    q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams
) -> Doubles:
    """float64, head by head, no blocks, chunks or threads: llama.cpp's `use_ref`. Slow.

    Shapes as in `attention`. Shares with the fast paths only the checks and `alibi_slopes`.
    """
    shape = _check(q, k, v, mask, params)
    out = np.zeros((*q.shape[:3], shape.head_dim_v))  # [n_seqs, n_head, n_tokens, head_dim_v]
    slopes = alibi_slopes(shape.n_head, params.max_alibi_bias)  # [n_head]
    for seq, head in itertools.product(range(shape.n_seqs), range(shape.n_head)):
        q_head = q[seq, head].astype(np.float64)  # [n_tokens, head_dim]
        k_head = k[seq, head // shape.group].astype(np.float64)  # [n_kv, head_dim]
        v_head = v[seq, head // shape.group].astype(np.float64)  # [n_kv, head_dim_v]
        scores = params.scale * (q_head @ k_head.T)  # [n_tokens, n_kv]
        if params.softcap > 0:
            scores = params.softcap * np.tanh(scores / params.softcap)  # [n_tokens, n_kv]
        if mask is not None:
            scores = scores + slopes[head] * mask[seq].astype(np.float64)  # [n_tokens, n_kv]
        sink = -np.inf if params.sinks is None else float(params.sinks[head])
        logits = np.concatenate(
            [scores, np.full((shape.n_tokens, 1), sink)], axis=1
        )  # [n_tokens, n_kv + 1]: a sink is one more cell, whose V is zero
        for token, row in enumerate(logits):  # [n_kv + 1]
            if row.max() == -np.inf:
                continue  # sees nothing: zeros
            weights = np.exp(row - row.max())  # [n_kv + 1]
            out[seq, head, token] = weights[:-1] @ v_head / weights.sum()  # [head_dim_v]
    return out


def _soft_cap(scores: Floats, softcap: float) -> None:
    """cap · tanh(s / cap), in place; the shape stays."""
    if softcap <= 0:
        return
    scores /= scores.dtype.type(softcap)
    np.tanh(scores, out=scores)
    scores *= scores.dtype.type(softcap)


def _head_mask(
    mask: Floats, n_head_kv: int, group: int, max_bias: float, dtype: np.dtype[Any]
) -> Floats:
    """Mask [n_tokens, n_kv], times each head's slope under ALiBi only.

    -> [n_tokens, n_kv], or [n_head_kv, group, n_tokens, n_kv] under ALiBi.
    """
    if max_bias <= 0:
        return mask
    slopes = alibi_slopes(n_head_kv * group, max_bias).astype(dtype)  # [n_head]
    return slopes.reshape(n_head_kv, group, 1, 1) * mask  # [n_head_kv, group, n_tokens, n_kv]


def _grouped_sinks(
    sinks: Floats | None, n_head_kv: int, group: int, dtype: np.dtype[Any]
) -> Floats | None:
    """Sinks [n_head] -> [n_head_kv, group, 1]."""
    return None if sinks is None else sinks.astype(dtype).reshape(n_head_kv, group, 1)


def _finite_max(m: Floats) -> Floats:
    """The maximum to subtract: 0 where nothing is visible, since -inf - -inf is nan."""
    return np.where(np.isneginf(m), m.dtype.type(0), m)


def _divide(summed: Floats, total: Floats) -> Floats:
    """summed [..., head_dim_v] / total [...]; zeros where the total is 0."""
    divisor = np.where(total == 0, total.dtype.type(1), total)  # [...]
    return summed / divisor[..., None]  # [..., head_dim_v]


# --- split-KV decode -------------------------------------------------------------------------


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
    """Flash-decoding: one query token per sequence, KV split into chunks that threads share.

    Shapes as in `attention`, with n_tokens = 1. chunks: [start, end) ranges that cover n_kv in
    order, empty ones allowed; None plans them. (Tri Dao et al., "Flash-Decoding for long-context
    inference", 2023; llama.cpp PR 19209.)
    """
    partials = split_partials(q, k, v, mask, params, chunks, n_threads)
    out = reduce_partials(partials, params.sinks)  # [n_seqs, n_head_kv, group, head_dim_v]
    return out.reshape(*q.shape[:3], v.shape[3])  # [n_seqs, n_head, 1, head_dim_v]


def plan_chunks(n_kv: int, tile: int, shortest: int, longest: int, n_threads: int) -> list[Chunk]:
    """Ranges over n_kv cells, whole tiles each; the odd cells at the end are a chunk of their own.

    A chunk has about half of a thread's share of the tiles that are left, so that threads end
    together; but at least `shortest` cells, as long as there are, and at most `longest`.
    """
    chunks: list[Chunk] = []
    start, left = 0, n_kv // tile
    while left:
        fair = max(-(-shortest // tile), left // (2 * n_threads))
        n_tiles = min(left, max(1, longest // tile), fair)
        chunks.append((start, start + n_tiles * tile))
        start, left = chunks[-1][1], left - n_tiles
    return [*chunks, (start, n_kv)] if start < n_kv else chunks


def split_partials(
    q: Floats,
    k: Floats,
    v: Floats,
    mask: Floats | None,
    params: AttentionParams,
    chunks: Sequence[Chunk] | None = None,
    n_threads: int | None = None,
) -> Partials:
    """The partial results of every chunk, without sinks; arguments as in `split_attention`.

    Raises ValueError if there is more than one query token, or the chunks do not cover n_kv.
    """
    shape = _check(q, k, v, mask, params)
    if shape.n_tokens != 1:
        raise ValueError(f"q: split-KV decode expects n_tokens 1, got {shape.n_tokens}")
    if n_threads is not None and n_threads < 1:
        raise ValueError(f"n_threads: expected at least 1, got {n_threads}")
    workers = n_threads or _cpu_count()
    tile = _tile_cells(shape.group, k, v)
    if chunks is None:
        row_bytes = max(shape.head_dim, shape.head_dim_v) * k.dtype.itemsize
        busy = shape.n_head_kv * max(shape.group, 4)  # with few heads to a KV head, reading counts
        shortest = MIN_CHUNK_MACS // (busy * shape.head_dim)
        chunks = plan_chunks(shape.n_kv, tile, shortest, CHUNK_BYTES // row_bytes, workers)
    _check_chunks(chunks, shape.n_kv)
    heads = (shape.n_seqs, len(chunks), shape.n_head_kv, shape.group)
    partials = Partials(
        np.empty(heads, q.dtype),  # [n_seqs, n_chunks, n_head_kv, group]
        np.empty(heads, q.dtype),  # [n_seqs, n_chunks, n_head_kv, group]
        np.empty((*heads, shape.head_dim_v), q.dtype),  # [..., group, head_dim_v]
    )
    grouped = group_heads(q, shape.n_head_kv)  # [n_seqs, n_head_kv, group, 1, head_dim]
    scaled = grouped[:, :, :, 0] * q.dtype.type(
        params.scale
    )  # [n_seqs, n_head_kv, group, head_dim]
    slopes = alibi_slopes(shape.n_head, params.max_alibi_bias).astype(q.dtype)  # [n_head]
    slopes = slopes.reshape(shape.n_head_kv, shape.group)  # [n_head_kv, group]
    todo = iter(list(itertools.product(range(shape.n_seqs), range(len(chunks)))))
    longest = max((end - start for start, end in chunks), default=0)

    def work() -> None:
        scratch = _Scratch.allocate(shape, longest, tile, q.dtype)
        for seq, i in todo:  # a list's iterator: next() is atomic, so threads can share it
            cells = slice(*chunks[i])
            seen = None if mask is None else mask[seq, 0, cells]  # [cells]
            into = (partials.m[seq, i], partials.total[seq, i], partials.summed[seq, i])
            _attend_chunk(
                scaled[seq], k[seq, :, cells], v[seq, :, cells], seen, slopes, params, scratch, into
            )

    run_on_threads(work, min(workers, max(1, shape.n_seqs * len(chunks))))
    return partials


def reduce_partials(partials: Partials, sinks: Floats | None) -> Floats:
    """Join chunks by log-sum-exp -> [n_seqs, n_head_kv, group, head_dim_v].

    M = max m_c; O = Σ exp(m_c - M) o_c; L = Σ exp(m_c - M) l_c; out = O / L (llama.cpp,
    flash_attn_ext_reduce_partials). sinks [n_head] enter M and L here and nowhere else: once.
    """
    m = partials.m  # [n_seqs, n_chunks, n_head_kv, group]
    top = np.max(m, axis=1, initial=-np.inf)  # [n_seqs, n_head_kv, group]
    if sinks is not None:
        sinks = sinks.astype(m.dtype).reshape(m.shape[2:])  # [n_head_kv, group]
        top = np.maximum(top, sinks)  # [n_seqs, n_head_kv, group]
    top = _finite_max(top)  # [n_seqs, n_head_kv, group]
    weight = np.exp(m - top[:, None])  # [n_seqs, n_chunks, n_head_kv, group]
    total = np.sum(weight * partials.total, axis=1)  # [n_seqs, n_head_kv, group]
    if sinks is not None:
        total = total + np.exp(sinks - top)  # [n_seqs, n_head_kv, group]
    summed = np.einsum(
        "sckg,sckgd->skgd", weight, partials.summed
    )  # [n_seqs, n_head_kv, group, head_dim_v]
    return _divide(summed, total)  # [n_seqs, n_head_kv, group, head_dim_v]


class _Scratch(NamedTuple):
    """One thread's buffers, reused for all its chunks: their size depends on a chunk, not n_kv."""

    scores: Floats  # [n_head * cells], flat
    tile_sums: Floats  # [n_head * n_tiles * head_dim_v], flat

    @classmethod
    def allocate(cls, shape: _Shape, cells: int, tile: int, dtype: np.dtype[Any]) -> _Scratch:
        n_tiles = max(1, cells // tile)
        scores = np.empty(shape.n_head * cells, dtype)  # [n_head * cells]
        return cls(scores, np.empty(shape.n_head * n_tiles * shape.head_dim_v, dtype))


def _attend_chunk(
    q: Floats,
    k: Floats,
    v: Floats,
    mask: Floats | None,
    slopes: Floats,
    params: AttentionParams,
    scratch: _Scratch,
    into: tuple[Floats, Floats, Floats],
) -> None:
    """One chunk of one sequence, for all heads, written `into` m, total and summed.

    q [n_head_kv, group, head_dim], scaled; k [n_head_kv, cells, head_dim];
    v [n_head_kv, cells, head_dim_v]; mask [cells]; slopes, m, total [n_head_kv, group];
    summed [n_head_kv, group, head_dim_v].
    """
    m, total, summed = into
    n_head_kv, group, head_dim = q.shape
    cells, head_dim_v = v.shape[1:]
    if cells == 0 or (mask is not None and mask.max() == -np.inf):
        m.fill(-np.inf)  # not 0: real scores may all be far below it
        total.fill(0)
        summed.fill(0)
        return

    tile = _tile_cells(group, k, v)
    n_tiles, tile = (cells // tile, tile) if cells % tile == 0 else (1, cells)
    k_tiles = k.reshape(n_head_kv, n_tiles, tile, head_dim)  # a view
    scores = scratch.scores[: n_head_kv * group * cells]
    scores = scores.reshape(n_head_kv, n_tiles, group, tile)  # [n_head_kv, n_tiles, group, tile]
    np.matmul(q[:, None], k_tiles.swapaxes(2, 3), out=scores)  # [n_head_kv, n_tiles, group, tile]

    _soft_cap(scores, params.softcap)
    if mask is not None:
        _add_tile_mask(scores, mask.reshape(n_tiles, 1, tile), slopes, params.max_alibi_bias)
    np.max(scores, axis=(1, 3), out=m)  # [n_head_kv, group]
    scores -= m[:, None, :, None]  # [n_head_kv, n_tiles, group, tile]
    np.exp(scores, out=scores)  # [n_head_kv, n_tiles, group, tile]
    np.sum(scores, axis=(1, 3), out=total)  # [n_head_kv, group]

    # The group goes over the batch (a GEMV per query head and tile) or into the rows (one GEMM).
    by_head = group <= MAX_GEMV_GROUP and not _reads_in_place()
    over, rows = (group, 1) if by_head else (1, group)
    v_tiles = v.reshape(n_head_kv, n_tiles, 1, tile, head_dim_v)  # a view
    weights = scores.reshape(n_head_kv, n_tiles, over, rows, tile)
    sums = scratch.tile_sums[: n_head_kv * n_tiles * group * head_dim_v]
    sums = sums.reshape(n_head_kv, n_tiles, over, rows, head_dim_v)
    np.matmul(weights, v_tiles, out=sums)  # [n_head_kv, n_tiles, over, rows, head_dim_v]
    by_tile = sums.reshape(n_head_kv, n_tiles, group, head_dim_v)
    np.sum(by_tile, axis=1, out=summed)  # [n_head_kv, group, head_dim_v]


def _add_tile_mask(scores: Floats, mask: Floats, slopes: Floats, max_bias: float) -> None:
    """scores [n_head_kv, n_tiles, group, tile] += slope · mask [n_tiles, 1, tile], in place.

    Under ALiBi one KV head at a time, which keeps the product small.
    """
    if max_bias <= 0:
        scores += mask  # [n_head_kv, n_tiles, group, tile]
        return
    for head_kv, slope in enumerate(slopes):  # slope [group]
        scores[head_kv] += slope[:, None] * mask  # [n_tiles, group, tile]


def _tile_cells(group: int, k: Floats, v: Floats) -> int:
    width = max(k.shape[-1], v.shape[-1])
    fitting: int = max(32, TILE_BYTES // (width * k.dtype.itemsize))
    in_place = IN_PLACE_SCORES // group
    if in_place < IN_PLACE_CELLS or not _reads_in_place():
        return fitting
    return min(fitting, in_place)


@functools.cache
def _reads_in_place() -> bool:
    return any(library.get("architecture") in IN_PLACE_KERNELS for library in _blas().info())


def _cpu_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def _pool(n_workers: int) -> ThreadPoolExecutor:
    # Kept: starting threads for each decoded token would cost more than a short decode.
    return ThreadPoolExecutor(n_workers, thread_name_prefix="split-kv")


@contextlib.contextmanager
def blas_threads(n_threads: int) -> Iterator[None]:
    """Hold BLAS to n_threads threads, here and in threads started inside.

    The limit is the whole process's: two callers at once would restore each other's number.
    """
    with _blas().limit(limits=n_threads, user_api="blas"):
        yield


@functools.cache
def _blas() -> ThreadpoolController:
    # Kept: finding the loaded libraries takes milliseconds, setting a limit microseconds.
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def run_on_threads(work: Callable[[], None], n_threads: int) -> None:
    """Run work() on n_threads threads, this one included, with BLAS held to one thread in each.

    Returns when all have ended; raises what work() raised, on any of them.
    """
    settings = np.geterr()

    def help_out() -> None:
        with np.errstate(**settings):  # warnings are no thread's own choice
            work()

    with blas_threads(1):
        if n_threads == 1:
            work()
            return
        others = [_pool(n_threads - 1).submit(help_out) for _ in range(n_threads - 1)]
        try:
            work()
        finally:
            errors = [other.exception() for other in others]  # waits, also when work() raised
    for error in errors:
        if error is not None:
            raise error


# --- checks ----------------------------------------------------------------------------------


def _expect(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")


def _check(q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams) -> _Shape:
    """The sizes, or ValueError: one argument, what it should be, what it is."""
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4:
            raise ValueError(f"{name}: expected (n_seqs, heads, tokens, dim), got {array.shape}")
        if array.dtype not in (np.float32, np.float64):
            raise ValueError(f"{name}: expected float32 or float64, got {array.dtype}")
        if array.dtype != q.dtype:
            raise ValueError(f"{name}: expected {q.dtype} like q, got {array.dtype}")
    n_seqs, n_head, n_tokens, head_dim = q.shape
    n_head_kv, n_kv = k.shape[1:3]
    head_dim_v = v.shape[3]
    if n_head_kv < 1 or n_head % n_head_kv:
        raise ValueError(f"k: expected n_head_kv to divide n_head {n_head}, got {n_head_kv}")
    _expect("k", k, (n_seqs, n_head_kv, n_kv, head_dim))
    _expect("v", v, (n_seqs, n_head_kv, n_kv, head_dim_v))
    if mask is not None:
        _expect("mask", mask, (n_seqs, n_tokens, n_kv))
    if params.sinks is not None:
        _expect("sinks", params.sinks, (n_head,))
    group = n_head // n_head_kv
    return _Shape(n_seqs, n_head, n_head_kv, group, n_tokens, n_kv, head_dim, head_dim_v)


def _check_chunks(chunks: Sequence[Chunk], n_kv: int) -> None:
    """Every cell exactly once, in order."""
    at = 0
    for start, end in chunks:
        if start != at or end < start:
            raise ValueError(f"chunks: expected a range from {at} on, got ({start}, {end})")
        at = end
    if at != n_kv:
        raise ValueError(f"chunks: expected to end at n_kv {n_kv}, got {at}")
