"""A benchmark of a moment, one that did not run, and the command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gguf_fuse.cli.entry import app
from gguf_fuse.measuring import bench as benchmark
from gguf_fuse.measuring.bench import Bench, Extent, Row, Shape

MOMENT = Extent((1, 3), (64, 100), 9.0, 9.0)  # 25 rounds end long before


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark of a moment."""
    monkeypatch.setattr(benchmark, "FULL", MOMENT)
    monkeypatch.setattr(benchmark, "DEFAULT_SHAPE", Shape(32, 4, 2, 8, 8, (32, 16, 16)))


def run_bench(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


class Timed(Bench):
    """A benchmark whose times are known: nine rounds, and what all of them took."""

    def projection(self) -> Iterator[Row]:
        for n_tokens, separate in zip(self.extent.n_tokens, (1.0, 2.0), strict=True):
            yield row(n_tokens, separate=separate, fused=1.0)

    def decode(self) -> Iterator[Row]:
        for n in self.extent.n_kv:
            yield row(n, expand=8.0 * n, broadcast=2.0 * n, split=1.0 * n, stream=0.5 * n)


def row(size: int, **ms: float) -> Row:
    """Nine rounds, all alike."""
    return Row(size, {way: [each] * 9 for way, each in ms.items()})


def timed() -> Timed:
    extent = Extent((1, 8), (512, 1024), 0.0, 0.0)
    return Timed("default shape", Shape(), 2, extent, too_large=(2048,))
