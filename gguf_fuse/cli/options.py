"""Every argument and option that several commands have, declared once for typer."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass
from typing import Annotated, Any

import typer
from typer import BadParameter

import gguf_fuse
from gguf_fuse.choices import OnMismatch, Reflink
from gguf_fuse.cli.answer import result_json
from gguf_fuse.cli.console import progress_bar
from gguf_fuse.cli.outcome import print_json
from gguf_fuse.cli.usage import OUTPUT, SHARDS, SPEED, WHAT, complete_path, option
from gguf_fuse.machine import COPY_THREADS
from gguf_fuse.planning.fusions import EXPERTS, GATE_UP, QKV, SSM_IN, Fusion
from gguf_fuse.planning.plan import NothingToDo
from gguf_fuse.progress import ignore


def existing_file(metavar: str, words: str) -> Any:
    """An argument; whether the file can be read is found out, and told, when it is opened."""
    return typer.Argument(metavar=metavar, help=words, readable=False, autocompletion=complete_path)


In = Annotated[str, existing_file("IN", "The GGUF file to read; of shards, any one of them.")]
_OUT = """The GGUF file to write; - writes to a pipe. OUT-00001-of-0000N.gguf keeps the N shards
that IN has; any other name merges them."""
Out = Annotated[str, existing_file("OUT", _OUT)]
OutOrBeside = Annotated[
    str | None, existing_file("OUT", f"{_OUT} If it is left out: IN-fused.gguf beside IN.")
]
AsJson = Annotated[bool, option("--json", part=OUTPUT, help="Print one JSON object on stdout.")]
DryRun = Annotated[
    bool, option("--dry-run", part=WHAT, help="Say what would be done, write nothing.")
]
AnyArchitecture = Annotated[
    bool,
    option("--any-architecture", part=WHAT, help="Even where llama.cpp would not load the result."),
]
Quiet = Annotated[bool, option("-q", "--quiet", part=OUTPUT, help="No table, no progress bar.")]
ComputeThreads = Annotated[
    int,
    option(
        "--threads", part=SPEED, min=1, max=256, metavar="N", help="Threads (default: up to 4)."
    ),
]
CopyThreads = Annotated[
    int,
    option(
        "--threads", part=SPEED, min=1, max=64, metavar="N", help="Threads that copy (default: 2)."
    ),
]


@dataclass(frozen=True)
class Fusing:
    """What becomes one tensor, and what is left: what fuse and batch have in common."""

    fuse_qkv_weights: Annotated[
        bool, option(QKV.flag, part=WHAT, help="Q, K and V into attn_qkv; so does no flag.")
    ] = False
    fuse_gate_up_exps: Annotated[
        bool, option(GATE_UP.flag, part=WHAT, help="Gate and up of experts into ffn_gate_up_exps.")
    ] = False
    stack_experts: Annotated[
        bool, option(EXPERTS.flag, part=WHAT, help="Experts one by one (old Mixtral) into stacks.")
    ] = False
    split_ssm_in: Annotated[
        bool,
        option(SSM_IN.flag, part=WHAT, help="qwen3next's old ssm_in into attn_qkv and attn_gate."),
    ] = False
    on_mismatch: Annotated[
        OnMismatch,
        option(
            "--on-mismatch",
            part=WHAT,
            metavar="skip|error",
            help="A layer whose parts cannot be one tensor: leave it (skip), or fail.",
        ),
    ] = "skip"
    any_architecture: AnyArchitecture = False

    @property
    def fusions(self) -> tuple[Fusion, ...]:
        """Q, K and V where nothing is named."""
        named = (
            (QKV, self.fuse_qkv_weights),
            (GATE_UP, self.fuse_gate_up_exps),
            (EXPERTS, self.stack_experts),
            (SSM_IN, self.split_ssm_in),
        )
        return tuple(fusion for fusion, chosen in named if chosen) or (QKV,)


@dataclass(frozen=True)
class Outputs:
    """How new files are written, one or many: what batch has in common with fuse and unfuse."""

    reflink: Annotated[
        Reflink,
        option(
            "--reflink",
            part=SPEED,
            metavar="auto|always|never",
            help="Share blocks with IN: where the file system can (auto), or fail.",
        ),
    ] = "auto"
    sync: Annotated[
        bool,
        option(
            "--sync/--no-sync",
            part=SPEED,
            help="Wait until what is written is on the disk, not only in its cache; or do not.",
        ),
    ] = True
    resume: Annotated[
        bool,
        option(
            "--resume/--no-resume",
            part=OUTPUT,
            help="Of an IN that is fetched: go on where it was broken off; or begin anew.",
        ),
    ] = True
    split_max_size: Annotated[
        str | None,
        option(
            "--split-max-size",
            part=SHARDS,
            metavar="N[K|M|G]",
            help="Cut what is written into shards, each with so many bytes of tensors at most (K, "
            "M, G: powers of 1000), as llama-gguf-split does: its name, less .gguf, comes before "
            "-00001-of-0000N.gguf.",
        ),
    ] = None
    split_max_tensors: Annotated[
        int | None,
        option(
            "--split-max-tensors",
            part=SHARDS,
            min=1,
            metavar="N",
            help="Cut what is written into shards of N tensors.",
        ),
    ] = None

    def shard_bytes(self) -> int | None:
        """What --split-max-size says. Raises BadParameter for what cannot be."""
        from gguf_fuse.writing.cut import parse_size

        size = self.split_max_size
        if size is not None and self.split_max_tensors is not None:
            raise BadParameter("give --split-max-size or --split-max-tensors, not both")
        try:
            return None if size is None else parse_size(size)
        except ValueError as error:
            raise BadParameter(str(error), param_hint="--split-max-size") from error


@dataclass(frozen=True)
class Writing(Outputs):
    """How OUT is written: what fuse and unfuse have in common."""

    force: Annotated[
        bool, option("-f", "--force", part=OUTPUT, help="Replace an existing OUT.")
    ] = False
    quiet: Quiet = False
    threads: CopyThreads = COPY_THREADS
    manifest: Annotated[
        str | None,
        option(
            "--manifest",
            part=OUTPUT,
            metavar="FILE",
            help="Also write the SHA-256 of OUT and of each tensor in it, as JSON, for verify; and "
            "of OUT alone to FILE, less its .json, plus .sha256, for sha256sum -c. Made beside the "
            "copying; of shared blocks, all of OUT is read for it.",
            autocompletion=complete_path,
        ),
    ] = None

    # What is there by now: whatever then keeps the report from being printed is to say so.
    published: list[str] = field(init=False, default_factory=list)

    def carry_out(
        self,
        rewrite: Callable[..., gguf_fuse.Result],
        output: str,
        done: str,
        *,
        dry_run: bool,
        as_json: bool,
        on_start: Callable[[], None] = ignore,
    ) -> gguf_fuse.Result:
        """Call `rewrite`, with a progress bar; done: "fused" or "split".

        Where nothing is to be done, `--json` gets its object all the same. Raises what `rewrite`
        raises, and BadParameter.
        """
        self._refuse_stream(output, dry_run, as_json)
        max_size = self.shard_bytes()
        with progress_bar(self.quiet, of_bytes=True) as bar:

            def start(n_bytes: int) -> None:
                on_start()
                bar.start("writing", n_bytes)

            options = gguf_fuse.Options(
                dry_run,
                self.force,
                self.sync,
                self.threads,
                self.reflink,
                on_start=start,
                on_progress=bar.advance,
                on_flush=functools.partial(bar.update, description="waiting for the disk"),
                split_max_size=max_size,
                split_max_tensors=self.split_max_tensors,
                manifest=self.manifest,
                resume=self.resume,
                on_resume=bar.say,
            )
            try:
                result = rewrite(options=options)
            except NothingToDo as nothing:
                if as_json:
                    print_json(result_json(nothing.header, nothing.layers, None, done))
                raise
        if not dry_run:
            there = "all of it was written to standard output"
            self.published.append(f"{output} is there and whole" if result.files else there)
        if as_json:
            answer = result_json(result.source, result.plan.skipped, result, done)
            print_json(answer | ({"manifest": self.manifest} if self.manifest else {}))
        return result

    def _refuse_stream(self, output: str, dry_run: bool, as_json: bool) -> None:
        """Raises BadParameter where OUT is -, and that cannot be."""
        if output != "-":
            return
        if as_json:
            raise BadParameter("--json and OUT - both want standard output")
        if not dry_run and sys.__stdout__ is None:
            raise BadParameter("OUT is -, but standard output is closed")
        if not dry_run and sys.stdout.isatty():
            raise BadParameter("OUT is -, but standard output is a terminal; pipe it somewhere")
        if (self.split_max_size, self.split_max_tensors) != (None, None):
            raise BadParameter("OUT is -, which cannot be cut into shards")


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Show typer, in place of each parameter that is of a dataclass, the fields of it."""
    signature = inspect.signature(command, eval_str=True)
    shown: list[inspect.Parameter] = []
    fields: dict[str, list[str]] = {}
    for name, parameter in signature.parameters.items():
        group = parameter.annotation
        if not (isinstance(group, type) and is_dataclass(group)):
            shown.append(parameter)
            continue
        own = inspect.signature(group, eval_str=True).parameters
        fields[name] = list(own)
        shown += [field.replace(kind=inspect.Parameter.KEYWORD_ONLY) for field in own.values()]

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        for name, own in fields.items():
            group = signature.parameters[name].annotation
            kwargs[name] = group(**{field: kwargs.pop(field) for field in own if field in kwargs})
        command(*args, **kwargs)

    run.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return run


def writing(command: Callable[..., None]) -> Callable[..., None]:
    """`grouped`, of a command with a `how: Writing`; what it has published, failures tell."""

    @functools.wraps(command)
    def told(*args: Any, how: Writing, **kwargs: Any) -> None:
        try:
            command(*args, how=how, **kwargs)
            sys.stdout.flush()
        except OSError as error:
            error.strerror = "; ".join([str(error.strerror), *how.published])
            raise
        except KeyboardInterrupt as stop:
            stop.args = stop.args or tuple(how.published)
            raise

    return grouped(told)
