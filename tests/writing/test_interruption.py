"""Whatever stops the writing: the destination is absent, old or complete, the input untouched."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gguf_fuse.api import Options, fuse
from gguf_fuse.format.source import GGUFError
from tests.compare import sha256
from tests.pack import F16, fused, valid

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches the writing through /proc")

OLD = b"what was there before"
# So that there is writing to be interrupted, for a while.
ONE_BY_ONE = ("--reflink", "never", "--threads", "1")
SLOWLY = """
import os, time
def slow_pwrite(*arguments, pwrite=os.pwrite):
    time.sleep(0.003)
    return pwrite(*arguments)
os.pwrite = slow_pwrite
"""


class Model:
    """A model of 75 MB, the hash of what it becomes, and a check that it is untouched."""

    def __init__(self, path: Path) -> None:
        file = valid(F16, n_layers=3, n_embd=2048)
        self.path, self.wanted = path, hashlib.sha256(fused(file).pack()).hexdigest()
        path.write_bytes(file.pack())
        self.n_bytes = path.stat().st_size
        self.hash, self.stat = sha256(path), self._status()

    def assert_untouched(self) -> None:
        assert self._status() == self.stat

    def _status(self) -> tuple[int, int, int, int]:
        status = self.path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    model = Model(tmp_path_factory.mktemp("big") / "in.gguf")
    yield model
    model.assert_untouched()
    assert sha256(model.path) == model.hash
    model.path.unlink()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the output goes; emptied at the end, for pytest keeps the folders of three runs."""
    yield tmp_path
    for path in tmp_path.iterdir():
        path.unlink()


# -- running ------------------------------------------------------------------------------------

Process = subprocess.Popen[str]


def start(*arguments: str | Path, prelude: str = "", **options: object) -> Process:
    """The command; `prelude` is Python that runs in the process before it."""
    # A shell that runs the tests in the background lets them ignore Ctrl-C, and nohup SIGHUP.
    heed = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    heed += "\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)"
    script = f"{heed}\n{prelude}\nfrom gguf_fuse.cli import main\nmain()"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(command, **streams)  # type: ignore[call-overload, no-any-return]


def finish(process: Process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out or "", err


def run(*arguments: str | Path, prelude: str = "", **options: object) -> tuple[int, str, str]:
    return finish(start(*arguments, prelude=prelude, **options))


def wait_written(process: Process | Forker, n_bytes: int) -> None:
    """Until the process has written so much, or is at its end."""
    counters = Path(f"/proc/{process.pid}/io")
    while process.poll() is None:
        with contextlib.suppress(OSError):
            values = dict(line.split(": ") for line in counters.read_text().splitlines())
            if int(values.get("wchar", 0)) >= n_bytes:
                return
        time.sleep(0.0005)


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name not in ("in.gguf", "out.gguf")]


def assert_one_line(result: tuple[int, str, str], *words: str, code: int = 1) -> None:
    status, out, err = result
    assert "Traceback" not in err, err
    assert (status, out) == (code, ""), err
    assert err.startswith("gguf-fuse: ")
    assert err.count("\n") == 1
    assert [word for word in words if word not in err] == [], err


# -- kill ---------------------------------------------------------------------------------------

# Seconds after the start; then parts of the bytes written; then calls, before and after.
DELAYS = (0.0, 0.04, 0.08, 0.12, 0.16)
PARTS = (0.0001, 0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9, 0.99)
CALLS = ("os.fsync", "before os.fsync", "publish", "before publish")
MOMENTS: tuple[float | str, ...] = (*DELAYS, *(f"{part:.2%}" for part in PARTS), *CALLS)

_KILL = """
import os, pathlib, signal
def dying(call, before):
    def die(*arguments):
        if not before:
            call(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)
    return die
{call} = dying({call}, {before})
"""


