"""demo: what it does, and its model."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from gguf_fuse.cli.demo_model import write_demo_model
from tests.compare import PROMPT, needs_llama_cpp
from tests.conftest import fused_copy, gguf_fuse
from tests.llama_judge import log_probabilities


@needs_llama_cpp
def test_llama_cpp_loads_its_model_and_computes_the_same_when_it_is_fused(tmp_path: Path) -> None:
    original = tmp_path / "model.gguf"
    write_demo_model(original)
    before = log_probabilities(original, PROMPT)
    assert np.isfinite(before).all()
    assert before.std() > 0.01
    np.testing.assert_array_equal(before, log_probabilities(fused_copy(original), PROMPT))


def test_its_model_is_always_the_same(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write_demo_model(tmp_path / name)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_weights_of_its_model_keep_the_length_of_what_they_multiply(tmp_path: Path) -> None:
    write_demo_model(tmp_path / "model.gguf")
    for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        if len(tensor.shape) == 2:
            weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert abs(weights.std() * weights.shape[1] ** 0.5 - 1) < 0.05
            assert abs(weights.mean()) < 0.1 * weights.std()


def test_demo_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"precious")
    done = gguf_fuse("demo", "--keep", tmp_path)
    assert done.returncode == 1
    assert "exists already" in done.stderr
    assert (tmp_path / "model.gguf").read_bytes() == b"precious"


def test_demo_in_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    done = gguf_fuse("demo", "--keep", tmp_path / "file" / "folder")
    assert done.returncode == 1
    assert done.stderr == f"gguf-fuse: {tmp_path}/file/folder: Not a directory\n"
