"""IN, OUT -> Result: read, plan, check, write. What the commands fuse and unfuse do."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gguf_fuse.choices import OnMismatch, Reflink, WayName, require_word
from gguf_fuse.format.header import Header
from gguf_fuse.format.layout import is_canonical, nonzero_padding, refuse_unaccounted
from gguf_fuse.format.shards import read_model
from gguf_fuse.format.source import AnyPath, GGUFError, Segment, is_address, opened
from gguf_fuse.planning import fuse as fusing
from gguf_fuse.planning.fusions import QKV, Fusion
from gguf_fuse.planning.plan import Layer, NothingToDo, Plan, Refused, Rows, Status, refuse_any
from gguf_fuse.progress import OnProgress, OnStart, ignore
from gguf_fuse.writing.copy import clone_block
from gguf_fuse.writing.cut import divide
from gguf_fuse.writing.manifest import STANDARD_OUTPUT
from gguf_fuse.writing.outputs import (
    Options,
    Output,
    Written,
    check_destinations,
    check_place,
)
from gguf_fuse.writing.place import Placement, place
from gguf_fuse.writing.temporary import TEMPORARY_MARK
from gguf_fuse.writing.write import write

__all__ = ["Altered", "OnMismatch", "Options", "Reflink", "Result"]
__all__ += ["fuse", "recipe", "requantize_and_fuse", "unfuse"]

if TYPE_CHECKING:
    from gguf_fuse.planning import recipe as recipes


@dataclass(frozen=True)
class Result:
    """What was written, or would be on a dry run.

    plan: of the whole; outputs: one, or shards; files: what there is now that was not before.
    cut_anew: the shards, or the one file, are not those of the source.
    lost_padding: bytes of the source's padding that are not zero; the output has zeros.
    """

    source: Header
    output: str
    plan: Plan
    outputs: tuple[Output, ...]
    files: tuple[Path, ...]
    written: Written
    seconds: float
    cut_anew: bool
    lost_padding: int

    @property
    def bit_for_bit(self) -> bool:
        """Whether unfuse will give back the very file, or the very shards, that `source` is."""
        same_files = not (self.source.shards and self.cut_anew)
        return same_files and is_canonical(self.source) and not self.lost_padding

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
    fusions: Sequence[Fusion] = (QKV,),
    on_mismatch: OnMismatch = "skip",
    any_architecture: bool = False,
    base: AnyPath | None = None,
    options: Options | None = None,
) -> Result:
    """Write `source` to `output` ("-": standard output) with `fusions` made.

    `source` is a file, or any shard of a set; what `output` may be says `cut.divide`.
    on_mismatch: "error" refuses a file with a layer whose parts cannot be one tensor.
    base: the model that an adapter or an importance matrix is for, fused or not.

    Raises GGUFError (Refused and NothingToDo are such); nothing is written then.
    """
    require_word("on_mismatch", on_mismatch, OnMismatch)
    header = read_model(source)
    refuse_unaccounted(header)
    base_header = None if base is None else read_model(base)
    try:
        plan = _fuse_plan(header, base_header, fusions, any_architecture)
    except NothingToDo as nothing:
        _refuse_mismatch(header, nothing.layers, on_mismatch)
        raise
    _refuse_mismatch(header, plan.skipped, on_mismatch)
    return _carry_out(header, plan, os.fspath(output), options or Options(), base_header)


def _refuse_mismatch(header: Header, layers: Sequence[Layer], on_mismatch: OnMismatch) -> None:
    if on_mismatch == "error":
        refuse_any(header, layers, Status.MISMATCH, " (--on-mismatch skip leaves them)")


def unfuse(
    source: AnyPath,
    output: AnyPath,
    *,
    any_architecture: bool = False,
    options: Options | None = None,
) -> Result:
    """Write `source` with all that is fused separate to `output`; raises as `fuse` does."""
    header = read_model(source)
    refuse_unaccounted(header)
    plan = _unfuse_plan(header, any_architecture)
    return _carry_out(header, plan, os.fspath(output), options or Options())


def recipe(source: AnyPath) -> recipes.Recipe:
    """What llama-quantize must do to `source` so that layers of different types can be fused.

    Raises GGUFError; NothingToDo where types are in no layer's way.
    """
    from gguf_fuse.planning import recipe as recipes

    return recipes.recipe(read_model(source), Segment.read)


class Altered(GGUFError):
    """llama-quantize changed what it was not told to, or left what it was."""


def requantize_and_fuse(
    found: recipes.Recipe,
    way: WayName,
    output: AnyPath,
    *,
    unquantized: AnyPath | None = None,
    matrix: AnyPath | None = None,
    llama_quantize: str = "llama-quantize",
    force: bool = False,
    on_start: OnStart = ignore,
    on_progress: OnProgress = ignore,
) -> Result:
    """Carry the recipe out: llama-quantize, a check that it changed nothing else, then `fuse`.

    unquantized: the model in F16 or F32, to quantize from that instead; the other tensors then come
    from there too, and only their types are checked. matrix: the importance matrix.

    Raises GGUFError, Altered among them; nothing is written then. The source is only read.
    """
    from gguf_fuse.verifying import requantized
    from gguf_fuse.verifying.report import VerifyOptions
    from gguf_fuse.verifying.verify import verify
    from gguf_fuse.writing import quantize

    output, chosen = Path(output), found.way(way)
    program = quantize.find(llama_quantize)
    if chosen.wants_matrix and matrix is None:
        raise GGUFError(
            f"{found.header.path}: llama-quantize wants the importance matrix of the model for "
            f"tensors of {chosen.wants_matrix}, be it to copy them; give --imatrix FILE"
        )
    _check_room(found, chosen, output, force)
    prefix = f"{output.name}{TEMPORARY_MARK}"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=output.parent) as folder:
        new = str(Path(folder) / "requantized.gguf")
        source = found.source if unquantized is None else os.fspath(unquantized)
        words = found.quantize(chosen, source, new, None if matrix is None else os.fspath(matrix))
        again = ["--allow-requantize"] if unquantized is None else []
        on_start("llama-quantize", len(found.header.tensors))
        quantize.quantize(program, [*again, *words], on_progress)
        header = read_model(new)
        problems = requantized.retyped_problems(found.header, header, chosen.types)
        options = VerifyOptions(on_start=on_start, on_progress=on_progress)
        if unquantized is None and not problems:
            changed = chosen.types.keys()
            problems = requantized.other_problems(found.header, header, changed, options)
        if problems:
            raise Altered(f"llama-quantize did not do as told: {problems[0]}; nothing is written")
        start = functools.partial(on_start, "writing")
        how = Options(force=force, on_start=start, on_progress=on_progress)
        result = fuse(new, output, options=how)
        # Its input is about to go: nobody could verify it later.
        report = verify(Path(new), output, replace(options, structure_only=True))
        if not report.ok:
            raise Altered(f"{output}: written, but {report.structure.problems[0]}")
        return result


def _check_room(found: recipes.Recipe, way: recipes.Way, output: Path, force: bool) -> None:
    """Before hours of work. Raises GGUFError."""
    check_place(found.header.sources, output, Path(os.path.realpath(output)), force)
    needed = 2 * (found.header.file_bytes + way.n_bytes)  # what llama-quantize writes, and OUT
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise GGUFError(
            f"{output}: {needed} bytes are needed, {free} are free on the disk of {output.parent}"
        )


def _fuse_plan(
    header: Header, base: Header | None, fusions: Sequence[Fusion], any_architecture: bool
) -> Plan:
    if header.is_model:
        if base is not None:
            raise Refused(
                f"{header.path}: --base is for LoRA adapters and importance matrices; this file "
                "is neither"
            )
        return fusing.fuse(header, Segment.read, fusions=fusions, any_architecture=any_architecture)
    general_type = header.metadata.get("general.type")
    if QKV not in fusions:
        raise Refused(
            f"{header.path}: of general.type {general_type!r} only Q, K and V can be fused"
        )
    rows: Rows | None = None
    if base is not None:
        from gguf_fuse.planning import unfuse as unfusing
        from gguf_fuse.planning.base import require_base

        rows = unfusing.base_rows(base, Segment.read, any_architecture=any_architecture)
        require_base(header, base, rows)
    if general_type == "imatrix":
        from gguf_fuse.planning import imatrix

        return imatrix.fuse(header, Segment.read, rows=rows)
    from gguf_fuse.planning import fuse_adapter  # numpy, which only adapters need: 0.1 s

    return fuse_adapter.fuse(header, Segment.read, rows=rows, any_architecture=any_architecture)


def _unfuse_plan(header: Header, any_architecture: bool) -> Plan:
    general_type = header.metadata.get("general.type")
    if general_type == "adapter":
        from gguf_fuse.planning import unfuse_adapter

        return unfuse_adapter.unfuse(header, Segment.read)
    if general_type == "imatrix":
        from gguf_fuse.planning import imatrix

        return imatrix.unfuse(header)
    from gguf_fuse.planning import unfuse as unfusing

    return unfusing.unfuse(header, any_architecture=any_architecture)


def _carry_out(
    source: Header, plan: Plan, output: str, options: Options, base: Header | None = None
) -> Result:
    started = time.perf_counter()
    read = source.sources if base is None else (*source.sources, *base.sources)
    outputs = _outputs(source, plan, output, options)
    n_bytes = sum(part.placement.n_bytes for part in outputs)
    lost = nonzero_padding(source)
    files: tuple[Path, ...] = ()
    if options.dry_run:
        named = () if output == STANDARD_OUTPUT else outputs
        check_destinations(read, named, force=True, manifest=options.manifest)  # replaces nothing
        copies = [copy.n_bytes for part in outputs for copy in part.placement.copies]
        written = Written(sum(copies), sum(part.placement.n_cloned for part in outputs))
    elif output == STANDARD_OUTPUT:
        from gguf_fuse.writing.stream import stream

        options.on_start(n_bytes)
        written = stream(read, outputs[0], sys.stdout.fileno(), options)
    else:
        options.on_start(n_bytes)
        written = write(read, outputs, options)
        files = tuple(part.path for part in outputs)
    seconds = time.perf_counter() - started
    limits = (options.split_max_size, options.split_max_tensors)
    cut_anew = len(outputs) != len(source.files) or limits != (None, None)
    return Result(source, output, plan, outputs, files, written, seconds, cut_anew, lost)


def _outputs(source: Header, plan: Plan, output: str, options: Options) -> tuple[Output, ...]:
    """The files to write, every byte of them in its place. Raises GGUFError."""
    if is_address(output):
        raise GGUFError(f"{output}: OUT is a file on this machine, or - for a pipe; no address")
    if output.endswith(os.sep):
        raise GGUFError(f"{output}: a folder, not a regular file; give the name of a file")
    limits = (options.split_max_size, options.split_max_tensors)
    if output == STANDARD_OUTPUT and limits != (None, None):
        raise GGUFError(f"{output}: standard output is one file; shards need a name")
    parts = divide(source, plan, output, max_bytes=limits[0], max_tensors=limits[1])
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
        with opened(source.sources) as sources:
            blocks = {clone_block(file, folder) for file in sources.values()}
        block = blocks.pop() if len(blocks) == 1 else None
    if block is None and reflink == "always":
        raise GGUFError(
            f"{output}: cannot share blocks with {source.path}: that takes one file system that "
            "can clone (XFS, Btrfs); --reflink auto copies instead"
        )
    return block
