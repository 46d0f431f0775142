"""llama-quantize, run as a process of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import deque
from collections.abc import Sequence

from gguf_fuse.format.source import GGUFError
from gguf_fuse.progress import OnProgress

LLAMA_QUANTIZE = "llama-quantize"

_TENSOR = re.compile(rb"^\[ *\d+/ *\d+\] ")  # how the line begins that it prints for each tensor
_FAULT = re.compile(r"failed to quantize: (.*)|.*\b(?:error|ERROR)\b.*")
_LAST_LINES = 50


def find(program: str) -> str:
    """The path of llama-quantize. Raises GGUFError where there is none."""
    found = shutil.which(program)
    if found is None:
        raise GGUFError(
            f"{program}: not found; it comes with llama.cpp; --llama-quantize FILE says where it is"
        )
    return found


def quantize(program: str, arguments: Sequence[str], on_progress: OnProgress) -> None:
    """Run it to its end; on_progress: a tensor is done. Raises GGUFError with what it complains of.

    Whatever interrupts the call stops it too; half a file may be left then.
    """
    last = deque[bytes](maxlen=_LAST_LINES)
    try:
        process = subprocess.Popen(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except OSError as error:
        raise GGUFError(f"{program}: {error.strerror}") from error
    with process:
        try:
            for line in process.stdout or ():
                last.append(line)
                if _TENSOR.match(line):
                    on_progress(1)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise GGUFError(f"{program} failed: {_complaint(last) or f'exit {process.returncode}'}")


def _complaint(lines: Sequence[bytes]) -> str:
    """What it says of its failure, else the last line."""
    texts = [text for line in lines if (text := line.decode(errors="replace").strip())]
    faults = [found[1] or found[0] for text in texts if (found := _FAULT.search(text))]
    return (faults or texts or [""])[-1]
