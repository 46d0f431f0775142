"""The command unfuse."""

from __future__ import annotations

import functools

import gguf_fuse
from gguf_fuse.cli.console import next_line, print_parts, text
from gguf_fuse.cli.layers import layer_table, print_result
from gguf_fuse.cli.options import AnyArchitecture, AsJson, DryRun, In, Out, Writing, writing


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
    would = "would be " if dry_run else ""
    table = layer_table(
        (layer, text(f"{would}split into {', '.join(layer.fusion.parts)}", "green"))
        for layer in result.plan.changed
    )
    print_result(result, table, "split", dry_run)
