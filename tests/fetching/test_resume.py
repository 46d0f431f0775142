"""A run that fetches is broken off: the same command goes on, and mixes nothing foreign in."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gguf_fuse.api import Options, Result, fuse, unfuse
from gguf_fuse.fetching import http
from gguf_fuse.format import source
from gguf_fuse.format.source import GGUFError
from gguf_fuse.planning.fusions import GATE_UP, QKV, SSM_IN
from gguf_fuse.verifying.manifest import verify_manifest
from tests import pack
from tests.conftest import FAST, fused_copy, gguf_fuse
from tests.fetching.server import Files, serve
from tests.fetching.test_http import FUSED, WHOLE
from tests.planning.test_old_layouts import qwen3next, with_ssm_in
from tests.server import Outcome, Run, assert_one_line
from tests.writing.test_interruption import FREE_SPACE_LIES, NOTHING_IS_RESERVED

BLOCK = 1 << 16
THREADS = 8
LATE = THREADS * BLOCK  # asked for by a run that was broken off, but seen by the server after it
HEADER = (1 << 20) + (1 << 10)  # what is fetched before anything is written: a window, padding
PRELUDE = f"""
from gguf_fuse import cli
from gguf_fuse.fetching import http
from gguf_fuse.format import source
source.FETCH_BYTES, source.FETCH_THREADS, http.FIRST_WAIT_S = {BLOCK}, {THREADS}, 0.01
"""
ENDED = PRELUDE + "import threading; threading.Timer({}, os.kill, (os.getpid(), {:d})).start()"

There = tuple[str, Files]


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[There]:
    monkeypatch.setattr(http, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(source, "FETCH_BYTES", BLOCK)
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "in.gguf").write_bytes(WHOLE)
    (folder / "fused.gguf").write_bytes(FUSED)
    with serve(folder) as (address, files):
        yield address, files


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """In a folder where all that is left behind is seen."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "out.gguf"


def broken(files: Files, write: Callable[[], Result], n_ranges: int = 40) -> str:
    """What is said when the server goes away after so many ranges. It comes back."""
    files.goes_after = n_ranges
    with pytest.raises(GGUFError) as caught:
        write()
    files.goes_after, files.asked = None, []
    return str(caught.value)


def left(out: Path) -> list[str]:
    return sorted(path.suffix for path in out.parent.iterdir())


def kept(out: Path, suffix: str) -> Path:
    return next(path for path in out.parent.iterdir() if path.suffix == suffix)


def journal_of(out: Path) -> tuple[dict[str, object], list[list[int]]]:
    first, *ranges = map(json.loads, kept(out, ".journal").read_text().splitlines())
    return first, ranges


def say(said: list[str], **options: bool) -> Options:
    return replace(FAST, on_resume=said.append, **options)


def test_the_server_goes_away_and_comes_back(there: There, out: Path) -> None:
    address, files = there
    line = broken(files, lambda: fuse(f"{address}/in.gguf", out, options=FAST))
    _, ranges = journal_of(out)
    n_kept = sum(n_bytes for _, _, n_bytes, _ in ranges)
    part = kept(out, ".part")
    assert re.fullmatch(r"out\.gguf\.gguf-fuse-[0-9a-f]{8}\.part", part.name)
    assert part.stat().st_mode & 0o777 == 0o600
    match = re.search(r"\(6 tries\); (\d+) of (\d+) bytes are kept in (.*): the same", line)
    assert match, line
    assert (int(match[1]), match[3]) == (n_kept, str(part))
    assert 30 * BLOCK < n_kept < int(match[2]) <= len(FUSED)
    said: list[str] = []
    result = fuse(f"{address}/in.gguf", out, options=say(said))
    assert said == [f"going on with {part}: {n_kept} of {match[2]} bytes are there"]
    assert result.written.n_resumed == n_kept
    assert out.read_bytes() == FUSED
    assert left(out) == [".gguf"]
    assert files.n_asked <= len(WHOLE) - n_kept + HEADER + 1 + LATE


def test_rows_that_lie_side_by_side_are_one_request(
    there: There, out: Path, model: Callable[..., Path]
) -> None:
    """qwen3next's ssm_in goes to two tensors, by the rows of each head."""
    address, files = there
    old = with_ssm_in(qwen3next(model, n_embd=256, n_layer=8))
    old.rename(files.folder / "old.gguf")
    fused_copy(files.folder / "old.gguf", fusions=(SSM_IN,)).rename(out.parent / "wanted")
    wanted = (out.parent / "wanted").read_bytes()
    split = functools.partial(
        fuse, f"{address}/old.gguf", out, fusions=(SSM_IN,), options=replace(FAST, force=True)
    )
    split()
    assert out.read_bytes() == wanted
    n_asked = len(files.asked)
    files.asked = []
    fuse(f"{address}/old.gguf", out.parent / "all.gguf", options=FAST)  # nothing is cut in two
    assert n_asked <= len(files.asked) + 8
    (out.parent / "all.gguf").unlink()
    broken(files, split, 40)
    assert split().written.n_resumed > 0
    assert out.read_bytes() == wanted


