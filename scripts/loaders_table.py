#!/usr/bin/env python3
"""Which builds of llama.cpp read fused files, by architecture: measured in the wheels of xllamacpp.

    python scripts/loaders_table.py --cache wheels

For each architecture that tests/models makes a random model of, that model is fused, and both
files are loaded by each wheel, every load in a process of its own; their log-probabilities are
compared (of encoders, their embeddings). What scripts/data/loaders.tsv holds already is not done
again: a new wheel is one more column. A cell is one of

    identical     the fused file is read, with the same log-probabilities, bit by bit
    fused only    the fused file is read, the separate one is not
    differs       it is read, with others
    refused       the loader says that a tensor is missing, or the like
    SIGSEGV, ...  what killed the process; "timeout" after a minute
    -             this wheel does not run the separate file either

`since` is the build from which on all are of the first two (or "-").
tests/planning/test_loaders.py holds gguf_fuse/planning/loaders.py against the table.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from random_models import LAYOUTS, ModelSpec, write_random_model

from gguf_fuse.api import Options, fuse
from gguf_fuse.planning.fusions import FUSIONS, GATE_UP, QKV
from gguf_fuse.planning.loaders import Loader, architecture
from gguf_fuse.planning.plan import NothingToDo
from tests.compare import PROMPT
from tests.llama_judge import LoadFailed, embeddings, log_probabilities
from tests.models.extra_layouts import ENCODERS, EXTRA

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "scripts/data/loaders.tsv"
UNKNOWN = "-"
READ = ("identical", "fused only")

for _name, _layout in EXTRA.items():
    LAYOUTS.setdefault(_name, _layout)

Judge = Callable[..., NDArray[np.float32]]
Row = tuple[str, str]  # architecture, name of the fused tensor
Cells = dict[Row, dict[str, str]]  # by column


@dataclass(frozen=True)
class Wheel:
    """column: "b9093 2026-05-11", the build of llama.cpp and the day the wheel was made."""

    folder: Path
    column: str


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, required=True, help="where wheels are kept")
    cache = parser.parse_args().cache
    cells = read(TABLE) if TABLE.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        models = {row: pair for row in rows() if (pair := make(row, Path(folder)))}
        for version in versions():
            number = int(version.split(".")[2])
            done = {row for row in cells if any(build(column) == number for column in cells[row])}
            missing = {row: models[row] for row in models if row not in done}
            if not missing:
                continue
            wheel = fetch(version, cache)
            for row, cell in measure(wheel, missing):
                cells.setdefault(row, {})[wheel.column] = cell
                print(wheel.column, *row, cell, sep="\t", flush=True)
            TABLE.write_text("".join("\t".join(line) + "\n" for line in lines(cells)))


# -- the table -------------------------------------------------------------------------------------


def read(path: Path) -> Cells:
    with path.open(newline="") as file:
        header, *table = csv.reader(file, delimiter="\t")
    return {
        (name, tensor): {c: cell for c, cell in zip(header[3:], found, strict=True) if cell}
        for name, tensor, _, *found in table
    }


def lines(cells: Cells) -> Iterator[list[str]]:
    """Of the file; a cell that was not measured is empty."""
    columns = sorted({column for row in cells.values() for column in row}, key=build)
    yield ["architecture", "tensor", "since", *columns]
    for row in sorted(cells):
        found = {column: cells[row].get(column, "") for column in columns}
        yield [*row, since(found), *found.values()]


def since(cells: dict[str, str]) -> str:
    """The first build from which on the fused file is read by all that run the model at all."""
    first = UNKNOWN
    for column, cell in reversed(cells.items()):
        if cell in READ:
            first = column.split()[0]
        elif cell != UNKNOWN:
            break
    return first


def build(column: str) -> int:
    return int(column.split()[0].removeprefix("b"))


# -- the wheels ------------------------------------------------------------------------------------


def versions() -> list[str]:
    """Those named after month and build, which began in April 2026; of each build the last."""
    told = pip("index", "versions", "xllamacpp")
    found = re.findall(r"\b20\d\d\.\d+\.\d+(?:\.\d+)?\b", told.split("Available versions:")[1])
    by_build = {version.split(".")[2]: version for version in sorted(set(found), key=len)}
    return sorted(by_build.values(), key=lambda version: int(version.split(".")[2]))


def fetch(version: str, cache: Path) -> Wheel:
    folder = cache / version
    if not folder.exists():
        pip("download", "--quiet", "--no-deps", "--dest", str(cache), f"xllamacpp=={version}")
    (path,) = cache.glob(f"xllamacpp-{version}-*.whl")
    with zipfile.ZipFile(path) as wheel:
        if not folder.exists():
            wheel.extractall(folder)
        year, month, day, *_ = wheel.infolist()[0].date_time
    return Wheel(folder.absolute(), f"b{version.split('.')[2]} {year}-{month:02}-{day:02}")


def pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


# -- the models ------------------------------------------------------------------------------------


def rows() -> Iterator[Row]:
    for name, layout in LAYOUTS.items():
        yield name, QKV.fused
        if layout.n_expert or architecture(name).gate_up.loader is Loader.READS_FUSED:
            yield name, GATE_UP.fused


def make(row: Row, folder: Path) -> tuple[Path, Path] | None:
    """The model, separate and fused; None where nothing in it can be fused."""
    name, tensor = row
    separate = folder / f"{name}-{tensor}.gguf"
    fused = separate.with_suffix(".fused.gguf")
    write_random_model(separate, spec(name, tensor))
    (fusion,) = (fusion for fusion in FUSIONS if fusion.fused == tensor)
    try:
        fuse(
            separate,
            fused,
            fusions=[fusion],
            any_architecture=True,
            options=Options(sync=False),
        )
    except NothingToDo:
        return None
    return separate, fused


def spec(name: str, tensor: str) -> ModelSpec:
    return ModelSpec(name, n_expert=4) if tensor == GATE_UP.fused else ModelSpec(name)


def measure(wheel: Wheel, models: Mapping[Row, tuple[Path, Path]]) -> Iterator[tuple[Row, str]]:
    """What the wheel makes of each. It comes before an installed one in the path of a process."""
    path = os.pathsep.join([str(wheel.folder), str(ROOT)])
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, look_first_in, (path,)) as process:
        for row, (separate, fused) in models.items():
            judge = embeddings if row[0] in ENCODERS else log_probabilities
            yield row, process.submit(outcome, judge, separate, fused).result()


def look_first_in(path: str) -> None:
    os.environ["PYTHONPATH"] = path


def outcome(judge: Judge, separate: Path, fused: Path) -> str:
    """One cell of the table."""
    expected, found = numbers(judge, separate), numbers(judge, fused)
    if isinstance(expected, str):
        return UNKNOWN if isinstance(found, str) else "fused only"
    if isinstance(found, str):
        return found
    return "identical" if (expected == found).all() else "differs"


def numbers(judge: Judge, path: Path) -> NDArray[np.float32] | str:
    """What llama.cpp computes, or how the load ended."""
    try:
        return judge(path, PROMPT)
    except LoadFailed as failed:
        return failed.signal or "refused"


if __name__ == "__main__":
    main()
