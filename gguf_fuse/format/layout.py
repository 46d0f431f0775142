"""Where the tensors of a file lie, and whether every byte of it belongs to something.

llama.cpp (ggml/src/gguf.cpp) wants each tensor's offset to be the running sum of the sizes before
it, each padded to the alignment, in the order of the list. A file that is laid out otherwise can be
read here all the same; what no tensor accounts for would be lost in silence, so it is not fused.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from gguf_fuse.format.header import MAGIC, Header, TensorInfo, align
from gguf_fuse.format.source import GGUFError, Segment, opened
from gguf_fuse.format.types import blocked, type_name

_WINDOW_BYTES = 1 << 20
_ZEROS = bytes(_WINDOW_BYTES)


def misplaced(header: Header) -> list[str]:
    """What llama.cpp refuses of the layout, and bytes of no tensor: a line each.

    Raises GGUFError where bytes behind the last tensor cannot be read.
    """
    lines = []
    for file in header.files:
        place = f"{file.path}: " if header.shards else ""
        faults = (*_wrong_offsets(file), *_unaccounted(file), *_cut_padding(file))
        lines += [place + line for line in faults]
    return lines


def refuse_unaccounted(header: Header) -> None:
    """Raises GGUFError where bytes of the file, other than padding, belong to no tensor.

    The order in which tensors lie does not matter.
    """
    for file in header.files:
        if line := next(_unaccounted(file), None):
            raise GGUFError(f"{file.path}: {line}; bytes of it would be lost")


def _wrong_offsets(file: Header) -> Iterator[str]:
    expected = 0
    for tensor in file.tensors:
        if tensor.offset != expected:
            yield f"tensor {tensor.name!r} has offset {tensor.offset}, expected {expected}"
        expected = align(tensor.offset + tensor.n_bytes, file.alignment)


def _unaccounted(file: Header) -> Iterator[str]:
    """Bytes that are more than padding; of a known type, also those that its layout adds."""
    tensors = _filled(file)
    if tensors and tensors[0].offset:
        yield f"{tensors[0].offset} bytes before tensor {tensors[0].name!r} belong to no tensor"
    for tensor, after in pairwise(tensors):
        room = after.offset - tensor.offset
        if room != align(tensor.n_bytes, file.alignment):
            yield f"{_misfit(tensor, room)} before tensor {after.name!r}"
    surplus = Segment(file.source, _end(file), max(file.source.n_bytes - _end(file), 0))
    if not surplus.n_bytes:
        return
    behind, remedy = f"{surplus.n_bytes} bytes behind", f"head -c {surplus.start} leaves them out"
    if surplus.part(0, min(surplus.n_bytes, len(MAGIC))).read() == MAGIC:
        yield (
            f"a second GGUF file begins at byte {surplus.start}, {behind} the last tensor: shards "
            f"are joined by llama-gguf-split --merge, not by cat; {remedy}"
        )
    elif tensors:
        room = file.source.n_bytes - tensors[-1].data.start
        yield (
            f"{_misfit(tensors[-1], room)} before the end of the file; if the {behind} it are not "
            f"the model's, {remedy}"
        )
    else:
        yield f"{behind} the header belong to no tensor; {remedy}"


def _cut_padding(file: Header) -> Iterator[str]:
    missing = _end(file) - file.source.n_bytes
    if file.tensors and missing > 0:
        yield f"{missing} bytes of padding are missing behind the last tensor"


def _misfit(tensor: TensorInfo, room: int) -> str:
    kind = f"{type_name(tensor.type)} {list(tensor.ne)}"
    fork = (
        " (does a fork of llama.cpp lay this type out otherwise?)" if blocked(tensor.type) else ""
    )
    return (
        f"tensor {tensor.name!r} ({kind}) takes {tensor.n_bytes} bytes and padding{fork}, but "
        f"there are {room}"
    )


def _filled(file: Header) -> list[TensorInfo]:
    """Tensors with data, as they lie in the file."""
    filled = (tensor for tensor in file.tensors if tensor.n_bytes)
    return sorted(filled, key=lambda tensor: tensor.offset)


def _end(file: Header) -> int:
    """Where the file should end: behind the last tensor and its padding."""
    ends = (tensor.offset + tensor.n_bytes for tensor in _filled(file))
    return file.data_start + align(max(ends, default=0), file.alignment)


def nonzero_padding(header: Header) -> int:
    """How many bytes of padding are not zero, behind the header and between tensors.

    llama.cpp never looks at them, and what is written anew has zeros there. Those of files that are
    fetched are not looked at: each would cost a round trip. Raises GGUFError where they cannot be
    read.
    """
    buffer, n_nonzero = bytearray(_WINDOW_BYTES), 0
    with opened(header.sources) as files:
        for file in (file for file in header.files if file.source.place is None):
            source = files[file.source]
            pieces = (piece for padding in _paddings(file) for piece in source.data(*padding))
            for start, end in pieces:
                n_bytes = end - start
                source.read_at(memoryview(buffer)[:n_bytes], start)
                n_nonzero += _n_nonzero(buffer if n_bytes == len(buffer) else buffer[:n_bytes])
    return n_nonzero


def _n_nonzero(data: bytearray) -> int:
    return 0 if data == _ZEROS[: len(data)] else len(data) - data.count(0)


def _paddings(file: Header) -> Iterator[tuple[int, int]]:
    """The ranges between what means something: start and end, in pieces."""
    ends = [(tensor.data.start, tensor.data.start + tensor.n_bytes) for tensor in _filled(file)]
    last = (file.source.n_bytes, 0)
    for (_, end), (start, _) in pairwise([(0, file.end), *ends, last]):
        for at in range(end, start, _WINDOW_BYTES):
            yield at, min(at + _WINDOW_BYTES, start)


def is_canonical(header: Header) -> bool:
    """Laid out as llama.cpp and gguf-py write: tensors as they are listed, nothing after them.

    Such a file comes back bit for bit if all padding is zero; of others all values do.
    """
    whole = all(_end(file) == file.source.n_bytes for file in header.files)
    return whole and not misplaced(header)
