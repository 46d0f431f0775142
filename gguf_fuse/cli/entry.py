"""The program: its commands, and the bare form that means fuse."""

import errno
import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from gguf_fuse import __version__
from gguf_fuse.cli.outcome import not_printed
from gguf_fuse.cli.usage import OTHER, WHAT, Command, Program, option, understand
from gguf_fuse.machine import little_address_space
from gguf_fuse.planning.fusions import GATE_UP, QKV

app = typer.Typer(
    name="gguf-fuse",
    cls=Program,
    help=(
        "Join the Q, K and V weights of an existing GGUF into one attn_qkv tensor per layer.\n\n"
        f"\b\n  gguf-fuse {QKV.flag} in.gguf out.gguf\n      fuse, the main job\n"
        "  gguf-fuse in.gguf\n      inspect: what is in it"
    ),
    epilog=(
        "Exit codes: 0 done; 1 bad input or I/O error; 2 wrong usage; 3 nothing to fuse or "
        "to unfuse, nothing written; 4 verification failed; 130 interrupted (128 + the signal)."
    ),
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("help", cls=Command, epilog="Example: gguf-fuse help fuse")
def _help(
    ctx: typer.Context,
    command: Annotated[
        str | None, typer.Argument(metavar="COMMAND", help="Which; without one, all in short.")
    ] = None,
) -> None:
    """Explain a command."""
    arguments = ["--help"] if command is None else [command, "--help"]
    ctx.find_root().command.main(arguments, prog_name="gguf-fuse", standalone_mode=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gguf-fuse {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    fuse_qkv_weights: Annotated[
        bool, option(QKV.flag, part=WHAT, help="Fuse Q, K and V: IN [OUT] and options of fuse.")
    ] = False,
    fuse_gate_up_exps: Annotated[
        bool, option(GATE_UP.flag, part=WHAT, help="The same for gate and up of experts; or both.")
    ] = False,
    version: Annotated[
        bool,
        option(
            "-V", "--version", part=OTHER, callback=_print_version, is_eager=True, help="Show it."
        ),
    ] = False,
) -> None:
    """The flags stand here to be shown: `Program` takes them for those of fuse."""


def run(arguments: list[str]) -> None:
    """What the program does."""
    # OpenBLAS's idle threads spin for a tenth of a second on cores that attention's own threads
    # need; this is 2^16 cycles. It is read when numpy is loaded.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")
    if little_address_space():  # a thread that it cannot start makes it send itself SIGINT
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the caller
            setattr(sys, stream, Path(os.devnull).open("w"))  # noqa: SIM115
        if isinstance(getattr(sys, stream), io.TextIOWrapper):  # a name may not fit the encoding
            getattr(sys, stream).reconfigure(errors="backslashreplace")
    try:
        try:
            understand(app, arguments)
        finally:
            sys.stdout.flush()
    except OSError as error:  # of help, the version, or what is said of wrong usage
        if error.errno == errno.ENOMEM:
            raise MemoryError from error
        sys.exit(not_printed(error))
