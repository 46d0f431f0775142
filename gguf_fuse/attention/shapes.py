"""The arrays of attention: their types, their sizes, and the check that they fit together."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.floating[Any]]  # float32, or float64 for a reference
Doubles: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.integer[Any]]
Bools: TypeAlias = NDArray[np.bool_]


class Sizes(NamedTuple):
    """The axes of one call; see the legend in `gguf_fuse.attention`."""

    n_seqs: int
    n_head: int
    n_head_kv: int
    group: int
    n_tokens: int
    n_kv: int
    head_dim: int
    head_dim_v: int


def expect_shape(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")


def sizes_of(q: Floats, k: Floats, v: Floats, mask: Floats | None, sinks: Floats | None) -> Sizes:
    """Of arguments shaped as in `attend.attention`; sinks [n_head].

    Raises ValueError: one argument, what it should be, what it is.
    """
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
    expect_shape("k", k, (n_seqs, n_head_kv, n_kv, head_dim))
    expect_shape("v", v, (n_seqs, n_head_kv, n_kv, head_dim_v))
    if mask is not None:
        expect_shape("mask", mask, (n_seqs, n_tokens, n_kv))
    if sinks is not None:
        expect_shape("sinks", sinks, (n_head,))
    group = n_head // n_head_kv
    return Sizes(n_seqs, n_head, n_head_kv, group, n_tokens, n_kv, head_dim, head_dim_v)


def group_heads(q: Floats, n_head_kv: int) -> Floats:
    """q [n_seqs, n_head, n_tokens, head_dim] -> [n_seqs, n_head_kv, group, n_tokens, head_dim]."""
    n_seqs, n_head, n_tokens, head_dim = q.shape
    if n_head_kv < 1 or n_head % n_head_kv:
        raise ValueError(f"q: expected n_head a multiple of {n_head_kv}, got {n_head}")
    return q.reshape(n_seqs, n_head_kv, n_head // n_head_kv, n_tokens, head_dim)
