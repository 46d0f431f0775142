"""What a caller in Python may ask for: anything else is refused before a file is opened."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf_fuse
from gguf_fuse.verifying.report import Choice
from tests.conftest import fused_copy

NO_COUNTS = (0, -1, 1.0, math.nan, math.inf, "2", None, True, 10**30)


@pytest.mark.parametrize("value", NO_COUNTS)
@pytest.mark.parametrize("option", ["n_prompt", "n_decode", "n_seqs", "n_kv", "threads"])
def test_counts_of_verify(option: str, value: Any) -> None:
    with pytest.raises(gguf_fuse.GGUFError, match=f"^{option} is .*; it must be a whole number, 1"):
        gguf_fuse.VerifyOptions(**{option: value})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": -1}, "seed is -1; it must be a whole number, 0 to "),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"layers": "0,1"}, "layers is '0,1'; it must be a Choice"),
    ],
)
def test_other_options_of_verify(options: dict[str, Any], words: str) -> None:
    with pytest.raises(gguf_fuse.GGUFError, match=words):
        gguf_fuse.VerifyOptions(**options)


@pytest.mark.parametrize("choice", [{"numbers": frozenset({-1})}, {"spread": 0}])
def test_layers_that_nobody_has(choice: dict[str, Any]) -> None:
    with pytest.raises(gguf_fuse.GGUFError, match="layers is "):
        Choice(**choice)


@pytest.mark.parametrize("value", [v for v in NO_COUNTS if v not in (None, 10**30)])
@pytest.mark.parametrize("option", ["threads", "split_max_size", "split_max_tensors"])
def test_counts_of_fuse(option: str, value: Any) -> None:
    with pytest.raises(gguf_fuse.GGUFError, match=f"^{option} is .*; it must be a whole number, 1"):
        gguf_fuse.Options(**{option: value})


@pytest.mark.parametrize("value", ["sometimes", None, 1, ["auto"]])
def test_words_of_fuse(value: Any, packed: Path) -> None:
    with pytest.raises(gguf_fuse.GGUFError, match=r"reflink is .*; it must be one of auto, always"):
        gguf_fuse.Options(reflink=value)
    with pytest.raises(
        gguf_fuse.GGUFError, match=r"on_mismatch is .*; it must be one of skip, err"
    ):
        gguf_fuse.fuse(packed, packed.with_name("out.gguf"), on_mismatch=value)
    assert [path.name for path in packed.parent.iterdir()] == ["in.gguf"]


def test_paths_of_verify(packed: Path) -> None:
    """Any path that fuse takes; what cannot be one fails as what is not there."""
    fused = fused_copy(packed)
    options = gguf_fuse.VerifyOptions(structure_only=True)
    for original, other in ((packed, str(fused)), (str(packed), fused)):
        assert gguf_fuse.verify(original, other, options).ok
    for missing in ("absent.gguf", "zero\0byte.gguf", str(packed.parent), ""):
        with pytest.raises(gguf_fuse.GGUFError):
            gguf_fuse.verify(packed, missing, options)


def test_numbers_of_numpy_are_numbers(packed: Path) -> None:
    gguf_fuse.Options(threads=np.int64(2))  # type: ignore[arg-type, unused-ignore]
    options = gguf_fuse.VerifyOptions(n_prompt=np.int32(3), structure_only=True)  # type: ignore[arg-type, unused-ignore]
    report = gguf_fuse.verify(str(packed), fused_copy(packed), options)
    assert report.ok
