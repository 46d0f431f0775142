"""What a file says of itself is shown, and never obeyed by the terminal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.format.malformed import EVIL_NAME
from tests.pack import STRING, save, valid
from tests.server import Run, command_line


@pytest.mark.parametrize("command", ["fuse", "inspect"])
@pytest.mark.parametrize("place", ["name", "architecture", "tensor"])
def test_terminal_escapes_in_a_sound_file_are_not_obeyed(
    place: str, command: str, run: Run, tmp_path: Path
) -> None:
    file = valid()
    if place == "name":
        file.key("general.name", STRING, EVIL_NAME)
    elif place == "architecture":
        file.key("general.architecture", STRING, EVIL_NAME)
    else:  # the reason why a layer is left names what stands in the way
        file.tensors.append(replace(file.tensors[-1], name=f"blk.0.attn_q.{EVIL_NAME}"))
    path = save(file, tmp_path / "in.gguf")
    outcome = run(*command_line(command, path))
    assert "Traceback" not in outcome.err, outcome.err
    for line in (outcome.out + outcome.err).split("\n"):
        assert line.isprintable(), repr(line)


def test_markup_in_a_name_is_shown_as_it_is(run: Run, tmp_path: Path) -> None:
    path = save(valid().key("general.name", STRING, "[red]a[/red] \\[b] [/]"), tmp_path / "in.gguf")
    outcome = run("inspect", path)
    assert outcome.code == 0
    assert "[red]a[/red] \\[b] [/]" in outcome.out
