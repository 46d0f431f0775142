"""ORIGINAL and FUSED -> Structure: do they hold the same bytes?

Exact, and of all layers: a fused tensor is its parts end to end, and all else is the same. What is
fused is found anew from ORIGINAL's tensors, not by the rules of `fusion`: a mistake there must show
here. Prints nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace

import numpy as np

from gguf_fuse.format.header import (
    GGUFError,
    Header,
    Metadata,
    TensorInfo,
    locate,
    read_tensor,
    type_name,
)
from gguf_fuse.format.shards import SHARDS_KEY, SPLIT_KEYS
from gguf_fuse.planning.plan import KEY_PREFIX
from gguf_fuse.planning.record import (
    POSITIONS_KEY,
    RECORD_VERSIONS,
    ROWS_KEY,
    TENSORS_KEY,
    VERSION_KEY,
)
from gguf_fuse.progress import OnProgress, OnStart, ignore_progress, ignore_start
from gguf_fuse.writing.copy import DEFAULT_THREADS, InputLost, read_source
from gguf_fuse.writing.place import PADDING_KEY
from gguf_fuse.writing.publish import open_source, refuse_changed

BLOCK_BYTES = 256 * 1024  # two of them stay in the L2 cache between reading and comparing

SHORT_PAIR = 4096  # bytes of a metadata pair that is looked at as a whole
LONG_VALUE = 60  # characters of a value that a problem does not show

# What can be fused: the fused name, the parts, and how many dimensions of a weight stand behind
# its rows: the experts'.
_FORMS = (
    ("attn_qkv", ("attn_q", "attn_k", "attn_v"), 0),
    ("ffn_gate_up_exps", ("ffn_gate_exps", "ffn_up_exps"), 1),
)
MAX_EXPERTS = 1 << 12  # of one tensor: each one's rows are compared on their own

_RECORD_KEYS = (VERSION_KEY, TENSORS_KEY, ROWS_KEY, POSITIONS_KEY)
_OWN_KEYS = frozenset({*_RECORD_KEYS, SHARDS_KEY, PADDING_KEY})  # FUSED alone may have them


@dataclass(frozen=True)
class Structure:
    """Whether the two files hold the same bytes; each problem names its place."""

    problems: tuple[str, ...]
    n_fused: int  # attention layers that are fused in FUSED alone
    n_fused_experts: int  # layers whose experts are
    n_bytes: int  # compared, of one file
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True, slots=True)
class _Fusion:
    """A tensor of FUSED alone, and those of ORIGINAL that it must hold. shared: one value.

    n_outer: dimensions behind that of the rows.
    """

    name: str
    parts: tuple[TensorInfo, ...]
    shared: bool
    n_outer: int

    @property
    def ne(self) -> tuple[int, ...]:
        first = self.parts[0].ne
        at = len(first) - 1 - self.n_outer
        return first if self.shared else (*first[:at], sum(self.rows), *first[at + 1 :])

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple((1, 1, *part.ne)[-1 - self.n_outer] for part in self.parts)

    @property
    def n_experts(self) -> int:
        """How many times the parts take turns; 1 where there are no experts."""
        first = self.parts[0].ne
        return 1 if self.shared else math.prod(first[len(first) - self.n_outer :])


@dataclass(frozen=True, slots=True)
class _Range:
    """Bytes that must be equal. Starts count from the files' starts."""

    place: str  # of a tensor, or "metadata" and a key
    original: int
    fused: int
    n_bytes: int
    unit: str  # "row", "element" of a tensor of one dimension, "byte" of a metadata pair
    unit_bytes: int


