"""Runs -> rows: what fusing gains in each test, and which way is the best. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from gguf_fuse.llama.bench import FUSED, OPTIMISED, SEPARATE, BenchTest, Run, Way
from gguf_fuse.measuring.gain import Gain, gain, spread

Runs: TypeAlias = Mapping[Way, Sequence[Run]]  # round by round; the last round may be incomplete


@dataclass(frozen=True)
class Row:
    """One test, without fusing and with it. separate, fused: medians in tokens per second."""

    test: BenchTest
    graph_opt: bool
    separate: float
    fused: float
    gain: Gain


@dataclass(frozen=True)
class Best:
    """The way with the highest median, and others that cannot be told from it."""

    test: BenchTest
    way: Way
    speed: float
    equal: tuple[Way, ...]


def rows(runs: Runs) -> list[Row]:
    """Of each test, in llama-bench's order."""
    pairs = [(SEPARATE, FUSED), (OPTIMISED[0], OPTIMISED[1])]
    turns = [(before.graph_opt, *_complete(runs, before, after)) for before, after in pairs]
    return [
        Row(
            test, graph_opt, median(before, test), median(after, test), compare(before, after, test)
        )
        for test in _tests(runs)
        for graph_opt, before, after in turns
        if before
    ]


def best(runs: Runs) -> list[Best]:
    """Of each test, among the ways that were run."""
    return [_best(runs, test) for test in _tests(runs)]


def _best(runs: Runs, test: BenchTest) -> Best:
    speeds = {way: median(done, test) for way, done in runs.items() if done}
    first = max(speeds, key=speeds.__getitem__)
    others = [way for way in speeds if way != first]
    compared = {way: compare(*_complete(runs, way, first), test) for way in others}
    equal = tuple(way for way, found in compared.items() if found.word != "faster")
    return Best(test, first, speeds[first], equal)


def _complete(runs: Runs, before: Way, after: Way) -> tuple[Sequence[Run], Sequence[Run]]:
    """Without the last round where only one of them has run in it."""
    n_rounds = min(len(runs.get(way, ())) for way in (before, after))
    return runs.get(before, ())[:n_rounds], runs.get(after, ())[:n_rounds]


def compare(before: Sequence[Run], after: Sequence[Run], test: BenchTest) -> Gain:
    """Of as many rounds of one way as of the other."""
    return gain(_times(before, test), _times(after, test))


def median(runs: Sequence[Run], test: BenchTest) -> float:
    """Tokens per second in the median time, over all samples of all rounds."""
    return 1 / spread(_times(runs, test)).median


def _times(runs: Sequence[Run], test: BenchTest) -> list[list[float]]:
    """Seconds per token: [n_rounds, n_samples]."""
    return [[1 / speed for speed in run.speeds[test]] for run in runs]


def _tests(runs: Runs) -> list[BenchTest]:
    return list(next(run for done in runs.values() for run in done).speeds)
