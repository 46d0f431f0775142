"""Header -> Plan of the fused file; every decision falls here.

Rows of a weight are contiguous, so the fused data is Q's bytes, then K's, then V's; of experts, the
first one's gate, its up, the next one's gate, and so on (`fusions` has the table).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

from gguf_fuse.format.header import Header, TensorInfo
from gguf_fuse.format.types import F32, blocked, is_known, type_name
from gguf_fuse.format.values import ValueType
from gguf_fuse.models.keys import integer, string
from gguf_fuse.models.names import ENCODER_PREFIXES
from gguf_fuse.planning import plan, record, ssm_in
from gguf_fuse.planning.fusions import (
    ALL,
    EXPERTS,
    FUSIONS,
    MAX_SLICES,
    QKV,
    SHARED,
    SSM_IN,
    SUFFIXES,
    Fusion,
    Stack,
    too_many_in_all,
)
from gguf_fuse.planning.loaders import Architecture, Loader, Reads, architecture, projector
from gguf_fuse.planning.tensor_extra import TensorExtra

ENCODER_BESIDE_TEXT = "an encoder lies beside the text model, as Ollama keeps both in one file"


def loader_of(header: Header, layer: str = "blk.0") -> Architecture:
    """The row of `architectures` that decides for a layer (an encoder file may hold two)."""
    name = header.architecture
    if name is None:
        return architecture("(none)")
    if name != "clip":
        return architecture(name)
    modality = "audio" if layer.startswith("a.") else "vision"
    keys = ("clip.projector_type", f"clip.{modality}.projector_type")
    found = [name for key in keys if (name := string(header, key))]
    return projector(found[0] if found else "no projector type", modality)


def encoder_beside_text(header: Header) -> str | None:
    """The first tensor of an encoder in the text model's own file, as Ollama keeps them."""
    if header.architecture == "clip":
        return None
    names = (tensor.name for tensor in header.tensors)
    return next((name for name in names if name.startswith(ENCODER_PREFIXES)), None)


def require_no_encoder(header: Header, any_architecture: bool) -> None:
    """Raises Refused for a text model with an encoder in its file; no row of the table is for it.

    any_architecture: the text model's layers are done all the same, the encoder's never.
    """
    name = encoder_beside_text(header)
    if name is None or any_architecture:
        return
    raise plan.Refused(
        f"{header.path}: holds an encoder ({name!r}) beside the text model of architecture "
        f"{header.architecture!r}, as Ollama keeps both in one file; llama.cpp wants the encoder "
        "in a file of its own (mmproj): convert the model with llama.cpp's convert_hf_to_gguf.py, "
        "then again with --mmproj, or get the two GGUFs from the hub; --any-architecture does the "
        "text model's layers all the same"
    )


def examine(
    header: Header,
    read: plan.Read,
    *,
    fusions: Sequence[Fusion] = (QKV,),
    any_architecture: bool = False,
) -> tuple[plan.Layer, ...]:
    """Every layer of the file that has parts of these fusions, and whether it can be fused.

    In the order of the fusions, then of the layers. read: for scales, which must be equal.
    """
    layers, extra = [], TensorExtra.of(header)
    n_expert = n_experts(header) if EXPERTS in fusions else 0
    for fusion in itertools.chain(*(fusion.of(n_expert) for fusion in fusions)):
        siblings = _siblings(header, fusion)
        names = fusion.layers(header.tensors)
        if isinstance(fusion, Stack):
            _require_enough(header, len(names), n_expert)
        for name in names:
            row = loader_of(header, name)
            layers.append(
                _decide(_Candidate(header, name, fusion, row, siblings[name], read, extra))
            )
    if encoder_beside_text(header):
        layers = [_leave_encoder(layer, any_architecture) for layer in layers]
    return tuple(obey_loader(header, layer, any_architecture) for layer in layers)


def _require_enough(header: Header, n_layers: int, n_expert: int) -> None:
    """It bounds what a damaged file can cost. Raises Refused."""
    if n_layers * n_expert > len(header.tensors):
        raise plan.Refused(
            f"{header.path}: {n_layers} layers of {n_expert} experts one by one, but only "
            f"{len(header.tensors)} tensors"
        )


def n_experts(header: Header) -> int:
    """Raises Refused for more than are supported."""
    n = integer(header, f"{header.architecture}.expert_count", 0) or 0
    if n > MAX_SLICES:
        raise plan.Refused(f"{header.path}: {n} experts; at most {MAX_SLICES} are supported")
    return n


