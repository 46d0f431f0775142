"""Vision and audio encoders (mmproj files, general.architecture = clip).

What the graph of a projector type does with attn_qkv was read in llama.cpp's tools/mtmd; here the
files it may read are fused, all others are refused, and everything comes back. For some
types llama.cpp is the judge: a random encoder looks at an image, fused and separate.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gguf_fuse.api import fuse
from gguf_fuse.planning.loaders import PROJECTORS, Loader, projector
from gguf_fuse.planning.plan import NothingToDo, Refused, Status
from tests import llama_judge, pack
from tests.compare import assert_fused, needs_llama_cpp, sha256
from tests.conftest import dry, fused_copy, unfused_copy
from tests.edit import edited, finish
from tests.pack import STRING, UINT32, File, Pair, Tensor, tensor, unrecorded
from tests.server import Run, assert_one_line

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


READS = sorted(name for name, row in PROJECTORS.items() if row.qkv.loader is Loader.READS_FUSED)
OTHERS = sorted(
    name for name, row in PROJECTORS.items() if row.qkv.loader is not Loader.READS_FUSED
)


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
        (Encoder("qwen3a", biases="qv"), "no attn_k.bias beside the other bias"),
        (Encoder("internvl", norm=N_EMBD), "attn_q_norm has 64 elements, not one head's 16"),
    ],
)
def test_layers_that_are_left(tmp_path: Path, encoder: Encoder, reason: str, run: Run) -> None:
    original = save(tmp_path, {"v": encoder})
    done = run("fuse", original, tmp_path / "out.gguf", "--json")
    assert done.code == 3
    layers = json.loads(done.out)["layers"]
    assert [layer["layer"] for layer in layers] == ["v.blk.0", "v.blk.1"]
    assert all(reason in layer["reason"] for layer in layers)
    assert list(tmp_path.iterdir()) == [original]


@pytest.mark.parametrize(
    ("encoders", "fused_prefix"),
    [
        ({"v": Encoder("gemma3"), "a": Encoder("conformer")}, "v"),
        ({"v": Encoder("qwen2.5vl_merger"), "a": Encoder("qwen3a")}, "a"),
        ({"v": Encoder("pixtral", kv_rows=32), "a": Encoder("mimo_audio")}, "a"),
        ({"v": Encoder("gemma3"), "a": Encoder("ultravox", biases="qv")}, "v"),
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


# -- in llama.cpp -------------------------------------------------------------------------------

N_PATCH = 4  # in each direction, of 8 x 8 pixels
# Tensors behind the layers, by projector type: shapes in numpy's order, the text model's width 64.
HEADS: dict[str, dict[str, tuple[int, ...]]] = {
    "gemma3": {"mm.input_projection.weight": (N_EMBD, 64), "mm.soft_emb_norm.weight": (N_EMBD,)},
    "janus_pro": {
        "mm.0.weight": (80, N_EMBD),
        "mm.0.bias": (80,),
        "mm.1.weight": (64, 80),
        "mm.1.bias": (64,),
    },
    "pixtral": {
        "mm.1.weight": (80, N_EMBD),
        "mm.2.weight": (64, 80),
        "v.token_embd.img_break": (64,),
    },
    "internvl": {
        "v.class_embd": (N_EMBD,),
        "mm.model.mlp.0.weight": (4 * N_EMBD,),
        "mm.model.mlp.0.bias": (4 * N_EMBD,),
        "mm.model.mlp.1.weight": (80, 4 * N_EMBD),
        "mm.model.mlp.1.bias": (80,),
        "mm.model.mlp.3.weight": (64, 80),
        "mm.model.mlp.3.bias": (64,),
    },
}


def vision_shapes(projector: str, norm: int | None) -> dict[str, tuple[int, ...]]:
    """Tensors of a small encoder, shapes in numpy's order. norm: elements of Q's and K's norm."""
    n, n_ff = N_EMBD, 96
    shapes: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (n, 3, 8, 8),
        "v.position_embd.weight": (N_PATCH**2 + (projector == "internvl"), n),
    }
    for layer in range(2):
        block = f"v.blk.{layer}."
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            shapes |= {f"{block}{part}.weight": (n, n), f"{block}{part}.bias": (n,)}
        for name in ("ln1", "ln2"):
            shapes |= {f"{block}{name}.weight": (n,), f"{block}{name}.bias": (n,)}
        shapes |= {f"{block}ffn_up.weight": (n_ff, n), f"{block}ffn_up.bias": (n_ff,)}
        shapes |= {f"{block}ffn_down.weight": (n, n_ff), f"{block}ffn_down.bias": (n,)}
        if norm:
            shapes |= {f"{block}attn_{part}_norm.weight": (norm,) for part in "qk"}
    return shapes | {"v.post_ln.weight": (n,), "v.post_ln.bias": (n,)} | HEADS[projector]


