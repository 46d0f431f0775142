"""What can be wrong with the path of the output, or with standard output."""

from __future__ import annotations

import os
import pty
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import gguf_fuse, let_others_in
from tests.pack import fused, lora, save, valid
from tests.server import Run, assert_one_line
from tests.shards import in_three
from tests.writing.harness import contents


def test_output_is_the_input(run: Run, packed: Path) -> None:
    before = packed.read_bytes()
    (packed.parent / "soft.gguf").symlink_to("in.gguf")
    (packed.parent / "hard.gguf").hardlink_to(packed)
    (packed.parent / "folder").symlink_to(".")
    listing = sorted(packed.parent.iterdir())
    for out in ("in.gguf", "soft.gguf", "hard.gguf", "folder/in.gguf", "./in.gguf"):
        for options in ([], ["--force"], ["--dry-run"]):
            outcome = run("fuse", packed, f"{packed.parent}/{out}", *options)
            assert_one_line(outcome, Path(out).name, "same file")
    assert packed.read_bytes() == before
    assert sorted(packed.parent.iterdir()) == listing


def test_input_through_a_link_is_the_output(run: Run, packed: Path) -> None:
    link = packed.parent / "soft.gguf"
    link.symlink_to("in.gguf")
    assert_one_line(run("fuse", link, packed, "-f"), "same file")


def test_output_is_the_base(run: Run, packed: Path) -> None:
    """`--base` is only read as well, with all its shards, whatever name leads to them."""
    folder = packed.parent
    adapter = save(lora(), folder / "lora.gguf")
    shards = in_three(packed)
    (folder / "soft.gguf").symlink_to("in.gguf")
    (folder / "hard.gguf").hardlink_to(packed)
    (folder / "second.gguf").hardlink_to(shards[1])
    (folder / "third.gguf").symlink_to(shards[2])
    before = contents(folder)
    for base, out in (
        (packed, packed),
        (packed, folder / "soft.gguf"),
        (packed, folder / "hard.gguf"),
        (folder / "soft.gguf", packed),
        (shards[0], folder / "second.gguf"),
        (shards[0], folder / "third.gguf"),
    ):
        for options in (["--force"], ["--force", "--dry-run"]):
            outcome = run("fuse", adapter, out, "--base", base, *options)
            assert_one_line(outcome, "input and output are the same file")
    with shards[2].open("ab") as stream:
        done = gguf_fuse("fuse", adapter, "-", "--base", shards[0], stdout=stream)
    assert done.returncode == 1
    assert "input and standard output are the same file" in done.stderr
    assert contents(folder) == before


