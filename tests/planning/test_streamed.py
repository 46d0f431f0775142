"""Adapters and importance matrices are read and computed in pieces: memory does not grow with them.

The files are holes of zeros after their headers: large, but they take no room on the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.compare import sha256
from tests.pack import F16, F32, A, B, File, Sparse, Tensor, lora, matrix, save
from tests.server import Run

BF16 = 30
MOST = 24 << 20  # of what a large file may take more than a small one


def sparse(file: File, tensors: list[tuple[str, tuple[int, ...], int]]) -> Sparse:
    """The file with these tensors, laid out in order, and zeros for all their data."""
    sizes, offset = {F32: 4, F16: 2, BF16: 2}, 0
    file.tensors = []
    for name, ne, type in tensors:
        file.tensors.append(Tensor(name, ne, type, b"", offset))
        n_bytes = sizes[type]
        for n in ne:
            n_bytes *= n
        offset += -(-n_bytes // 32) * 32
    head = file.pack()
    return Sparse(head, len(head) + offset)


def adapter(n: int) -> Sparse:
    """Rows and columns of n elements; ranks and types that make both A and B new."""
    parts = (("q", 8, F16), ("k", 6, F16), ("v", 6, BF16))
    tensors = []
    for part, rank, type in parts:
        name = f"blk.0.attn_{part}.weight"
        tensors += [(name + A, (n, rank), type), (name + B, (rank, n), type)]
    return sparse(lora(), tensors)


def importance(n: int) -> Sparse:
    tensors = []
    for part in "qkv":
        name = f"blk.0.attn_{part}.weight"
        tensors += [(f"{name}.in_sum2", (n,), F32), (f"{name}.counts", (1,), F32)]
    return sparse(matrix(), tensors)


@pytest.mark.parametrize(
    ("make", "n"), [(adapter, 500_000), (importance, 10_000_000)], ids=["adapter", "matrix"]
)
def test_memory(make: Callable[[int], Sparse], n: int, run: Run, tmp_path: Path) -> None:
    peaks = []
    for size in (1000, n):
        paths = [tmp_path / f"{name}{size}" for name in ("in", "fused", "back")]
        original = save(make(size), paths[0])
        done = [
            run(way, *pair, "--no-sync")
            for way, pair in zip(("fuse", "unfuse"), (paths[:2], paths[1:]), strict=True)
        ]
        assert [one.code for one in done] == [0, 0], done
        assert sha256(paths[2]) == sha256(original)
        peaks.append([one.memory for one in done])
    small, large = peaks
    assert large[0] < small[0] + MOST
    assert large[1] < small[1] + MOST
