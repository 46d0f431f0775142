"""How long several ways to do the same take.

They take turns, so that a busy moment of the machine meets each of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

MAX_ROUNDS = 25
SETTLED_S = 0.1  # who runs so long does not notice what the one before left behind

Ways: TypeAlias = Mapping[str, Callable[[], object]]
Times: TypeAlias = dict[str, list[float]]  # milliseconds by way, one for each round


def interleaved(ways: Ways, budget_s: float) -> Times:
    """Rounds in which every way has its turn: as many as fit into the seconds, but at least one."""
    times: Times = {name: [] for name in ways}
    started = ended = time.perf_counter()
    for _ in range(MAX_ROUNDS):
        begun = ended
        for name, way in ways.items():
            times[name].append(1e3 * _turn(way))
        ended = time.perf_counter()
        if 2 * ended - begun - started > budget_s:  # one more like this would be too much
            break
    return times


def _turn(way: Callable[[], object]) -> float:
    """Seconds of one call; of a short one, those of the second.

    So no way pays for what the one before it leaves: cold caches, sleeping threads, threads that
    spin a while after their last work.
    """
    seconds = _clocked(way)
    return seconds if seconds > SETTLED_S else _clocked(way)


def _clocked(way: Callable[[], object]) -> float:
    begun = time.perf_counter()
    way()
    return time.perf_counter() - begun
