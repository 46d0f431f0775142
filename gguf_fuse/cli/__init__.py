"""The command line: parses, calls one function, renders. The only module that prints.

Heavy imports stand inside the commands: `--help` needs none of them.
"""

from __future__ import annotations

import functools
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional, ParamSpec

import typer
from rich.console import Console
from rich.markup import escape

from gguf_fuse import __version__
from gguf_fuse.planning.fusions import GATE_UP, QKV

if TYPE_CHECKING:
    from rich.progress import Progress

    from gguf_fuse.api import Options, Result

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_NOTHING_TO_DO = 3
EXIT_NOT_VERIFIED = 4
EXIT_INTERRUPTED = 130

_EXIT_CODES = """\b
Exit codes: 0 done; 1 bad input or I/O error; 2 wrong usage; 3 nothing to fuse or
to unfuse, nothing written; 4 verification failed; 130 interrupted."""

app = typer.Typer(
    name="gguf-fuse",
    help=(
        "Join the Q, K and V weights of an existing GGUF into one attn_qkv tensor per layer.\n\n"
        f"gguf-fuse {QKV.flag} in.gguf out.gguf\n\n"
        "is the main job, the same as: gguf-fuse fuse in.gguf out.gguf\n\n"
        f"{GATE_UP.flag}, alone or beside it, joins gate and up of experts."
    ),
    epilog=_EXIT_CODES.replace("\b\n", "").replace("\n", " "),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class OnMismatch(str, Enum):
    skip = "skip"
    error = "error"


class Reflink(str, Enum):
    auto = "auto"
    always = "always"
    never = "never"


In = Annotated[
    Path,
    typer.Argument(
        metavar="IN", help="The GGUF file to read; of shards, any one of them.", readable=False
    ),
]
Out = Annotated[
    str,
    typer.Argument(
        metavar="OUT",
        help="The GGUF file to write; - writes to a pipe. OUT-00001-of-0000N.gguf keeps the N "
        "shards that IN has; any other name merges them.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Decide everything, write nothing.")]
AnyArchitecture = Annotated[
    bool,
    typer.Option("--any-architecture", help="Even where llama.cpp would not load the result."),
]
Force = Annotated[bool, typer.Option("-f", "--force", help="Replace an existing OUT.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No table, no progress bar.")]
Workers = Annotated[
    int, typer.Option("--threads", min=1, max=256, help="Threads.", show_default="up to 4")
]
Threads = Annotated[int, typer.Option(min=1, max=64, help="Threads that copy.", show_default="2")]
Clone = Annotated[
    Reflink,
    typer.Option("--reflink", help="Share blocks with IN where the file system can."),
]
Sync = Annotated[
    bool,
    typer.Option("--sync/--no-sync", help="Wait until OUT is on the disk, not only in its cache."),
]
SplitMaxSize = Annotated[
    Optional[str],  # noqa: UP045 (older typer cannot read `str | None`)
    typer.Option(
        metavar="N[K|M|G]",
        help="Cut OUT into shards, each with so many bytes of tensors at most (K, M, G: powers of "
        "1000), as llama-gguf-split does: OUT, less its .gguf, comes before -00001-of-0000N.gguf.",
        show_default=False,
    ),
]
SplitMaxTensors = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, metavar="N", help="Cut OUT into shards of N tensors.", show_default=False),
]

_DEFAULT_THREADS = min(2, os.cpu_count() or 1)
_DEFAULT_WORKERS = min(4, os.cpu_count() or 1)
_MOST = 1 << 24  # tokens, cells or sequences: more is a slip of the keyboard
_STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
_P = ParamSpec("_P")


