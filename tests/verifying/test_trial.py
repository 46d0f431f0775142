"""Faults in the mathematics are caught, and each way is what it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl  # type: ignore[import-untyped, unused-ignore]

from gguf_fuse.attention import attend, split
from gguf_fuse.attention.projections import Projections
from gguf_fuse.attention.shapes import Floats
from gguf_fuse.attention.softmax import AttentionParams
from gguf_fuse.verifying import trial
from tests.conftest import blas_threads, fused_copy
from tests.verifying.faults import QUICK, check

Model = Callable[..., Path]


def ignore_the_mask(
    q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams
) -> Floats:
    return attend.broadcast_attention(q, k, v, None, params)


def read_one_sequence_for_all(
    q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams
) -> Floats:
    first = [np.broadcast_to(part[:1], part.shape) for part in (k, v)]
    return attend.broadcast_attention(q, first[0], first[1], mask, params)


def take_heads_in_turn(
    q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams
) -> Floats:
    """Query head h reads h % n_head_kv, not h // group."""
    heads = np.arange(q.shape[1]) % k.shape[1]
    return attend.broadcast_attention(q, k[:, heads], v[:, heads], mask, params)


def add_sinks_per_chunk(
    q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams
) -> Floats:
    assert params.sinks is not None
    twice = AttentionParams(params.scale, sinks=params.sinks + np.float32(np.log(2)))
    return attend.broadcast_attention(q, k, v, mask, twice)


def mask_all_like_the_first(
    q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams
) -> Floats:
    """Caught only if sequences differ in length."""
    assert mask is not None
    return attend.broadcast_attention(q, k, v, np.broadcast_to(mask[:1], mask.shape), params)


def read_the_neighbour_of_a_cell(
    q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams
) -> Floats:
    """V of a stretch behind the prompt, one cell on; caught only if something is there."""
    shifted = v.copy()
    shifted[:, :, 12:50] = v[:, :, 13:51]
    return attend.broadcast_attention(q, k, shifted, mask, params)


def lose_some_precision(
    q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams
) -> Floats:
    """Caught only if the limit is near to what float32 costs: an F16 anywhere is 100 times this."""
    return attend.broadcast_attention(q, k, v, mask, params) * np.float32(1 + 5e-6)


@pytest.mark.parametrize(
    "fault",
    [
        ignore_the_mask,
        read_one_sequence_for_all,
        take_heads_in_turn,
        add_sinks_per_chunk,
        mask_all_like_the_first,
        read_the_neighbour_of_a_cell,
        lose_some_precision,
    ],
)
def test_faults_in_the_mathematics_are_caught(
    model: Model, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Floats]
) -> None:
    original = model(architecture="gpt-oss")
    fused = fused_copy(original)

    def faulty(*arguments: Any, n_threads: int) -> Floats:
        return fault(*arguments)

    monkeypatch.setattr(split, "split_attention", faulty)
    report = check(original, fused)
    assert report.structure.ok
    for layer in report.layers:
        assert [name for name, found in layer.checks.items() if not found.ok] == ["decode_split"]


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_every_decode_step_counts(
    model: Model, monkeypatch: pytest.MonkeyPatch, wrong: int
) -> None:
    original = model(n_layer=1)
    steps = iter(range(3))
    real = split.split_attention

    def faulty(*arguments: Any, **named: Any) -> Floats:
        assert named == {"n_threads": 3}
        out = real(*arguments, **named)
        return out * np.float32(1.1) if next(steps) == wrong else out

    monkeypatch.setattr(split, "split_attention", faulty)
    own = {"n_decode": 3, "threads": 3, "timed": False}
    (report,) = check(original, fused_copy(original), **own).layers
    assert [name for name, found in report.checks.items() if not found.ok] == ["decode_split"]


def test_each_way_is_timed_under_its_own_name(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    project = Projections.project

    def spy_project(projections: Projections, *arguments: Any) -> Any:
        calls.append("fused" if projections.fused else "separate")
        return project(projections, *arguments)

    monkeypatch.setattr(Projections, "project", spy_project)
    for word, module in (("expanded", attend), ("broadcast", attend), ("split", split)):
        way = getattr(module, f"{word}_attention")

        def spy(*arguments: Any, _way: Any = way, _word: str = word, **named: Any) -> Any:
            calls.append(_word)
            return _way(*arguments, **named)

        monkeypatch.setattr(module, f"{word}_attention", spy)

    taken: dict[str, str] = {}

    def time_nothing(ways: Mapping[str, Callable[[], object]], budget: float) -> dict[str, Any]:
        assert set(blas_threads()) == {QUICK.threads}
        for name, way in ways.items():
            calls.clear()
            way()
            taken[name] = calls[0]
        return {way: [1.0] for way in ways}

    monkeypatch.setattr(trial, "interleaved", time_nothing)
    with threadpoolctl.threadpool_limits(3, user_api="blas"):
        timing = check(*pair).timing
    assert taken == {
        "separate": "separate",
        "fused": "fused",
        "expand": "expanded",
        "broadcast": "broadcast",
        "split": "split",
    }
    assert timing is not None
    assert (timing.n_tokens, timing.n_kv) == (QUICK.n_seqs, QUICK.n_kv)
