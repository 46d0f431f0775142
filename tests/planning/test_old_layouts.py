"""Experts one by one and qwen3next's ssm_in, as old files have them: the data, the reasons, the
way back, and llama.cpp's judgement.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from gguf_fuse import Options, VerifyOptions, fuse, inspect, unfuse, verify
from gguf_fuse.format.parser import read_header
from gguf_fuse.planning.fusions import EXPERTS, GATE_UP, QKV, SSM_IN, Fusion
from gguf_fuse.planning.loaders import ARCHITECTURES, Loader
from gguf_fuse.planning.plan import NothingToDo, Refused
from gguf_fuse.planning.record import Damaged
from tests import pack
from tests.compare import PROMPT, assert_judged_equal, needs_llama_cpp, sha256
from tests.conftest import dry, fused_copy, unfused_copy
from tests.edit import bytes_of, finish, tensors_in
from tests.llama_judge import LoadFailed, log_probabilities
from tests.server import Run
from tests.shards import cut, shard_paths

Model = Callable[..., Path]
Tensors = Iterator[tuple[str, Any, T]]

F32_ALWAYS = {"*.ssm_*": T.F32}
TYPES = {"F32": T.F32, "F16": T.F16, "Q8_0": T.Q8_0, "Q4_0": T.Q4_0}
ONCE_ONE_BY_ONE = sorted(
    name for name, row in ARCHITECTURES.items() if row.experts.loader is Loader.READS_FUSED
)


def rewritten(new: Path, tensors: Callable[[gguf.GGUFReader], Tensors]) -> Path:
    """A file beside `new` with its metadata and other tensors."""
    reader, target = gguf.GGUFReader(new), new.with_name("old.gguf")
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        item = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=item)
    for name, data, kind in tensors(reader):
        writer.add_tensor(name, data, raw_dtype=kind)
    finish(writer)
    return target


def one_by_one(new: Path) -> Path:
    """The file as it was before experts were stacked."""

    def tensors(reader: gguf.GGUFReader) -> Tensors:
        for tensor in reader.tensors:
            if "_exps." not in tensor.name:
                yield tensor.name, tensor.data, tensor.tensor_type
                continue
            for expert, data in enumerate(tensor.data):
                yield tensor.name.replace("_exps.", f".{expert}."), data, tensor.tensor_type

    return rewritten(new, tensors)


def with_ssm_in(new: Path) -> Path:
    """The file as it was before attn_qkv and attn_gate: of two heads of 16 for Q and K, each with
    two of V. The rows are those that the converter turns around (conversion/qwen.py).
    """

    def tensors(reader: gguf.GGUFReader) -> Tensors:
        by_name = {tensor.name: tensor for tensor in reader.tensors}
        for tensor in reader.tensors:
            gate = by_name.get(tensor.name.replace("attn_qkv", "attn_gate"))
            if "attn_gate" in tensor.name:
                continue
            if "attn_qkv" not in tensor.name or gate is None:
                yield tensor.name, tensor.data, tensor.tensor_type
                continue
            q, k, v = np.split(tensor.data, [32, 64])
            heads = [part.reshape(2, -1, part.shape[1]) for part in (q, k, v, gate.data)]
            data = np.concatenate(heads, axis=1).reshape(-1, tensor.data.shape[1])
            yield tensor.name.replace("attn_qkv", "ssm_in"), data, tensor.tensor_type

    return rewritten(new, tensors)


def mixtral(model: Model, **spec: Any) -> Path:
    return model("new.gguf", **{"n_expert": 4, **spec})


def qwen3next(model: Model, type_: T = T.Q8_0, **spec: Any) -> Path:
    return model("new.gguf", architecture="qwen3next", types={"*": type_, **F32_ALWAYS}, **spec)


def assert_same_tensors(a: Path, b: Path) -> None:
    """By name; their order is the file's own."""
    found = [{t.name: t for t in gguf.GGUFReader(path).tensors} for path in (a, b)]
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        other = found[1][name]
        assert (tensor.tensor_type, list(tensor.shape)) == (other.tensor_type, list(other.shape))
        np.testing.assert_array_equal(tensor.data, other.data)


