"""Task -> Entry: one file fused, verified and hashed, in whatever process that happens."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gguf_fuse import __version__, api
from gguf_fuse.choices import OnMismatch, Reflink, Verified
from gguf_fuse.format.header import Header
from gguf_fuse.format.manifest import read_manifest
from gguf_fuse.format.shards import read_model
from gguf_fuse.format.source import AnyPath, GGUFError, Source
from gguf_fuse.planning.fusions import ALL, QKV
from gguf_fuse.planning.plan import Layer, NothingToDo, Refused, summary
from gguf_fuse.progress import OnProgress, ignore
from gguf_fuse.verifying.report import VerifyOptions
from gguf_fuse.verifying.verify import verify
from gguf_fuse.writing.manifest import manifest_paths

Result = Literal["fused", "nothing to fuse", "refused", "failed"]

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Settings:
    """How every file of a batch is fused: what the options of fuse say. fused: fused tensors.

    manifest: whether each output gets one, see `manifest_files`.
    """

    fused: tuple[str, ...] = (QKV.fused,)
    on_mismatch: OnMismatch = "skip"
    any_architecture: bool = False
    verify: Verified = "structure"
    split_max_size: int | None = None
    split_max_tensors: int | None = None
    reflink: Reflink = "auto"
    sync: bool = True
    threads: int = 1
    resume: bool = True
    manifest: bool = False


def manifest_files(output: str, settings: Settings) -> tuple[str, ...]:
    """The two of the manifest that an output gets, if it gets one: called as it is."""
    if not settings.manifest:
        return ()
    return tuple(map(str, manifest_paths(f"{output.removesuffix('.gguf')}.json")))


@dataclass(frozen=True)
class Task:
    """One input, a file or the first shard of a set, and where its fused form goes.

    replace: whether what is there already may be replaced.
    """

    input: str
    output: str
    settings: Settings
    replace: bool

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, told: dict[str, Any]) -> Task:
        settings = Settings(**{**told["settings"], "fused": tuple(told["settings"]["fused"])})
        return cls(told["input"], told["output"], settings, told["replace"])


@dataclass(frozen=True)
class File:
    """A file as it was: enough to see that it is still the same.

    version: of one that is fetched, what its host tells (mtime_ns is -1). sha256: of the file,
    where it was written here, or its host tells.
    """

    path: str
    bytes: int
    mtime_ns: int
    version: str | None = None
    sha256: str | None = None

    @classmethod
    def of(cls, source: Source) -> File:
        """As it was when its header was read."""
        place, stamp = source.place, source.stamp
        told = (None, None) if place is None else (place.version, place.sha256)
        return cls(source.path, stamp.n_bytes, stamp.mtime, *told)

    @classmethod
    def find(cls, path: AnyPath, sha256: str | None = None) -> File | None:
        """None where there is none."""
        try:
            found = cls.of(Source.find(path))
        except GGUFError:
            return None
        return found if sha256 is None else dataclasses.replace(found, sha256=sha256)

    def is_there(self) -> bool:
        return File.find(self.path, self.sha256) == self


@dataclass(frozen=True)
class Entry:
    """What became of a task. line: the reason, where nothing was written.

    inputs: the file or the shards, empty where they could not be read. outputs: what was written;
    of a failure, what is there, not verified. manifest: its two files, where it was wanted. fused,
    layers: how many were fused, of how many. skipped: the reasons of the others. broken_off: its
    process died, and what is there may be half done.
    """

    input: str
    output: str
    settings: Settings
    result: Result
    line: str | None = None
    inputs: tuple[File, ...] = ()
    outputs: tuple[File, ...] = ()
    manifest: tuple[File, ...] = ()
    architecture: str | None = None
    fused: int = 0
    layers: int = 0
    skipped: str = ""
    seconds: float = 0.0
    broken_off: bool = False
    version: str = __version__

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, told: dict[str, Any]) -> Entry:
        """Raises TypeError, KeyError or ValueError for what no entry is."""
        keys = ("inputs", "outputs", "manifest")
        files = {key: tuple(File(**file) for file in told.get(key, ())) for key in keys}
        task = Task.of({**told, "replace": False})
        return cls(**{**told, **files, "settings": task.settings})


def carry_out(
    task: Task,
    on_start: Callable[[int], None] = ignore,
    on_progress: OnProgress = ignore,
    *,
    dry_run: bool = False,
) -> Entry:
    """Fuse one file, verify it and hash it. Every GGUFError is an entry; others are raised.

    dry_run: only decide; `outputs` are without sha256 then, and mtime_ns is 0.
    """
    started = time.monotonic()
    try:
        if not dry_run:
            Path(task.output).parent.mkdir(parents=True, exist_ok=True)
        entry = _carry_out(task, on_start, on_progress, dry_run)
    except NothingToDo as nothing:
        found = _facts(nothing.header, (), nothing.layers)
        entry = Entry(
            task.input, task.output, task.settings, "nothing to fuse", str(nothing), **found
        )
    except Refused as refused:
        entry = _without(task, "refused", str(refused))
    except GGUFError as error:
        entry = _without(task, "failed", str(error))
    except OSError as error:
        entry = _without(task, "failed", f"{error.filename}: {error.strerror}")
    except MemoryError:
        entry = _without(task, "failed", f"{task.input}: not enough memory")
    return dataclasses.replace(entry, seconds=round(time.monotonic() - started, 3))


def _carry_out(
    task: Task, on_start: Callable[[int], None], on_progress: OnProgress, dry_run: bool
) -> Entry:
    settings = task.settings
    output = _in_a_folder(task.output) if dry_run else task.output
    manifest = manifest_files(output, settings)
    options = api.Options(
        dry_run=dry_run,
        force=task.replace,
        sync=settings.sync,
        threads=settings.threads,
        reflink=settings.reflink,
        on_start=on_start,
        on_progress=on_progress,
        split_max_size=settings.split_max_size,
        split_max_tensors=settings.split_max_tensors,
        manifest=manifest[0] if manifest else None,
        resume=settings.resume,
    )
    result = api.fuse(
        task.input,
        output,
        fusions=[fusion for fusion in ALL if fusion.fused in settings.fused],
        on_mismatch=settings.on_mismatch,
        any_architecture=settings.any_architecture,
        options=options,
    )
    found = _facts(result.source, result.plan.changed, result.plan.skipped)
    if dry_run:
        folder = Path(task.output).parent
        sizes = [(part.path.name, part.placement.n_bytes) for part in result.outputs]
        outputs = tuple(File(str(folder / name), n_bytes, 0) for name, n_bytes in sizes)
        return Entry(task.input, task.output, settings, "fused", outputs=outputs, **found)
    try:
        _verify(task, result)
        sums = [file.sha256 for file in read_manifest(manifest[0])] if manifest else None
        outputs = _found(result.files, sums or map(_sha256, result.files))
        found["manifest"] = _found(manifest, map(_sha256, map(Path, manifest)))
    except GGUFError as error:  # what is there by now is recorded, to be replaced the next time
        outputs = _found(result.files, itertools.repeat(None))
        found["manifest"] = _found(manifest, itertools.repeat(None))
        line = f"{error}; {result.files[0]} is there, but not verified" if outputs else str(error)
        return Entry(task.input, task.output, settings, "failed", line, outputs=outputs, **found)
    return Entry(task.input, task.output, settings, "fused", outputs=outputs, **found)


def _found(paths: Iterable[AnyPath], sums: Iterable[str | None]) -> tuple[File, ...]:
    files = map(File.find, paths, sums)
    return tuple(file for file in files if file is not None)


def _in_a_folder(output: str) -> str:
    """The same name in the nearest folder that is there already: on its disk it would be."""
    path = Path(output)
    return str(next(parent for parent in path.parents if parent.is_dir()) / path.name)


def _verify(task: Task, result: api.Result) -> None:
    """Raises GGUFError if what was written is not what it must be; it is removed then."""
    if task.settings.verify == "none" or not result.source.is_model:
        return
    options = VerifyOptions(
        structure_only=task.settings.verify == "structure", threads=task.settings.threads
    )
    report = verify(task.input, result.files[0], options)
    if report.ok:
        return
    for path in (*result.files, *map(Path, manifest_files(task.output, task.settings))):
        path.unlink(missing_ok=True)
    problems = report.structure.problems or ("its numbers differ",)
    raise GGUFError(f"{task.output}: verify failed, and it was removed: {problems[0]}")


def _facts(header: Header, changed: Sequence[Layer], skipped: Sequence[Layer]) -> dict[str, Any]:
    """What an entry says of a file that could be read."""
    return {
        "inputs": _files(header),
        "architecture": header.architecture,
        "fused": len(changed),
        "layers": len(changed) + len(skipped),
        "skipped": summary(skipped),
    }


def _without(task: Task, result: Result, line: str) -> Entry:
    """The entry of a file of which nothing was made."""
    try:
        inputs = _files(read_model(task.input))
    except GGUFError:
        inputs = tuple(file for file in [File.find(task.input)] if file is not None)
    return Entry(task.input, task.output, task.settings, result, line, inputs)


def _files(header: Header) -> tuple[File, ...]:
    return tuple(map(File.of, header.sources))


def _sha256(path: Path) -> str:
    """Raises GGUFError for a file that cannot be read."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while n_bytes := file.readinto(buffer):
                digest.update(buffer[:n_bytes])
    except OSError as error:
        raise GGUFError(f"{path}: {error.strerror}") from error
    return digest.hexdigest()