def compare_structure(
    original: Header,
    fused: Header,
    *,
    threads: int = DEFAULT_THREADS,
    on_start: OnStart = ignore_start,
    on_progress: OnProgress = ignore_progress,
) -> Structure:
    """Every tensor and every metadata value of both files, byte for byte.

    What is fused, and where its rows must come from, follows from ORIGINAL's tensors alone: the
    record in FUSED's metadata is checked, not believed. Memory does not grow with the files.
    Raises GGUFError for a file that cannot be read, or that changes meanwhile.
    """
    started = time.perf_counter()
    fusions, problems = _fusions(original, fused)
    problems = _swap_problems(original, fused) + problems
    problems += _format_problems(original, fused)
    long_pairs, misfits = _compare_metadata(original, fused)
    problems += misfits
    problems += _record_problems(original, fused, fusions)
    problems += _cutting_problems(original, fused)
    problems += _padding_problems(original, fused)
    problems += _listing_problems(original, fused, fusions)
    ranges, misfits = _ranges(original, fused, fusions)
    problems += misfits
    ranges = [*long_pairs, *ranges]
    n_bytes = sum(part.n_bytes for part in ranges)
    on_start("comparing", n_bytes)
    problems += _compare_data(original, fused, ranges, threads, on_progress)
    n_fused, n_experts = (
        sum(fusion.name.endswith(f".{form}.weight") for fusion in fusions) for form, *_ in _FORMS
    )
    return Structure(tuple(problems), n_fused, n_experts, n_bytes, time.perf_counter() - started)


def _fusions(original: Header, fused: Header) -> tuple[list[_Fusion], list[str]]:
    """What FUSED has fused that ORIGINAL has separate. Found anew, not by fusion.py's rules: a
    mistake there must show here.
    """
    before = {tensor.name: tensor for tensor in original.tensors}
    fusions, problems = [], []
    for tensor, (form, part_names, n_outer) in itertools.product(fused.tensors, _FORMS):
        layer, found, kind = tensor.name.partition(f".{form}.")
        if not found or kind != "weight" or tensor.name in before:
            continue
        for kind in ("weight", "bias", "scale", "input_scale"):
            names = [f"{layer}.{part}.{kind}" for part in part_names]
            parts = tuple(before[name] for name in names if name in before)
            if len(parts) == len(names):
                shared = kind.endswith("scale")
                made = _Fusion(f"{layer}.{form}.{kind}", parts, shared, n_outer)
                problem = _shape_problem(made)
                problems += [problem] if problem else []
                fusions += [] if problem else [made]
            elif parts or kind == "weight":
                missing = ", ".join(name for name in names if name not in before)
                problems.append(f"{layer}: is fused, but the original has no {missing}")
    return fusions, problems


def _shape_problem(made: _Fusion) -> str | None:
    """Why experts cannot be compared one by one."""
    n_dims = {len(part.ne) for part in made.parts}
    if not made.shared and made.n_outer and n_dims != {made.n_outer + 1 + _is_weight(made)}:
        return f"{made.name}: is fused, but the original's parts have no experts"
    if made.n_experts > MAX_EXPERTS:
        return f"{made.name}: {made.n_experts} experts; at most {MAX_EXPERTS} can be compared"
    return None


def _is_weight(made: _Fusion) -> bool:
    return made.name.endswith(".weight")


def _swap_problems(original: Header, fused: Header) -> list[str]:
    if VERSION_KEY not in original.metadata or VERSION_KEY in fused.metadata:
        return []
    return ["the first file is the fused one, the second is not: ORIGINAL comes first"]


def _format_problems(original: Header, fused: Header) -> list[str]:
    facts = [
        ("version", original.version, fused.version),
        ("byte order", original.byte_order, fused.byte_order),
        ("alignment", original.alignment, fused.alignment),
    ]
    return [f"{what}: {a}, but {b} in the fused file" for what, a, b in facts if a != b]


