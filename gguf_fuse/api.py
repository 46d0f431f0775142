"""IN, OUT -> Result: read, plan, check, write. What the commands fuse and unfuse do."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gguf_fuse.choices import OnMismatch as OnMismatch
from gguf_fuse.choices import Reflink as Reflink
from gguf_fuse.format import shards
from gguf_fuse.format.header import GGUFError, Header, TensorInfo, read_tensor, read_tensors
from gguf_fuse.planning import fuse as fusion
from gguf_fuse.planning import imatrix
from gguf_fuse.planning import unfuse as unfusion
from gguf_fuse.planning.base import base_rows
from gguf_fuse.planning.fusions import KINDS, QKV, Kind
from gguf_fuse.planning.loaders import Architecture
from gguf_fuse.planning.plan import Layer, NothingToDo, Plan, Refused, Status, summary
from gguf_fuse.writing.copy import DEFAULT_THREADS, OnProgress, clone_block
from gguf_fuse.writing.place import Placement, place
from gguf_fuse.writing.publish import (
    Output,
    Written,
    check_destinations,
    open_source,
    stream,
    write,
)

STANDARD_OUTPUT = "-"

AnyPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Options:
    """How to write, the same for both ways. on_start gets the number of bytes to come.

    reflink: whether to share blocks with the source where the file system can; "always" fails
    where it cannot. split_max_size (bytes of data), split_max_tensors: cut the output into shards.
    """

    dry_run: bool = False
    force: bool = False
    sync: bool = True
    threads: int = DEFAULT_THREADS
    reflink: Reflink = "auto"
    on_start: Callable[[int], None] = field(default=lambda n_bytes: None)
    on_progress: OnProgress = field(default=lambda n_bytes: None)
    on_flush: Callable[[], None] = field(default=lambda: None)
    split_max_size: int | None = None
    split_max_tensors: int | None = None


@dataclass(frozen=True)
class Result:
    """What was written, or would be on a dry run.

    plan: of the whole; outputs: one, or shards; files: what there is now that was not before.
    """

    source: Header
    output: str
    plan: Plan
    outputs: tuple[Output, ...]
    files: tuple[Path, ...]
    written: Written
    seconds: float

    @property
    def placement(self) -> Placement:
        """Of the one file, or the first shard."""
        return self.outputs[0].placement

    @property
    def n_bytes(self) -> int:
        return sum(output.placement.n_bytes for output in self.outputs)


def fuse(
    source: AnyPath,
    output: AnyPath,
    *,
    kinds: Sequence[Kind] = (QKV,),
    on_mismatch: OnMismatch = "skip",
    any_architecture: bool = False,
    base: AnyPath | None = None,
    options: Options | None = None,
) -> Result:
    """Write `source` to `output` ("-": standard output) with what `kinds` names fused.

    `source` is a file, or any shard of a set; what `output` may be says `shards.divide`.
    on_mismatch: "error" refuses a file with a layer whose parts cannot be one tensor.
    base: the model that an adapter or an importance matrix is for, fused or not.

    Raises GGUFError (and its kinds Refused and NothingToDo); nothing is written then.
    """
    header = shards.read_model(source)
    try:
        plan = _fuse_plan(header, base, kinds, any_architecture)
    except NothingToDo as nothing:
        _refuse_mismatch(header, nothing.layers, on_mismatch)
        raise
    _refuse_mismatch(header, plan.skipped, on_mismatch)
    return _carry_out(header, plan, os.fspath(output), options or Options())


def _refuse_mismatch(header: Header, layers: Sequence[Layer], on_mismatch: OnMismatch) -> None:
    mismatched = [layer for layer in layers if layer.status is Status.MISMATCH]
    if mismatched and on_mismatch == "error":
        raise Refused(f"{header.path}: {summary(mismatched)} (--on-mismatch skip leaves them)")


def unfuse(
    source: AnyPath,
    output: AnyPath,
    *,
    any_architecture: bool = False,
    options: Options | None = None,
) -> Result:
    """Write `source` with all that is fused separate to `output`; raises as `fuse` does."""
    header = shards.read_model(source)
    plan = _unfuse_plan(header, any_architecture)
    return _carry_out(header, plan, os.fspath(output), options or Options())


@dataclass(frozen=True)
class Inspection:
    """What a file holds: its layers, and what llama.cpp's loader for it reads."""

    header: Header
    layers: tuple[Layer, ...]
    loader: Architecture


def inspect(source: AnyPath) -> Inspection:
    """What `source` holds and what fusing would do to it. Raises GGUFError."""
    header = shards.read_model(source)
    layers = _examine(header)
    name = layers[0].name if layers else "blk.0"
    return Inspection(header, layers, fusion.loader_of(header, name))


