"""Importance matrices, as llama-imatrix writes them: fused for a fused model, and back.

The files are packed after save_imatrix in llama.cpp's tools/imatrix/imatrix.cpp: no architecture,
entries in the order of their names, `in_sum2` of [row length] and `counts` of [1] as float32 (the
second dimension, 1 without experts, is not written). llama.cpp's own reader rewrites the results.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from gguf_fuse.planning.plan import NothingToDo, Refused, Status
from tests import pack
from tests.compare import needs_llama_cpp, sha256
from tests.conftest import fused_copy, unfused_copy
from tests.llama_judge import rewrite_with_llama_cpp
from tests.pack import ARRAY, STRING, UINT32, Array, File, Pair, Tensor
from tests.server import Run

N_EMBD = 32
WEIGHTS = ("attn_k", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate_exps", "ffn_up")


def entry(name: str, seed: int, n_experts: int = 1, order: str = "<") -> list[Tensor]:
    """Sums of squares and counts of one weight; the same seed, the same input."""
    rng = np.random.default_rng(seed)
    sums = rng.uniform(1, 100, (n_experts, N_EMBD)).astype(order + "f4").tobytes()
    counts = np.full(n_experts, 512 + seed, order + "f4").tobytes()
    ne = ((N_EMBD,), (1,)) if n_experts == 1 else ((N_EMBD, n_experts), (1, n_experts))
    tensors = [Tensor(f"{name}.in_sum2", ne[0], pack.F32, sums)]
    return [*tensors, Tensor(f"{name}.counts", ne[1], pack.F32, counts)]


def imatrix(
    weights: Iterable[str] = WEIGHTS, n_layers: int = 2, prefix: str = "", order: Any = "<"
) -> File:
    pairs = [
        Pair("general.type", STRING, "imatrix"),
        Pair("imatrix.datasets", ARRAY, Array(STRING, ["wiki.train.raw"])),
        Pair("imatrix.chunk_count", UINT32, 2),
        Pair("imatrix.chunk_size", UINT32, 512),
    ]
    tensors = []
    for layer in range(n_layers):
        for place, weight in enumerate(sorted(weights)):
            seed = 10 * layer + (0 if weight in ("attn_q", "attn_k", "attn_v") else place + 1)
            name = f"{prefix}blk.{layer}.{weight}.weight"
            tensors += entry(name, seed, 4 if weight.endswith("exps") else 1, order)
    return File(pairs, tensors, order=order)


def save(file: File, tmp_path: Path) -> Path:
    path = tmp_path / "imatrix.gguf"
    path.write_bytes(file.pack())
    return path


def entries(path: Path) -> dict[str, bytes]:
    return {tensor.name: bytes(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("prefix", ["", "enc."])
@pytest.mark.parametrize("order", ["<", ">"])
def test_fuse_and_way_back(tmp_path: Path, order: str, prefix: str) -> None:
    original = save(imatrix(order=order, prefix=prefix), tmp_path)
    fused = fused_copy(original)
    before, after = entries(original), entries(fused)
    for layer in (0, 1):
        for end in ("in_sum2", "counts"):
            name = f"{prefix}blk.{layer}.attn_{{}}.weight.{end}"
            for part in "qkv":
                assert before.pop(name.format(part)) == after[name.format("qkv")]
            del after[name.format("qkv")]
    assert before == after
    fields = gguf.GGUFReader(fused).fields
    assert fields["imatrix.datasets"].contents() == ["wiki.train.raw"]
    assert fields["imatrix.chunk_count"].contents() == 2
    assert sha256(unfused_copy(fused)) == sha256(original)


@needs_llama_cpp
def test_llama_cpp_reads_and_rewrites_it(tmp_path: Path) -> None:
    fused = fused_copy(save(imatrix(), tmp_path))
    rewrite_with_llama_cpp(fused, tmp_path / "again.gguf")
    assert entries(tmp_path / "again.gguf") == entries(fused)
    assert sha256(tmp_path / "again.gguf") == sha256(fused)


def test_no_room_for_the_record(tmp_path: Path) -> None:
    file = imatrix(n_layers=1)
    file.pairs += [Pair(f"k{i}", UINT32, 0) for i in range(16_369 - len(file.pairs))]
    with pytest.raises(Refused, match="16369 metadata pairs leave no room for ours; 16368 would"):
        fused_copy(save(file, tmp_path))


def test_an_imatrix_of_a_fused_model_gets_three_equal_entries(tmp_path: Path) -> None:
    original = save(imatrix(("attn_output", "attn_qkv", "ffn_up")), tmp_path)
    before, after = entries(original), entries(unfused_copy(original))
    for end in ("in_sum2", "counts"):
        for part in "qkv":
            name = f"blk.1.attn_{part}.weight.{end}"
            assert after[name] == before[f"blk.1.attn_qkv.weight.{end}"]
    assert len(after) == len(before) + 8


def test_an_imatrix_of_a_fused_model_is_fused_already(tmp_path: Path) -> None:
    original = save(imatrix(("attn_output", "attn_qkv", "ffn_up")), tmp_path)
    with pytest.raises(NothingToDo, match=r"imatrix\.gguf: nothing to fuse: .*already fused") as no:
        fused_copy(original)
    assert [(layer.name, layer.status) for layer in no.value.layers] == [
        ("blk.0", Status.FUSED),
        ("blk.1", Status.FUSED),
    ]


def test_a_recurrent_attn_qkv_stays(tmp_path: Path) -> None:
    """That of qwen3next has no attn_output beside it, and is no join of Q, K and V."""
    with pytest.raises(NothingToDo):
        unfused_copy(save(imatrix(("attn_qkv", "ffn_up")), tmp_path))


@pytest.mark.parametrize("end", ["in_sum2", "counts"])
def test_unequal_entries_are_an_error(tmp_path: Path, end: str, run: Run) -> None:
    file = imatrix()
    other = {"in_sum2": N_EMBD, "counts": 1}[end]
    file.tensor(f"blk.1.attn_k.weight.{end}", data=np.full(other, 7, "<f4").tobytes())
    original = save(file, tmp_path)
    done = run("fuse", original, tmp_path / "out.gguf")
    assert done.code == 1
    assert f"blk.1: {end} of attn_q, attn_k and attn_v differ" in done.err
    assert list(tmp_path.iterdir()) == [original]


def test_a_layer_without_all_three_is_left(tmp_path: Path, run: Run) -> None:
    file = imatrix()
    file.tensors = [t for t in file.tensors if not str(t.name).startswith("blk.0.attn_v")]
    original = save(file, tmp_path)
    done = run("fuse", original, tmp_path / "out.gguf", "--json")
    answer = json.loads(done.out)
    assert [layer["status"] for layer in answer["layers"]] == ["skipped", "fused"]
    assert answer["layers"][0]["reason"] == "no entry of attn_v"
    assert answer["layers"][1]["types"] == ["F32"] * 3
    assert answer["architecture"] is None
    assert (answer["layers_fused"], answer["layers_skipped"]) == (1, 1)
    inspected = json.loads(run("inspect", original, "--json").out)
    assert [layer["status"] for layer in inspected["layers"]] == ["not fusable", "fusable"]
    assert sha256(unfused_copy(tmp_path / "out.gguf")) == sha256(original)


def test_base_tells_which_layers_are_fused(tmp_path: Path, model: Callable[..., Path]) -> None:
    types = {"*": T.F32, "blk.1.attn_v.weight": T.F16}
    base = model(types=types, n_layer=2, n_embd=N_EMBD, n_ff=N_EMBD)
    original = save(imatrix(), tmp_path)
    names = set(entries(fused_copy(original, base=base)))
    assert {"blk.0.attn_qkv.weight.counts", "blk.1.attn_q.weight.counts"} < names


def test_a_base_of_other_sizes_is_refused(tmp_path: Path) -> None:
    """Entries without a weight there are no fault: llama-quantize passes over them."""
    original = save(imatrix(), tmp_path)
    for base in (pack.valid(n_embd=64), pack.fused(pack.valid(n_embd=64))):
        other = pack.save(base, tmp_path / "base.gguf")
        words = rf"'blk\.0\.attn_k\.weight' is for 32 columns, but {other} has 64 columns there"
        with pytest.raises(Refused, match=words):
            fused_copy(original, base=other)
    fused_copy(original, base=pack.save(pack.valid(), tmp_path / "base.gguf"))


@pytest.mark.parametrize("options", [(), ("--quiet",)])
def test_command(tmp_path: Path, options: tuple[str, ...], run: Run) -> None:
    original, fused, back = save(imatrix(), tmp_path), tmp_path / "f.gguf", tmp_path / "b.gguf"
    done = run("--fuse-qkv-weights", original, fused, *options)
    assert done.code == 0, done.err
    assert bool(done.out) is not bool(options)
    assert run("unfuse", fused, back, *options).code == 0
    assert sha256(back) == sha256(original)


def test_nothing_to_do(tmp_path: Path) -> None:
    original = save(imatrix(), tmp_path)
    with pytest.raises(NothingToDo, match="no entry of attn_qkv"):
        unfused_copy(original)
    with pytest.raises(NothingToDo, match="already"):
        fused_copy(fused_copy(original))
    with pytest.raises(NothingToDo, match="no entry of attn_q"):
        fused_copy(save(imatrix(("ffn_up",)), tmp_path))


def test_a_base_that_is_no_model_is_refused(tmp_path: Path) -> None:
    original = save(imatrix(), tmp_path)
    with pytest.raises(Refused, match=r"general\.type"):
        fused_copy(original, base=original)
