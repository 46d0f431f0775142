"""Pairs of files that several test files of verify need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as T

from tests.conftest import fused_copy
from tests.models.random_model import ModelSpec, write_random_model
from tests.verifying.faults import Contents, Fault

Model = Callable[..., Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    original = tmp_path_factory.mktemp("pair") / "in.gguf"
    write_random_model(original, ModelSpec("qwen2", types={"*": T.Q8_0}))
    return original, fused_copy(original)


@pytest.fixture
def tampered(model: Model) -> Callable[..., tuple[Path, Path]]:
    """A file and its fused copy with a fault in it."""

    def make(fault: Fault, **spec: Any) -> tuple[Path, Path]:
        original = model(**({"architecture": "qwen2", "scales": "equal"} | spec))
        contents = Contents.of(fused_copy(original))
        fault(contents)
        return original, contents.write()

    return make