# Forks a process per line that it reads: starting Python takes longer than the writing.
_FORKER = """
import json, os, sys
import gguf_fuse.api, gguf_fuse.cli.layers
for line in sys.stdin:
    prelude, sys.argv = json.loads(line)
    if (child := os.fork()) == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        exec(prelude)
        gguf_fuse.cli.main()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forker:
    """Like `start` and `finish`, for one command at a time whose output does not matter."""

    def __init__(self) -> None:
        command, pipe = [sys.executable, "-c", _FORKER], subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        assert self.process.stdin and self.process.stdout
        self.orders, self.answers, self.pid = self.process.stdin, self.process.stdout, 0

    def start(self, *arguments: str, prelude: str) -> None:
        print(json.dumps([prelude, ["gguf-fuse", *arguments]]), file=self.orders, flush=True)
        self.pid = int(self.answers.readline())

    def poll(self) -> int | None:
        return None if Path(f"/proc/{self.pid}").exists() else 0

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def finish(self) -> int:
        return int(self.answers.readline())


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    forker = Forker()
    yield forker
    forker.process.communicate()


def start_and_kill(moment: float | str, arguments: list[str], forker: Forker) -> int:
    if isinstance(moment, float):
        process = start(*arguments, "--no-sync", prelude=SLOWLY)
        time.sleep(moment)
        process.kill()
        return finish(process)[0]
    if moment.endswith("%"):
        forker.start(*arguments, "--no-sync", prelude=SLOWLY)
        n_bytes = Path(arguments[1]).stat().st_size
        wait_written(forker, int(float(moment[:-1]) / 100 * n_bytes))
        forker.kill()
    else:
        before, _, call = moment.rpartition(" ")
        if call == "publish":  # what --force replaces is renamed over, else a second name is given
            call = "pathlib.Path.replace" if "-f" in arguments else "os.link"
        forker.start(*arguments, prelude=_KILL.format(call=call, before=bool(before)))
    return forker.finish()


def test_there_are_twenty_moments() -> None:
    assert len(MOMENTS) == 20


@pytest.mark.parametrize("old", [None, OLD], ids=["absent", "old"])
def test_killed(old: bytes | None, model: Model, folder: Path, forker: Forker) -> None:
    """SIGKILL cannot be caught: only the order of the steps protects the destination."""
    out, n_hits, n_published = folder / "out.gguf", 0, 0
    arguments = ["fuse", str(model.path), str(out), *ONE_BY_ONE, *(["-f"] if old else [])]
    for moment in MOMENTS:
        if old:
            out.write_bytes(old)
        code = start_and_kill(moment, arguments, forker)
        assert code in (0, -signal.SIGKILL), moment
        model.assert_untouched()
        if out.exists() and out.stat().st_size != len(OLD):  # it came too late: all is there
            assert sha256(out) == model.wanted, moment
            assert not str(moment).startswith(("os.", "before")), moment
            n_published += 1
            out.unlink()
        else:
            assert code != 0
            assert moment != "publish"
            assert (out.read_bytes() if out.exists() else None) == old, moment
        stale = temporaries(folder)
        assert len(stale) <= 2, f"{moment}: a stale temporary was touched or used again: {stale}"
        n_hits += bool(stale)
        for path in stale:
            assert path.name.startswith("out.gguf.gguf-fuse-"), "not to be recognised"
            assert path.suffix != ".gguf", "would be taken for a model"
        for path in stale[1:]:  # one stays, in the way of the next run
            path.unlink()
    assert n_hits >= 12, "the kills came too early or too late to mean anything"
    assert n_published <= 8
    assert len(temporaries(folder)) == 1
    assert run(*arguments, "--no-sync")[0] == 0
    assert sha256(out) == model.wanted


# -- signals that can be caught -----------------------------------------------------------------


@pytest.mark.parametrize("old", [None, OLD], ids=["absent", "old"])
@pytest.mark.parametrize("part", [0.0001, 0.3, 0.9])
def test_ctrl_c(part: float, old: bytes | None, model: Model, folder: Path) -> None:
    out = folder / "out.gguf"
    if old:
        out.write_bytes(old)
    process = start("fuse", model.path, out, "-f", "--no-sync", *ONE_BY_ONE, prelude=SLOWLY)
    wait_written(process, int(part * model.n_bytes))
    process.send_signal(signal.SIGINT)
    assert_one_line(finish(process), "interrupted", "nothing was written", code=130)
    assert [path.read_bytes() for path in folder.iterdir()] == ([old] if old else [])
    model.assert_untouched()


def test_ctrl_c_while_waiting_for_the_disk(model: Model, folder: Path) -> None:
    prelude = "import os, signal\nos.fsync = lambda fd: os.kill(os.getpid(), signal.SIGINT)"
    result = run("fuse", model.path, folder / "out.gguf", prelude=prelude)
    assert_one_line(result, "interrupted", code=130)
    assert list(folder.iterdir()) == []


_INTERRUPTED = """
import os, signal
def link(*names, link=os.link):
    link(*names)
    os.kill(os.getpid(), signal.SIGINT)
