"""llama-quantize: what its arguments ask for, the real one where there is one, and a stand-in.

As a program (`python -m tests.quantize ...`) this is the stand-in: gguf-py's own quantization to
Q4_0, Q5_0, Q8_0 and the like, tensors sorted by name, as llama-quantize writes them.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import pytest
from gguf import GGMLQuantizationType as T

from tests.edit import finish

REAL = shutil.which(os.environ.get("LLAMA_QUANTIZE", "llama-quantize"))
needs_llama_quantize = pytest.mark.skipif(
    REAL is None, reason="no llama-quantize in PATH, and LLAMA_QUANTIZE names none"
)
ROOT = Path(__file__).parent.parent


@dataclass
class Arguments:
    """types: patterns with the name of a type, in order. options: the others that have a value."""

    source: str = ""
    target: str = ""
    file_type: str = ""
    allow_requantize: bool = False
    types: list[tuple[str, str]] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)

    def requantized(self, types: Mapping[str, str]) -> dict[str, str]:
        """The types after it, given those before; no tensor may be left to the mix, or have two."""
        after = dict(types)
        for name in types:
            found = {to for pattern, to in self.types if re.search(pattern.lower(), name)}
            assert len(found) == 1, f"{name}: {found}"
            after[name] = found.pop().upper()
        return after


def parsed(words: Sequence[str]) -> Arguments:
    """As tools/quantize/quantize.cpp reads them: options first."""
    left, found = list(words), Arguments()
    while left[0].startswith("--"):
        option = left.pop(0)
        if option == "--allow-requantize":
            found.allow_requantize = True
        elif option == "--tensor-type":
            pattern, _, type_name = left.pop(0).partition("=")
            found.types.append((pattern, type_name))
        else:
            found.options[option] = left.pop(0)
    found.source, found.target, found.file_type = left
    return found


def quantizable(reader: gguf.GGUFReader) -> dict[str, str]:
    """Types of the tensors that llama-quantize may quantize: matrices but for norms."""
    return {
        tensor.name: tensor.tensor_type.name
        for tensor in reader.tensors
        if sum(n > 1 for n in tensor.shape) > 1 and not tensor.name.endswith("_norm.weight")
    }


def stand_in(folder: Path, *first: str) -> Path:
    """A program that is called as llama-quantize. first: arguments to put before the others."""
    path = folder / "llama-quantize"
    words = " ".join(f"'{word}'" for word in first)
    path.write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m tests.quantize {words} "$@"\n'
    )
    path.chmod(0o755)
    return path


def main(words: Sequence[str]) -> None:
    asked = parsed(words)
    reader = gguf.GGUFReader(asked.source)
    writer = gguf.GGUFWriter(asked.target, str(reader.fields["general.architecture"].contents()))
    for key, value in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        item = value.types[1] if len(value.types) > 1 else None
        writer.add_key_value(key, value.contents(), value.types[0], sub_type=item)
    writer.add_file_type(0)
    may = quantizable(reader)
    for tensor in sorted(reader.tensors, key=lambda tensor: str(tensor.name)):
        name, data, old = tensor.name, tensor.data, tensor.tensor_type
        named = (to for pattern, to in asked.types if re.search(pattern, name))
        new = T[next(named).upper()] if name in may else old
        if new is not old:
            data = gguf.quants.quantize(gguf.quants.dequantize(data, old), new)
        writer.add_tensor(name, data, raw_dtype=new)
        print(f"[{1:4d}/{len(reader.tensors):4d}] {name} - type = {new.name}", file=sys.stderr)
    finish(writer)


if __name__ == "__main__":
    main(sys.argv[1:])
