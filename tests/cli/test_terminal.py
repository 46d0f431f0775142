"""What a file says of itself is shown, and never obeyed by the terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from gguf_fuse.cli.console import Flowing
from tests.format.malformed import EVIL_NAME
from tests.pack import STRING, save, valid
from tests.server import Run, command_line
from tests.terminal import on_a_terminal


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


def test_errors_are_red_on_a_terminal_only(run: Run, tmp_path: Path) -> None:
    for arguments, code in ((["inspect", "missing.gguf"], 1), (["fuse", "--purple"], 2)):
        plain = run(*arguments).err.removesuffix("\n")
        assert plain.startswith("gguf-fuse: ")
        red = "\x1b[1;31mgguf-fuse:\x1b[0m" + plain.removeprefix("gguf-fuse:")
        assert on_a_terminal(*arguments, code=code).strip() == red
        assert "\x1b[1;31m" not in on_a_terminal(*arguments, code=code, NO_COLOR="1")
        assert on_a_terminal(*arguments, code=code, TERM="dumb").strip() == plain


def test_an_error_is_one_line_on_a_narrow_terminal(tmp_path: Path) -> None:
    name = f"{'long-name-' * 12}.gguf"
    shown = on_a_terminal("inspect", name, code=1, COLUMNS="40", TERM="dumb")
    assert shown == f"gguf-fuse: {name}: No such file or directory\r\n"


def test_a_dumb_terminal_gets_nothing_but_the_text(packed: Path, tmp_path: Path) -> None:
    shown = on_a_terminal("fuse", packed, tmp_path / "out.gguf", TERM="dumb", COLUMNS="200")
    assert "\x1b" not in shown and shown.startswith("layers ")


@pytest.mark.parametrize("columns", [60, 80])
def test_the_progress_bar_is_one_line(packed: Path, tmp_path: Path, columns: int) -> None:
    shown = on_a_terminal("fuse", packed, tmp_path / "out.gguf", "-f", COLUMNS=str(columns))
    progress = shown[: shown.index("layers ")]
    # A second line of it would take a second step up to be cleared.
    assert "\x1b[1A" in progress and "\x1b[1A\x1b[2K\x1b[1A" not in progress


def shown_at(width: int, part: RenderableType) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", range(30, 120, 3))
def test_a_line_wraps_between_words_with_an_indent(width: int) -> None:
    words = "6 of 8 layers fused; 10.3 MB in 0.03 s (349.8 MB/s) to a-long-name.gguf"
    first, *others = shown_at(width, Flowing(words, indent=4)).splitlines()
    assert " ".join([first, *(line.removeprefix("    ") for line in others)]) == words
    assert all(line.startswith("    ") for line in others)
    for whole in ("10.3 MB", "0.03 s", "(349.8 MB/s)", "a-long-name.gguf"):
        assert any(whole in line for line in (first, *others))
