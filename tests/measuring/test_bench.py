"""The benchmark: what it measures and how it tells; never how long anything takes."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import threadpoolctl  # type: ignore[import-untyped, unused-ignore]

from gguf_fuse.attention import attend, split
from gguf_fuse.attention.projections import Projections
from gguf_fuse.cli.bench import projection_verdict
from gguf_fuse.cli.entry import app
from gguf_fuse.format.parser import read_header
from gguf_fuse.measuring import bench as benchmark
from gguf_fuse.measuring.bench import FULL, QUICK, Bench, Extent, Row, Shape, prepare, shape_of
from gguf_fuse.measuring.timing import Times, Ways
from tests.conftest import blas_threads, fused_copy
from tests.measuring.conftest import MOMENT, Timed, row, run_bench, timed

Model = Callable[..., Path]


def test_rows_are_what_was_asked_for(short: None) -> None:
    layer = prepare(threads=2, extent=MOMENT)
    projection, decode = list(layer.projection()), list(layer.decode())
    assert [row.size for row in projection] == [1, 3]
    assert [row.size for row in decode] == [64, 100]
    for times in (each.ms for each in (*projection, *decode)):
        assert min(map(min, times.values())) > 0


def show(monkeypatch: pytest.MonkeyPatch, layer: Bench, *arguments: str | Path) -> Any:
    """What the command does with this benchmark."""
    monkeypatch.setattr(benchmark, "prepare", lambda *arguments, **named: layer)
    return run_bench(*arguments)


class Wide(Timed):
    def decode(self) -> Iterator[Row]:
        yield row(65536, expand=1234.0, broadcast=123.0, split=12.3, stream=9.1)


@pytest.mark.parametrize("columns", [34, 40, 60, 80, 100])
def test_no_digit_is_cut_off(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    layer = Wide("default shape", Shape(), 2, MOMENT, too_large=())
    shown = show(monkeypatch, layer).stdout.splitlines()
    assert max(map(len, shown)) <= columns
    (line,) = (line.split() for line in shown if line.startswith("65536"))
    wide = "65536 1234 ±0% 123 ±0% 12.3 ±0% 9.1 ±0% 100.3 x 74%".split()
    assert line == (wide if columns >= 80 else ["65536", "1234", "12.3", "74%"])


def test_each_row_is_shown_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also into a pipe: the first row can be read while the second is being timed."""
    reader, writer = os.pipe()
    seen: list[str] = []

    class Watched(Timed):
        def decode(self) -> Iterator[Row]:
            for each in super().decode():
                yield each
                seen.append(os.read(reader, 1 << 16).decode())

    with os.fdopen(writer, "w") as pipe, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", pipe)
        patched.setattr(benchmark, "prepare", lambda *arguments, **named: Watched(*fields))
        fields = ("default shape", Shape(), 2, Extent((1, 8), (512, 1024), 0, 0), ())
        app(["bench"], standalone_mode=False)
    os.close(reader)
    assert "\n  512 " in seen[0]
    assert "\n 1024 " not in seen[0]
    assert seen[1].startswith(" 1024 ")


@pytest.mark.parametrize(
    ("decode", "told"),
    [
        ({"split": [1.0] * 9, "stream": [0.5] * 9}, ["8.0", "x", "50%"]),
        ({"split": [1.0] * 9, "stream": [0.5, 0.7, 0.9] * 3}, ["8.0", "x", "noisy"]),
        ({"split": [1.0, 8.0, 20.0] * 3, "stream": [0.5] * 9}, ["none", "seen", "6%"]),
        ({"split": [1.0] * 8, "stream": [0.5] * 8}, ["too", "few", "50%"]),
        ({"split": [1.0] * 4, "stream": [0.5] * 4}, ["too", "few", "noisy"]),
    ],
)
def test_noise_is_not_told_as_fact(
    monkeypatch: pytest.MonkeyPatch, decode: dict[str, list[float]], told: list[str]
) -> None:
    rounds = len(decode["split"])
    ms = {"expand": [8.0] * rounds, "broadcast": [2.0] * rounds, **decode}

    class Noisy(Timed):
        def decode(self) -> Iterator[Row]:
            yield Row(512, ms)

    layer = Noisy("default shape", Shape(), 2, Extent((1, 8), (512,), 0, 0), ())
    shown = show(monkeypatch, layer).stdout
    (line,) = (line.split() for line in shown.splitlines() if line.startswith("  512"))
    assert line[-len(told) :] == told
    assert ("noisy: reading itself varied" in shown) == (told[-1] == "noisy")
    assert ("too few rounds fitted into the time to conclude" in shown) == (rounds < 9)
    assert ("±?" in line) == (rounds == 4)


def test_few_rounds_tell_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    class Few(Timed):
        def projection(self) -> Iterator[Row]:
            yield Row(1, {"separate": [2.0] * 4, "fused": [1.0] * 4})

    layer = Few("default shape", Shape(), 2, timed().extent, ())
    shown = show(monkeypatch, layer).stdout
    (line,) = (line.split() for line in shown.splitlines() if line.startswith("       1 "))
    assert line == "1 2 ±? 1 ±? ? too few rounds".split()


