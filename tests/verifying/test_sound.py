"""What is right passes, and what cannot be computed is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as T

from gguf_fuse.verifying.layers import parse_layers
from tests.conftest import fused_copy, gguf_fuse, unfused_copy
from tests.models.architectures import LAYOUTS
from tests.models.extra_layouts import ENCODERS
from tests.verifying.faults import CHECKS, Contents, check

Model = Callable[..., Path]


@pytest.mark.parametrize("tensor_type", [T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_0])
def test_types_pass(model: Model, tensor_type: T) -> None:
    original = model(types={"*": tensor_type})
    report = check(original, fused_copy(original))
    assert report.ok
    assert report.structure.n_fused == len(report.layers) == 2
    assert all(set(layer.checks) == CHECKS and layer.note is None for layer in report.layers)


@pytest.mark.parametrize(
    ("architecture", "spec"),
    [
        ("llama", {"n_head_kv": 1, "rope_freqs": True}),
        ("llama", {"scales": "equal", "rope_scaling": "yarn"}),
        ("llama", {"key_length": 24, "value_length": 8}),
        ("llama", {"big_endian": True}),
        ("llama", {"n_layer": 1, "n_head_kv": 4, "alignment": 64}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma2", {}),
        ("gemma3", {}),
        ("gpt-oss", {}),
        ("stablelm", {}),
        ("olmo", {}),
        ("refact", {}),
        ("qwen35", {}),
    ],
)
def test_architectures_pass(model: Model, architecture: str, spec: dict[str, Any]) -> None:
    original = model(architecture=architecture, **spec)
    report = check(original, fused_copy(original))
    assert report.ok
    computed = [layer for layer in report.layers if layer.note is None]
    assert computed
    assert all(set(layer.checks) == CHECKS for layer in computed)


@pytest.mark.parametrize("architecture", ENCODERS)
def test_encoders_pass(model: Model, monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    """As they are, with norms behind attention and feed-forward; and fused."""
    monkeypatch.setitem(LAYOUTS, architecture, ENCODERS[architecture])
    original = model(architecture=architecture)
    copy = original.with_name("copy.gguf")
    shutil.copy(original, copy)
    for other in (copy, fused_copy(original)):
        report = check(original, other)
        assert report.ok
        assert all(set(layer.checks) == CHECKS for layer in report.layers)


def test_layers_that_were_skipped_are_computed_as_well(model: Model) -> None:
    original = model(n_layer=3, types={"*": T.F16, "blk.1.attn_v.weight": T.F32})
    report = check(original, fused_copy(original))
    assert report.ok
    assert report.structure.n_fused == 2
    assert [layer.layer for layer in report.layers] == ["blk.0", "blk.1", "blk.2"]


def test_equal_and_restored_files_pass(model: Model) -> None:
    original = model(architecture="qwen2")
    restored = unfused_copy(fused_copy(original))
    for other in (copy_of(original), restored):
        report = check(original, other)
        assert report.ok
        assert report.structure.n_fused == 0
        assert len(report.layers) == 2


def copy_of(path: Path) -> Path:
    return Path(shutil.copy(path, path.with_name("copy.gguf")))


def test_a_type_that_nobody_knows_is_not_computed(model: Model) -> None:
    contents = Contents.of(model())
    ne, _, data = contents.tensors["blk.1.attn_q.weight"]
    contents.tensors["blk.1.attn_q.weight"] = (ne, 142, data)
    original = contents.write()
    report = check(original, fused_copy(original))
    assert report.ok
    known, unknown = report.layers
    assert (set(known.checks), known.note, unknown.checks) == (CHECKS, None, {})
    reason = "tensor 'blk.1.attn_q.weight': gguf-py cannot dequantize type 142"
    assert unknown.note == f"numbers not computed: {reason}"


def test_attention_that_is_not_modelled_is_marked(model: Model) -> None:
    original = model(architecture="bitnet")
    fused = fused_copy(original, any_architecture=True)
    report = check(original, fused)
    assert report.ok
    for layer in report.layers:
        assert set(layer.checks) == {"projection"}
        assert "not modelled" in (layer.note or "")
    printed = gguf_fuse("verify", original, fused).stdout
    assert "attention computed PARTLY, in none of 2 layers (projections alone in 2)" in printed
    assert "attention not modelled" in printed


@pytest.mark.parametrize(
    ("architecture", "checks", "others"),
    [
        ("qwen35", CHECKS, ["blk.0", "blk.2"]),  # linear attention
        ("jamba", {"projection"}, ["blk.0", "blk.2"]),  # state spaces
        ("deepseek2", set(), ["blk.0", "blk.1", "blk.2", "blk.3"]),  # MLA
    ],
)
def test_layers_without_known_attention_are_named(
    model: Model, architecture: str, checks: set[str], others: list[str]
) -> None:
    original = model(architecture=architecture, n_layer=4)
    files = original, copy_of(original)
    report = check(*files)
    assert report.ok
    assert [layer.layer for layer in report.layers if not layer.checks] == others
    for layer in report.layers:
        assert set(layer.checks) == (set() if layer.layer in others else checks)
        assert layer.checks or "no Q, K and V of its own" in (layer.note or "")
    printed = gguf_fuse("verify", *files, "--verbose").stdout
    n_computed = 4 - len(others)
    assert f"PARTLY numbers: {n_computed} layers computed" in printed
    assert f"{len(others)} not" in printed


def test_layers_without_known_attention_are_no_matter_where_layers_are_chosen(model: Model) -> None:
    original = model(architecture="qwen35", n_layer=4)
    files = original, copy_of(original)
    (report,) = check(*files, layers=parse_layers("1")).layers
    assert (report.layer, report.note, set(report.checks)) == ("blk.1", None, CHECKS)
    printed = gguf_fuse("verify", *files, "--layers", "1").stdout
    assert "attention computed in 1 of 4 layers, largest error " in printed