def _compare_metadata(original: Header, fused: Header) -> tuple[list[_Range], list[str]]:
    """Pairs that are too long to hold are left to be compared with the tensors' data."""
    if original.byte_order != fused.byte_order:
        return [], []  # every pair would differ; that problem is named already
    # How a model is cut into files is no part of it.
    before, after = (header.metadata.without(SPLIT_KEYS) for header in (original, fused))
    ranges: list[_Range] = []
    problems = [f"metadata {key}: missing in the fused file" for key in before if key not in after]
    for key in after:
        if key not in before:
            if key not in _OWN_KEYS:
                problems.append(f"metadata {key}: only in the fused file")
            continue
        a, b = before.segment(key), after.segment(key)
        if max(a.n_bytes, b.n_bytes) <= SHORT_PAIR:
            problems += _compare_pair(before, after, key)
        elif a.n_bytes != b.n_bytes:
            problems.append(f"metadata {key}: {a.n_bytes} bytes, but {b.n_bytes} in the fused file")
        else:
            ranges.append(_Range(f"metadata {key}", a.start, b.start, a.n_bytes, "byte", 1))
    common = [[key for key in keys if key in before and key in after] for keys in (before, after)]
    return ranges, problems + _order_problems("metadata", *common)


def _compare_pair(before: Metadata, after: Metadata, key: str) -> list[str]:
    """As bytes: a value that only decodes to the same is not the same."""
    if before.pair_bytes(key) == after.pair_bytes(key):
        return []
    a, b = repr(before[key]), repr(after[key])
    if a == b:
        a, b = f"of type {before.value_type(key).name}", f"of type {after.value_type(key).name}"
    if len(a) > LONG_VALUE or len(b) > LONG_VALUE:
        return [f"metadata {key}: the value differs in the fused file"]
    return [f"metadata {key}: {a}, but {b} in the fused file"]


def _order_problems(what: str, before: Sequence[str], after: Sequence[str]) -> list[str]:
    for old, new in zip(before, after, strict=True):
        if old != new:
            return [f"{what} {new}: stands where {old} should stand: the order differs"]
    return []


def _record_problems(original: Header, fused: Header, fusions: Sequence[_Fusion]) -> list[str]:
    """Is what gguf-fuse wrote for the way back true? A file without a record is fine."""
    metadata = fused.metadata
    written = [key for key in _RECORD_KEYS if key in metadata]
    if all(key in original.metadata for key in written):
        return []
    if len(written) < len(_RECORD_KEYS):
        return [
            f"metadata {key}: missing, the record is incomplete"
            for key in _RECORD_KEYS
            if key not in written
        ]
    version, names, rows, positions = (metadata[key] for key in _RECORD_KEYS)
    if version not in RECORD_VERSIONS:
        known = " and ".join(map(str, RECORD_VERSIONS))
        return [f"metadata {VERSION_KEY}: {version}, this release knows {known}"]
    if not (_is_list(names, str) and _is_list(rows, int) and _is_list(positions, int)):
        return [f"metadata {KEY_PREFIX}*: the record has values of a wrong type"]
    counts = [_n_parts(name) for name in names]
    if version != (1 if set(counts) <= {3} else 2):
        return [f"metadata {VERSION_KEY}: {version}, its tensors are of another version"]
    if not sum(counts) == len(rows) == len(positions) or len(set(names)) < len(names):
        return [f"metadata {KEY_PREFIX}*: the lengths of the record's arrays do not fit"]
    place = {tensor.name: at for at, tensor in enumerate(original.tensors)}
    truth = {
        fusion.name: (fusion.rows, tuple(place[part.name] for part in fusion.parts))
        for fusion in fusions
    }
    problems = [
        f"metadata {TENSORS_KEY}: {name} is fused but not named"
        for name in truth
        if name not in names
    ]
    for name, end, count in zip(names, itertools.accumulate(counts), counts, strict=True):
        if name not in truth:
            problems.append(f"metadata {TENSORS_KEY}: {name} is named but not fused")
            continue
        told = tuple(rows[end - count : end]), tuple(positions[end - count : end])
        for key, said, true in zip((ROWS_KEY, POSITIONS_KEY), told, truth[name], strict=True):
            if said != true:
                problems.append(f"metadata {key}: {said} for {name}, the original says {true}")
    return problems


def _n_parts(name: str) -> int:
    """How many numbers the record has for a fused tensor."""
    return next((len(parts) for form, parts, _ in _FORMS if f".{form}." in name), 3)


