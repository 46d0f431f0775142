"""The program from its first instruction on: signals first, then everything else is imported.

Before this, Python itself starts: what Ctrl-C does in those hundredths of a second is its affair.
"""

import atexit
import contextlib
import gc
import os
import sys

from gguf_fuse import signals


def main() -> None:
    """The console command."""
    signals.end_at_once()
    # To look for cycles among the classes of all modules, and once more at the end, takes a seventh
    # of a short command; there is next to nothing to be found.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    # A closed stream's number would go to the next file that is opened, OUT perhaps, and with it
    # whatever a library prints there.
    with contextlib.suppress(OSError):
        while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
            pass
        os.close(fd)
    try:
        from gguf_fuse.cli.entry import run

        run(sys.argv[1:])
    except (MemoryError, ImportError, SyntaxError, SystemError) as error:
        why = str(error).strip().rpartition("\n")[2]
        # Of a module that the compiler had no memory for, it may say that its syntax is wrong; the
        # interpreter, that loading it "returned NULL without setting an exception".
        if not isinstance(error, ImportError) or "map segment" in why:
            why = "not enough memory; see ulimit -v"
        _end(f"cannot start: {why}")


def _end(message: str) -> None:
    print(f"gguf-fuse: {message}", file=sys.stderr)
    sys.exit(1)