os.link = link
"""


@pytest.mark.parametrize("shards", [(), ("--split-max-tensors", "9")], ids=["one file", "shards"])
def test_ctrl_c_in_the_midst_of_the_renaming(
    shards: tuple[str, ...], model: Model, folder: Path
) -> None:
    """The new file has two names at that moment, and neither stays."""
    result = run("fuse", model.path, folder / "out.gguf", *shards, prelude=_INTERRUPTED)
    assert_one_line(result, "interrupted", "nothing was written", code=130)
    assert list(folder.iterdir()) == []


def test_impatient_ctrl_c(model: Model, folder: Path) -> None:
    process = start(
        "fuse", model.path, folder / "out.gguf", "--no-sync", *ONE_BY_ONE, prelude=SLOWLY
    )
    wait_written(process, model.n_bytes // 10)
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        time.sleep(0.002)
    code, out, _ = finish(process)
    assert code not in (0, 1)
    assert out == ""
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGTERM, 143)]
)
def test_a_second_signal_does_not_break_the_first(
    number: signal.Signals, expected: int, model: Model, folder: Path
) -> None:
    """A closing terminal sends SIGHUP, and a supervisor SIGTERM right behind it."""
    process = start("fuse", model.path, folder / "out.gguf", "--no-sync", prelude=SLOWLY)
    wait_written(process, model.n_bytes // 10)
    process.send_signal(number)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code in (expected, 128 + signal.SIGTERM)  # the system may hand over either first
    assert "Traceback" not in err
    assert out == ""
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("delay", [0.02, 0.1, 0.18, 0.26])
def test_ctrl_c_at_the_start(delay: float, model: Model, folder: Path) -> None:
    """Python itself may print a traceback this early; half a file must not be left."""
    process = start("fuse", model.path, folder / "out.gguf", "--no-sync", *ONE_BY_ONE)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    code = finish(process)[0]
    assert temporaries(folder) == []
    if (folder / "out.gguf").exists():  # it came too late, perhaps while the table was printed
        assert sha256(folder / "out.gguf") == model.wanted
    else:
        assert code != 0
    model.assert_untouched()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_terminated(number: signal.Signals, model: Model, folder: Path) -> None:
    process = start(
        "fuse", model.path, folder / "out.gguf", "--no-sync", *ONE_BY_ONE, prelude=SLOWLY
    )
    wait_written(process, model.n_bytes // 3)
    process.send_signal(number)
    code, out, err = finish(process)
    assert code in (-number, 128 + number)
    assert out == ""
    assert "Traceback" not in err
    assert list(folder.iterdir()) == []


def test_ctrl_c_at_a_pipe(model: Model) -> None:
    process = start("fuse", model.path, "-", encoding="latin-1")
    assert process.stdout
    process.stdout.read(1000)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert err.startswith("gguf-fuse: interrupted")
    assert err.count("\n") == 1


# -- names and durability -----------------------------------------------------------------------


def test_the_longest_of_names(model: Model, folder: Path) -> None:
    """255 bytes, in characters of three: the temporary name beside it must fit as well."""
    out = folder / ("\N{CJK UNIFIED IDEOGRAPH-6A21}" * 83 + "x.gguf")
    assert len(os.fsencode(out.name)) == 255
    assert run("fuse", model.path, out, "--no-sync")[0] == 0
    assert sha256(out) == model.wanted


_TELL_SYNC = """
import os, stat, sys
def fsync(fd, fsync=os.fsync):
    fsync(fd)
    print("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file", file=sys.stderr)
os.fsync = fsync
"""


@pytest.mark.parametrize(("flag", "told"), [("--sync", "file folder"), ("--no-sync", "")])
def test_the_new_name_is_flushed_after_the_data(
    flag: str, told: str, model: Model, folder: Path
) -> None:
    """Without the folder a power failure could still take the file's name."""
    code, _, err = run("fuse", model.path, folder / "out.gguf", flag, prelude=_TELL_SYNC)
    assert (code, err.split()) == (0, told.split())


# -- full disks ---------------------------------------------------------------------------------

# What a disk without room for the file does, where free space is not known or not reserved.
_FREE_SPACE_LIES = """
import collections, shutil
usage = collections.namedtuple("usage", "total used free")
shutil.disk_usage = lambda path: usage(1 << 40, 0, 1 << 40)
"""
_NOTHING_IS_RESERVED = """
import ctypes
class Library:
    def __getattr__(self, name):
        return lambda *arguments: 0
ctypes.CDLL = lambda *arguments, **options: Library()
"""


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