def _cutting_problems(original: Header, fused: Header) -> list[str]:
    """Does the record say where ORIGINAL was cut into shards?"""
    said = fused.metadata.get(SHARDS_KEY)
    if said is None or SHARDS_KEY in original.metadata:
        return []
    truth = [len(shard.tensors) for shard in original.shards]
    fits = said == truth if truth else _is_list(said, int) and _cuts(said, len(original.tensors))
    return [] if fits else [f"metadata {SHARDS_KEY}: {said}, the original says {truth}"]


def _cuts(counts: Sequence[int], n_tensors: int) -> bool:
    return min(counts, default=0) > 0 and sum(counts) == n_tensors


def _padding_problems(original: Header, fused: Header) -> list[str]:
    """It moves the tensors to where they can be cloned, and says nothing."""
    said = fused.metadata.get(PADDING_KEY)
    if said is None or PADDING_KEY in original.metadata or (_is_list(said, int) and not any(said)):
        return []
    return [f"metadata {PADDING_KEY}: not an array of zeros"]


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _listing_problems(original: Header, fused: Header, fusions: Sequence[_Fusion]) -> list[str]:
    """Nothing missing, nothing extra, the order kept: a fused tensor stands where Q stood."""
    stands_for = {fusion.parts[0].name: fusion.name for fusion in fusions}
    absorbed = {part.name for fusion in fusions for part in fusion.parts[1:]}
    expected = [
        stands_for.get(tensor.name, tensor.name)
        for tensor in original.tensors
        if tensor.name not in absorbed
    ]
    present = [tensor.name for tensor in fused.tensors]
    wanted, there = set(expected), set(present)
    problems = [f"{name}: missing in the fused file" for name in expected if name not in there]
    problems += [f"{name}: only in the fused file" for name in present if name not in wanted]
    return problems + _order_problems(
        "tensor",
        [name for name in expected if name in there],
        [name for name in present if name in wanted],
    )


def _ranges(
    original: Header, fused: Header, fusions: Sequence[_Fusion]
) -> tuple[list[_Range], list[str]]:
    """What to compare, in the order of FUSED; a tensor of another shape or type is a problem."""
    before = {tensor.name: tensor for tensor in original.tensors}
    fused_from = {fusion.name: fusion for fusion in fusions}
    ranges: list[_Range] = []
    problems: list[str] = []
    for tensor in fused.tensors:
        source = fused_from.get(tensor.name)
        if source is None and tensor.name not in before:
            continue  # named as extra already
        parts = source.parts if source else (before[tensor.name],)
        ne = source.ne if source else parts[0].ne
        misfits = [
            f"{tensor.name}: {what} {has}, but {wanted} in the original's {part.name}"
            for part in parts
            for what, has, wanted in _facts(tensor, part, ne)
            if has != wanted
        ]
        if not misfits and not source:
            misfits = _room_problems(original, fused, parts[0], tensor)
        problems += misfits
        if not misfits:
            ranges += _tensor_ranges(original, fused, tensor, parts, source)
    return ranges, problems


def _facts(
    tensor: TensorInfo, part: TensorInfo, ne: tuple[int, ...]
) -> list[tuple[str, object, object]]:
    return [
        ("type", type_name(tensor.type), type_name(part.type)),
        ("ne", list(tensor.ne), list(ne)),
    ]


def _room_problems(
    original: Header, fused: Header, before: TensorInfo, after: TensorInfo
) -> list[str]:
    """Of an unknown type, n_bytes is the room up to the next tensor, or to the end of the file.

    What one file has more of it than the other must be padding: zeros, and few.
    """
    header, longer = (original, before) if before.n_bytes > after.n_bytes else (fused, after)
    shorter = min(before.n_bytes, after.n_bytes)
    surplus = replace(longer, offset=longer.offset + shorter, n_bytes=longer.n_bytes - shorter)
    most = max(original.alignment, fused.alignment)
    if surplus.n_bytes < most and not any(read_tensor(header, surplus)):
        return []
    return [f"{after.name}: {after.n_bytes} bytes, but {before.n_bytes} in the original"]


