"""Models and runs that several test files need."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import threadpoolctl  # type: ignore[import-untyped, unused-ignore]

from gguf_fuse.api import Options, Result, fuse, unfuse
from tests import pack
from tests.models.random_model import ModelSpec, write_random_model
from tests.server import Run, serve

# Tests rewrite thousands of small files: none of them has to survive a power failure.
FAST = Options(sync=False)


def pytest_configure() -> None:
    """A run in the background ignores Ctrl-C, and so would every command that is started here."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def wide_terminal() -> Iterator[None]:
    """What commands print is not wrapped, however long the paths of temporary files are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "1000")
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the harnesses counted: see `tests.writing.harness`."""
    for report in terminalreporter.getreports("passed"):
        for name, told in report.user_properties:
            if name == "harness":
                terminalreporter.write_line(f"harness: {told}")


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """Write a random model: model("name.gguf", n_layer=2, ...)."""

    def make(name: str = "in.gguf", **spec: Any) -> Path:
        write_random_model(tmp_path / name, ModelSpec(**spec))
        return tmp_path / name

    return make


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A small sound model, packed by hand."""
    return pack.save(pack.valid(), tmp_path / "in.gguf")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a tmpfs")
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "none", str(tmp_path)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run a command at little cost, and measured: see `tests.server`."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork and wait4")
    with serve(tmp_path_factory.mktemp("server")) as ask:
        yield ask


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


def gguf_fuse(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[Any]:
    """The command in a process of its own, as a shell starts it."""
    command = [sys.executable, "-m", "gguf_fuse", *map(str, arguments)]
    settings = {"stdout": PIPE, "stderr": PIPE, "text": True, "timeout": 120} | options
    return subprocess.run(command, check=False, **settings)


def let_others_in(folder: Path) -> None:
    """Open the folder, and those of root around it, to other users."""
    while folder != Path("/") and folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o001:
        folder.chmod(0o755)
        folder = folder.parent


def blas_threads() -> list[int]:
    """Of each BLAS that is loaded: how many threads it may use now."""
    infos = threadpoolctl.threadpool_info()
    return [info["num_threads"] for info in infos if info["user_api"] == "blas"]
