"""Norms, against loops over Python floats."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gguf_fuse.attention.norms import layer_norm, rms_norm
from gguf_fuse.attention.projections import split_heads
from tests.attention.cases import EPS, join_heads, normal, rng_of


@pytest.mark.parametrize("per_head", ["shared", "own", "none"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norm_per_head_against_loops(norm: str, per_head: str) -> None:
    rng = rng_of(24)
    x = normal(rng, 2, 3, 5, 33) * 4 + 1  # [n_seqs, n_head, n_tokens, head_dim]
    weight = {"shared": normal(rng, 33), "own": normal(rng, 3, 33), "none": None}[per_head]
    bias = None if weight is None else weight + 1
    eps = 1e-5
    got = rms_norm(x, weight, eps) if norm == "rms" else layer_norm(x, weight, bias, eps)
    assert got.dtype == np.float32
    for seq, head, token in np.ndindex(2, 3, 5):
        row = [float(value) for value in x[seq, head, token]]
        mean = 0.0 if norm == "rms" else math.fsum(row) / 33
        centred = [value - mean for value in row]
        root = math.sqrt(math.fsum(value * value for value in centred) / 33 + eps)
        want = np.array([value / root for value in centred])
        if weight is not None:
            own = weight[head] if weight.ndim == 2 else weight
            want = want * own + (0 if norm == "rms" else own + 1)
        np.testing.assert_allclose(got[seq, head, token], want, rtol=16 * EPS, atol=16 * EPS)


def test_norm_of_a_whole_row_is_not_per_head() -> None:
    rng = rng_of(25)
    y, weight = normal(rng, 2, 5, 12), normal(rng, 12)  # [n_seqs, n_tokens, rows], [rows]
    y[..., :4] *= 10
    whole = split_heads(rms_norm(y, weight, 1e-6), 3)
    per_head = rms_norm(split_heads(y, 3), weight.reshape(3, 4), 1e-6)
    root = np.sqrt(np.mean(y.astype(np.float64) ** 2, axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(join_heads(whole), y / root * weight, rtol=16 * EPS)
    assert np.abs(whole - per_head).max() > 0.1
