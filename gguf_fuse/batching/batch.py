"""Inputs and ledger -> what is to be done; the rest is skipped."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf_fuse import __version__
from gguf_fuse.batching.inputs import Found
from gguf_fuse.batching.ledger import Ledger
from gguf_fuse.batching.task import Entry, Settings, Task, carry_out, manifest_files
from gguf_fuse.format.shards import ShardName

# Calls the first as work on a task begins, the second as it ends.
Execute = Callable[[Iterator[Task], Callable[[Task], None], Callable[[Task, Entry], None]], None]


@dataclass(frozen=True)
class Batch:
    """tasks: to be done. unchanged: what the ledger says of those that need not be."""

    tasks: tuple[Task, ...]
    unchanged: tuple[Entry, ...]


def survey(found: Sequence[Found], settings: Settings, ledger: Ledger, *, force: bool) -> Batch:
    """What was done and is unchanged, input, output and settings, is not done again.

    Failures are tried again, and what could not be fused by another version of the tool.
    """
    tasks: list[Task] = []
    unchanged: list[Entry] = []
    for one in found:
        entry = ledger.entries.get(one.output)
        if entry is not None and not force and _still_holds(entry, one, settings):
            unchanged.append(entry)
        else:
            replace = force or _is_ours(one.output, settings, ledger)
            tasks.append(Task(one.input, one.output, settings, replace))
    return Batch(tuple(tasks), tuple(unchanged))


def _still_holds(entry: Entry, one: Found, settings: Settings) -> bool:
    if entry.result == "failed" or entry.input != one.input or not entry.inputs:
        return False
    if entry.result != "fused" and entry.version != __version__:
        return False
    wanted = _decides(settings)
    if _decides(entry.settings) not in (wanted, dataclasses.replace(wanted, manifest=True)):
        return False
    manifest = entry.manifest if settings.manifest else ()
    return all(file.is_there() for file in (*entry.inputs, *entry.outputs, *manifest))


def _decides(settings: Settings) -> Settings:
    """Those that change what is written or how sure it is; not how fast."""
    return dataclasses.replace(settings, threads=1, sync=True, reflink="auto", resume=True)


def _is_ours(output: str, settings: Settings, ledger: Ledger) -> bool:
    """Whether what is there is what this batch wrote, wholly or until it was broken off."""
    ours = set(ledger.begun)
    if entry := ledger.written.get(output):
        ours.update(file.path for file in entry.manifest if file.is_there())
        ours.update([output] if all(file.is_there() for file in entry.outputs) else [])
    manifest = {name for name in manifest_files(output, settings) if Path(name).exists()}
    if output in ours or (manifest and not _is_there(output, settings)):
        return manifest <= ours
    return False


def run(batch: Batch, ledger: Ledger, execute: Execute, on_entry: Callable[[Entry], None]) -> None:
    """Carry out the tasks; every step is in the ledger before the next one.

    on_entry: called with each entry once it is recorded; may raise, to end the batch. Raises what
    it raises, GGUFError where the ledger cannot be written, and what `execute` raises.
    """

    def begin(task: Task) -> None:
        manifest = map(Path, manifest_files(task.output, task.settings))
        is_there = _is_there(task.output, task.settings) or any(map(Path.exists, manifest))
        if task.replace or not is_there:
            ledger.begin(task)

    def done(task: Task, entry: Entry) -> None:
        ledger.add(entry)
        on_entry(entry)

    execute(iter(batch.tasks), begin, done)


def _is_there(path: str, settings: Settings) -> bool:
    """Whether an output, or the first shard of one, has its name already."""
    output = Path(path)
    if output.exists():
        return True
    if (settings.split_max_size, settings.split_max_tensors) == (None, None):
        return False
    name = ShardName.parse(output.name)
    prefix = output.name.removesuffix(".gguf") if name is None else name.prefix
    return any(
        shard.prefix == prefix
        for path in output.parent.glob("*.gguf")
        if (shard := ShardName.parse(path.name)) is not None
    )


def foresee(tasks: Iterable[Task]) -> list[Entry]:
    """What would become of each, and how large it would be; nothing is written."""
    return [carry_out(task, dry_run=True) for task in tasks]


def missing_bytes(entries: Iterable[Entry], folder: Path) -> int:
    """How much the disk of the folder lacks for all of them; 0 where it suffices."""
    needed = sum(file.bytes for entry in entries for file in entry.outputs)
    while not folder.exists():
        folder = folder.parent
    return max(0, needed - shutil.disk_usage(folder).free)


def exit_code(entries: Sequence[Entry]) -> int:
    """1 if any failed, 3 if nothing could be fused at all, 0 otherwise."""
    results = Counter(entry.result for entry in entries)
    if results["failed"]:
        return 1
    return 0 if results["fused"] else 3
