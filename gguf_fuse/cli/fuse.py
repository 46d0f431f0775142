"""The command fuse, which is also what `gguf-fuse --fuse-qkv-weights IN OUT` means."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

import gguf_fuse
from gguf_fuse.choices import OnMismatch
from gguf_fuse.cli.console import failing, text
from gguf_fuse.cli.layers import fused_tensor, layer_table, layout_notes, print_result
from gguf_fuse.cli.options import AnyArchitecture, AsJson, DryRun, In, Out, Writing, writing
from gguf_fuse.planning.fusions import EXPERTS, GATE_UP, QKV, SSM_IN
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
    stack_experts: Annotated[
        bool,
        typer.Option(EXPERTS.flag, help="Experts one by one (old Mixtral files) into ffn_*_exps."),
    ] = False,
    split_ssm_in: Annotated[
        bool,
        typer.Option(SSM_IN.flag, help="qwen3next's old ssm_in into attn_qkv and attn_gate."),
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

    With --fuse-gate-up-exps: gate and up of experts as one ffn_gate_up_exps. With --stack-experts
    or --split-ssm-in: an old layout as llama.cpp reads it now. Several flags: all in one pass.
    """
    others = [
        (GATE_UP, fuse_gate_up_exps),
        (EXPERTS, stack_experts),
        (SSM_IN, split_ssm_in),
    ]
    qkv = fuse_qkv_weights or not any(chosen for _, chosen in others)
    wanted = [(QKV, qkv), *others]
    rewrite = functools.partial(
        gguf_fuse.fuse,
        source,
        output,
        fusions=[fusion for fusion, chosen in wanted if chosen],
        on_mismatch=on_mismatch,
        any_architecture=any_architecture,
        base=base,
    )
    result = how.carry_out(rewrite, output, dry_run, as_json)
    if result:
        print_result(result, layer_table(_rows(result.plan)), "fused", dry_run, _notes(result, how))


def _rows(plan: Plan) -> Iterator[tuple[Layer, Text]]:
    for layer in plan.changed:
        yield layer, text(layer.fusion.made, "green")
    for layer in plan.skipped:
        yield layer, text(f"left: {fused_tensor(layer)}{layer.reason or 'already fused'}", "yellow")


def _notes(result: gguf_fuse.Result, how: Writing) -> Iterator[Text]:
    """What to know of a fused file, and what to run next."""
    cut_anew = len(result.outputs) == 1 or how.split_max_size or how.split_max_tensors
    if result.source.shards and cut_anew:
        yield text(
            f"unfuse will give back one file in place of the {len(result.source.shards)} shards; "
            "to get these, call OUT as they are called",
            "yellow",
        )
    yield from layout_notes(result.source)
    if result.files and result.source.is_model:
        paths = [result.source.path, str(result.files[0])]
        dashes = ["--"] if any(path.startswith("-") for path in paths) else []
        yield text(f"next: {shlex.join(['gguf-fuse', 'verify', *dashes, *paths])}")
