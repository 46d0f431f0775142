"""The commands, given models in several files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import fused_copy
from tests.server import Run
from tests.shards import Model, in_three, read, shard_paths


def test_inspect(model: Model, run: Run) -> None:
    original = model("whole.gguf")
    parts = in_three(original)
    whole, one = (json.loads(run("inspect", path, "--json").out) for path in (original, parts[1]))
    assert one["input"] == str(parts[1])
    assert one["bytes_in"] == sum(path.stat().st_size for path in parts)
    assert one | {key: whole[key] for key in ("input", "bytes_in")} == whole
    assert "one of 3 shards" in run("inspect", parts[1]).out


def test_command_line(model: Model, tmp_path: Path, run: Run) -> None:
    original = model("whole.gguf")
    parts = in_three(original)
    out = shard_paths(tmp_path / "out", 3)
    done = run("fuse", parts[1], out[0], "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert (result["input"], result["output"]) == (str(parts[1]), str(out[0]))
    copied = result["bytes_copied"] + result["bytes_cloned"]
    assert copied > sum(len(data) for _, _, data in read(out)[1])
    piped = subprocess.run(
        [sys.executable, "-m", "gguf_fuse", "fuse", str(parts[2]), "-"],
        capture_output=True,
        check=True,
    )
    assert piped.stdout == fused_copy(original).read_bytes()
    for options in (["--split-max-size", "50K"], ["--split-max-tensors", "6"]):
        done = run("unfuse", out[2], tmp_path / options[1], *options)
        assert done.code == 0, done.err
        assert read(sorted(tmp_path.glob(f"{options[1]}-*"))) == read([original])


WRONG_USAGE = {
    "both": ["{out}", "--split-max-size", "4G", "--split-max-tensors", "4"],
    "size": ["{out}", "--split-max-size", "4 apples"],
    "tensors": ["{out}", "--split-max-tensors", "0"],
    "pipe": ["-", "--split-max-tensors", "1"],
}


@pytest.mark.parametrize("arguments", WRONG_USAGE.values(), ids=WRONG_USAGE.keys())
def test_wrong_usage(model: Model, tmp_path: Path, arguments: list[str], run: Run) -> None:
    original = model()
    places = {"{out}": str(tmp_path / "out")}
    done = run("fuse", original, *(places.get(argument, argument) for argument in arguments))
    assert done.code == 2, done.err
    assert list(tmp_path.iterdir()) == [original]
