"""The command unfuse."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from rich.text import Text

import gguf_fuse
from gguf_fuse.cli.console import failing, text
from gguf_fuse.cli.layers import fused_tensor, layer_table, print_result, shown_parts
from gguf_fuse.cli.options import AnyArchitecture, AsJson, DryRun, In, Out, Writing, writing
from gguf_fuse.planning.plan import Layer, Plan


@failing
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
    result = how.carry_out(rewrite, output, dry_run, as_json)
    if result:
        print_result(result, layer_table(_rows(result.plan)), "split", dry_run)


def _rows(plan: Plan) -> Iterator[tuple[Layer, Text]]:
    for layer in plan.changed:
        yield layer, text(f"back to {shown_parts(layer.fusion)}", "green")
    for layer in plan.skipped:
        yield layer, text(f"left: {fused_tensor(layer)}{layer.reason}", "yellow")
