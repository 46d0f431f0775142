"""Whether a model is the one that a LoRA adapter or an importance matrix is for.

As llama.cpp looks at it (llama-adapter.cpp): the architecture, and of each pair of the adapter that
A has the weight's columns and B its rows. Of a matrix, that the sums have the weight's columns.
"""

from __future__ import annotations

from collections.abc import Iterator

from gguf_fuse.format.header import Header
from gguf_fuse.planning.fusions import QKV
from gguf_fuse.planning.imatrix import ENTRY
from gguf_fuse.planning.plan import Refused, Rows

_A, _B = ".lora_a", ".lora_b"  # `lora` needs numpy
_EMBEDDING = "token_embd.weight"


def require_base(header: Header, base: Header, rows: Rows) -> None:
    """Raises Refused where an adapter or matrix cannot be for a model, naming both.

    rows: of the layers that the base has fused, as `unfuse.base_rows` gives them.
    """
    ours, theirs = header.architecture, base.architecture
    if ours is not None and ours != theirs:
        _fail(header, base, f"is for the architecture {ours!r}", f"is of {theirs!r}")
    for name, (columns, n_rows) in _wanted(header):
        found = _dimensions(base, name, rows)
        if found is None:
            if header.metadata["general.type"] == "adapter":
                _fail(header, base, f"changes {name!r}", "does not have it")
            continue
        if columns != found[0] or n_rows not in (None, found[1]):
            shown = [_shown(*found) if n_rows else _shown(found[0]), _shown(columns, n_rows)]
            _fail(header, base, f"{name!r} is for {shown[1]}", f"has {shown[0]} there")


def _wanted(header: Header) -> Iterator[tuple[str, tuple[int, int | None]]]:
    """By weight: columns and rows; None where rows do not matter."""
    for tensor in header.tensors:
        if tensor.name.endswith(ENTRY[0]):
            yield tensor.name.removesuffix(ENTRY[0]), (tensor.ne[0] if tensor.ne else 1, None)
        name = tensor.name.removesuffix(_A)
        b = header.by_name.get(name + _B)
        if name == tensor.name or b is None or min(len(tensor.ne), len(b.ne)) < 2:
            continue
        # Of the embedding, A and B are the other way round.
        yield name, (b.ne[1], tensor.ne[1]) if name == _EMBEDDING else (tensor.ne[0], b.ne[1])


def _dimensions(base: Header, name: str, rows: Rows) -> tuple[int, int] | None:
    """Columns and rows of a weight of the model, where Q, K and V may be fused or separate."""
    tensor = base.by_name.get(name)
    if tensor is not None:
        return (*tensor.ne, 1, 1)[0], (*tensor.ne, 1, 1)[1]
    layer, _, part = name.removesuffix(".weight").rpartition(".")
    fused = base.by_name.get(f"{layer}.{QKV.fused}.weight")
    if fused is not None and part in QKV.parts and layer in rows:
        return fused.ne[0], rows[layer][QKV.parts.index(part)]
    q = base.by_name.get(f"{layer}.{QKV.parts[0]}.weight")
    if q is not None and part == QKV.fused and layer in rows:
        return q.ne[0], sum(rows[layer])
    return None


def _shown(columns: int, rows: int | None = None) -> str:
    return f"{columns} columns" + ("" if rows is None else f" and {rows} rows")


def _fail(header: Header, base: Header, ours: str, theirs: str) -> None:
    raise Refused(
        f"{header.path}: {ours}, but {base.path} {theirs}; --base wants the model that this file "
        "was made for"
    )