# -- data and the way back -----------------------------------------------------------------------


@pytest.mark.parametrize("type_", TYPES)
def test_stacked_as_the_converter_writes_them(model: Model, type_: str) -> None:
    new = mixtral(model, types={"*": TYPES[type_]})
    old = one_by_one(new)
    stacked = fused_copy(old, fusions=(EXPERTS,))
    assert_same_tensors(stacked, new)
    assert sha256(unfused_copy(stacked)) == sha256(old)


@pytest.mark.parametrize("type_", TYPES)
def test_split_as_the_converter_writes_it(model: Model, type_: str) -> None:
    new = qwen3next(model, TYPES[type_])
    old = with_ssm_in(new)
    split = fused_copy(old, fusions=(SSM_IN,))
    assert_same_tensors(split, new)
    assert sha256(unfused_copy(split)) == sha256(old)


def test_big_endian(tmp_path: Path) -> None:
    file = pack.valid(n_layers=1).key("llama.expert_count", pack.UINT32, 2)
    names = [f"blk.0.ffn_{part}.{n}.weight" for n in range(2) for part in ("down", "up", "gate")]
    file.tensors += [pack.tensor(name, (32, 3)) for name in names]
    file.order = ">"
    old = pack.save(file, tmp_path / "in.gguf")
    stacked = fused_copy(old, fusions=(EXPERTS,))
    data = {tensor.name: tensor.data for tensor in file.tensors}
    made = {tensor.name: tensor for tensor in read_header(stacked).tensors}
    for part in ("gate", "up", "down"):
        found = made[f"blk.0.ffn_{part}_exps.weight"]
        assert found.ne == (32, 3, 2)
        assert found.read() == b"".join(data[f"blk.0.ffn_{part}.{n}.weight"] for n in range(2))
    assert sha256(unfused_copy(stacked)) == sha256(old)


def test_what_names_tensors_follows(model: Model) -> None:
    extra = {
        "general.tensor_extra.name": ["output.weight", "blk.0.ssm_in.weight"],
        "general.tensor_extra.prec_a4": [True, False],
    }
    old = with_ssm_in(qwen3next(model, metadata=extra))
    split = fused_copy(old, fusions=(SSM_IN,))
    metadata = read_header(split).metadata
    names = ["output.weight", "blk.0.attn_qkv.weight", "blk.0.attn_gate.weight"]
    assert metadata["general.tensor_extra.name"] == names
    assert metadata["general.tensor_extra.prec_a4"] == [True, False, False]
    assert not problems(old, split)
    assert sha256(unfused_copy(split)) == sha256(old)


def test_all_in_one_pass(model: Model) -> None:
    old = with_ssm_in(qwen3next(model))
    fused = fused_copy(old, fusions=(SSM_IN, QKV, GATE_UP))
    report = verify(old, fused)
    assert report.ok
    counts = report.structure
    assert (counts.n_fused, counts.n_fused_experts, counts.n_split_ssm_in) == (1, 2, 1)
    assert verify(fused, old).ok
    assert sha256(unfused_copy(fused)) == sha256(old)


def test_stacked_beside_attention(model: Model) -> None:
    old = one_by_one(mixtral(model))
    stacked = fused_copy(old, fusions=(EXPERTS, QKV))
    report = verify(old, stacked)
    assert report.ok
    assert (report.structure.n_fused, report.structure.n_fused_experts) == (2, 2)
    assert sha256(unfused_copy(stacked)) == sha256(old)


def test_more_than_ten_experts_in_the_order_of_their_numbers(model: Model) -> None:
    new = mixtral(model, n_expert=12, n_layer=1)
    old = one_by_one(new)

    def turned(reader: gguf.GGUFReader) -> Tensors:
        for tensor in reversed(reader.tensors):
            yield tensor.name, tensor.data, tensor.tensor_type

    backwards = rewritten(old.replace(new.with_name("forwards.gguf")), turned)
    stacked = fused_copy(backwards, fusions=(EXPERTS,))
    assert_same_tensors(stacked, new)
    assert verify(backwards, stacked, VerifyOptions(structure_only=True)).ok
    assert sha256(unfused_copy(stacked)) == sha256(backwards)


