"""Gate and up of experts in one tensor, expert by expert: the data, the reasons, the way back,
and llama.cpp's judgement.
"""

from __future__ import annotations

import json
import re
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from gguf_fuse import VerifyOptions, verify
from gguf_fuse.format.parser import read_header
from gguf_fuse.format.source import GGUFError, Segment
from gguf_fuse.planning import fuse as fusion
from gguf_fuse.planning import unfuse as unfusion
from gguf_fuse.planning.fusions import FUSIONS, GATE_UP, QKV, Fusion
from gguf_fuse.planning.loaders import ARCHITECTURES, Loader
from gguf_fuse.planning.plan import NothingToDo, Plan, Refused, Status
from gguf_fuse.writing.place import place
from tests.compare import PROMPT, assert_fused, assert_judged_equal, needs_llama_cpp, sha256
from tests.conftest import dry, fused_copy, gguf_fuse, unfused_copy
from tests.edit import bytes_of, edited, tensors_in, zeros
from tests.llama_judge import LoadFailed, available, log_probabilities
from tests.server import Run

Model = Callable[..., Path]

READERS = sorted(n for n, row in ARCHITECTURES.items() if row.gate_up.loader is Loader.READS_FUSED)
# What stays F32 in every file of that architecture.
F32_ALWAYS = {"*.ssm_*": T.F32, "*hc_*": T.F32}
TYPES = {"F32": T.F32, "F16": T.F16, "Q8_0": T.Q8_0, "Q4_0": T.Q4_0}
BOTH = (QKV, GATE_UP)
FUSIONS_TO_MAKE = {"gate and up": (GATE_UP,), "both": BOTH}


def experts(architecture: str = "qwen35moe", **spec: Any) -> dict[str, Any]:
    """A model with experts that its loader reads fused."""
    return {"architecture": architecture, "n_expert": 4, **spec}


# -- data and the way back -----------------------------------------------------------------------


@pytest.mark.parametrize("fusions", FUSIONS_TO_MAKE.values(), ids=FUSIONS_TO_MAKE.keys())
@pytest.mark.parametrize("architecture", READERS)
def test_fuse_and_way_back(model: Model, architecture: str, fusions: tuple[Fusion, ...]) -> None:
    original = model(**experts(architecture))
    fused = fused_copy(original, fusions=fusions)
    assert_fused(original, fused)
    assert any(".ffn_gate_up_exps." in t.name for t in gguf.GGUFReader(fused).tensors)
    assert sha256(unfused_copy(fused)) == sha256(original)


@pytest.mark.parametrize("type_", [T.F16, T.Q8_0, T.Q4_0, T.Q4_K, T.IQ4_XS, T.MXFP4])
def test_types(model: Model, type_: T) -> None:
    original = model(**experts("granite_swa", n_embd=256, types={"*": type_}))
    fused = fused_copy(original, fusions=BOTH)
    assert_fused(original, fused)
    assert sha256(unfused_copy(fused)) == sha256(original)


def test_big_endian_and_alignment(model: Model) -> None:
    original = model(**experts("hy_v3", big_endian=True, alignment=64))
    fused = fused_copy(original, fusions=BOTH)
    assert sha256(unfused_copy(fused)) == sha256(original)


def test_segments_alternate(model: Model) -> None:
    path = model(**experts("granite_swa", n_expert=3, n_layer=1))
    plan = dry(path, fusions=(GATE_UP,)).plan
    header = read_header(path)
    place_of = {tensor.name: header.data_start + tensor.offset for tensor in header.tensors}
    (made,) = (tensor for tensor in plan.tensors if "gate_up" in tensor.name)
    assert made.ne == (64, 256, 3)
    n_bytes = 64 * 128 * 4  # of one expert
    gate, up = place_of["blk.0.ffn_gate_exps.weight"], place_of["blk.0.ffn_up_exps.weight"]
    expected = [start + at * n_bytes for at in range(3) for start in (gate, up)]
    assert [segment.start for segment in made.segments] == expected
    assert {segment.n_bytes for segment in made.segments} == {n_bytes}