def test_unfuse(there: There, out: Path) -> None:
    address, files = there
    broken(files, lambda: unfuse(f"{address}/fused.gguf", out, options=FAST))
    assert unfuse(f"{address}/fused.gguf", out, options=FAST).written.n_resumed > 30 * BLOCK
    assert out.read_bytes() == WHOLE
    assert left(out) == [".gguf"]


def test_an_adapter_whose_parts_are_computed(
    there: There, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, files = there
    monkeypatch.setattr(source, "FETCH_BYTES", 64)
    pack.save(pack.lora(), files.folder / "lora.gguf")
    n_done = 0

    def stop(n_bytes: int) -> None:
        nonlocal n_done
        n_done += n_bytes
        if n_done > 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="bytes are kept in"):
        fuse(f"{address}/lora.gguf", out, options=replace(FAST, on_progress=stop))
    assert fuse(f"{address}/lora.gguf", out, options=FAST).written.n_resumed >= 200
    fuse(files.folder / "lora.gguf", out.with_name("wanted.gguf"), options=FAST)
    assert out.read_bytes() == out.with_name("wanted.gguf").read_bytes()


def test_shards_that_are_whole_are_not_fetched_again(there: There, out: Path) -> None:
    address, files = there
    options = replace(FAST, split_max_tensors=3)
    at_once = [path.read_bytes() for path in fuse(f"{address}/in.gguf", out, options=options).files]
    for path in out.parent.iterdir():
        path.unlink()
    line = broken(files, lambda: fuse(f"{address}/in.gguf", out, options=options), 80)
    assert f"-of-{len(at_once):05d}.gguf.gguf-fuse-" in line
    assert f" and {len(at_once) - 1} more: the same command goes on" in line
    n_kept = sum(n_bytes for _, _, n_bytes, _ in journal_of(out)[1])
    result = fuse(f"{address}/in.gguf", out, options=options)
    assert [path.read_bytes() for path in result.files] == at_once
    assert left(out) == [".gguf"] * len(at_once)
    assert files.n_asked <= len(WHOLE) - n_kept + HEADER + 1 + LATE


def test_killed_at_ten_moments(there: There, out: Path, run: Run) -> None:
    address, files = there
    run("inspect", f"{address}/in.gguf")
    n_header, files.asked = files.n_asked, []
    files.delay, block = 0.04, 1 << 14  # so that the whole takes longer than all runs together
    moments = random.Random(0)
    command = ("fuse", f"{address}/in.gguf", out, "--json")
    for _ in range(10):
        ended = ENDED.format(moments.uniform(0.2, 0.35), signal.SIGKILL)
        outcome = run(*command, prelude=ended.replace(str(BLOCK), str(block)))
        assert outcome.code == -signal.SIGKILL, outcome
        assert set(left(out)) <= {".part", ".journal"}
    files.delay = 0.0
    outcome = run(*command, prelude=PRELUDE)
    assert outcome.code == 0, outcome
    assert json.loads(outcome.out)["bytes_resumed"] > 10 * block
    assert out.read_bytes() == FUSED
    assert left(out) == [".gguf"]
    assert files.n_asked <= len(WHOLE) + 11 * n_header + 10 * THREADS * block


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(there: There, out: Path, run: Run, number: signal.Signals) -> None:
    address, files = there
    files.delay = 0.1  # 1.5 s in all
    stopped = run("fuse", f"{address}/in.gguf", out, prelude=ENDED.format(0.7, number))
    assert_one_line(stopped, " bytes are kept in ", "--no-resume", code=128 + number)
    files.delay = 0.0
    done = run("fuse", f"{address}/in.gguf", out, prelude=PRELUDE)
    assert done.code == 0
    assert re.fullmatch(r"gguf-fuse: going on with .* of \d+ bytes are there\n", done.err)
    assert " of them by an earlier run" in done.out
    assert out.read_bytes() == FUSED


