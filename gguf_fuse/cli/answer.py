"""What --json prints: one object on stdout for each command, with one vocabulary for all.

A count or a size is called after what is counted: tensors_in are those of `input`, tensors_out
those of `output`. Of layers, `layers` tells one by one what layers_... count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gguf_fuse.planning.fusions import QKV
from gguf_fuse.planning.plan import Layer, Status

if TYPE_CHECKING:
    import gguf_fuse
    from gguf_fuse.format.header import Header
    from gguf_fuse.planning.loaders import Loader

VOCABULARY = {
    "format": "of this object: 1",
    "command": "what was run",
    "exit_code": "as in the table of exit codes",
    "error": "why it is not 0, the line on stderr; else null",
    "input": "the file that was read, as it was named",
    "inputs": "one object for each, where there are several",
    "output": "the file that was written; null if none",
    "original": "the file before, with separate tensors",
    "fused": "the file after",
    "files": "all files that were written: shards, one by one",
    "architecture": "general.architecture; null if the file has none",
    "layers": "each one: layer, status, reason, and of its parts types and rows",
    "layers_fused": "how many fuse has fused, or verify found fused",
    "layers_fused_experts": "of experts alone, in verify",
    "layers_split": "how many unfuse has split",
    "layers_split_ssm_in": "in verify: whose old ssm_in is split",
    "layers_skipped": "how many were left as they are",
    "layers_fusable": "how many fuse would fuse",
    "tensors_in": "of the input",
    "tensors_out": "of the output",
    "keys_in": "of metadata in the input",
    "bytes_in": "of the input, all shards together",
    "bytes_out": "of the output, all shards together",
    "bytes_copied": "of data",
    "bytes_cloned": "of data, shared with the input",
    "bytes_resumed": "of those copied, by an earlier run that was broken off",
    "bit_for_bit": "whether unfuse gives the input back, byte for byte; null if nothing is fused",
    "bytes_compared": "of tensors, of one file",
    "bytes_hashed": "of verify --manifest: all files whole",
    "manifest": "that --manifest wrote, or verify reads; no word of it where it was not asked for",
    "seconds": "that it took",
    "gguf_version": "of the format of GGUF files",
    "byte_order": "little or big",
    "alignment": "of tensors, in bytes",
    "name": "general.name; null if the file has none",
    "readers": "asked for by --for: program, loads, reason, source, proof, since, advice",
    "llama": "what llama.cpp computed with both files; null if it was not asked",
    "loader": "what llama.cpp does with fused Q, K and V: reads fused, needs separate, unknown",
    "ok": "whether all is equal",
    "exchanged": "whether the fused file was named first",
    "structure": "ok, and problems: each difference of bytes",
    "timing": "medians in milliseconds",
    "advice": "of recipe: raise, or leave",
    "ways": "of recipe: way, commands, types of tensors, bytes more or less, wants_imatrix",
    "run": "of recipe --run: the way that was taken",
    "result": "of recipe --run: as fuse tells it",
    "counts": "of batch: how many files ended how",
    "unchanged": "of batch: files that were done before",
    "bytes": "of batch --dry-run: that would be written",
    "missing": "of batch --dry-run: bytes that the disk lacks",
    "source": "of bench: the model, or default shape",
    "shape": "of bench: of the layer",
    "processor": "its name",
    "threads": "that computed",
    "projection": "of bench: a row for each number of tokens",
    "decode": "of bench: a row for each n_kv",
    "left_out": "of bench: sizes that the time did not suffice for",
    "command_line": "of compare: what was run",
    "version": "of llama.cpp",
    "backends": "of llama.cpp",
    "device": "that it computed on",
    "rounds": "of compare: that were asked for",
    "rounds_done": "of compare: fewer after Ctrl-C",
    "rows": "of compare: each test, with medians, gain and word",
    "best": "of compare: of the ways on CUDA, by test",
    "samples": "of compare: tokens a second, each of them",
}

_LOADERS = {  # by the name of a Loader; else "unknown"
    "READS_FUSED": "reads fused",
    "ALREADY_FUSED": "reads fused",
    "NEEDS_SEPARATE": "needs separate",
    "CRASHES": "needs separate",
}


def loader_word(loader: Loader) -> str:
    """What a loader wants, in two words."""
    return _LOADERS.get(loader.name, "unknown")


def result_json(
    source: Header, skipped: Sequence[Layer], result: gguf_fuse.Result | None, done: str = "fused"
) -> dict[str, Any]:
    """Of a result; without one, of the layers that leave nothing to be done. done: or "split"."""
    changed = result.plan.changed if result else ()
    found = [(layer, done) for layer in changed] + [(layer, "skipped") for layer in skipped]
    found.sort(key=lambda entry: _order(entry[0]))
    back = {"bit_for_bit": result.bit_for_bit if result else None} if done == "fused" else {}
    return {
        "input": source.path,
        "output": result and result.output,
        "files": [str(path) for path in result.files] if result else [],
        "architecture": source.architecture,
        "layers": [layer_json(*entry) for entry in found],
        f"layers_{done}": len(changed),
        "layers_skipped": len(skipped),
        "tensors_in": len(source.tensors),
        "tensors_out": len(result.plan.tensors) if result else 0,
        "bytes_in": source.file_bytes,
        "bytes_out": result.n_bytes if result else 0,
        "bytes_copied": result.written.n_copied if result else 0,
        "bytes_cloned": result.written.n_cloned if result else 0,
        "bytes_resumed": result.written.n_resumed if result else 0,
        **back,
        "seconds": round(result.seconds, 3) if result else 0.0,
    }


def inspection_json(found: gguf_fuse.Inspection) -> dict[str, Any]:
    header = found.header
    return {
        "input": header.path,
        "gguf_version": header.version,
        "byte_order": header.byte_order,
        "alignment": header.alignment,
        "architecture": header.architecture,
        "name": header.metadata.get("general.name"),
        "tensors_in": len(header.tensors),
        "keys_in": len(header.metadata),
        "bytes_in": header.file_bytes,
        "layers": [layer_json(layer, status(layer)) for layer in found.layers],
        "layers_fusable": sum(layer.status is Status.FUSABLE for layer in found.layers),
        "layers_fused": sum(layer.status is Status.FUSED for layer in found.layers),
        "loader": loader_word(found.loader.qkv.loader),
    }


def status(layer: Layer) -> str:
    """As people and JSON are told: why a layer is not fusable is in its reason."""
    shown = Status.MISMATCH if layer.status is Status.INCOMPLETE else layer.status
    return str(shown.value)


def layer_json(layer: Layer, status: str) -> dict[str, Any]:
    was_fused = status == "skipped" and layer.status is Status.FUSED
    return {
        "layer": layer.label,
        "status": status,
        "reason": layer.reason or ("already fused" if was_fused else None),
        "types": list(layer.types),
        "rows": list(layer.rows),
    }


def _order(layer: Layer) -> tuple[str, int, bool, str]:
    prefix, _, number = layer.name.rpartition(".")
    return prefix, int(number), layer.fusion is not QKV, layer.fusion.fused
