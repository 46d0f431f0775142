"""A manifest and FUSED: is it, byte for byte, what was written? Needs no ORIGINAL.

The SHA-256 of a file proves all of it; those of its tensors tell where another one differs. What
the manifest says of tensors is then compared with the file's own header.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gguf_fuse.format.header import Header
from gguf_fuse.format.manifest import FileHash, read_manifest
from gguf_fuse.format.parser import header_of
from gguf_fuse.format.shards import ShardName
from gguf_fuse.format.source import AnyPath, GGUFError, Source, opened
from gguf_fuse.format.types import type_name
from gguf_fuse.verifying.report import VerifyOptions
from gguf_fuse.verifying.structure import are_most
from gguf_fuse.writing.hashing import Hashes, digesting
from gguf_fuse.writing.place import Copy
from gguf_fuse.writing.stream import read_in_order


@dataclass(frozen=True)
class ManifestReport:
    """Each problem names its place. n_bytes: of all files, hashed."""

    manifest: str
    fused: str
    n_tensors: int
    problems: tuple[str, ...]
    n_bytes: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_manifest(
    manifest: AnyPath, fused: AnyPath, options: VerifyOptions | None = None
) -> ManifestReport:
    """Is FUSED, or the set that it is a shard of, what the manifest says? Its name is not asked.

    All of it is read once. Raises GGUFError where the manifest is none, or a file cannot be read,
    or is not at the end what it was.
    """
    options, started = options or VerifyOptions(), time.perf_counter()
    name, path = os.fspath(manifest), os.fspath(fused)
    files = read_manifest(manifest)
    n_tensors = sum(len(file.tensors) for file in files)
    if problem := _other_set(path, files, name):
        return ManifestReport(name, path, n_tensors, (problem,))
    sources = [Source.find(place) for place in _places(path, len(files))]
    pairs = list(zip(sources, files, strict=True))
    problems = [
        _size_problem(source, file) for source, file in pairs if source.n_bytes != file.n_bytes
    ]
    whole = [(source, file) for source, file in pairs if source.n_bytes == file.n_bytes]
    n_bytes = sum(file.n_bytes for _, file in whole)
    options.on_start("hashing", n_bytes)
    for source, file in whole:
        found = _hashes(source, file, options)
        problems += _problems(source, file, found, name)
    with opened(sources):
        pass  # what is not any more what was hashed is not verified
    seconds = time.perf_counter() - started
    return ManifestReport(name, path, n_tensors, tuple(problems), n_bytes, seconds)


def _places(fused: str, count: int) -> list[str]:
    """Where the files are: shards are found by name."""
    shard = ShardName.parse(fused)
    return [fused] if count == 1 or shard is None else [shard.name(n + 1) for n in range(count)]


def _other_set(fused: str, files: Sequence[FileHash], manifest: str) -> str | None:
    """Whether FUSED's name is of no set of so many shards as the manifest has; else None."""
    shard = ShardName.parse(fused)
    count = 1 if shard is None else shard.count
    if len(files) in (1, count):
        return None
    has = "one file" if shard is None else f"shard {shard.number} of {count}"
    return f"{fused}: is {has} by its name, but {manifest} is of {len(files)} shards"


def _size_problem(source: Source, file: FileHash) -> str:
    cut = (tensor for tensor in file.tensors if tensor.end > source.n_bytes)
    first = next(cut, None)
    lost = f"; tensor {first.name!r} and what follows it are not all there" if first else ""
    return f"{source.path}: has {source.n_bytes} bytes, expected {file.n_bytes}{lost}"


def _hashes(source: Source, file: FileHash, options: VerifyOptions) -> Hashes:
    """Of what lies there, each byte read once. Memory does not grow."""
    ranges = ((tensor.start, tensor.n_bytes) for tensor in file.tensors)
    whole = [Copy(source, 0, 0, source.n_bytes)]
    with opened([source]) as files, digesting(ranges) as digests:
        with contextlib.closing(read_in_order(files, whole, options.threads)) as blocks:
            for block, view in blocks:
                digests.take(view)
                options.on_progress(block.n_bytes)
        files[source].refuse_changed()
    return digests.hashes()


def _problems(source: Source, file: FileHash, found: Hashes, manifest: str) -> list[str]:
    is_whole = found.whole == file.sha256
    problems = [
        f"tensor {tensor.name!r} differs: SHA-256 {sha256}, expected {tensor.sha256} (bytes "
        f"{tensor.start} to {tensor.end - 1} of {source.path})"
        for tensor, sha256 in zip(file.tensors, found.ranges, strict=True)
        if sha256 != tensor.sha256
    ]
    n, n_tensors = len(problems), len(file.tensors)
    if are_most(n, n_tensors):
        return [f"{source.path}: another file: {n} of {n_tensors} tensors differ; {problems[0]}"]
    if not (is_whole or problems):
        problems.append(
            f"{source.path}: its {n_tensors} tensors agree, but the header, metadata or "
            f"padding differs: SHA-256 {found.whole}, expected {file.sha256}"
        )
    try:
        problems += _header_problems(header_of(source), file)
    except GGUFError as error:
        problems.append(f"its header cannot be read: {error}")
    if is_whole and problems:  # then it is the manifest that was changed
        says = f"{manifest}: contradicts itself: {source.path} has the SHA-256 that it gives, but "
        problems = [says + problem for problem in problems]
    return problems


def _header_problems(header: Header, file: FileHash) -> Iterator[str]:
    """What the manifest says of tensors that their own file does not."""
    told = {tensor.name: tensor for tensor in file.tensors}
    for tensor in header.tensors:
        expected = told.pop(tensor.name, None)
        if expected is None:
            yield f"tensor {tensor.name!r} is in {header.path}, but not in the manifest"
            continue
        facts = (
            ("type", type_name(tensor.type), expected.type),
            ("ne", list(tensor.ne), list(expected.ne)),
            ("start", tensor.data.start, expected.start),
        )
        for what, has, wanted in facts:
            if has != wanted:
                yield f"tensor {tensor.name!r}: {what} {has}, expected {wanted}"
        # Of an unknown type, padding counts as its data where a file is read.
        if not 0 <= tensor.n_bytes - expected.n_bytes < header.alignment:
            yield f"tensor {tensor.name!r}: {tensor.n_bytes} bytes, expected {expected.n_bytes}"
    yield from (f"tensor {name!r} is missing in {header.path}" for name in told)
