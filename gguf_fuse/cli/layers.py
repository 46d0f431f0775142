"""Layers as lines of a table and as JSON, and all else that fuse and unfuse both print."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

import gguf_fuse
from gguf_fuse.cli.console import number, printer, table, text
from gguf_fuse.planning.fusions import FUSIONS, QKV

if TYPE_CHECKING:
    from gguf_fuse.format.header import Header
    from gguf_fuse.planning.plan import Layer, Plan


def layer_table(layers: Iterable[tuple[Layer, Text]]) -> Table:
    """One line for all layers that are alike: 80 identical ones help nobody."""
    alike: dict[tuple[Any, ...], tuple[list[str], Text]] = {}
    for layer, result in layers:
        key = (layer.fusion.fused, layer.types, layer.rows, result.plain)
        alike.setdefault(key, ([], result))[0].append(layer.name)
    lines = []
    for (_, types, n_rows, _), (names, result) in alike.items():
        # Types that differ are in the result's reason.
        ggml_type = types[0] if len(set(types)) == 1 else "mixed"
        cells = (ggml_type, " + ".join(map(str, n_rows)))
        lines.append((ranges(names), str(len(names)), *cells, result))
    folded = [Column(title, overflow="fold") for title in ("layers", "result")]
    return table([folded[0], number("#"), "type", "rows", folded[1]], lines)


def fused_tensor(layer: Layer) -> str:
    """What begins a line that is not about attention."""
    return "" if layer.fusion is QKV else f"{layer.fusion.fused}: "


def recipe_hint(source: Header, layers: Sequence[Layer]) -> Iterator[Text]:
    """Where types keep layers of a model separate: the command that tells what to do about it."""
    from gguf_fuse.planning import record
    from gguf_fuse.planning.plan import of_mixed_types

    if source.is_model and not record.exists(source) and of_mixed_types(layers):
        dashes = ["--"] if source.path.startswith("-") else []
        command = shlex.join(["gguf-fuse", "recipe", *dashes, source.path])
        yield text(f"how layers of mixed types can be fused too: {command}")


def ranges(names: Sequence[str]) -> str:
    """ "blk.0-5, 7" for blk.0 ... blk.5 and blk.7."""
    by_prefix: dict[str, list[int]] = {}
    for name in names:
        prefix, _, number = name.rpartition(".")
        by_prefix.setdefault(prefix, []).append(int(number))
    return "; ".join(f"{prefix}.{_runs(sorted(n))}" for prefix, n in by_prefix.items())


def _runs(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def layer_json(layer: Layer, status: str) -> dict[str, Any]:
    from gguf_fuse.planning.plan import Status

    was_fused = status == "skipped" and layer.status is Status.FUSED
    return {
        "layer": layer.label,
        "status": status,
        "reason": "already fused" if was_fused else layer.reason,
        "types": list(layer.types),
        "rows": list(layer.rows),
    }


def print_result(
    result: gguf_fuse.Result, shown: Table, verb: str, dry_run: bool, notes: Iterable[Text] = ()
) -> None:
    """The table, what was done (verb: "fused" or "split"), and notes."""
    out = printer(stderr=result.output == "-")
    out.print(shown)
    out.print()
    out.print(escape(_result_line(result, verb, dry_run)), highlight=False)
    for note in notes:
        out.print(note, highlight=False, soft_wrap=True)


def _result_line(result: gguf_fuse.Result, verb: str, dry_run: bool) -> str:
    plan, n_bytes = result.plan, result.n_bytes
    done = f"would be {verb}" if dry_run else verb
    line = f"{_counts(plan)} {done}, {len(result.source.tensors)} tensors -> {len(plan.tensors)}"
    n_shards = len(result.outputs)
    shards = f"; {n_shards} shards: {result.outputs[0].path} and on" if n_shards > 1 else ""
    if dry_run:
        return f"{line}; {decimal(n_bytes)} would be written{shards}"
    speed = decimal(int(n_bytes / max(result.seconds, 1e-9)))
    line = f"{line}; {decimal(n_bytes)} in {result.seconds:.2f} s ({speed}/s)"
    if result.written.n_cloned:
        cloned, copied = decimal(result.written.n_cloned), decimal(result.written.n_copied)
        line += f", {cloned} of them cloned, {copied} copied"
    return line + shards


def _counts(plan: Plan) -> str:
    """ "6 of 8 attention layers", and of the layers with experts, where there are any."""
    counts = []
    for fusion in FUSIONS:
        changed = sum(layer.fusion is fusion for layer in plan.changed)
        found = sum(layer.fusion is fusion for layer in (*plan.changed, *plan.skipped))
        if found:
            what = "attention layers" if fusion is QKV else "layers of experts"
            counts.append(f"{changed} of {found} {what}")
    return " and ".join(counts)


def result_json(
    source: Header, skipped: Sequence[Layer], result: gguf_fuse.Result | None
) -> dict[str, Any]:
    """Of a result; without one, of the layers that leave nothing to be done."""
    changed = result.plan.changed if result else ()
    found = [(layer, "fused") for layer in changed] + [(layer, "skipped") for layer in skipped]
    found.sort(key=lambda entry: _order(entry[0]))
    return {
        "input": source.path,
        "output": result and result.output,
        "architecture": source.architecture,
        "layers": [layer_json(*entry) for entry in found],
        "fused": len(changed),
        "skipped": len(skipped),
        "tensors_in": len(source.tensors),
        "tensors_out": len(result.plan.tensors if result else source.tensors),
        "files": [str(path) for path in result.files] if result else [],
        "bytes_copied": result.written.n_copied if result else 0,
        "bytes_cloned": result.written.n_cloned if result else 0,
        "seconds": round(result.seconds, 3) if result else 0.0,
    }


def _order(layer: Layer) -> tuple[str, int, int]:
    prefix, _, number = layer.name.rpartition(".")
    return prefix, int(number), FUSIONS.index(layer.fusion)
