"""qwen3next's old layout: ssm_in becomes attn_qkv and attn_gate, and back; rows move, that is all.

ssm_in has, for each head of K, rows of q, of k, of v, then of z. llama.cpp reads it by "legacy
(slower) path" (build_qkvz in src/models/qwen3next.cpp); its converter now writes q of all heads,
then k, then v into attn_qkv, and z into attn_gate (modify_tensors in conversion/qwen.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from gguf_fuse.format.header import Header, TensorInfo
from gguf_fuse.format.source import Segment
from gguf_fuse.format.types import is_known, type_name
from gguf_fuse.models.keys import integer
from gguf_fuse.planning.fusions import MAX_SLICES, SSM_IN, SUFFIXES
from gguf_fuse.planning.plan import Join, PlannedTensor

QKV_NAME = "attn_qkv.weight"
GATE_NAME = f"{SSM_IN.fused}.weight"


@dataclass(frozen=True, slots=True)
class Cut(Join):
    """ssm_in that is to be two tensors; the record names the gate. per_head: rows of q, k, v, z."""

    per_head: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return self.name.replace(GATE_NAME, QKV_NAME), self.name

    @property
    def rows(self) -> tuple[int, ...]:
        return self.per_head

    @property
    def n_slices(self) -> int:
        return self.parts[0].ne[1] // sum(self.per_head)

    @property
    def made(self) -> tuple[PlannedTensor, ...]:
        old, n_heads = self.parts[0], self.n_slices
        row = old.n_bytes // old.ne[1]
        firsts = range(0, old.ne[1], sum(self.per_head))  # of each head
        ends = accumulate(self.per_head)
        q, k, v, z = (
            tuple(old.data.part((first + end - n) * row, n * row) for first in firsts)
            for n, end in zip(self.per_head, ends, strict=True)
        )
        qkv_name, gate_name = self.names
        n_qkv, n_gate = n_heads * sum(self.per_head[:3]), n_heads * self.per_head[3]
        return (
            PlannedTensor(qkv_name, (old.ne[0], n_qkv), old.type, (*q, *k, *v)),
            PlannedTensor(gate_name, (old.ne[0], n_gate), old.type, z),
        )


def cut(header: Header, layer: str) -> tuple[list[Join], str | None]:
    """The cut of a layer's ssm_in, or the reason why not."""
    old = header.by_name[f"{layer}.ssm_in.weight"]
    for name in (f"ssm_in.{suffix}" for suffix in SUFFIXES[1:]):
        if f"{layer}.{name}" in header.by_name:
            return [], f"{name} would have no place beside {SSM_IN.fused}"
    if f"{layer}.{QKV_NAME}" in header.by_name:
        return [], f"{QKV_NAME} is there already"
    if not is_known(old.type):
        return [], f"{type_name(old.type)} is not known"
    per_head, n_heads = _per_head(header)
    if n_heads > MAX_SLICES:
        return [], f"{n_heads} heads of K; at most {MAX_SLICES} are supported"
    if len(old.ne) != 2 or not min(per_head) or old.ne[1] != n_heads * sum(per_head):
        wanted = f"{n_heads} heads of K with {' + '.join(map(str, per_head))} rows each"
        return [], f"ssm_in of {list(old.ne)} does not have the {wanted} that the metadata says"
    ne = old.ne[0], n_heads * per_head[3]
    name = f"{layer}.{GATE_NAME}"
    return [Cut(name, ne, (old,), shared=False, fusion=SSM_IN, per_head=per_head)], None


def _per_head(header: Header) -> tuple[tuple[int, ...], int]:
    """Rows of q, k, v and z for each head of K, and how many heads; zeros where it is not told."""
    keys = ("group_count", "state_size", "time_step_rank")
    n_k_heads, head, n_v_heads = (
        integer(header, f"{header.architecture}.ssm.{key}", 0) or 0 for key in keys
    )
    if not n_k_heads or n_v_heads % n_k_heads:
        return (0, 0, 0, 0), n_k_heads
    # The loader takes the length of K's heads for V's, too.
    v = head * (n_v_heads // n_k_heads)
    return (head, head, v, v), n_k_heads


def woven(qkv: TensorInfo, gate: TensorInfo, per_head: Sequence[int]) -> tuple[Segment, ...]:
    """The data of ssm_in: head by head the rows of q, k, v and z."""
    row, n_heads = gate.n_bytes // gate.ne[1], gate.ne[1] // per_head[3]
    firsts = [n_heads * sum(per_head[:part]) for part in range(3)]
    parts = [*zip((qkv,) * 3, firsts, per_head[:3], strict=True), (gate, 0, per_head[3])]
    return tuple(
        tensor.data.part((first + head * n) * row, n * row)
        for head in range(n_heads)
        for tensor, first, n in parts
    )
