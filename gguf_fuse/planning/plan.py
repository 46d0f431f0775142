"""The Plan of a new file: each tensor and the ranges of the source that make its data.

The planners (`fuse`, `unfuse`, and those of adapters and matrices) make it, or raise Refused or
NothingToDo; `writing` cuts it into shards and carries it out, and knows nothing of fusion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from gguf_fuse.format.header import Header, TensorInfo
from gguf_fuse.format.source import GGUFError, Segment
from gguf_fuse.format.values import ByteOrder
from gguf_fuse.planning.fusions import QKV, Fusion

Pieces = tuple[Segment | bytes, ...]  # of a metadata pair, end to end

Read = Callable[[Segment], bytes]  # a small range: planning opens no file itself
READ_BYTES = 1 << 20  # that are looked at, or computed, at once: memory does not grow

Rows = dict[str, tuple[int, ...]]  # of Q, K and V in the layers that a base has fused, by name

KEPT_SEPARATE = "the base has no attn_qkv there"  # a reason of layers of adapters and matrices


class Refused(GGUFError):
    """The file is sound, but writing what was asked for would make a file that does not load."""


class NothingToDo(GGUFError):
    """No layer can be fused, or unfused. `layers` says why, one by one."""

    def __init__(self, header: Header, message: str, layers: tuple[Layer, ...] = ()) -> None:
        super().__init__(f"{header.path}: {message}")
        self.header = header
        self.layers = layers


class Status(Enum):
    FUSABLE = "fusable"
    FUSED = "fused"
    MISMATCH = "not fusable"  # all parts are there, but cannot be one tensor
    INCOMPLETE = "incomplete"  # the layer shares K or V with another, or has no such part
    SEPARATE = "separate"  # the loader would not read them fused


@dataclass(frozen=True, slots=True)
class Computed:
    """New bytes that no file has, n_bytes of them; made when they are written, then forgotten."""

    n_bytes: int
    make: Callable[[], bytes]


def new_bytes(data: bytes | Computed) -> memoryview:
    return memoryview(data.make() if isinstance(data, Computed) else data)


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the new file; its data is the segments, end to end."""

    name: str
    ne: tuple[int, ...]
    type: int
    segments: tuple[Segment | Computed, ...]

    @property
    def n_bytes(self) -> int:
        return sum(segment.n_bytes for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Join:
    """Tensors of one layer that are (to be) one: parts in the order of their fusion."""

    name: str
    ne: tuple[int, ...]
    parts: tuple[TensorInfo, ...]
    shared: bool
    fusion: Fusion = QKV

    @property
    def suffix(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the new tensors."""
        return (self.name,)

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(self.fusion.rows(part.ne, self.suffix) for part in self.parts)

    @property
    def n_slices(self) -> int:
        """How many times the parts take turns."""
        return 1 if self.shared else self.fusion.n_slices(self.ne, self.suffix)

    @property
    def made(self) -> tuple[PlannedTensor, ...]:
        """Slice by slice, the parts in turn; of shared values, the first part's."""
        parts, n = self.parts[:1] if self.shared else self.parts, self.n_slices
        sized = [(part.data, part.n_bytes // n) for part in parts]
        data = tuple(data.part(at * size, size) for at in range(n) for data, size in sized)
        return (PlannedTensor(self.name, self.ne, self.parts[0].type, data),)


@dataclass(frozen=True, slots=True)
class Layer:
    """What was found in one layer. types, rows: of the parts, or of the one fused tensor."""

    name: str
    status: Status
    types: tuple[str, ...]
    rows: tuple[int, ...]
    reason: str | None = None
    joins: tuple[Join, ...] = ()
    fusion: Fusion = QKV

    @property
    def label(self) -> str:
        """The name; with the tensor where it is not attention's: blk.0.ffn_gate_up_exps."""
        return self.name if self.fusion is QKV else f"{self.name}.{self.fusion.label}"


@dataclass(frozen=True, slots=True)
class Plan:
    """A new file: its metadata, its tensors in order, and what became of each layer.

    metadata: by key, the bytes of each pair: as they lie in the source, or new ones, end to end.
    may_add_keys: whether keys of ours may be added to the metadata (for shards, for padding): in a
    fused file, but not on the way back.
    """

    version: int
    byte_order: ByteOrder
    alignment: int
    metadata: Mapping[str, Pieces]
    tensors: tuple[PlannedTensor, ...]
    changed: tuple[Layer, ...]
    skipped: tuple[Layer, ...]
    may_add_keys: bool


def same_data(tensors: Sequence[TensorInfo], read: Read) -> bool:
    """Whether tensors of one size hold the same bytes."""
    return all(
        len(
            {read(tensor.data.part(at, min(READ_BYTES, tensor.n_bytes - at))) for tensor in tensors}
        )
        == 1
        for at in range(0, tensors[0].n_bytes, READ_BYTES)
    )


def untouched(tensor: TensorInfo) -> PlannedTensor:
    return PlannedTensor(tensor.name, tensor.ne, tensor.type, (tensor.data,))


def summary(layers: Sequence[Layer]) -> str:
    """The reasons of skipped layers, alike ones counted: "30 layers: types differ: Q4_K, ..."."""
    counts: dict[str, list[str]] = {}
    for layer in layers:
        counts.setdefault(layer.reason or "already fused", []).append(layer.label)
    return "; ".join(
        f"{names[0] if len(names) == 1 else f'{len(names)} layers'}: {reason}"
        for reason, names in counts.items()
    )


def of_mixed_types(layers: Sequence[Layer]) -> list[Layer]:
    """Attention layers whose weights have different types: a recipe may make them fusable."""
    return [
        layer
        for layer in layers
        if layer.status is Status.MISMATCH and layer.fusion is QKV and len(set(layer.types)) > 1
    ]


def refuse_any(header: Header, layers: Sequence[Layer], status: Status, hint: str = "") -> None:
    """Raises Refused, with their reasons and then the hint, if layers have this status."""
    found = [layer for layer in layers if layer.status is status]
    if found:
        raise Refused(f"{header.path}: {summary(found)}{hint}")


def listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
