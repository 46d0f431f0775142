#!/usr/bin/env python3
"""What a batch costs beside the copying: seconds a task and memory, on tiny files.

    python scripts/bench_batch.py --files 500 [--dask local]

The same folder is fused by batches of n / 2 and n files in turns; the difference of the medians,
by file, is what a task costs without the start of the programs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import random_models  # noqa: F401 (so that tests/ is found)

from gguf_fuse.measuring.gain import gain, spread
from tests import pack


def run(folder: Path, n_files: int, *options: str) -> tuple[float, int]:
    """Seconds, and the largest peak memory of the batch's own process and its children, bytes."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    names = "\n".join(str(folder / f"{number}.gguf") for number in range(n_files))
    command = [sys.executable, "-m", "gguf_fuse", "batch", "--from", "-", "--out", str(out)]
    started = time.perf_counter()
    with subprocess.Popen(
        [*command, "--quiet", "--no-sync", *options], stdin=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        process.stdin.write(names)
        process.stdin.close()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return time.perf_counter() - started, used.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--jobs", default="2")
    parser.add_argument("--dask", metavar="ADDRESS", help="a scheduler, or local")
    asked = parser.parse_args()
    options = ["--jobs", asked.jobs, *(["--dask", asked.dask] if asked.dask else [])]
    counts = (asked.files // 2, asked.files)
    seconds: dict[int, list[float]] = {n: [] for n in counts}
    memory: dict[int, list[int]] = {n: [] for n in counts}
    with tempfile.TemporaryDirectory() as name:
        for number in range(asked.files):
            pack.save(pack.valid(), Path(name) / f"{number}.gguf")
        for _ in range(asked.rounds):
            for n in counts:
                took, peak = run(Path(name), n, *options)
                seconds[n].append(took)
                memory[n].append(peak)
    few, many = (spread(seconds[n]) for n in counts)
    for n, each in zip(counts, (few, many), strict=True):
        print(f"{n} files: {each.median:.2f} s (middle half {each.low:.2f} to {each.high:.2f})")
    found = gain(seconds[counts[0]], seconds[counts[1]])
    task_ms = (many.median - few.median) / (counts[1] - counts[0]) * 1000
    print(f"a task: {task_ms:.1f} ms" if found.seen else f"a task: {found.word}")
    peaks = [statistics.median(memory[n]) / 1e6 for n in counts]
    print(
        f"peak memory: {peaks[0]:.0f} MB for {counts[0]} files, {peaks[1]:.0f} MB for {counts[1]}"
    )


if __name__ == "__main__":
    main()