@pytest.mark.parametrize("old", [None, OLD], ids=["absent", "old"])
@pytest.mark.parametrize("sync", ["--sync", "--no-sync"])
@pytest.mark.parametrize(
    ("prelude", "words"),
    [
        ("", ("are needed", "are free")),
        (_FREE_SPACE_LIES, ("No space left on device", "nothing was written")),
        (
            _FREE_SPACE_LIES + _NOTHING_IS_RESERVED,
            ("No space left on device", "nothing was written"),
        ),
    ],
    ids=["seen before", "seen when space is reserved", "seen in the midst"],
)
def test_full_disk(
    prelude: str,
    words: tuple[str, ...],
    sync: str,
    old: bytes | None,
    model: Model,
    small_disk: Path,
) -> None:
    out = small_disk / "out.gguf"
    if old:
        out.write_bytes(old)
    result = run("fuse", model.path, out, sync, "-f", prelude=prelude)
    assert_one_line(result, str(out), *words)
    assert [path.read_bytes() for path in small_disk.iterdir()] == ([old] if old else [])
    model.assert_untouched()


def test_full_disk_on_a_dry_run(model: Model, small_disk: Path) -> None:
    result = run("fuse", model.path, small_disk / "out.gguf", "--dry-run")
    assert_one_line(result, "are needed", "are free")


def test_full_disk_behind_standard_output(model: Model, small_disk: Path) -> None:
    with (small_disk / "out.gguf").open("wb") as out:
        result = run("fuse", model.path, "-", stdout=out)
    assert_one_line(result, "standard output: No space left on device")


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50 << 20, 50 << 20))


@pytest.mark.parametrize("prelude", ["", _NOTHING_IS_RESERVED])
def test_file_may_not_grow_so_large(prelude: str, model: Model, folder: Path) -> None:
    out = folder / "out.gguf"
    result = run("fuse", model.path, out, prelude=prelude, preexec_fn=limit_file_size)
    assert_one_line(result, str(out), "File too large", "nothing was written")
    assert list(folder.iterdir()) == []


def test_file_behind_standard_output_may_not_grow_so_large(model: Model, folder: Path) -> None:
    """The error comes in the midst: nothing tells the size before."""
    with (folder / "out.gguf").open("wb") as out:
        result = run("fuse", model.path, "-", stdout=out, preexec_fn=limit_file_size)
    assert_one_line(result, "standard output: File too large")


@pytest.mark.parametrize("error", ["EIO", "EDQUOT", "ENOSPC"])
@pytest.mark.parametrize("call", ["fsync", "pwrite"])
def test_write_error(error: str, call: str, model: Model, folder: Path) -> None:
    """The disk fails, or the flush does, which is where delayed errors come to light."""
    prelude = f"""
import errno, os
def fail(*arguments):
    raise OSError(errno.{error}, os.strerror(errno.{error}))
os.{call} = fail
"""
    result = run("fuse", model.path, folder / "out.gguf", prelude=prelude)
    assert_one_line(result, "out.gguf", "nothing was written")
    assert list(folder.iterdir()) == []


def test_read_error(model: Model, folder: Path) -> None:
    prelude = """
import errno, os
def fail(*arguments):
    raise OSError(errno.EIO, os.strerror(errno.EIO))
os.preadv = fail
"""
    result = run("fuse", model.path, folder / "out.gguf", prelude=prelude)
    assert_one_line(result, str(model.path), "Input/output error")
    assert list(folder.iterdir()) == []


# -- the input changes --------------------------------------------------------------------------


def touch(path: Path) -> None:
    os.utime(path)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


@pytest.mark.parametrize("change", [touch, append, cut, empty])
@pytest.mark.parametrize("when", ["first", "last"])
def test_input_changes_while_it_is_copied(
    when: str, change: Callable[[Path], None], tmp_path: Path
) -> None:
    source, out = tmp_path / "in.gguf", tmp_path / "out.gguf"
    file = valid(F16, n_layers=4, n_embd=512)
    source.write_bytes(file.pack())
    left, changed = [len(fused(file).pack())], False

    def on_progress(n_bytes: int) -> None:
        nonlocal changed
        left[0] -= n_bytes
        if not changed and (when == "first" or left[0] < 1 << 20):
            changed = True
            change(source)

    with pytest.raises(GGUFError, match=r"in\.gguf: .*(changed|cut) while it was read"):
        fuse(source, str(out), options=Options(sync=False, threads=1, on_progress=on_progress))
    assert changed
    assert list(tmp_path.iterdir()) == [source]


