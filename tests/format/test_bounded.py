"""Headers crafted to cost: whatever a file of at most 100 MB says, memory and time are bounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gguf_fuse.format.header import MAX_PAIRS, MAX_TENSORS
from gguf_fuse.format.parser import MAX_NESTED_ARRAYS, MAX_STRINGS
from gguf_fuse.planning.fusions import EXPERT_PARTS
from tests.pack import ARRAY, INT, INT8, LONG, STRING, UINT8, UINT32, UINT64
from tests.server import Outcome, Run

MAX_MEMORY = 300 << 20
MAX_SECONDS = 5.0  # of processor time
I8, F32 = 24, 0
WIDE = "\U0001f600"  # four bytes in a file; in Python it makes the other characters as wide

Info = tuple[str, tuple[int, ...], int, int]  # name, ne, type, bytes


def text(value: str) -> bytes:
    return LONG.pack(len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + INT.pack(kind) + value


def array(key: str, kind: int, length: int, data: bytes) -> bytes:
    return pair(key, ARRAY, INT.pack(kind) + LONG.pack(length) + data)


def write(path: Path, pairs: Sequence[bytes], tensors: Sequence[Info]) -> Path:
    """By struct alone, as `tests.pack`, which would take minutes for these."""
    pairs = [pair("general.architecture", STRING, text("granite_swa")), *pairs]
    head = [b"GGUF", INT.pack(3), LONG.pack(len(tensors)), LONG.pack(len(pairs)), *pairs]
    at = 0
    for name, ne, kind, n_bytes in tensors:
        head += [text(name), INT.pack(len(ne)), *map(LONG.pack, ne), INT.pack(kind), LONG.pack(at)]
        at += -(-n_bytes // 32) * 32
    header = b"".join(head)
    path.write_bytes(header + bytes(-len(header) % 32 + at))
    assert path.stat().st_size <= 100_000_000
    return path


def layers(n: int, *names: str, ne: tuple[int, ...] = (1, 1)) -> list[Info]:
    size = 4 * ne[0] * ne[1]
    return [(f"blk.{i}.{name}", ne, F32, size) for i in range(n) for name in names]


def experts(n_layers: int, n_experts: int, rows: int, *parts: str) -> list[Info]:
    ne, n_bytes = (1, rows, n_experts), rows * n_experts
    return [(f"blk.{i}.{p}.weight", ne, I8, n_bytes) for i in range(n_layers) for p in parts]


QKV = [f"attn_{part}.weight" for part in "qkv"]
GATE_UP = ("ffn_gate_exps", "ffn_up_exps")
ONE = layers(1, *QKV)
HEADS = [f"attention.{key}" for key in ("head_count", "head_count_kv", "key_length")]
NAMES = [(f"{i:08d}{WIDE * 13}", (1, 1, 1, 1), F32, 4) for i in range(MAX_TENSORS - 3)]
PER_LAYER = [array(f"granite_swa.{key}", UINT8, 1 << 20, b"\2" * (1 << 20)) for key in HEADS]
RECORD = [
    pair("gguf_fuse.version", UINT32, INT.pack(1)),
    array("gguf_fuse.tensors", STRING, 1 << 20, bytes(8 << 20)),
    array("gguf_fuse.rows", INT8, 1 << 20, b"\x80" * (1 << 20)),
    array("gguf_fuse.positions", UINT64, 1 << 20, b"\x80" * (8 << 20)),
]

# What crafts it, and the commands that it costs most.
CRAFTED: dict[str, tuple[Callable[[Path], Path], Sequence[str]]] = {
    "long names": (lambda path: write(path, [], ONE + NAMES), ("inspect", "fuse")),
    "layers": (
        lambda path: write(path, [], layers(MAX_TENSORS // 3, *QKV)),
        ("fuse", "unfuse"),
    ),
    "wide keys": (
        lambda path: write(
            path, [pair(f"{i:08d}{WIDE * 240}", UINT8, b"\1") for i in range(MAX_PAIRS - 20)], ONE
        ),
        ("fuse",),
    ),
    "long keys": (
        lambda path: write(
            path, [pair(f"{i:08d}{WIDE}{'k' * 60_000}", UINT8, b"\1") for i in range(1500)], ONE
        ),
        ("inspect",),
    ),
    "strings": (
        lambda path: write(path, [array("x", STRING, MAX_STRINGS, bytes(8 * MAX_STRINGS))], ONE),
        ("inspect",),
    ),
    "short strings as values": (
        lambda path: write(
            path, [pair(f"{i}", STRING, text(WIDE * 1000)) for i in range(MAX_PAIRS - 20)], ONE
        ),
        ("inspect",),
    ),
    "arrays in an array": (
        lambda path: write(
            path,
            [array("x", ARRAY, MAX_NESTED_ARRAYS - 1, (INT.pack(0) + LONG.pack(0)) * (1 << 17))],
            ONE,
        ),
        ("inspect",),
    ),
    "numbers for a million layers": (
        lambda path: write(
            path,
            [pair("granite_swa.embedding_length", UINT32, INT.pack(4)), *PER_LAYER],
            layers(MAX_TENSORS // 2, "attn_qkv.weight", "attn_output.weight", ne=(1, 8)),
        ),
        ("inspect", "unfuse"),
    ),
    "a record of a million": (
        lambda path: write(path, RECORD, layers(1, "attn_qkv.weight")),
        ("unfuse", "fuse"),
    ),
    "experts": (lambda path: write(path, [], experts(64, 1024, 40, *GATE_UP)), ("fuse", "unfuse")),
    "too many experts": (
        lambda path: write(path, [], experts(400, 4096, 7, *GATE_UP)),
        ("inspect", "fuse"),
    ),
    "experts one by one": (
        lambda path: write(
            path,
            [pair("granite_swa.expert_count", UINT32, INT.pack(4096))],
            layers(7, *(f"ffn_{part}.{n}.weight" for part in EXPERT_PARTS for n in range(4096))),
        ),
        ("inspect",),
    ),
    "one expert of many": (
        lambda path: write(
            path,
            [pair("granite_swa.expert_count", UINT32, INT.pack(4096))],
            layers(MAX_TENSORS, "ffn_gate.0.weight"),
        ),
        ("inspect",),
    ),
    "too many experts, fused": (
        lambda path: write(path, [], experts(400, 4096, 14, "ffn_gate_up_exps")),
        ("unfuse",),
    ),
}


SLOW = ("layers", "long names", "experts")  # seconds each, mostly of small system calls


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CRAFTED]
)
def test_bounded(name: str, run: Run, tmp_path: Path) -> None:
    """Each command, on the file or on what fuse made of it; verify compares both."""
    make, commands = CRAFTED[name]
    path, fused = make(tmp_path / "in.gguf"), tmp_path / "fused.gguf"
    flags = ["--fuse-qkv-weights", "--fuse-gate-up-exps", "--no-sync"]
    for command in commands:
        if command == "inspect":
            assert_bounded(run("inspect", path))
        elif command == "fuse":
            assert_bounded(run("fuse", path, fused, *flags))
        else:
            source = fused if fused.exists() else path
            assert_bounded(run("unfuse", source, tmp_path / "back.gguf", "--no-sync"))
    if fused.exists():
        assert_bounded(run("verify", path, fused, "--structure-only"))
    if (tmp_path / "back.gguf").exists() and fused.exists():
        assert (tmp_path / "back.gguf").read_bytes() == path.read_bytes()


def test_verify_of_too_many_experts(run: Run, tmp_path: Path) -> None:
    original = write(tmp_path / "in.gguf", [], experts(400, 4096, 7, *GATE_UP))
    fused = write(tmp_path / "fused.gguf", [], experts(400, 4096, 14, "ffn_gate_up_exps"))
    outcome = run("verify", original, fused, "--structure-only")
    assert_bounded(outcome, 4)
    assert "1638400 experts or heads in all layers; at most 65536 can be compared" in outcome.err


def assert_bounded(outcome: Outcome, *codes: int) -> None:
    assert "Traceback" not in outcome.err, outcome.err[-500:]
    assert outcome.code in (codes or (0, 1, 3)), outcome.err[:500]
    assert outcome.memory < MAX_MEMORY, f"{outcome.memory >> 20} MiB"
    assert outcome.seconds < MAX_SECONDS, f"{outcome.seconds:.1f} s"
