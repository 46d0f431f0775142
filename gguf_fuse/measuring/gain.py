"""What samples of time tell: their middle half, whether one way is faster, or that none can tell.

Pure: the same samples always give the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

# One way's, in any unit of time: [n_rounds], or [n_rounds, n_samples] with several in each round.
Samples: TypeAlias = Sequence[float] | Sequence[Sequence[float]] | npt.NDArray[np.float64]
Word: TypeAlias = Literal["faster", "slower", "no difference seen", "too few rounds"]

NOISY = 0.2  # a middle half wider than this share of its median says little
MIN_SAMPLES = 5  # with fewer, a middle half says nothing
MIN_ROUNDS = 9  # with fewer, one busy moment may have met all of one way
CONFIDENCE = 0.95
RESAMPLED = 2000


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of n samples, and the quartiles between which the middle half of them lies."""

    n: int
    low: float
    median: float
    high: float

    @property
    def width(self) -> float:
        return self.high - self.low

    @property
    def few(self) -> bool:
        return self.n < MIN_SAMPLES

    @property
    def noisy(self) -> bool:
        return self.few or self.width > NOISY * self.median


@dataclass(frozen=True, slots=True)
class Gain:
    """ratio: how many times as fast `after` is as `before`; low, high: its 95 % interval."""

    ratio: float
    low: float
    high: float
    word: Word

    @property
    def seen(self) -> bool:
        return self.word in ("faster", "slower")


def spread(samples: Samples) -> Spread:
    """Of all samples, whatever their round."""
    times = np.asarray(samples, np.float64)
    low, median, high = np.quantile(times, (0.25, 0.5, 0.75)).tolist()
    return Spread(times.size, low, median, high)


def gain(before: Samples, after: Samples) -> Gain:
    """Compare two ways that took turns: round i of both ran at about the same time.

    The ratio is that of the medians; its interval is a bootstrap over rounds (both ways keep their
    rounds together, so what slows both tells nothing), and over the samples inside a round. A
    difference is seen where the interval leaves out 1 and the medians differ by more than the width
    of either middle half: busy moments last for rounds, so the interval alone would be too sure.
    Fewer than MIN_ROUNDS rounds are too few to conclude from, however many samples each has.
    For speeds instead of times, pass their reciprocals. Raises ValueError unless both ways have
    as many rounds, at least one, with as many samples in each.
    """
    times = np.array([before, after], np.float64)  # [2, n_rounds] or [2, n_rounds, n_samples]
    if times.size == 0:
        raise ValueError("gain: expected at least one round")
    times = times.reshape(*times.shape[:2], -1)  # [2, n_rounds, n_samples]
    old, new = spread(times[0]), spread(times[1])
    low, high = _interval(times)
    ratio = old.median / new.median
    if times.shape[1] < MIN_ROUNDS:
        return Gain(ratio, low, high, "too few rounds")
    surely = abs(old.median - new.median) > max(old.width, new.width)
    word: Word = "no difference seen"
    if surely and low > 1:
        word = "faster"
    if surely and high < 1:
        word = "slower"
    return Gain(ratio, low, high, word)


def _interval(times: npt.NDArray[np.float64]) -> tuple[float, float]:
    """times [2, n_rounds, n_samples] -> the interval of the ratio of medians."""
    random = np.random.default_rng(0)
    _, n_rounds, n_samples = times.shape
    rounds = random.integers(n_rounds, size=(RESAMPLED, n_rounds, 1))
    medians = []
    for way in times:  # [n_rounds, n_samples]
        inside = random.integers(n_samples, size=(RESAMPLED, n_rounds, n_samples))
        medians.append(np.median(way[rounds, inside], axis=(1, 2)))  # [RESAMPLED]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians[0] / medians[1], (tail, 1 - tail)).tolist()
    return low, high
