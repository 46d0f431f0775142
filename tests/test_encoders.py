"""Vision and audio encoders (mmproj files, general.architecture = clip): by structure.

What the graph of a projector type does with attn_qkv was read in llama.cpp's tools/mtmd; here the
files it may read are fused, all others are refused, and everything comes back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gguf_fuse.architectures import PROJECTORS, Loader, projector
from gguf_fuse.fusion import Refused, Status
from gguf_fuse.rewrite import fuse
from tests.conftest import dry, fused_copy, gguf_fuse, unfused_copy
from tests.pack import STRING, UINT32, File, Pair, Tensor, tensor
from tests.test_fusion import assert_fused, sha256

N_EMBD, N_HEAD = 64, 4
LONG = {"v": "vision", "a": "audio"}


@dataclass(frozen=True)
class Encoder:
    """One modality of a file. kv_rows: of K and V. norm: elements of Q's and K's norm, if any."""

    type: str
    kv_rows: int = N_EMBD
    biases: str = "qkv"
    norm: int | None = None


def encoder_file(encoders: Mapping[str, Encoder], *, one_key: bool = False) -> File:
    """encoders: by prefix, "v" and "a". one_key: `clip.projector_type` instead of one for each."""
    pairs = [Pair("general.architecture", STRING, "clip")]
    tensors: list[Tensor] = []
    for prefix, encoder in encoders.items():
        name = LONG[prefix]
        key = "clip.projector_type" if one_key else f"clip.{name}.projector_type"
        pairs += [
            Pair(key, STRING, encoder.type),
            Pair(f"clip.{name}.embedding_length", UINT32, N_EMBD),
            Pair(f"clip.{name}.attention.head_count", UINT32, N_HEAD),
        ]
        for layer in range(2):
            block = f"{prefix}.blk.{layer}."
            for part in "qkv":
                rows = N_EMBD if part == "q" else encoder.kv_rows
                tensors.append(tensor(f"{block}attn_{part}.weight", (N_EMBD, rows)))
                if part in encoder.biases:
                    tensors.append(tensor(f"{block}attn_{part}.bias", (rows,)))
                if encoder.norm and part != "v":
                    tensors.append(tensor(f"{block}attn_{part}_norm.weight", (encoder.norm,)))
            tensors.append(tensor(f"{block}attn_out.weight", (N_EMBD, N_EMBD)))
        tensors.append(tensor(f"mm.{prefix}.0.weight", (N_EMBD, 8)))
    return File(pairs, tensors)


def save(tmp_path: Path, encoders: Mapping[str, Encoder], **options: Any) -> Path:
    path = tmp_path / "mmproj.gguf"
    path.write_bytes(encoder_file(encoders, **options).pack())
    return path


READS = sorted(name for name, row in PROJECTORS.items() if row.loader is Loader.READS_FUSED)
OTHERS = sorted(name for name, row in PROJECTORS.items() if row.loader is not Loader.READS_FUSED)


@pytest.mark.parametrize("one_key", [False, True])
@pytest.mark.parametrize("name", READS)
def test_types_that_read_fused_are_fused(tmp_path: Path, name: str, one_key: bool) -> None:
    original = save(tmp_path, {"v": Encoder(name)}, one_key=one_key)
    fused = fused_copy(original)
    assert_fused(original, fused)
    assert sha256(unfused_copy(fused)) == sha256(original)


@pytest.mark.parametrize("one_key", [False, True])
@pytest.mark.parametrize("name", [*OTHERS, "qwen2.5o", "new_in_december", ""])
def test_types_that_do_not_are_refused(tmp_path: Path, name: str, one_key: bool) -> None:
    original = save(tmp_path, {"v": Encoder(name)}, one_key=one_key)
    with pytest.raises(Refused, match=r"clip \(.*--any-architecture"):
        fused_copy(original)
    assert list(tmp_path.iterdir()) == [original]


@pytest.mark.parametrize("prefix", ["v", "a"])
@pytest.mark.parametrize("biases", ["", "qkv"])
@pytest.mark.parametrize("norm", [None, N_EMBD // N_HEAD])
def test_biases_and_norms_of_a_head(
    tmp_path: Path, prefix: str, biases: str, norm: int | None
) -> None:
    original = save(tmp_path, {prefix: Encoder("internvl", biases=biases, norm=norm)})
    fused = fused_copy(original)
    assert_fused(original, fused)
    assert sha256(unfused_copy(fused)) == sha256(original)


@pytest.mark.parametrize(
    ("encoder", "reason"),
    [
        (Encoder("pixtral", kv_rows=32), "rows differ (64, 32, 32)"),
        (Encoder("ultravox", biases="qv"), "no attn_k.bias beside the other bias"),
        (Encoder("internvl", norm=N_EMBD), "attn_q_norm has 64 elements, not one head's 16"),
    ],
)
def test_layers_that_are_left(tmp_path: Path, encoder: Encoder, reason: str) -> None:
    original = save(tmp_path, {"v": encoder})
    done = gguf_fuse("fuse", original, tmp_path / "out.gguf", "--json")
    assert done.returncode == 3
    layers = json.loads(done.stdout)["layers"]
    assert [layer["layer"] for layer in layers] == ["v.blk.0", "v.blk.1"]
    assert all(reason in layer["reason"] for layer in layers)
    assert list(tmp_path.iterdir()) == [original]


@pytest.mark.parametrize(
    ("encoders", "fused_prefix"),
    [
        ({"v": Encoder("gemma3"), "a": Encoder("conformer")}, "v"),
        ({"v": Encoder("qwen2.5vl_merger"), "a": Encoder("qwen2a")}, "a"),
        ({"v": Encoder("qwen2.5o"), "a": Encoder("qwen2.5o")}, "a"),
        ({"v": Encoder("pixtral", kv_rows=32), "a": Encoder("voxtral")}, "a"),
    ],
)
def test_one_of_two_encoders(
    tmp_path: Path, encoders: dict[str, Encoder], fused_prefix: str
) -> None:
    original = save(tmp_path, encoders)
    plan = dry(original).plan
    assert [layer.name for layer in plan.changed] == [f"{fused_prefix}.blk.{i}" for i in (0, 1)]
    assert {layer.status for layer in plan.skipped} <= {Status.SEPARATE, Status.MISMATCH}
    fused = fused_copy(original)
    assert_fused(original, fused)
    assert sha256(unfused_copy(fused)) == sha256(original)


def test_the_type_for_all_wins_over_one_for_each(tmp_path: Path) -> None:
    """In the order in which clip.cpp asks for the keys."""
    file = encoder_file({"v": Encoder("pixtral")})
    file.key("clip.projector_type", STRING, "mlp")
    path = tmp_path / "mmproj.gguf"
    path.write_bytes(file.pack())
    with pytest.raises(Refused, match=r"clip \(mlp\)"):
        fuse(path, str(tmp_path / "out.gguf"))


def test_qwen25o_is_two_types() -> None:
    assert projector("qwen2.5o", "audio") is PROJECTORS["qwen2a"]
    assert projector("qwen2.5o") is PROJECTORS["qwen2.5vl_merger"]
