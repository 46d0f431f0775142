"""Header of a fused file -> Plan of the file with separate tensors.

What gguf-fuse fused it recorded, and the way back gives the very bytes of the original. A file
that was fused elsewhere (by the converter) has no record: the rows of Q, K and V follow from the
head counts, or it is refused; gate and up are halves.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

from gguf_fuse.format.header import Header, TensorInfo
from gguf_fuse.format.types import blocked, is_known, type_name
from gguf_fuse.models.keys import integer
from gguf_fuse.models.names import ENCODER_PREFIXES, layer_order
from gguf_fuse.planning import record, ssm_in
from gguf_fuse.planning.fuse import (
    ENCODER_BESIDE_TEXT,
    examine,
    loader_of,
    n_experts,
    refuse_loader,
    require_model,
    require_no_encoder,
)
from gguf_fuse.planning.fusions import (
    EXPERTS,
    FUSIONS,
    GATE_UP,
    JOINED,
    MAX_SLICES,
    QKV,
    SSM_IN,
    SUFFIXES,
    Fusion,
    Stack,
    fusion_of,
    too_many_in_all,
)
from gguf_fuse.planning.loaders import Loader
from gguf_fuse.planning.plan import (
    Layer,
    Plan,
    PlannedTensor,
    Read,
    Refused,
    Rows,
    Status,
    listed,
    summary,
)
from gguf_fuse.planning.record import POSITIONS_KEY, ROWS_KEY, TENSORS_KEY, VERSION_KEY


@dataclass(frozen=True, slots=True)
class Split:
    """A fused tensor of the file and what it is to become.

    rows: of the parts; of an importance matrix () where no model tells. positions: in the restored
    file; (): where the fused one stands.
    """

    tensor: TensorInfo
    fusion: Fusion
    rows: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()

    @property
    def suffix(self) -> str:
        return self.tensor.name.partition(f".{self.fusion.fused}.")[2]

    @property
    def shared(self) -> bool:
        """Whether each part is what the fused tensor is."""
        return self.suffix not in JOINED

    @property
    def n_slices(self) -> int:
        """How many times the parts take turns."""
        return 1 if self.shared else self.fusion.n_slices(self.tensor.ne, self.suffix)

    @property
    def restored(self) -> dict[str, list[record.Placed]]:
        """By the tensor that they are in, the parts and where each stands in the restored file."""
        return {self.tensor.name: self._placed()}

    def _placed(self) -> list[record.Placed]:
        tensor, fusion = self.tensor, self.fusion
        names = [tensor.name.replace(f".{fusion.fused}.", f".{part}.") for part in fusion.parts]
        if self.shared:
            parts = [PlannedTensor(name, tensor.ne, tensor.type, (tensor.data,)) for name in names]
        else:
            slice_bytes = tensor.n_bytes // self.n_slices
            row = slice_bytes // fusion.rows(tensor.ne, self.suffix)  # bytes
            starts, parts = range(0, tensor.n_bytes, slice_bytes), []
            for name, n_rows, end in zip(names, self.rows, accumulate(self.rows), strict=True):
                data = [tensor.data.part(at + (end - n_rows) * row, n_rows * row) for at in starts]
                ne = fusion.part_ne(tensor.ne, n_rows, self.suffix)
                parts.append(PlannedTensor(name, ne, tensor.type, tuple(data)))
        return list(zip(self.positions or [None] * len(parts), parts, strict=True))


@dataclass(frozen=True, slots=True)
class _Woven(Split):
    """The two tensors that ssm_in is to be put together from. tensor: the gate."""

    qkv: TensorInfo | None = None

    @property
    def n_slices(self) -> int:
        return self.tensor.ne[1] // self.rows[3]

    @property
    def restored(self) -> dict[str, list[record.Placed]]:
        gate, qkv = self.tensor, self.qkv
        assert qkv is not None
        name = gate.name.replace(f".{self.fusion.fused}.", f".{self.fusion.parts[0]}.")
        ne = gate.ne[0], gate.ne[1] + qkv.ne[1]
        old = PlannedTensor(name, ne, gate.type, ssm_in.woven(qkv, gate, self.rows))
        return {gate.name: [(self.positions[0], old)], qkv.name: []}


def unfuse(header: Header, *, any_architecture: bool = False) -> Plan:
    """The plan of the file with separate tensors; the original one if gguf-fuse fused it.

    Raises GGUFError where the record of the fusion does not fit the file, Refused where a file
    without a record cannot be split for certain, NothingToDo where nothing is fused.
    """
    require_model(header)
    splits, kept = _recorded_splits(header), list[Layer]()
    if splits is None:
        require_no_encoder(header, any_architecture)
        kept = _must_stay(header, any_architecture)
        names = {f"{layer.name}.{layer.fusion.fused}.weight" for layer in kept}
        splits = _derived_splits(header, any_architecture, names)
    nothing = f"no attention layer has {QKV.fused}.weight, no layer {GATE_UP.fused}.weight"
    return split_plan(header, splits, summary(kept) or nothing, kept=kept)


def split_plan(
    header: Header,
    splits: Sequence[Split],
    nothing: str,
    weight: str = "weight",
    kept: Sequence[Layer] = (),
) -> Plan:
    """The plan of the file with these splits made. Raises as `record.unfused_plan` does, Refused
    for more experts than are supported.

    weight: the suffix that stands for its layer. kept: layers that stay fused.
    """
    changed = [
        Layer(
            split.tensor.name.removesuffix(f".{split.fusion.fused}.{weight}"),
            Status.FUSED,
            (type_name(split.tensor.type),) * len(split.fusion.parts),
            split.rows,
            fusion=split.fusion,
        )
        for split in splits
        if split.suffix == weight
    ]
    if too_many := too_many_in_all(split.n_slices for split in splits):
        raise Refused(f"{header.path}: {too_many}")
    restored = {name: placed for split in splits for name, placed in split.restored.items()}
    return record.unfused_plan(header, restored, changed, kept, nothing)


def attention_rows(header: Header, layer: str) -> tuple[int, ...]:
    """Rows of Q, K and V in a layer's fused weight; raises as `unfuse` does."""
    name = f"{layer}.{QKV.fused}.weight"
    splits = _recorded_splits(header) or []
    recorded = [split.rows for split in splits if split.tensor.name == name]
    if recorded:
        return recorded[0]
    if any(split.fusion is QKV for split in splits):
        record.damaged(header, f"{TENSORS_KEY} does not name {name!r}")
    return _rows_by_heads(header, layer, header.by_name[name])


