"""The command fuse, which is also what `gguf-fuse --fuse-qkv-weights IN OUT` means."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from gguf_fuse.choices import OnMismatch
from gguf_fuse.cli.console import failing, print_json, text
from gguf_fuse.cli.options import AnyArchitecture, AsJson, DryRun, In, Out, Writing, writing
from gguf_fuse.planning.fusions import GATE_UP, QKV

if TYPE_CHECKING:
    from gguf_fuse.api import Result
    from gguf_fuse.planning.plan import Layer, Plan


@failing
@writing
def fuse(
    source: In,
    output: Out,
    fuse_qkv_weights: Annotated[
        bool, typer.Option(QKV.flag, help="Q, K and V into attn_qkv; so does no flag.")
    ] = False,
    fuse_gate_up_exps: Annotated[
        bool, typer.Option(GATE_UP.flag, help="Gate and up of experts into ffn_gate_up_exps.")
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    on_mismatch: Annotated[
        OnMismatch,
        typer.Option(help="A layer whose parts cannot be one tensor: leave it, or fail."),
    ] = "skip",
    any_architecture: AnyArchitecture = False,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="The model that IN, a LoRA adapter or importance matrix, is for.",
            readable=False,
        ),
    ] = None,
    *,
    how: Writing,
) -> None:
    """Write IN to OUT with Q, K and V of each layer as one attn_qkv tensor.

    With --fuse-gate-up-exps: gate and up of experts as one ffn_gate_up_exps.
    """
    from gguf_fuse import api
    from gguf_fuse.cli import layers

    wanted = ((QKV, fuse_qkv_weights or not fuse_gate_up_exps), (GATE_UP, fuse_gate_up_exps))
    with how.options(output, dry_run=dry_run, as_json=as_json) as options:
        result = api.fuse(
            source,
            output,
            fusions=[fusion for fusion, chosen in wanted if chosen],
            on_mismatch=on_mismatch,
            any_architecture=any_architecture,
            base=base,
            options=options,
        )
    if as_json:
        print_json(layers.result_json(result))
    elif not how.quiet:
        table = layers.layer_table(_rows(result.plan))
        layers.print_result(result, table, "fused", dry_run=dry_run, notes=_notes(result))


def _rows(plan: Plan) -> Iterator[tuple[Layer, Text]]:
    from gguf_fuse.cli.layers import fused_tensor

    for layer in plan.changed:
        yield layer, text(f"fused into {layer.fusion.fused}", "green")
    for layer in plan.skipped:
        reason = layer.reason or "already fused"
        yield layer, text(f"left: {fused_tensor(layer)}{reason}", "yellow")


def _notes(result: Result) -> Iterator[Text]:
    """What to know of a fused file, and what to run next."""
    if not result.source.is_canonical:
        yield text(
            "unfuse will give back every tensor and key, but not this file bit for bit: it is "
            "not laid out as llama.cpp writes files",
            "yellow",
        )
    if result.files and result.source.is_model:
        paths = [result.source.path, str(result.files[0])]
        dashes = ["--"] if any(path.startswith("-") for path in paths) else []
        yield text(f"next: {shlex.join(['gguf-fuse', 'verify', *dashes, *paths])}")
