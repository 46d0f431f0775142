"""Ways take turns until the time is spent."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from gguf_fuse.measuring import timing


class Clock:
    """Moved by the ways alone."""

    now = 0.0

    def way(self, *seconds: float) -> Callable[[], None]:
        costs = iter(seconds)

        def run() -> None:
            self.now += next(costs)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: made.now))
    return made


def test_ways_take_turns(clock: Clock) -> None:
    calls: list[str] = []
    ways = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = timing.interleaved(ways, budget_s=1.0)
    assert calls == list("aabb") * timing.MAX_ROUNDS  # each turn: one to settle, one that counts
    assert [len(each) for each in times.values()] == [timing.MAX_ROUNDS] * 2


def test_the_second_of_two_short_calls_counts(clock: Clock) -> None:
    short, long = clock.way(0.09, 0.01, 0.08, 0.02), clock.way(0.2, 0.3)
    times = timing.interleaved({"short": short, "long": long}, budget_s=0.7)
    assert times["short"] == pytest.approx([10, 20])
    assert times["long"] == pytest.approx([200, 300])


@pytest.mark.parametrize(("budget_s", "rounds"), [(0.0, 1), (5.9, 2), (6.0, 3), (100.0, 25)])
def test_rounds_end_before_the_time_does(clock: Clock, budget_s: float, rounds: int) -> None:
    times = timing.interleaved({"a": clock.way(*[2.0] * 25)}, budget_s)
    assert times == {"a": [2000.0] * rounds}
