"""Tasks on a Dask cluster: one file each, so that a scheduler has little to do.

Workers read inputs and write outputs under the same paths as the client, which alone keeps the
ledger. Needs the extra `dask`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from gguf_fuse.batching.task import Entry, Task, carry_out
from gguf_fuse.format.source import GGUFError

AHEAD = 2  # tasks that each thread of the cluster has before it: the client's memory stays flat
TRIES = 3  # workers that a failing file is tried on: one may lack the disk that the others have
CONNECT_S = 20


def execute(
    address: str,
    jobs: int,
    tasks: Iterator[Task],
    begin: Callable[[Task], None],
    done: Callable[[Task, Entry], None],
) -> None:
    """Carry out the tasks on the cluster of a scheduler; "local": on one of `jobs` processes here.

    Raises GGUFError where there is no Dask or no scheduler, and what `begin` or `done` raise.
    """
    with _client(address, jobs) as client:
        _submit_all(client, tasks, begin, done)


@contextlib.contextmanager
def _client(address: str, jobs: int) -> Iterator[Any]:
    try:
        dask: Any = importlib.import_module("dask.distributed")
    except ImportError as error:
        raise GGUFError(
            f"--dask needs Dask: pip install 'gguf-fuse[dask]' ({error.name} is missing)"
        ) from error
    with contextlib.ExitStack() as stack:
        if address == "local":
            cluster = dask.LocalCluster(
                n_workers=jobs, threads_per_worker=1, dashboard_address=None
            )
            address = stack.enter_context(cluster).scheduler_address
        try:
            yield stack.enter_context(dask.Client(address, timeout=CONNECT_S))
        except (OSError, ValueError) as error:
            raise GGUFError(f"--dask {address}: {error or 'no answer'}") from error


def work(told: dict[str, Any]) -> dict[str, Any]:
    """On a worker: the task and its entry as plain values, and who did it."""
    dask: Any = importlib.import_module("dask.distributed")
    return {"entry": carry_out(Task.of(told)).as_dict(), "worker": dask.get_worker().address}


def _submit_all(
    client: Any,
    tasks: Iterator[Task],
    begin: Callable[[Task], None],
    done: Callable[[Task, Entry], None],
) -> None:
    dask: Any = importlib.import_module("dask.distributed")
    tried: dict[str, tuple[Task, list[str]]] = {}  # by key: on which workers it failed
    running = dask.as_completed()

    def submit(task: Task, failed_on: list[str], **where: Any) -> None:
        future = client.submit(work, task.as_dict(), pure=False, **where)
        tried[future.key] = task, failed_on
        running.add(future)

    for task in itertools.islice(tasks, max(1, AHEAD * sum(client.nthreads().values()))):
        begin(task)
        submit(task, [])
    for future in running:
        task, failed_on = tried.pop(future.key)
        entry, worker = _result(future, task)
        future.release()
        others = sorted(set(client.nthreads()) - {*failed_on, worker})
        if entry.result == "failed" and worker and others and len(failed_on) + 1 < TRIES:
            # What could not be verified there is ours.
            again = dataclasses.replace(task, replace=task.replace or bool(entry.outputs))
            submit(again, [*failed_on, worker], workers=others)
            continue
        done(task, entry)
        following = next(tasks, None)
        if following is not None:
            begin(following)
            submit(following, [])


def _result(future: Any, task: Task) -> tuple[Entry, str]:
    """The entry, and the worker that made it; "": those that had the task died."""
    error = future.exception()
    if error is None:
        told = future.result()
        return Entry.of(told["entry"]), told["worker"]
    line = f"{task.input}: {type(error).__name__}: {error}".splitlines()[0]
    return Entry(task.input, task.output, task.settings, "failed", line, broken_off=True), ""
