"""The benchmark: what it measures and how it tells; never how long anything takes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl  # type: ignore[import-untyped, unused-ignore]

from gguf_fuse.attention import attend, split
from gguf_fuse.attention.projections import Projections
from gguf_fuse.cli.bench import projection_verdict
from gguf_fuse.format.parser import read_header
from gguf_fuse.measuring import bench as benchmark
from gguf_fuse.measuring.bench import DecodeRow, ProjectionRow, Shape, bench, shape_of
from tests.conftest import blas_threads, fused_copy
from tests.measuring.conftest import run_bench, some_result

Model = Callable[..., Path]


def test_rows_are_what_was_asked_for(short: None) -> None:
    result = bench(threads=2)
    assert [row.n_tokens for row in result.projection] == [1, 3]
    assert [row.n_kv for row in result.decode] == [64, 100]
    for row in (*map(asdict, result.projection), *map(asdict, result.decode)):
        assert min(row.values()) > 0


@pytest.mark.parametrize("columns", [34, 40, 60, 100])
def test_no_digit_is_cut_off(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    row = DecodeRow(65536, 1234.0, 123.0, 12.3, 9.1)
    result = replace(some_result(), decode=(row,))
    monkeypatch.setattr(benchmark, "bench", lambda *arguments, **named: result)
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = run_bench().stdout.splitlines()
    assert max(map(len, shown)) <= columns
    (line,) = (line.split() for line in shown if line.startswith("65536"))
    assert line in (
        ["65536", "1234", "12.3", "74%"],
        ["65536", "1234", "123", "12.3", "9.1", "100.3", "x", "74%"],
    )


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
    monkeypatch.setattr(benchmark, "N_KV", (64, 600))  # `attend.attention` would split the 600
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    for module, name, _ in WAYS.values():

        def spy(*arguments: Any, _name: str = name, **named: Any) -> None:
            calls.append((_name, arguments, named))

        monkeypatch.setattr(module, name, spy)

    def time_nothing(ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        assert set(blas_threads()) == {threads}
        for name, way in ways.items():
            way()
            called, arguments, _ = calls[-1]
            assert called == WAYS[name][1]
            assert called != "project" or arguments[0].fused == (name == "fused")
        return {name: WAYS[name][2] for name in ways}

    monkeypatch.setattr(benchmark, "interleaved", time_nothing)
    with threadpoolctl.threadpool_limits(3, user_api="blas"):
        outcome = run_bench("--json", "--threads", str(threads))
    assert outcome.exit_code == 0, outcome.exception
    value = json.loads(outcome.stdout)
    assert value["projection"][1] == asdict(ProjectionRow(3, 1.0, 2.0))
    assert value["decode"][1] == asdict(DecodeRow(600, 3.0, 4.0, 5.0, 6.0))

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
    result = bench(threads=1)
    assert [row.n_kv for row in result.decode] == [64]
    assert result.left_out == (100,)
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


def test_json_is_as_documented(short: None) -> None:
    value = json.loads(run_bench("--json", "--threads", "2").stdout)
    assert set(value) == {"source", "shape", "threads", "projection", "decode", "left_out"}
    assert (value["source"], value["threads"]) == ("default shape", 2)
    shape = benchmark.DEFAULT_SHAPE
    assert value["shape"] == asdict(shape) | {"rows": list(shape.rows)}
    assert value["left_out"] == []
    assert {tuple(row) for row in value["projection"]} == {("n_tokens", "separate_ms", "fused_ms")}
    assert {tuple(row) for row in value["decode"]} == {
        ("n_kv", "expand_ms", "broadcast_ms", "split_ms", "stream_ms")
    }


def test_table_says_where_fusing_gains_nothing(short: None, model: Model) -> None:
    outcome = run_bench(model(), "--threads", "1")
    assert outcome.exit_code == 0
    for word in ("n_tokens", "separate", "fused", "n_kv", "broadcast", "split", "here, in numpy"):
        assert word in outcome.stdout


@pytest.mark.parametrize(
    ("separate", "expected"),
    [
        ((1.0, 1.04), "here, in numpy, fusing gains nothing (within 5%) at n_tokens 1, 8"),
        ((1.2, 1.0), "fusing gains at n_tokens 1; gains nothing (within 5%) at n_tokens 8"),
        ((0.8, 1.2), "fusing gains at n_tokens 8; costs at n_tokens 1"),
    ],
)
def test_the_verdict_follows_the_measurement(separate: tuple[float, float], expected: str) -> None:
    rows = [ProjectionRow(n, ms, 1.0) for n, ms in zip((1, 8), separate, strict=True)]
    assert expected in projection_verdict(rows)
