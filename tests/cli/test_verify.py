"""verify: its table, and the limits of what it may take."""

from __future__ import annotations

import functools
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import fused_copy, gguf_fuse

Model = Callable[..., Path]


@pytest.mark.parametrize("columns", [30, 45, 60, 100])
def test_how_near_to_the_limit_is_always_shown(model: Model, columns: int) -> None:
    original = model()
    environment = {**os.environ, "COLUMNS": str(columns)}
    done = gguf_fuse("verify", original, fused_copy(original), env=environment)
    assert max(map(len, done.stdout.splitlines())) <= columns
    assert "limit" in done.stdout
    for line in done.stdout.splitlines():
        assert not line.startswith("blk.") or line.rstrip().endswith("%")


@pytest.mark.parametrize("sizes", [("--n-kv", 1 << 24), ("--n-prompt", 1 << 24)])
def test_more_than_the_memory_is_refused_beforehand(model: Model, sizes: tuple[str, int]) -> None:
    original = model()
    done = gguf_fuse("verify", original, fused_copy(original), *sizes, "--n-seqs", 5000)
    assert (done.returncode, done.stdout) == (1, "")
    line = (
        rf"gguf-fuse: {original}: blk.0: computing takes about \d+\.\d GB of memory, .* are free; "
    )
    assert re.match(line + "lower --n-prompt, --n-seqs or --n-kv\n$", done.stderr)


def test_too_little_memory_is_one_line(model: Model) -> None:
    """For this process alone, as in a container."""
    original = model()
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_AS, (1 << 30, 1 << 30))
    files = original, fused_copy(original)
    done = gguf_fuse("verify", *files, "--n-kv", 1 << 20, preexec_fn=limit)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("gguf-fuse: not enough memory: Unable to allocate")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--n-prompt", "--n-decode", "--n-seqs", "--n-kv"])
@pytest.mark.parametrize("value", [0, (1 << 24) + 1, 10**30])
def test_counts_have_limits(option: str, value: int) -> None:
    done = gguf_fuse("verify", "a.gguf", "b.gguf", option, value)
    assert (done.returncode, done.stdout) == (2, "")
    assert option in done.stderr