def write_vision_model(
    path: Path, projector: str, norm: int | None = None, *, fused: bool = False
) -> Path:
    """A random encoder. fused: Q, K and V as one tensor from the start."""
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", projector)
    writer.add_bool("clip.use_gelu", True)
    for key, value in {
        "embedding_length": N_EMBD,
        "feed_forward_length": 96,
        "block_count": 2,
        "projection_dim": 64,
        "image_size": 8 * N_PATCH,
        "patch_size": 8,
        "attention.head_count": N_HEAD,
        "projector.scale_factor": 2,
        "spatial_merge_size": 1,
    }.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    for key in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{key}", [0.5, 0.5, 0.5])
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in vision_shapes(projector, norm).items():
        scale = 0.1 if len(shape) == 1 else float(np.prod(shape[1:])) ** -0.5
        values = scale * rng.standard_normal(shape, dtype=np.float32)
        is_norm = len(shape) == 1 and name.endswith("weight")
        tensors[name] = (1 + values if is_norm else values).astype(np.float32)
    for name in list(tensors) if fused else []:
        if ".attn_q." in name:
            parts = [tensors.pop(name.replace("attn_q", f"attn_{part}")) for part in "qkv"]
            tensors[name.replace("attn_q", "attn_qkv")] = np.concatenate(parts)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    finish(writer)
    return path


