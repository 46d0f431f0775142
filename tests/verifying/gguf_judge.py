"""What a fused file must be, by a reader that neither the package nor gguf-py had a say in.

`read` refuses what llama.cpp refuses (ggml/src/gguf.cpp, gguf_init_from_file_impl), and bytes that
belong to nothing. `same_model` says whether a fused file holds what its original holds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

# Elements and bytes of a block, by the type ids that the tests' files have.
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 12: (256, 144), 14: (256, 210)}
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9

FUSED = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
}
STACKS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
N_EXPERT = 4  # of the tests' file with experts one by one
SSM_IN = (2, (16, 16, 32, 32))  # heads of the tests' file with ssm_in, and rows of q, k, v, z
JOINED = ("weight", "bias")  # of other suffixes the parts have one value


class Refused(Exception):
    """llama.cpp would not load this file, or not all of it."""


@dataclass(frozen=True)
class Tensor:
    ne: tuple[int, ...]
    type: int
    data: bytes


@dataclass
class Contents:
    """pairs: value type and value as they lie in the file, by key."""

    version: int
    pairs: dict[bytes, bytes] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    spans: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # start and end

    def mark(self, kind: str, start: int, end: int) -> None:
        """Where the fields of a kind lie, for who changes them."""
        self.spans.setdefault(kind, []).append((start, end))


def need(true: object, why: str) -> None:
    if not true:
        raise Refused(why)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        need(0 <= n <= len(self.data) - self.at, "ends before its header says")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, code: str) -> int:
        value: int = struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]
        return value

    def string(self) -> bytes:
        return self.take(self.number("Q"))

    def value(self, kind: int) -> None:
        if kind == STRING:
            self.string()
        elif kind == ARRAY:
            element, n = self.number("I"), self.number("Q")
            need(element in SCALARS or element == STRING, "an array of what is no value")
            if element == STRING:
                for _ in range(n):
                    self.string()
            else:
                self.take(n * SCALARS[element])
        else:
            need(kind in SCALARS, "no type of a value")
            self.take(SCALARS[kind])


def read(data: bytes) -> Contents:
    """Raises Refused."""
    file = _Reader(data)
    need(file.take(4) == b"GGUF", "no GGUF")
    found = Contents(file.number("I"))
    need(found.version in (2, 3), "no version that is known")
    n_tensors, n_pairs = file.number("Q"), file.number("Q")
    found.mark("head", 0, file.at)
    alignment = 32
    for _ in range(n_pairs):
        start = file.at
        key = file.string()
        need(key not in found.pairs, "a key twice")
        begin = file.at
        kind = file.number("I")
        file.value(kind)
        found.pairs[key] = data[begin : file.at]
        if key == b"general.alignment":
            need(kind == 4, "an alignment of another type")
            alignment = struct.unpack("<I", data[begin + 4 : file.at])[0]
            need(alignment and not alignment & (alignment - 1), "an alignment of no power of two")
        found.mark("key", start, file.at)
    entries = list(_entries(file, n_tensors, found))
    file.take(-file.at % alignment)
    found.mark("padding", entries[-1][4] if entries else 0, file.at)
    expected, start = 0, file.at
    for name, ne, kind, offset, _ in entries:
        need(offset == expected, f"{name} has offset {offset}, expected {expected}")
        block, block_bytes = BLOCKS[kind]
        n_bytes = block_bytes
        for n in ne:
            n_bytes *= n
        n_bytes //= block
        found.tensors[name] = Tensor(ne, kind, file.take(n_bytes))
        found.mark("data", start + offset, file.at)
        found.mark("padding", file.at, file.at + -file.at % alignment)
        need(not any(file.take((start - file.at) % alignment)), "padding that is not zero")
        expected = file.at - start
    need(file.at == len(data), "bytes that belong to no tensor")
    head = found.spans["padding"][0]
    need(not any(data[head[0] : head[1]]), "padding that is not zero")
    return found


def _entries(
    file: _Reader, n_tensors: int, found: Contents
) -> Iterator[tuple[str, tuple[int, ...], int, int, int]]:
    names = set()
    for _ in range(n_tensors):
        start = file.at
        name = file.string()
        need(len(name) < 64 and name not in names, "a name too long, or twice")
        names.add(name)
        found.mark("name", start, file.at)
        n_dims = file.number("I")
        need(n_dims <= 4, "more than four dimensions")
        found.mark("dims", file.at - 4, file.at + 8 * n_dims)
        ne = tuple(file.number("Q") for _ in range(n_dims))
        kind = file.number("I")
        found.mark("type", file.at - 4, file.at)
        need(kind in BLOCKS and not (ne or (1,))[0] % BLOCKS[kind][0], "rows of no whole blocks")
        offset = file.number("Q")
        found.mark("offset", file.at - 8, file.at)
        found.mark("tensor", start, file.at)
        yield name.decode("utf-8", "replace"), ne, kind, offset, file.at


def same_model(original: Contents, fused: Contents) -> bool:
    """Every tensor and pair of the one in the other, in order, and nothing else but our own."""
    own = [key for key in fused.pairs if key not in original.pairs]
    if not all(key.startswith(b"gguf_fuse.") for key in own):
        return False
    if [pair for pair in fused.pairs.items() if pair[0] not in own] != list(original.pairs.items()):
        return False
    expected = list(original.tensors.items())
    for name, tensor in fused.tensors.items():
        if name not in dict(expected) and not _replace_parts(expected, name):
            return False
        if expected[0] != (name, tensor):
            return False
        expected.pop(0)
    return not expected and fused.version == original.version


def _replace_parts(expected: list[tuple[str, Tensor]], name: str) -> bool:
    """The parts of the fused tensor `name` become it, where the first of them stands."""
    tensors = dict(expected)
    layer, _, own = name.removesuffix(".weight").rpartition(".")
    if f"{layer}.ssm_in.weight" in tensors and own == "attn_qkv":
        at = [one for one, _ in expected].index(f"{layer}.ssm_in.weight")
        qkv, gate = _cut(expected[at][1])
        expected[at : at + 1] = [(name, qkv), (f"{layer}.attn_gate.weight", gate)]
        return True
    names = [f"{layer}.{own.removesuffix('_exps')}.{n}.weight" for n in range(N_EXPERT)]
    if own in STACKS and all(part in tensors for part in names):
        at = [one for one, _ in expected].index(names[0])
        first, data = tensors[names[0]], b"".join(tensors[part].data for part in names)
        expected[at] = name, Tensor((*first.ne, N_EXPERT), first.type, data)
        expected[:] = [one for one in expected if one[0] not in names[1:]]
        return True
    for made, parts in FUSED.items():
        layer, found, suffix = name.partition(f".{made}.")
        names = [f"{layer}.{part}.{suffix}" for part in parts]
        if found and all(part in tensors for part in names):
            at = [one for one, _ in expected].index(names[0])
            expected[at] = name, _joined([tensors[part] for part in names], made, suffix)
            expected[:] = [one for one in expected if one[0] not in names[1:]]
            return True
    return False


def _joined(parts: list[Tensor], made: str, suffix: str) -> Tensor:
    first = parts[0]
    if suffix not in JOINED:
        return first
    axis = 1 if suffix == "weight" else 0
    n_turns = first.ne[axis + 1] if made == "ffn_gate_up_exps" else 1
    size = [len(part.data) // n_turns for part in parts]
    data = b"".join(
        part.data[turn * n : (turn + 1) * n]
        for turn in range(n_turns)
        for part, n in zip(parts, size, strict=True)
    )
    rows = sum(part.ne[axis] for part in parts)
    return Tensor((*first.ne[:axis], rows, *first.ne[axis + 1 :]), first.type, data)


def _cut(ssm_in: Tensor) -> tuple[Tensor, Tensor]:
    """q of all heads, k, then v; and z."""
    n_heads, widths = SSM_IN
    row = len(ssm_in.data) // ssm_in.ne[1]
    rows: list[list[bytes]] = [[], [], [], []]
    at = 0
    for _ in range(n_heads):
        for letter, width in zip(rows, widths, strict=True):
            letter.append(ssm_in.data[at : at + width * row])
            at += width * row
    q, k, v, z = (b"".join(letter) for letter in rows)
    made = ((ssm_in.ne[0], len(data) // row) for data in (q + k + v, z))
    one, other = zip(made, (q + k + v, z), strict=True)
    return Tensor(one[0], ssm_in.type, one[1]), Tensor(other[0], ssm_in.type, other[1])
