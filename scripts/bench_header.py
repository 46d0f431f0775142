"""How long opening a model takes: its header alone, and whole commands.

The model has a vocabulary of 128k tokens. gguf-py's GGUFReader is the comparison; the runs
alternate. Shown are medians, with the middle half of the runs.

    python scripts/bench_header.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import gguf
import typer
from random_models import ModelSpec, write_random_model

from gguf_fuse.format.parser import read_header
from gguf_fuse.measuring.gain import gain, spread


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 9,
    vocab: Annotated[int, typer.Option(help="Tokens.")] = 128256,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model.gguf")
        write_random_model(model, ModelSpec(n_vocab=vocab, n_embd=32, tokenizer="bpe"))
        seconds = measure(model, rounds)
        metadata_mb = read_header(model).metadata.n_bytes / 1e6
    spreads = {name: spread(samples) for name, samples in seconds.items()}
    found = gain(seconds["GGUFReader"], seconds["header"])
    if as_json:
        told = {name: asdict(each) for name, each in spreads.items()}
        told_gain = {"header_over_GGUFReader": asdict(found)}
        print(json.dumps({"metadata_mb": metadata_mb, "seconds": told} | told_gain, indent=2))
        return
    print(f"{vocab} tokens, {metadata_mb:.1f} MB of metadata; {rounds} runs of each")
    for name, each in spreads.items():
        print(f"{name:<20}{each.median:8.3f} s  ({each.low:.3f} to {each.high:.3f})")
    ratio = f", {found.ratio:.0f} times as fast ({found.low:.0f} to {found.high:.0f})"
    print(f"walking the header, against GGUFReader: {found.word}{ratio * found.seen}")


def measure(model: Path, rounds: int) -> dict[str, list[float]]:
    command, out = [sys.executable, "-m", "gguf_fuse"], str(model.with_name("out.gguf"))
    contenders: dict[str, Callable[[], object]] = {
        "header": lambda: read_header(model),
        "GGUFReader": lambda: gguf.GGUFReader(model),
        "gguf-fuse inspect": lambda: run([*command, "inspect", str(model)]),
        "gguf-fuse fuse": lambda: run([*command, "fuse", str(model), out, "--force", "--no-sync"]),
        "gguf-fuse verify": lambda: run([*command, "verify", str(model), out, "--structure-only"]),
        "gguf-fuse --help": lambda: run([*command, "--help"]),
        "python": lambda: run([sys.executable, "-c", "pass"]),
        "import numpy": lambda: run([sys.executable, "-c", "import numpy"]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            started = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    typer.run(main)
