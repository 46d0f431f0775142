"""How long several ways to do the same take.

They take turns, so that a busy moment of the machine meets each of them, and the median counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

MIN_REPEATS, MAX_REPEATS = 5, 51
BUDGET_S = 2.0  # for the repeats of all ways


def interleaved(
    ways: Mapping[str, Callable[[], object]], budget_s: float | None = None
) -> dict[str, float]:
    """Median milliseconds of each way, from turns until the budget, in seconds, is spent.

    Each turn begins with a call that is not timed, so that no way pays for what the one before it
    leaves: cold caches, sleeping threads, threads that spin a while after their last work.
    """
    budget_s = BUDGET_S if budget_s is None else budget_s
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    started = time.perf_counter()
    for turn in range(MAX_REPEATS):
        if turn >= MIN_REPEATS and time.perf_counter() - started > budget_s:
            break
        for name, way in ways.items():
            way()
            begun = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begun)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
