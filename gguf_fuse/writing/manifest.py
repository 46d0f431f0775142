"""New files and their hashes -> the manifest, and the file beside it that `sha256sum -c` reads.

The format is that of `format.manifest`. No line of JSON is one of `sha256sum`: so there are two.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from gguf_fuse.format.manifest import FileHash, TensorHash, encode, encode_sums
from gguf_fuse.format.source import AnyPath, GGUFError, Source, is_address
from gguf_fuse.format.types import type_name
from gguf_fuse.writing.hashing import Hashes, Range
from gguf_fuse.writing.place import Placement

STANDARD_OUTPUT = "-"


def manifest_paths(manifest: AnyPath) -> tuple[Path, Path]:
    """Of the JSON, and of the sums: called alike, .sha256 in place of .json.

    Raises GGUFError for what is no name of a file.
    """
    name = os.fspath(manifest)
    if is_address(name) or name == STANDARD_OUTPUT or not name or name.endswith(os.sep):
        raise GGUFError(f"{name!r}: a manifest is a file on this machine; give its name")
    return Path(name), Path(f"{name.removesuffix('.json')}.sha256")


def ranges(placement: Placement) -> Iterator[Range]:
    """Where the tensors of a new file lie."""
    return ((start, tensor.n_bytes) for tensor, start in placement.tensors)


def contents(
    manifest: Path,
    read: Sequence[Source],
    written: Sequence[tuple[Path, Placement]],
    hashes: Sequence[Hashes],
) -> tuple[bytes, bytes]:
    """What the two files say. read: the sources; written: in the order of `hashes`."""
    files = [
        _file(_name(path, manifest), placement, found)
        for (path, placement), found in zip(written, hashes, strict=True)
    ]
    return encode(read, files), encode_sums(files)


def _file(name: str, placement: Placement, hashes: Hashes) -> FileHash:
    tensors = (
        TensorHash(tensor.name, type_name(tensor.type), tensor.ne, start, tensor.n_bytes, sha256)
        for (tensor, start), sha256 in zip(placement.tensors, hashes.ranges, strict=True)
    )
    return FileHash(name, placement.n_bytes, hashes.whole, tuple(tensors))


def _name(path: Path, manifest: Path) -> str:
    """From the manifest's own folder on, so that both can be moved together."""
    if str(path) == STANDARD_OUTPUT:
        return STANDARD_OUTPUT
    folder = os.path.realpath(manifest.parent)
    whole = os.path.join(os.path.realpath(path.parent), path.name)  # noqa: PTH118 (as relpath)
    try:
        return os.path.relpath(whole, folder)
    except ValueError:  # another drive of Windows
        return whole
