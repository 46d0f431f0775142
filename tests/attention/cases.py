"""Inputs of attention, and the comparison that every test uses.

No test has a fixed tolerance: a float32 path may be at most twice as far from float64 as its
plain counterpart, plus a floor of a few roundings of the scores it had to compute.
"""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from gguf_fuse.attention.attend import reference_attention
from gguf_fuse.attention.masks import Window, additive_mask, padded_positions
from gguf_fuse.attention.shapes import Floats, group_heads
from gguf_fuse.attention.softmax import AttentionParams

EPS = float(np.finfo(np.float32).eps)
ODD_LENGTHS = (97, 257, 1025)


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.standard_normal(shape, dtype=np.float32)


def join_heads(x: Floats) -> Floats:
    """x [n_seqs, n_head, n_tokens, head_dim] -> [n_seqs, n_tokens, n_head * head_dim]."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def error(got: Floats, reference: Floats) -> float:
    """Largest distance; nan and inf are infinitely far."""
    assert got.shape == reference.shape
    distance = np.abs(got.astype(np.float64) - reference)
    return float(np.max(np.where(np.isfinite(distance), distance, np.inf), initial=0.0))


def assert_as_good(got: Floats, plain: Floats, reference: Floats, floor: float) -> None:
    plain_error = error(plain, reference)
    assert plain_error <= 10 * floor, "the plain path itself is broken"
    assert error(got, reference) <= 2 * plain_error + floor


@dataclass(frozen=True)
class Case:
    """Inputs of one attention call."""

    q: Floats  # [n_seqs, n_head, n_tokens, head_dim]
    k: Floats  # [n_seqs, n_head_kv, n_kv, head_dim]
    v: Floats  # [n_seqs, n_head_kv, n_kv, head_dim_v]
    mask: Floats | None  # [n_seqs, n_tokens, n_kv]
    params: AttentionParams

    @property
    def args(self) -> tuple[Floats, Floats, Floats, Floats | None, AttentionParams]:
        return self.q, self.k, self.v, self.mask, self.params

    @property
    def reference(self) -> Floats:
        return reference_attention(*self.args)

    @property
    def floor(self) -> float:
        """What rounding q, k and their products costs: a score that is off by d moves each
        weight by up to 2d, and d is a rounding of the sum of |q_i k_i|."""
        terms = np.abs(group_heads(self.q, self.k.shape[1])) @ np.abs(
            self.k[:, :, None].swapaxes(-1, -2)
        )  # [n_seqs, n_head_kv, group, n_tokens, n_kv]
        magnitude = 1 + self.params.scale * float(np.max(terms, initial=0))
        return 4 * EPS * magnitude * float(np.max(np.abs(self.v), initial=0))


def make_case(
    seed: int,
    *,
    n_seqs: int = 2,
    n_head_kv: int = 2,
    group: int = 3,
    n_tokens: int = 1,
    n_kv: int = 257,
    head_dim: int = 16,
    head_dim_v: int = 16,
    top_score: float | None = None,
    sinks: bool = False,
    softcap: float = 0.0,
    max_alibi_bias: float = 0.0,
    lengths: list[int] | None = None,
    window: int | None = None,
) -> Case:
    """Random q, k, v. With lengths: each sequence fills so many cells, and its query tokens are
    its last ones. top_score: the largest |score| that occurs."""
    rng = rng_of(seed)
    n_head = n_head_kv * group
    q = normal(rng, n_seqs, n_head, n_tokens, head_dim)
    k = normal(rng, n_seqs, n_head_kv, n_kv, head_dim)
    v = normal(rng, n_seqs, n_head_kv, n_kv, head_dim_v)
    scale = head_dim**-0.5
    if top_score is not None:
        scores = group_heads(q, n_head_kv) @ k[:, :, None].swapaxes(-1, -2)
        q *= np.float32(top_score / (scale * np.abs(scores).max()))
    mask = None
    if lengths is not None:
        k_positions = padded_positions(lengths, n_kv)
        q_positions = np.array([[n - n_tokens + i for i in range(n_tokens)] for n in lengths])
        mask = additive_mask(
            q_positions,
            k_positions,
            window=None if window is None else Window(window),
            alibi=max_alibi_bias > 0,
        )
    raw_sinks = normal(rng, n_head) * 3 if sinks else None
    return Case(q, k, v, mask, AttentionParams(scale, softcap, max_alibi_bias, raw_sinks))


@st.composite
def cases(draw: st.DrawFn, max_tokens: int = 1, max_kv: int = 1100) -> Case:
    n_seqs = draw(st.sampled_from((2, 1, 3)))
    n_kv = draw(st.one_of(st.sampled_from((1, *ODD_LENGTHS)), st.integers(1, max_kv)))
    masked = draw(st.booleans())
    return make_case(
        draw(st.integers(0, 2**32 - 1)),
        n_seqs=n_seqs,
        n_head_kv=draw(st.sampled_from((2, 1, 3))),
        group=draw(st.sampled_from((1, 2, 3, 4, 5, 6, 8, 17))),  # either side of GEMV_GROUP_K, _V
        n_tokens=draw(st.integers(1, max_tokens)),
        n_kv=n_kv,
        head_dim=draw(st.sampled_from((2, 8, 33))),
        head_dim_v=draw(st.sampled_from((1, 8, 20))),
        top_score=draw(st.sampled_from((None, 30.0, 1e3, 1e4))),
        sinks=draw(st.booleans()),
        softcap=draw(st.sampled_from((0.0, 5.0))),
        max_alibi_bias=draw(st.sampled_from((0.0, 8.0))) if masked else 0.0,
        lengths=[n_kv - draw(st.integers(0, n_kv)) for _ in range(n_seqs)] if masked else None,
        window=draw(st.sampled_from((None, 1, 40))),
    )


def cut(n_kv: int, points: list[float]) -> list[tuple[int, int]]:
    """Chunks between any points of 0..1; equal points make empty chunks."""
    edges = [0, *sorted(round(p * n_kv) for p in points), n_kv]
    return list(itertools.pairwise(edges))


def peak_bytes(work: Callable[[], object]) -> int:
    work()  # pools and caches that stay are not what is measured
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak
