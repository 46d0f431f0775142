"""The manifest of new files: SHA-256 of each, and of every tensor in it, as JSON.

    {
      "format": 1,
      "program": "gguf-fuse 0.1.0",
      "sources": [
        {"path": "in.gguf", "bytes": 10292320}
      ],
      "files": [
        {"name": "out.gguf", "bytes": 10292224, "sha256": "...", "tensors": [
          {"name": "output.weight", "type": "Q6_K", "ne": [512, 1000], "start": 98304,
           "bytes": 420000, "sha256": "..."}
        ]}
      ]
    }

A source that was fetched has `address`, `etag`, `revision` and `sha256` in place of `path`, the
last two where its host tells them. Names of files count from the manifest's own folder; "-" is what
went to standard output. `start` counts from the start of the file. Readers ignore keys they do not
know; `format` grows whenever one of these changes its meaning.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from gguf_fuse import __version__
from gguf_fuse.format.header import MAX_TENSORS
from gguf_fuse.format.shards import MAX_SHARDS
from gguf_fuse.format.source import AnyPath, GGUFError, Source

FORMAT = 1
MOST_BYTES = 32 << 20  # MAX_TENSORS take a third of it

_WORDS = {"dict": "an object", "list": "a list", "str": "a text"}
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class TensorHash:
    """type: its name. ne: in file order. start: from the start of the file."""

    name: str
    type: str
    ne: tuple[int, ...]
    start: int
    n_bytes: int
    sha256: str

    @property
    def end(self) -> int:
        return self.start + self.n_bytes


@dataclass(frozen=True, slots=True)
class FileHash:
    """tensors: as they lie in the file."""

    name: str
    n_bytes: int
    sha256: str
    tensors: tuple[TensorHash, ...]


def encode(sources: Iterable[Source], files: Iterable[FileHash]) -> bytes:
    """A line for each tensor, so that two manifests can be compared by diff."""
    told = ",\n    ".join(_line(_source(source)) for source in sources)
    listed = ",\n    ".join(map(_file, files))
    return (
        f'{{\n  "format": {FORMAT},\n  "program": "gguf-fuse {__version__}",\n'
        f'  "sources": [\n    {told}\n  ],\n  "files": [\n    {listed}\n  ]\n}}\n'
    ).encode()


def encode_sums(files: Iterable[FileHash]) -> bytes:
    """The same of whole files, as `sha256sum` writes and `sha256sum -c` reads it."""
    return b"".join(_sum(file) for file in files)


def _sum(file: FileHash) -> bytes:
    name = os.fsencode(file.name)
    escaped = name.replace(b"\\", rb"\\").replace(b"\n", rb"\n").replace(b"\r", rb"\r")
    mark = b"" if escaped == name else b"\\"  # how a line begins whose name is escaped
    return b"%s%s  %s\n" % (mark, file.sha256.encode(), escaped)


def _source(source: Source) -> dict[str, Any]:
    place = source.place
    if place is None:
        return {"path": source.path, "bytes": source.n_bytes}
    told = {"etag": place.version, "revision": place.revision, "sha256": place.sha256}
    return {"address": place.address, "bytes": place.n_bytes} | {
        key: value for key, value in told.items() if value is not None
    }


def _file(file: FileHash) -> str:
    facts = {"name": file.name, "bytes": file.n_bytes, "sha256": file.sha256}
    tensors = (
        {
            "name": tensor.name,
            "type": tensor.type,
            "ne": list(tensor.ne),
            "start": tensor.start,
            "bytes": tensor.n_bytes,
            "sha256": tensor.sha256,
        }
        for tensor in file.tensors
    )
    lines = ",\n      ".join(map(_line, tensors))
    return f'{_line(facts)[:-1]}, "tensors": [\n      {lines}\n    ]}}'


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value)


def read_manifest(path: AnyPath) -> tuple[FileHash, ...]:
    """What a manifest says of its files. Raises GGUFError where it cannot be read, or is none."""
    name = os.fspath(path)
    try:
        with Path(path).open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise GGUFError(f"{name}: {error.strerror}") from error
    except ValueError as error:  # a zero byte in the name
        raise GGUFError(f"{name}: {error}") from error
    try:
        if len(data) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        return _files(_parsed(data))
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise GGUFError(f"{name}: no manifest of gguf-fuse: {why}") from error


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise ValueError("it is not JSON") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return found


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _files(found: Any) -> tuple[FileHash, ...]:
    number = _of(dict, found, "it").get("format")
    if type(number) is not int or number != FORMAT:
        raise ValueError(f"format is {number!r}, this program reads {FORMAT}")
    files = tuple(map(_read_file, _list(found, "files", MAX_SHARDS, "it")))
    if not files:
        raise ValueError("it names no file")
    _refuse_twice([file.name for file in files], "file")
    tensors = [tensor.name for file in files for tensor in file.tensors]
    _refuse_twice(tensors, "tensor")
    return files


def _read_file(found: Any) -> FileHash:
    name = _text(found, "name", "a file")
    place = f"file {name!r}"
    listed = _list(found, "tensors", MAX_TENSORS, place)
    tensors = sorted((_read_tensor(one) for one in listed), key=lambda tensor: tensor.start)
    file = FileHash(name, _count(found, "bytes", place), _hash(found, place), tuple(tensors))
    for before, after in pairwise(tensors):
        if before.end > after.start:
            raise ValueError(f"tensors {before.name!r} and {after.name!r} overlap")
    if tensors and tensors[-1].end > file.n_bytes:
        raise ValueError(f"tensor {tensors[-1].name!r} ends behind {place}")
    return file


def _read_tensor(found: Any) -> TensorHash:
    name = _text(found, "name", "a tensor")
    place = f"tensor {name!r}"
    ne = _list(found, "ne", 8, place)
    return TensorHash(
        name,
        _text(found, "type", place),
        tuple(_whole(n, f"ne of {place}") for n in ne),
        _count(found, "start", place),
        _count(found, "bytes", place),
        _hash(found, place),
    )


def _refuse_twice(names: Sequence[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{what} {name!r} occurs twice")
        seen.add(name)


def _of(kind: type, value: Any, place: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{place} is not {_WORDS[kind.__name__]}")
    return value


def _get(found: Any, key: str, place: str) -> Any:
    if key not in _of(dict, found, place):
        raise ValueError(f"{place} has no {key!r}")
    return found[key]


def _text(found: Any, key: str, place: str) -> str:
    return str(_of(str, _get(found, key, place), f"{key} of {place}"))


def _list(found: Any, key: str, most: int, place: str) -> list[Any]:
    value: list[Any] = _of(list, _get(found, key, place), f"{key} of {place}")
    if len(value) > most:
        raise ValueError(f"{key} of {place} has {len(value)} entries, more than {most}")
    return value


def _count(found: Any, key: str, place: str) -> int:
    return _whole(_get(found, key, place), f"{key} of {place}")


def _whole(value: Any, place: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{place} is {value!r:.40}, not a whole number")
    return value


def _hash(found: Any, place: str) -> str:
    value = _text(found, "sha256", place)
    if not _SHA256.fullmatch(value):
        raise ValueError(f"sha256 of {place} is {value!r:.80}, not 64 hexadecimal digits")
    return value
