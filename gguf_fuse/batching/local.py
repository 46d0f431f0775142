"""Tasks on this machine: so many processes at once, each fed by a thread."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

from gguf_fuse.batching.task import Entry, Task
from gguf_fuse.format.source import in_turn
from gguf_fuse.machine import free_bytes

JOB_BYTES = 400 << 20  # memory of one, numbers included
MOST_JOBS = 4  # more writers do not make a disk faster

# Called with the task, its bytes so far and all of them, None where that is not known yet.
OnBytes = Callable[[Task, int, int | None], None]


def default_jobs() -> int:
    """As many as cores, memory and a disk give work to."""
    return max(1, int(min(os.cpu_count() or 1, MOST_JOBS, free_bytes() // JOB_BYTES)))


def execute(
    jobs: int,
    on_bytes: OnBytes,
    tasks: Iterator[Task],
    begin: Callable[[Task], None],
    done: Callable[[Task, Entry], None],
) -> None:
    """Carry out the tasks. A process that dies fails its task alone.

    Raises what `begin` or `done` raise, and an interrupt, when all processes have ended.
    """
    lock, workers = threading.Lock(), set[_Worker]()

    def work(mine: Iterator[Task]) -> None:
        worker = _Worker()
        workers.add(worker)
        try:
            for task in mine:
                with lock:
                    begin(task)
                entry = worker.run(task, on_bytes)
                with lock:
                    done(task, entry)
        except BaseException:
            worker.interrupt()  # else its end would be waited for
            raise
        finally:
            worker.close()

    def interrupt() -> None:
        for worker in list(workers):
            worker.interrupt()

    in_turn(tasks, jobs, work, on_failure=interrupt)


class _Worker:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._interrupted = False
        self._process: subprocess.Popen[str] | None = None

    def run(self, task: Task, on_bytes: OnBytes) -> Entry:
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        total: int | None = None
        try:
            process.stdin.write(json.dumps(task.as_dict()) + "\n")
            process.stdin.flush()
        except OSError:
            return self._died(process, task)
        for line in process.stdout:
            event = json.loads(line)
            if "entry" in event:
                return Entry.of(event["entry"])
            total = event.get("total", total)
            on_bytes(task, event.get("bytes", 0), total)
        return self._died(process, task)

    def _started(self) -> subprocess.Popen[str]:
        with self._lock:
            if self._process is None and not self._interrupted:
                with _interrupts_wait():
                    # Ctrl-C on the terminal is for the batch, which passes it on once.
                    self._process = subprocess.Popen(
                        [sys.executable, "-m", "gguf_fuse.batching.worker"],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        text=True,
                        start_new_session=True,
                    )
            if self._process is None:
                raise KeyboardInterrupt
            return self._process

    def _died(self, process: subprocess.Popen[str], task: Task) -> Entry:
        code = process.wait()
        self._process = None
        if self._interrupted:
            raise KeyboardInterrupt
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        line = f"{task.input}: the process that fused it died ({how})"
        return Entry(task.input, task.output, task.settings, "failed", line, broken_off=True)

    def interrupt(self) -> None:
        with self._lock:
            self._interrupted = True
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(signal.SIGINT)

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """A process that is begun in the block is not interrupted before it lets itself be.

    Until it has loaded its modules, Python would print where it was.
    """
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
