"""Random sound files of every kind: fused, read by gguf-py, verified, and brought back bit for bit.

Then the same with a fault somewhere: a GGUFError, or a file that is still sound; never another
exception, never something half-written. GGUF_FUSE_HARNESS=10 tries ten times as many.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf

from gguf_fuse import GATE_UP, QKV, GGUFError, NothingToDo, VerifyOptions, fuse, unfuse, verify
from tests import pack
from tests.conftest import FAST
from tests.pack import (
    ARRAY,
    BOOL,
    FLOAT32,
    FLOAT64,
    INT64,
    STRING,
    UINT8,
    UINT32,
    Array,
    File,
    Pair,
    Tensor,
)

FACTOR = float(os.environ.get("GGUF_FUSE_HARNESS", "1"))
N_FILES, N_MUTANTS = int(150 * FACTOR), int(1200 * FACTOR)
TYPES = (pack.F32, pack.F16, pack.Q4_0, pack.Q8_0)
QUICK = VerifyOptions(structure_only=True, threads=1)

_VALUES: dict[int, Callable[[random.Random], object]] = {
    UINT8: lambda chance: chance.randrange(256),
    UINT32: lambda chance: chance.randrange(2**32),
    INT64: lambda chance: chance.randrange(-(2**63), 2**63),
    FLOAT32: lambda chance: chance.uniform(-9, 9),
    FLOAT64: lambda chance: chance.random(),
    BOOL: lambda chance: chance.random() < 0.5,
    STRING: lambda chance: "é" * chance.randrange(9),
}


def sound_file(chance: random.Random) -> File:
    """Any order, byte order, alignment, metadata, layers, biases, scales, experts and types."""
    n_embd = 32 * chance.randint(1, 4)
    file = pack.valid(chance.choice(TYPES), chance.randint(1, 4), n_embd)
    tensors = file.tensors
    for layer in range(file.pairs[2].value):
        tensors += _extras(chance, f"blk.{layer}.", n_embd)
        if chance.random() < 0.2:  # a layer that cannot be fused
            at = next(i for i, t in enumerate(tensors) if t.name == f"blk.{layer}.attn_v.weight")
            tensors[at] = pack.tensor(str(tensors[at].name), tensors[at].ne, chance.choice(TYPES))
    for number in range(chance.randrange(4)):
        kind = chance.choice(list(_VALUES))
        value = _VALUES[kind](chance)
        if chance.random() < 0.4:
            items = [_VALUES[kind](chance) for _ in range(chance.randrange(5))]
            kind, value = ARRAY, Array(kind, items)
        file.pairs.append(Pair(f"x.{number}", kind, value))
    if chance.random() < 0.2:
        file.tensors.append(Tensor("placeholder", (0,), pack.F32, b""))
    alignment = chance.choice((32, 32, 8, 64, 256))
    if alignment != 32:
        file.pairs.append(Pair("general.alignment", UINT32, alignment))
    if chance.random() < 0.5:
        chance.shuffle(file.tensors)
    return replace(file, alignment=alignment, order=chance.choice("<<>"))


def _extras(chance: random.Random, layer: str, n_embd: int) -> list[Tensor]:
    rows = {"q": n_embd, "k": n_embd // 2, "v": n_embd // 2}
    made = []
    if chance.random() < 0.3:
        made += [pack.tensor(f"{layer}attn_{part}.bias", (n,)) for part, n in rows.items()]
    if chance.random() < 0.3:
        scale = chance.randbytes(4) if chance.random() < 0.7 else None
        for part in rows:
            data = scale or chance.randbytes(4)
            made.append(Tensor(f"{layer}attn_{part}.scale", (1,), pack.F32, data))
    if chance.random() < 0.3:
        n_experts, kind = chance.randint(1, 5), chance.choice(TYPES)
        for part in ("gate", "up"):
            made.append(
                pack.tensor(f"{layer}ffn_{part}_exps.weight", (n_embd, 64, n_experts), kind)
            )
    return made


def there_and_back(path: Path, chance: random.Random) -> str:
    """What became of it; raises AssertionError where it does not come back."""
    fused, back = path.with_name("fused.gguf"), path.with_name("back.gguf")
    fusions = chance.choice(([QKV], [GATE_UP], [QKV, GATE_UP]))
    try:
        fuse(path, fused, fusions=fusions, any_architecture=True, options=FAST)
    except NothingToDo:
        assert not fused.exists()
        return "nothing to fuse"
    gguf.GGUFReader(fused)
    assert verify(path, fused, QUICK).ok
    unfuse(fused, back, options=FAST)
    assert back.read_bytes() == path.read_bytes()
    fused.unlink()
    back.unlink()
    return "there and back"


def test_sound_files(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    chance, counts = random.Random(12), Counter[str]()
    for number in range(N_FILES):
        path = pack.save(sound_file(chance), tmp_path / "in.gguf")
        try:
            counts[there_and_back(path, chance)] += 1
        except Exception as error:
            raise AssertionError(f"file {number}: {error}") from error
    assert counts["there and back"] > N_FILES // 2
    record_property("harness", f"{N_FILES} random files: {dict(counts)}")


def test_faults_are_told_or_carried(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    chance, counts = random.Random(13), Counter[str]()
    files = [sound_file(chance).pack() for _ in range(12)]
    path, fused = tmp_path / "in.gguf", tmp_path / "fused.gguf"
    for _ in range(N_MUTANTS):
        data = bytearray(chance.choice(files))
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(min(len(data), 2000))
            data[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
        path.write_bytes(data)
        try:
            fuse(path, fused, any_architecture=True, options=FAST)
        except GGUFError as error:
            assert "\n" not in str(error)
            counts["told"] += 1
            assert [file.name for file in tmp_path.iterdir()] == ["in.gguf"]
            continue
        assert verify(path, fused, QUICK).ok
        counts["still sound"] += 1
        fused.unlink()
    record_property("harness", f"{N_MUTANTS} files with faults: {dict(counts)}")
