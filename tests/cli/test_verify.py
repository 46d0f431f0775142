"""verify: what it says of two files, and the limits of what it may take."""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from gguf_fuse.measuring.gain import Word
from tests.conftest import fused_copy, gguf_fuse, unfused_copy
from tests.edit import bytes_of

Model = Callable[..., Path]


LARGEST = r"largest error \d\.\de-\d\d of a limit of \d\.\de-\d\d"


def said(*arguments: Any, **settings: Any) -> str:
    """What verify prints when all is well."""
    done = gguf_fuse("verify", *arguments, **settings)
    assert (done.returncode, done.stderr) == (0, "")
    return str(done.stdout)


def copy_of(path: Path, name: str = "copy.gguf") -> Path:
    return Path(shutil.copy(path, path.with_name(name)))


# -- one sentence --------------------------------------------------------------------------------


def test_the_verdict_is_one_sentence(model: Model) -> None:
    original = model()
    fused = fused_copy(original)
    assert re.fullmatch(
        "Identical: 21 tensors and all metadata, byte for byte; attention computed in 2 of 2 "
        rf"layers, {LARGEST}\. Safe to use {fused}\.\n",
        said(original, fused),
    )
    assert (
        said(original, fused, "--structure-only")
        == "Identical: 21 tensors and all metadata, byte for byte; attention not computed. Safe to "
        f"use {fused}.\n"
    )
    assert "attention computed in 1 of 2 layers, " in said(original, fused, "--layers", "1")
    assert said(original, fused, "--quiet") == ""


