"""Projections, separate and fused; rows into heads and back."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_fuse.attention.projections import (
    Linear,
    Projections,
    apply_gate,
    split_gate,
    split_heads,
    split_rows,
)
from tests.attention.cases import EPS, assert_as_good, join_heads, normal, rng_of


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(*[st.integers(1, 70)] * 3),
    st.sampled_from((None, 0.37)),
    st.booleans(),
    st.sampled_from((0.0, 1.5)),
    st.integers(1, 17),
)
def test_fused_projection_equals_separate(
    seed: int,
    rows: tuple[int, int, int],
    scale: float | None,
    with_bias: bool,
    clamp: float,
    n_tokens: int,
) -> None:
    rng = rng_of(seed)
    x = normal(rng, 2, n_tokens, 97)
    weights = [normal(rng, n, 97) / 10 for n in rows]
    biases = [normal(rng, n) if with_bias else None for n in rows]
    separate = [Linear(w, scale, b) for w, b in zip(weights, biases, strict=True)]
    bias = np.concatenate([b for b in biases if b is not None]) if with_bias else None
    plain = Projections(rows, tuple(separate)).project(x, clamp)
    fused = Projections(rows, (Linear(np.concatenate(weights), scale, bias),))
    for got, one, w in zip(fused.project(x, clamp), plain, separate, strict=True):
        reference = x.astype(np.float64) @ w.weight.astype(np.float64).T
        reference = reference * (1 if scale is None else scale)
        reference = reference + (0 if w.bias is None else w.bias)
        if clamp:
            reference = np.clip(reference, -clamp, clamp)
        floor = 4 * EPS * float(np.max(np.abs(x) @ np.abs(w.weight.T)))
        assert_as_good(got, one, reference, floor)


def test_scale_comes_before_bias_and_clamp_after() -> None:
    x = np.array([[[2.0]]], np.float32)
    weight, bias = np.array([[3.0], [-5.0], [1.0]], np.float32), np.ones(3, np.float32)
    got = Linear(weight, 0.5, bias).project(x, clamp=3.5)
    assert got.tolist() == [[[3.5, -3.5, 2.0]]]  # 2·3·0.5 + 1 = 4, -4, 2
    assert x.item() == 2.0


def test_rows_split_at_offsets_not_thirds() -> None:
    y = np.arange(12, dtype=np.float32).reshape(1, 1, 12)
    q, k, v = split_rows(y, (8, 3, 1))
    assert (q.shape[-1], k.tolist(), v.tolist()) == (8, [[[8, 9, 10]]], [[[11]]])
    assert all(np.shares_memory(part, y) for part in (q, k, v))


def test_heads_and_back() -> None:
    y = np.arange(2 * 3 * 8, dtype=np.float32).reshape(2, 3, 8)
    heads = split_heads(y, 4)
    assert heads.shape == (2, 4, 3, 2) and np.shares_memory(heads, y)
    assert heads[1, 2, 0].tolist() == y[1, 0, 4:6].tolist()  # heads are contiguous rows
    np.testing.assert_array_equal(join_heads(heads), y)


def test_packed_gate() -> None:
    q_and_gate = normal(rng_of(23), 1, 2, 3, 8)  # [n_seqs, n_head, n_tokens, 2 * head_dim]
    q, gate = split_gate(q_and_gate)
    np.testing.assert_array_equal(np.concatenate([q, gate], axis=-1), q_and_gate)
    want = q / (1 + np.exp(-gate.astype(np.float64)))
    np.testing.assert_allclose(apply_gate(q, gate), want, rtol=8 * EPS, atol=EPS)
    with np.errstate(all="raise"):
        assert apply_gate(q[:, :, :, :1], np.full((1, 2, 3, 1), -1e4, np.float32)).max() == 0
