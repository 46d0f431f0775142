"""Bad input: every malformed file gives exit 1 and one clear line, soon, and writes nothing.

Each case runs in a process of its own, so that its processor time and its peak memory are the
tool's own and can be held to a bound.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import gguf_fuse
from tests.format.malformed import CASES, Case
from tests.pack import Tensor, bare, fused, save, valid
from tests.server import COMMANDS, Outcome, Run, assert_cheap, assert_one_line, command_line


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 45


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed(case: Case, run: Run, tmp_path: Path) -> None:
    path = save(case.make(), tmp_path / "evil.gguf")
    outcomes = [run(*command_line(command, path)) for command in COMMANDS]
    for outcome in outcomes:
        assert_one_line(outcome, str(path), *case.words)
    for outcome in outcomes:
        assert_cheap(outcome)
    assert len({outcome.err for outcome in outcomes}) == 1, "every command finds the same error"
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_type_without_data_is_not_called_an_overlap(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "evil.gguf"
    path.write_bytes(bare(tensors=(Tensor("only.weight", (32,), 999, b""),)).pack())
    outcome = run("inspect", path)
    assert_one_line(outcome, "'only.weight'")
    assert "overlaps" not in outcome.err


@pytest.mark.parametrize("command", [pytest.param("fuse", marks=pytest.mark.slow), *COMMANDS[1:]])
def test_truncated_at_every_boundary_and_inside_every_field(
    command: str, run: Run, tmp_path: Path
) -> None:
    file, path = valid(), tmp_path / "cut.gguf"
    data, at, cuts = file.pack(), 0, []
    for name, field in file.fields():
        cuts += [(at, f"before {name}")]
        cuts += [(at + len(field) // 2, f"inside {name}")] if len(field) > 1 else []
        at += len(field)
    n_needed = len(data) - len(file.fields()[-1][1])  # the padding of the last tensor may miss
    cuts += [(n_needed - 1, "one byte before the end")]
    cuts = [cut for cut in cuts if cut[0] < n_needed]
    for n_bytes, where in cuts if command == "fuse" else cuts[:: 3 if command == "inspect" else 5]:
        path.write_bytes(data[:n_bytes])
        outcome = run(*command_line(command, path))
        try:
            assert_one_line(outcome, str(path), "not a GGUF" if n_bytes < 4 else "truncated")
            assert_cheap(outcome)
            assert list(tmp_path.iterdir()) == [path]
        except AssertionError as error:
            raise AssertionError(f"cut {where}, at byte {n_bytes}: {error}") from error


def test_without_the_padding_of_the_last_tensor_it_is_whole(run: Run, tmp_path: Path) -> None:
    file, path = valid(), tmp_path / "whole.gguf"
    data, last = file.pack(), len(file.fields()[-1][1])
    path.write_bytes(data[:-last])
    assert run("fuse", path, tmp_path / "out").code == 0
    assert (tmp_path / "out").read_bytes() == fused(file).pack()


@pytest.mark.parametrize(
    "name", ["four_bytes", "array_length_2_63_in_a_tiny_file", "dimension_2_63"]
)
def test_malformed_in_a_real_process(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    path = save(case.make(), tmp_path / "evil.gguf")
    result = gguf_fuse("--fuse-qkv-weights", path, tmp_path / "out")
    outcome = Outcome(result.returncode, result.stdout, result.stderr, 0.0, 0)
    assert_one_line(outcome, str(path), *case.words)
    assert list(tmp_path.iterdir()) == [path]