def base_rows(header: Header, read: Read, *, any_architecture: bool = False) -> Rows:
    """Of every layer that is fused in a model, which an adapter or a matrix is for.

    A model without any fused layer counts as what `fuse` would make of it. read: as for `examine`.

    Raises Refused for what is no model or cannot be split for certain, GGUFError for a record that
    does not fit.
    """
    require_model(header)
    require_no_encoder(header, any_architecture)
    layers = examine(header, read, any_architecture=any_architecture)
    if any(layer.status is Status.FUSED for layer in layers):
        layers = unfuse(header, any_architecture=True).changed
    else:
        layers = tuple(layer for layer in layers if layer.status is Status.FUSABLE)
    return {layer.name: layer.rows for layer in layers if layer.fusion is QKV}


def _recorded_splits(header: Header) -> list[Split] | None:
    """None for a file without a record."""
    if not any(key in header.metadata for key in record.RECORD_KEYS):
        return None
    version = record.version(header, record.RECORD_VERSIONS)
    names = record.array(header, TENSORS_KEY, str)
    if version != record.version_of(names, record.REPLACED_KEY in header.metadata):
        record.damaged(header, f"{VERSION_KEY} is {version}, its tensors are of another version")
    fusions = [fusion_of(name) or QKV for name in names]
    if any(isinstance(fusion, Stack) for fusion in fusions):
        stacks = EXPERTS.of(n_experts(header))
        fusions = [fusion_of(name, stacks) or QKV for name in names]
    n_parts = sum(len(fusion.parts) for fusion in fusions)
    n_rows = sum(fusion.n_numbers for fusion in fusions)
    rows, positions = record.array(header, ROWS_KEY, int), record.array(header, POSITIONS_KEY, int)
    for key, values, n in ((ROWS_KEY, rows, n_rows), (POSITIONS_KEY, positions, n_parts)):
        if len(values) != n:
            record.damaged(
                header, f"{key} has {len(values)} numbers for {len(names)} fused tensors"
            )
    n_fused = len(names) + sum(fusion is SSM_IN for fusion in fusions)  # attn_qkv beside the gate
    n_restored = len(header.tensors) - n_fused + n_parts
    if len(set(positions) & set(range(n_restored))) < len(positions):
        record.damaged(
            header, f"{POSITIONS_KEY} are not distinct places among {n_restored} tensors"
        )
    record.require_distinct(header, names)
    splits, next_row, next_position = list[Split](), iter(rows), iter(positions)
    for name, fusion in zip(names, fusions, strict=True):
        if name not in header.by_name or not name.endswith(fusion.fused_names):
            record.damaged(header, f"{TENSORS_KEY} names {name!r}, which the file does not have")
        own_rows = tuple(islice(next_row, fusion.n_numbers))
        split = Split(
            header.by_name[name], fusion, own_rows, tuple(islice(next_position, len(fusion.parts)))
        )
        if fusion is SSM_IN:
            split = _woven(header, split)
        else:
            _check_split(header, split)
        splits.append(split)
    return splits


