"""A command on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from typing import Any


def on_a_terminal(*arguments: Any, code: int = 0, **environment: str) -> str:
    """All that the command writes to a terminal of 80 columns, where it ends with this code."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "gguf_fuse", *map(str, arguments)]
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **environment}
    process = subprocess.Popen(command, stdout=slave, stderr=slave, env=env)
    os.close(slave)
    shown = b""
    try:
        while data := os.read(master, 65536):
            shown += data
    except OSError:  # the terminal's other side is gone
        pass
    os.close(master)
    assert process.wait() == code
    return shown.decode()
