"""Who sees whom, and the numbers that attention adds."""

from __future__ import annotations

import numpy as np

from gguf_fuse.attention.masks import Window, additive_mask, alibi_slopes, padded_positions


def test_masks_say_who_sees_whom() -> None:
    q_positions = np.array([[4, 5], [1, 2]])
    k_positions = padded_positions([6, 3], 7)
    assert k_positions.tolist() == [[0, 1, 2, 3, 4, 5, -1], [0, 1, 2, -1, -1, -1, -1]]

    def seen(causal: bool = True, window: Window | None = None) -> list[list[list[int]]]:
        mask = additive_mask(q_positions, k_positions, causal=causal, window=window)
        return [[np.flatnonzero(row == 0).tolist() for row in rows] for rows in mask]

    assert seen() == [[[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]], [[0, 1], [0, 1, 2]]]
    assert seen(window=Window(2)) == [[[3, 4], [4, 5]], [[0, 1], [1, 2]]]
    assert seen(window=Window(4, chunked=True)) == [[[4], [4, 5]], [[0, 1], [0, 1, 2]]]
    assert seen(causal=False) == [[[0, 1, 2, 3, 4, 5]] * 2, [[0, 1, 2]] * 2]


def test_masks_as_numbers() -> None:
    positions = np.array([[2]]), np.array([[0, 1, 2, 3, -1]])
    inf = np.inf
    assert additive_mask(*positions).tolist() == [[[0, 0, 0, -inf, -inf]]]
    assert additive_mask(*positions, alibi=True).tolist() == [[[-2, -1, 0, -inf, -inf]]]
    assert additive_mask(*positions, causal=False, alibi=True)[0, 0, 3] == -1  # both directions


def test_alibi_slopes() -> None:
    assert alibi_slopes(8, 8).tolist() == [2.0**-i for i in range(1, 9)]
    # Not a power of two: 8 as above, then every other slope of 16 heads (ALiBi's own rule).
    sixteen = alibi_slopes(16, 8)
    assert alibi_slopes(12, 8).tolist() == [*alibi_slopes(8, 8), *sixteen[:8:2]]
    assert alibi_slopes(5, 0).tolist() == [1] * 5
    assert alibi_slopes(1, 8).tolist() == [2.0**-8]
