"""The command fuse, which is also what `gguf-fuse --fuse-qkv-weights IN OUT` means."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from rich.console import RenderableType
from rich.text import Text
from typer import BadParameter

import gguf_fuse
from gguf_fuse.cli.console import Flowing, next_line, print_parts, text
from gguf_fuse.cli.layers import (
    beside,
    fused_tensor,
    layer_table,
    layout_notes,
    print_result,
    recipe_hint,
)
from gguf_fuse.cli.options import AsJson, DryRun, Fusing, In, OutOrBeside, Writing, writing
from gguf_fuse.cli.usage import WHAT, complete_path, option
from gguf_fuse.planning.plan import Layer


@writing
def fuse(
    source: In,
    output: OutOrBeside = None,
    *,
    what: Fusing,
    dry_run: DryRun = False,
    verify: Annotated[
        bool, option("--verify", part=WHAT, help="Then verify OUT: exit 4 when that fails.")
    ] = False,
    as_json: AsJson = False,
    base: Annotated[
        Path | None,
        option(
            "--base",
            part=WHAT,
            metavar="MODEL",
            help="The model that IN, a LoRA adapter or importance matrix, is for.",
            readable=False,
            autocompletion=complete_path,
        ),
    ] = None,
    how: Writing,
) -> None:
    """Write IN to OUT with Q, K and V of each layer as one attn_qkv tensor.

    With --stack-experts or --split-ssm-in: an old layout as llama.cpp reads it now. Several flags:
    all in one pass.
    """
    if verify and output == "-":
        raise BadParameter("--verify needs a file to read, and OUT is -")
    place = beside(source) if output is None else output
    if output is None and how.force:
        raise BadParameter(f"--force replaces only an OUT that is named; name {place}")
    told = not (as_json or how.quiet)
    rewrite = functools.partial(
        gguf_fuse.fuse,
        source,
        place,
        fusions=what.fusions,
        on_mismatch=what.on_mismatch,
        any_architecture=what.any_architecture,
        base=base,
    )
    said = told and output is None and not Path(place).exists()  # else it is not written
    result = how.carry_out(
        rewrite,
        place,
        "fused",
        dry_run=dry_run,
        as_json=as_json,
        on_start=functools.partial(print_parts, [text(f"OUT: {place}")] if said else []),
    )
    if told:
        print_fused(result, dry_run, how.force)
    if verify and result.files:
        from gguf_fuse.cli.verify import verify as verify_command

        verify_command(source, str(result.files[0]), quiet=not told)
    elif told:
        print_parts(next_after(result), stderr=output == "-")


def print_fused(result: gguf_fuse.Result, dry_run: bool = False, force: bool = False) -> None:
    """What was done, layer by layer, and what to know of the file."""
    notes = _notes(result, dry_run and not force)
    print_result(result, layer_table(_rows(result, dry_run)), "fused", dry_run, notes)


def _rows(result: gguf_fuse.Result, dry_run: bool) -> Iterator[tuple[Layer, Text]]:
    would = "would be " if dry_run else ""
    for layer in result.plan.changed:
        yield layer, text(f"{would}{layer.fusion.made}", "green")
    for layer in result.plan.skipped:
        reason = f"{fused_tensor(layer)}{layer.reason or 'already fused'}"
        yield layer, text(f"{would}left: {reason}", "yellow")


def _notes(result: gguf_fuse.Result, says_what_is_there: bool) -> Iterator[RenderableType]:
    there = [output.path for output in result.outputs if output.path.exists()]
    if says_what_is_there and there and result.output != "-":
        yield Flowing(f"{there[0]} is there already: --force replaces it", "yellow")
    if result.source.shards and result.cut_anew:
        yield Flowing(
            f"unfuse will give back one file in place of the {len(result.source.shards)} shards; "
            "to get these, call OUT as they are called",
            "yellow",
        )
    yield from layout_notes(result)


def next_after(result: gguf_fuse.Result) -> Iterator[Text]:
    """verify takes models, and what was written to a file."""
    yield from recipe_hint(result.source, result.plan.skipped)
    if result.files and result.source.is_model:
        yield from next_line("verify", result.source.path, result.files[0])