@pytest.mark.parametrize(("old_of", "fusion"), [(one_by_one, EXPERTS), (with_ssm_in, SSM_IN)])
def test_only_new_releases_undo_it(
    model: Model, old_of: Callable[[Path], Path], fusion: Fusion
) -> None:
    old = old_of(mixtral(model) if fusion is EXPERTS else qwen3next(model))
    fused = fused_copy(old, fusions=(fusion,))
    assert read_header(fused).metadata["gguf_fuse.version"] == 4


def test_what_the_converter_stacked_stays(model: Model) -> None:
    """Without a record nothing says that it was ever otherwise, and no loader wants it so."""
    with pytest.raises(NothingToDo):
        unfused_copy(mixtral(model))
    with pytest.raises(NothingToDo):
        unfused_copy(qwen3next(model))


# -- what is refused, and why --------------------------------------------------------------------


def test_mixed_types_are_refused_with_their_list(model: Model) -> None:
    def mixed(reader: gguf.GGUFReader) -> Tensors:
        for tensor in reader.tensors:
            data, kind = tensor.data, tensor.tensor_type
            if tensor.name == "blk.1.ffn_down.2.weight":
                data, kind = data.astype(np.float16), T.F16
            yield tensor.name, data, kind

    old = one_by_one(mixtral(model))
    path = rewritten(old.replace(old.with_name("same.gguf")), mixed)
    words = r"blk\.1\.ffn_down_exps: types differ: F32, F32, F16, F32; a loader reads"
    with pytest.raises(Refused, match=words):
        dry(path, fusions=(EXPERTS, QKV))
    assert dry(path).plan.changed  # Q, K and V alone


@pytest.mark.parametrize(
    ("dropped", "added", "reason"),
    [
        ("blk.0.ffn_up.3.weight", None, "blk.0.ffn_up_exps: no ffn_up.3.weight"),
        (None, "blk.0.ffn_up.4.weight", "ffn_up.4.weight would have no place beside ffn_up_exps"),
        (None, "blk.0.ffn_up.0.bias", "no ffn_up.1.bias, ffn_up.2.bias"),
        (None, "blk.0.ffn_up_exps.weight", "ffn_up_exps.weight is there already"),
    ],
)
def test_experts_that_do_not_fit(
    model: Model, dropped: str | None, added: str | None, reason: str
) -> None:
    def changed(reader: gguf.GGUFReader) -> Tensors:
        for tensor in reader.tensors:
            if tensor.name != dropped:
                yield tensor.name, tensor.data, tensor.tensor_type
        if added:
            yield added, np.zeros((128, 64), np.float32), T.F32

    old = one_by_one(mixtral(model))
    path = rewritten(old.replace(old.with_name("whole.gguf")), changed)
    with pytest.raises(Refused) as caught:
        dry(path, fusions=(EXPERTS,))
    assert reason in str(caught.value)


def test_other_loaders_are_refused(model: Model) -> None:
    old = one_by_one(mixtral(model, architecture="qwen3moe"))
    with pytest.raises(Refused, match=r"qwen3moe.* is not known to read fused experts.*--any-arch"):
        dry(old, fusions=(EXPERTS,))
    assert dry(old, fusions=(EXPERTS,), any_architecture=True).plan.changed


def test_ssm_in_of_another_layout_is_left(model: Model) -> None:
    """falcon-h1 has mamba's ssm_in, and attention in the same layers."""
    path = model(architecture="falcon-h1")
    with pytest.raises(Refused, match=r"falcon-h1.* is not known to read fused attn_qkv and"):
        dry(path, fusions=(SSM_IN,))
    words = r"ssm_in of \[64, \d+\] does not have the \d+ heads of K with"
    with pytest.raises(NothingToDo, match=words):
        dry(path, fusions=(SSM_IN,), any_architecture=True)
    assert {layer.fusion for layer in inspect(path).layers} == {QKV}


