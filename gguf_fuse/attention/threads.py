"""Work shared by threads, with BLAS held to one thread in each of them."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped, unused-ignore]


def cpu_count() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def blas() -> ThreadpoolController:
    """The loaded BLAS libraries. Kept: finding them takes milliseconds, a limit microseconds."""
    return ThreadpoolController()


@contextlib.contextmanager
def blas_threads(n_threads: int) -> Iterator[None]:
    """Hold BLAS to n_threads threads, here and in threads started inside.

    The limit is the whole process's: two callers at once would restore each other's number.
    """
    with blas().limit(limits=n_threads, user_api="blas"):
        yield


def run_on_threads(work: Callable[[], None], n_threads: int) -> None:
    """Run work() on n_threads threads, this one included, with BLAS held to one thread in each.

    Returns when all have ended; raises what work() raised, on any of them.
    """
    settings = np.geterr()

    def help_out() -> None:
        with np.errstate(**settings):  # a new thread would not have the caller's settings
            work()

    with blas_threads(1):
        helpers: list[Future[None]] = []
        try:
            for _ in range(n_threads - 1):
                helpers.append(_pool(n_threads - 1).submit(help_out))
        except RuntimeError:  # no more threads to be had: fewer do the same
            _pool.cache_clear()
        try:
            work()
        finally:
            errors = [helper.exception() for helper in helpers]  # waits for them
    for error in filter(None, errors):
        raise error


@functools.cache
def _pool(n_workers: int) -> ThreadPoolExecutor:
    # Kept: starting threads for each decoded token would cost more than a short decode.
    return ThreadPoolExecutor(n_workers, thread_name_prefix="split-kv")


if hasattr(os, "register_at_fork"):  # a child has the pools of its parent, but not their threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
