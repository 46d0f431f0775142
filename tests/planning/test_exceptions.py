"""Files where not every layer can be fused: hybrids, shared K and V, encoder-decoders, scales.

What is fused and what is left, llama.cpp's judgement, and the way back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from gguf_fuse import VerifyOptions, verify
from gguf_fuse.format.parser import read_header
from gguf_fuse.format.source import Segment
from gguf_fuse.planning import fuse as fusion
from gguf_fuse.planning.fusions import GATE_UP, QKV
from gguf_fuse.planning.loaders import ARCHITECTURES
from gguf_fuse.planning.plan import NothingToDo, Refused, Status
from tests.compare import PROMPT, assert_judged_equal, needs_llama_cpp, sha256
from tests.conftest import dry, fused_copy, unfused_copy
from tests.edit import edited, tensors_in
from tests.llama_judge import LoadFailed, available, log_probabilities
from tests.models.architectures import HRM_TEXT, LAYOUTS

Model = Callable[..., Path]


def assert_sound(original: Path, fused: Path) -> None:
    """The bytes by our checker, the way back, and llama.cpp's log-probabilities."""
    assert verify(original, fused, VerifyOptions(structure_only=True)).ok
    assert sha256(unfused_copy(fused)) == sha256(original)
    if available():
        assert_judged_equal(original, fused)


def found(path: Path, **kwargs: Any) -> dict[str, str | None]:
    """By layer: the reason why it is left, None where it is fused."""
    header = read_header(path)
    layers = fusion.examine(header, Segment.read, **kwargs)
    for layer in layers:
        assert (layer.status is Status.FUSABLE) == (layer.reason is None)
    return {layer.name: layer.reason for layer in layers}


# -- layer by layer ------------------------------------------------------------------------------

NO_V = "no attn_v.weight"
# Architecture, layers, and what is said of those that have Q, K or V at all.
LAYERED: dict[str, tuple[int, dict[str, str | None]]] = {
    # Full layers use K as V.
    "gemma4": (4, {"blk.0": None, "blk.1": NO_V, "blk.2": None, "blk.3": NO_V}),
    # The last two layers have Q, K and V, and use the K and V of others.
    "gemma3n": (22, {f"blk.{layer}": None for layer in range(22)}),
    "lfm2": (4, {"blk.0": None, "blk.2": None}),
    "jamba": (4, {"blk.1": None, "blk.3": None}),
    "qwen3next": (4, {"blk.1": None, "blk.3": None}),
    "qwen35": (4, {"blk.1": None, "blk.3": None}),
    "qwen35moe": (4, {"blk.1": None, "blk.3": None}),
    "falcon-h1": (2, {"blk.0": None, "blk.1": None}),
    "granitehybrid": (4, {"blk.1": None, "blk.3": None}),
    "nemotron_h": (6, {"blk.1": None, "blk.4": None}),
    # Head counts by layer; one layer is a single matrix.
    "deci": (3, {"blk.0": None, "blk.1": None}),
}


@pytest.mark.parametrize("type_", ["F32", "Q8_0"])
@pytest.mark.parametrize("architecture", LAYERED)
def test_layer_by_layer(model: Model, architecture: str, type_: str) -> None:
    n_layer, expected = LAYERED[architecture]
    # F32 in every file: what state spaces and the streams of gemma3n are made of.
    types = {"*": T[type_], "*.ssm_*": T.F32, "*.shortconv.conv*": T.F32, "*.altup*": T.F32}
    original = model(architecture=architecture, n_layer=n_layer, types=types)
    assert found(original) == expected
    fused = fused_copy(original)
    before, after = ({t.name for t in read_header(path).tensors} for path in (original, fused))
    made = {f"{layer}.attn_qkv.weight" for layer, reason in expected.items() if reason is None}
    gone = {name.replace("qkv", part) for name in made for part in "qkv"}
    assert (after - before, before - after) == (made, gone)
    assert_sound(original, fused)