@pytest.mark.parametrize(("extent", "most_s"), [(FULL, 53), (QUICK, 16)])
@pytest.mark.parametrize("slowness", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2])  # seconds for each size unit
def test_the_time_is_kept_on_any_machine(
    extent: Extent, most_s: float, slowness: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only the rounds move: the last round may end a little late."""
    now, sizes = 0.0, list[int]()

    def spend(ways: Ways, seconds: float) -> Times:
        nonlocal now
        a_round = slowness * sizes[-1]
        rounds = min(25, max(1, int(seconds / a_round)))
        now += rounds * a_round
        return {"only": [1e3 * a_round] * rounds}

    def no_ways(bench: Bench, *arguments: Any) -> Ways:
        sizes.append(arguments[-1])
        return {}

    monkeypatch.setattr(benchmark, "interleaved", spend)
    monkeypatch.setattr(benchmark, "_decode_ways", no_ways)
    monkeypatch.setattr(benchmark, "_projection_ways", no_ways)
    monkeypatch.setattr(benchmark, "_random", lambda *shape: np.zeros(0, np.float32))
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: now))
    layer = prepare(threads=1, extent=extent)
    projection, decode = list(layer.projection()), list(layer.decode())
    assert now <= most_s
    for rows, wanted in ((projection, extent.n_tokens), (decode, layer.extent.n_kv)):
        timed = tuple(each.size for each in rows)
        assert timed == wanted[: len(timed)] != ()
    assert decode[-1].size == layer.extent.n_kv[-1] or slowness > 1e-4


def test_sizes_without_time_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(Timed):
        def decode(self) -> Iterator[Row]:
            yield next(super().decode())

    layer = Late("default shape", Shape(), 2, timed().extent, (2048,))
    shown = show(monkeypatch, layer).stdout
    assert "left out, not enough free memory: n_kv 2048" in shown
    assert "left out, not enough time: n_kv 1024" in shown
    assert json.loads(show(monkeypatch, layer, "--json").stdout)["left_out"] == [1024, 2048]


def test_nothing_to_show_is_wrong_usage() -> None:
    outcome = run_bench("-q")
    assert outcome.exit_code == 2
    assert "-q leaves nothing to show" in " ".join(outcome.stderr.split())


WAYS = {  # by what is timed: who is called, and a time to tell them apart
    "separate": (Projections, "project", 1.0),
    "fused": (Projections, "project", 2.0),
    "expand": (attend, "expanded_attention", 3.0),
    "broadcast": (attend, "broadcast_attention", 4.0),
    "split": (split, "split_attention", 5.0),
    "stream": (benchmark, "stream", 6.0),
}


@pytest.mark.parametrize("threads", [1, 2])
def test_every_column_is_what_it_says(
    short: None, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(benchmark, "DEFAULT_SHAPE", Shape(32, 4, 2, 8, 6, (32, 16, 12)))
    # `attend.attention` would split the 600
    monkeypatch.setattr(benchmark, "FULL", Extent((1, 3), (64, 600), 9.0, 9.0))
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    for module, name, _ in WAYS.values():

        def spy(*arguments: Any, _name: str = name, **named: Any) -> None:
            calls.append((_name, arguments, named))

        monkeypatch.setattr(module, name, spy)

    def time_nothing(ways: Ways, seconds: float) -> Times:
        assert set(blas_threads()) == {threads}
        for name, way in ways.items():
            way()
            called, arguments, _ = calls[-1]
            assert called == WAYS[name][1]
            assert called != "project" or arguments[0].fused == (name == "fused")
        return {name: [WAYS[name][2]] for name in ways}

    monkeypatch.setattr(benchmark, "interleaved", time_nothing)
    with threadpoolctl.threadpool_limits(3, user_api="blas"):
        outcome = run_bench("--json", "--threads", str(threads))
    assert outcome.exit_code == 0, outcome.exception
    value = json.loads(outcome.stdout)
    projection, decode = value["projection"][1], value["decode"][1]
    assert (projection["n_tokens"], decode["n_kv"]) == (3, 600)
    told = {way: (projection | decode)[f"{way}_ms"] for way in WAYS}
    assert told == {way: ms for way, (_, _, ms) in WAYS.items()}

    (_, expand, _), (_, broadcast, _), (_, split, named), (_, streamed, _) = calls[-4:]
    assert named == {"n_threads": threads}
    assert [array.shape for array in split[:3]] == [(1, 4, 1, 8), (1, 2, 600, 8), (1, 2, 600, 6)]
    assert all(a is b is c for a, b, c in zip(expand, broadcast, split, strict=True))
    (k, v), n_streams = streamed
    assert (k is split[1], v is split[2], n_streams) == (True, True, threads)


def test_default_shape_adds_up() -> None:
    shape = Shape()
    assert shape.rows == (
        shape.n_head * shape.head_dim,
        shape.n_head_kv * shape.head_dim,
        shape.n_head_kv * shape.head_dim_v,
    )


def test_shape_is_the_models(model: Model) -> None:
    path = model(n_head=4, n_head_kv=1, key_length=24, value_length=8)
    expected = Shape(64, 4, 1, 24, 8, (96, 24, 8))
    for each in (path, fused_copy(path)):
        source, shape = shape_of(read_header(each))
        assert shape == expected
        assert source == f"{each}, blk.0"


def test_a_gate_counts_among_the_rows(model: Model) -> None:
    _, shape = shape_of(read_header(model(architecture="qwen35")))
    assert shape.rows[0] == 2 * shape.n_head * shape.head_dim


def test_a_model_without_a_known_shape(model: Model) -> None:
    outcome = run_bench(model(architecture="bitnet"))
    assert outcome.exit_code == 1
    assert "not modelled" in outcome.stderr


def test_too_long_contexts_are_left_out(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        benchmark, "free_bytes", lambda: benchmark._decode_bytes(benchmark.DEFAULT_SHAPE, 64)
    )
    layer = prepare(threads=1, extent=MOMENT)
    assert [row.size for row in layer.decode()] == [64]
    assert layer.too_large == (100,)
    assert "left out, not enough free memory: n_kv 100" in run_bench("--threads", "1").stdout


def test_memory_of_a_decode_counts_the_copies() -> None:
    shape = Shape()
    k_and_v = 2 * 4 * shape.n_head_kv * shape.head_dim * 1000
    assert benchmark._decode_bytes(shape, 1000) > k_and_v * (1 + 32 // 8)


@pytest.mark.parametrize("threads", [1, 3])
def test_streaming_reads_everything_once(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(benchmark, "STREAM_BYTES", 400)
    monkeypatch.setattr(np, "dot", lambda a, b: seen.append(len(a)))
    arrays = [np.zeros((3, 41), np.float32), np.zeros((5, 41), np.float32)]
    benchmark.stream(arrays, threads)
    assert sum(seen) == 8 * 41
    assert max(seen) == 100


def test_streaming_ends_with_its_last_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits in its part for the others: 3 parts of 100 elements for 3 threads."""
    meeting, seen = threading.Barrier(3, timeout=10), list[int]()

    def dot(a: Any, b: Any) -> None:
        meeting.wait()
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.1)
        seen.append(len(a))

    monkeypatch.setattr(benchmark, "STREAM_BYTES", 400)
    monkeypatch.setattr(np, "dot", dot)
    benchmark.stream([np.zeros((3, 100), np.float32)], 3)
    assert seen == [100, 100, 100]


