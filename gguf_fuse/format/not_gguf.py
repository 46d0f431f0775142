"""What a file is that is no GGUF, and what to do about it, as far as its name and start tell."""

from __future__ import annotations

import re
import struct

from gguf_fuse.format.header import MAGIC

START_BYTES = 512  # of the file, that `complaint` wants

_AGAIN = "convert the original model with llama.cpp's convert_hf_to_gguf.py"
_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer to one; run git lfs pull"),
    (b"PK\3\4", f"a PyTorch checkpoint or another zip file; {_AGAIN}"),
    (b"\x80\2", f"a Python pickle, such as an old PyTorch checkpoint; {_AGAIN}"),
    # Magics of llama.cpp before GGUF, the bytes swapped as a file has them.
    (b"lmgg", f"a model of llama.cpp before GGUF (ggml); {_AGAIN}"),
    (b"fmgg", f"a model of llama.cpp before GGUF (ggmf); {_AGAIN}"),
    (b"tjgg", f"a model of llama.cpp before GGUF (ggjt); {_AGAIN}"),
    (b"algg", "a LoRA adapter of llama.cpp before GGUF (ggla); convert the original adapter with "
     "convert_lora_to_gguf.py"),
    (b"\x1f\x8b", "a gzip file; gunzip it first"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file; unzstd it first"),
    (b"\xfd7zXZ", "an xz file; unxz it first"),
)  # fmt: skip

# Pieces of one file by plain cutting: model.gguf.part1of2, model.gguf-split-a, model.gguf-part-a.
_PIECE = re.compile(r"(.*)(\.part-?[0-9]+-?of-?[0-9]+|[.-](?:split|part)-[a-z0-9]{1,3})", re.DOTALL)


def complaint(path: str, start: bytes) -> str:
    """Why a file that does not begin with MAGIC is not read. start: its first START_BYTES."""
    if not start:
        return f"not a GGUF file: it is empty; {again(path)}"
    if kind := _kind(start):
        return f"not a GGUF file but {kind}"
    problem = f"not a GGUF file: it begins with {start[:4]!r} instead of {MAGIC!r}"
    return f"{problem}; {again(path)}" if _PIECE.fullmatch(path) else problem


def again(path: str) -> str:
    """What to do about a file that is not whole."""
    match = _PIECE.fullmatch(path)
    if match is None:
        return "download or copy it again"
    return f"by its name it is one piece of {match[1]}: put all pieces together with cat"


def _kind(start: bytes) -> str | None:
    for begin, kind in _KINDS:
        if start.startswith(begin):
            return kind
    if start[8:10] == b'{"':  # behind the length of that header
        return f"a safetensors file; {_AGAIN}"
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page: the download failed; download it again, signed in if it must be"
    if text.startswith(b'{"'):
        return "a JSON text, perhaps a server's error; download it again"
    return _MATRIX if _is_old_matrix(start) else None


_MATRIX = (
    "an importance matrix of the old format; llama-imatrix --in-file OLD.dat -o NEW.gguf "
    "converts it"
)


def _is_old_matrix(start: bytes) -> bool:
    """The count of entries, then each one's length of the name and the name."""
    if len(start) < 8:
        return False
    count, length = struct.unpack_from("<ii", start)
    name = start[8 : 8 + max(length, 0)]
    return count > 0 and 0 < length < 64 and len(name) == length and b"." in name and name.isascii()
