"""Models and runs that several test files need."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import threadpoolctl  # type: ignore[import-untyped, unused-ignore]

from gguf_fuse.api import Options, Result, fuse, unfuse
from gguf_fuse.random_model import ModelSpec, write_random_model

# Tests rewrite thousands of small files: none of them has to survive a power failure.
FAST = Options(sync=False)

Run = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session", autouse=True)
def wide_terminal() -> Iterator[None]:
    """What commands print is not wrapped, however long the paths of temporary files are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "1000")
        yield


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """Write a random model: model("name.gguf", n_layer=2, ...)."""

    def make(name: str = "in.gguf", **spec: Any) -> Path:
        write_random_model(tmp_path / name, ModelSpec(**spec))
        return tmp_path / name

    return make


def fused_copy(path: Path, **kwargs: Any) -> Path:
    """The fused file beside `path`."""
    output = path.with_name(f"{path.stem}-fused.gguf")
    fuse(path, str(output), options=FAST, **kwargs)
    return output


def unfused_copy(path: Path, **kwargs: Any) -> Path:
    output = path.with_name(f"{path.stem}-unfused.gguf")
    unfuse(path, str(output), options=FAST, **kwargs)
    return output


def dry(path: Path, **kwargs: Any) -> Result:
    """What fusing would do."""
    return fuse(path, str(path) + ".out", options=Options(dry_run=True), **kwargs)


def gguf_fuse(*arguments: str | Path, **kwargs: Any) -> Run:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "gguf_fuse", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)


def blas_threads() -> list[int]:
    """Of each BLAS that is loaded: how many threads it may use now."""
    infos = threadpoolctl.threadpool_info()
    return [info["num_threads"] for info in infos if info["user_api"] == "blas"]
