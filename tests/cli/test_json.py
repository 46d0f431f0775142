"""--json: one object, with the words of one vocabulary, whatever happens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gguf_fuse.cli.answer import VOCABULARY
from tests.conftest import fused_copy, gguf_fuse
from tests.server import Outcome, Run

Model = Callable[..., Path]


def answer(done: Outcome) -> dict[str, Any]:
    said = json.loads(done.out)
    assert list(said)[:4] == ["format", "command", "exit_code", "error"]
    assert (said["format"], said["exit_code"]) == (1, done.code)
    assert done.err.splitlines()[-1:] == ([f"gguf-fuse: {said['error']}"] if done.code else [])
    assert (said["error"] is None) == (done.code == 0)
    assert [word for word in said if word not in VOCABULARY] == []
    return said  # type: ignore[no-any-return]


def test_one_vocabulary(model: Model, tmp_path: Path, run: Run) -> None:
    original, fused, back = model(), tmp_path / "out.gguf", tmp_path / "back.gguf"
    says = {
        "fuse": answer(run("fuse", original, fused, "--json")),
        "unfuse": answer(run("unfuse", fused, back, "--json")),
        "inspect": answer(run("inspect", original, "--json")),
        "verify": answer(run("verify", original, fused, "--structure-only", "--json")),
        "batch": answer(run("batch", original, "--out", tmp_path / "many", "--json")),
    }
    assert {name: said["command"] for name, said in says.items()} == {name: name for name in says}
    # The same words for the same things.
    assert says["fuse"]["bytes_out"] == says["unfuse"]["bytes_in"] == fused.stat().st_size
    assert says["fuse"]["tensors_in"] == says["unfuse"]["tensors_out"]
    assert says["inspect"]["tensors_in"] == says["fuse"]["tensors_in"]
    assert says["inspect"]["layers_fusable"] == says["fuse"]["layers_fused"] == 2
    assert says["unfuse"]["layers_split"] == 2


@pytest.mark.parametrize("command", ["fuse", "unfuse", "inspect", "verify"])
def test_a_failure_is_an_object_too(command: str, run: Run, tmp_path: Path) -> None:
    arguments = [tmp_path / "in.gguf", tmp_path / "out.gguf"][: 1 if command == "inspect" else 2]
    said = answer(run(command, *arguments, "--json"))
    assert (said["command"], said["exit_code"]) == (command, 1)
    assert said["error"] == f"{tmp_path}/in.gguf: No such file or directory"


def test_what_is_different_is_an_object(model: Model, run: Run) -> None:
    fused = fused_copy(model())
    said = answer(run("verify", model(seed=2), fused, "--structure-only", "--json"))
    assert (said["exit_code"], said["ok"]) == (4, False)


def test_wrong_usage_is_none(run: Run) -> None:
    done = run("fuse", "--json")
    assert (done.code, done.out) == (2, "")


def test_an_answer_that_cannot_be_printed(model: Model) -> None:
    with Path("/dev/full").open("w") as full:
        done = gguf_fuse("inspect", model(), "--json", stdout=full)
    assert done.returncode == 1
    assert done.stderr == "gguf-fuse: standard output: No space left on device\n"