def test_output_exists(run: Run, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("precious")
    assert_one_line(run("fuse", packed, out), str(out), "exists", "--force")
    told = run("fuse", packed, out, "--dry-run")
    assert told.code == 0
    assert told.out.endswith(f"{out} is there already: --force replaces it\n")
    assert out.read_text() == "precious"
    assert sorted(tmp_path.iterdir()) == [packed, out]
    assert run("fuse", packed, out, "--force").code == 0
    assert out.read_bytes() == fused(valid()).pack()


def test_output_is_a_folder(run: Run, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for out in ("folder", "folder/", "", "."):
        outcome = run("fuse", packed, f"{tmp_path}/{out}", "-f")
        assert_one_line(outcome, "not a regular file")
    assert list((tmp_path / "folder").iterdir()) == []


def test_output_is_a_pipe_on_the_disk(run: Run, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "pipe"
    os.mkfifo(out)
    assert_one_line(run("fuse", packed, out, "-f"), str(out), "not a regular file")
    assert stat.S_ISFIFO(out.stat().st_mode)


def test_output_is_a_device(run: Run, packed: Path, tmp_path: Path) -> None:
    """The classic accident of root: `-o /dev/null` replaced by a file."""
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")
    assert_one_line(run("fuse", packed, device, "-f"), str(device), "not a regular file")
    assert stat.S_ISCHR(device.stat().st_mode)


def test_output_that_is_a_pipe_by_name(packed: Path, tmp_path: Path) -> None:
    done = gguf_fuse("fuse", packed, "/dev/stdout")
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        "/dev/stdout: not a regular file; use - as OUT to write to standard output" in done.stderr
    )


def test_output_with_a_slash_at_the_end(run: Run, packed: Path, tmp_path: Path) -> None:
    assert_one_line(run("fuse", packed, f"{tmp_path}/new/"), "new/: a folder")
    assert list(tmp_path.iterdir()) == [packed]


def test_output_in_a_missing_folder(run: Run, packed: Path, tmp_path: Path) -> None:
    outcome = run("fuse", packed, tmp_path / "no" / "out.gguf")
    assert_one_line(outcome, str(tmp_path / "no"), "does not exist")
    assert list(tmp_path.iterdir()) == [packed]


def test_output_below_a_file(run: Run, packed: Path, tmp_path: Path) -> None:
    assert_one_line(run("fuse", packed, packed / "out.gguf"), f"{packed} is not a folder")


def test_output_name_is_too_long(run: Run, packed: Path, tmp_path: Path) -> None:
    assert_one_line(run("fuse", packed, tmp_path / ("x" * 300)), "name too long")
    assert_one_line(run("fuse", packed, tmp_path / ("x" * 300) / "out"))
    assert list(tmp_path.iterdir()) == [packed]


def test_output_name_is_as_long_as_can_be(run: Run, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / ("\u00e9" * 125 + ".gguf")
    assert run("fuse", packed, out).code == 0
    assert sorted(tmp_path.iterdir()) == [packed, out]


def test_output_is_a_link_to_itself(run: Run, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "loop"
    out.symlink_to("loop")
    assert_one_line(run("fuse", packed, out), str(out), "symbolic links")


def test_output_through_a_broken_link(run: Run, packed: Path, tmp_path: Path) -> None:
    """The file appears where the link points; the link stays."""
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/out.gguf")
    assert run("fuse", packed, tmp_path / "link").code == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "out.gguf").read_bytes() == fused(valid()).pack()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="root can become another user")
def test_output_in_a_folder_of_someone_else(run: Run, tmp_path: Path) -> None:
    """Readable input, unwritable folder."""
    let_others_in(tmp_path)
    packed = save(valid(), tmp_path / "in.gguf")
    packed.chmod(0o644)
    outcome = run("fuse", packed, tmp_path / "out.gguf", uid=65534)
    assert_one_line(outcome, "Permission denied")
    assert list(tmp_path.iterdir()) == [packed]


def test_output_on_a_terminal(packed: Path) -> None:
    master, slave = pty.openpty()
    result = gguf_fuse("fuse", packed, "-", stdout=slave)
    os.close(slave)
    os.set_blocking(master, False)
    try:
        shown = os.read(master, 1000)
    except OSError:  # nothing was written
        shown = b""
    os.close(master)
    assert result.returncode == 2
    assert "terminal" in result.stderr
    assert shown == b""


def test_output_on_a_full_device(packed: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    for arguments in (("inspect", packed), ("inspect", packed, "--json"), ("fuse", packed, "-")):
        with Path("/dev/full").open("w") as full:
            result = gguf_fuse(*arguments, stdout=full)
        assert "Traceback" not in result.stderr, (arguments, result.stderr)
        assert result.returncode == 1
        assert result.stderr.startswith("gguf-fuse: standard output: ")
        assert result.stderr.count("\n") == 1


def test_arguments_like_those_of_gguf_split_merge(run: Run, packed: Path, tmp_path: Path) -> None:
    """L9498: a glob that matches two shards, and the second is taken for the output."""
    second = tmp_path / "in2.gguf"
    second.write_bytes(valid().pack())
    assert_one_line(run("fuse", packed, second), "exists", "--force")
    assert run("fuse", packed, second, tmp_path / "out.gguf").code == 2
    assert second.read_bytes() == valid().pack()


@pytest.mark.parametrize("out", ["-", "out.gguf"])
def test_standard_output_is_closed(out: str, packed: Path) -> None:
    script = f'"$0" -m gguf_fuse fuse "$1" {out} >&-'
    command = ["sh", "-c", script, sys.executable, str(packed)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=packed.parent, check=False)
    assert "Traceback" not in result.stderr, result.stderr
    assert result.returncode in ((1, 2) if out == "-" else (0,))
    assert packed.read_bytes() == valid().pack()


_NO_THREADS = """
import resource, threading
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
try:
    threading.Thread(target=int).start()
except RuntimeError:
    pass
else:
    os._exit(9)
"""


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="root can become another user")
def test_threads_that_cannot_start(run: Run, tmp_path: Path) -> None:
    """One copies what two would have."""
    let_others_in(tmp_path)
    packed = save(valid(), tmp_path / "in.gguf")
    folder = tmp_path / "out"
    folder.mkdir()
    folder.chmod(0o777)
    outcome = run("fuse", packed, folder / "out.gguf", uid=65534, prelude=_NO_THREADS)
    assert outcome.code == 0, outcome
    assert (folder / "out.gguf").read_bytes() == fused(valid()).pack()
