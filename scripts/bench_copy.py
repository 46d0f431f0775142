"""How fast and in how much memory a model is rewritten: gguf-fuse against the tools people have.

All contenders run in turn, round after round, on one model in the page cache (with --cold, out of
it: the disk is read). Shown are medians with the middle half of the runs, and the share of `cp`'s
time with its 95 % interval. Every output is deleted and every write flushed before the next run.
Run it on a quiet machine:

    python scripts/bench_copy.py --size 2.5G --folder /mnt/xfs --folder .
    sudo python scripts/bench_copy.py --size 300M --cold --disk 100M
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from control_group import inside, slow_disk
from gguf import GGMLQuantizationType
from random_models import ModelSpec, spec_of_size, write_random_model
from rich.console import Console
from rich.table import Table

from gguf_fuse.format.parser import read_header
from gguf_fuse.format.source import opened
from gguf_fuse.measuring.gain import Gain, Spread, gain, spread
from gguf_fuse.writing.copy import clone_block

UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Run:
    seconds: float
    peak_bytes: int | None  # None where the platform does not tell


@dataclass(frozen=True)
class Row:
    """One contender. gain: over the contender that it is compared with."""

    file_system: str
    model_bytes: int
    contender: str
    seconds: Spread
    compared_with: str
    gain: Gain
    peak_mb: float | None


def main(
    size: Annotated[list[str], typer.Option(help="Size of the model; repeatable.")] = ["2.5G"],  # noqa: B006
    folder: Annotated[
        list[Path], typer.Option(help="Where to write: decides the file system; repeatable.")
    ] = [Path()],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each contender.")] = 9,
    all_tools: Annotated[
        bool, typer.Option("--all/--cp-only", help="Also gguf-py's script and llama-quantize.")
    ] = True,
    cold: Annotated[bool, typer.Option("--cold", help="Read from the disk.")] = False,
    disk: Annotated[
        str | None, typer.Option(help="A slow disk: so many bytes a second each way.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    prepare = drop_cached if cold else read_through
    compared = []
    for where in folder:
        with slowed(where, disk) as begun:
            compared += [
                compare(where, n_bytes, rounds, all_tools, prepare, begun)
                for n_bytes in map(parse_size, size)
            ]
    if as_json:
        print(json.dumps([asdict(row) for rows in compared for row in rows], indent=2))
        return
    for rows in compared:
        Console().print(table(rows), "")


def parse_size(text: str) -> int:
    return int(float(text.rstrip("KMG")) * UNITS.get(text[-1:], 1))


@contextlib.contextmanager
def slowed(where: Path, disk: str | None) -> Iterator[Callable[[list[str]], list[str]]]:
    """What makes a command one that meets such a disk."""
    if disk is None:
        yield list
        return
    with slow_disk(where, parse_size(disk)) as group:
        if group is None:
            raise SystemExit(f"--disk: a control group cannot slow {where}: not root, or no disk")
        yield functools.partial(inside, group)


def compare(
    where: Path,
    n_bytes: int,
    rounds: int,
    all_tools: bool,
    prepare: Callable[[Path], None],
    begun: Callable[[list[str]], list[str]],
) -> list[Row]:
    with tempfile.TemporaryDirectory(dir=where, prefix="bench-copy-") as scratch:
        model, output = Path(scratch, "in.gguf"), Path(scratch, "out.gguf")
        f16 = ModelSpec(types={"*": GGMLQuantizationType.F16})
        write_random_model(model, spec_of_size(f16, n_bytes))
        commands = contenders(model, output, all_tools)
        runs: dict[str, list[Run]] = {name: [] for name in commands}
        for turn in range(rounds):
            for name in rotated(list(commands), turn):
                output.unlink(missing_ok=True)
                os.sync()
                prepare(model)
                runs[name].append(timed(begun(commands[name])))
        return rows_of(runs, file_system(where), model.stat().st_size)


def contenders(model: Path, output: Path, all_tools: bool) -> dict[str, list[str]]:
    paths = [str(model), str(output)]
    fuse = [sys.executable, "-m", "gguf_fuse", "fuse", "--quiet", *paths]
    hashed = [*fuse, "--force", "--manifest", str(output.with_suffix(".json"))]
    copy = ["cp", "--reflink=never", *paths] if sys.platform == "linux" else ["cp", *paths]
    found = {
        "cp": copy,
        "gguf-fuse --no-sync": [*fuse, "--no-sync", "--reflink", "never"],
        "cp + sync": ["sh", "-c", f"{' '.join(copy)} && sync {output}"],
        "gguf-fuse": [*fuse, "--reflink", "never"],
        # What its hashes cost beside the copying; the page cache is their worst case.
        "gguf-fuse --no-sync --manifest": [*hashed, "--no-sync", "--reflink", "never"],
        "gguf-fuse --manifest": [*hashed, "--reflink", "never"],
    }
    with opened(read_header(model).sources) as files:
        if all(clone_block(file, output.parent) for file in files.values()):
            found["cp --reflink=always"] = ["cp", "--reflink=always", *paths]
            found["gguf-fuse --reflink always"] = [*fuse, "--reflink", "always"]
            found["... --reflink always --no-sync"] = [*fuse, "--no-sync", "--reflink", "always"]
    if not all_tools:
        return found
    script = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata"]
    found["gguf-new-metadata"] = [*script, "--general-name", "copy", *paths]
    if shutil.which("llama-quantize"):
        found["llama-quantize COPY"] = ["llama-quantize", *paths, "COPY"]
    return found


def rotated(names: list[str], turn: int) -> list[str]:
    """Whoever comes after a slow one finds another page cache: each round begins elsewhere."""
    at = turn % len(names)
    return names[at:] + names[:at]


def read_through(path: Path) -> None:
    """Have the model in the page cache."""
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        while file.readinto(buffer):
            pass


def drop_cached(path: Path) -> None:
    """Have the model out of the page cache: its pages are clean, since a sync came before."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: list[str]) -> Run:
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak: int | None = None
    while process.poll() is None:
        peak = peak_of(process.pid) or peak
        time.sleep(0.002)
    seconds = time.perf_counter() - started
    if process.returncode:
        message = process.stderr.read().decode() if process.stderr else ""
        raise SystemExit(f"{' '.join(command)}: exit {process.returncode}: {message}")
    return Run(seconds, peak)