@pytest.mark.parametrize("key", ["group_count", "state_size", "time_step_rank"])
def test_heads_that_do_not_add_up(model: Model, key: str) -> None:
    spec = {f"qwen3next.ssm.{key}": 3}
    old = with_ssm_in(model("new.gguf", architecture="qwen3next", metadata=spec))
    with pytest.raises(NothingToDo, match=r"ssm_in of \[64, 192\] does not have the \d heads of K"):
        dry(old, fusions=(SSM_IN,))


@pytest.mark.parametrize(
    ("old_of", "fusion", "rows"),
    [(one_by_one, EXPERTS, b"\x80"), (with_ssm_in, SSM_IN, b"\x10")],
    ids=["experts", "ssm_in"],
)
def test_a_record_of_other_rows_is_refused(
    model: Model, old_of: Callable[[Path], Path], fusion: Fusion, rows: bytes
) -> None:
    old = old_of(mixtral(model) if fusion is EXPERTS else qwen3next(model))
    fused = fused_copy(old, fusions=(fusion,))
    key = b"gguf_fuse.rows"
    with bytes_of(fused) as data:
        at = data.index(key) + len(key) + 16
        assert data[at : at + 1] == rows
        data[at] += 1
    with pytest.raises(Damaged, match="does not fit the file"):
        unfused_copy(fused)
    assert any("gguf_fuse.rows" in problem for problem in problems(old, fused))


# -- verify --------------------------------------------------------------------------------------


def problems(original: Path, fused: Path) -> list[str]:
    return list(verify(original, fused, VerifyOptions(structure_only=True)).structure.problems)


def test_verify_names_swapped_experts(model: Model) -> None:
    old = one_by_one(mixtral(model))
    stacked = fused_copy(old, fusions=(EXPERTS,))
    assert not problems(old, stacked)
    with tensors_in(stacked) as tensors:
        data = tensors["blk.1.ffn_up_exps.weight"]
        data[[1, 2]] = data[[2, 1]]
    assert [problem.partition(" differs")[0] for problem in problems(old, stacked)] == [
        f"blk.1.ffn_up_exps.weight: ffn_up.{expert}" for expert in (1, 2)
    ]


def test_verify_names_every_swapped_row_of_a_head(model: Model) -> None:
    """The file as the converter writes it, other than ours, shows each row in its place."""
    old = with_ssm_in(qwen3next(model, T.F16))
    split = fused_copy(old, fusions=(SSM_IN,))
    places = {"q": 0, "k": 32, "v": 64, "z": 0}
    for letter, head in itertools.product("qkvz", (0, 1)):
        name = f"blk.0.attn_{'gate' if letter == 'z' else 'qkv'}.weight"
        first = places[letter] + head * (16 if letter in "qk" else 32)
        with tensors_in(split) as tensors:
            tensors[name][first + 5] *= -1
        (problem,) = problems(old, split)
        assert problem.startswith(f"{name}: {letter} of head {head} differs in row 5 (byte ")
        with tensors_in(split) as tensors:
            tensors[name][first + 5] *= -1
    assert not problems(old, split)


def test_verify_sees_rows_left_head_by_head(model: Model) -> None:
    """As if ssm_in had been cut in two without turning its rows around."""
    old = with_ssm_in(qwen3next(model, T.F16))
    split = fused_copy(old, fusions=(SSM_IN,))
    (ssm_in,) = (t for t in gguf.GGUFReader(old).tensors if t.name == "blk.0.ssm_in.weight")
    with tensors_in(split) as tensors:
        tensors["blk.0.attn_qkv.weight"][:] = ssm_in.data[:128]
        tensors["blk.0.attn_gate.weight"][:] = ssm_in.data[128:]
    found = {problem.partition(" differs")[0] for problem in problems(old, split)}
    names = {"q": "qkv", "k": "qkv", "v": "qkv", "z": "gate"}
    places = {f"blk.0.attn_{name}.weight: {letter} of head" for letter, name in names.items()}
    assert {place[:-2] for place in found} == places
    assert "blk.0.attn_qkv.weight: q of head 0" not in found


