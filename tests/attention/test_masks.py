"""Who sees whom, and the numbers that attention adds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gguf_fuse.attention.masks import (
    additive_mask,
    alibi_mask,
    alibi_slopes,
    padded_positions,
    see_chunk,
    see_filled,
    see_past,
    see_window,
)


def test_masks_say_who_sees_whom() -> None:
    q_positions = np.array([[4, 5], [1, 2]])
    k_positions = padded_positions([6, 3], 7)
    assert k_positions.tolist() == [[0, 1, 2, 3, 4, 5, -1], [0, 1, 2, -1, -1, -1, -1]]

    def seen(visible: NDArray[np.bool_]) -> list[list[list[int]]]:
        return [[np.flatnonzero(row).tolist() for row in rows] for rows in visible]

    past = see_past(q_positions, k_positions)
    assert seen(past) == [[[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]], [[0, 1], [0, 1, 2]]]
    window = past & see_window(q_positions, k_positions, 2)
    assert seen(window) == [[[3, 4], [4, 5]], [[0, 1], [1, 2]]]
    chunk = past & see_chunk(q_positions, k_positions, 4)
    assert seen(chunk) == [[[4], [4, 5]], [[0, 1], [0, 1, 2]]]
    everything = see_filled(q_positions, k_positions)
    assert seen(everything) == [[[0, 1, 2, 3, 4, 5]] * 2, [[0, 1, 2]] * 2]


def test_masks_as_numbers() -> None:
    q_positions, k_positions = np.array([[2]]), np.array([[0, 1, 2, 3, -1]])
    visible = see_past(q_positions, k_positions)
    inf = np.inf
    assert additive_mask(visible).tolist() == [[[0, 0, 0, -inf, -inf]]]
    assert alibi_mask(visible, q_positions, k_positions).tolist() == [[[-2, -1, 0, -inf, -inf]]]
    visible = see_filled(q_positions, k_positions)
    assert alibi_mask(visible, q_positions, k_positions)[0, 0, 3] == -1  # both directions


def test_alibi_slopes() -> None:
    assert alibi_slopes(8, 8).tolist() == [2.0**-i for i in range(1, 9)]
    # Not a power of two: 8 as above, then every other slope of 16 heads (ALiBi's own rule).
    sixteen = alibi_slopes(16, 8)
    assert alibi_slopes(12, 8).tolist() == [*alibi_slopes(8, 8), *sixteen[:8:2]]
    assert alibi_slopes(5, 0).tolist() == [1] * 5
    assert alibi_slopes(1, 8).tolist() == [2.0**-8]
