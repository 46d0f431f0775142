"""Which layers to compute: what the command line says -> names."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence

from gguf_fuse.format.header import Header
from gguf_fuse.format.source import GGUFError
from gguf_fuse.models.names import ATTENTION_PARTS, FUSED_ATTENTION, attention_layers
from gguf_fuse.verifying.report import Choice

SMALL_MODEL = 1 << 24  # elements of all Q, K and V: up to here every layer is computed
N_SPREAD = 4  # above it, so many layers


def parse_layers(text: str) -> Choice:
    """ "0,5-7", "all", "4x" (four evenly spaced ones), "auto". Raises ValueError."""
    if text in ("auto", "all"):
        return Choice(spread=None if text == "auto" else sys.maxsize)
    if re.fullmatch(r"[1-9]\d{0,5}x", text):
        return Choice(spread=int(text[:-1]))
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{text!r}: write layers as 0,5-7 or all, or 4x for 4 spread evenly")
        numbers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return Choice(frozenset(numbers))


def choose_layers(header: Header, choice: Choice) -> list[str]:
    """Names of attention layers. Raises GGUFError for a number that no layer has."""
    names = attention_layers(header.tensors)
    if choice.numbers is not None:
        number = {name: int(name.rpartition(".")[2]) for name in names}
        if absent := sorted(choice.numbers.difference(number.values())):
            raise GGUFError(f"{header.path}: no attention layer {absent[0]}; --layers is wrong")
        return [name for name in names if number[name] in choice.numbers]
    spread = choice.spread
    if spread is None:
        spread = len(names) if _n_elements(header, names) <= SMALL_MODEL else N_SPREAD
    count = min(spread, len(names))
    # The first, the last, and others at even distances between them.
    return [names[round(i * (len(names) - 1) / max(count - 1, 1))] for i in range(count)]


def _n_elements(header: Header, names: Sequence[str]) -> int:
    """Of the weights of Q, K and V in these layers, however they are stored."""
    parts = (*ATTENTION_PARTS, FUSED_ATTENTION)
    wanted = {f"{name}.{part}.weight" for name in names for part in parts}
    return sum(math.prod(tensor.ne) for tensor in header.tensors if tensor.name in wanted)