def png(seed: int) -> bytes:
    """A square of noise."""
    n = 8 * N_PATCH
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (n, 3 * n), dtype=np.uint8)
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    head = struct.pack(">IIBBBBB", n, n, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("norm", [None, N_EMBD // N_HEAD])
@pytest.mark.parametrize("name", HEADS)
def test_identical_log_probabilities_after_an_image(
    model: Callable[..., Path], tmp_path: Path, name: str, norm: int | None
) -> None:
    text, separate = model(n_embd=64), write_vision_model(tmp_path / "mmproj.gguf", name, norm)
    fused = fused_copy(separate)
    assert_fused(separate, fused)
    before = llama_judge.image_log_probabilities(text, separate, png(1))
    other = llama_judge.image_log_probabilities(text, separate, png(2))
    assert np.isfinite(before).all()
    assert np.abs(before - other).max() > 1e-3
    after = llama_judge.image_log_probabilities(text, fused, png(1))
    np.testing.assert_array_equal(before, after)


@needs_llama_cpp
def test_why_a_norm_over_all_heads_is_left(model: Callable[..., Path], tmp_path: Path) -> None:
    """InternViT-6B has one: llama.cpp reads it beside separate Q and K, and aborts beside fused."""
    text = model(n_embd=64)
    separate = write_vision_model(tmp_path / "mmproj.gguf", "internvl", N_EMBD)
    assert np.isfinite(llama_judge.image_log_probabilities(text, separate, png(1))).all()
    with pytest.raises(NothingToDo, match="attn_q_norm has 64 elements"):
        fused_copy(separate)
    fused = write_vision_model(tmp_path / "fused.gguf", "internvl", N_EMBD, fused=True)
    with pytest.raises(llama_judge.LoadFailed) as caught:
        llama_judge.image_log_probabilities(text, fused, png(1))
    assert caught.value.signal == "SIGABRT"


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("part", ["q", "k"])
def test_a_norm_of_q_or_k_alone(
    model: Callable[..., Path], tmp_path: Path, part: str, name: str
) -> None:
    """The norm of Q decides whether K is normed head by head, but not beside fused ones."""

    def only(path: Path) -> Path:
        other = "k" if part == "q" else "q"
        drop = [f"v.blk.{layer}.attn_{other}_norm.weight" for layer in range(2)]
        return edited(path, drop=drop).rename(path)

    def judged(path: Path) -> Any:
        return llama_judge.image_log_probabilities(text, path, png(1))

    text, norm = model(n_embd=64), N_EMBD // N_HEAD
    separate = only(write_vision_model(tmp_path / "mmproj.gguf", name, norm))
    fused = only(write_vision_model(tmp_path / "fused.gguf", name, norm, fused=True))
    if part == "q":
        np.testing.assert_array_equal(judged(separate), judged(fused))
        np.testing.assert_array_equal(judged(separate), judged(fused_copy(separate)))
    else:
        assert np.abs(judged(separate) - judged(fused)).max() > 1e-2
        with pytest.raises(NothingToDo, match="attn_k_norm without attn_q_norm"):
            fused_copy(separate)


# -- one file for the text model and its encoder, as Ollama keeps them ----------------------------

ENCODER_TENSORS = {
    "vision": "v.blk.0.attn_q.weight",
    "audio": "a.blk.0.attn_q.weight",
    "projector": "mm.input_projection.weight",
    "SAM": "s.blk.0.attn.qkv.weight",
    "long name": "audio.conv.weight",
}


def with_encoder(*names: str, file: File | None = None) -> File:
    file = file or pack.valid()
    for name in names:
        block = [name.replace("attn_q.", f"attn_{part}.") for part in ("q", "k", "v", "out")]
        file.tensors += [tensor(each, (32, 32)) for each in dict.fromkeys(block)]
    return file


@pytest.mark.parametrize("name", ENCODER_TENSORS.values(), ids=ENCODER_TENSORS)
def test_an_encoder_beside_the_text_model(tmp_path: Path, name: str, run: Run) -> None:
    path = pack.save(with_encoder(name), tmp_path / "in.gguf")
    assert_one_line(
        run("fuse", path, tmp_path / "out"), f"{path}: holds an encoder ({name!r})", "--mmproj"
    )
    layers = json.loads(run("inspect", path, "--json").out)["layers"]
    assert {layer["status"] for layer in layers} == {"separate"}
    assert {layer["reason"] for layer in layers} == {
        "an encoder lies beside the text model, as Ollama keeps both in one file"
    }
    assert list(tmp_path.iterdir()) == [path]


def test_never_the_encoder_by_the_row_of_the_text_model(tmp_path: Path) -> None:
    path = pack.save(with_encoder("v.blk.0.attn_q.weight"), tmp_path / "in.gguf")
    fused = fused_copy(path, any_architecture=True)
    names = {found.name for found in gguf.GGUFReader(fused).tensors}
    assert {"blk.0.attn_qkv.weight", "blk.1.attn_qkv.weight", "v.blk.0.attn_q.weight"} < names
    assert sha256(unfused_copy(fused)) == sha256(path)
    alone = with_encoder("v.blk.0.attn_q.weight", file=File(pack.valid().pairs, []))
    with pytest.raises(NothingToDo, match=r"v\.blk\.0: an encoder lies beside the text model"):
        fused_copy(pack.save(alone, tmp_path / "alone.gguf"), any_architecture=True)


def test_nor_on_the_way_back(tmp_path: Path) -> None:
    """Without a record, the text model's head counts would say where to split the encoder's."""
    file = with_encoder("v.blk.0.attn_qkv.weight", "v.blk.0.attn_out.weight", file=unrecorded())
    path = pack.save(file, tmp_path / "in.gguf")
    with pytest.raises(Refused, match="holds an encoder"):
        unfused_copy(path)
    back = unfused_copy(path, any_architecture=True)
    names = {found.name for found in gguf.GGUFReader(back).tensors}
    assert {"blk.0.attn_q.weight", "blk.1.attn_v.weight", "v.blk.0.attn_qkv.weight"} < names


def test_a_base_with_an_encoder_is_refused(tmp_path: Path, run: Run) -> None:
    base = pack.save(with_encoder("mm.0.weight"), tmp_path / "base.gguf")
    path = pack.save(pack.lora(), tmp_path / "in.gguf")
    done = run("fuse", path, tmp_path / "out", "--base", base)
    assert_one_line(done, f"{base}: holds an encoder ('mm.0.weight')")
