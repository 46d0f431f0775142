"""The command inspect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.filesize import decimal
from rich.markup import escape
from rich.text import Text

import gguf_fuse
from gguf_fuse.cli.console import failing, one_line, print_json, printer, text
from gguf_fuse.cli.layers import fused_tensor, layer_json, layer_table
from gguf_fuse.cli.options import AsJson, In
from gguf_fuse.cli.readers import For, reader_lines, readers_json
from gguf_fuse.planning.fusions import GATE_UP, QKV, Fusion
from gguf_fuse.planning.plan import Layer, Status

_STYLES = {"fusable": "green", "fused": "cyan"}
_LOADERS = {  # by the name of a Loader; else "unknown"
    "READS_FUSED": "reads fused",
    "ALREADY_FUSED": "reads fused",
    "NEEDS_SEPARATE": "needs separate",
    "CRASHES": "needs separate",
}
_PROOFS = {
    "measured": "measured: a model was fused and loaded",
    "source": "by its source code",
    "none": "it is not in the table",
}


@failing
def inspect(source: In, as_json: AsJson = False, program: For = None) -> None:
    """Show what IN holds and what fusing would do to it. Reads the header only."""
    found = gguf_fuse.inspect(source)
    if as_json:
        return print_json(_json(found) | readers_json(found, program))
    out = printer()
    for label, value in (*_file_lines(found), *reader_lines(found, program)):
        out.print(f"[bold]{label:<13}[/]{escape(one_line(value))}", highlight=False)
    out.print()
    out.print(layer_table(_rows(found)) if found.layers else "no layers that could be fused")


def _status(layer: Layer) -> str:
    """As people and JSON are told: why a layer is not fusable is in its reason."""
    shown = Status.MISMATCH if layer.status is Status.INCOMPLETE else layer.status
    return str(shown.value)


def _rows(found: gguf_fuse.Inspection) -> Iterator[tuple[Layer, Text]]:
    for layer in found.layers:
        status = _status(layer)
        reason = f": {layer.reason}" if layer.reason else ""
        style = _STYLES.get(status, "yellow")
        yield layer, text(f"{fused_tensor(layer)}{status}{reason}", style)


def _file_lines(found: gguf_fuse.Inspection) -> Iterator[tuple[str, str]]:
    """What is said of the file as a whole: labels and values."""
    from gguf_fuse.format.types import type_name

    header = found.header
    counts = Counter(type_name(tensor.type) for tensor in header.tensors)
    types = ", ".join(f"{n} {name}" for name, n in counts.most_common())
    size = decimal(header.file_bytes)
    if header.shards:
        size = f"one of {len(header.shards)} shards, {size} together"
    layout = f"{header.byte_order} endian, alignment {header.alignment}"
    yield "file", f"{header.path} ({size})"
    yield "format", f"GGUF v{header.version}, {layout}"
    yield "architecture", str(header.architecture or "-")
    yield "name", str(header.metadata.get("general.name", "-"))
    yield "metadata", f"{len(header.metadata)} keys, {decimal(header.metadata.n_bytes)}"
    yield "tensors", f"{len(header.tensors)}: {types}"
    yield "loader", _loader_line(found, QKV)
    if any(layer.fusion is GATE_UP for layer in found.layers):
        yield "", _loader_line(found, GATE_UP)


def _loader_line(found: gguf_fuse.Inspection, fusion: Fusion) -> str:
    reads = found.loader.reads(fusion)
    build = f" since build {reads.since}" if reads.since else ""
    return f"llama.cpp {reads.loader.phrase(fusion.words)}{build} ({_PROOFS[reads.proof]})"


def _json(found: gguf_fuse.Inspection) -> dict[str, Any]:
    header = found.header
    return {
        "file": header.path,
        "version": header.version,
        "byte_order": header.byte_order,
        "alignment": header.alignment,
        "architecture": header.architecture,
        "name": header.metadata.get("general.name"),
        "n_tensors": len(header.tensors),
        "n_metadata": len(header.metadata),
        "file_bytes": header.file_bytes,
        "layers": [layer_json(layer, _status(layer)) for layer in found.layers],
        "loader": _LOADERS.get(found.loader.qkv.loader.name, "unknown"),
    }
