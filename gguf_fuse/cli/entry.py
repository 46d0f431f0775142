"""The program: its commands, its signals, and the bare form that means fuse."""

import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from gguf_fuse import __version__
from gguf_fuse.cli.bench import bench
from gguf_fuse.cli.console import failing
from gguf_fuse.cli.demo import demo
from gguf_fuse.cli.fuse import fuse
from gguf_fuse.cli.inspect import inspect
from gguf_fuse.cli.options import option
from gguf_fuse.cli.unfuse import unfuse
from gguf_fuse.cli.usage import OTHER, WHAT, Command, Program, run
from gguf_fuse.cli.verify import verify
from gguf_fuse.planning.fusions import GATE_UP, QKV

app = typer.Typer(
    name="gguf-fuse",
    cls=Program,
    help=(
        "Join the Q, K and V weights of an existing GGUF into one attn_qkv tensor per layer.\n\n"
        f"\b\n  gguf-fuse {QKV.flag} in.gguf out.gguf    fuse, the main job\n"
        "  gguf-fuse in.gguf                                inspect: what is in it"
    ),
    epilog=(
        "Exit codes: 0 done; 1 bad input or I/O error; 2 wrong usage; 3 nothing to fuse or "
        "to unfuse, nothing written; 4 verification failed; 130 interrupted."
    ),
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_EXAMPLES: dict[Callable[..., None], str] = {  # in the order of --help
    fuse: "fuse model-Q4_0.gguf model-Q4_0-fused.gguf",
    unfuse: "unfuse model-Q4_0-fused.gguf model-Q4_0.gguf",
    inspect: "inspect model-Q4_0.gguf",
    verify: "verify model-Q4_0.gguf model-Q4_0-fused.gguf",
    bench: "bench model-Q4_0.gguf --plot decode.png",
    demo: "demo --keep demo-files",
}
for _command, _example in _EXAMPLES.items():
    app.command(cls=Command, epilog=f"Example: gguf-fuse {_example}")(failing(_command))


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


def main() -> None:
    """The console command."""
    # OpenBLAS's idle threads spin for a tenth of a second on cores that attention's own threads
    # need; this is 2^16 cycles. It is read when numpy is loaded.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the caller
            setattr(sys, stream, Path(os.devnull).open("w"))  # noqa: SIM115
        if isinstance(getattr(sys, stream), io.TextIOWrapper):  # a name may not fit the encoding
            getattr(sys, stream).reconfigure(errors="backslashreplace")
    for number in _STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _stop)
    run(app, sys.argv[1:])


# Windows has no SIGHUP.
_STOPPING = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}


def _stop(caught: int, frame: object) -> NoReturn:
    """End as the signal asks, once: another one in the midst of the cleaning up would break it."""
    for number in _STOPPING:
        signal.signal(number, lambda caught, frame: None)
    if caught == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + caught)
