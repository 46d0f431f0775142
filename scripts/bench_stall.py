#!/usr/bin/env python3
"""A file larger than memory: does the progress bar stand still, does the machine?

    sudo python scripts/bench_stall.py --size 5G --memory 1G --folder DIR

gguf-fuse runs in a memory control group of that size (version 1 or 2; without the right to make
one, in all of the memory, which is said). Beside it a process that sleeps for 20 ms measures how
much later it wakes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import typer
from control_group import less_memory
from gguf import GGMLQuantizationType
from random_models import ModelSpec, spec_of_size, write_random_model

from gguf_fuse import Options, fuse
from gguf_fuse.measuring.gain import spread
from gguf_fuse.writing.cut import parse_size

NAP_S = 0.02


def work(group: Path | None, source: Path, output: Path, sync: bool, told: Connection) -> None:
    """Sends the longest time between two calls of progress, of the copying and of the last wait."""
    if group is not None:
        (group / "cgroup.procs").write_text(str(os.getpid()))
    with source.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    calls = [time.perf_counter()]
    flush: list[float] = []
    fuse(
        source,
        output,
        options=Options(
            force=True,
            sync=sync,
            on_progress=lambda n: calls.append(time.perf_counter()),
            on_flush=lambda: flush.append(time.perf_counter()),
        ),
    )
    last_wait = time.perf_counter() - flush[0] if flush else 0.0
    gaps = [after - before for before, after in itertools.pairwise(calls)]
    told.send((max(gaps), last_wait, time.perf_counter() - calls[0]))


def dirty_gb() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) / 1e6 for line in lines if line.startswith("Dirty:"))


def watched(process: multiprocessing.Process) -> tuple[float, float]:
    """How late the worst nap ended, and the most that waited for the disk, in GB."""
    late, dirty = 0.0, 0.0
    process.start()
    while process.is_alive():
        started = time.perf_counter()
        time.sleep(NAP_S)
        late = max(late, time.perf_counter() - started - NAP_S)
        dirty = max(dirty, dirty_gb())
    process.join()
    if process.exitcode:
        raise SystemExit("gguf-fuse failed")
    return late, dirty


def main(
    size: Annotated[str, typer.Option(help="Of the model.")] = "5G",
    memory: Annotated[
        str, typer.Option(help="That gguf-fuse may have, page cache and all.")
    ] = "1G",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 9,
    folder: Annotated[Path, typer.Option(help="Where the files go, for a time.")] = Path(),
) -> None:
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-stall-") as scratch:
        source, output = Path(scratch, "in.gguf"), Path(scratch, "out.gguf")
        f16 = ModelSpec(types={"*": GGMLQuantizationType.F16})
        write_random_model(source, spec_of_size(f16, parse_size(size)))
        os.sync()
        with less_memory(parse_size(memory)) as group:
            print(f"{size} in {memory}" if group else f"{size}; no control group can be made")
            for sync in (True, False):
                found = []
                for _ in range(rounds):
                    receive, told = multiprocessing.Pipe(duplex=False)
                    arguments = (group, source, output, sync, told)
                    process = multiprocessing.Process(target=work, args=arguments)
                    found.append((*watched(process), *receive.recv()))
                    os.sync()
                print("synced" if sync else "--no-sync")
                names = ("nap late by, s", "dirty, GB", "longest gap, s", "last wait, s", "all, s")
                for name, values in zip(names, zip(*found, strict=True), strict=True):
                    each = spread(list(values))
                    middle = f"middle half {each.low:.3f} to {each.high:.3f}"
                    print(f"  {name:<18}{each.median:8.3f}  ({middle}), most {max(values):.3f}")


if __name__ == "__main__":
    typer.run(main)
