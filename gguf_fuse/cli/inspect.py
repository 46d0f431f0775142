"""The command inspect, which is also what `gguf-fuse IN` means."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Column
from rich.text import Text
from typer import BadParameter

import gguf_fuse
from gguf_fuse.cli.answer import inspection_json, loader_word, status
from gguf_fuse.cli.console import (
    Fitting,
    Flowing,
    next_line,
    number,
    print_parts,
    table,
    text,
    told_of_waits,
)
from gguf_fuse.cli.layers import beside, counted, fused_tensor, layer_table, recipe_hint
from gguf_fuse.cli.options import AsJson, existing_file
from gguf_fuse.cli.outcome import EXIT_ERROR, complain, fail, print_json
from gguf_fuse.cli.readers import For, reader_lines, readers_json
from gguf_fuse.format.source import GGUFError, expand, is_address
from gguf_fuse.planning import record
from gguf_fuse.planning.fusions import ALL, GATE_UP, QKV, Fusion
from gguf_fuse.planning.plan import Layer, Status

_STYLES = {"fusable": "green", "fused": "cyan"}
_PROOFS = {
    "measured": "measured: a model was fused and loaded",
    "source": "by its source code",
    "none": "it is not in the table",
}


def inspect(
    inputs: Annotated[
        list[str],
        existing_file(
            "IN...",
            "GGUF files, folders of them, addresses, hf:OWNER/REPO; of shards, any one of a set.",
        ),
    ],
    program: For = None,
    as_json: AsJson = False,
) -> None:
    """Show what IN holds and what fusing would do to it. Reads headers only."""
    names = [name for given in inputs for name in expand(given)]
    if names == inputs and len(inputs) == 1 and not _is_folder(inputs[0]):
        found = _inspect(inputs[0])
        if as_json:
            return print_json(inspection_json(found) | readers_json(found, program))
        return print_parts(_parts(found, program))
    if program is not None and not as_json:
        raise BadParameter("--for tells of one file; of several with --json")
    files = list(_files(names))
    if not files:
        fail(f"{inputs[0]}: no *.gguf file in it", EXIT_ERROR)
    good, bad = _inspect_all(files)
    if as_json:
        told = [inspection_json(found) | readers_json(found, program) for found in good]
        print_json({"inputs": [*told, *bad]})
    elif good:
        print_parts([*_overview(good), *_fetched(files)])
    if bad:
        fail(f"{len(bad)} of {len(files)} files cannot be read", EXIT_ERROR)


def _is_folder(name: str) -> bool:
    return os.path.isdir(name)  # noqa: PTH112 (the Path of an empty name is the current folder)


def _files(inputs: Iterable[str]) -> Iterator[str]:
    """Each file, those in folders in the order of their names; of each set of shards, one."""
    from gguf_fuse.format.shards import ShardName

    seen = set[tuple[str, int]]()
    for path in inputs:
        for file in sorted(_in_folder(path)) if _is_folder(path) else [path]:
            name = ShardName.parse(file)
            if name is None or (name.prefix, name.count) not in seen:
                yield file
            if name is not None:
                seen.add((name.prefix, name.count))


def _in_folder(folder: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise error

    for place, _, names in os.walk(folder, onerror=refuse):
        yield from (str(Path(place, name)) for name in names if name.endswith(".gguf"))


def _inspect_all(
    files: Iterable[str],
) -> tuple[list[gguf_fuse.Inspection], list[dict[str, str]]]:
    """Those that can be read, and what is wrong with the others, told at once."""
    good, bad = list[gguf_fuse.Inspection](), list[dict[str, str]]()
    for file in files:
        try:
            good.append(_inspect(file))
        except GGUFError as error:
            complain(str(error))
            bad.append({"input": file, "error": str(error)})
    return good, bad


def _inspect(file: str) -> gguf_fuse.Inspection:
    with told_of_waits():
        return gguf_fuse.inspect(file)


def _fetched(names: Iterable[str]) -> Iterator[RenderableType]:
    """How much was fetched, where files lie elsewhere."""
    if any(map(is_address, names)):
        from gguf_fuse.fetching.place import fetched

        yield text(f"{decimal(fetched.n_bytes)} fetched", "dim")


def _overview(found: Sequence[gguf_fuse.Inspection]) -> Iterator[RenderableType]:
    """One line for each file, and the total."""
    rows = [[text(cell) for cell in _cells(each)] for each in found]
    lines = [Flowing("  ".join(cell.plain for cell in row), indent=4) for row in rows]
    columns: list[Column | str] = [
        "file",
        "architecture",
        number("size"),
        "types",
        "llama.cpp",
        "layers",
    ]
    yield Fitting(table(columns, rows), Group(*lines))
    size = decimal(sum(each.header.file_bytes for each in found))
    n_fusable = sum(any(_fusable(each)) for each in found)
    yield ""
    yield Flowing(f"{_count(len(found), 'file')}, {size}; {n_fusable} can be fused")


def _cells(found: gguf_fuse.Inspection) -> Iterator[str]:
    header = found.header
    yield header.path
    yield str(header.architecture or header.metadata.get("general.type", "-"))
    yield decimal(header.file_bytes)
    yield ", ".join(_types(found))
    yield loader_word(found.loader.qkv.loader) if header.is_model else "-"
    yield "; ".join(_totals(found, _in_short)) or "none that could be fused"


def _in_short(kind: str) -> str:
    return {"attention layers": "", "layers of experts": "of experts"}.get(kind, kind)


def _types(found: gguf_fuse.Inspection) -> Iterator[str]:
    """Types of matrices, the most frequent first: others are of norms and biases."""
    from gguf_fuse.format.types import type_name

    counts = Counter(type_name(t.type) for t in found.header.tensors if len(t.ne) > 1)
    yield from (name for name, _ in counts.most_common())


def _parts(found: gguf_fuse.Inspection, program: For) -> Iterator[RenderableType]:
    """Of one file: what it is, its layers, the total, and what to run next."""
    for label, value in (*_file_lines(found), *reader_lines(found, program)):
        yield Flowing(value, label=f"{label:<13}", indent=13)
    yield ""
    if not found.layers:
        yield "no layers that could be fused"
        return
    yield layer_table(_rows(found))
    yield ""
    yield from (Flowing(total, indent=2) for total in _totals(found))
    yield from _fetched([found.header.path])
    yield from recipe_hint(found.header, found.layers)
    yield from _next(found)


def _next(found: gguf_fuse.Inspection) -> Iterator[Text]:
    path, fusable = found.header.path, {layer.fusion.flag for layer in _fusable(found)}
    flags = [fusion.flag for fusion in ALL if fusion.flag in fusable]
    # What is fused already is not fused further.
    if flags and found.header.is_model and not record.exists(found.header):
        yield from next_line(" ".join(flags), path, beside(path))


def _fusable(found: gguf_fuse.Inspection) -> Iterator[Layer]:
    yield from (layer for layer in found.layers if layer.status is Status.FUSABLE)


def _totals(found: gguf_fuse.Inspection, named: Callable[[str], str] = str) -> Iterator[str]:
    """For each kind, "28 of 32 attention layers fusable: V is Q6_K in 4"."""
    kinds: dict[str, list[Layer]] = {}
    for layer in found.layers:
        kinds.setdefault(counted(layer.fusion), []).append(layer)
    for kind, layers in kinds.items():
        counts = Counter(layer.status for layer in layers)
        of_all = f"of {len(layers)} {named(kind)}".rstrip()
        n_fused, n_fusable = counts[Status.FUSED], counts[Status.FUSABLE]
        if n_fused:
            yield f"{n_fused} {of_all} fused"
        if n_fused < len(layers):
            left = [layer for layer in layers if layer.status is not Status.SEPARATE]
            why = Counter(_why_not(layer) for layer in left if layer.reason)
            n_left, total = len(layers), f"{n_fusable} {of_all} fusable"
            if n_fused and not n_fusable:
                n_left -= n_fused
                total = f"{n_left} {of_all} left"
            reasons = [r if n == n_left else f"{r} in {n}" for r, n in why.items()]
            yield ": ".join([total, *_listed(reasons)])


def _listed(reasons: Sequence[str]) -> list[str]:
    return ["; ".join(reasons)] if reasons else []


def _why_not(layer: Layer) -> str:
    """The reason, but where types differ by the part that stands alone: "V is Q6_K"."""
    types = Counter(layer.types)
    if (
        len(types) == 1
        or layer.status is not Status.MISMATCH
        or "types differ" not in str(layer.reason)
    ):
        return str(layer.reason)
    common, n = types.most_common(1)[0]
    pairs = zip(layer.fusion.parts, layer.types, strict=True)
    return ", ".join(f"{_letter(part)} is {ty}" for part, ty in pairs if n == 1 or ty != common)


def _letter(part: str) -> str:
    """Q of attn_q, gate of ffn_gate_exps."""
    name = part.removeprefix("attn_").removeprefix("ffn_").removesuffix("_exps")
    return name.upper() if part in QKV.parts else name


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _rows(found: gguf_fuse.Inspection) -> Iterator[tuple[Layer, Text]]:
    for layer in found.layers:
        shown = status(layer)
        reason = f": {_why_not(layer)}" if layer.reason else ""
        style = _STYLES.get(shown, "yellow")
        yield layer, text(f"{fused_tensor(layer)}{shown}{reason}", style)


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
    if not header.is_model:
        return
    yield "loader", _loader_line(found, QKV)
    if any(layer.fusion is GATE_UP for layer in found.layers):
        yield "", _loader_line(found, GATE_UP)


def _loader_line(found: gguf_fuse.Inspection, fusion: Fusion) -> str:
    reads = found.loader.reads(fusion)
    build = f" since build {reads.since}" if reads.since else ""
    return f"llama.cpp {reads.loader.phrase(fusion.words)}{build} ({_PROOFS[reads.proof]})"