def _woven(header: Header, split: Split) -> _Woven:
    """Raises GGUFError where the two tensors do not have the rows of the record."""
    gate, rows = split.tensor, split.rows
    name = gate.name.replace(ssm_in.GATE_NAME, ssm_in.QKV_NAME)
    qkv = header.by_name.get(name)
    if qkv is None or split.suffix != "weight":
        record.damaged(header, f"{TENSORS_KEY} names {gate.name!r} without {name!r}")
    if not is_known(gate.type):
        raise _unknown_type(header, gate)
    n_heads = gate.ne[1] // rows[3] if len(gate.ne) == 2 and min(rows) > 0 else 0
    wanted = (gate.ne[0], n_heads * sum(rows[:3])), (gate.ne[0], n_heads * rows[3])
    if not 0 < n_heads <= MAX_SLICES or (qkv.ne, gate.ne) != wanted or qkv.type != gate.type:
        record.damaged(header, f"{gate.name!r} and {name!r} do not have {listed(rows)} rows a head")
    return _Woven(gate, split.fusion, rows, split.positions, qkv)


def _unknown_type(header: Header, tensor: TensorInfo) -> Refused:
    return Refused(
        f"{header.path}: tensor {tensor.name!r} is of {type_name(tensor.type)}, whose rows this "
        "gguf-py does not know; a newer one may"
    )


def _check_split(header: Header, split: Split) -> None:
    tensor, fusion, rows = split.tensor, split.fusion, split.rows
    if split.shared:
        return
    place, of_type = f"{header.path}: tensor {tensor.name!r}", type_name(tensor.type)
    if not is_known(tensor.type):
        raise _unknown_type(header, tensor)
    in_blocks = split.suffix == "bias" and blocked(tensor.type)
    if not fusion.can_split(tensor.ne, split.suffix) or 0 in tensor.ne or in_blocks:
        dimensions = list(tensor.ne)
        raise Refused(f"{place} of {of_type} with dimensions {dimensions} has no rows to split")
    if not fusion.splits(tensor.ne, rows, split.suffix):
        n_rows = fusion.rows(tensor.ne, split.suffix)
        record.damaged(header, f"{tensor.name!r} has {n_rows} rows, not {listed(rows)}")
    if too_many := fusion.too_many(tensor.ne, split.suffix):
        raise Refused(f"{place} has {too_many}")


