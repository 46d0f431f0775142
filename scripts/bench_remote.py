#!/usr/bin/env python3
"""Fusing on the way against fetching alone: the same server, in turns.

    python scripts/bench_remote.py --size 500M

The server is this script's own, on this machine: what is compared is the work beside the network.
curl fetches the file; gguf-fuse fetches and fuses it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from gguf import GGMLQuantizationType
from random_models import ModelSpec, spec_of_size, write_random_model

from gguf_fuse.measuring.gain import gain, spread
from gguf_fuse.writing.cut import parse_size
from tests.fetching.server import serve


def run(*command: str) -> tuple[float, int]:
    """Seconds, and peak memory in bytes."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - started, used.ru_maxrss * 1024


def main(
    size: Annotated[str, typer.Option(help="Of the model.")] = "500M",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 9,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    seconds: dict[str, list[float]] = {"curl": [], "gguf-fuse": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        f16 = ModelSpec(types={"*": GGMLQuantizationType.F16})
        write_random_model(folder / "in.gguf", spec_of_size(f16, parse_size(size)))
        n_bytes = (folder / "in.gguf").stat().st_size
        with serve(folder) as (address, files):
            curl = ["curl", "-s", "-o", f"{name}/copy", "-r", f"0-{n_bytes - 1}"]
            fuse = [sys.executable, "-m", "gguf_fuse", "fuse", "--no-sync", "--force", "--quiet"]
            peaks = []
            for _ in range(rounds):
                seconds["curl"].append(run(*curl, f"{address}/in.gguf")[0])
                files.asked.clear()
                took, peak = run(*fuse, f"{address}/in.gguf", f"{name}/out.gguf")
                seconds["gguf-fuse"].append(took)
                peaks.append(peak)
            fetched = sum(last - first + 1 for first, last in files.asked)
    spreads = {contender: spread(samples) for contender, samples in seconds.items()}
    found = gain(seconds["curl"], seconds["gguf-fuse"])
    facts = {
        "bytes": n_bytes,
        "fetched": fetched,
        "peak_mb": max(peaks) / 1e6,
        "seconds": {contender: asdict(each) for contender, each in spreads.items()},
        "fuse_over_curl": asdict(found),
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for contender, each in spreads.items():
        print(f"{contender:<12}{each.median:8.2f} s  ({each.low:.2f} to {each.high:.2f})")
    share = f"{1 / found.ratio:.2f} ({1 / found.high:.2f} to {1 / found.low:.2f})"
    print(f"gguf-fuse takes {share} of curl's time: {found.word}")
    print(f"{fetched / n_bytes:.3f} bytes fetched for each, peak memory {facts['peak_mb']:.0f} MB")


if __name__ == "__main__":
    typer.run(main)