@pytest.mark.parametrize("columns", ["60", "120"])
@pytest.mark.parametrize("plain", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_the_verdict_is_broken_between_words(
    model: Model, columns: str, plain: dict[str, str]
) -> None:
    original = model()
    fused = fused_copy(original)
    environment = {**os.environ, "COLUMNS": columns, **plain}
    shown = said(original.name, fused.name, cwd=original.parent, env=environment)
    sentence = "Identical: 21 tensors and all metadata, byte for byte; attention computed in 2 of 2"
    assert re.fullmatch(
        rf"{sentence} layers, {LARGEST}\. Safe to use {fused.name}\.", " ".join(shown.split())
    )
    lines = shown.splitlines()
    assert len(lines) == (3 if columns == "60" else 2)
    assert all(len(line) <= int(columns) and line == line.rstrip() for line in lines)


def test_into_a_pipe_the_verdict_is_one_line(model: Model) -> None:
    original = model()
    folder = original.parent / ("long" * 40)
    folder.mkdir()
    fused = fused_copy(original).rename(folder / "fused.gguf")
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    (line,) = said(original, fused, "--structure-only", env=environment).splitlines()
    assert line.endswith(f" Safe to use {fused}.")


def test_what_was_computed_partly_is_told_before(model: Model) -> None:
    original = model(architecture="qwen35", n_layer=4)
    fused = fused_copy(original)
    note, verdict = said(original, fused).splitlines()
    assert note.startswith("blk.0, 2: no Q, K and V of its own, but other attention")
    assert re.search(rf"; attention computed PARTLY, in 2 of 4 layers, {LARGEST}\. Safe", verdict)


def test_what_is_wrong_with_the_original_is_told_before(model: Model) -> None:
    original = model()
    fused = fused_copy(original)
    with original.open("ab") as file:
        file.write(bytes(32))
    note, verdict = said(original, fused, "--structure-only").splitlines()
    assert note.startswith("the original: tensor ")
    assert verdict.startswith("Identical: ")


# -- details -------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [30, 45, 60, 100])
def test_how_near_to_the_limit_is_always_shown(model: Model, columns: int) -> None:
    original = model()
    environment = {**os.environ, "COLUMNS": str(columns)}
    shown = said(original, fused_copy(original), "--verbose", env=environment)
    assert max(map(len, shown.splitlines())) <= columns
    assert "limit" in shown
    for line in shown.splitlines():
        assert not line.startswith("blk.") or line.rstrip().endswith("%")


def test_details_have_times_with_their_spread_and_a_word(model: Model) -> None:
    original = model()
    shown = said(original, fused_copy(original), "--verbose")
    assert re.search(r"^ok structure: 2 fused layers; .* of tensors compared in ", shown)
    assert "\nok numbers: 2 layers computed; largest errors against float64\n" in shown
    way = r"[\d.e-]+ ms \([\d.e-]+ to [\d.e-]+\)"
    word = f"({'|'.join(get_args(Word))}); medians, and the middle half in brackets"
    line = rf"^time in blk\.0, 3 tokens at once: projections {way} separate, {way} fused: {word}$"
    assert re.search(line, shown, re.MULTILINE)
    assert re.search(
        rf"^decode over 1000 cells: {way} expanded, {way} broadcast, {way} split$",
        shown,
        re.MULTILINE,
    )
    assert shown.splitlines()[-1].startswith("Identical: ")


# -- two files that are no pair, or not in this order --------------------------------------------


@pytest.mark.parametrize("link", [False, True])
def test_the_same_file_twice(model: Model, link: bool) -> None:
    path = model()
    other = path
    if link:
        other = path.with_name("link.gguf")
        os.link(path, other)
    done = gguf_fuse("verify", path, other)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{path} and {other} are the same file, so there is nothing to compare" in done.stderr


def test_two_files_with_nothing_fused(model: Model) -> None:
    original = model()
    back = unfused_copy(fused_copy(original))
    for other in (back, copy_of(original)):
        verdict = said(original, other)
        assert verdict.startswith("Identical: 21 tensors and all metadata, byte for byte; neither ")
        assert "; neither is fused; attention computed in 2 of 2 layers, largest " in verdict
    with bytes_of(back) as data:
        data[-1] ^= 1
    done = gguf_fuse("verify", original, back, "--structure-only")
    assert (done.returncode, done.stdout) == (4, "")
    assert re.fullmatch(
        r"gguf-fuse: verification failed: blk\.1\.ffn_down\.weight differs in row 63 \(byte (\d+) "
        r"of the original, byte \1 of the fused file\); neither is fused\n",
        done.stderr,
    )


def test_two_fused_files(model: Model) -> None:
    fused = fused_copy(model())
    assert "; both are fused alike; attention computed in 2 of " in said(fused, copy_of(fused))


def test_exchanged_files_are_verified_all_the_same(model: Model) -> None:
    original = model()
    fused = fused_copy(original)
    done = gguf_fuse("verify", fused, original)
    assert done.returncode == 0
    assert done.stderr == (
        f"gguf-fuse: {fused} is the fused file, {original} the original: verified that way round\n"
    )
    assert done.stdout.startswith("Identical: 21 tensors ")
    assert done.stdout.endswith(f". Safe to use {fused}.\n")
    printed = json.loads(gguf_fuse("verify", fused, original, "--json").stdout)
    assert printed["exchanged"]
    assert (printed["original"], printed["fused"]) == (str(original), str(fused))


def test_two_models_are_one_line(model: Model) -> None:
    other = fused_copy(model("other.gguf", architecture="qwen2"))
    done = gguf_fuse("verify", model(), other)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == (
        "gguf-fuse: verification failed: two different models: architecture 'llama', but 'qwen2' "
        f"in the fused file; do not use {other}\n"
    )


def test_no_layers_where_nothing_is_computed() -> None:
    done = gguf_fuse("verify", "a.gguf", "b.gguf", "--structure-only", "--layers", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--structure-only computes nothing: leave out --layers" in done.stderr


# -- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [("--n-kv", 1 << 24), ("--n-prompt", 1 << 24)])
def test_more_than_the_memory_is_refused_beforehand(model: Model, sizes: tuple[str, int]) -> None:
    original = model()
    done = gguf_fuse("verify", original, fused_copy(original), *sizes, "--n-seqs", 5000)
    assert (done.returncode, done.stdout) == (1, "")
    line = (
        rf"gguf-fuse: {original}: blk.0: computing takes about \d+\.\d GB of memory, .* are free; "
    )
    assert re.match(line + "lower --n-prompt, --n-seqs or --n-kv\n$", done.stderr)


def test_too_little_memory_is_one_line(model: Model) -> None:
    """For this process alone, as in a container."""
    original = model()
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_AS, (1 << 30, 1 << 30))
    files = original, fused_copy(original)
    done = gguf_fuse("verify", *files, "--n-kv", 1 << 20, preexec_fn=limit)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("gguf-fuse: not enough memory: Unable to allocate")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--n-prompt", "--n-decode", "--n-seqs", "--n-kv"])
@pytest.mark.parametrize("value", [0, (1 << 24) + 1, 10**30])
def test_counts_have_limits(option: str, value: int) -> None:
    done = gguf_fuse("verify", "a.gguf", "b.gguf", option, value)
    assert (done.returncode, done.stdout) == (2, "")
    assert option in done.stderr