def peak_of(pid: int) -> int | None:
    """Peak resident memory of a running process, in bytes."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024 if "VmHWM" in lines else None


def file_system(where: Path) -> str:
    if not shutil.which("findmnt"):
        return "?"
    command = ["findmnt", "--noheadings", "--output", "FSTYPE", "--target", str(where)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def rows_of(runs: dict[str, list[Run]], fs: str, model_bytes: int) -> list[Row]:
    rows = []
    times = {name: [run.seconds for run in done] for name, done in runs.items()}
    for name, done in runs.items():
        # Waiting for the disk is compared with waiting for the disk.
        waits = name == "cp + sync" or (name.startswith("gguf-fuse") and "--no-sync" not in name)
        base = "cp + sync" if waits else "cp"
        peaks = [run.peak_bytes for run in done if run.peak_bytes]
        peak = max(peaks) / 1e6 if peaks else None
        gained = gain(times[base], times[name])
        rows.append(Row(fs, model_bytes, name, spread(times[name]), base, gained, peak))
    return rows


def table(rows: list[Row]) -> Table:
    """The contenders on one file system with one size of model."""
    title = f"{rows[0].file_system}, {rows[0].model_bytes / 1e9:.2f} GB"
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title=title, title_justify="left")
    for heading in ("contender", "median", "middle half", "of the time of", "", "", "peak"):
        left = heading in ("contender", "")
        drawn.add_column(heading, justify="left" if left else "right", no_wrap=not left)
    for row in rows:
        seconds, found = row.seconds, row.gain
        drawn.add_row(
            row.contender,
            f"{seconds.median:.2f} s",
            f"{seconds.low:.2f}-{seconds.high:.2f}",
            f"{1 / found.ratio:.2f} ({1 / found.high:.2f}-{1 / found.low:.2f})",
            row.compared_with,
            "" if row.contender == row.compared_with else found.word,
            "-" if row.peak_mb is None else f"{row.peak_mb:.0f} MB",
        )
    return drawn


if __name__ == "__main__":
    typer.run(main)
