"""Layers as lines of a table and as JSON, and all else that fuse and unfuse both print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.filesize import decimal
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

import gguf_fuse
from gguf_fuse.cli.console import number, printer, table, text
from gguf_fuse.format.header import Header
from gguf_fuse.format.layout import is_canonical, nonzero_padding
from gguf_fuse.planning.fusions import GATE_UP, QKV, SSM_IN, Fusion
from gguf_fuse.planning.plan import Layer, Plan, Status


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
        cells = (ggml_type, _rows(n_rows))
        lines.append((ranges(names), str(len(names)), *cells, result))
    folded = [Column(title, overflow="fold") for title in ("layers", "result")]
    return table([folded[0], number("#"), "type", "rows", folded[1]], lines)


def fused_tensor(layer: Layer) -> str:
    """What begins a line that is not about attention."""
    return "" if layer.fusion is QKV else f"{layer.fusion.label}: "


def shown_parts(fusion: Fusion) -> str:
    """attn_q, attn_k, attn_v; of experts one by one, the first and the last."""
    first, *others = fusion.parts
    return ", ".join(fusion.parts) if len(others) < 3 else f"{first} to {others[-1]}"


def _rows(n_rows: Sequence[int]) -> str:
    """ "512 + 128 + 128"; of experts that are alike "8 x 512"."""
    if len(n_rows) > 3 and len(set(n_rows)) == 1:
        return f"{len(n_rows)} x {n_rows[0]}"
    return " + ".join(map(str, n_rows))


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
    was_fused = status == "skipped" and layer.status is Status.FUSED
    return {
        "layer": layer.label,
        "status": status,
        "reason": layer.reason or ("already fused" if was_fused else None),
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


def layout_notes(source: Header) -> Iterator[Text]:
    """What of this file unfuse will not give back."""
    if is_canonical(source):
        return
    yield text(
        "unfuse will give back every tensor and key, but not this file bit for bit: it is not laid "
        "out as llama.cpp writes files",
        "yellow",
    )
    if n_bytes := nonzero_padding(source):
        yield text(f"{n_bytes} bytes of padding are not zero and will not come back", "yellow")


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
    """ "6 of 8 attention layers", and of what else there is."""
    changed = Counter(_counted(layer.fusion) for layer in plan.changed)
    found = changed + Counter(_counted(layer.fusion) for layer in plan.skipped)
    return " and ".join(f"{changed[what]} of {n} {what}" for what, n in found.items())


def _counted(fusion: Fusion) -> str:
    words = {QKV: "attention layers", GATE_UP: "layers of experts", SSM_IN: "ssm_in"}
    return words.get(fusion, "stacks of experts")


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


def _order(layer: Layer) -> tuple[str, int, bool, str]:
    prefix, _, number = layer.name.rpartition(".")
    return prefix, int(number), layer.fusion is not QKV, layer.fusion.fused
