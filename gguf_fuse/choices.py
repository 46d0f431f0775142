"""What a caller chooses, on the command line or in Python: words, and checks that it can be."""

import operator
from typing import Any, Literal, get_args

from gguf_fuse.format.source import GGUFError

OnMismatch = Literal["skip", "error"]
Reflink = Literal["auto", "always", "never"]
WayName = Literal["raise", "lower"]  # of a recipe
Verified = Literal["none", "structure", "numbers"]  # of each file of a batch
ReaderName = Literal[
    "llama.cpp", "ollama", "ik_llama.cpp", "vllm", "candle", "mistral.rs", "transformers"
]

MOST_THREADS = 256
MOST_TOKENS = 1 << 24  # or cells, or sequences: more is a slip of the keyboard


def require_word(option: str, value: Any, words: Any) -> None:
    """words: a Literal. Raises GGUFError for any other value."""
    if value not in get_args(words):
        raise GGUFError(f"{option} is {value!r}; it must be one of {', '.join(get_args(words))}")


def require_count(option: str, value: Any, most: int, *, least: int = 1) -> None:
    """Raises GGUFError for what is no whole number from least to most."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or not least <= number <= most:
        raise GGUFError(f"{option} is {value!r}; it must be a whole number, {least} to {most}")
