"""Processes that run llama.cpp, and what the wheel `xllamacpp` answers in one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from gguf_fuse.format.header import Header
from gguf_fuse.format.source import GGUFError
from gguf_fuse.llama import worker


class LoadFailed(Exception):
    """llama.cpp refused the file or crashed on it.

    `reason` is its own first complaint; `signal` names what killed the process ("SIGSEGV",
    "SIGABRT"), or is None where it ended by itself.
    """

    def __init__(self, reason: str, signal: str | None = None) -> None:
        super().__init__(f"{signal}: {reason}" if signal else reason)
        self.reason = reason
        self.signal = signal


def available() -> bool:
    """Whether xllamacpp is installed; nothing is imported."""
    return importlib.util.find_spec("xllamacpp") is not None


def ask_wheel(
    request: Mapping[str, Any], environment: Mapping[str, str] = os.environ
) -> list[dict[str, Any]]:
    """The answers of a process of its own: see `worker`.

    Raises LoadFailed, or GGUFError where the wheel itself does not work.
    """
    command, words = [sys.executable, worker.__file__], json.dumps(request)
    done = run(command, environment, words)
    if done.returncode < 0 or done.returncode == worker.REFUSED:
        raise failure(done)
    if done.returncode:
        raise GGUFError(f"xllamacpp does not work here: {done.stderr.strip().splitlines()[-1]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def run(
    command: list[str], environment: Mapping[str, str], words: str = ""
) -> subprocess.CompletedProcess[str]:
    """How the command ended, and all that it printed; no process outlives an interruption."""
    quiet = {**environment, "GGML_NO_BACKTRACE": "1"}  # no debugger where llama.cpp aborts
    return subprocess.run(
        command, env=quiet, input=words, capture_output=True, text=True, errors="replace"
    )


def failure(done: subprocess.CompletedProcess[str]) -> LoadFailed:
    """Why a process of llama.cpp did not end well."""
    killed = signal.Signals(-done.returncode).name if done.returncode < 0 else None
    return LoadFailed(first_complaint(done.stderr), killed)


# What the log puts in front of a message: time since the start, and the level.
_TIMESTAMP = re.compile(r"^[\d.]+ [A-Z] ")
_ERROR = re.compile(r"^[\d.]+ E |\berror( loading model)?: ")
_ASSERTION = re.compile(r"GGML_ASSERT|GGML_ABORT")


def first_complaint(log: str) -> str:
    """What llama.cpp complained of first: what follows is only its consequence."""
    lines = [line for line in log.splitlines() if line.strip()]
    for complaint in (_ASSERTION, _ERROR):
        for line in lines:
            if complaint.search(line):
                return _TIMESTAMP.sub("", line)
    return _TIMESTAMP.sub("", lines[-1]) if lines else "no message"


def first_file(model: Header) -> str:
    """What llama.cpp is told to load: of shards the first, it finds the others."""
    return model.files[0].path


def n_vocab(model: Header) -> int:
    """Tokens that the model knows: random ones are taken from them. Raises GGUFError."""
    embedding = model.by_name.get("token_embd.weight")
    if embedding is None:
        raise GGUFError(f"{model.path}: has no token_embd.weight: llama.cpp cannot run it alone")
    return embedding.ne[-1]