def record_version(path: Path) -> int:
    return int(read_header(path).metadata["gguf_fuse.version"])


def test_only_files_with_fused_experts_need_a_new_release(model: Model) -> None:
    """Q, K and V alone are recorded as before, so that version 0.1 can unfuse them."""
    path = model(**experts())
    assert record_version(fused_copy(path)) == 1
    for fusions in FUSIONS_TO_MAKE.values():
        assert record_version(fused_copy(model("other.gguf", **experts()), fusions=fusions)) == 2
        path.with_name("other-fused.gguf").unlink()


def test_fused_twice_is_refused_with_the_way_out(model: Model) -> None:
    fused = fused_copy(model(**experts()))
    with pytest.raises(NothingToDo, match=r"unfuse it and give .*qkv.* and .*gate-up-exps at once"):
        dry(fused, fusions=(GATE_UP,))


def test_beside_attention_that_the_converter_fused(model: Model) -> None:
    original = model(**experts("granite_swa", fused=True))
    fused = fused_copy(original, fusions=BOTH)
    assert verify(original, fused).ok
    assert sha256(unfused_copy(fused)) == sha256(original)


# -- the way back without a record ---------------------------------------------------------------


def test_without_a_record_experts_are_halved(model: Model) -> None:
    original = model(**experts("qwen4exp", types={"*_exps.weight": T.Q8_0}))
    converted = edited(fused_copy(original, fusions=(GATE_UP,)), record=False)
    assert "gguf_fuse.version" not in read_header(converted).metadata
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(original).tensors}
    for tensor in gguf.GGUFReader(unfused_copy(converted)).tensors:
        np.testing.assert_array_equal(tensor.data, expected.pop(tensor.name).data)
    assert not expected


def test_odd_rows_are_not_halved(model: Model) -> None:
    fused = fused_copy(model(**experts("qwen4exp", n_layer=1)), fusions=(GATE_UP,))
    odd = {"blk.0.ffn_gate_up_exps.weight": zeros(4, 255, 64)}
    converted = edited(fused, put=odd, record=False)
    with pytest.raises(Refused, match="255 rows, an odd number"):
        unfused_copy(converted)


def test_too_many_experts_are_not_split(model: Model) -> None:
    fused = fused_copy(model(**experts("qwen4exp", n_layer=1)), fusions=(GATE_UP,))
    many = {"blk.0.ffn_gate_up_exps.weight": zeros(4097, 2, 1)}
    converted = edited(fused, put=many, record=False)
    words = (
        r"edited\.gguf: tensor 'blk\.0\.ffn_gate_up_exps\.weight' has 4097 experts; at most 4096"
    )
    with pytest.raises(Refused, match=words):
        unfused_copy(converted)


def test_without_a_record_and_reader_it_is_refused(model: Model) -> None:
    fused = fused_copy(model(**experts("granite_swa")), fusions=(GATE_UP,))
    converted = edited(fused, architecture="qwen3moe", record=False)
    with pytest.raises(Refused, match="needs separate gate and up of experts"):
        unfused_copy(converted)


# -- what is left, and why -----------------------------------------------------------------------


def found(path: Path, **kwargs: Any) -> list[tuple[Status, str | None]]:
    header = read_header(path)
    layers = fusion.examine(header, Segment.read, fusions=(GATE_UP,), **kwargs)
    return [(layer.status, layer.reason) for layer in layers]


