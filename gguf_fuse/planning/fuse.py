"""Header -> Plan of the fused file. Pure: no I/O, no printing; every decision falls here.

Rows of a weight are contiguous, so the fused data is Q's bytes, then K's, then V's; of experts, the
first one's gate, its up, the next one's gate, and so on (`kinds` has the table).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NoReturn

from gguf.constants import GGUFValueType

from gguf_fuse.format.header import (
    Header,
    Segment,
    TensorInfo,
    encode_pair,
    row_bytes,
    type_name,
)
from gguf_fuse.planning import record
from gguf_fuse.planning.fusions import GATE_UP, JOINED, KINDS, LAYER, MAX_SLICES, QKV, SHARED, Kind
from gguf_fuse.planning.loaders import Architecture, Loader, Reads, architecture, projector
from gguf_fuse.planning.plan import (
    Join,
    Layer,
    NothingToDo,
    Plan,
    PlannedTensor,
    Refused,
    Status,
    data_of,
    listed,
    summary,
    untouched,
)
from gguf_fuse.planning.record import POSITIONS_KEY, ROWS_KEY

_NORMS = ("attn_q_norm", "attn_k_norm")

# -- what a file holds --------------------------------------------------------------------------


def scalar_names(header: Header) -> list[str]:
    """Tensors whose values decide whether a layer can be fused: the caller reads their bytes."""
    suffixes = tuple(f".{part}.{kind}" for part in QKV.parts for kind in SHARED)
    return [
        tensor.name
        for tensor in header.tensors
        if tensor.name.endswith(suffixes) and tensor.n_bytes == 4
    ]


def loader_of(header: Header, layer: str = "blk.0") -> Architecture:
    """The row of `architectures` that decides for a layer (an encoder file may hold two)."""
    name = header.architecture
    if name is None:
        return architecture("(none)")
    if name != "clip":
        return architecture(name)
    modality = "audio" if layer.startswith("a.") else "vision"
    keys = ("clip.projector_type", f"clip.{modality}.projector_type")
    found = [header.metadata[key] for key in keys if header.metadata.get(key)]
    return projector(str(found[0]) if found else "no projector type", modality)


def examine(
    header: Header,
    scalars: Mapping[str, bytes],
    *,
    kinds: Sequence[Kind] = (QKV,),
    any_architecture: bool = False,
) -> tuple[Layer, ...]:
    """Every layer of the file that has parts of these kinds, and whether it can be fused.

    In the order of the kinds, then of the layers. scalars: the bytes of the tensors that
    `scalar_names` asks for.
    """
    tensors = {tensor.name: tensor for tensor in header.tensors}
    layers = []
    for kind in kinds:
        siblings = _siblings(tensors, kind)
        for layer in layer_names(header.tensors, kind):
            row = loader_of(header, layer)
            decided = _decide(layer, tensors, siblings[layer], scalars, row, kind)
            decided = _obey_encoder(decided, header, tensors)
            layers.append(_obey_loader(decided, row, any_architecture))
    return tuple(layers)


def _siblings(names: Iterable[str], kind: Kind) -> dict[str, list[str]]:
    """By layer: the tensors that belong to a part or to the fused tensor."""
    found: dict[str, list[str]] = {}
    for name in names:
        own = name.rpartition("blk.")[2].partition(".")[2]
        if own.startswith((*kind.parts, kind.fused)):
            found.setdefault(name[: len(name) - len(own) - 1], []).append(own)
    return found


def layer_names(tensors: Iterable[TensorInfo], kind: Kind = QKV) -> list[str]:
    names = {tensor.name for tensor in tensors}
    pattern = kind.layer_pattern
    found = [match[1] for name in names if (match := pattern.fullmatch(name))]
    return _in_order(layer for layer in found if kind is not QKV or _is_attention(layer, names))


def other_layers(tensors: Iterable[TensorInfo]) -> list[str]:
    """Layers without Q, K or V of their own: other attention (MLA, linear), or none."""
    tensors = list(tensors)
    found = [re.match(rf"{LAYER}(?=\.)", tensor.name) for tensor in tensors]
    return _in_order({match[0] for match in found if match}.difference(layer_names(tensors)))


def _in_order(layers: Iterable[str]) -> list[str]:
    """Each once, by number."""
    return sorted(
        set(layers), key=lambda layer: (layer.split("blk")[0], int(layer.rsplit(".", 1)[1]))
    )


def _is_attention(layer: str, names: set[str]) -> bool:
    """Recurrent layers of qwen3next and qwen35 own an attn_qkv of another layout, no output."""
    if f"{layer}.{QKV.fused}.weight" not in names:
        return True
    return f"{layer}.attn_output.weight" in names or f"{layer}.attn_out.weight" in names


def _obey_encoder(layer: Layer, header: Header, tensors: Mapping[str, TensorInfo]) -> Layer:
    """An encoder's graph norms fused Q and K head by head only, and aborts on a wider norm.

    Beside separate ones, the norm of Q decides for both: without it, K is normed as a whole.
    """
    modality = {"v": "vision", "a": "audio"}.get(layer.name.partition(".")[0])
    if header.architecture != "clip" or layer.status is not Status.FUSABLE or modality is None:
        return layer
    n_embd = integer(header, f"clip.{modality}.embedding_length", 0) or layer.rows[0]
    n_head = integer(header, f"clip.{modality}.attention.head_count", 0) or 1
    n_dim = integer(header, f"clip.{modality}.attention.head_dim", 0) or n_embd // n_head
    norms = {name: tensors.get(f"{layer.name}.{name}.weight") for name in _NORMS}
    for name, norm in norms.items():
        if norm is not None and norm.ne[:1] != (n_dim,):
            reason = (
                f"{name} has {listed(norm.ne)} elements, not one head's {n_dim}, as the encoder's "
                f"loader wants beside {QKV.fused}"
            )
            return replace(layer, status=Status.MISMATCH, reason=reason, joins=())
    if norms["attn_k_norm"] is not None and norms["attn_q_norm"] is None:
        reason = (
            "attn_k_norm without attn_q_norm: the encoder's loader norms K as a whole, but head "
            f"by head beside {QKV.fused}"
        )
        return replace(layer, status=Status.MISMATCH, reason=reason, joins=())
    return layer


def _obey_loader(layer: Layer, row: Architecture, any_architecture: bool) -> Layer:
    loader = row.reads(layer.kind).loader
    if any_architecture or loader is Loader.READS_FUSED or layer.status is Status.FUSED:
        return layer
    reason = f"llama.cpp's loader for {row.name} {loader.phrase(layer.kind.words)}"
    return replace(layer, status=Status.SEPARATE, reason=reason, joins=())


def _decide(
    layer: str,
    tensors: Mapping[str, TensorInfo],
    siblings: Sequence[str],
    scalars: Mapping[str, bytes],
    row: Architecture,
    kind: Kind,
) -> Layer:
    fused = tensors.get(f"{layer}.{kind.fused}.weight")
    weights = [tensors.get(f"{layer}.{part}.weight") for part in kind.parts]
    found = [weight for weight in weights if weight is not None]
    types = tuple(type_name(weight.type) for weight in found)
    rows = tuple(kind.rows(weight.ne) for weight in found if weight.ne)
    if fused is not None and not found:
        fused_rows = (kind.rows(fused.ne),) if fused.ne else ()
        return Layer(layer, Status.FUSED, (type_name(fused.type),), fused_rows, kind=kind)
    missing = [f"{part}.weight" for part, w in zip(kind.parts, weights, strict=True) if w is None]
    if missing:
        reason = f"no {', '.join(missing)}"
        return Layer(layer, Status.INCOMPLETE, types, rows, reason, kind=kind)
    joins, why_not = _joins(layer, tensors, scalars, row, kind)
    why_not = why_not or _unequal_rows(rows, row, kind) or _in_the_way(siblings, kind)
    why_not = why_not or _normed_rows(layer, tensors, row, kind)
    if why_not:
        return Layer(layer, Status.MISMATCH, types, rows, why_not, kind=kind)
    return Layer(layer, Status.FUSABLE, types, rows, joins=tuple(joins), kind=kind)


def _joins(
    layer: str,
    tensors: Mapping[str, TensorInfo],
    scalars: Mapping[str, bytes],
    row: Architecture,
    fusion: Kind,
) -> tuple[list[Join], str | None]:
    """What to join, or the reason why not. A kind that no part has is not joined."""
    joins: list[Join] = []
    for kind in (*JOINED, *SHARED):
        names = [f"{part}.{kind}" for part in fusion.parts]
        parts = [tensors[f"{layer}.{name}"] for name in names if f"{layer}.{name}" in tensors]
        if not parts:
            continue
        if len(parts) < len(fusion.parts):
            absent = [name for name in names if f"{layer}.{name}" not in tensors]
            return [], f"no {', '.join(absent)} beside the other {kind}"
        reason = (
            _not_shared(parts, kind, scalars, row.name, row.reads(fusion))
            if kind in SHARED
            else _not_joinable(parts, kind, joins, row.name, row.reads(fusion), fusion)
        )
        if reason:
            return [], reason
        joins.append(_join(f"{layer}.{fusion.fused}.{kind}", parts, kind in SHARED, fusion))
    return joins, None


def _join(name: str, parts: Sequence[TensorInfo], shared: bool, fusion: Kind) -> Join:
    ne = parts[0].ne
    if not shared:
        ne = fusion.with_rows(ne, sum(fusion.rows(part.ne) for part in parts))
    return Join(name, ne, tuple(parts), shared, fusion)


def _not_joinable(
    parts: Sequence[TensorInfo],
    kind: str,
    joins: Sequence[Join],
    name: str,
    reads: Reads,
    fusion: Kind,
) -> str | None:
    n_dims, label = fusion.dims_of(kind), "" if kind == "weight" else "bias "
    for part in parts:
        if len(part.ne) != n_dims:
            return f"{part.name} has {len(part.ne)} dimensions, not {n_dims}"
    if len({part.type for part in parts}) > 1:
        return f"{label}types differ: {', '.join(type_name(part.type) for part in parts)}"
    if row_bytes(parts[0].type, 0) is None:
        return f"{label}{type_name(parts[0].type)} is not known"
    if kind == "weight" and len({part.ne[0] for part in parts}) > 1:
        return f"row lengths differ: {', '.join(str(part.ne[0]) for part in parts)}"
    if fusion is GATE_UP and len({part.ne for part in parts}) > 1:
        return f"{label}dimensions differ: {', '.join(str(list(part.ne)) for part in parts)}"
    if fusion.n_slices(parts[0].ne) > MAX_SLICES:
        return f"{fusion.n_slices(parts[0].ne)} experts; at most {MAX_SLICES} are supported"
    if kind == "weight":
        return None
    if row_bytes(parts[0].type, 1) == 0:
        return f"biases of {type_name(parts[0].type)} come in blocks"
    lengths = tuple(part.ne[0] for part in parts)
    if lengths != joins[0].rows:
        return f"biases of {listed(lengths)} elements for {listed(joins[0].rows)} rows"
    if fusion.n_slices(parts[0].ne) != fusion.n_slices(joins[0].ne):
        return f"biases of {parts[0].ne[-1]} experts for {joins[0].ne[-1]}"
    if not reads.biases:
        return f"llama.cpp's loader for {name} adds no fused bias"
    return None


def _not_shared(
    parts: Sequence[TensorInfo], kind: str, scalars: Mapping[str, bytes], name: str, reads: Reads
) -> str | None:
    if not reads.scales:
        return f"llama.cpp's loader for {name} applies no fused {kind}"
    for part in parts:
        if type_name(part.type) != "F32" or part.n_bytes != 4:
            return f"{part.name} is not one float32"
    if len({part.ne for part in parts}) > 1:
        return f"{kind}s have different dimensions"
    if len({scalars[part.name] for part in parts}) > 1:
        return f"{kind}s differ: a fused tensor has one"
    return None


def _unequal_rows(rows: Sequence[int], row: Architecture, kind: Kind) -> str | None:
    if kind is not QKV or not row.equal_rows or len(set(rows)) == 1:
        return None
    return f"rows differ ({listed(rows)}); the encoder's loader splits {QKV.fused} into equal parts"


def _normed_rows(
    layer: str, tensors: Mapping[str, TensorInfo], row: Architecture, kind: Kind
) -> str | None:
    if kind is not QKV or not row.row_norms_abort:
        return None
    found = next((name for name in _NORMS if f"{layer}.{name}.weight" in tensors), None)
    return f"llama.cpp aborts on {found} beside {QKV.fused} for {row.name}" if found else None


def _in_the_way(siblings: Sequence[str], fusion: Kind) -> str | None:
    """A fused tensor that exists, or a part's tensor that nothing would read any more.

    llama.cpp aborts on left-over tensors, such as a clamp of attn_q alone.
    """
    for name in siblings:
        part, _, kind = name.partition(".")
        if part == fusion.fused:
            return f"{name} is there already"
        if part in fusion.parts and kind not in (*JOINED, *SHARED):
            return f"{name} would have no place beside {fusion.fused}"
    return None


# -- fuse ---------------------------------------------------------------------------------------


def fuse(
    header: Header,
    scalars: Mapping[str, bytes],
    *,
    kinds: Sequence[Kind] = (QKV,),
    any_architecture: bool = False,
) -> Plan:
    """The plan of the file with these kinds of tensors fused.

    Raises Refused where the result would not load (`any_architecture` overrides what the table of
    architectures says), NothingToDo where no layer can be fused.
    """
    refuse_other_kinds(header)
    layers = examine(header, scalars, kinds=kinds, any_architecture=any_architecture)
    if record.exists(header):
        raise NothingToDo(
            header,
            "nothing to fuse: gguf-fuse has fused this file already; to fuse more of it, unfuse it "
            f"and give {' and '.join(kind.flag for kind in KINDS)} at once",
            layers,
        )
    fusable = tuple(layer for layer in layers if layer.status is Status.FUSABLE)
    if not fusable:
        _raise_nothing_to_fuse(header, layers, kinds)
    joins = [join for layer in fusable for join in layer.joins]
    pairs = _encode_record(header, joins)
    return record.fused_plan(header, pairs, _fused_tensors(header, joins), layers, fusable)


def refuse_other_kinds(header: Header) -> None:
    """Raises Refused for GGUF files that are no models: adapters and importance matrices."""
    if not header.is_model:
        kind = header.metadata["general.type"]
        raise Refused(
            f"{header.path}: general.type is {kind!r}: this is no model; --base wants the "
            "model that the adapter or importance matrix is for"
        )


def _raise_nothing_to_fuse(
    header: Header, layers: tuple[Layer, ...], kinds: Sequence[Kind]
) -> NoReturn:
    separate = [layer for layer in layers if layer.status is Status.SEPARATE]
    if separate:
        refuse_loader(header, loader_of(header, separate[0].name), separate[0].kind)
    if not layers:
        nothing = " or ".join(_no_parts(kind) for kind in kinds)
        raise NothingToDo(header, f"nothing to fuse: no {nothing}")
    raise NothingToDo(header, f"nothing to fuse: {summary(layers)}", layers)


def _no_parts(kind: Kind) -> str:
    *others, last = kind.parts
    layer = "attention layer" if kind is QKV else "layer"
    return f"{layer} has {', '.join(others)} or {last}"


def refuse_loader(header: Header, row: Architecture, kind: Kind = QKV) -> NoReturn:
    loader = row.reads(kind).loader.phrase(kind.words)
    raise Refused(
        f"{header.path}: architecture {row.name!r}: llama.cpp's loader {loader}, so the "
        "new file would not load; --any-architecture writes it all the same"
    )


def _fused_tensors(header: Header, joins: Iterable[Join]) -> Iterable[PlannedTensor]:
    stands_for = {join.parts[0].name: join for join in joins}
    absorbed = {part.name for join in stands_for.values() for part in join.parts[1:]}
    for tensor in header.tensors:
        join = stands_for.get(tensor.name)
        if join is not None:
            yield PlannedTensor(join.name, join.ne, tensor.type, _joined(header, join))
        elif tensor.name not in absorbed:
            yield untouched(header, tensor)


def _joined(header: Header, join: Join) -> tuple[Segment, ...]:
    """Slice by slice, the parts in turn; of shared values, the first part's."""
    if join.shared:
        return (data_of(header, join.parts[0]),)
    n_slices = join.kind.n_slices(join.ne)
    slices = [_slices(data_of(header, part), n_slices) for part in join.parts]
    return tuple(segment for turn in zip(*slices, strict=True) for segment in turn)


def _slices(whole: Segment, n: int) -> list[Segment]:
    n_bytes = whole.n_bytes // n
    return [Segment(whole.start + at * n_bytes, n_bytes) for at in range(n)]


def _encode_record(header: Header, joins: Sequence[Join]) -> list[bytes]:
    """The metadata pairs that the way back needs.

    rows, positions: for each fused tensor, as many numbers as its kind has parts.
    """
    position = {tensor.name: index for index, tensor in enumerate(header.tensors)}
    order = header.byte_order
    rows = [n for join in joins for n in join.rows]
    positions = [position[part.name] for join in joins for part in join.parts]
    return [
        *record.start(header, [join.name for join in joins]),
        encode_pair(ROWS_KEY, GGUFValueType.UINT64, rows, order),
        encode_pair(POSITIONS_KEY, GGUFValueType.UINT64, positions, order),
    ]


def integer(header: Header, key: str, layer: int) -> int | None:
    """A value that is one number for all layers, or an array with one for each."""
    value = header.metadata.get(key)
    if isinstance(value, list):
        value = value[layer] if layer < len(value) else None
    return value if type(value) is int else None