# -- the command ---------------------------------------------------------------------------------


def test_command(model: Model, tmp_path: Path, run: Run) -> None:
    old = one_by_one(mixtral(model))
    seen = run("inspect", old).out
    assert "6 of 6 stacks of experts fusable" in seen
    assert "next: gguf-fuse --fuse-qkv-weights --stack-experts" in seen
    done = run("--stack-experts", old, tmp_path / "out.gguf", "--stack-experts")
    assert done.code == 0, done.err
    assert "6 of 6 stacks of experts rewritten" in done.out
    assert "4 x 128" in done.out
    assert "next:" not in run("inspect", tmp_path / "out.gguf").out  # it would be refused
    back = run("unfuse", tmp_path / "out.gguf", tmp_path / "back.gguf")
    assert "split into ffn_gate.0 to ffn_gate.3" in back.out
    assert sha256(tmp_path / "back.gguf") == sha256(old)
    old = with_ssm_in(qwen3next(model))
    assert "ssm_in: fusable" in run("inspect", old).out
    done = run("fuse", old, tmp_path / "out.gguf", "--split-ssm-in", "--force")
    assert "split into attn_qkv and attn_gate" in done.out
    assert run("verify", old, tmp_path / "out.gguf").code == 0
    done = run("fuse", tmp_path / "new.gguf", tmp_path / "out.gguf", "--split-ssm-in", "--force")
    assert (done.code, "no layer has ssm_in" in done.err) == (3, True)


@pytest.mark.parametrize(("old_of", "fusion"), [(one_by_one, EXPERTS), (with_ssm_in, SSM_IN)])
def test_shards(
    model: Model, tmp_path: Path, old_of: Callable[[Path], Path], fusion: Fusion
) -> None:
    """Experts of one stack, and the layers, lie in several files."""
    old = old_of(mixtral(model) if fusion is EXPERTS else qwen3next(model))
    shards = cut(old, "old", small_first_shard=False, split_max_tensors=10)
    hashes = [sha256(shard) for shard in shards]
    options = Options(sync=False)
    one = fuse(shards[0], tmp_path / "one.gguf", fusions=(fusion,), options=options)
    assert verify(shards[0], one.files[0], VerifyOptions(structure_only=True)).ok
    assert sha256(one.files[0]) == sha256(fused_copy(old, fusions=(fusion,)))
    new = shard_paths(tmp_path / "new", len(shards))
    fuse(shards[0], new[0], fusions=(fusion,), options=options)
    assert verify(shards[0], new[0], VerifyOptions(structure_only=True)).ok
    back = shard_paths(tmp_path / "back", len(shards))
    unfuse(new[0], back[0], options=options)
    assert [sha256(shard) for shard in back] == hashes


# -- llama.cpp -----------------------------------------------------------------------------------


@needs_llama_cpp
@pytest.mark.parametrize("architecture", ONCE_ONE_BY_ONE)
def test_stacked_experts_load_again(model: Model, architecture: str) -> None:
    new = mixtral(model, architecture=architecture)
    old = one_by_one(new)
    with pytest.raises(LoadFailed, match=r"ffn_down_exps\.weight' not found"):
        log_probabilities(old, PROMPT)
    assert_judged_equal(new, fused_copy(old, fusions=(EXPERTS, QKV)))


@needs_llama_cpp
@pytest.mark.parametrize("type_", ["F32", "Q8_0"])
def test_split_ssm_in_gives_the_same(model: Model, type_: str) -> None:
    new = qwen3next(model, TYPES[type_])
    old = with_ssm_in(new)
    split = fused_copy(old, fusions=(SSM_IN,))
    assert_judged_equal(new, split)
    assert_judged_equal(old, split)
