"""The command batch: many files, on this machine or on a Dask cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from gguf_fuse.choices import Verified
from gguf_fuse.cli.console import printer, text
from gguf_fuse.cli.options import AsJson, DryRun, Fusing, Outputs, Quiet, existing_file, grouped
from gguf_fuse.cli.outcome import EXIT_ERROR, fail, print_json
from gguf_fuse.cli.usage import OUTPUT, SPEED, WHAT, option
from gguf_fuse.format.source import GGUFError
from gguf_fuse.planning.loaders import TRIED, architecture

if TYPE_CHECKING:
    from gguf_fuse.batching.batch import Execute
    from gguf_fuse.batching.inputs import Found
    from gguf_fuse.batching.local import OnBytes
    from gguf_fuse.batching.task import Entry, Task


@grouped
def batch(
    inputs: Annotated[
        list[str] | None,
        existing_file("IN...", "Files, folders, globs, addresses, hf:OWNER/REPO."),
    ] = None,
    out: Annotated[
        Path, option("--out", part=WHAT, metavar="DIR", help="The folder for all outputs.")
    ] = ...,  # type: ignore[assignment]
    listed: Annotated[
        str | None,
        option("--from", part=WHAT, metavar="FILE", help="One input a line; - is standard input."),
    ] = None,
    name: Annotated[
        str,
        option("--name", part=OUTPUT, metavar="NAME", help="How outputs are called, less .gguf."),
    ] = "{name}-fused",
    *,
    what: Fusing,
    verify: Annotated[
        Verified,
        option(
            "--verify",
            part=WHAT,
            metavar="none|structure|numbers",
            help="What is verified of each file.",
        ),
    ] = "structure",
    force: Annotated[
        bool,
        option("-f", "--force", part=OUTPUT, help="Do all again, replacing what is there."),
    ] = False,
    jobs: Annotated[
        int | None,
        option(
            "--jobs",
            part=SPEED,
            min=1,
            max=256,
            metavar="N",
            help="Files at once (default: by cores and memory).",
        ),
    ] = None,
    dask: Annotated[
        str | None,
        option(
            "--dask",
            part=SPEED,
            metavar="ADDRESS",
            help="Work on a Dask cluster: tcp://host:8786, or local.",
        ),
    ] = None,
    fail_fast: Annotated[
        bool, option("--fail-fast", part=WHAT, help="End at the first failure.")
    ] = False,
    dry_run: DryRun = False,
    markdown: Annotated[
        bool,
        option("--markdown", part=OUTPUT, help="Print the table of DIR's files for a model card."),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    how: Outputs,
    manifest: Annotated[
        bool,
        option(
            "--manifest",
            part=OUTPUT,
            help="Also write beside each output NAME.gguf the SHA-256 of it and of each tensor in "
            "it, to NAME.json for verify --manifest; and to NAME.sha256 for sha256sum -c.",
        ),
    ] = False,
) -> None:
    """Fuse many files into DIR; run it again, and only what is new or failed is done.

    What was done is in DIR/gguf-fuse-batch.jsonl. One bad file does not stop the others.
    """
    from gguf_fuse.batching import batch as batches
    from gguf_fuse.batching import ledger
    from gguf_fuse.batching.task import Settings

    settings = Settings(
        fused=tuple(fusion.fused for fusion in what.fusions),
        on_mismatch=what.on_mismatch,
        any_architecture=what.any_architecture,
        verify=verify,
        split_max_size=how.shard_bytes(),
        split_max_tensors=how.split_max_tensors,
        reflink=how.reflink,
        sync=how.sync,
        resume=how.resume,
        manifest=manifest,
    )
    if markdown and as_json:
        raise typer.BadParameter("give --markdown or --json, not both")
    if markdown and not out.is_dir() and not (inputs or listed):
        raise GGUFError(f"{out}: no such folder, so no batch to tell of")
    found = _found([*(inputs or ()), *_listed(listed)], out, name)
    if not found and not markdown:
        raise typer.BadParameter("there is no *.gguf file: give files, folders or --from FILE")
    shown = _Shown(quiet=quiet or as_json or markdown, fail_fast=fail_fast)
    with ledger.opened(out, dry_run=dry_run or not found) as memory:
        work = batches.survey(found, settings, memory, force=force)
        if dry_run:
            _foresee(work, out, as_json)
            return
        with shown.progress(len(work.tasks)) as on_bytes:
            execute = _execute(dask, jobs, len(work.tasks), on_bytes)
            with contextlib.suppress(_FirstFailure):
                batches.run(work, memory, execute, shown.entry)
        entries = [*work.unchanged, *shown.entries]
        if markdown:
            print("\n".join(_markdown(list(memory.entries.values()), out)))
        elif as_json:
            print_json(_json(out, work.unchanged, shown.entries))
        elif not quiet:
            print(_summary(work, shown.entries, out))
    code = batches.exit_code(entries) if found else 0
    if code == EXIT_ERROR:
        n_failed = sum(entry.result == "failed" for entry in entries)
        fail(f"{n_failed} of {len(found)} files failed", code)
    if code:
        raise typer.Exit(code)


def _listed(source: str | None) -> list[str]:
    """The inputs of --from. Raises GGUFError where it cannot be read."""
    if source is None:
        return []
    try:
        lines = sys.stdin if source == "-" else Path(source).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GGUFError(f"{source}: {getattr(error, 'strerror', None) or error}") from error
    return [line.strip() for line in lines if line.strip()]


def _found(inputs: Sequence[str], out: Path, name: str) -> list[Found]:
    """Raises BadParameter for a --name that is none, GGUFError as `inputs.find` does."""
    from gguf_fuse.batching.inputs import find

    try:
        return find(inputs, out, name)
    except ValueError as error:
        raise typer.BadParameter(f"{name} is not {error}", param_hint="--name") from error


def _execute(dask: str | None, jobs: int | None, n_tasks: int, on_bytes: OnBytes) -> Execute:
    """On this machine, or on the cluster that --dask names."""
    from gguf_fuse.batching import local

    jobs = jobs or local.default_jobs()
    if dask is None:
        return functools.partial(local.execute, min(jobs, max(1, n_tasks)), on_bytes)
    from gguf_fuse.batching import cluster

    return functools.partial(cluster.execute, dask, jobs)


class _FirstFailure(Exception):
    """--fail-fast."""


@dataclasses.dataclass
class _Shown:
    """What a person sees while it goes on; and every entry, in the order in which they end."""

    quiet: bool
    fail_fast: bool
    entries: list[Entry] = dataclasses.field(default_factory=list)
    bars: Any = None
    on_end: Callable[[Entry], None] = lambda entry: None

    def entry(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.on_end(entry)
        if not self.quiet:
            self._print(entry)
        if self.fail_fast and entry.result == "failed":
            raise _FirstFailure

    def _print(self, entry: Entry) -> None:
        """Above the bars, where they are on the same screen."""
        same = self.bars is not None and sys.stdout.isatty()
        out = self.bars.console if same else printer()
        out.print(_line(entry), soft_wrap=True, highlight=False)

    @contextlib.contextmanager
    def progress(self, n_tasks: int) -> Iterator[OnBytes]:
        """A bar of all files and one of each that is at work, on stderr, if that is a terminal."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda task, n_bytes, total: None
            return
        from rich import progress as rich

        columns = [
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.TaskProgressColumn(),
        ]
        with rich.Progress(*columns, console=printer(stderr=True), transient=True) as bars:
            whole = bars.add_task(f"{n_tasks} file{'s' if n_tasks > 1 else ''}", total=n_tasks)
            by_output: dict[str, Any] = {}

            def on_bytes(task: Task, n_bytes: int, total: int | None) -> None:
                if task.output not in by_output:
                    by_output[task.output] = bars.add_task(Path(task.output).name)
                bars.update(by_output[task.output], completed=n_bytes, total=total)

            def on_end(entry: Entry) -> None:
                bars.advance(whole)
                if entry.output in by_output:
                    bars.remove_task(by_output.pop(entry.output))

            self.on_end, self.bars = on_end, bars
            try:
                yield on_bytes
            finally:
                self.bars = None


