"""The command unfuse."""

import functools

import gguf_fuse
from gguf_fuse.cli.console import failing, text
from gguf_fuse.cli.layers import layer_table, print_result
from gguf_fuse.cli.options import AnyArchitecture, AsJson, DryRun, In, Out, Writing, writing


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
        table = layer_table(
            (layer, text(f"split into {', '.join(layer.fusion.parts)}", "green"))
            for layer in result.plan.changed
        )
        print_result(result, table, "split", dry_run)
