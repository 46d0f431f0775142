"""What samples tell: on samples whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from gguf_fuse.measuring.gain import Samples, gain, spread


def drawn(seed: int, median: float, noise: float, *shape: int) -> np.ndarray:
    """Log-normal around `median`, as times are."""
    return median * np.exp(noise * np.random.default_rng(seed).standard_normal(shape))


def test_the_middle_half() -> None:
    found = spread([9.0, 1.0, 3.0, 5.0, 7.0])
    assert (found.low, found.median, found.high) == (3.0, 5.0, 7.0)


@pytest.mark.parametrize(("high", "noisy"), [(1.19, False), (1.21, True)])
def test_noisy_is_a_middle_half_of_more_than_a_fifth(high: float, noisy: bool) -> None:
    assert spread([1.0, 1.0, 1.0, high, high]).noisy is noisy


@pytest.mark.parametrize(
    ("before", "after", "ratio", "word"),
    [
        ([2.0] * 9, [1.0] * 9, 2.0, "faster"),
        ([1.0] * 9, [2.0] * 9, 0.5, "slower"),
        ([1.0] * 9, [1.0] * 9, 1.0, "no difference seen"),
        ([2.0] * 8, [1.0] * 8, 2.0, "too few rounds"),
        ([[2.0, 2.1, 1.9]] * 9, [[1.0, 1.1, 0.9]] * 9, 2.0, "faster"),
        ([[2.0] * 9] * 2, [[1.0] * 9] * 2, 2.0, "too few rounds"),  # whatever they hold
    ],
)
def test_known_answers(before: Samples, after: Samples, ratio: float, word: str) -> None:
    found = gain(before, after)
    assert (found.ratio, found.word) == (pytest.approx(ratio), word)
    assert found.low <= found.ratio <= found.high
    assert gain(before, after) == found


def test_a_difference_inside_the_spread_is_none() -> None:
    """51 rounds of 30 % noise: the interval leaves out 1, but many a sample contradicts it."""
    before, after = drawn(1, 1.15, 0.3, 51), drawn(2, 1.0, 0.3, 51)
    found = gain(before, after)
    assert found.low > 1
    assert found.word == "no difference seen"


def test_what_slows_both_ways_tells_nothing() -> None:
    """Rounds up to ten times as slow as others, but `after` is 10 % faster in each."""
    busy = np.geomspace(1, 10, 15)
    found = gain(1.1 * busy, busy)
    assert found.low == pytest.approx(1.1)
    assert found.high == pytest.approx(1.1)


def test_rounds_count_and_not_samples() -> None:
    """Of two processes one was slow throughout: a hundred samples of each do not make it sure."""
    before, after = drawn(1, 1.0, 0.01, 2, 100), drawn(2, 1.0, 0.01, 2, 100)
    after[1] *= 0.8
    assert gain(before, after).low < 1.01
    assert gain(before, after).high > 1.2


def test_the_same_twice_is_no_difference() -> None:
    words = [gain(drawn(2 * i, 1, 0.1, 9), drawn(2 * i + 1, 1, 0.1, 9)).word for i in range(200)]
    assert words.count("no difference seen") >= 0.95 * len(words)


def test_the_interval_holds_the_truth() -> None:
    found = [gain(drawn(2 * i, 1.3, 0.1, 15), drawn(2 * i + 1, 1, 0.1, 15)) for i in range(200)]
    assert sum(each.low <= 1.3 <= each.high for each in found) >= 0.9 * len(found)


@pytest.mark.parametrize(("before", "after"), [([], []), ([1.0], [1.0, 2.0])])
def test_samples_that_do_not_pair(before: Samples, after: Samples) -> None:
    with pytest.raises(ValueError):
        gain(before, after)
