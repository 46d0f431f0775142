"""A benchmark of a moment, one that did not run, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gguf_fuse.cli.entry import app
from gguf_fuse.measuring import bench as benchmark
from gguf_fuse.measuring import timing
from gguf_fuse.measuring.bench import Bench, DecodeRow, ProjectionRow, Shape


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark of a moment."""
    monkeypatch.setattr(benchmark, "N_TOKENS", (1, 3))
    monkeypatch.setattr(benchmark, "N_KV", (64, 100))
    monkeypatch.setattr(timing, "BUDGET_S", 0.0)
    monkeypatch.setattr(benchmark, "DEFAULT_SHAPE", Shape(32, 4, 2, 8, 8, (32, 16, 16)))


def run_bench(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def some_result() -> Bench:
    projection = (ProjectionRow(1, 1.0, 1.0), ProjectionRow(8, 2.0, 1.0))
    decode = tuple(DecodeRow(n, 8.0 * n, 2.0 * n, 1.0 * n, 0.5 * n) for n in (512, 1024))
    return Bench("default shape", Shape(), 2, projection, decode, (2048,))
