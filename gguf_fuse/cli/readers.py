"""inspect --for: which programs load the file, as people and scripts are told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import gguf_fuse
from gguf_fuse.choices import ReaderName
from gguf_fuse.cli.usage import WHAT, option

if TYPE_CHECKING:
    from gguf_fuse.planning.readers import Answer

_WORDS = {True: "yes", False: "no", None: "not known"}
_PROOFS = {"measured": "measured", "source": "read, not run", "none": "looked in"}

For = Annotated[
    Literal[ReaderName, "all"] | None,
    option(
        "--for",
        part=WHAT,
        metavar="PROGRAM",
        help="Whether llama.cpp, ollama, ik_llama.cpp, vllm, candle, mistral.rs, transformers, or "
        "all of them, load the file as it is, and since when.",
    ),
]


def readers_json(found: gguf_fuse.Inspection, program: For) -> dict[str, Any]:
    """What is added to the object of inspect; nothing where nobody asked."""
    told = [asdict(answer) for answer in _answers(found, program)]
    return {"readers": told} if told else {}


def reader_lines(found: gguf_fuse.Inspection, program: For) -> Iterator[tuple[str, str]]:
    """Labels and values, as `inspect` prints them of the file."""
    for answer in _answers(found, program):
        since = f", since {answer.since}" if answer.since else ""
        yield answer.program, f"{_WORDS[answer.loads]}{since}: {answer.reason}"
        if answer.advice:
            yield "", answer.advice
        yield "", f"{_PROOFS[answer.proof]}: {answer.source}"


def _answers(found: gguf_fuse.Inspection, program: For) -> Iterator[Answer]:
    if program is None:
        return
    from gguf_fuse.planning.readers import ask

    for name in get_args(ReaderName) if program == "all" else [program]:
        yield ask(name, found.header, found.layers)
