"""Commands in processes forked from a server that has imported everything.

So each one's processor time and peak memory are the tool's own and can be held to a bound, and a
thousand of them take seconds. The fixture `run` is a server that is up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.pack import save, valid

MAX_SECONDS = 1.0  # of processor time, beyond what --version takes
MAX_MEMORY = 200 << 20
MAX_LINE = 2000  # a line that scrolls the screen away is not a clear one
COMMANDS = ("fuse", "unfuse", "inspect")

# Limits that only keep a defect from hurting the machine: the tests measure, and ask for less.
_SERVER = """
import contextlib, functools, io, json, os, resource, signal, sys, traceback
import typer.main
from gguf_fuse import cli
# Each call builds all commands anew, which takes longer than what they then do.
typer.main.get_command = functools.cache(typer.main.get_command)
for arguments in json.loads(sys.argv[1]):  # import whatever is imported only on use
    sys.argv = ["gguf-fuse", *arguments]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        with contextlib.suppress(SystemExit):
            cli.main()
for line in sys.stdin:
    job = json.loads(line)
    if (child := os.fork()) == 0:
        # As a shell starts it: not ignored, as after the first command here, or in the background.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        for fd, path in ((1, job["out"]), (2, job["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        signal.alarm(30)
        resource.setrlimit(resource.RLIMIT_CPU, (6, 6))
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
        if job["uid"]:
            os.setuid(job["uid"])
        sys.argv, code = ["gguf-fuse", *job["arguments"]], 0
        try:
            exec(job["prelude"])
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status, used = os.wait4(child, 0)
    kib = used.ru_maxrss // 1024 if sys.platform == "darwin" else used.ru_maxrss
    answer = [os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, kib * 1024]
    print(json.dumps(answer), flush=True)
"""


@dataclass(frozen=True)
class Outcome:
    """What a command did; seconds: of processor time beyond the start of the program."""

    code: int
    out: str
    err: str
    seconds: float
    memory: int


class Run(Protocol):
    def __call__(self, *arguments: str | Path, uid: int = 0, prelude: str = "") -> Outcome: ...


@contextmanager
def serve(folder: Path, warm: Sequence[Sequence[str]] = (), **variables: str) -> Iterator[Run]:
    """A server that is up; its streams and the files of its start lie in `folder`.

    warm: commands that it begins with; variables: of its environment. A run's `prelude` is Python
    that its process begins with.
    """
    out, err = folder / "out", folder / "err"
    pipe = subprocess.PIPE
    environment = (
        os.environ | variables | {"OPENBLAS_NUM_THREADS": "1"}
    )  # its buffers count as memory
    sound, fused, back = (str(folder / f"{name}.gguf") for name in ("sound", "fused", "back"))
    save(valid(), Path(sound))
    first = [*warm, ["fuse", sound, fused], ["unfuse", fused, back], ["fuse", sound, fused]]
    first += [["inspect", sound], ["inspect", f"{sound}.missing"]]
    command = [sys.executable, "-c", _SERVER, json.dumps(first)]
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
    assert server.stdin and server.stdout

    def ask(*arguments: str | Path, uid: int = 0, prelude: str = "") -> Outcome:
        assert server.stdin and server.stdout
        texts = [str(argument) for argument in arguments]
        job = {"arguments": texts, "out": str(out), "err": str(err), "uid": uid}
        job["prelude"] = prelude
        print(json.dumps(job), file=server.stdin, flush=True)
        code, seconds, memory = json.loads(server.stdout.readline())
        printed, complained = (
            path.read_bytes().decode(errors="surrogateescape") for path in (out, err)
        )
        return Outcome(code, printed, complained, seconds - baseline, memory)

    baseline = 0.0
    baseline = ask("--version").seconds
    yield ask
    server.stdin.close()
    server.wait()
    server.stdout.close()


def command_line(command: str, source: Path) -> list[str | Path]:
    """OUT is beside IN, so that whatever is left behind shows in the folder."""
    return [command, source] if command == "inspect" else [command, source, source.parent / "out"]


def assert_one_line(outcome: Outcome, *words: str, code: int = 1) -> None:
    """The contract of every failure."""
    assert "Traceback" not in outcome.err, outcome.err
    assert outcome.code == code, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("gguf-fuse: ")
    assert outcome.err.endswith("\n")
    line = outcome.err[:-1]
    assert line.isprintable(), f"not one line of plain text: {line!r}"
    assert [word for word in words if word not in line] == [], line
    assert len(line) < MAX_LINE, f"a line of {len(line)} characters: {line[:200]}..."


def assert_cheap(outcome: Outcome) -> None:
    assert outcome.seconds < MAX_SECONDS, outcome
    assert outcome.memory < MAX_MEMORY, f"{outcome.memory >> 20} MiB: {outcome}"