def test_ctrl_c_waits_for_no_server(there: There, out: Path, run: Run) -> None:
    address, files = there
    files.silent_after = 60
    started = time.monotonic()
    stopped = run("fuse", f"{address}/in.gguf", out, prelude=ENDED.format(1.0, signal.SIGINT))
    assert time.monotonic() - started < 5
    assert_one_line(stopped, " bytes are kept in ", code=130)


def test_nothing_fetched_leaves_nothing(there: There, out: Path) -> None:
    address, files = there

    def gone(n_bytes: int) -> None:
        files.goes_after = 0

    with pytest.raises(GGUFError, match=r"503 Service Unavailable \(6 tries\)$"):
        fuse(f"{address}/in.gguf", out, options=replace(FAST, on_start=gone))
    assert left(out) == []


def test_another_version_is_never_mixed_in(there: There, out: Path) -> None:
    address, files = there
    broken(files, lambda: fuse(f"{address}/in.gguf", out, options=FAST))
    half = len(WHOLE) // 2
    (files.folder / "in.gguf").write_bytes(WHOLE[:half] + bytes(b ^ 1 for b in WHOLE[half:]))
    files.etag = '"two"'
    fuse(files.folder / "in.gguf", out, options=FAST)
    wanted = out.read_bytes()
    out.unlink()
    part, said = kept(out, ".part"), list[str]()
    result = fuse(f"{address}/in.gguf", out, options=say(said))
    assert said == [f"{part} is of another version of {address}/in.gguf; begun anew"]
    assert result.written.n_resumed == 0
    assert out.read_bytes() == wanted != FUSED
    assert left(out) == [".gguf"]


def test_a_version_that_changes_meanwhile_is_not_kept(there: There, out: Path) -> None:
    address, files = there
    n_done = 0

    def change(n_bytes: int) -> None:
        nonlocal n_done
        n_done += n_bytes
        if n_done > len(WHOLE) // 2:
            files.etag = '"two"'

    with pytest.raises(GGUFError, match="changed while it was read"):
        fuse(f"{address}/in.gguf", out, options=replace(FAST, on_progress=change))
    assert left(out) == []


def test_another_plan_is_never_mixed_in(
    there: There, out: Path, model: Callable[..., Path]
) -> None:
    address, files = there
    original = model("there/experts.gguf", architecture="qwen35moe", n_expert=4, n_embd=256)
    moe, both = f"{address}/{original.name}", (QKV, GATE_UP)
    broken(files, lambda: fuse(moe, out, options=FAST))
    part, said = kept(out, ".part"), list[str]()
    assert fuse(moe, out, fusions=both, options=say(said)).written.n_resumed == 0
    assert said == [f"{part} is of other options, or of another gguf-fuse; begun anew"]
    fuse(original, out.with_name("wanted.gguf"), fusions=both, options=FAST)
    assert out.read_bytes() == out.with_name("wanted.gguf").read_bytes()
    assert left(out) == [".gguf", ".gguf"]


@pytest.mark.parametrize("how", ["killed", "damaged", "never"])
def test_no_resume_begins_anew(there: There, out: Path, how: str) -> None:
    address, files = there
    if how != "never":
        broken(files, lambda: fuse(f"{address}/in.gguf", out, options=FAST))
    if how == "damaged":
        kept(out, ".journal").write_bytes(b"")
    said: list[str] = []
    options = say(said, resume=False)
    line = broken(files, lambda: fuse(f"{address}/in.gguf", out, options=options))
    assert line.endswith("(6 tries)")
    assert left(out) == []
    assert fuse(f"{address}/in.gguf", out, options=options).written.n_resumed == 0
    assert said == []
    assert out.read_bytes() == FUSED


@pytest.mark.parametrize(
    ("damage", "is_kept"),
    [
        (lambda text: text[:-7], True),  # torn
        (lambda text: text + bytes(4096), True),  # what a power failure leaves
        (lambda text: text.replace(b"[0,", b"[9,", 3), True),
        (lambda text: text.replace(b"]\n", b",1]\n", 5), True),
        (lambda text: text + b"[" * 100_000 + b"\n" + b"\xff\xfe\n{}\n[0,0,1e3,1]\n", True),
        (lambda text: text + b"[0,0,%d,1]\n[0,-1,5,1]\n" % 10**30, True),
        (lambda text: text[1:], False),
        (lambda text: b"", False),
        (lambda text: b"\0" * len(text), False),
        (lambda text: b"[1]\n" + text, False),
    ],
)
def test_a_damaged_journal(
    there: There, out: Path, damage: Callable[[bytes], bytes], is_kept: bool
) -> None:
    address, files = there
    broken(files, lambda: fuse(f"{address}/in.gguf", out, options=FAST))
    journal, said = kept(out, ".journal"), list[str]()
    journal.write_bytes(damage(journal.read_bytes()))
    result = fuse(f"{address}/in.gguf", out, options=say(said))
    assert out.read_bytes() == FUSED
    assert left(out) == [".gguf"]
    assert (result.written.n_resumed > 25 * BLOCK) == is_kept
    assert len(said) == 1
    assert ("going on with" in said[0]) == is_kept
    assert ("came without a journal of what is in it; begun anew" in said[0]) != is_kept