def _must_stay(header: Header, any_architecture: bool) -> list[Layer]:
    """Layers of a file without a record that are to stay fused, and why."""
    kept = []
    for fusion in FUSIONS:
        for layer in fusion.layers(header.tensors):
            weight = header.by_name.get(f"{layer}.{fusion.fused}.weight")
            reason = _why_fused(header, layer, fusion, any_architecture)
            if weight is None or reason is None:
                continue
            types, rows = (type_name(weight.type),), (fusion.rows(weight.ne),)
            kept.append(Layer(layer, Status.FUSED, types, rows, reason, fusion=fusion))
    return kept


def _why_fused(header: Header, layer: str, fusion: Fusion, any_architecture: bool) -> str | None:
    if header.architecture != "clip" and layer.startswith(ENCODER_PREFIXES):
        return ENCODER_BESIDE_TEXT
    row = loader_of(header, layer)
    if any_architecture or fusion is not QKV or not row.mtp_needs_fused:
        return None
    n_blocks = integer(header, f"{row.name}.block_count", 0) or 0
    n_mtp = integer(header, f"{row.name}.nextn_predict_layers", 0) or 0
    if layer_order(layer)[1] < n_blocks - n_mtp:
        return None
    return f"MTP (prediction of further tokens) of {row.name} reads fused {QKV.fused} alone"


def _derived_splits(header: Header, any_architecture: bool, kept: Container[str]) -> list[Split]:
    """A file fused by someone else: rows from the head counts or halves, or a refusal.

    kept: names of weights that stay as they are.
    """
    splits = []
    for fusion in FUSIONS:
        for layer in fusion.layers(header.tensors):
            weight = header.by_name.get(f"{layer}.{fusion.fused}.weight")
            if weight is None or weight.name in kept:
                continue
            row = loader_of(header, layer)
            if row.reads(fusion).loader is not Loader.READS_FUSED and not any_architecture:
                refuse_loader(header, row, fusion)
            by_heads = fusion is QKV
            rows = _rows_by_heads(header, layer, weight) if by_heads else _halves(header, weight)
            for suffix in SUFFIXES:
                tensor = header.by_name.get(f"{layer}.{fusion.fused}.{suffix}")
                if tensor is not None:
                    splits.append(Split(tensor, fusion, rows))
                    _check_split(header, splits[-1])
    return splits


def _halves(header: Header, weight: TensorInfo) -> tuple[int, ...]:
    n_rows = GATE_UP.rows(weight.ne)
    if n_rows % 2:
        raise Refused(
            f"{header.path}: tensor {weight.name!r} has {n_rows} rows, an odd number: it cannot "
            "be split in halves"
        )
    return n_rows // 2, n_rows // 2


def _rows_by_heads(header: Header, layer: str, weight: TensorInfo) -> tuple[int, ...]:
    row = loader_of(header, layer)
    n_rows = QKV.rows(weight.ne)
    if row.equal_rows and n_rows % 3 == 0:
        return (n_rows // 3,) * 3
    index = int(layer.rsplit(".", 1)[1])
    geometries = _head_geometries(header, index, queries=2 if row.gated_q else 1)
    fitting = {rows for rows in geometries if sum(rows) == n_rows}
    if len(fitting) != 1:
        raise Refused(
            f"{header.path}: tensor {weight.name!r} has {n_rows} rows, which the head counts in "
            "the metadata do not explain: it cannot be split for certain"
        )
    return fitting.pop()


def _head_geometries(header: Header, layer: int, queries: int) -> Iterable[tuple[int, ...]]:
    """Rows of Q, K and V as the metadata has them: for full attention and for a window's.

    queries: rows of Q for each element of a head.
    """
    prefix = f"{header.architecture}."
    n_embd = integer(header, prefix + "embedding_length", layer)
    n_head = integer(header, prefix + "attention.head_count", layer)
    if not n_embd or not n_head:
        return
    n_head_kv = integer(header, prefix + "attention.head_count_kv", layer) or n_head
    for suffix in ("", "_swa"):
        k = integer(header, f"{prefix}attention.key_length{suffix}", layer) or n_embd // n_head
        v = integer(header, f"{prefix}attention.value_length{suffix}", layer) or n_embd // n_head
        yield queries * n_head * k, n_head_kv * k, n_head_kv * v