GATE, UP = "blk.0.ffn_gate_exps", "blk.0.ffn_up_exps"
NO_BIAS = "llama.cpp's loader for granite_swa adds no fused bias"
LEFT: dict[str, tuple[set[str], dict[str, Any], str]] = {
    "no gate": ({f"{GATE}.weight"}, {}, "no ffn_gate_exps.weight"),
    "types": (
        set(),
        {f"{UP}.weight": zeros(4, 128, 64, dtype=np.float16)},
        "types differ: F32, F16",
    ),
    "rows": (
        set(),
        {f"{UP}.weight": zeros(4, 64, 64)},
        "dimensions differ: [64, 128, 4], [64, 64, 4]",
    ),
    "experts": (
        set(),
        {f"{UP}.weight": zeros(3, 128, 64)},
        "dimensions differ: [64, 128, 4], [64, 128, 3]",
    ),
    "row lengths": (set(), {f"{UP}.weight": zeros(4, 128, 32)}, "row lengths differ: 64, 32"),
    "dimensions": (
        set(),
        {f"{GATE}.weight": zeros(128, 64)},
        "blk.0.ffn_gate_exps.weight has 2 dimensions, not 3",
    ),
    "one bias": (
        set(),
        {f"{UP}.bias": zeros(4, 128)},
        "no ffn_gate_exps.bias beside the other bias",
    ),
    "biases": (set(), {f"{GATE}.bias": zeros(4, 128), f"{UP}.bias": zeros(4, 128)}, NO_BIAS),
    "scales": (
        set(),
        {f"{GATE}.scale": zeros(4), f"{UP}.scale": zeros(4)},
        "llama.cpp's loader for granite_swa applies no fused scale",
    ),
    "a scale of one": (
        set(),
        {f"{UP}.scale": zeros(4)},
        "no ffn_gate_exps.scale beside the other scale",
    ),
    "input scales": (
        set(),
        {f"{GATE}.input_scale": zeros(4), f"{UP}.input_scale": zeros(4)},
        "llama.cpp's loader for granite_swa applies no fused input_scale",
    ),
    "fused beside separate": (
        set(),
        {"blk.0.ffn_gate_up_exps.weight": zeros(4, 256, 64)},
        "ffn_gate_up_exps.weight is there already",
    ),
    "a clamp": (
        set(),
        {f"{GATE}.input_max": zeros(1)},
        "ffn_gate_exps.input_max would have no place beside ffn_gate_up_exps",
    ),
    "too many experts": (
        set(),
        {f"{name}.weight": zeros(4097, 1, 1) for name in (GATE, UP)},
        "4097 experts; at most 4096 are supported",
    ),
}


@pytest.mark.parametrize(("drop", "put", "reason"), LEFT.values(), ids=LEFT.keys())
def test_layer_is_left_with_the_reason(
    model: Model, drop: set[str], put: dict[str, Any], reason: str
) -> None:
    original = edited(model(**experts("granite_swa")), drop, put)
    assert [why for _, why in found(original)] == [reason, None]
    fused = fused_copy(original, fusions=(GATE_UP,))
    assert_fused(original, fused)
    assert sha256(unfused_copy(fused)) == sha256(original)


def test_trailing_ones_are_nothing(model: Model) -> None:
    original = model(**experts("granite_swa"))
    header, put = read_header(original), {}
    for tensor in header.tensors:
        if ".ffn_gate_exps." in tensor.name or ".ffn_up_exps." in tensor.name:
            values = np.frombuffer(tensor.read(), np.float32)
            put[tensor.name] = values.reshape(1, *tensor.ne[::-1])
    original = edited(original, put=put)
    fused = fused_copy(original, fusions=(GATE_UP,))
    plain = read_header(model("plain.gguf", **experts("granite_swa"))).by_name
    made = read_header(fused).by_name["blk.0.ffn_gate_up_exps.weight"]
    n_embd, n_rows, n_experts = plain["blk.0.ffn_gate_exps.weight"].ne
    assert made.ne == (n_embd, 2 * n_rows, n_experts, 1)
    assert sha256(unfused_copy(fused)) == sha256(original)


def test_bias_shapes(model: Model) -> None:
    source = model(architecture="gpt-oss")
    put = {f"{name}.bias": zeros(4, 127) for name in (GATE, UP)}
    (_, why), _ = found(edited(source, put=put), any_architecture=True)
    assert why == "biases of 127, 127 elements for 128, 128 rows"
    put = {f"{name}.bias": zeros(3, 128) for name in (GATE, UP)}
    (_, why), _ = found(edited(source, put=put), any_architecture=True)
    assert why == "biases of 3 experts for 4"