def _leave_encoder(layer: plan.Layer, any_architecture: bool) -> plan.Layer:
    """Of a file with an encoder beside the text model, see `require_no_encoder`."""
    of_text = not layer.name.startswith(ENCODER_PREFIXES)
    if layer.status is plan.Status.FUSED or (of_text and any_architecture):
        return layer
    return replace(layer, status=plan.Status.SEPARATE, reason=ENCODER_BESIDE_TEXT, joins=())


def obey_loader(header: Header, layer: plan.Layer, any_architecture: bool) -> plan.Layer:
    """The layer, left separate where its loader would not read it fused."""
    row = loader_of(header, layer.name)
    loader = row.reads(layer.fusion).loader
    if any_architecture or loader is Loader.READS_FUSED or layer.status is plan.Status.FUSED:
        return layer
    if layer.reason == ENCODER_BESIDE_TEXT:
        return layer
    reason = f"llama.cpp's loader for {row.name} {loader.phrase(layer.fusion.words)}"
    return replace(layer, status=plan.Status.SEPARATE, reason=reason, joins=())


def _siblings(header: Header, fusion: Fusion) -> dict[str, list[str]]:
    """By layer: the tensors that belong to a part or to the fused tensor."""
    found: dict[str, list[str]] = {}
    for name in header.by_name:
        own = name.rpartition("blk.")[2].partition(".")[2]
        if own.startswith((*fusion.stems, f"{fusion.fused}.")):
            found.setdefault(name[: len(name) - len(own) - 1], []).append(own)
    return found


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A layer that may be fused. siblings: names in it that belong to the fusion."""

    header: Header
    layer: str
    fusion: Fusion
    row: Architecture
    siblings: Sequence[str]
    read: plan.Read
    extra: TensorExtra

    def tensor(self, name: str) -> TensorInfo | None:
        return self.header.by_name.get(f"{self.layer}.{name}")

    @property
    def reads(self) -> Reads:
        return self.row.reads(self.fusion)


def _decide(one: _Candidate) -> plan.Layer:
    fusion, fused = one.fusion, one.tensor(f"{one.fusion.fused}.weight")
    weights = {f"{part}.weight": one.tensor(f"{part}.weight") for part in fusion.parts}
    found = [weight for weight in weights.values() if weight is not None]
    shown = [fused] if fused is not None and not found else found
    types = tuple(type_name(weight.type) for weight in shown)
    rows = tuple(fusion.rows(weight.ne) for weight in shown if weight.ne)
    layer = partial(plan.Layer, one.layer, types=types, rows=rows, fusion=fusion)
    if not found:
        return layer(plan.Status.FUSED)
    missing = [name for name, weight in weights.items() if weight is None]
    if missing:
        return layer(plan.Status.INCOMPLETE, reason=f"no {', '.join(missing)}")
    joins, why_not = ssm_in.cut(one.header, one.layer) if fusion is SSM_IN else _joins(one)
    why_not = why_not or _unequal_rows(one, rows) or _in_the_way(one)
    why_not = why_not or _norms_in_the_way(one, rows) or one.extra.why_not_joined(joins)
    if why_not:
        return layer(plan.Status.MISMATCH, reason=why_not)
    return layer(plan.Status.FUSABLE, joins=tuple(joins))


def _joins(one: _Candidate) -> tuple[list[plan.Join], str | None]:
    """What to join, or the reason why not. A suffix that no part has is not joined."""
    fusion, joins = one.fusion, list[plan.Join]()
    for suffix in SUFFIXES:
        found = {f"{part}.{suffix}": one.tensor(f"{part}.{suffix}") for part in fusion.parts}
        parts = tuple(part for part in found.values() if part is not None)
        if not parts:
            continue
        if len(parts) < len(fusion.parts):
            absent = [name for name, part in found.items() if part is None]
            return [], f"no {', '.join(absent)} beside the other {suffix}"
        shared, ne = suffix in SHARED, parts[0].ne
        reason = _not_shared(one, parts, suffix) if shared else _not_joinable(parts, suffix, fusion)
        if suffix == "bias":
            reason = reason or _misfit_biases(one, parts, joins[0])
        if reason:
            return [], reason
        if not shared:
            ne = fusion.joined_ne([part.ne for part in parts], suffix)
        joins.append(plan.Join(f"{one.layer}.{fusion.fused}.{suffix}", ne, parts, shared, fusion))
    return joins, None


def _not_joinable(parts: Sequence[TensorInfo], suffix: str, fusion: Fusion) -> str | None:
    """Why weights, or biases, cannot be laid end to end."""
    label = "bias " if suffix == "bias" else ""
    for part in parts:
        if not fusion.fits(part.ne, suffix):
            return f"{part.name} has {len(part.ne)} dimensions, not {fusion.dims_of(suffix)}"
        if 0 in part.ne:
            return f"{part.name} has no elements"
    if len({part.type for part in parts}) > 1:
        return f"{label}types differ: {', '.join(type_name(part.type) for part in parts)}"
    if not is_known(parts[0].type):
        return f"{label}{type_name(parts[0].type)} is not known"
    if suffix == "weight" and len({part.ne[0] for part in parts}) > 1:
        return f"row lengths differ: {plan.listed(part.ne[0] for part in parts)}"
    alike = {len(part.ne) if fusion is QKV else part.ne for part in parts}
    if len(alike) > 1:
        return f"{label}dimensions differ: {', '.join(str(list(part.ne)) for part in parts)}"
    return fusion.too_many(parts[0].ne, suffix)


def _misfit_biases(one: _Candidate, parts: Sequence[TensorInfo], weight: plan.Join) -> str | None:
    """Why biases do not fit the weights they belong to."""
    if blocked(parts[0].type):
        return f"biases of {type_name(parts[0].type)} come in blocks"
    lengths = tuple(part.ne[0] for part in parts)
    if lengths != weight.rows:
        return f"biases of {plan.listed(lengths)} elements for {plan.listed(weight.rows)} rows"
    n_biases, n_slices = (
        one.fusion.n_slices(ne, suffix)
        for ne, suffix in ((parts[0].ne, "bias"), (weight.ne, "weight"))
    )
    if n_biases != n_slices:
        return f"biases of {n_biases} experts for {n_slices}"
    if not one.reads.biases:
        return f"llama.cpp's loader for {one.row.name} adds no fused bias"
    return None


def _not_shared(one: _Candidate, parts: Sequence[TensorInfo], suffix: str) -> str | None:
    if not one.reads.scales:
        return f"llama.cpp's loader for {one.row.name} applies no fused {suffix}"
    for part in parts:
        if part.type != F32 or part.n_bytes != 4:
            return f"{part.name} is not one float32"
    if len({part.ne for part in parts}) > 1:
        return f"{suffix}s have different dimensions"
    if not plan.same_data(parts, one.read):
        return f"{suffix}s differ: a fused tensor has one"
    return None


def _in_the_way(one: _Candidate) -> str | None:
    """A fused tensor that exists, or a part's tensor that nothing would read any more.

    llama.cpp aborts on left-over tensors, such as a clamp of attn_q alone.
    """
    fusion = one.fusion
    known = {f"{part}.{suffix}" for part in fusion.parts for suffix in SUFFIXES}
    for name in one.siblings:
        if name.startswith(f"{fusion.fused}."):
            return f"{name} is there already"
        if name not in known:
            return f"{name} would have no place beside {fusion.fused}"
    return None


def _unequal_rows(one: _Candidate, rows: Sequence[int]) -> str | None:
    if one.fusion is not QKV or not one.row.equal_rows or len(set(rows)) == 1:
        return None
    numbers = plan.listed(rows)
    return f"rows differ ({numbers}); the encoder's loader splits {QKV.fused} into equal parts"


def _norms_in_the_way(one: _Candidate, rows: Sequence[int]) -> str | None:
    """Norms of Q and K that llama.cpp computes otherwise beside a fused tensor, or aborts on.

    An encoder's graph norms fused Q and K head by head only, and aborts on a wider norm. Beside
    separate ones, the norm of Q decides for both: without it, K is normed as a whole.
    """
    if one.fusion is not QKV:
        return None
    found = {name: one.tensor(f"{name}.weight") for name in ("attn_q_norm", "attn_k_norm")}
    norms = {name: norm for name, norm in found.items() if norm is not None}
    if norms and one.row.row_norms_abort:
        return f"llama.cpp aborts on {next(iter(norms))} beside {QKV.fused} for {one.row.name}"
    modality = {"v": "vision", "a": "audio"}.get(one.layer.partition(".")[0])
    if one.header.architecture != "clip" or modality is None:
        return None
    key = f"clip.{modality}."
    n_embd = integer(one.header, f"{key}embedding_length", 0) or rows[0]
    n_head = integer(one.header, f"{key}attention.head_count", 0) or 1
    n_dim = integer(one.header, f"{key}attention.head_dim", 0) or n_embd // n_head
    for name, norm in norms.items():
        if norm.ne[:1] != (n_dim,):
            return (
                f"{name} has {plan.listed(norm.ne)} elements, not one head's {n_dim}, as the "
                f"encoder's loader wants beside {QKV.fused}"
            )
    if list(norms) == ["attn_k_norm"]:
        return (
            "attn_k_norm without attn_q_norm: the encoder's loader norms K as a whole, but head "
            f"by head beside {QKV.fused}"
        )
    return None


def fuse(
    header: Header,
    read: plan.Read,
    *,
    fusions: Sequence[Fusion] = (QKV,),
    any_architecture: bool = False,
) -> plan.Plan:
    """The plan of the file with these fusions made. read: as for `examine`.

    Raises Refused where the result would not load (`any_architecture` overrides what the table of
    loaders says), NothingToDo where no layer can be fused.
    """
    require_model(header)
    require_no_encoder(header, any_architecture)
    layers = examine(header, read, fusions=fusions, any_architecture=any_architecture)
    _require_stackable(header, layers)
    flags = " and ".join(fusion.flag for fusion in ALL if fusion in (*FUSIONS, *fusions))
    record.refuse_twice(header, f"; to fuse more of it, unfuse it and give {flags} at once", layers)
    require_fusable(header, layers, f"no {' or '.join(map(_no_parts, fusions))}")
    rows = [n for layer in layers for join in layer.joins for n in join.rows]
    return joined_plan(header, layers, (record.ROWS_KEY, ValueType.UINT64, rows))


def _require_stackable(header: Header, layers: Sequence[plan.Layer]) -> None:
    """Raises Refused where not all experts can be stacked: no loader would read such a file."""
    experts = [layer for layer in layers if isinstance(layer.fusion, Stack)]
    left = [layer for layer in experts if layer.status is not plan.Status.FUSABLE]
    if left and left[0].status is plan.Status.SEPARATE:
        refuse_loader(header, loader_of(header), left[0].fusion)
    if left:
        raise plan.Refused(
            f"{header.path}: {plan.summary(left)}; a loader reads the experts of all layers "
            f"stacked or none, so without {EXPERTS.flag}, or convert the model anew"
        )


def require_model(header: Header) -> None:
    """Raises Refused for GGUF files that are no models: adapters and importance matrices."""
    if not header.is_model:
        raise plan.Refused(
            f"{header.path}: general.type is {header.metadata['general.type']!r}: this is no "
            "model; --base wants the model that the adapter or importance matrix is for"
        )


def require_fusable(header: Header, layers: tuple[plan.Layer, ...], nothing: str) -> None:
    """Raises where no layer can be fused: Refused if for llama.cpp's loader, else NothingToDo.

    nothing: what to say where there are no layers.
    """
    if any(layer.status is plan.Status.FUSABLE for layer in layers):
        return
    for layer in layers:
        by_loader = layer.reason not in (plan.KEPT_SEPARATE, ENCODER_BESIDE_TEXT)
        if layer.status is plan.Status.SEPARATE and by_loader:
            refuse_loader(header, loader_of(header, layer.name), layer.fusion)
    mixed = header.is_model and plan.of_mixed_types(layers)
    hint = "; gguf-fuse recipe shows how they can be of one type" if mixed else ""
    problem = f"nothing to fuse: {plan.summary(layers) or nothing}{hint}"
    raise plan.NothingToDo(header, problem, layers)


def _no_parts(fusion: Fusion) -> str:
    if isinstance(fusion, Stack):
        return "layer has ffn_gate.0.weight and as many more as expert_count says"
    *others, last = fusion.parts
    if not others:
        return f"layer has {last}"
    layer = "attention layer" if fusion is QKV else "layer"
    return f"{layer} has {', '.join(others)} or {last}"


def refuse_loader(header: Header, row: Architecture, fusion: Fusion) -> NoReturn:
    loader = row.reads(fusion).loader.phrase(fusion.words)
    raise plan.Refused(
        f"{header.path}: architecture {row.name!r}: llama.cpp's loader {loader}, so the "
        "new file would not load; --any-architecture writes it all the same"
    )


def joined_plan(header: Header, layers: Sequence[plan.Layer], *pairs: record.Pair) -> plan.Plan:
    """The plan with the joins of the layers made. pairs: of the record, beside the positions.

    Raises Refused for more experts than are supported.
    """
    joins = [join for layer in layers for join in layer.joins]
    if too_many := too_many_in_all(join.n_slices for join in joins):
        raise plan.Refused(f"{header.path}: {too_many}")
    places = [header.position[part.name] for join in joins for part in join.parts]
    own = (record.POSITIONS_KEY, ValueType.UINT64, places)
    tensors, names = _joined_tensors(header, joins), [join.name for join in joins]
    return record.fused_plan(header, layers, tensors, names, *pairs, own)


def _joined_tensors(header: Header, joins: Sequence[plan.Join]) -> Iterator[plan.PlannedTensor]:
    """The file's tensors in order; what is made of others where the first of these stood."""
    stands_for = {join.parts[0].name: join for join in joins}
    absorbed = {part.name for join in joins for part in join.parts[1:]}
    for tensor in header.tensors:
        join = stands_for.get(tensor.name)
        if join is not None:
            yield from join.made
        elif tensor.name not in absorbed:
            yield plan.untouched(tensor)
