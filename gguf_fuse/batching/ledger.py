"""The ledger of a batch, its memory: a file of JSON lines in its output folder, only ever added to.

One line says that work on a file begins (only where nothing was there that is not ours), a later
one what became of it; of a manifest's files, that of their output does. What began and did not end
was broken off: it may be replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gguf_fuse.batching.task import Entry, Task, manifest_files
from gguf_fuse.format.source import GGUFError
from gguf_fuse.writing.lines import Lines, open_lines, whole_lines

NAME = "gguf-fuse-batch.jsonl"


class Ledger:
    """entries: by output, the last one. begun: files the last work on which did not end.

    written: by output, the last entry that has files, and its manifest's last ones.
    """

    def __init__(self, path: Path, file: Lines | None) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.written: dict[str, Entry] = {}
        self.begun: set[str] = set()
        self._file = file

    def begin(self, task: Task) -> None:
        """Raises GGUFError if it cannot be written, as `add` does."""
        for name in (task.output, *manifest_files(task.output, task.settings)):
            self.begun.add(name)
            self._append({"begun": name})

    def add(self, entry: Entry) -> None:
        self._take(entry.as_dict())
        self._append(entry.as_dict())

    def _take(self, line: dict[str, Any]) -> None:
        if "begun" in line:
            self.begun.add(line["begun"])
            return
        entry = Entry.of(line)
        self.entries[entry.output] = entry
        if entry.outputs:
            before = self.written.get(entry.output, entry)
            manifest = entry.manifest or before.manifest
            self.written[entry.output] = dataclasses.replace(entry, manifest=manifest)
        if not entry.broken_off:
            self.begun -= {entry.output, *manifest_files(entry.output, entry.settings)}

    def _append(self, line: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.add(line)
            self._file.flush()
        except OSError as error:
            raise GGUFError(f"{self.path}: {error.strerror}; the batch cannot go on") from error


@contextlib.contextmanager
def opened(folder: Path, *, dry_run: bool = False) -> Iterator[Ledger]:
    """The ledger of the folder, which is made if it is not there; on a dry run, only read.

    Raises GGUFError where it cannot be read or written, holds a line that is none of its own, or
    is another batch's at this moment. A last line that was cut off is removed.
    """
    path = folder / NAME
    busy = f"{path}: another batch is at work here; wait for it"
    try:
        if dry_run:
            text = path.read_bytes() if path.exists() else b""
        else:
            folder.mkdir(parents=True, exist_ok=True)
            file = open_lines(path, busy, 0o666)
    except OSError as error:
        raise GGUFError(f"{path}: {error.strerror}") from error
    if dry_run:
        yield _filled(Ledger(path, None), whole_lines(text))
        return
    with contextlib.closing(file):
        ledger = _filled(Ledger(path, file), file.found)
        file.mend()
        yield ledger


def _filled(ledger: Ledger, found: Sequence[bytes]) -> Ledger:
    for number, line in enumerate(found, 1):
        try:
            ledger._take(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise GGUFError(
                f"{ledger.path}: line {number} is none of a ledger: {line[:40]!r}; move the "
                "file away to begin anew"
            ) from error
    return ledger