def main() -> None:
    """The console command. The bare form `gguf-fuse --fuse-qkv-weights IN OUT` means `fuse`.

    So does `gguf-fuse --fuse-gate-up-exps IN OUT`, and both flags together.
    """
    # OpenBLAS's idle threads spin for a tenth of a second on cores that attention's own threads
    # need; this is 2^16 cycles. It is read when numpy is loaded.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")
    arguments = sys.argv[1:]
    # By its beginning: a misspelled flag gets fuse's own message, which names the right one.
    commands = {found.callback.__name__ for found in app.registered_commands if found.callback}
    asked = any(argument.startswith("--fuse-") for argument in arguments)
    if asked and arguments[0] not in commands:
        arguments = ["fuse", *arguments]
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the caller
            setattr(sys, stream, Path(os.devnull).open("w"))  # noqa: SIM115
        if isinstance(getattr(sys, stream), io.TextIOWrapper):  # a name may not fit the encoding
            getattr(sys, stream).reconfigure(errors="backslashreplace")
    for number in _STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _stop)
    app(arguments, prog_name="gguf-fuse")


def _stop(caught: int, frame: object) -> NoReturn:
    """End as the signal asks, once: another one in the midst of the cleaning up would break it."""
    for number in _STOPPING:
        signal.signal(number, lambda caught, frame: None)
    if caught == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + caught)


def _exits(command: Callable[_P, None]) -> Callable[_P, None]:
    """Turn every expected failure into one line on stderr and the documented exit code."""

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        from gguf_fuse.format.source import GGUFError
        from gguf_fuse.planning.plan import NothingToDo

        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except NothingToDo as nothing:
            _fail(str(nothing), EXIT_NOTHING_TO_DO)
        except GGUFError as error:
            _fail(str(error), EXIT_ERROR)
        except OSError as error:  # those of models are GGUFErrors by now
            if error.filename is None:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            _fail(f"{error.filename or 'standard output'}: {error.strerror}", EXIT_ERROR)
        except MemoryError as error:
            _fail(f"not enough memory: {str(error) or 'nothing more can be had'}", EXIT_ERROR)
        except KeyboardInterrupt as interrupt:
            _fail("; ".join(["interrupted", *interrupt.args]), EXIT_INTERRUPTED)

    return run


