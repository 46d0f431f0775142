"""Importance matrices: the entries of Q, K and V become the entry of attn_qkv, and back.

llama-imatrix writes, for each weight, the sums of squares of its inputs (`NAME.in_sum2`, float32,
ne = [row length, 1]) and how many there were (`NAME.counts`, float32, ne = [1, 1]). Q, K and V
multiply the same input, so their entries are the same, and the fused weight's entry is that one.
llama-quantize looks an entry up by the weight's name.
"""

from __future__ import annotations

from dataclasses import replace

from gguf_fuse.format.header import Header, TensorInfo
from gguf_fuse.format.source import GGUFError
from gguf_fuse.format.types import type_name
from gguf_fuse.models.names import attention_layers
from gguf_fuse.planning import record
from gguf_fuse.planning.fuse import joined_plan, require_fusable
from gguf_fuse.planning.fusions import QKV
from gguf_fuse.planning.plan import (
    KEPT_SEPARATE,
    Join,
    Layer,
    Plan,
    Read,
    Rows,
    Status,
    refuse_any,
    same_data,
)
from gguf_fuse.planning.record import POSITIONS_KEY
from gguf_fuse.planning.unfuse import Split, split_plan

ENTRY = (".in_sum2", ".counts")
_FUSED_ENDS = tuple(f".{QKV.fused}.weight{end}" for end in ENTRY)


def examine(header: Header, read: Read, *, rows: Rows | None = None) -> tuple[Layer, ...]:
    """Every layer with an entry of Q, K, V or the fused weight.

    rows: as `unfuse.base_rows` gives them. Raises GGUFError where half an entry is missing or no
    float32.
    """
    for tensor in header.tensors:
        _check_entry(header, tensor)
    return tuple(_decide(header, layer, read, rows) for layer in _layer_names(header))


def fuse(header: Header, read: Read, *, rows: Rows | None = None) -> Plan:
    """The plan of the matrix for the fused model.

    read: a range of the file. rows: layers that the model has fused; None: all of them.

    Raises Refused where entries of Q, K and V differ, NothingToDo where no layer has all three,
    GGUFError as `examine` does.
    """
    record.refuse_twice(header)
    layers = examine(header, read, rows=rows)
    refuse_any(header, layers, Status.MISMATCH)
    require_fusable(header, layers, "no entry of attn_q, attn_k or attn_v")
    return joined_plan(header, layers)


def unfuse(header: Header) -> Plan:
    """The plan of the matrix for the separate model: the original one if gguf-fuse fused it.

    One that llama-imatrix computed on a fused model gets three equal entries in place of each.
    Raises GGUFError where the record does not fit the file, NothingToDo where nothing is fused.
    """
    if record.exists(header):
        splits = _recorded_splits(header)
    else:
        fused = [f"{layer}{end}" for layer in _layer_names(header) for end in _FUSED_ENDS]
        splits = [Split(header.by_name[name], QKV) for name in fused if name in header.by_name]
    return split_plan(header, splits, f"no entry of {QKV.fused}", f"weight{ENTRY[0]}")


def _layer_names(header: Header) -> list[str]:
    """The layers, by the same rules as a model's: an entry stands for its weight."""
    entries = [tensor for tensor in header.tensors if tensor.name.endswith(ENTRY[0])]
    return attention_layers([replace(t, name=t.name.removesuffix(ENTRY[0])) for t in entries])


def _check_entry(header: Header, tensor: TensorInfo) -> None:
    for end, other in (ENTRY, ENTRY[::-1]):
        if not tensor.name.endswith(end):
            continue
        if tensor.name.removesuffix(end) + other not in header.by_name:
            raise GGUFError(f"{header.path}: {tensor.name!r} has no {other[1:]} beside it")
        if type_name(tensor.type) != "F32":
            raise GGUFError(
                f"{header.path}: {tensor.name!r} is of {type_name(tensor.type)}; importance "
                "matrices are F32"
            )


def _decide(header: Header, layer: str, read: Read, rows: Rows | None) -> Layer:
    there = {part: f"{layer}.{part}.weight{ENTRY[0]}" in header.by_name for part in QKV.parts}
    types = ("F32",) * sum(there.values())
    fused = f"{layer}.{QKV.fused}.weight{ENTRY[0]}" in header.by_name
    if fused and not types:
        return Layer(layer, Status.FUSED, ("F32",), ())
    if fused:
        reason = f"{QKV.fused} has an entry already, beside those of attn_q, attn_k or attn_v"
        return Layer(layer, Status.MISMATCH, types, (), reason)
    absent = [part for part, found in there.items() if not found]
    if absent:
        return Layer(layer, Status.INCOMPLETE, types, (), f"no entry of {', '.join(absent)}")
    if rows is not None and layer not in rows:
        return Layer(layer, Status.SEPARATE, types, (), KEPT_SEPARATE)
    joins = []
    for end in ENTRY:
        parts = tuple(header.by_name[f"{layer}.{part}.weight{end}"] for part in QKV.parts)
        if len({part.ne for part in parts}) > 1 or not same_data(parts, read):
            reason = f"{end[1:]} of attn_q, attn_k and attn_v differ, though they see one input"
            return Layer(layer, Status.MISMATCH, types, (), reason)
        joins.append(Join(f"{layer}.{QKV.fused}.weight{end}", parts[0].ne, parts, shared=True))
    return Layer(layer, Status.FUSABLE, types, (rows or {}).get(layer, ()), joins=tuple(joins))


def _recorded_splits(header: Header) -> list[Split]:
    names = record.names(header)
    triples = record.groups(header, POSITIONS_KEY, len(names), len(QKV.parts))
    if len({place for triple in triples for place in triple}) < len(QKV.parts) * len(names):
        record.damaged(header, f"{POSITIONS_KEY} has a number twice")
    for name in names:
        if name not in header.by_name or not name.endswith(_FUSED_ENDS):
            record.damaged(header, f"{name!r} is recorded, which the file does not have")
    return [
        Split(header.by_name[name], QKV, positions=places)
        for name, places in zip(names, triples, strict=True)
    ]
