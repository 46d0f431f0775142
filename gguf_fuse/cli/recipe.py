"""The command recipe."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from rich.text import Text

import gguf_fuse
from gguf_fuse.choices import WayName
from gguf_fuse.cli import console
from gguf_fuse.cli.answer import layer_json, result_json
from gguf_fuse.cli.console import text
from gguf_fuse.cli.layers import ranges
from gguf_fuse.cli.options import AsJson, In, Quiet, existing_file
from gguf_fuse.cli.outcome import EXIT_NOT_VERIFIED, fail, one_line, print_json

if TYPE_CHECKING:
    from gguf_fuse.planning.recipe import Recipe, Way

_F16, _MATRIX = "model-F16.gguf", "imatrix.gguf"  # stand for files that only the user can name
_ADVICE = {
    None: "leave it: half of the layers or more can be fused as they are. Measured on a GPU with a "
    "half-fused Q4_K_M: 3 % faster, and 3.9 % when raised, for 1.9 % more bytes",
    "raise": "raise: as it is, little or nothing of it can be fused",
}


def recipe(
    source: In,
    output: Annotated[
        Path | None, existing_file("[OUT]", "The fused file; only --run must have it.")
    ] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Do it: llama-quantize, check, fuse. IN stays as it is.")
    ] = False,
    way: Annotated[
        WayName,
        typer.Option(
            metavar="raise|lower",
            help="What --run does: to the largest type of the three, or the smallest.",
        ),
    ] = "raise",
    unquantized: Annotated[
        Path | None,
        typer.Option("--from", metavar="F16", help="The model in F16, to quantize that anew."),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The importance matrix of the model.")
    ] = None,
    llama_quantize: Annotated[
        str, typer.Option(metavar="FILE", help="Where that program of llama.cpp is.")
    ] = "llama-quantize",
    force: Annotated[bool, typer.Option("-f", "--force", help="Replace an existing OUT.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show the commands that make Q, K and V of mixed types fusable, or run them."""
    found = gguf_fuse.recipe(source)
    shell = _Shell(found, output, unquantized, imatrix, llama_quantize)
    if not run:
        return print_json(_json(shell)) if as_json else _print(shell)
    if output is None:
        raise typer.BadParameter("--run needs OUT")
    with console.progress_bar(quiet) as bar:
        try:
            result = gguf_fuse.requantize_and_fuse(
                found,
                way,
                output,
                unquantized=unquantized,
                matrix=imatrix,
                llama_quantize=llama_quantize,
                force=force,
                on_start=bar.start,
                on_progress=bar.advance,
            )
        except gguf_fuse.Altered as altered:
            fail(str(altered), EXIT_NOT_VERIFIED)
    if as_json:
        fused = result_json(result.source, result.plan.skipped, result)
        print_json(_json(shell) | {"run": way, "result": fused | {"input": str(source)}})
    elif not quiet:
        n_changed, n_fused = len(found.way(way).types), len(result.plan.changed)
        line = f"{output}: {n_changed} tensors requantized and no other, {n_fused} layers fused"
        console.print_parts([text(f"{line}; {decimal(result.n_bytes)}")])


@dataclass(frozen=True)
class _Shell:
    """The recipe as commands for a shell."""

    recipe: Recipe
    output: Path | None
    unquantized: Path | None
    matrix: Path | None
    program: str

    def commands(self, way: Way, unquantized: str | None) -> list[str]:
        source = Path(self.recipe.source)
        between = source.with_name(f"{source.stem}-requantized.gguf")
        output = self.output or source.with_name(f"{source.stem}-fused.gguf")
        matrix = self.matrix or (_MATRIX if way.wants_matrix else None)
        again = [] if unquantized else ["--allow-requantize"]
        words = self.recipe.quantize(
            way, unquantized or _path(source), _path(between), matrix and _path(matrix)
        )
        fuse = ["gguf-fuse", "fuse", _path(between), _path(output)]
        return [shlex.join([self.program, *again, *words]), shlex.join(fuse)]

    def ways(self) -> Iterator[tuple[str, Way, list[str]]]:
        """With names; "anew" is to lower, but from a file that may not be there."""
        own = None if self.unquantized is None else _path(self.unquantized)
        for way in self.recipe.ways:
            yield way.name, way, self.commands(way, own)
        if not own:
            lower = self.recipe.way("lower")
            yield "anew", lower, self.commands(lower, _F16)


def _path(path: Path | str) -> str:
    """No option, whatever it begins with."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def _print(shell: _Shell) -> None:
    """Commands are not wrapped, nor cut: they are for the clipboard."""
    for line in _lines(shell):
        console.printer().print(line, highlight=False, soft_wrap=True)


def _lines(shell: _Shell) -> Iterator[Text]:
    from gguf_fuse.planning.recipe import MATRIX_KEY

    recipe = shell.recipe
    names = ranges([layer.name for layer in recipe.layers])
    yield text(f"types differ in {names}; {recipe.n_fusable} other layers can be fused as they are")
    yield text(f"advice: {_ADVICE[recipe.advice]}", "yellow")
    for name, way, commands in shell.ways():
        yield text()
        yield text(f"{name}: {_changes(recipe, way)}; {_size(recipe, way)}{_LOSSES[name]}", "bold")
        for command in commands:
            yield Text(one_line(command, len(command)))
    yield text()
    wanted = next((way.wants_matrix for way in recipe.ways if way.wants_matrix), None)
    if wanted and shell.matrix is None:
        made_with = recipe.header.metadata.get(MATRIX_KEY)
        own = f" (this file was made with {made_with})" if made_with else ""
        yield text(
            f"{_MATRIX} stands for the model's importance matrix{own}: llama-quantize wants it for "
            f"tensors of {wanted}, be it to copy them"
        )
    yield text("with --run and OUT, the first is done and checked; --way lower does the second")


_LOSSES = {
    "raise": ", hardly any loss",
    "lower": ", some loss",
    "anew": f", no second rounding, if {_F16} is the model in F16",
}


def _changes(recipe: Recipe, way: Way) -> str:
    """blk.0-3: Q4_K, Q4_K, Q6_K -> Q6_K."""
    from gguf_fuse.format.types import type_name

    alike: dict[str, list[str]] = {}
    for layer in recipe.layers:
        parts = (f"{layer.name}.{part}.weight" for part in layer.fusion.parts)
        target = next(way.types[part] for part in parts if part in way.types)
        alike.setdefault(f"{', '.join(layer.types)} -> {type_name(target)}", []).append(layer.name)
    return "; ".join(f"{ranges(names)}: {change}" for change, names in alike.items())


def _size(recipe: Recipe, way: Way) -> str:
    word = "more" if way.n_bytes >= 0 else "less"
    share = way.n_bytes / recipe.header.file_bytes
    return f"{decimal(abs(way.n_bytes))} {word} ({share:+.1%})"


def _json(shell: _Shell) -> dict[str, Any]:
    from gguf_fuse.format.types import type_name

    recipe = shell.recipe
    return {
        "input": recipe.header.path,
        "layers": [layer_json(layer, "not fusable") for layer in recipe.layers],
        "layers_fusable": recipe.n_fusable,
        "advice": recipe.advice or "leave",
        "ways": [
            {
                "way": name,
                "commands": commands,
                "tensors": {name: type_name(type_id) for name, type_id in way.types.items()},
                "bytes": way.n_bytes,
                "wants_imatrix": way.wants_matrix is not None,
            }
            for name, way, commands in shell.ways()
        ],
    }