def test_mismatch_error_writes_nothing(model: Model, tmp_path: Path) -> None:
    original = model(**experts("granite_swa", types={UP + ".weight": T.F16}))
    reason = r"blk\.0\.ffn_gate_up_exps: types differ: F32, F16"
    with pytest.raises(Refused, match=reason):
        fused_copy(original, fusions=BOTH, on_mismatch="error")
    assert list(tmp_path.iterdir()) == [original]


@pytest.mark.parametrize("architecture", ["qwen3moe", "gpt-oss"])
def test_loaders_that_need_them_separate(model: Model, architecture: str) -> None:
    """Refused alone; beside Q, K and V only left. --any-architecture joins biases as well."""
    original = model(architecture=architecture)
    words = "needs separate gate and up of experts"
    with pytest.raises(Refused, match=f"{architecture}.*{words}.*--any-architecture"):
        dry(original, fusions=(GATE_UP,))
    plan = dry(original, fusions=BOTH).plan
    assert [layer.fusion for layer in plan.changed] == [QKV, QKV]
    assert [layer.status for layer in plan.skipped] == [Status.SEPARATE] * 2
    fused = fused_copy(original, fusions=BOTH, any_architecture=True)
    assert_fused(original, fused)
    assert sha256(unfused_copy(fused)) == sha256(original)
    assert verify(original, fused, VerifyOptions(structure_only=True)).ok
    if available():
        with pytest.raises(LoadFailed, match=r"ffn_gate_exps\.weight' not found"):
            log_probabilities(fused, PROMPT)


def test_unknown_architecture(model: Model) -> None:
    path = model(**experts("granite_swa", metadata={"general.architecture": "moe-of-tomorrow"}))
    with pytest.raises(Refused, match="is not known to read fused gate and up of experts"):
        dry(path, fusions=(GATE_UP,))


def test_no_experts(model: Model) -> None:
    with pytest.raises(NothingToDo, match="no layer has ffn_gate_exps or ffn_up_exps"):
        dry(model(), fusions=(GATE_UP,))


# -- llama.cpp -----------------------------------------------------------------------------------


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("architecture", READERS)
def test_identical_log_probabilities(model: Model, architecture: str, type_: str) -> None:
    original = model(**experts(architecture, types={"*": TYPES[type_], **F32_ALWAYS}))
    assert_judged_equal(original, fused_copy(original, fusions=BOTH))


@needs_llama_cpp
def test_gate_and_up_alone(model: Model) -> None:
    original = model(**experts())
    assert_judged_equal(original, fused_copy(original, fusions=(GATE_UP,)))


@needs_llama_cpp
def test_the_judge_tells_gate_from_up(model: Model) -> None:
    original = model(**experts())
    fused = fused_copy(original, fusions=(GATE_UP,))
    swap_halves(fused)
    before, after = log_probabilities(original, PROMPT), log_probabilities(fused, PROMPT)
    assert not np.array_equal(before, after)


# -- verify --------------------------------------------------------------------------------------


def edit_experts(path: Path, layer: int, edit: Callable[[Any], None]) -> None:
    """Change the fused weight in the file, [n_expert, 2 * n_ff, row bytes or elements]."""
    with tensors_in(path) as tensors:
        edit(tensors[f"blk.{layer}.ffn_gate_up_exps.weight"])


