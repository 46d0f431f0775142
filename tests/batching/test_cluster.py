"""The command batch on a real Dask cluster: the same outputs, whatever happens to its workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gguf_fuse.verifying.manifest import verify_manifest
from tests import pack
from tests.batching.test_batch import batch, entries, outputs
from tests.conftest import gguf_fuse

distributed: Any = pytest.importorskip("distributed")

N_FILES = 8


@contextmanager
def cluster(n_workers: int = 2) -> Iterator[Any]:
    with (
        distributed.LocalCluster(
            n_workers=n_workers, threads_per_worker=1, processes=True, dashboard_address=None
        ) as made,
        distributed.Client(made) as client,
    ):
        yield client


def models(folder: Path, n: int = N_FILES, **shape: int) -> dict[str, bytes]:
    """n models in the folder -> the outputs that they become."""
    folder.mkdir()
    for number in range(n):
        pack.save(pack.valid(**shape), folder / f"m{number}.gguf")
    whole = pack.fused(pack.valid(**shape)).pack()
    return {f"m{number}-fused.gguf": whole for number in range(n)}


def address(client: Any) -> str:
    return str(client.scheduler.address)


def test_workers_that_fail_and_a_scheduler_that_is_new(tmp_path: Path) -> None:
    wanted = models(tmp_path / "in")
    (tmp_path / "in" / "bad.gguf").write_bytes(b"")
    out = tmp_path / "out"
    with cluster() as client:
        lame = min(client.scheduler_info()["workers"])
        # It cannot write, as if its disk were full.
        limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))"
        client.run(exec, limit, {}, workers=[lame])
        done = batch(tmp_path / "in", "--out", out, "--dask", address(client))
    assert done.returncode == 1
    assert outputs(out) == wanted
    assert [entry["result"] for entry in entries(out)].count("failed") == 1
    pack.save(pack.valid(), tmp_path / "in" / "bad.gguf")
    with cluster() as client:
        done = batch(tmp_path / "in", "--out", out, "--dask", address(client))
    assert done.returncode == 0, done.stderr
    assert len(entries(out)) == len(wanted) + 2
    assert f"{len(wanted)} done before and unchanged" in done.stdout


def test_a_worker_that_is_killed_midway(tmp_path: Path) -> None:
    wanted = models(tmp_path / "in", n_layers=4, n_embd=1024)
    out = tmp_path / "out"
    with cluster() as client:
        pid = min(client.run(os.getpid).values())
        command = ["batch", tmp_path / "in", "--out", out, "--manifest", "--dask", address(client)]
        process = subprocess.Popen([sys.executable, "-m", "gguf_fuse", *command])
        while not list(out.glob("*.tmp")):
            assert process.poll() is None
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        assert process.wait(60) == 0
    made = outputs(out)
    assert {name: made[name] for name in wanted} == wanted
    for name in wanted:
        manifest = out / name.replace(".gguf", ".json")
        assert verify_manifest(manifest, out / name).ok
        del made[name], made[manifest.name], made[name.replace(".gguf", ".sha256")]
    assert all(".gguf-fuse-" in name for name in made)


def test_without_a_cluster(packed: Path, tmp_path: Path) -> None:
    done = gguf_fuse("batch", packed, "--out", tmp_path / "out", "--dask", "nowhere:1:2")
    assert done.returncode == 1
    assert done.stderr.startswith("gguf-fuse: --dask nowhere:1:2: ")
    assert len(done.stderr.splitlines()) == 1