def test_json_is_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    value = json.loads(show(monkeypatch, timed(), "--json").stdout)
    shape = Shape()
    assert value.pop("processor")
    assert value.pop("projection")[1] == {
        "n_tokens": 8,
        "rounds": 9,
        "separate_ms": 2.0,
        "separate_quartiles_ms": [2.0, 2.0],
        "fused_ms": 1.0,
        "fused_quartiles_ms": [1.0, 1.0],
        "gain": {"ratio": 2.0, "low": 2.0, "high": 2.0, "word": "faster"},
    }
    row = value.pop("decode")[0]
    assert [row[f"{way}_ms"] for way in ("expand", "broadcast", "split", "stream")] == [
        4096.0,
        1024.0,
        512.0,
        256.0,
    ]
    assert (row["n_kv"], row["rounds"], row["noisy"]) == (512, 9, False)
    assert row["gain"] == {"ratio": 8.0, "low": 8.0, "high": 8.0, "word": "faster"}
    assert (value.pop("format"), value.pop("command")) == (1, "bench")
    assert (value.pop("exit_code"), value.pop("error")) == (0, None)
    assert value == {
        "source": "default shape",
        "shape": asdict(shape) | {"rows": list(shape.rows)},
        "threads": 2,
        "left_out": [2048],
    }


def test_table_says_where_fusing_gains_nothing(short: None, model: Model) -> None:
    outcome = run_bench(model(), "--threads", "1")
    assert outcome.exit_code == 0
    for word in ("n_tokens", "separate", "fused", "n_kv", "broadcast", "split", "here, in numpy"):
        assert word in outcome.stdout


@pytest.mark.parametrize(
    ("separate", "expected"),
    [
        ((1.0, 1.04), "no difference seen at n_tokens 1, 8"),
        ((1.2, 1.0), "faster at n_tokens 1; no difference seen at n_tokens 8"),
        ((0.8, 1.2), "faster at n_tokens 8; slower at n_tokens 1"),
    ],
)
def test_the_verdict_follows_the_measurement(separate: tuple[float, float], expected: str) -> None:
    noise = np.array(2 * [0.95, 0.97, 1.0, 1.03, 1.05])
    rows = [
        Row(n, {"separate": list(ms * noise), "fused": list(noise)})
        for n, ms in zip((1, 8), separate, strict=True)
    ]
    assert projection_verdict(rows) == f"here, in numpy, fused is: {expected}"
