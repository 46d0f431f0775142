"""Ways take turns, and the median counts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gguf_fuse.measuring import timing


def test_ways_take_turns() -> None:
    calls: list[str] = []
    ways = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    ms = timing.interleaved(ways, budget_s=0.0)
    assert set(ms) == {"a", "b"}
    assert calls == list("aabb") * timing.MIN_REPEATS  # each turn: one call to settle, one timed


def test_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the calls move; the first call of each turn, the longest, is no time."""
    now = 0.0
    costs = iter([100.0, 1.0, 100.0, 9.0, 100.0, 2.0, 100.0, 30.0, 100.0, 5.0])

    def way() -> None:
        nonlocal now
        now += next(costs)

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    assert timing.interleaved({"a": way}, budget_s=0.0) == {"a": 5000.0}