def swap_halves(path: Path) -> None:
    def swap(data: Any) -> None:
        data[:] = np.roll(data, data.shape[1] // 2, axis=1)

    edit_experts(path, 0, swap)


def problems(original: Path, fused: Path) -> list[str]:
    return list(verify(original, fused, VerifyOptions(structure_only=True)).structure.problems)


def test_verify_passes(model: Model) -> None:
    original = model(**experts())
    report = verify(original, fused_copy(original, fusions=BOTH))
    assert report.ok
    assert (report.structure.n_fused, report.structure.n_fused_experts) == (1, 2)


@pytest.mark.parametrize("type_", [T.F32, T.Q8_0])
def test_verify_names_a_flipped_bit(model: Model, type_: T) -> None:
    original = model(**experts(types={"*_exps.weight": type_}))
    fused = fused_copy(original, fusions=BOTH)

    def flip(data: Any) -> None:
        data.view(np.uint8)[2, 128 + 5, 7] ^= 4  # expert 2, row 5 of up

    edit_experts(fused, 1, flip)
    (problem,) = problems(original, fused)
    name = "blk.1.ffn_gate_up_exps.weight: ffn_up_exps of expert 2"
    assert problem.startswith(f"{name} differs in row 5 (byte ")


def test_verify_names_swapped_gate_and_up(model: Model) -> None:
    original = model(**experts())
    fused = fused_copy(original, fusions=BOTH)
    swap_halves(fused)
    name = "blk.0.ffn_gate_up_exps.weight"
    assert [problem.partition(" differs")[0] for problem in problems(original, fused)] == [
        f"{name}: {part} of expert {expert}"
        for expert in range(4)
        for part in ("ffn_gate_exps", "ffn_up_exps")
    ]


def test_verify_names_swapped_experts(model: Model) -> None:
    original = model(**experts())
    fused = fused_copy(original, fusions=(GATE_UP,))

    def swap(data: Any) -> None:
        data[[1, 2]] = data[[2, 1]]

    edit_experts(fused, 1, swap)
    assert {problem.split(" differs")[0][-8:] for problem in problems(original, fused)} == {
        "expert 1",
        "expert 2",
    }


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((128, 64), "is fused, but the original's parts have no experts"),
        ((4097, 1, 1), "4097 experts; at most 4096 can be compared"),
    ],
)
def test_verify_names_experts_that_cannot_be_compared(
    model: Model, shape: tuple[int, ...], problem: str
) -> None:
    original = model(**experts("granite_swa"))
    fused = fused_copy(original, fusions=(GATE_UP,))
    other = edited(original, put={f"{name}.weight": zeros(*shape) for name in (GATE, UP)})
    assert f"blk.0.ffn_gate_up_exps.weight: {problem}" in problems(other, fused)


@pytest.mark.parametrize(("old", "new"), [(128, 127), (2, 3)], ids=["rows", "version"])
def test_a_wrong_record_is_named(model: Model, old: int, new: int) -> None:
    original = model(**experts("granite_swa", n_layer=1))
    fused = fused_copy(original, fusions=(GATE_UP,))
    key = b"gguf_fuse.rows" if old == 128 else b"gguf_fuse.version"
    with bytes_of(fused) as data:
        at = data.index(key) + len(key) + (16 if old == 128 else 4)
        assert data[at] == old
        data[at] = new
    (problem,) = problems(original, fused)
    assert "gguf_fuse." in problem
    with pytest.raises(GGUFError, match="the record of the fusion does not fit the file"):
        unfused_copy(fused)


@pytest.mark.parametrize(("fusions", "false"), [((QKV,), 2), ((GATE_UP,), 1)])
def test_a_record_of_another_version(model: Model, fusions: tuple[Fusion, ...], false: int) -> None:
    original = model(**experts("granite_swa", n_layer=1))
    fused = fused_copy(original, fusions=fusions)
    key = b"gguf_fuse.version"
    with bytes_of(fused) as data:
        data[data.index(key) + len(key) + 4] = false
    words = f"gguf_fuse.version.*{false}, its tensors are of another version"
    assert re.search(words, problems(original, fused)[0])
    with pytest.raises(GGUFError, match=words):
        unfused_copy(fused)


@pytest.mark.parametrize("key", ["version", "tensors", "rows", "positions"])
def test_a_damaged_record_is_one_clear_error(model: Model, key: str) -> None:
    """Every byte of it changed in turn: verify or unfuse notices, or it means the same."""
    original = model(**experts("granite_swa", n_layer=1, fused=True))
    fused = fused_copy(original, fusions=(GATE_UP,))
    sound, data = unfusion.unfuse(read_header(fused)), bytearray(fused.read_bytes())
    pair = read_header(fused).metadata.segment(f"gguf_fuse.{key}")
    for at in range(pair.start, pair.start + pair.n_bytes):
        data[at] ^= 1
        fused.write_bytes(data)
        data[at] ^= 1
        try:
            header = read_header(fused)
            noticed = problems(original, fused)
            plan = unfusion.unfuse(header)
        except GGUFError:
            continue
        assert noticed or meaning(plan) == meaning(sound)


