"""IN, OUT -> Result: read, plan, check, write. What the commands fuse and unfuse do."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gguf_fuse import fusion, imatrix, unfusion
from gguf_fuse.base import base_rows
from gguf_fuse.copying import DEFAULT_THREADS, OnProgress, clone_block
from gguf_fuse.fusion import Layer, Plan, Refused, Status, summary
from gguf_fuse.gguf_file import GGUFError, Header, TensorInfo, read_header, read_tensors
from gguf_fuse.placement import Placement, place
from gguf_fuse.write import Written, check_destination, open_source, stream, write

STANDARD_OUTPUT = "-"

OnMismatch = Literal["skip", "error"]
Reflink = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Options:
    """How to write, the same for both ways. on_start gets the number of bytes to come.

    reflink: whether to share blocks with the source where the file system can; "always" fails
    where it cannot.
    """

    dry_run: bool = False
    force: bool = False
    sync: bool = True
    threads: int = DEFAULT_THREADS
    reflink: Reflink = "auto"
    on_start: Callable[[int], None] = field(default=lambda n_bytes: None)
    on_progress: OnProgress = field(default=lambda n_bytes: None)
    on_flush: Callable[[], None] = field(default=lambda: None)


@dataclass(frozen=True)
class Result:
    """What was written, or would be on a dry run."""

    source: Header
    output: str
    plan: Plan
    placement: Placement
    written: Written
    seconds: float


def fuse(
    source: Path,
    output: str,
    *,
    on_mismatch: OnMismatch = "skip",
    any_architecture: bool = False,
    base: Path | None = None,
    options: Options | None = None,
) -> Result:
    """Write `source` with fused Q, K and V to `output` ("-": standard output).

    on_mismatch: "error" refuses a file with a layer whose Q, K and V cannot be one tensor.
    base: the model that an adapter or an importance matrix is for, fused or not.

    Raises GGUFError (and its kinds Refused and NothingToDo); nothing is written then.
    """
    header = read_header(source)
    plan = _fuse_plan(header, base, any_architecture)
    mismatched = [layer for layer in plan.skipped if layer.status is Status.MISMATCH]
    if mismatched and on_mismatch == "error":
        raise Refused(f"{header.path}: {summary(mismatched)} (--on-mismatch skip leaves them)")
    return _carry_out(header, plan, output, options or Options())


def unfuse(
    source: Path, output: str, *, any_architecture: bool = False, options: Options | None = None
) -> Result:
    """Write `source` with separate Q, K and V to `output`; raises as `fuse` does."""
    header = read_header(source)
    plan = _unfuse_plan(header, any_architecture)
    return _carry_out(header, plan, output, options or Options())


def examine(header: Header) -> tuple[Layer, ...]:
    """What fusing would do with each attention layer of a file of any kind."""
    kind = header.metadata.get("general.type")
    if kind == "adapter":
        from gguf_fuse import adapter

        return adapter.examine(header)
    if kind == "imatrix":
        return imatrix.examine(header, _reader(header))
    return fusion.examine(header, read_tensors(header, fusion.scalar_names(header)))


def _fuse_plan(header: Header, base: Path | None, any_architecture: bool) -> Plan:
    kind = header.metadata.get("general.type")
    if kind not in ("adapter", "imatrix"):
        if base is not None:
            raise Refused(
                f"{header.path}: --base is for LoRA adapters and importance matrices; this file "
                "is neither"
            )
        scalars = read_tensors(header, fusion.scalar_names(header))
        return fusion.fuse(header, scalars, any_architecture=any_architecture)
    rows = None if base is None else _base_rows(base, any_architecture)
    if kind == "imatrix":
        return imatrix.fuse(header, _reader(header), rows=rows)
    from gguf_fuse import adapter  # brings numpy, which no model needs

    return adapter.fuse(header, _reader(header), rows=rows, any_architecture=any_architecture)


def _base_rows(path: Path, any_architecture: bool) -> dict[str, tuple[int, ...]]:
    header = read_header(path)
    scalars = read_tensors(header, fusion.scalar_names(header))
    return base_rows(header, scalars, any_architecture=any_architecture)


def _unfuse_plan(header: Header, any_architecture: bool) -> Plan:
    kind = header.metadata.get("general.type")
    if kind == "adapter":
        from gguf_fuse import adapter

        return adapter.unfuse(header, _reader(header))
    if kind == "imatrix":
        return imatrix.unfuse(header)
    return unfusion.unfuse(header, any_architecture=any_architecture)


def _reader(header: Header) -> Callable[[TensorInfo], bytes]:
    return lambda tensor: read_tensors(header, [tensor.name])[tensor.name]


def _carry_out(source: Header, plan: Plan, output: str, options: Options) -> Result:
    started = time.perf_counter()
    placement = place(plan, _shared_block(source, output, options.reflink))
    if options.dry_run:
        if output != STANDARD_OUTPUT:
            check_destination(source, Path(output), placement, force=options.force)
        written = Written(sum(copy.n_bytes for copy in placement.copies), placement.n_cloned)
    elif output == STANDARD_OUTPUT:
        options.on_start(placement.n_bytes)
        written = stream(source, placement, sys.stdout.fileno(), options.on_progress)
    else:
        options.on_start(placement.n_bytes)
        written = write(
            source,
            placement,
            Path(output),
            force=options.force,
            sync=options.sync,
            clone_all=options.reflink == "always",
            threads=options.threads,
            on_progress=options.on_progress,
            on_flush=options.on_flush,
        )
    return Result(source, output, plan, placement, written, time.perf_counter() - started)


def _shared_block(source: Header, output: str, reflink: Reflink) -> int | None:
    """The block size for cloning, if it is wanted and the file system can."""
    if reflink == "never":
        return None
    if output == STANDARD_OUTPUT:
        block = None
    else:
        with open_source(source) as source_fd:
            block = clone_block(source_fd, Path(os.path.realpath(output)).parent)
    if block is None and reflink == "always":
        raise GGUFError(
            f"{output}: cannot share blocks with {source.path}: that takes one file system that "
            "can clone (XFS, Btrfs); --reflink auto copies instead"
        )
    return block