@pytest.mark.parametrize("architecture", ["qwen35", "qwen3next"])
def test_recurrent_attn_qkv_stays(model: Model, architecture: str) -> None:
    original = model(architecture=architecture)
    recurrent = "blk.0.attn_qkv.weight"
    before, after = (
        {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
        for path in (original, fused_copy(original))
    )
    np.testing.assert_array_equal(before[recurrent], after[recurrent])


@pytest.mark.parametrize("present", [True, False], ids=["with K and V", "without"])
def test_gemma4_layers_that_share_k_and_v(model: Model, present: bool) -> None:
    """The last two of six layers use the K and V of others, whether they have their own or not."""
    shared = {"gemma4.attention.shared_kv_layers": 2}
    path = model(architecture="gemma4", n_layer=6, metadata=shared)
    if not present:
        names = {f"blk.{n}.attn_{part}.weight" for n in (4, 5) for part in ("k", "v", "k_norm")}
        path = edited(path, names)
    fused_layers = [layer for layer, reason in found(path).items() if reason is None]
    assert fused_layers == ["blk.0", "blk.2", "blk.4"][: 3 if present else 2]
    assert_sound(path, fused_copy(path))


def test_t5_is_refused(model: Model, tmp_path: Path) -> None:
    """Encoder and decoder: self-attention is found in both, and the loader wants it separate."""
    path = model(architecture="t5")
    reason = "llama.cpp's loader for t5 needs separate Q, K and V"
    layers = [f"{side}.blk.{n}" for side in ("dec", "enc") for n in range(2)]
    assert found(path) == dict.fromkeys(layers, reason)
    with pytest.raises(Refused, match="needs separate Q, K and V"):
        fused_copy(path)
    assert list(tmp_path.iterdir()) == [path]


# -- scales --------------------------------------------------------------------------------------

DIFFER = "scales differ: a fused tensor has one"
NVFP4 = {"*.attn_*.weight": T.NVFP4}


def equalize(path: Path, layer: int, suffix: str = "scale") -> None:
    """Give K and V of one layer the scale of Q, in the file."""
    with tensors_in(path) as scales:
        for part in "kv":
            scales[f"blk.{layer}.attn_{part}.{suffix}"][:] = scales[f"blk.{layer}.attn_q.{suffix}"]


def set_scale(path: Path, name: str, value: float) -> None:
    with tensors_in(path) as scales:
        scales[name][:] = value


@pytest.mark.parametrize("types", [{}, {"*": T.Q4_0}, NVFP4], ids=["F32", "Q4_0", "NVFP4"])
def test_equal_scales_are_fused(model: Model, types: dict[str, T]) -> None:
    original = model(scales="equal", input_scales="equal", types=types)
    fused = fused_copy(original)
    names = {tensor.name for tensor in read_header(fused).tensors}
    assert {"blk.0.attn_qkv.scale", "blk.0.attn_qkv.input_scale"} <= names
    assert_sound(original, fused)


@pytest.mark.parametrize("types", [{}, {"*": T.Q4_0}, NVFP4], ids=["F32", "Q4_0", "NVFP4"])
def test_unequal_scales_are_left(model: Model, types: dict[str, T]) -> None:
    """One layer is fused, the other one stays as it is."""
    original = model(scales="unequal", types=types)
    with pytest.raises(NothingToDo, match=DIFFER):
        dry(original)
    equalize(original, 1)
    assert found(original) == {"blk.0": DIFFER, "blk.1": None}
    assert_sound(original, fused_copy(original))


@pytest.mark.parametrize("types", [{}, NVFP4], ids=["F32", "NVFP4"])
def test_unequal_input_scales_are_left(model: Model, types: dict[str, T]) -> None:
    original = model(scales="equal", input_scales="unequal", types=types)
    equalize(original, 1, "input_scale")
    assert found(original) == {"blk.0": f"input_{DIFFER}", "blk.1": None}
    assert_sound(original, fused_copy(original))


def test_scales_are_equal_bit_for_bit_or_not(model: Model) -> None:
    """0.0 and -0.0 are equal numbers, and not the same scale."""
    original = model(scales="equal")
    for part, value in zip("qkv", (0.0, -0.0, 0.0), strict=True):
        set_scale(original, f"blk.0.attn_{part}.scale", value)
    assert found(original) == {"blk.0": DIFFER, "blk.1": None}


def test_nvfp4_without_scales(model: Model) -> None:
    original = model(types=NVFP4)
    assert found(original) == {"blk.0": None, "blk.1": None}
    assert_sound(original, fused_copy(original))


def test_nvfp4_experts(model: Model) -> None:
    """Gate and up have a scale for each expert; no loader reads one of the fused tensor."""
    types = {"*_exps.weight": T.NVFP4, **NVFP4}
    original = model(architecture="granite_swa", types=types, scales="equal")
    assert_sound(original, fused_copy(original, fusions=(QKV, GATE_UP)))


def test_scales_of_experts_are_left(model: Model) -> None:
    """Even equal ones: llama.cpp looks for them beside the separate weights only."""
    scales = np.linspace(0.5, 1.5, 4, dtype=np.float32)
    put = {f"blk.0.ffn_{part}_exps.scale": scales for part in ("gate", "up")}
    original = edited(model(architecture="qwen35moe"), set(), put)
    plan = dry(original, fusions=(QKV, GATE_UP)).plan
    assert [layer.label for layer in plan.changed] == ["blk.1", "blk.1.ffn_gate_up_exps"]
    (left,) = plan.skipped
    assert left.reason == "llama.cpp's loader for qwen35moe applies no fused scale"
    assert_sound(original, fused_copy(original, fusions=(QKV, GATE_UP)))


@needs_llama_cpp
def test_what_unequal_scales_would_do(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused all the same, K and V get the scale of Q: another model, and no error."""
    original = model(scales="unequal")
    monkeypatch.setattr(fusion, "_not_shared", lambda *arguments: None)
    assert_another_model(original, fused_copy(original))


@pytest.mark.parametrize("architecture", ["mimo2", "gemma3n"])
def test_loaders_that_apply_no_fused_scale(model: Model, architecture: str) -> None:
    original = model(architecture=architecture, scales="equal")
    reason = f"llama.cpp's loader for {architecture} applies no fused scale"
    assert set(found(original).values()) == {reason}
    with pytest.raises(NothingToDo, match=reason):
        dry(original)
    without_scales = model("without.gguf", architecture=architecture)
    assert_sound(without_scales, fused_copy(without_scales))


@needs_llama_cpp
@pytest.mark.parametrize(("architecture", "layer"), [("mimo2", 0), ("gemma3n", 20)])
def test_what_those_loaders_do_with_separate_scales(
    model: Model, architecture: str, layer: int
) -> None:
    """They apply these as little, so that fusing would change nothing today. Once this fails,
    leaving such layers alone is what keeps them right.
    """
    original = model(architecture=architecture, scales="equal")
    before = log_probabilities(original, PROMPT)
    set_scale(original, f"blk.{layer}.attn_q.scale", 3.0)
    np.testing.assert_array_equal(log_probabilities(original, PROMPT), before)


@needs_llama_cpp
@pytest.mark.parametrize("layer", [0, 1])
def test_scales_of_layers_that_stand_for_others(
    model: Model, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    """hrm_text's loader seeks the second block's scales by the form of the first: with one of the
    two fused it finds too few tensors, so that a mixed file must stay as it is.
    """
    monkeypatch.setitem(LAYOUTS, "hrm_text", HRM_TEXT)
    types = {f"blk.{layer}.attn_v.weight": T.F16}
    without_scales = model(architecture="hrm_text", types=types)
    assert_sound(without_scales, fused_copy(without_scales))
    original = model("scales.gguf", architecture="hrm_text", types=types, scales="equal")
    assert np.isfinite(log_probabilities(original, PROMPT)).all()
    with pytest.raises(NothingToDo, match="loader for hrm_text applies no fused scale"):
        fused_copy(original)
    row = ARCHITECTURES["hrm_text"]
    monkeypatch.setitem(ARCHITECTURES, "hrm_text", replace(row, qkv=replace(row.qkv, scales=True)))
    with pytest.raises(LoadFailed, match="wrong number of tensors"):
        log_probabilities(fused_copy(original), PROMPT)


def assert_another_model(original: Path, fused: Path) -> None:
    """llama.cpp computes something else, or refuses the file, or crashes on it."""
    before = log_probabilities(original, PROMPT)
    try:
        after = log_probabilities(fused, PROMPT)
    except LoadFailed:
        return
    assert not np.array_equal(before, after)
