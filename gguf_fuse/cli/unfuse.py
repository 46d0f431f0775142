"""The command unfuse."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from rich.text import Text

import gguf_fuse
from gguf_fuse.cli.console import next_line, print_parts, text
from gguf_fuse.cli.layers import fused_tensor, layer_table, print_result
from gguf_fuse.cli.options import AnyArchitecture, AsJson, DryRun, In, Out, Writing, writing
from gguf_fuse.planning.plan import Layer, Plan


@writing
def unfuse(
    source: In,
    output: Out,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    any_architecture: AnyArchitecture = False,
    *,
    how: Writing,
) -> None:
    """Write IN to OUT with all that was fused separate again: the very bytes as before."""
    rewrite = functools.partial(gguf_fuse.unfuse, source, output, any_architecture=any_architecture)
    result = how.carry_out(rewrite, output, "split", dry_run=dry_run, as_json=as_json)
    if as_json or how.quiet:
        return
    print_unfused(result, dry_run)
    if result.files and result.source.is_model:
        print_parts(next_line("verify", result.files[0], source))


def print_unfused(result: gguf_fuse.Result, dry_run: bool = False) -> None:
    print_result(result, layer_table(_rows(result.plan, dry_run)), "split", dry_run)


def _rows(plan: Plan, dry_run: bool) -> Iterator[tuple[Layer, Text]]:
    would = "would be " if dry_run else ""
    for layer in plan.changed:
        yield layer, text(f"{would}{layer.fusion.unmade}", "green")
    for layer in plan.skipped:
        yield layer, text(f"{would}left: {fused_tensor(layer)}{layer.reason}", "yellow")
