"""The program: its commands, and the bare form that means fuse."""

import errno
import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from gguf_fuse import __version__
from gguf_fuse.cli.bench import bench
from gguf_fuse.cli.console import not_printed
from gguf_fuse.cli.demo import demo
from gguf_fuse.cli.fuse import fuse
from gguf_fuse.cli.inspect import inspect
from gguf_fuse.cli.unfuse import unfuse
from gguf_fuse.cli.verify import verify
from gguf_fuse.machine import little_address_space
from gguf_fuse.planning.fusions import GATE_UP, QKV

app = typer.Typer(
    name="gguf-fuse",
    help=(
        "Join the Q, K and V weights of an existing GGUF into one attn_qkv tensor per layer.\n\n"
        f"gguf-fuse {QKV.flag} in.gguf out.gguf\n\n"
        "is the main job, the same as: gguf-fuse fuse in.gguf out.gguf\n\n"
        f"{GATE_UP.flag}, alone or beside it, joins gate and up of experts."
    ),
    epilog=(
        "Exit codes: 0 done; 1 bad input or I/O error; 2 wrong usage; 3 nothing to fuse or "
        "to unfuse, nothing written; 4 verification failed; 130 interrupted (128 + the signal)."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_EXAMPLES = {  # in the order of --help
    fuse: "fuse model-Q4_0.gguf model-Q4_0-fused.gguf",
    unfuse: "unfuse model-Q4_0-fused.gguf model-Q4_0.gguf",
    inspect: "inspect model-Q4_0.gguf",
    verify: "verify model-Q4_0.gguf model-Q4_0-fused.gguf",
    bench: "bench model-Q4_0.gguf --plot decode.png",
    demo: "demo --keep demo-files",
}
for _command, _example in _EXAMPLES.items():
    app.command(epilog=f"Example: gguf-fuse {_example}")(_command)


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


def run(arguments: list[str]) -> None:
    """What the program does. Flags of fuse without a command's name before them mean `fuse`."""
    # OpenBLAS's idle threads spin for a tenth of a second on cores that attention's own threads
    # need; this is 2^16 cycles. It is read when numpy is loaded.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")
    if little_address_space():  # a thread that it cannot start makes it send itself SIGINT
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # By its beginning: a misspelled flag gets fuse's own message, which names the right one.
    asked = any(argument.startswith("--fuse-") for argument in arguments)
    if asked and arguments[0] not in {command.__name__ for command in _EXAMPLES}:
        arguments = ["fuse", *arguments]
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the caller
            setattr(sys, stream, Path(os.devnull).open("w"))  # noqa: SIM115
        if isinstance(getattr(sys, stream), io.TextIOWrapper):  # a name may not fit the encoding
            getattr(sys, stream).reconfigure(errors="backslashreplace")
    try:
        try:
            app(arguments, prog_name="gguf-fuse")
        finally:
            sys.stdout.flush()
    except OSError as error:  # of help, the version, or what is said of wrong usage
        if error.errno == errno.ENOMEM:
            raise MemoryError from error
        sys.exit(not_printed(error))
