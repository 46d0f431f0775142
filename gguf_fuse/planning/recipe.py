"""Header -> Recipe: what llama-quantize must do so that layers of different types can be fused.

llama-quantize gives each tensor the type that its mix has for it, and the mixes differ from release
to release, as do those of who publishes files. So the recipe names the type of every tensor that
it might quantize: where the type is the one that the tensor has, its bytes are copied.
Source: llama.cpp, tools/quantize/quantize.cpp and src/llama-quant.cpp (November 2026).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gguf_fuse.choices import WayName
from gguf_fuse.format.header import Header, TensorInfo
from gguf_fuse.format.types import TYPES, is_known, row_bytes, type_name
from gguf_fuse.planning import fuse, record
from gguf_fuse.planning.plan import (
    Layer,
    NothingToDo,
    Read,
    Refused,
    Status,
    of_mixed_types,
    summary,
)

FILE_TYPE_KEY = "general.file_type"
MATRIX_KEY = "quantize.imatrix.file"  # that llama-quantize notes
# By general.file_type (llama_ftype in llama.h): how llama-quantize calls it. Those of F32, F16 and
# BF16 are left out: --tensor-type has no effect beside them.
_FILE_TYPES: Mapping[int | None, str] = {
    2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S",
    25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M",
    36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 40: "Q1_0", 41: "Q2_0",
}  # fmt: skip
_ALIASES = ("Q3_K", "Q4_K", "Q5_K")  # of the mixes of middle size

_NO_TARGETS = frozenset("Q8_1 Q8_K I8 I16 I32 I64 F64".split())  # llama-quantize makes none
_MATRIX_TYPES = frozenset("IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS".split())
_NO_MATRIX = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")

_IN_LAYER = re.compile(r"(.*\bblk\.)(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Way:
    """One type for Q, K and V of a layer: the largest of the three (raise) or the smallest.

    types: of the tensors that change, the new one. n_bytes: that the file grows by. wants_matrix:
    the type for which llama-quantize asks for an importance matrix, be it of a tensor that it only
    copies.
    """

    name: WayName
    types: Mapping[str, int]
    n_bytes: int
    wants_matrix: str | None


@dataclass(frozen=True)
class Recipe:
    """layers: those that only their types keep from being fused. n_fusable: layers beside them."""

    header: Header
    layers: tuple[Layer, ...]
    n_fusable: int
    ways: tuple[Way, ...]

    @property
    def advice(self) -> WayName | None:
        """Raise where little can be fused as it is, else leave the file: README has the figures."""
        return None if self.n_fusable >= len(self.layers) else "raise"

    @property
    def source(self) -> str:
        """The file that llama-quantize is to read: of shards, the first."""
        return self.header.files[0].path

    def way(self, name: WayName) -> Way:
        return next(way for way in self.ways if way.name == name)

    def quantize(self, way: Way, source: str, target: str, matrix: str | None) -> list[str]:
        """The arguments of llama-quantize that change the tensors of the way, and no other.

        source: the file itself (--allow-requantize comes before then), or one of F16.
        """
        types = _types(self.header)
        kept = {name: type_id for name, type_id in types.items() if name not in way.types}
        words = ["--imatrix", matrix] if matrix else []
        for pattern, type_id in (*_patterns(way.types, types), *_patterns(kept, types)):
            words += ["--tensor-type", f"{pattern}={type_name(type_id).lower()}"]
        number = _file_type(self.header)
        if number is not None and number not in _FILE_TYPES:
            words += ["--override-kv", f"{FILE_TYPE_KEY}=int:{number}"]
        return [*words, source, target, _FILE_TYPES.get(number) or _likely_file_type(types)]


def recipe(header: Header, read: Read) -> Recipe:
    """How the layers that only their types keep separate can be fused. read: as for `examine`.

    Raises NothingToDo where there is no such layer, Refused where llama-quantize could not read
    the file.
    """
    if not header.is_model:
        raise Refused(
            f"{header.path}: general.type is {header.metadata['general.type']!r}: llama-quantize "
            "takes models"
        )
    layers = fuse.examine(header, read)
    record.refuse_twice(header, "; unfuse it, then ask again", layers)
    mixed = of_mixed_types(layers)
    if not mixed:
        raise NothingToDo(header, _no_recipe(layers), layers)
    _refuse_unknown(header)
    ways = tuple(_way(header, mixed, name) for name in ("raise", "lower"))
    retyped = fuse.examine(_with_types(header, ways[0].types), read)
    fusable = {layer.name for layer in retyped if layer.status is Status.FUSABLE}
    left = [layer for layer in retyped if layer.name not in fusable]
    mixed = [layer for layer in mixed if layer.name in fusable]
    if not mixed:
        raise NothingToDo(header, f"of one type, it could not be fused: {summary(left)}", layers)
    ways = tuple(_way(header, mixed, way.name) for way in ways)
    return Recipe(header, tuple(mixed), len(fusable) - len(mixed), ways)


def _no_recipe(layers: Sequence[Layer]) -> str:
    if any(layer.status is Status.FUSABLE for layer in layers):
        return "types differ in no layer: gguf-fuse fuse takes the file as it is"
    return f"types are not what keeps it separate: {summary(layers) or 'no attention layers'}"


def _refuse_unknown(header: Header) -> None:
    """Raises Refused."""
    for tensor in header.tensors:
        if not is_known(tensor.type):
            raise Refused(
                f"{header.path}: {tensor.name} is of {type_name(tensor.type)}, which llama.cpp's "
                "llama-quantize does not read"
            )


def _way(header: Header, layers: Sequence[Layer], name: WayName) -> Way:
    types: dict[str, int] = {}
    for layer in layers:
        parts = [header.by_name[f"{layer.name}.{part}.weight"] for part in layer.fusion.parts]
        target = _target(header, layer, parts, name)
        types |= {part.name: target for part in parts if part.type != target}
    new_bytes = sum(_n_bytes(header.by_name[name], type_id) for name, type_id in types.items())
    n_bytes = new_bytes - sum(header.by_name[name].n_bytes for name in types)
    return Way(name, types, n_bytes, _wants_matrix(header, _types(header) | types))


def _target(header: Header, layer: Layer, parts: Sequence[TensorInfo], name: WayName) -> int:
    """The type with most bits, V's of two with as many; or with fewest, and Q's. Raises Refused."""
    types = [part.type for part in parts if type_name(part.type) not in _NO_TARGETS]
    if not types:
        raise Refused(
            f"{header.path}: {layer.name} is of {', '.join(layer.types)}, which llama-quantize "
            "does not make"
        )
    return max(reversed(types), key=_bits) if name == "raise" else min(types, key=_bits)


def _bits(type_id: int) -> float:
    return 8 * TYPES[type_id].block_bytes / TYPES[type_id].block


def _n_bytes(tensor: TensorInfo, type_id: int) -> int:
    return row_bytes(type_id, tensor.ne[0]) * math.prod(tensor.ne[1:])


def _with_types(header: Header, types: Mapping[str, int]) -> Header:
    retyped = (
        replace(tensor, type=types.get(tensor.name, tensor.type)) for tensor in header.tensors
    )
    return replace(header, tensors=tuple(retyped))


def _types(header: Header) -> dict[str, int]:
    """The type of each tensor that llama-quantize might quantize."""
    return {
        tensor.name: tensor.type
        for tensor in header.tensors
        if tensor.name.endswith(".weight")
        and "_norm.weight" not in tensor.name
        and any(n > 1 for n in tensor.ne[1:])
    }


def _file_type(header: Header) -> int | None:
    number = header.metadata.get(FILE_TYPE_KEY)
    return number if type(number) is int else None


def _likely_file_type(types: Mapping[str, int]) -> str:
    """For a file that names none, or one that is unknown: its number is then kept."""
    [(type_id, _)] = Counter(types.values()).most_common(1)
    name = type_name(type_id)
    return name if name in _ALIASES or name in _FILE_TYPES.values() else "Q8_0"


def _wants_matrix(header: Header, types: Mapping[str, int]) -> str | None:
    wanting = set(_MATRIX_TYPES)
    if _FILE_TYPES.get(_file_type(header)) == "Q2_K_S":
        wanting.add("Q2_K")
    found = (type_name(type_id) for name, type_id in types.items() if name not in _NO_MATRIX)
    return next((name for name in found if name in wanting), None)


def _patterns(types: Mapping[str, int], everything: Mapping[str, int]) -> list[tuple[str, int]]:
    """Regular expressions for the names, with their types; no name has two.

    Which of two wins depends on the release of llama-quantize. everything: the names that there
    are, so that a tensor that has its type in all layers is named without them.
    """
    layers: dict[tuple[str, str], set[str]] = {}  # all, by what the name has around the number
    for name in everything:
        before, number, after = _cut(name)
        layers.setdefault((before, after), set()).add(number)
    own: dict[tuple[int, str, str], list[str]] = {}
    for name, type_id in types.items():
        before, number, after = _cut(name)
        own.setdefault((type_id, before, after), []).append(number)
    alike: dict[tuple[int, str], list[str]] = {}
    for (type_id, before, after), numbers in own.items():
        some, is_all = sorted(numbers, key=_number), set(numbers) == layers[before, after]
        which = r"\d+" if is_all else _any(some)
        start = rf"{re.escape(before)}{which}\." if before else ""
        alike.setdefault((type_id, start), []).append(re.escape(after))
    return [
        (rf"^{start}{_any(tensors)}\.weight$", type_id)
        for (type_id, start), tensors in alike.items()
    ]


def _any(expressions: Sequence[str]) -> str:
    return expressions[0] if len(expressions) == 1 else f"({'|'.join(expressions)})"


def _cut(name: str) -> tuple[str, str, str]:
    """ "blk.", "7", "attn_q"; of a tensor in no layer, only the last has letters."""
    stem = name.removesuffix(".weight")
    found = _IN_LAYER.fullmatch(stem)
    return (found[1], found[2], found[3]) if found else ("", "", stem)


def _number(layer: str) -> int:
    return int(layer or 0)
