"""A file that is no GGUF, or a piece of one: the message names what it is and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pack import valid
from tests.server import Run, assert_one_line

MATRIX = b"\x10\0\0\0\x13\0\0\0blk.0.attn_k.weight" + bytes(64)
PICKLE = b"\x80\2}q\0(X\5\0\0\0model"
HALF = len(valid().pack()) // 2

# Name, content, and words of the message.
KINDS: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("m.gguf", b"", ("empty", "download")),
    ("m.gguf", b"version https://git-lfs.github.com/spec/v1\n", ("git lfs pull",)),
    ("m.gguf.part1of2", valid().pack()[:HALF], ("truncated", "one piece of", "m.gguf:", "cat")),
    ("m.gguf.part2of2", valid().pack()[HALF:], ("one piece of", "m.gguf:", "cat")),
    ("m.Q8_0.gguf-split-b", b"\1\2\3\4" * 9, ("one piece of", "m.Q8_0.gguf:", "cat")),
    ("m.gguf-part-a", valid().pack()[:30], ("truncated", "one piece of", "cat")),
    ("imatrix.dat", MATRIX, ("importance matrix", "llama-imatrix --in-file")),
    ("m.safetensors", b"\x40" + bytes(7) + b'{"__metadata__":{}}', ("safetensors", "convert")),
    ("m.bin", b"PK\3\4" + bytes(40), ("zip", "convert_hf")),
    ("m.pth", PICKLE, ("pickle", "convert_hf")),
    ("m.bin", b"tjgg\3\0\0\0", ("ggjt", "convert_hf")),
    ("m.bin", b"lmgg" + bytes(9), ("ggml", "convert_hf")),
    ("m.bin", b"algg\1\0\0\0", ("adapter", "convert_lora_to_gguf.py")),
    ("m.gguf", b"\n<!DOCTYPE html><html>", ("web page", "download")),
    ("m.gguf", b'{"error":"Entry not found"}', ("JSON", "download")),
    ("m.gguf.gz", b"\x1f\x8b\x08" + bytes(40), ("gunzip",)),
    ("m.gguf", b"\0" * 40, (r"b'\x00\x00\x00\x00'",)),
    ("m.gguf", b"xy", ("b'xy'",)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "words"), KINDS)
def test_the_remedy_is_named(
    name: str, content: bytes, words: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    outcome = run("inspect", path)
    assert_one_line(outcome, str(path), *words)
    assert ("not a GGUF file" in outcome.err) != content.startswith(b"GGUF")