def _examine(header: Header) -> tuple[Layer, ...]:
    """Each layer of a file of any kind, in all kinds of fusion."""
    kind = header.metadata.get("general.type")
    if kind == "adapter":
        from gguf_fuse.planning import adapter

        return adapter.examine(header)
    if kind == "imatrix":
        return imatrix.examine(header, _reader(header))
    scalars = read_tensors(header, fusion.scalar_names(header))
    return fusion.examine(header, scalars, kinds=KINDS)


def _fuse_plan(
    header: Header, base: AnyPath | None, kinds: Sequence[Kind], any_architecture: bool
) -> Plan:
    if header.is_model:
        if base is not None:
            raise Refused(
                f"{header.path}: --base is for LoRA adapters and importance matrices; this file "
                "is neither"
            )
        scalars = read_tensors(header, fusion.scalar_names(header))
        return fusion.fuse(header, scalars, kinds=kinds, any_architecture=any_architecture)
    kind = header.metadata.get("general.type")
    if QKV not in kinds:
        raise Refused(f"{header.path}: of general.type {kind!r} only Q, K and V can be fused")
    rows = None if base is None else _base_rows(base, any_architecture)
    if kind == "imatrix":
        return imatrix.fuse(header, _reader(header), rows=rows)
    from gguf_fuse.planning import adapter  # brings numpy, which no model needs

    return adapter.fuse(header, _reader(header), rows=rows, any_architecture=any_architecture)


def _base_rows(path: AnyPath, any_architecture: bool) -> dict[str, tuple[int, ...]]:
    header = shards.read_model(path)
    scalars = read_tensors(header, fusion.scalar_names(header))
    return base_rows(header, scalars, any_architecture=any_architecture)


def _unfuse_plan(header: Header, any_architecture: bool) -> Plan:
    kind = header.metadata.get("general.type")
    if kind == "adapter":
        from gguf_fuse.planning import adapter

        return adapter.unfuse(header, _reader(header))
    if kind == "imatrix":
        return imatrix.unfuse(header)
    return unfusion.unfuse(header, any_architecture=any_architecture)


def _reader(header: Header) -> Callable[[TensorInfo], bytes]:
    return functools.partial(read_tensor, header)


def _carry_out(source: Header, plan: Plan, output: str, options: Options) -> Result:
    started = time.perf_counter()
    outputs = _outputs(source, plan, output, options)
    n_bytes = sum(part.placement.n_bytes for part in outputs)
    files: tuple[Path, ...] = ()
    if options.dry_run:
        if output != STANDARD_OUTPUT:
            check_destinations(source, outputs, force=options.force)
        copies = [copy.n_bytes for part in outputs for copy in part.placement.copies]
        written = Written(sum(copies), sum(part.placement.n_cloned for part in outputs))
    elif output == STANDARD_OUTPUT:
        options.on_start(n_bytes)
        placement = outputs[0].placement
        written = stream(source, placement, sys.stdout.fileno(), options.on_progress)
    else:
        options.on_start(n_bytes)
        written = write(
            source,
            outputs,
            force=options.force,
            sync=options.sync,
            clone_all=options.reflink == "always",
            threads=options.threads,
            on_progress=options.on_progress,
            on_flush=options.on_flush,
        )
        files = tuple(part.path for part in outputs)
    return Result(source, output, plan, outputs, files, written, time.perf_counter() - started)


def _outputs(source: Header, plan: Plan, output: str, options: Options) -> tuple[Output, ...]:
    """The files to write, every byte of them in its place. Raises GGUFError."""
    if output.endswith(os.sep):
        raise GGUFError(f"{output}: a folder, not a regular file; give the name of a file")
    limits = (options.split_max_size, options.split_max_tensors)
    if output == STANDARD_OUTPUT and limits != (None, None):
        raise GGUFError(f"{output}: standard output is one file; shards need a name")
    parts = shards.divide(source, plan, output, max_bytes=limits[0], max_tensors=limits[1])
    block = _shared_block(source, output, options.reflink)
    outputs = tuple(Output(path, place(part, block)) for path, part in parts)
    if options.reflink == "always" and not any(part.placement.clones for part in outputs):
        raise GGUFError(
            f"{output}: no block of {source.path} lies where it could be shared; --reflink auto "
            "copies instead"
        )
    return outputs


def _shared_block(source: Header, output: str, reflink: Reflink) -> int | None:
    """The block size for cloning, if it is wanted and the file system can."""
    if reflink == "never":
        return None
    if output == STANDARD_OUTPUT:
        block = None
    else:
        folder = Path(os.path.realpath(output)).parent
        with open_source(source) as sources:
            blocks = {clone_block(source_fd, folder) for source_fd in sources}
        block = blocks.pop() if len(blocks) == 1 else None
    if block is None and reflink == "always":
        raise GGUFError(
            f"{output}: cannot share blocks with {source.path}: that takes one file system that "
            "can clone (XFS, Btrfs); --reflink auto copies instead"
        )
    return block
