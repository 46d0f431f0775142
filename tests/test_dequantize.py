"""Values of tensors, and what cannot be had; `test_layer` compares types and byte orders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as T

from gguf_fuse.dequantize import dequantized, read_values
from gguf_fuse.gguf_file import GGUFError, Header, TensorInfo, read_header

Model = Callable[..., Path]

NAME = "blk.0.attn_q.weight"


def test_what_is_not_there_has_no_values(model: Model) -> None:
    assert read_values(read_header(model()), "blk.0.attn_x.weight") is None


@pytest.mark.parametrize(("kind", "name"), [(T.Q8_1, "Q8_1"), (142, "type 142")])
def test_types_that_gguf_py_cannot_dequantize(kind: int, name: str, model: Model) -> None:
    header = read_header(model())
    tensor = replace(_tensor(header), type=int(kind))
    with pytest.raises(GGUFError, match=rf"'{NAME}': gguf-py cannot dequantize {name}$"):
        dequantized(header, tensor, bytes(tensor.n_bytes))


def test_data_that_ends_early(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut between the look at its size and the reading."""
    monkeypatch.setattr("gguf_fuse.dequantize.read_tensors", lambda _, names: {NAME: b"1234"})
    with pytest.raises(GGUFError, match=rf"'{NAME}' ends early: the file has changed$"):
        read_values(read_header(model()), NAME)


def _tensor(header: Header) -> TensorInfo:
    return next(tensor for tensor in header.tensors if tensor.name == NAME)
