"""The table of loaders says what was measured in the wheels: scripts/data/loaders.tsv."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from gguf_fuse.planning.fusions import FUSIONS
from gguf_fuse.planning.loaders import Loader, architecture

DATA = Path(__file__).parents[2] / "scripts/data/loaders.tsv"
READ = ("identical", "fused only")
MEANING = {
    "identical": Loader.READS_FUSED,
    "refused": Loader.NEEDS_SEPARATE,
    "SIGSEGV": Loader.CRASHES,
}
LINES = list(csv.DictReader(DATA.open(newline=""), delimiter="\t"))


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line['architecture']}-{line['tensor']}")
def test_agrees_with_the_wheels(line: dict[str, str]) -> None:
    name, tensor, since, *cells = line.values()
    reads = architecture(name).reads(next(each for each in FUSIONS if each.fused == tensor))
    assert (f"b{reads.since.number}" if reads.since else "-") == since
    builds = [column.split()[0] for column in list(line)[3:]]
    known = {build: cell for build, cell in zip(builds, cells, strict=True) if cell != "-"}
    if known:  # llama.cpp ran the separate file in some wheel
        assert reads.loader is MEANING[list(known.values())[-1]]
    others = [at for at, cell in enumerate(known.values()) if cell not in READ]
    read = list(known)[others[-1] + 1 if others else 0 :]
    assert since == (read[0] if read else "-")
