"""The command batch: what is made of many files, what is remembered, and what a kill leaves."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gguf_fuse.batching.ledger import NAME
from tests import pack
from tests.batching.kinds import FAILED, FUSED, NOTHING, fused_alone, write_all
from tests.conftest import gguf_fuse
from tests.fetching.server import serve
from tests.shards import cut
from tests.terminal import on_a_terminal

N_FILES = 60 if os.environ.get("GGUF_FUSE_HARNESS") is None else 200


@pytest.fixture(scope="module")
def kinds(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, str], dict[str, bytes]]:
    """A folder of files, what becomes of each, and the bytes of the outputs."""
    folder = tmp_path_factory.mktemp("kinds")
    wanted = write_all(folder / "in", N_FILES)
    return folder / "in", wanted, fused_alone(folder / "in", folder / "alone")


def outputs(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.rglob("*")
        if path.suffix != ".jsonl" and path.is_file()
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / NAME).read_text().splitlines()]


def entries(folder: Path) -> list[dict[str, Any]]:
    return [line for line in lines(folder) if "result" in line]


def batch(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[Any]:
    return gguf_fuse("batch", "--no-sync", *arguments, **options)


def test_every_file_of_every_kind(
    kinds: tuple[Path, dict[str, str], dict[str, bytes]], tmp_path: Path
) -> None:
    folder, wanted, alone = kinds
    done = batch(folder, "--out", tmp_path)
    assert done.returncode == 1  # some failed
    assert outputs(tmp_path) == alone
    results = {Path(entry["input"]).stem: entry["result"] for entry in entries(tmp_path)}
    assert results == wanted
    assert "Traceback" not in done.stderr
    summary = done.stdout.splitlines()[-1]
    for result in set(wanted.values()):
        assert f"{list(wanted.values()).count(result)} {result}" in summary
    for entry in entries(tmp_path):
        assert (entry["line"] is None) == (entry["result"] == FUSED)

    again = batch(folder, "--out", tmp_path)
    tried = entries(tmp_path)[len(wanted) :]
    assert {entry["result"] for entry in tried} == {FAILED}
    assert len(tried) == list(wanted.values()).count(FAILED)
    assert outputs(tmp_path) == alone
    assert f"{len(wanted) - len(tried)} done before and unchanged" in again.stdout


def test_what_changed_is_done_again(tmp_path: Path) -> None:
    for name in "ab":
        pack.save(pack.valid(), tmp_path / f"{name}.gguf")
    arguments = (tmp_path / "a.gguf", tmp_path / "b.gguf", "--out", tmp_path / "out")
    assert batch(*arguments).returncode == 0
    assert batch(*arguments).returncode == 0
    assert len(entries(tmp_path / "out")) == 2
    pack.save(pack.valid(n_layers=3), tmp_path / "a.gguf")
    (tmp_path / "out" / "b-fused.gguf").unlink()
    assert batch(*arguments).returncode == 0
    assert len(entries(tmp_path / "out")) == 4
    assert outputs(tmp_path / "out") == {
        "a-fused.gguf": pack.fused(pack.valid(n_layers=3)).pack(),
        "b-fused.gguf": pack.fused(pack.valid()).pack(),
    }
    assert batch(*arguments, "--verify", "none").returncode == 0  # other settings
    assert len(entries(tmp_path / "out")) == 6


def test_a_file_of_somebody_else_is_not_replaced(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "in-fused.gguf").write_bytes(b"mine")
    for _ in range(2):  # that it was there is not forgotten
        done = batch(packed, "--out", out)
        assert done.returncode == 1
        assert "exists already; --force replaces it" in done.stdout
        assert (out / "in-fused.gguf").read_bytes() == b"mine"
    assert batch(packed, "--out", out, "--force").returncode == 0
    (out / "in-fused.gguf").write_bytes(b"mine")  # after it was recorded
    assert batch(packed, "--out", out).returncode == 1
    assert (out / "in-fused.gguf").read_bytes() == b"mine"


def test_its_own_file_stays_its_own(packed: Path, tmp_path: Path) -> None:
    """Also where the last run failed, or made no manifest."""
    out = tmp_path / "out"
    command = (packed, "--out", out, "--manifest")
    assert batch(*command).returncode == 0
    packed.write_bytes(pack.valid().pack()[:-100])  # still being copied
    assert batch(*command).returncode == 1
    pack.save(pack.valid(n_layers=3), packed)
    assert batch(packed, "--out", out).returncode == 0
    assert batch(*command).returncode == 0
    proof = gguf_fuse("verify", out / "in-fused.gguf", "--manifest", out / "in-fused.json")
    assert proof.returncode == 0, proof


def test_what_could_not_be_verified_is_done_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack.save(pack.valid(), tmp_path / "m.gguf")
    with serve(tmp_path) as (address, files):
        command = (f"{address}/m.gguf", "--out", out, "--manifest")
        assert batch(*command).returncode == 0
        n_ranges = len(files.asked)
        files.goes_after = n_ranges - 1  # the last of them is one of verify's
        failed = batch(*command, "--force")
        files.goes_after = None
        assert failed.returncode == 1
        assert f"{out / 'm-fused.gguf'} is there, but not verified" in failed.stdout
        assert "m-fused.gguf" not in batch("--out", out, "--markdown").stdout
        assert batch(*command).returncode == 0
    assert (out / "m-fused.gguf").read_bytes() == pack.fused(pack.valid()).pack()


def test_nothing_could_be_fused(tmp_path: Path) -> None:
    path = pack.save(pack.fused(pack.valid()), tmp_path / "done.gguf")
    assert batch(path, "--out", tmp_path / "out").returncode == 3
    (entry,) = entries(tmp_path / "out")
    assert entry["result"] == NOTHING
    assert batch(path, "--out", tmp_path / "out").returncode == 3
    assert len(entries(tmp_path / "out")) == 1


def test_fail_fast(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"")
    for number in range(5):
        pack.save(pack.valid(), tmp_path / f"b{number}.gguf")
    done = batch(tmp_path, "--out", tmp_path / "out", "--fail-fast", "--jobs", "1")
    assert done.returncode == 1
    assert len(entries(tmp_path / "out")) == 1
    assert "5 not begun" in done.stdout


def test_names(tmp_path: Path) -> None:
    for below in ("q4", "q8"):
        (tmp_path / below).mkdir()
        pack.save(pack.valid(), tmp_path / below / "m.gguf")
    out = tmp_path / "out"
    done = batch(tmp_path / "q4" / "m.gguf", tmp_path / "q8" / "m.gguf", "--out", out)
    assert done.returncode == 1
    assert "would both become" in done.stderr
    assert not out.exists()
    listed = f"{tmp_path / 'q4' / 'm.gguf'}\n\n{tmp_path / 'absent.gguf'}\n"
    done = batch("--from", "-", "--out", out, "--name", "{name}-qkv", input=listed)
    assert done.returncode == 1  # one is not there
    assert (out / "m-qkv.gguf").exists()
    assert batch(tmp_path, "--out", out, "--name", "fused").returncode == 2
    assert batch("--out", out).returncode == 2
    done = batch(f"{tmp_path}/q?/*.gguf", "--out", tmp_path / "more", "--name", "{name}")
    assert done.returncode == 1  # both are m.gguf
    assert batch(f"{tmp_path}/q8*/*.gguf", "--out", tmp_path / "more").returncode == 0


def test_dry_run(packed: Path, tmp_path: Path) -> None:
    done = batch(packed, tmp_path / "absent.gguf", "--out", tmp_path / "a" / "b", "--dry-run")
    assert done.returncode == 0
    assert "would be fused, 2 of 2 layers" in done.stdout
    assert "absent.gguf: No such file or directory" in done.stdout
    assert not (tmp_path / "a").exists()


def test_a_torn_line_is_healed(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert batch(packed, "--out", out).returncode == 0
    whole = (out / NAME).read_bytes()
    (out / NAME).write_bytes(whole[:-40])  # as a kill amid the writing leaves it
    assert batch(packed, "--out", out).returncode == 0
    assert [line["result"] for line in entries(out)] == [FUSED]
    (out / NAME).write_bytes(b"{}\n" + whole)
    done = batch(packed, "--out", out)
    assert done.returncode == 1
    assert f"{NAME}: line 1 is none of a ledger" in done.stderr


def test_markdown(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    batch(packed, "--out", out)
    done = gguf_fuse("batch", "--out", out, "--markdown")
    assert done.returncode == 0
    sha256 = entries(out)[0]["outputs"][0]["sha256"]
    assert (
        f"| in-fused.gguf | {(out / 'in-fused.gguf').stat().st_size / 1000:.1f} kB | 2 of 2 |"
        in done.stdout
    )
    assert sha256 in done.stdout


def test_manifests(tmp_path: Path) -> None:
    """Made again where they are missing; one that is somebody else's is not replaced."""
    models, out = tmp_path / "in", tmp_path / "out"
    models.mkdir()
    pack.save(pack.valid(), models / "m.gguf")
    first, *_ = cut(pack.save(pack.valid(n_layers=4), models / "whole.gguf"), "set", [5, 13])
    (models / "whole.gguf").unlink()
    command = (models, "--out", out, "--manifest")
    assert batch(*command).returncode == 0
    of_outputs = {"m-fused.json": "m-fused.gguf"}
    of_outputs[first.name.replace("set", "set-fused").replace(".gguf", ".json")] = (
        first.name.replace("set", "set-fused")
    )
    for manifest, output in of_outputs.items():
        proof = gguf_fuse("verify", out / output, "--manifest", out / manifest)
        assert proof.returncode == 0, proof
    for entry in entries(out):
        for file in (*entry["outputs"], *entry["manifest"]):
            data = Path(file["path"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == file["sha256"]
    assert len(entries(out)) == 2

    assert batch(*command).returncode == 0
    assert batch(models, "--out", out).returncode == 0  # it has more than is asked for
    assert len(entries(out)) == 2
    whole = outputs(out)
    (out / "m-fused.sha256").unlink()
    assert batch(*command).returncode == 0
    (out / "m-fused.gguf").unlink()
    assert batch(*command).returncode == 0
    assert outputs(out) == whole
    assert len(entries(out)) == 4
    (out / "m-fused.json").write_text("mine")
    assert batch(*command).returncode == 1
    assert outputs(out) == {**whole, "m-fused.json": b"mine"}
    assert batch(*command, "--force").returncode == 0
    assert outputs(out) == whole


def test_manifests_that_are_wanted_later(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert batch(packed, "--out", out, "--split-max-tensors", "9").returncode == 0
    command = (packed, "--out", out, "--split-max-tensors", "9", "--manifest")
    (out / "in-fused.json").write_text("mine")
    assert batch(*command).returncode == 1
    assert (out / "in-fused.json").read_text() == "mine"
    (out / "in-fused.json").unlink()
    assert batch(*command, "--force").returncode == 0
    shard = min(out.glob("in-fused-*.gguf"))
    assert gguf_fuse("verify", shard, "--manifest", out / "in-fused.json").returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="worker processes end with the batch")
def test_killed_at_random_and_run_again(
    kinds: tuple[Path, dict[str, str], dict[str, bytes]], tmp_path: Path
) -> None:
    folder, wanted, alone = kinds
    command = [sys.executable, "-m", "gguf_fuse", "batch", "--no-sync", folder, "--out", tmp_path]
    moments = random.Random(2)
    for _ in range(10):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.4, 1.5))
        process.kill()
        process.wait()
    assert batch(folder, "--out", tmp_path).returncode == 1
    assert outputs(tmp_path) == alone  # so no temporary is left either
    begun: dict[str, bool] = {}
    for line in lines(tmp_path):  # nothing that was recorded was begun again
        output = line.get("begun") or line["output"]
        assert not begun.get(output), output
        begun[output] = line.get("result") == FUSED
    assert sum(begun.values()) == list(wanted.values()).count(FUSED)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells when a process starts")
