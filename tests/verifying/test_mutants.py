"""Fused files with a fault of any kind, by the thousand: verify passes none that is not the model.

`gguf_judge` says which are; of some, llama.cpp itself whether it reads them. GGUF_FUSE_HARNESS=10
tries ten times as many.
"""

from __future__ import annotations

import os
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as T

from gguf_fuse import EXPERTS, GATE_UP, QKV, SSM_IN, GGUFError, VerifyOptions, verify
from tests import llama_judge, pack
from tests.conftest import fused_copy
from tests.models.random_model import ModelSpec, write_random_model
from tests.planning.test_old_layouts import F32_ALWAYS, one_by_one, with_ssm_in
from tests.verifying import gguf_judge

FACTOR = float(os.environ.get("GGUF_FUSE_HARNESS", "1"))
N_MUTANTS = int(600 * FACTOR)  # of each pair
N_JUDGED = int(25 * FACTOR)  # of those, by llama.cpp
QUICK = VerifyOptions(structure_only=True, threads=1)

Mutate = Callable[[random.Random, bytearray, gguf_judge.Contents], object]


# -- kinds of faults -----------------------------------------------------------------------------


def one_bit(of: str) -> Mutate:
    """In a field of this kind, or in a tensor's data."""

    def mutate(chance: random.Random, data: bytearray, file: gguf_judge.Contents) -> None:
        start, end = chance.choice([span for span in file.spans[of] if span[0] < span[1]])
        data[chance.randrange(start, end)] ^= 1 << chance.randrange(8)

    return mutate


