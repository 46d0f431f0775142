"""Values of tensors, and what cannot be had; `test_reading` compares types and byte orders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as T

from gguf_fuse.format.header import Header, TensorInfo
from gguf_fuse.format.parser import read_header
from gguf_fuse.format.source import GGUFError
from gguf_fuse.models.dequantize import dequantized, read_values

Model = Callable[..., Path]

NAME = "blk.0.attn_q.weight"


def test_what_is_not_there_has_no_values(model: Model) -> None:
    assert read_values(read_header(model()), "blk.0.attn_x.weight") is None


@pytest.mark.parametrize(("tensor_type", "name"), [(T.Q8_1, "Q8_1"), (142, "type 142")])
def test_types_that_gguf_py_cannot_dequantize(tensor_type: int, name: str, model: Model) -> None:
    header = read_header(model())
    tensor = replace(_tensor(header), type=int(tensor_type))
    with pytest.raises(GGUFError, match=rf"'{NAME}': gguf-py cannot dequantize {name}$"):
        dequantized(header, tensor, bytes(tensor.n_bytes))


def test_data_that_ends_early(model: Model) -> None:
    """As if the file had been cut and its time set back: the header says more than there is."""
    header = read_header(model())
    tensor = _tensor(header)
    beyond = replace(tensor, data=tensor.data._replace(n_bytes=header.file_bytes))
    with pytest.raises(GGUFError, match=r"ended at byte .*: it was cut while it was read"):
        beyond.read()


def _tensor(header: Header) -> TensorInfo:
    return next(tensor for tensor in header.tensors if tensor.name == NAME)