def test_a_damaged_part(there: There, out: Path) -> None:
    address, files = there
    broken(files, lambda: fuse(f"{address}/in.gguf", out, options=FAST))
    _, ranges = journal_of(out)
    part, said = kept(out, ".part"), list[str]()
    data = bytearray(part.read_bytes())
    for _, start, n_bytes, _ in ranges[3:5]:
        data[start + n_bytes // 2] ^= 1
    part.write_bytes(data)
    result = fuse(f"{address}/in.gguf", out, options=say(said))
    n_kept = sum(n_bytes for _, _, n_bytes, _ in ranges)
    n_damaged = sum(n_bytes for _, _, n_bytes, _ in ranges[3:5])
    assert result.written.n_resumed == n_kept - n_damaged
    assert said[0].endswith(f" bytes are there; {n_damaged} are damaged and fetched again")
    assert out.read_bytes() == FUSED


@pytest.mark.parametrize("how", ["cut", "removed", "a link", "a second name", "a folder"])
def test_a_part_that_is_another_file(there: There, out: Path, tmp_path: Path, how: str) -> None:
    """Nothing but OUT is ever written to."""
    address, files = there
    broken(files, lambda: fuse(f"{address}/in.gguf", out, options=FAST))
    part, other = kept(out, ".part"), tmp_path / "other"
    other.write_bytes(part.read_bytes())
    before = other.read_bytes()
    if how == "cut":
        os.truncate(part, len(WHOLE) // 4)
    else:
        part.unlink()
    if how == "a link":
        part.symlink_to(other)
    elif how == "a second name":
        part.hardlink_to(other)
    elif how == "a folder":
        part.mkdir()
        with pytest.raises(GGUFError, match=r"; nothing was written"):
            fuse(f"{address}/in.gguf", out, options=FAST)
        return
    n_resumed = fuse(f"{address}/in.gguf", out, options=FAST).written.n_resumed
    assert (n_resumed > 0) == (how == "cut")
    assert out.read_bytes() == FUSED
    assert other.read_bytes() == before
    assert left(out) == [".gguf"]


def test_a_journal_that_is_another_file(there: There, out: Path, tmp_path: Path) -> None:
    address, files = there
    broken(files, lambda: fuse(f"{address}/in.gguf", out, options=FAST))
    journal, other = kept(out, ".journal"), tmp_path / "other"
    journal.rename(other)
    before = other.read_bytes()
    journal.symlink_to(other)
    with pytest.raises(GGUFError, match="is no file of this user alone; remove it"):
        fuse(f"{address}/in.gguf", out, options=FAST)
    assert other.read_bytes() == before


def test_two_at_once(there: There, out: Path, run: Run) -> None:
    address, _ = there
    others: list[Outcome] = []
    lock = threading.Lock()

    def start_another(n_bytes: int) -> None:
        with lock:
            for flags in ([], ["--no-resume"]) if not others else ():
                others.append(run("fuse", f"{address}/in.gguf", out, *flags, prelude=PRELUDE))

    fuse(f"{address}/in.gguf", out, options=replace(FAST, on_progress=start_another))
    for other in others:
        assert_one_line(other, f"another gguf-fuse is writing {out} now; wait for it")
    assert out.read_bytes() == FUSED
    assert left(out) == [".gguf"]


def test_an_output_that_appears_meanwhile_costs_nothing(there: There, out: Path) -> None:
    address, files = there

    def appear(n_bytes: int) -> None:
        out.write_bytes(b"precious")

    with pytest.raises(GGUFError, match=r"--force replaces it; (\d+) of \1 bytes are kept in "):
        fuse(f"{address}/in.gguf", out, options=replace(FAST, on_progress=appear))
    assert out.read_bytes() == b"precious"
    files.asked = []
    fuse(f"{address}/in.gguf", out, options=replace(FAST, force=True))
    assert out.read_bytes() == FUSED
    assert files.n_asked <= HEADER + 1
    assert left(out) == [".gguf"]


def test_the_space_that_is_kept_is_not_asked_for_again(
    small_disk: Path, there: There, out: Path
) -> None:
    address, files = there
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "others").write_bytes(bytes(free - len(FUSED) * 5 // 4))
    broken(files, lambda: fuse(f"{address}/in.gguf", out, options=FAST))
    with pytest.raises(GGUFError, match="are needed"):
        fuse(files.folder / "in.gguf", out, options=FAST)
    assert fuse(f"{address}/in.gguf", out, options=FAST).written.n_resumed > 30 * BLOCK
    assert out.read_bytes() == FUSED


def test_a_full_disk(small_disk: Path, there: There, out: Path, run: Run) -> None:
    address, _ = there
    others = small_disk / "others"
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    others.write_bytes(bytes(free - len(FUSED) // 2))
    full = PRELUDE + FREE_SPACE_LIES + NOTHING_IS_RESERVED
    full += "from gguf_fuse.writing import copy; copy._libc_function.cache_clear()"
    stopped = run("fuse", f"{address}/in.gguf", out, prelude=full)
    assert_one_line(stopped, "No space left on device; ", " bytes are kept in ")
    others.unlink()
    assert fuse(f"{address}/in.gguf", out, options=FAST).written.n_resumed > 10 * BLOCK
    assert out.read_bytes() == FUSED
    assert left(out) == [".gguf"]


def test_files_on_a_disk_have_no_part(there: There, out: Path) -> None:
    _, files = there
    found: list[str] = []

    def look(n_bytes: int) -> None:
        found.extend(left(out))

    fuse(files.folder / "in.gguf", out, options=replace(FAST, on_progress=look))
    assert set(found) == {".tmp"}


def test_no_secret_is_kept(
    there: There, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    address, files = there
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password s3cret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    signed = f"{address}/in.gguf?signature=s3cret"
    line = broken(files, lambda: fuse(signed, out, options=FAST))
    assert "s3cret" not in line
    for path in out.parent.iterdir():
        assert "s3cret" not in path.name
        assert b"s3cret" not in path.read_bytes()
    first, _ = journal_of(out)
    assert first["sources"] == [[f"{address}/in.gguf", len(WHOLE), '"one"']]
    # Another signature of the same file, as a new login gives it.
    done = run("fuse", f"{address}/in.gguf?signature=s3cret2", out, prelude=PRELUDE)
    assert "going on with" in done.err
    assert "s3cret" not in done.err + done.out
    assert out.read_bytes() == FUSED


def test_a_batch_goes_on(there: There, tmp_path: Path) -> None:
    address, files = there
    (tmp_path / "sitecustomize.py").write_text(PRELUDE)  # its workers are processes of their own
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    command = ("batch", f"{address}/in.gguf", "--out", tmp_path / "many", "--no-sync", "--json")
    files.goes_after = 40
    done = gguf_fuse(*command, env=environment)
    assert done.returncode == 1
    assert " bytes are kept in " in json.loads(done.stdout)["files"][0]["line"]
    files.goes_after = 40
    done = gguf_fuse(*command, "--no-resume", env=environment)
    assert " are kept in " not in json.loads(done.stdout)["files"][0]["line"]
    assert left(tmp_path / "many" / "out") == [".jsonl"]
    files.goes_after = 40
    assert gguf_fuse(*command, env=environment).returncode == 1
    n_kept = kept(tmp_path / "many" / "out", ".journal").read_text().count("\n") - 1
    files.goes_after, files.asked = None, []
    done = gguf_fuse(*command, "--verify", "none", env=environment)
    assert done.returncode == 0, done
    assert (tmp_path / "many" / "in-fused.gguf").read_bytes() == FUSED
    assert left(tmp_path / "many" / "out") == [".gguf", ".jsonl"]
    assert files.n_asked <= len(WHOLE) - (n_kept - 10) * BLOCK + HEADER


def test_hashes_are_of_what_was_there_before_too(there: There, out: Path) -> None:
    address, files = there
    manifest = out.with_name("m.json")
    how = replace(FAST, manifest=manifest)
    broken(files, lambda: fuse(f"{address}/in.gguf", out, options=how))
    assert left(out) == [".journal", ".part"]
    n_told: list[int] = []
    how = replace(how, on_progress=n_told.append)
    assert fuse(f"{address}/in.gguf", out, options=how).written.n_resumed > 30 * BLOCK
    assert out.read_bytes() == FUSED
    assert left(out) == [".gguf", ".json", ".sha256"]
    assert verify_manifest(manifest, out).ok
    assert sum(n_told) == len(FUSED)