def another_number(of: str, code: str) -> Mutate:
    """The last number of a field: 0, near to the old one, another field's, or huge."""

    def mutate(chance: random.Random, data: bytearray, file: gguf_judge.Contents) -> None:
        size = struct.calcsize(code)
        ends = [end for start, end in file.spans[of] if end - start >= size]
        at, other = chance.choice(ends) - size, chance.choice(ends) - size
        (old,), (another,) = (struct.unpack_from("<" + code, data, place) for place in (at, other))
        steps = (0, old + 1, old - 1, old + 32, old - 32, old * 2, old // 2, another, 2**31 + 1)
        struct.pack_into("<" + code, data, at, max(chance.choice(steps), 0))

    return mutate


def exchanged(of: str) -> Mutate:
    """Two fields of the same length."""

    def mutate(chance: random.Random, data: bytearray, file: gguf_judge.Contents) -> None:
        spans = file.spans[of]
        a = chance.choice(spans)
        b = chance.choice([span for span in spans if span[1] - span[0] == a[1] - a[0]])
        one, other = bytes(data[slice(*a)]), bytes(data[slice(*b)])
        data[slice(*a)], data[slice(*b)] = other, one

    return mutate


def data_in_another_order(
    chance: random.Random, data: bytearray, file: gguf_judge.Contents
) -> None:
    """Two tensors as long as each other: offsets and data exchanged, so each still has its own."""
    offsets, spans = file.spans["offset"], file.spans["data"]
    one = chance.randrange(len(spans))
    size = spans[one][1] - spans[one][0]
    other = chance.choice([i for i, (a, b) in enumerate(spans) if b - a == size])
    for a, b in ((offsets[one], offsets[other]), (spans[one], spans[other])):
        data[slice(*a)], data[slice(*b)] = bytes(data[slice(*b)]), bytes(data[slice(*a)])


def gap(chance: random.Random, data: bytearray, file: gguf_judge.Contents) -> None:
    """Room between two tensors; whoever follows the offsets finds every byte."""
    at = chance.randrange(1, len(file.spans["data"]))
    n_bytes = 32 * chance.randrange(1, 4)
    for start, _ in file.spans["offset"][at:]:
        (offset,) = struct.unpack_from("<Q", data, start)
        struct.pack_into("<Q", data, start, offset + n_bytes)
    place = file.spans["data"][at][0]
    data[place:place] = bytes(n_bytes)


def parts_exchanged(chance: random.Random, data: bytearray, file: gguf_judge.Contents) -> None:
    """Two stretches inside one tensor, as when K and V, or two experts, are exchanged."""
    start, end = chance.choice([(a, b) for a, b in file.spans["data"] if b - a >= 8])
    size = chance.randrange(4, (end - start) // 2 + 1)
    a = chance.randrange(start, end - 2 * size + 1)
    b = chance.randrange(a + size, end - size + 1)
    one, other = bytes(data[a : a + size]), bytes(data[b : b + size])
    data[a : a + size], data[b : b + size] = other, one


def cut(chance: random.Random, data: bytearray, file: gguf_judge.Contents) -> None:
    few = chance.random() < 0.5  # as often only the last padding
    del data[-chance.randrange(1, 40 if few else len(data)) :]


def longer(chance: random.Random, data: bytearray, file: gguf_judge.Contents) -> None:
    data += chance.choice((bytes(1), bytes(32), b"\1", bytes(data), chance.randbytes(100)))


def without(of: str, count_at: int) -> Mutate:
    """A pair, or a tensor whose data stays behind; the header is sound."""

    def mutate(chance: random.Random, data: bytearray, file: gguf_judge.Contents) -> None:
        start, end = chance.choice(file.spans[of])
        (n,) = struct.unpack_from("<Q", data, count_at)
        struct.pack_into("<Q", data, count_at, n - 1)
        head_end, data_start = file.spans["padding"][0]
        head = data[:start] + data[end:head_end]
        data[:data_start] = head + bytes(-len(head) % 32)

    return mutate


def own_padding(chance: random.Random, data: bytearray, file: gguf_judge.Contents) -> None:
    """Not a fault: zeros under a key of ours move the tensors, as for sharing blocks."""
    (n_pairs,) = struct.unpack_from("<Q", data, 16)
    struct.pack_into("<Q", data, 16, n_pairs + 1)
    key, n = b"gguf_fuse.padding", chance.randrange(100)
    pair = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 0, n) + bytes(n)
    at = file.spans["key"][-1][1]
    head_end, data_start = file.spans["padding"][0]
    head = data[:at] + pair + data[at:head_end]
    data[:data_start] = head + bytes(-len(head) % 32)


KINDS: dict[str, Mutate] = {
    "head": one_bit("head"),
    "bit of a key or value": one_bit("key"),
    "bit of a name": one_bit("name"),
    "bit of dims": one_bit("dims"),
    "bit of data": one_bit("data"),
    "bit of padding": one_bit("padding"),
    "dims": another_number("dims", "Q"),
    "type": another_number("type", "I"),
    "offset": another_number("offset", "Q"),
    "names exchanged": exchanged("name"),
    "types exchanged": exchanged("type"),
    "dims exchanged": exchanged("dims"),
    "offsets exchanged": exchanged("offset"),
    "data exchanged": exchanged("data"),
    "pairs exchanged": exchanged("key"),
    "order": data_in_another_order,
    "gap": gap,
    "parts": parts_exchanged,
    "cut": cut,
    "longer": longer,
    "pair left out": without("key", 16),
    "tensor left out": without("tensor", 8),
    "padding of our own": own_padding,
}


# -- the files -----------------------------------------------------------------------------------


def plain(folder: Path) -> tuple[Path, Path]:
    original = pack.save(pack.valid(), folder / "in.gguf")
    return original, fused_copy(original)


def with_biases(folder: Path) -> tuple[Path, Path]:
    spec = ModelSpec("qwen2", types={"*": T.Q8_0}, scales="equal", n_vocab=300, n_layer=1)
    write_random_model(folder / "in.gguf", spec)
    return folder / "in.gguf", fused_copy(folder / "in.gguf")


def with_experts(folder: Path) -> tuple[Path, Path]:
    spec = ModelSpec("granite_swa", n_vocab=300, n_layer=1, n_embd=32, n_ff=32)
    write_random_model(folder / "in.gguf", spec)
    return folder / "in.gguf", fused_copy(folder / "in.gguf", fusions=(QKV, GATE_UP))


def with_stacks(folder: Path) -> tuple[Path, Path]:
    spec = ModelSpec(n_expert=gguf_judge.N_EXPERT, n_vocab=300, n_layer=1, n_embd=32, n_ff=32)
    write_random_model(folder / "new.gguf", spec)
    original = one_by_one(folder / "new.gguf")
    return original, fused_copy(original, fusions=(QKV, EXPERTS))


def with_ssm_in_split(folder: Path) -> tuple[Path, Path]:
    types = {"*": T.Q8_0, **F32_ALWAYS}
    spec = ModelSpec("qwen3next", types=types, n_vocab=300, n_layer=1, n_ff=32)
    write_random_model(folder / "new.gguf", spec)
    original = with_ssm_in(folder / "new.gguf")
    return original, fused_copy(original, fusions=(SSM_IN,))


def mutants(fused: bytes, seed: str) -> Iterator[tuple[str, bytes]]:
    """Kind and bytes of each; where a fault changed nothing, there is none."""
    file, chance = gguf_judge.read(fused), random.Random(seed)
    for number in range(N_MUTANTS):
        kind = list(KINDS)[number % len(KINDS)]
        data = bytearray(fused)
        KINDS[kind](chance, data, file)
        if len(data) == len(fused) and chance.random() < 0.1:  # two faults may hide each other
            KINDS["bit of data"](chance, data, file)
        if data != fused:
            yield kind, bytes(data)


def judged(original: gguf_judge.Contents, data: bytes) -> bool:
    try:
        return gguf_judge.same_model(original, gguf_judge.read(data))
    except gguf_judge.Refused:
        return False


def verdict(original: Path, mutant: Path) -> str:
    try:
        report = verify(original, mutant, QUICK)
    except GGUFError as error:
        assert str(error).isprintable()
        return "refused"
    assert not report.exchanged
    return "ok" if report.ok else "failed"


@pytest.mark.parametrize("make", [plain, with_biases, with_experts, with_stacks, with_ssm_in_split])
def test_verify_passes_no_mutant(
    make: Callable[[Path], tuple[Path, Path]],
    tmp_path: Path,
    record_property: Callable[[str, Any], None],
) -> None:
    original, path = make(tmp_path)
    fused, source = path.read_bytes(), gguf_judge.read(original.read_bytes())
    assert judged(source, fused)
    assert verdict(original, path) == "ok"
    mutant = tmp_path / "mutant.gguf"
    found: Counter[str] = Counter()
    for kind, data in mutants(fused, make.__name__):
        mutant.write_bytes(data)
        said = verdict(original, mutant)
        found[said] += 1
        assert said != "ok" or judged(source, data), kind
    n = sum(found.values())
    assert n > 0.7 * N_MUTANTS
    assert found["ok"] > 0
    counts = ", ".join(f"{found[word]} {word}" for word in ("failed", "refused", "ok"))
    record_property("harness", f"verify: {n} mutants of {make.__name__}: {counts}")


@pytest.mark.skipif(not llama_judge.available(), reason="needs xllamacpp")
def test_verify_passes_nothing_that_llama_cpp_refuses(
    tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    """A sample, for each takes a process. The judge above is held to llama.cpp's word too."""
    original, path = plain(tmp_path)
    mutant, copy = tmp_path / "mutant.gguf", tmp_path / "copy.gguf"
    every = N_MUTANTS // N_JUDGED
    n_refused = 0
    for kind, data in list(mutants(path.read_bytes(), "llama"))[::every]:
        mutant.write_bytes(data)
        try:
            llama_judge.rewrite_with_llama_cpp(mutant, copy)
        except llama_judge.LoadFailed:
            n_refused += 1
            assert verdict(original, mutant) != "ok", kind
            with pytest.raises(gguf_judge.Refused):
                gguf_judge.read(data)
    assert n_refused > N_JUDGED // 4
    record_property("harness", f"verify: {n_refused} of {N_JUDGED} mutants refused by llama.cpp")
