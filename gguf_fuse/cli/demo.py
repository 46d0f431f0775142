"""The command demo."""

import tempfile
from pathlib import Path
from typing import Annotated

from rich.markup import escape

import gguf_fuse
from gguf_fuse.cli.console import next_line, print_parts, printer
from gguf_fuse.cli.fuse import print_fused
from gguf_fuse.cli.outcome import EXIT_NOT_VERIFIED, fail
from gguf_fuse.cli.unfuse import print_unfused
from gguf_fuse.cli.usage import OUTPUT, option
from gguf_fuse.cli.verify import verify
from gguf_fuse.planning.fusions import QKV


def demo(
    keep: Annotated[
        Path | None,
        option("--keep", part=OUTPUT, metavar="FOLDER", help="Leave the files there."),
    ] = None,
) -> None:
    """Make a small model with random weights, fuse it, verify it, and take it back."""
    with tempfile.TemporaryDirectory(prefix="gguf-fuse-demo-") as scratch:
        folder = keep or Path(scratch)
        model, fused, back = (folder / f"model{which}.gguf" for which in ("", "-fused", "-back"))
        _say(f"a llama-like model with random weights: {model}")
        _make(model)
        _say(f"$ gguf-fuse {QKV.flag} {model.name} {fused.name}")
        print_fused(gguf_fuse.fuse(model, fused))
        _say(f"$ gguf-fuse verify {model.name} {fused.name}")
        verify(str(model), str(fused))
        _say(f"$ gguf-fuse unfuse {fused.name} {back.name}")
        print_unfused(gguf_fuse.unfuse(fused, back))
        _say(f"$ cmp {model.name} {back.name}")
        if model.read_bytes() != back.read_bytes():
            fail(f"{back}: differs from {model}", EXIT_NOT_VERIFIED)
        printer().print("identical, byte for byte")
    if keep is None:
        _say("the files are removed again; --keep FOLDER leaves them there")
    else:
        print_parts(["", *next_line("inspect", fused)])


def _make(model: Path) -> None:
    from gguf_fuse.cli.demo_model import write_demo_model
    from gguf_fuse.format.source import GGUFError

    try:
        model.parent.mkdir(parents=True, exist_ok=True)
        if model.exists():
            raise GGUFError(f"{model}: exists already; give an empty folder")
        try:
            write_demo_model(model)
        except BaseException:
            model.unlink(missing_ok=True)  # half a file
            raise
    except OSError as error:
        raise GGUFError(f"{model.parent}: {error.strerror}") from error


def _say(line: str) -> None:
    printer().print(f"\n[bold]{escape(line)}[/]", highlight=False, soft_wrap=True)
