"""Wrong usage: exit 2, nothing on standard output, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server import Run, assert_one_line


@pytest.mark.parametrize(
    "arguments",
    [
        ["fuse", "{in}", "-", "--json"],
        ["unfuse", "{in}", "-", "--json"],
        ["fuse", "{in}", "{out}", "--no-such-option"],
        ["fuse", "{in}", "{out}", "--threads", "0"],
        ["fuse", "{in}", "{out}", "--threads", "many"],
        ["fuse", "{in}", "{out}", "--on-mismatch", "guess"],
        ["fuse", "{in}", "{out}", "--split-max-size", "4x"],
        ["fuse", "{in}", "--force"],
        ["fuse", "{in}", "-", "--verify"],
        ["fuse", "{in}", "{out}", "{in}"],
        ["fuse"],
        ["--fuse-qkv-weights"],
        ["inspect"],
        ["{in}", "{out}"],
        ["{in}", "{out}", "{in}"],
        ["no-such-command"],
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments: list[str], run: Run, packed: Path, tmp_path: Path) -> None:
    places = {"{in}": str(packed), "{out}": str(tmp_path / "out")}
    outcome = run(*(places.get(argument, argument) for argument in arguments))
    assert_one_line(outcome, code=2)
    assert list(tmp_path.iterdir()) == [packed]


TOLD = {  # what is told for what was typed
    "in.gguf out.gguf": "did you mean: gguf-fuse --fuse-qkv-weights in.gguf out.gguf",
    "-f in.gguf out.gguf": "did you mean: gguf-fuse --fuse-qkv-weights -f in.gguf out.gguf",
    "in.gguf --dry-run": "did you mean: gguf-fuse --fuse-qkv-weights in.gguf --dry-run",
    "a.gguf b.gguf c.gguf": "did you mean: gguf-fuse inspect a.gguf b.gguf c.gguf",
    "inspct in.gguf": "no command 'inspct'; did you mean inspect?",
    "convert": "no command 'convert'; gguf-fuse --help lists all",
    "help convert": "no command 'convert'; gguf-fuse --help lists all",
    "fuse a b --overwrite": "no option --overwrite; did you mean --force?",
    "--fuse_qkv_weights a b": "no option --fuse_qkv_weights; did you mean --fuse-qkv-weights?",
    "--fuse-qkv-weight a b": "no option --fuse-qkv-weight; did you mean --fuse-qkv-weights?",
    "fuse a b --jobs 4": "no option --jobs; did you mean --threads?",
    "fuse a b -j 4": "no option -j; did you mean --threads?",
    "fuse a b --dry_run": "no option --dry_run; did you mean --dry-run?",
    "fuse a b --purple": "no option --purple",
    "inspect --fuse-qkv-weights a": "no option --fuse-qkv-weights",
    "fuse a b --threads many": "--threads takes a whole number from 1 to 64",
    "fuse a b --threads 65": "--threads takes a whole number from 1 to 64",
    "fuse a b --split-max-tensors 0": "--split-max-tensors takes a whole number, 1 or more",
    "fuse a b --on-mismatch guess": "--on-mismatch takes skip or error",
    "fuse a b --reflink 1": "--reflink takes auto or always or never",
    "fuse a b --split-max-size 4x": "--split-max-size: '4x': write a size as 4G, 500M, 100K or a "
    "number of bytes",
    "batch a --out b --split-max-size 4x": "--split-max-size: '4x': write a size as 4G, 500M, 100K "
    "or a number of bytes",
    "batch a --out b --split-max-size 4G --split-max-tensors 4": "give --split-max-size or "
    "--split-max-tensors, not both",
    "fuse a b --threads": "option '--threads' requires an argument",
    "fuse": "IN is missing: gguf-fuse fuse [OPTIONS] IN [OUT]",
    "verify a": "FUSED is missing: gguf-fuse verify [OPTIONS] ORIGINAL FUSED",
    "fuse a b c": "'c' is one argument too many: gguf-fuse fuse [OPTIONS] IN [OUT]",
    "fuse a.gguf -f": "--force replaces only an OUT that is named; name a-fused.gguf",
    "fuse a - --verify": "--verify needs a file to read, and OUT is -",
}


@pytest.mark.parametrize("typed", TOLD)
def test_the_right_way_is_named(typed: str, run: Run) -> None:
    outcome = run(*typed.split())
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"gguf-fuse: {TOLD[typed]}\n"


def test_what_cannot_be_a_name(run: Run) -> None:
    assert_one_line(run("x" * 300), "no command", code=2)


def test_no_command_is_named_that_cannot_be_pasted(run: Run) -> None:
    assert "did you mean" not in run("a\nb.gguf", "out.gguf").err


def test_no_arguments_show_the_help_and_are_wrong_usage(run: Run) -> None:
    outcome = run()
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == run("--help").out
