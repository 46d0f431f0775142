"""Whatever stops the writing: the destination is absent, old or complete, the input untouched."""

from __future__ import annotations

import contextlib
import hashlib
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


def wait_written(process: Process, n_bytes: int) -> None:
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


# -- signals that can be caught -----------------------------------------------------------------


@pytest.mark.parametrize("old", [None, OLD], ids=["absent", "old"])
def test_ctrl_c(old: bytes | None, model: Model, folder: Path) -> None:
    out = folder / "out.gguf"
    if old:
        out.write_bytes(old)
    process = start("fuse", model.path, out, "-f", "--no-sync", *ONE_BY_ONE, prelude=SLOWLY)
    wait_written(process, model.n_bytes // 3)
    process.send_signal(signal.SIGINT)
    assert_one_line(finish(process), "interrupted", "nothing was written", code=130)
    assert [path.read_bytes() for path in folder.iterdir()] == ([old] if old else [])
    model.assert_untouched()


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
FREE_SPACE_LIES = """
import collections, shutil
usage = collections.namedtuple("usage", "total used free")
shutil.disk_usage = lambda path: usage(1 << 40, 0, 1 << 40)
"""
NOTHING_IS_RESERVED = """
import ctypes
class Library:
    def __getattr__(self, name):
        return lambda *arguments: 0
ctypes.CDLL = lambda *arguments, **options: Library()
"""


@pytest.mark.parametrize("old", [None, OLD], ids=["absent", "old"])
@pytest.mark.parametrize("sync", ["--sync", "--no-sync"])
@pytest.mark.parametrize(
    ("prelude", "words"),
    [
        ("", ("are needed", "are free")),
        (FREE_SPACE_LIES, ("No space left on device", "nothing was written")),
        (
            FREE_SPACE_LIES + NOTHING_IS_RESERVED,
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


@pytest.mark.parametrize("prelude", ["", NOTHING_IS_RESERVED])
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
@pytest.mark.parametrize("mode", [0o400, 0o664, 0o6755, 0o1777])
def test_permissions_are_those_of_the_input(mode: int, umask: int, tmp_path: Path) -> None:
    """Whatever a replaced file had."""
    source, out = tmp_path / "in.gguf", tmp_path / "out.gguf"
    source.write_bytes(valid().pack())
    source.chmod(mode)
    assert run("fuse", source, out, umask=umask)[0] == 0
    assert stat.S_IMODE(out.stat().st_mode) == mode & 0o777 & ~umask
    out.chmod(0o6755)
    assert run("fuse", source, out, "--force", umask=umask)[0] == 0
    assert stat.S_IMODE(out.stat().st_mode) == mode & 0o777 & ~umask
    assert stat.S_IMODE(source.stat().st_mode) == mode


def test_nobody_else_can_open_a_file_that_is_not_whole(model: Model, folder: Path) -> None:
    process = start(
        "fuse", model.path, folder / "out.gguf", "--no-sync", *ONE_BY_ONE, prelude=SLOWLY
    )
    wait_written(process, model.n_bytes // 10)
    (growing,) = temporaries(folder)
    assert stat.S_IMODE(growing.stat().st_mode) == 0o600
    assert finish(process)[0] == 0


def test_input_changes_and_takes_its_time_back(tmp_path: Path) -> None:
    """As `touch -r` and programs that sync do: the time of the last change of its status tells."""
    source = tmp_path / "in.gguf"
    source.write_bytes(valid().pack())
    status = source.stat()

    def change(n_bytes: int) -> None:
        with source.open("r+b") as file:
            file.seek(-40, os.SEEK_END)
            file.write(b"x")
        os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))

    with pytest.raises(GGUFError, match=r"in\.gguf: changed while it was read, or was linked"):
        fuse(source, str(tmp_path / "out.gguf"), options=Options(on_start=change))
    assert list(tmp_path.iterdir()) == [source]