def test_input_is_cut_while_it_goes_into_a_pipe(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    source = tmp_path / "in.gguf"
    source.write_bytes(valid(F16, n_layers=4, n_embd=512).pack())
    options = Options(on_progress=lambda n_bytes: cut(source))
    with pytest.raises(GGUFError, match=r"in\.gguf: ended at byte \d+: it was cut while it was"):
        fuse(source, "-", options=options)
    assert capfdbinary.readouterr().out.startswith(b"GGUF")


@pytest.mark.parametrize("change", [touch, append, cut, empty, replace, Path.unlink])
def test_input_changes_before_it_is_copied(change: Callable[[Path], None], tmp_path: Path) -> None:
    """Between the reading of the header and the copying."""
    source, out = tmp_path / "in.gguf", tmp_path / "out.gguf"
    source.write_bytes(valid().pack())
    options = Options(sync=False, on_start=lambda n_bytes: change(source))
    with pytest.raises(GGUFError, match=r"in\.gguf: (changed while|No such file)"):
        fuse(source, str(out), options=options)
    assert not out.exists()
    assert temporaries(tmp_path) == []


def test_input_grows_while_the_command_runs(model: Model, folder: Path) -> None:
    """A download that goes on."""
    source = folder / "in.gguf"
    source.write_bytes(model.path.read_bytes())
    process = start("fuse", source, folder / "out.gguf", *ONE_BY_ONE, prelude=SLOWLY)
    wait_written(process, model.n_bytes // 5)
    append(source)
    assert_one_line(finish(process), str(source), "changed while it was read")
    assert list(folder.iterdir()) == [source]


def test_output_appears_while_the_command_runs(model: Model, folder: Path) -> None:
    """Without --force, another program's file is not replaced, even one that was not there yet."""
    out = folder / "out.gguf"
    process = start("fuse", model.path, out, "--no-sync", *ONE_BY_ONE, prelude=SLOWLY)
    wait_written(process, model.n_bytes // 5)
    out.write_bytes(OLD)
    assert_one_line(finish(process), str(out), "--force")
    assert out.read_bytes() == OLD
    assert list(folder.iterdir()) == [out]


def test_two_runs_at_once(model: Model, folder: Path) -> None:
    """Into one destination: each has a temporary of its own."""
    out = folder / "out.gguf"
    processes = [start("fuse", model.path, out, "-f", "--no-sync") for _ in range(2)]
    assert [finish(process)[0] for process in processes] == [0, 0]
    assert sha256(out) == model.wanted
    assert list(folder.iterdir()) == [out]


# -- pipes and permissions ----------------------------------------------------------------------


def test_reader_of_the_pipe_goes_away(model: Model) -> None:
    process = start("fuse", model.path, "-", encoding="latin-1")
    assert process.stdout
    process.stdout.read(1000)
    process.stdout.close()
    assert process.stderr
    err = process.stderr.read()
    assert process.wait() == 1
    assert err.startswith("gguf-fuse: standard output: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_reader_of_the_table_goes_away(options: list[str], model: Model) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = start("inspect", model.path, *options, stdout=write_end)
    os.close(write_end)
    code, _, err = finish(process)
    assert code == 1
    assert "Traceback" not in err, err
    assert err.count("\n") <= 1


def test_whole_pipe(model: Model, tmp_path: Path) -> None:
    with (tmp_path / "all").open("wb") as all_bytes:
        process = start("fuse", model.path, "-")
        reader = subprocess.run(["cat"], stdin=process.stdout, stdout=all_bytes, check=True)
    assert (reader.returncode, process.wait()) == (0, 0)
    assert sha256(tmp_path / "all") == model.wanted
    (tmp_path / "all").unlink()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_those_of_a_new_file_or_of_the_old_one(umask: int, tmp_path: Path) -> None:
    source, out = tmp_path / "in.gguf", tmp_path / "out.gguf"
    source.write_bytes(valid().pack())
    source.chmod(0o400)
    assert run("fuse", source, out, umask=umask)[0] == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o666 & ~umask
    out.chmod(0o640)
    assert run("fuse", source, out, "--force", umask=umask)[0] == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o640
    assert stat.S_IMODE(source.stat().st_mode) == 0o400
