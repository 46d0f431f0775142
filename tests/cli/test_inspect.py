"""inspect, as a script meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from gguf import GGMLQuantizationType as T

from tests.conftest import fused_copy, gguf_fuse

Model = Callable[..., Path]


def statuses(path: Path) -> tuple[str, list[str]]:
    said = json.loads(gguf_fuse("inspect", path, "--json").stdout)
    assert (said["input"], said["gguf_version"]) == (str(path), 3)
    assert said["bytes_in"] == path.stat().st_size
    return said["loader"], [layer["status"] for layer in said["layers"]]


def test_json_of_inspect(model: Model) -> None:
    mixed = {"*": T.Q4_K, "blk.0.attn_v.weight": T.Q6_K}
    original = model(n_embd=256, types=mixed)
    assert statuses(original) == ("reads fused", ["not fusable", "fusable"])
    assert statuses(fused_copy(original)) == ("reads fused", ["not fusable", "fused"])
    assert statuses(model(architecture="bitnet")) == ("needs separate", ["separate", "separate"])
    unknown = model(metadata={"general.architecture": "of-tomorrow"})
    assert statuses(unknown) == ("unknown", ["separate", "separate"])