def _tensor_ranges(
    original: Header,
    fused: Header,
    tensor: TensorInfo,
    parts: Sequence[TensorInfo],
    source: _Fusion | None,
) -> Iterator[_Range]:
    start = fused.data_start + tensor.offset
    n_experts = source.n_experts if source else 1
    for expert, part in itertools.product(range(n_experts), parts):
        # They differ where the type is unknown, by padding: see `_room_problems`.
        n_bytes = min(part.n_bytes, tensor.n_bytes) // n_experts
        unit = "row" if len(part.ne) > 1 else "element"
        n_units = max(1, math.prod(part.ne[1:]) if len(part.ne) > 1 else math.prod(part.ne))
        place = tensor.name
        if part.name != tensor.name:
            place += f": {part.name.rsplit('.', 2)[-2]}"
        if source and source.n_outer and not source.shared:
            place += f" of expert {expert}"
        begin = original.data_start + part.offset + expert * n_bytes
        yield _Range(place, begin, start, n_bytes, unit, -(-n_bytes * n_experts // n_units))
        start += 0 if source and source.shared else n_bytes


def _compare_data(
    original: Header,
    fused: Header,
    ranges: Sequence[_Range],
    threads: int,
    on_progress: OnProgress,
) -> list[str]:
    """Threads take blocks in turn, each with two buffers of its own -> a problem per range."""
    blocks = ((at, start) for at, part in enumerate(ranges) for start in _starts(part))
    first: dict[int, int] = {}  # by range: the first byte that differs
    lock, stop = threading.Lock(), threading.Event()

    def work(left: Sequence[int], right: Sequence[int]) -> None:
        a, b = bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)
        while not stop.is_set():
            with lock:
                at, start = next(blocks, (-1, 0))
            if at < 0:
                return
            part = ranges[at]
            n_bytes = min(BLOCK_BYTES, part.n_bytes - start)
            if start < first.get(at, part.n_bytes):
                _read_block(original, left, memoryview(a)[:n_bytes], part.original + start)
                _read_block(fused, right, memoryview(b)[:n_bytes], part.fused + start)
                differs = _first_difference(a, b, n_bytes)
                if differs is not None:
                    with lock:
                        first[at] = min(first.get(at, part.n_bytes), start + differs)
            on_progress(n_bytes)

    with _opened(original) as left, _opened(fused) as right, ThreadPoolExecutor(threads) as pool:
        try:
            for future in as_completed([pool.submit(work, left, right) for _ in range(threads)]):
                future.result()
        except BaseException:
            stop.set()  # the pool waits for its threads: let them end at once
            raise
    return [_data_problem(original, fused, ranges[at], first[at]) for at in sorted(first)]


def _starts(part: _Range) -> range:
    return range(0, part.n_bytes, BLOCK_BYTES)


def _first_difference(a: bytearray, b: bytearray, n_bytes: int) -> int | None:
    # == of two bytearrays is memcmp; of two memoryviews it goes element by element.
    if (a == b) if n_bytes == len(a) else (a[:n_bytes] == b[:n_bytes]):
        return None
    x, y = (np.frombuffer(data, np.uint8, n_bytes) for data in (a, b))
    return int(np.argmax(x != y))


def _data_problem(original: Header, fused: Header, part: _Range, at: int) -> str:
    return (
        f"{part.place} differs in {part.unit} {at // part.unit_bytes} "
        f"({_place(original, part.original + at)} of the original, "
        f"{_place(fused, part.fused + at)} of the fused file)"
    )


def _place(header: Header, position: int) -> str:
    number, byte = locate(position)
    return f"byte {byte} of shard {number + 1}" if header.shards else f"byte {byte}"


@contextlib.contextmanager
def _opened(header: Header) -> Iterator[list[int]]:
    """The files, the same from the reading of their headers to the end."""
    try:
        with open_source(header) as fds:
            yield fds
            refuse_changed(header, fds)
    except OSError as error:
        raise GGUFError(f"{header.path}: {error.strerror}") from error


def _read_block(header: Header, fds: Sequence[int], view: memoryview, start: int) -> None:
    try:
        read_source(fds, view, start)
    except InputLost as error:
        raise GGUFError(f"{header.files[error.file].path}: {error}") from error
