"""Threads of split-KV decode: how many, at the same time, and what becomes of their errors."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import threadpoolctl  # type: ignore[import-untyped, unused-ignore]

from gguf_fuse.attention import split, threads
from gguf_fuse.attention.split import split_attention
from tests.attention.cases import cut, error, make_case
from tests.conftest import blas_threads


def test_blas_has_one_thread_inside_and_its_own_number_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside: list[list[int]] = []
    attend_chunk = split._attend_chunk

    def spy(*args: Any) -> None:
        inside.append(blas_threads())
        attend_chunk(*args)

    monkeypatch.setattr(split, "_attend_chunk", spy)
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        split_attention(*make_case(19, n_kv=1025).args, n_threads=2)
        assert blas_threads() == before
    assert inside and all(set(number) == {1} for number in inside)


THREE_CHUNKS = cut(1025, [0.3, 0.6])


def test_threads_work_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits in its chunk for the others."""
    meeting, names = threading.Barrier(3, timeout=10), set[str]()
    attend_chunk = split._attend_chunk

    def spy(*args: Any) -> None:
        meeting.wait()
        names.add(threading.current_thread().name)
        attend_chunk(*args)

    monkeypatch.setattr(split, "_attend_chunk", spy)
    case = make_case(18, n_seqs=1, n_kv=1025)
    got = split_attention(*case.args, chunks=THREE_CHUNKS, n_threads=3)
    assert len(names) == 3
    assert error(got, case.reference) <= case.floor


@pytest.mark.parametrize("number", [0, 1])
def test_an_error_in_one_helper_alone_reaches_the_caller(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Helpers that do nothing but end, one of them badly; the caller does all the work."""

    submitted = itertools.count()

    def submit(work: Callable[[], None]) -> Future[None]:
        future = Future[None]()
        broken = next(submitted) == number
        future.set_exception(RuntimeError("broken helper") if broken else None)
        return future

    monkeypatch.setattr(threads, "_pool", lambda n_workers: SimpleNamespace(submit=submit))
    case = make_case(18, n_seqs=1, n_kv=1025)
    with pytest.raises(RuntimeError, match="broken helper"):
        split_attention(*case.args, chunks=THREE_CHUNKS, n_threads=3)


def test_an_error_in_a_thread_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("broken chunk")

    before = blas_threads()
    monkeypatch.setattr(split, "_attend_chunk", fail)
    with pytest.raises(RuntimeError, match="broken chunk"):
        split_attention(*make_case(19, n_kv=1025).args, n_threads=3)
    assert blas_threads() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
def test_a_forked_child_has_threads_of_its_own() -> None:
    """It inherits the pool that its parent keeps, but not the threads in it."""
    case = make_case(18, n_seqs=1, n_kv=1025)
    wanted = split_attention(*case.args, chunks=THREE_CHUNKS, n_threads=3)
    if (child := os.fork()) == 0:
        signal.alarm(20)
        got = split_attention(*case.args, chunks=THREE_CHUNKS, n_threads=3)
        os._exit(0 if np.array_equal(got, wanted) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


_NO_THREADS = """
import os, resource, threading
from gguf_fuse.attention import split
from tests.attention.cases import cut, error, make_case
case = make_case(18, n_seqs=1, n_kv=1025)
os.setuid(65534)
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
try:
    threading.Thread(target=int).start()
except RuntimeError as refused:
    print(refused)
got = split.split_attention(*case.args, chunks=cut(1025, [0.3, 0.6]), n_threads=3)
assert error(got, case.reference) <= case.floor
"""


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="root limits another user")
def test_threads_that_cannot_start() -> None:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _NO_THREADS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (0, "can't start new thread\n"), done.stderr
