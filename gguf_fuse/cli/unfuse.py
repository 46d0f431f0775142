"""The command unfuse."""

from __future__ import annotations

from gguf_fuse.cli.console import failing, print_json, text
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
    from gguf_fuse import api
    from gguf_fuse.cli import layers

    with how.options(output, dry_run=dry_run, as_json=as_json) as options:
        result = api.unfuse(source, output, any_architecture=any_architecture, options=options)
    if as_json:
        print_json(layers.result_json(result))
    elif not how.quiet:
        table = layers.layer_table(
            (layer, text(f"split into {', '.join(layer.fusion.parts)}", "green"))
            for layer in result.plan.changed
        )
        layers.print_result(result, table, "split", dry_run=dry_run)
