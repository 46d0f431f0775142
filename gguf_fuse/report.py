"""Results as tables for people and as objects for machines. Prints nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from gguf_fuse.architectures import Architecture, Loader
from gguf_fuse.fusion import FUSED, Layer, Plan, Status
from gguf_fuse.gguf_file import Header, type_name
from gguf_fuse.rewrite import STANDARD_OUTPUT, Result

_INSPECT_STATUS = {
    Status.FUSABLE: "fusable",
    Status.FUSED: "fused",
    Status.MISMATCH: "not fusable",
    Status.INCOMPLETE: "not fusable",
    Status.SEPARATE: "separate",
}
_INSPECT_LOADER = {
    Loader.READS_FUSED: "reads fused",
    Loader.ALREADY_FUSED: "reads fused",
    Loader.NEEDS_SEPARATE: "needs separate",
    Loader.CRASHES: "needs separate",
    Loader.NO_ATTENTION: "unknown",
    Loader.UNKNOWN: "unknown",
}


# -- for machines -------------------------------------------------------------------------------


def result_json(result: Result) -> dict[str, Any]:
    plan = result.plan
    return _rewrite_json(
        result.source, result.output, plan.changed, plan.skipped, len(plan.tensors)
    ) | {
        "bytes_copied": result.written.n_copied,
        "bytes_cloned": result.written.n_cloned,
        "seconds": round(result.seconds, 3),
    }


def nothing_json(source: Header, layers: Sequence[Layer]) -> dict[str, Any]:
    """What `result_json` says where nothing was written."""
    return _rewrite_json(source, None, (), layers, len(source.tensors)) | {
        "bytes_copied": 0,
        "bytes_cloned": 0,
        "seconds": 0.0,
    }


def _rewrite_json(
    source: Header,
    output: str | None,
    changed: Sequence[Layer],
    skipped: Sequence[Layer],
    n_tensors: int,
) -> dict[str, Any]:
    layers = [_layer_json(layer, "fused") for layer in changed]
    layers += [_layer_json(layer, "skipped") for layer in skipped]
    return {
        "input": source.path,
        "output": output,
        "architecture": source.architecture,
        "layers": sorted(layers, key=_layer_order),
        "fused": len(changed),
        "skipped": len(skipped),
        "tensors_in": len(source.tensors),
        "tensors_out": n_tensors,
    }


def inspect_json(header: Header, layers: Sequence[Layer], row: Architecture) -> dict[str, Any]:
    return {
        "file": header.path,
        "version": header.version,
        "byte_order": header.byte_order,
        "alignment": header.alignment,
        "architecture": header.architecture,
        "name": header.metadata.get("general.name"),
        "n_tensors": len(header.tensors),
        "n_metadata": len(header.metadata),
        "file_bytes": header.stamp.n_bytes,
        "layers": [_layer_json(layer, _INSPECT_STATUS[layer.status]) for layer in layers],
        "loader": _INSPECT_LOADER[row.loader],
    }


def _layer_json(layer: Layer, status: str) -> dict[str, Any]:
    reason = layer.reason
    if status == "skipped" and layer.status is Status.FUSED:
        reason = "already fused"
    return {
        "layer": layer.name,
        "status": status,
        "reason": reason,
        "types": list(layer.types),
        "rows": list(layer.rows),
    }


def _layer_order(layer: dict[str, Any]) -> tuple[str, int]:
    prefix, _, number = layer["layer"].rpartition(".")
    return prefix, int(number)


# -- for people ---------------------------------------------------------------------------------


def fuse_table(plan: Plan) -> Table:
    rows = [(layer, Text(f"fused into {FUSED}", "green")) for layer in plan.changed]
    rows += [(layer, Text(f"left: {_why(layer)}", "yellow")) for layer in plan.skipped]
    return _layer_table(rows)


def unfuse_table(plan: Plan) -> Table:
    rows = [(layer, Text("split into attn_q, attn_k, attn_v", "green")) for layer in plan.changed]
    return _layer_table(rows)


def inspect_table(layers: Sequence[Layer]) -> Table:
    styles = {Status.FUSABLE: "green", Status.FUSED: "cyan"}
    return _layer_table(
        (
            layer,
            Text(
                _INSPECT_STATUS[layer.status] + (f": {layer.reason}" if layer.reason else ""),
                styles.get(layer.status, "yellow"),
            ),
        )
        for layer in layers
    )


def _why(layer: Layer) -> str:
    return layer.reason or "already fused"


def _layer_table(rows: Iterable[tuple[Layer, Text]]) -> Table:
    """One line for all layers that are alike: 80 identical ones help nobody."""
    alike: dict[tuple[Any, ...], tuple[list[str], Text]] = {}
    for layer, result in rows:
        key = (layer.types, layer.rows, result.plain)
        alike.setdefault(key, ([], result))[0].append(layer.name)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column("layers", overflow="fold")
    table.add_column("#", justify="right")
    table.add_column("type")
    table.add_column("rows")
    table.add_column("result", overflow="fold")
    for (types, n_rows, _), (names, result) in alike.items():
        kinds = types[:1] if len(set(types)) == 1 else types
        cells = (", ".join(kinds), " + ".join(map(str, n_rows)))
        table.add_row(_ranges(names), str(len(names)), *cells, result)
    return table


def _ranges(names: Sequence[str]) -> str:
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


def result_line(result: Result, verb: str, dry_run: bool) -> str:
    plan, n_bytes = result.plan, result.placement.n_bytes
    n_layers = len(plan.changed) + len(plan.skipped)
    done = f"would be {verb}" if dry_run else verb
    line = (
        f"{len(plan.changed)} of {n_layers} attention layers {done}, "
        f"{len(result.source.tensors)} tensors -> {len(plan.tensors)}"
    )
    if dry_run:
        return f"{line}; {decimal(n_bytes)} would be written"
    speed = decimal(int(n_bytes / max(result.seconds, 1e-9)))
    line = f"{line}; {decimal(n_bytes)} in {result.seconds:.2f} s ({speed}/s)"
    if result.written.n_cloned:
        cloned, copied = decimal(result.written.n_cloned), decimal(result.written.n_copied)
        line += f", {cloned} of them cloned, {copied} copied"
    return line


def advice(result: Result) -> str | None:
    """What to run next, if there is a file to run it on."""
    if result.output == STANDARD_OUTPUT:
        return None
    return f"next: gguf-fuse verify {Path(result.source.path)} {result.output}"


def file_lines(header: Header, row: Architecture) -> list[tuple[str, str]]:
    """What `inspect` says of the file as a whole."""
    counts: dict[str, int] = {}
    for tensor in header.tensors:
        counts[type_name(tensor.type)] = counts.get(type_name(tensor.type), 0) + 1
    types = ", ".join(f"{n} {name}" for name, n in sorted(counts.items(), key=lambda c: -c[1]))
    size = decimal(header.stamp.n_bytes)
    return [
        ("file", f"{header.path} ({size})"),
        (
            "format",
            f"GGUF v{header.version}, {header.byte_order} endian, alignment {header.alignment}",
        ),
        ("architecture", str(header.architecture)),
        ("name", str(header.metadata.get("general.name", "-"))),
        ("metadata", f"{len(header.metadata)} keys, {decimal(len(header.metadata.raw))}"),
        ("tensors", f"{len(header.tensors)}: {types}"),
        ("loader", f"llama.cpp's {row.loader.value} ({_proof(row)})"),
    ]


def _proof(row: Architecture) -> str:
    return {
        "measured": "measured: a model was fused and loaded",
        "source": "by its source code",
        "none": "not in the table",
    }[row.source]
