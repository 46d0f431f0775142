"""Wrong usage: exit 2, nothing on standard output, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server import Run


@pytest.mark.parametrize(
    "arguments",
    [
        ["fuse", "{in}", "-", "--json"],
        ["unfuse", "{in}", "-", "--json"],
        ["fuse", "{in}", "{out}", "--no-such-option"],
        ["fuse", "{in}", "{out}", "--threads", "0"],
        ["fuse", "{in}", "{out}", "--threads", "many"],
        ["fuse", "{in}", "{out}", "--on-mismatch", "guess"],
        ["fuse", "{in}"],
        ["fuse"],
        ["--fuse-qkv-weights", "{in}"],
        ["inspect", "{in}", "{out}"],
        ["no-such-command"],
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments: list[str], run: Run, packed: Path, tmp_path: Path) -> None:
    places = {"{in}": str(packed), "{out}": str(tmp_path / "out")}
    outcome = run(*(places.get(argument, argument) for argument in arguments))
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == [packed]
