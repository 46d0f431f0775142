#!/usr/bin/env python3
"""Fusing on the way against fetching alone, by curl and by the hub's own program: in turns.

    python scripts/bench_remote.py --size 500M

The server is this script's own, on this machine: what is compared is the work beside the network.
curl and the hub's program fetch the file; gguf-fuse fetches and fuses it. Then the header alone is
fetched of a model with a large vocabulary.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from gguf import GGMLQuantizationType
from random_models import ModelSpec, spec_of_size, write_random_model

from gguf_fuse.measuring.gain import gain, spread
from gguf_fuse.writing.cut import parse_size
from tests.fetching.hub import serve_hub

FUSE = [sys.executable, "-m", "gguf_fuse", "fuse", "--no-sync", "--force", "--quiet"]
_HUB = "import huggingface_hub as h, sys; h.hf_hub_download('me/model', 'in.gguf', local_dir={!r})"


def write(path: Path, spec: ModelSpec) -> None:
    """By a process of its own: the peak of what this one starts later is never below its own."""
    writer = multiprocessing.Process(target=write_random_model, args=(path, spec))
    writer.start()
    writer.join()
    if writer.exitcode:
        raise SystemExit(f"{path} could not be written")


def run(command: list[str], **environment: str) -> tuple[float, int]:
    """Seconds, and peak memory in bytes."""
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env={**os.environ, **environment}
    ) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - started, used.ru_maxrss * 1024


def main(
    size: Annotated[str, typer.Option(help="Of the model.")] = "500M",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 9,
    vocab: Annotated[int, typer.Option(help="Tokens of the model that is inspected.")] = 128256,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        f16 = ModelSpec(types={"*": GGMLQuantizationType.F16})
        large = ModelSpec(n_vocab=vocab, n_embd=256, tokenizer="bpe")
        write(folder / "in.gguf", spec_of_size(f16, parse_size(size)))
        write(folder / "large.gguf", large)
        facts = measure(folder, rounds)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for contender, each in facts["seconds"].items():
        print(f"{contender:<20}{each['median']:8.2f} s  ({each['low']:.2f} to {each['high']:.2f})")
    for pair, found in facts["share"].items():
        share = f"{1 / found['ratio']:.2f} ({1 / found['high']:.2f} to {1 / found['low']:.2f})"
        print(f"{pair}: {share} of its time, {found['word']}")
    each_byte = facts["fetched"] / facts["bytes"]
    print(f"{each_byte:.3f} bytes fetched for each, peak memory {facts['peak_mb']:.0f} MB")
    print(f"inspect of {vocab} tokens: {facts['inspect_fetched'] / 1e6:.1f} MB fetched")


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    n_bytes = (folder / "in.gguf").stat().st_size
    with serve_hub(folder) as (environment, hub, files):
        out, at = str(folder / "out.gguf"), hub.files
        environment |= {"HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        curl = ["curl", "-s", "-o", f"{folder}/copy", "-r", f"0-{n_bytes - 1}"]
        commands = {
            "curl": [*curl, f"{at}/in.gguf"],
            "the hub's": [sys.executable, "-c", _HUB.format(str(folder / "hub"))],
            "gguf-fuse https://": [*FUSE, f"{at}/in.gguf", out],
            "gguf-fuse hf://": [*FUSE, "hf://me/model/in.gguf", out],
            "inspect": [sys.executable, "-m", "gguf_fuse", "inspect", f"{at}/large.gguf"],
        }
        runs: dict[str, list[tuple[float, int]]] = {contender: [] for contender in commands}
        fetched: dict[str, int] = {}
        for _ in range(rounds):
            for contender, command in commands.items():
                shutil.rmtree(folder / "hub", ignore_errors=True)
                files.asked.clear()
                runs[contender].append(run(command, **environment))
                fetched[contender] = sum(last - first + 1 for first, last in files.asked)
    seconds = {name: [took for took, _ in each] for name, each in runs.items()}
    share = {
        "https:// against curl": gain(seconds["curl"], seconds["gguf-fuse https://"]),
        "hf:// against the hub's": gain(seconds["the hub's"], seconds["gguf-fuse hf://"]),
    }
    return {
        "bytes": n_bytes,
        "fetched": fetched["gguf-fuse https://"],
        "inspect_fetched": fetched["inspect"],
        "peak_mb": max(peak for _, peak in runs["gguf-fuse https://"]) / 1e6,
        "seconds": {name: asdict(spread(each)) for name, each in seconds.items()},
        "share": {pair: asdict(found) for pair, found in share.items()},
    }


if __name__ == "__main__":
    typer.run(main)