def meaning(plan: Plan) -> list[Any]:
    """The tensors of a plan, whenever its source was read."""
    return [(t.name, t.ne, t.type, [tuple(s)[1:] for s in t.segments]) for t in plan.tensors]


# -- the command line ----------------------------------------------------------------------------

QKV_FLAG, GATE_UP_FLAG = (fusion.flag for fusion in FUSIONS)


@pytest.mark.parametrize(
    ("flags", "fusions"),
    [
        ([GATE_UP_FLAG], (GATE_UP,)),
        ([QKV_FLAG, GATE_UP_FLAG], BOTH),
        ([QKV_FLAG], (QKV,)),
        (["fuse"], (QKV,)),
        (["fuse", GATE_UP_FLAG], (GATE_UP,)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_commands(model: Model, flags: list[str], fusions: tuple[Fusion, ...], run: Run) -> None:
    original = model(**experts())
    expected = fused_copy(original, fusions=fusions)
    output = original.with_name("out.gguf")
    done = run(*flags, original, output)
    assert done.code == 0, done.err
    assert sha256(output) == sha256(expected)
    assert ("fused into ffn_gate_up_exps" in done.out) == (GATE_UP in fusions)
    assert ("fused into attn_qkv" in done.out) == (QKV in fusions)
    back = run("unfuse", output, original.with_name("back.gguf"))
    assert back.code == 0, back.err
    assert sha256(original.with_name("back.gguf")) == sha256(original)


def test_json(model: Model, run: Run) -> None:
    original = model(architecture="hy_v3")
    output = original.with_name("out.gguf")
    done = run(QKV_FLAG, GATE_UP_FLAG, original, output, "--json")
    answer = json.loads(done.out)
    assert [(layer["layer"], layer["rows"]) for layer in answer["layers"]] == [
        ("blk.0", [64, 32, 32]),
        ("blk.1", [64, 32, 32]),
        ("blk.1.ffn_gate_up_exps", [128, 128]),
    ]
    assert (answer["layers_fused"], answer["layers_skipped"]) == (3, 0)
    assert answer["tensors_in"] - answer["tensors_out"] == 2 + 2 + 1
    assert answer["layers"][2]["types"] == ["F32", "F32"]
    before, after = (json.loads(run("inspect", path, "--json").out) for path in (original, output))
    assert [layer["status"] for layer in before["layers"]] == ["fusable"] * 3
    assert [layer["status"] for layer in after["layers"]] == ["fused"] * 3
    assert "reads fused gate and up of experts" in run("inspect", original).out


# -- many experts --------------------------------------------------------------------------------


@pytest.mark.slow
def test_many_experts_stay_cheap(model: Model) -> None:
    """60 layers of 256 experts: 30,720 pieces take little time and memory."""
    types = {"*_exps.weight": T.Q4_0}
    spec = {"n_layer": 60, "n_embd": 32, "n_head": 2, "n_ff": 32, "n_expert": 256}
    original = model(architecture="granite_swa", types=types, **spec)
    header = read_header(original)
    started = time.perf_counter()
    tracemalloc.start()
    plan = fusion.fuse(header, {}, fusions=BOTH)
    placement = place(plan)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(placement.copies) >= 30_720
    assert peak < 30e6
    assert time.perf_counter() - started < 10  # under tracemalloc; 0.3 s without
    fused = fused_copy(original, fusions=BOTH)
    assert sha256(unfused_copy(fused)) == sha256(original)


@pytest.mark.parametrize("architecture", ["deepseek2", "gemma4"])
def test_verify_computes_what_it_knows(model: Model, architecture: str) -> None:
    """deepseek2 has another attention than most: its experts are compared all the same."""
    original = model(**experts(architecture))
    fused = fused_copy(original, fusions=BOTH)
    assert verify(original, fused).ok
    done = gguf_fuse("verify", original, fused, "--verbose")
    assert done.returncode == 0, done.stderr
    assert "of experts" in done.stdout
