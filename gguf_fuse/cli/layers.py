"""Layers as lines of a table, and all else that inspect, fuse and unfuse have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import RenderableType
from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

import gguf_fuse
from gguf_fuse.cli.console import Flowing, next_line, number, print_parts, table
from gguf_fuse.format.header import Header
from gguf_fuse.format.layout import is_canonical
from gguf_fuse.planning.fusions import FUSIONS, GATE_UP, QKV, SSM_IN, Fusion
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
        cells = (ggml_type, _rows(n_rows))
        lines.append((ranges(names), str(len(names)), *cells, result))
    folded = [Column(title, overflow="fold") for title in ("layers", "result")]
    return table([folded[0], number("#"), "type", "rows", folded[1]], lines)


def fused_tensor(layer: Layer) -> str:
    """What begins a line that is not about attention."""
    return "" if layer.fusion is QKV else f"{layer.fusion.label}: "


def _rows(n_rows: Sequence[int]) -> str:
    """ "512 + 128 + 128"; of experts that are alike "8 x 512"."""
    if len(n_rows) > 3 and len(set(n_rows)) == 1:
        return f"{len(n_rows)} x {n_rows[0]}"
    return " + ".join(map(str, n_rows))


def recipe_hint(source: Header, layers: Sequence[Layer]) -> Iterator[Text]:
    """Where types keep layers of a model separate: the command that tells what to do about it."""
    from gguf_fuse.planning import record
    from gguf_fuse.planning.plan import of_mixed_types

    if source.is_model and not record.exists(source) and of_mixed_types(layers):
        yield from next_line("recipe", source.path, label="to fuse layers of mixed types too")


def beside(source: str) -> str:
    """Where the fused file is written when nobody says where: of shards, the first one.

    What is fetched has no folder to be beside: its name alone.
    """
    from gguf_fuse.format.shards import ShardName
    from gguf_fuse.format.source import is_address

    path = source.rpartition("/")[2] if is_address(source) else source
    name = ShardName.parse(path)
    if name is None:
        return f"{path.removesuffix('.gguf')}-fused.gguf"
    return str(ShardName(f"{name.prefix}-fused", 1, name.count).path(1))


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


def print_result(
    result: gguf_fuse.Result,
    shown: Table,
    verb: str,
    dry_run: bool,
    notes: Iterable[RenderableType] = (),
) -> None:
    """The table, what was done (verb: "fused" or "split"), and notes."""
    line = Flowing(_result_line(result, verb, dry_run), indent=2)
    print_parts([shown, "", line, *notes], stderr=result.output == "-")


def layout_notes(result: gguf_fuse.Result) -> Iterator[Flowing]:
    """What of the source unfuse will not give back."""
    if is_canonical(result.source) and not result.lost_padding:
        return
    yield Flowing(
        "unfuse will give back every tensor and key, but not this file bit for bit: it is not laid "
        "out as llama.cpp writes files",
        "yellow",
    )
    if result.lost_padding:
        lost = f"{result.lost_padding} bytes of padding are not zero and will not come back"
        yield Flowing(lost, "yellow")


def _result_line(result: gguf_fuse.Result, verb: str, dry_run: bool) -> str:
    plan, n_bytes = result.plan, result.n_bytes
    verb = verb if all(layer.fusion in FUSIONS for layer in plan.changed) else "rewritten"
    done = f"would be {verb}" if dry_run else verb
    line = f"{_counts(plan)} {done}, {len(result.source.tensors)} tensors -> {len(plan.tensors)}"
    n_shards = len(result.outputs)
    shards = f"; {n_shards} shards: {result.outputs[0].path} and on" if n_shards > 1 else ""
    if dry_run:
        place = "" if shards else f" to {result.output}"
        return f"{line}; {decimal(n_bytes)} would be written{place}{shards}"
    resumed = result.written.n_resumed
    speed = decimal(int((n_bytes - resumed) / max(result.seconds, 1e-9)))
    line = f"{line}; {decimal(n_bytes)} in {result.seconds:.2f} s ({speed}/s)"
    if result.written.n_cloned:
        cloned, copied = decimal(result.written.n_cloned), decimal(result.written.n_copied)
        line += f", {cloned} of them cloned, {copied} copied"
    if resumed:
        line += f", {decimal(resumed)} of them by an earlier run"
    return line + shards


def _counts(plan: Plan) -> str:
    """ "6 of 8 attention layers", and of what else there is."""
    changed = Counter(counted(layer.fusion) for layer in plan.changed)
    found = changed + Counter(counted(layer.fusion) for layer in plan.skipped)
    return " and ".join(f"{changed[what]} of {n} {what}" for what, n in found.items())


def counted(fusion: Fusion) -> str:
    """What there is so many of."""
    words = {QKV: "attention layers", GATE_UP: "layers of experts", SSM_IN: "ssm_in"}
    return words.get(fusion, "stacks of experts")
