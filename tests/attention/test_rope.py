"""RoPE, against the kernel written out element by element."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gguf_fuse.attention.rope import Rope, apply_rope, context_attn_factor
from gguf_fuse.attention.shapes import Floats
from tests.attention.cases import EPS, normal, rng_of


def slow_rope(x: Floats, positions: NDArray[np.int64], rope: Rope) -> Floats:
    """Element by element, as the kernel is written: theta by repeated multiplication."""
    y = x.astype(np.float64)
    for seq, head, token in np.ndindex(*x.shape[:3]):
        theta_scale = rope.freq_base ** (-2.0 / rope.n_rot)
        theta_base = float(positions[seq, token])
        for j in range(rope.n_rot // 2):
            extrapolated = theta_base
            if rope.freq_factors is not None:
                extrapolated /= float(rope.freq_factors[j])
            theta, m = rope.freq_scale * extrapolated, rope.attn_factor
            if rope.ext_factor:
                edges = [
                    rope.n_rot
                    * math.log(rope.n_ctx_orig / (beta * 2 * math.pi))
                    / (2 * math.log(rope.freq_base))
                    for beta in (rope.beta_fast, rope.beta_slow)
                ]
                low, high = max(0, math.floor(edges[0])), min(rope.n_rot - 1, math.ceil(edges[1]))
                mix = rope.ext_factor * (1 - min(1, max(0, (j - low) / max(0.001, high - low))))
                theta = theta * (1 - mix) + extrapolated * mix
                m *= 1 + 0.1 * math.log(1 / rope.freq_scale)
            low_index, high_index = (2 * j, 2 * j + 1)
            if rope.layout != "norm":
                low_index, high_index = j, j + rope.n_rot // 2
            a, b = float(x[seq, head, token, low_index]), float(x[seq, head, token, high_index])
            y[seq, head, token, low_index] = m * (a * math.cos(theta) - b * math.sin(theta))
            y[seq, head, token, high_index] = m * (a * math.sin(theta) + b * math.cos(theta))
            theta_base *= theta_scale
    return y


FACTORS = np.linspace(1, 8, 6, dtype=np.float32)
YARN = {"freq_scale": 0.25, "ext_factor": 1.0, "n_ctx_orig": 512}
ROPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": {"freq_scale": 0.25},
    "factors": {"freq_factors": FACTORS},
    "yarn": {**YARN, "attn_factor": 0.9},
    "yarn with factors": {**YARN, "freq_factors": FACTORS, "beta_fast": 16.0},
    "attn_factor alone": {"attn_factor": 1.19},
}


@pytest.mark.parametrize("options", ROPES.values(), ids=ROPES.keys())
@pytest.mark.parametrize("layout", ["norm", "neox"])
@pytest.mark.parametrize("head_dim", [12, 17])
def test_rope_against_the_slow_one(layout: Any, options: dict[str, Any], head_dim: int) -> None:
    rope = Rope(layout, n_rot=12, freq_base=1000.0, **options)
    x = normal(rng_of(26), 2, 3, 4, head_dim)  # head_dim 17: partial rotation
    positions = np.array([[0, 1, 2, 3], [97, 257, 1025, 4000]])  # sequences of different length
    got = apply_rope(x, positions, rope)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, slow_rope(x, positions, rope), rtol=0, atol=16 * EPS)
    np.testing.assert_array_equal(got[..., 12:], x[..., 12:])  # copied, not scaled by m


@pytest.mark.parametrize("layout", ["norm", "neox"])
def test_rope_keeps_length_and_depends_on_distance_only(layout: Any) -> None:
    rope = Rope(layout, n_rot=16)
    q, k = rng_of(27).standard_normal((2, 1, 1, 1, 16))

    def turned(x: Floats, position: int) -> Floats:
        return apply_rope(x, np.array([[position]]), rope).ravel()

    np.testing.assert_array_equal(turned(q, 0), q.ravel())
    assert math.isclose(np.linalg.norm(turned(q, 1025)), np.linalg.norm(q), rel_tol=1e-12)
    near, far = turned(q, 40) @ turned(k, 33), turned(q, 1040) @ turned(k, 1033)
    assert math.isclose(near, far, rel_tol=1e-9)
    assert not math.isclose(near, turned(q, 40) @ turned(k, 34), rel_tol=1e-3)


def test_layouts_are_permutations_of_each_other() -> None:
    x = normal(rng_of(28), 1, 2, 3, 8)
    positions = np.array([[5, 6, 7]])
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # norm's pairs, as neox wants them
    norm = apply_rope(x, positions, Rope("norm", 8))
    neox = apply_rope(x[..., order], positions, Rope("neox", 8))
    np.testing.assert_array_equal(norm[..., order], neox)


def test_mrope_in_text_is_neox_but_for_the_fourth_section() -> None:
    x = normal(rng_of(29), 1, 2, 3, 16)
    positions = np.array([[5, 6, 7]])
    neox = apply_rope(x, positions, Rope("neox", 16))
    # imrope: the pairs take t, h, w in turn, each while j < 3 · its section; else the fourth.
    mrope = (Rope("mrope", 16, sections=(2, 2, 2, 2)), [6, 7])
    imrope = (Rope("imrope", 16, sections=(3, 1, 2, 2)), [4, 7])
    for rope, still in (mrope, imrope):
        got = apply_rope(x, positions, rope)
        both = [*still, *(j + 8 for j in still)]
        rest = [i for i in range(16) if i not in both]
        np.testing.assert_array_equal(got[..., both], x[..., both])
        np.testing.assert_array_equal(got[..., rest], neox[..., rest])


@pytest.mark.parametrize("factor", [1.0, 4.0, 40.0])
def test_context_counts_the_yarn_factor_once(factor: float) -> None:
    rope_multiplies_by = 1 + 0.1 * math.log(factor)
    net = context_attn_factor(1 / factor, 1.0) * rope_multiplies_by
    assert math.isclose(net, 1 + 0.1 * math.log(factor))
    net = context_attn_factor(1 / factor, 1.0, yarn_log_mul=1.0) * rope_multiplies_by
    assert math.isclose(net, 1.0)
    assert context_attn_factor(1 / factor, 0.0, 1.5) == 1.5
    assert math.isclose(
        context_attn_factor(1 / factor, 1.0, 1.5), 1.5 * context_attn_factor(1 / factor, 1.0)
    )