def test_an_interrupt_as_processes_start_is_one_line(packed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gguf_fuse", "batch", packed, "--out", tmp_path / "out"]
    for delay in (0.0, 0.01, 0.02, 0.04):  # loading takes longer
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            while not children.read_text():
                assert process.poll() is None
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
        assert errors == "gguf-fuse: interrupted\n"
        assert process.returncode == 130


def test_an_interrupt_leaves_nothing_half_done(tmp_path: Path) -> None:
    for number in range(4):
        pack.save(pack.valid(n_layers=2, n_embd=2048), tmp_path / f"m{number}.gguf")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "gguf_fuse", "batch", tmp_path, "--out", out, "--jobs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(out.glob("*.tmp")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("gguf-fuse: interrupted")
    assert not list(out.glob("*.tmp"))
    for path in out.glob("*.gguf"):
        assert path.read_bytes() == pack.fused(pack.valid(n_layers=2, n_embd=2048)).pack()


@pytest.mark.parametrize("at", ["*.tmp", "*.gguf"])  # while it writes, and while it verifies
def test_a_process_that_dies_costs_one_file(tmp_path: Path, at: str) -> None:
    """As the kernel ends one that takes too much memory."""
    for number in range(6):
        pack.save(pack.valid(n_embd=2048), tmp_path / f"m{number}.gguf")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "gguf_fuse", "batch", tmp_path, "--out", out, "--jobs", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not list(out.glob(at)):
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    workers = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    assert workers, children
    os.kill(workers[0], signal.SIGKILL)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert shown.count("the process that fused it died (signal 9)") == 1
    assert [entry["result"] for entry in entries(out)].count(FUSED) == 5
    assert batch(tmp_path, "--out", out).returncode == 0
    assert len(list(out.glob("*.gguf"))) == 6


def test_on_a_terminal_every_line_stays(tmp_path: Path) -> None:
    """The bars are drawn below the results, and leave with the last one."""
    for number in range(3):
        pack.save(pack.valid(n_embd=512), tmp_path / f"m{number}.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"")
    shown = on_a_terminal("batch", "--no-sync", tmp_path, "--out", tmp_path / "out", code=1)
    lines = shown.replace("\r\n", "\n").split("\n")
    results = [line for line in lines if "verified: m" in line or "it is empty" in line]
    assert len(results) == 4
    # Each on a line of its own: what was drawn there before is cleared.
    for line in results:
        assert re.fullmatch(r"(.*\x1b\[2K)?(\x1b\[[0-9;]*m)?(fused|failed).*", line), repr(line)