def _line(entry: Entry) -> Any:
    if entry.result != "fused":
        style = "red" if entry.result == "failed" else "yellow"
        return text(_reason(entry), style)
    n_bytes = sum(file.bytes for file in entry.outputs)
    verified = "" if entry.settings.verify == "none" else ", verified"
    return text(
        f"fused {entry.fused} of {entry.layers} layers{verified}: {Path(entry.output).name}, "
        f"{decimal(n_bytes)} in {entry.seconds:.1f} s"
    )


def _reason(entry: Entry) -> str:
    """Why it was not fused."""
    line = entry.line or ""
    return line if entry.result in line else f"{entry.result}: {line}"


def _summary(work: Any, entries: Sequence[Entry], out: Path) -> str:
    counts = Counter(entry.result for entry in entries)
    parts = [f"{n} {result}" for result, n in counts.most_common()]
    if work.unchanged:
        parts.append(f"{len(work.unchanged)} done before and unchanged")
    if left := len(work.tasks) - len(entries):
        parts.append(f"{left} not begun")
    return f"{'; '.join(parts)}. {out / 'gguf-fuse-batch.jsonl'} has the details."


def _json(out: Path, unchanged: Sequence[Entry], entries: Sequence[Entry]) -> dict[str, Any]:
    return {
        "output": str(out),
        "counts": dict(Counter(entry.result for entry in (*unchanged, *entries))),
        "unchanged": [entry.as_dict() for entry in unchanged],
        "files": [entry.as_dict() for entry in entries],
    }


