"""RoPE: Q and K rotated by their positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .shapes import Doubles, Floats, Ints, expect_shape

_SMALLEST = 1e-30  # of what is divided by, or whose logarithm is taken


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
    sections: tuple[int, ...] = (0, 0, 0, 0)  # pairs per position, mrope and imrope

    def __post_init__(self) -> None:
        if self.n_rot < 0 or self.n_rot % 2:
            raise ValueError(f"n_rot: expected an even number >= 0, got {self.n_rot}")
        if self.freq_factors is not None:
            expect_shape("freq_factors", self.freq_factors, (self.n_rot // 2,))
        if self.ext_factor != 0 and self.n_ctx_orig <= 0:
            raise ValueError(f"n_ctx_orig: expected > 0 for YaRN, got {self.n_ctx_orig}")
        if self.layout in ("mrope", "imrope") and (
            sum(self.sections) <= 0 or min(self.sections) < 0
        ):
            raise ValueError(f"sections: expected a positive sum, got {self.sections}")
        for name in ("freq_base", "freq_scale", "beta_fast", "beta_slow"):
            if not _SMALLEST <= getattr(self, name) <= 1 / _SMALLEST:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.ext_factor != 0 and self.freq_base == 1:
            raise ValueError("freq_base: expected another number than 1 for YaRN")


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
    context_factor = _yarn_magnitude(factor, 1.0) / _yarn_magnitude(factor, yarn_log_mul)
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
    if rope.layout in ("mrope", "imrope"):
        sector = np.arange(len(pair)) % sum(rope.sections)  # [n_pairs]
        in_turn = 3 * np.asarray(rope.sections)[sector % 3]  # [n_pairs]: t, h, w, t, ...
        end = in_turn if rope.layout == "imrope" else sum(rope.sections[:3])
        # The fourth position, which is 0 in text, turns nothing (ggml_mrope_cache_init).
        frequency = np.where(sector < end, frequency, 0.0)  # [n_pairs]
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


def apply_rope(x: Floats, positions: Ints, rope: Rope) -> Floats:
    """Rotate x [n_seqs, n_head, n_tokens, head_dim] by positions [n_seqs, n_tokens].

    (a, b) -> m (a cos θ - b sin θ), m (a sin θ + b cos θ) (ggml-cpu/ops.cpp, rotate_pairs), where
    m = attn_factor, times 1 + 0.1 ln(1/freq_scale) under YaRN. Dimensions from n_rot on are
    copied, not scaled by m. Raises ValueError if shapes do not fit.
    """
    if x.ndim != 4 or x.shape[-1] < rope.n_rot:
        raise ValueError(f"x: expected (n_seqs, n_head, n_tokens, >= {rope.n_rot}), got {x.shape}")
    expect_shape("positions", positions, (x.shape[0], x.shape[2]))
    angles = rope_angles(rope, positions)[:, None]  # [n_seqs, 1, n_tokens, n_pairs]
    magnitude = rope.attn_factor
    if rope.ext_factor != 0:
        magnitude *= 1.0 + 0.1 * math.log(1.0 / rope.freq_scale)
    cos = (magnitude * np.cos(angles)).astype(x.dtype)  # [n_seqs, 1, n_tokens, n_pairs]
    sin = (magnitude * np.sin(angles)).astype(x.dtype)  # [n_seqs, 1, n_tokens, n_pairs]
    half, n_rot = rope.n_rot // 2, rope.n_rot
    first, second = slice(0, half), slice(half, n_rot)
    if rope.layout == "norm":
        first, second = slice(0, n_rot, 2), slice(1, n_rot, 2)
    a, b = x[..., first], x[..., second]  # [n_seqs, n_head, n_tokens, n_pairs] each
    y = x.copy()  # [n_seqs, n_head, n_tokens, head_dim]
    y[..., first] = a * cos - b * sin  # [n_seqs, n_head, n_tokens, n_pairs]
    y[..., second] = a * sin + b * cos  # [n_seqs, n_head, n_tokens, n_pairs]
    return y