def _fail(message: str, code: int) -> NoReturn:
    from gguf_fuse.cli.report import one_line

    print(f"gguf-fuse: {one_line(message)}", file=sys.stderr)
    raise typer.Exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gguf-fuse {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it, exit."),
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: gguf-fuse fuse model-Q4_0.gguf model-Q4_0-fused.gguf")
@_exits
def fuse(
    source: In,
    output: Out,
    fuse_qkv_weights: Annotated[
        bool, typer.Option(QKV.flag, help="Q, K and V into attn_qkv; so does no flag.")
    ] = False,
    fuse_gate_up_exps: Annotated[
        bool,
        typer.Option(GATE_UP.flag, help="Gate and up of experts into ffn_gate_up_exps."),
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    on_mismatch: Annotated[
        OnMismatch,
        typer.Option(help="A layer whose parts cannot be one tensor: leave it, or fail."),
    ] = OnMismatch.skip,
    any_architecture: AnyArchitecture = False,
    base: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="MODEL",
            help="The model that IN, a LoRA adapter or importance matrix, is for.",
            show_default=False,
            readable=False,
        ),
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
    threads: Threads = _DEFAULT_THREADS,
    reflink: Clone = Reflink.auto,
    sync: Sync = True,
    split_max_size: SplitMaxSize = None,
    split_max_tensors: SplitMaxTensors = None,
) -> None:
    """Write IN to OUT with Q, K and V of each layer as one attn_qkv tensor.

    With --fuse-gate-up-exps: gate and up of experts as one ffn_gate_up_exps.
    """
    from gguf_fuse import api as rewrite
    from gguf_fuse.cli import report

    wanted = ((QKV, fuse_qkv_weights or not fuse_gate_up_exps), (GATE_UP, fuse_gate_up_exps))
    _check_output(output, as_json, dry_run)
    limits = _split_limits(output, split_max_size, split_max_tensors)
    with (
        _options(dry_run, force, sync, threads, reflink, quiet, limits) as options,
        _nothing_as_json(as_json),
    ):
        result = rewrite.fuse(
            source,
            output,
            fusions=[fusion for fusion, chosen in wanted if chosen],
            on_mismatch=on_mismatch.value,
            any_architecture=any_architecture,
            base=base,
            options=options,
        )
    if as_json:
        return _print_json(report.result_json(result))
    if not quiet:
        _print_result(result, report.fuse_table(result.plan), "fused", dry_run)


@app.command(epilog="Example: gguf-fuse unfuse model-Q4_0-fused.gguf model-Q4_0.gguf")
@_exits
def unfuse(
    source: In,
    output: Out,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    any_architecture: AnyArchitecture = False,
    force: Force = False,
    quiet: Quiet = False,
    threads: Threads = _DEFAULT_THREADS,
    reflink: Clone = Reflink.auto,
    sync: Sync = True,
    split_max_size: SplitMaxSize = None,
    split_max_tensors: SplitMaxTensors = None,
) -> None:
    """Write IN to OUT with all that was fused separate again: the very bytes as before."""
    from gguf_fuse import api as rewrite
    from gguf_fuse.cli import report

    _check_output(output, as_json, dry_run)
    limits = _split_limits(output, split_max_size, split_max_tensors)
    with (
        _options(dry_run, force, sync, threads, reflink, quiet, limits) as options,
        _nothing_as_json(as_json),
    ):
        result = rewrite.unfuse(source, output, any_architecture=any_architecture, options=options)
    if as_json:
        return _print_json(report.result_json(result))
    if not quiet:
        _print_result(result, report.unfuse_table(result.plan), "split", dry_run)


@app.command(epilog="Example: gguf-fuse inspect model-Q4_0.gguf")
@_exits
def inspect(source: In, as_json: AsJson = False) -> None:
    """Show what IN holds and what fusing would do to it. Reads the header only."""
    from gguf_fuse import api as rewrite
    from gguf_fuse.cli import report

    found = rewrite.inspect(source)
    if as_json:
        return _print_json(report.inspect_json(found))
    console = _console()
    for label, value in report.file_lines(found):
        console.print(f"[bold]{label:<13}[/]{escape(report.one_line(value))}", highlight=False)
    console.print()
    nothing = "no layers that could be fused"
    console.print(report.inspect_table(found.layers) if found.layers else nothing)


@app.command(epilog="Example: gguf-fuse verify model-Q4_0.gguf model-Q4_0-fused.gguf")
@_exits
def verify(
    original: Annotated[
        Path, typer.Argument(metavar="ORIGINAL", help="The file before.", readable=False)
    ],
    fused: Annotated[Path, typer.Argument(metavar="FUSED", help="The file after.", readable=False)],
    layers: Annotated[
        str,
        typer.Option(
            help="Layers to compute: 0,5-7 or all, or 4x for 4 spread evenly; auto is all of a "
            "small model, 4x of a large one. Bytes are compared in all layers."
        ),
    ] = "auto",
    n_prompt: Annotated[int, typer.Option(min=1, max=_MOST, help="Tokens of the prompt.")] = 48,
    n_decode: Annotated[int, typer.Option(min=1, max=_MOST, help="Decode steps.")] = 4,
    n_seqs: Annotated[
        int, typer.Option(min=1, max=_MOST, help="Sequences, of different lengths.")
    ] = 3,
    n_kv: Annotated[
        int, typer.Option(min=1, max=_MOST, help="Cells in the cache before decoding.")
    ] = 1000,
    threads: Workers = _DEFAULT_WORKERS,
    seed: Annotated[int, typer.Option(min=0, help="Of the random activations.")] = 0,
    structure_only: Annotated[
        bool, typer.Option("--structure-only", help="Compare the bytes, compute nothing.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prove that FUSED holds what ORIGINAL holds and computes what it computes."""
    from gguf_fuse.cli import report
    from gguf_fuse.verifying.layers import parse_layers
    from gguf_fuse.verifying.report import VerifyOptions
    from gguf_fuse.verifying.verify import verify as verify_files

    try:
        choice = parse_layers(layers)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--layers") from error
    with _steps(quiet) as (on_start, on_progress):
        result = verify_files(
            original,
            fused,
            VerifyOptions(
                layers=choice,
                n_prompt=n_prompt,
                n_decode=n_decode,
                n_seqs=n_seqs,
                n_kv=n_kv,
                threads=threads,
                seed=seed,
                structure_only=structure_only,
                on_start=on_start,
                on_progress=on_progress,
            ),
        )
    if as_json:
        _print_json(report.verify_json(result))
    elif not quiet:
        for part in report.verify_parts(result):
            _console().print(part, highlight=False)
    if not result.ok:
        _fail(report.verify_failure(result), EXIT_NOT_VERIFIED)


@app.command(epilog="Example: gguf-fuse bench model-Q4_0.gguf --plot decode.png")
@_exits
def bench(
    model: Annotated[
        Optional[Path],  # noqa: UP045 (older typer cannot read `Path | None`)
        typer.Argument(
            metavar="[MODEL]",
            help="Whose shapes to take; else 32 heads, 8 KV heads, 128 wide.",
            show_default=False,
            readable=False,
        ),
    ] = None,
    threads: Workers = _DEFAULT_WORKERS,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE.png|.svg", help="Draw time per token over context.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Time projections, separate and fused, and the ways to decode. Weights are random."""
    from gguf_fuse.cli import report
    from gguf_fuse.measuring import bench as benchmark
    from gguf_fuse.measuring import plot as plotting

    if plot is not None:
        plotting.check_plot(plot)
    with _steps(quiet) as (on_start, on_progress):
        result = benchmark.bench(model, threads=threads, on_start=on_start, on_progress=on_progress)
    if as_json:
        _print_json(report.bench_json(result))
    elif not quiet:
        for part in report.bench_parts(result):
            _console().print(part, highlight=False)
    if plot is not None:
        plotting.plot(result, plot)  # last: if it fails, the numbers are not lost


@app.command(epilog="Example: gguf-fuse demo --keep demo-files")
@_exits
def demo(
    keep: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FOLDER", help="Leave the files there.", show_default=False),
    ] = None,
) -> None:
    """Make a small model with random weights, fuse it, verify it, and take it back."""
    import tempfile

    from gguf_fuse.format.source import GGUFError
    from gguf_fuse.random_model import demo_spec, write_random_model

    with tempfile.TemporaryDirectory(prefix="gguf-fuse-demo-") as scratch:
        folder = keep or Path(scratch)
        names = ("model.gguf", "model-fused.gguf", "model-back.gguf")
        model, fused, back = (folder / name for name in names)
        _say(f"a llama-like model with random weights: {model}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if model.exists():
                raise GGUFError(f"{model}: exists already; give an empty folder")
            with _whole(model):
                write_random_model(model, demo_spec())
        except OSError as error:
            raise GGUFError(f"{folder}: {error.strerror}") from error
        _say(f"$ gguf-fuse {QKV.flag} {model.name} {fused.name}")
        fuse(model, str(fused))
        _say(f"$ gguf-fuse verify {model.name} {fused.name}")
        verify(model, fused)
        _say(f"$ gguf-fuse unfuse {fused.name} {back.name}")
        unfuse(fused, str(back))
        same = model.read_bytes() == back.read_bytes()
        _say(f"$ cmp {model.name} {back.name}")
        if not same:
            _fail(f"{back}: differs from {model}", EXIT_NOT_VERIFIED)
        _console().print("identical, byte for byte")
    if keep is None:
        _say("the files are removed again; --keep FOLDER leaves them there")


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """No half of a file that could not be written."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _say(line: str) -> None:
    _console().print(f"\n[bold]{escape(line)}[/]", highlight=False, soft_wrap=True)


# -- output -------------------------------------------------------------------------------------


def _console(*, stderr: bool = False) -> Console:
    """Into a pipe, lines are not cut to the width of a screen that is not there."""
    stream = sys.stderr if stderr else sys.stdout
    wide = None if stream.isatty() or "COLUMNS" in os.environ else 200
    return Console(stderr=stderr, width=wide)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))


def _print_result(result: Result, table: Any, verb: str, dry_run: bool) -> None:
    from gguf_fuse.cli import report

    console = _console(stderr=result.output == "-")
    console.print(table)
    console.print()
    console.print(escape(report.result_line(result, verb, dry_run)), highlight=False)
    if verb == "fused":
        for note in report.notes(result):
            console.print(note, highlight=False, soft_wrap=True)


@contextmanager
def _nothing_as_json(wanted: bool) -> Iterator[None]:
    from gguf_fuse.cli.report import nothing_json
    from gguf_fuse.planning.plan import NothingToDo

    try:
        yield
    except NothingToDo as nothing:
        if wanted:
            _print_json(nothing_json(nothing.header, nothing.layers))
        raise


def _check_output(output: str, as_json: bool, dry_run: bool) -> None:
    if output != "-":
        return
    if as_json:
        raise typer.BadParameter("--json and OUT - both want standard output")
    if dry_run:
        return
    if sys.__stdout__ is None:
        raise typer.BadParameter("OUT is -, but standard output is closed")
    if sys.stdout.isatty():
        raise typer.BadParameter("OUT is -, but standard output is a terminal; pipe it somewhere")


def _split_limits(
    output: str, max_size: str | None, max_tensors: int | None
) -> tuple[int | None, int | None]:
    """Bytes and tensors that a shard may have at most. Raises typer.BadParameter."""
    from gguf_fuse.writing.cut import parse_size

    if max_size is None and max_tensors is None:
        return None, None
    if max_size is not None and max_tensors is not None:
        raise typer.BadParameter("give --split-max-size or --split-max-tensors, not both")
    if output == "-":
        raise typer.BadParameter("OUT is -, which cannot be cut into shards")
    try:
        n_bytes = None if max_size is None else parse_size(max_size)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--split-max-size") from error
    return n_bytes, max_tensors


@contextmanager
def _options(
    dry_run: bool,
    force: bool,
    sync: bool,
    threads: int,
    reflink: Reflink,
    quiet: bool,
    limits: tuple[int | None, int | None],
) -> Iterator[Options]:
    """How to write, with a progress bar where somebody watches. limits: of a shard."""
    from gguf_fuse.api import Options

    options = Options(
        dry_run,
        force,
        sync,
        threads,
        reflink.value,
        split_max_size=limits[0],
        split_max_tensors=limits[1],
    )
    if quiet or not sys.stderr.isatty():
        yield options
        return
    with _progress() as progress:
        task = progress.add_task("writing", total=None, visible=False)
        yield replace(
            options,
            on_start=lambda n_bytes: progress.update(task, total=n_bytes, visible=True),
            on_progress=lambda n_bytes: progress.advance(task, n_bytes),
            on_flush=lambda: progress.update(task, description="waiting for the disk"),
        )


@contextmanager
def _steps(quiet: bool) -> Iterator[tuple[Callable[[str, int], None], Callable[[int], None]]]:
    """What begins, and steps done: a bar for each stage, where somebody watches."""
    if quiet or not sys.stderr.isatty():
        yield lambda what, n_steps: None, lambda n_steps: None
        return
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=_console(stderr=True), transient=True) as bars:
        tasks = [bars.add_task("", visible=False)]
        yield (
            lambda what, n_steps: bars.update(
                tasks[0], description=what, completed=0, total=n_steps, visible=True
            ),
            lambda n_steps: bars.advance(tasks[0], n_steps),
        )


def _progress() -> Progress:
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=_console(stderr=True),
        transient=True,
    )