def _foresee(work: Any, out: Path, as_json: bool) -> None:
    """--dry-run: what would be done, and whether the disk suffices for it."""
    from gguf_fuse.batching import batch as batches

    entries = batches.foresee(work.tasks)
    missing = batches.missing_bytes(entries, out)
    n_bytes = sum(file.bytes for entry in entries for file in entry.outputs)
    if as_json:
        print_json({**_json(out, work.unchanged, entries), "bytes": n_bytes, "missing": missing})
        return
    for entry in entries:
        size = decimal(sum(file.bytes for file in entry.outputs))
        line = f"would be fused, {entry.fused} of {entry.layers} layers: {entry.output}, {size}"
        print(line if entry.result == "fused" else _reason(entry))
    n_files = sum(entry.result == "fused" for entry in entries)
    n_done = len(work.unchanged)
    print(f"{n_files} to be fused, {decimal(n_bytes)}; {n_done} done and unchanged")
    if missing:
        raise GGUFError(f"{out}: the disk lacks {missing} bytes for all of them")
    if n_files:
        print("the disk has room for all of them")


def _markdown(entries: Sequence[Entry], out: Path) -> Iterator[str]:
    """For a model card: the files, and who reads them."""
    yield "| file | size | fused layers | SHA-256 |"
    yield "| --- | --- | --- | --- |"
    made = [entry for entry in entries if entry.result == "fused"]
    for entry in sorted(made, key=lambda entry: entry.output):
        for file in entry.outputs:
            name = os.path.relpath(file.path, out.resolve())
            counts = f"{entry.fused} of {entry.layers}"
            yield f"| {name} | {decimal(file.bytes)} | {counts} | `{file.sha256}` |"
    yield ""
    since = [architecture(entry.architecture or "").qkv.since for entry in made]
    builds = [build for build in since if build]
    when = f"since build {max(builds)}" if builds and all(since) else f"of {TRIED}"
    yield (
        "Q, K and V of these layers are one tensor, bit for bit as they were: read by llama.cpp "
        f"{when}; `gguf-fuse unfuse` gives back the separate files."
    )
