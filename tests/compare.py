"""What two files must have in common, byte by byte and in llama.cpp."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.llama_judge import available, log_probabilities

needs_llama_cpp = pytest.mark.skipif(not available(), reason="xllamacpp is not installed")

PROMPT = [1, 261, 7, 300, 45, 46, 290, 12, 9, 270, 33]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def metadata(reader: gguf.GGUFReader) -> dict[str, Any]:
    """All that gguf-py sees, without the record of the fusion."""
    pseudo = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    return {
        key: field.contents()
        for key, field in reader.fields.items()
        if key not in pseudo and not key.startswith("gguf_fuse.")
    }


def assert_fused(original: Path, fused: Path) -> None:
    """gguf-py reads the same metadata, and data that is joined or untouched."""
    before, after = gguf.GGUFReader(original), gguf.GGUFReader(fused)
    assert metadata(before) == metadata(after)
    old = {tensor.name: tensor for tensor in before.tensors}
    for tensor in after.tensors:
        axis = 0
        if tensor.name in old:
            parts = [old.pop(tensor.name)]
        elif ".attn_qkv." in tensor.name:
            parts = [old.pop(tensor.name.replace("qkv", part)) for part in "qkv"]
        else:
            names = [tensor.name.replace("gate_up", part) for part in ("gate", "up")]
            parts, axis = [old.pop(name) for name in names], 1  # [n_expert, n_ff, n_embd]
        expected = [part.data for part in parts]
        if tensor.name.endswith("scale"):
            expected = expected[:1]
        assert {part.tensor_type for part in parts} == {tensor.tensor_type}
        joined = np.concatenate(expected, axis=axis) if len(expected) > 1 else expected[0]
        np.testing.assert_array_equal(tensor.data, joined)
    assert not old


def assert_judged_equal(original: Path, fused: Path) -> None:
    """llama.cpp's log-probabilities are the same, and no constants."""
    before, after = log_probabilities(original, PROMPT), log_probabilities(fused, PROMPT)
    assert np.isfinite(before).all()
    assert before.std() > 0.01
    np.testing.assert_array_equal(before, after)
