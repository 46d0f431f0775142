"""verify --manifest: every fault of a file, and every lie of a manifest, is told by its place."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gguf_fuse import VerifyOptions, verify_manifest
from gguf_fuse.api import Options, fuse
from gguf_fuse.fetching import http
from gguf_fuse.format.source import GGUFError
from tests import pack
from tests.cli.test_json import answer
from tests.edit import bytes_of
from tests.fetching.server import serve
from tests.server import Run, assert_cheap, assert_one_line
from tests.terminal import on_a_terminal

MODEL = pack.valid(pack.F16, n_layers=3, n_embd=64)
Tensor = dict[str, Any]
# Of the tensor that the manifest is made to lie of.
HASH = next(
    hashlib.sha256(tensor.data).hexdigest()
    for tensor in pack.fused(MODEL).tensors
    if tensor.name == "blk.1.attn_qkv.weight"
)


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    """out.gguf, and m.json beside it, alone in their folder."""
    source = pack.save(MODEL, tmp_path / "in.gguf")
    folder = tmp_path / "there"
    folder.mkdir()
    manifest = folder / "m.json"
    fuse(source, folder / "out.gguf", options=Options(sync=False, manifest=manifest))
    return folder / "out.gguf"


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    source = pack.save(MODEL, tmp_path / "in.gguf")
    options = Options(sync=False, manifest=tmp_path / "m.json", split_max_tensors=4)
    fuse(source, tmp_path / "set", options=options)
    return sorted(tmp_path.glob("set-*"))


def manifest_of(fused: Path) -> Path:
    return fused.with_name("m.json")


def problems(fused: Path) -> tuple[str, ...]:
    return verify_manifest(manifest_of(fused), fused).problems


@contextmanager
def told(fused: Path) -> Iterator[dict[str, Any]]:
    """What the manifest tells, to be changed."""
    value = json.loads(manifest_of(fused).read_text())
    yield value
    manifest_of(fused).write_text(json.dumps(value))


def tensors_of(fused: Path) -> dict[str, Tensor]:
    value = json.loads(manifest_of(fused).read_text())
    return {tensor["name"]: tensor for file in value["files"] for tensor in file["tensors"]}


def test_what_was_written_needs_no_original(run: Run, fused: Path) -> None:
    elsewhere = fused.parent.parent / "renamed.gguf"
    fused.rename(elsewhere)
    (fused.parent.parent / "in.gguf").unlink()
    outcome = run("verify", "--manifest", manifest_of(fused), elsewhere)
    assert (outcome.code, outcome.err) == (0, "")
    n = len(tensors_of(fused))
    assert outcome.out == (
        f"Identical: {n} tensors and all else, byte for byte, to what {manifest_of(fused)} tells. "
        f"Safe to use {elsewhere}.\n"
    )
    said = answer(run("verify", "--manifest", manifest_of(fused), elsewhere, "--json"))
    assert (said["ok"], said["tensors_out"]) == (True, n)
    assert said["bytes_hashed"] == elsewhere.stat().st_size
    detailed = run("verify", elsewhere, "--manifest", manifest_of(fused), "--verbose")
    assert "ok SHA-256: " in detailed.out
    assert run("verify", elsewhere, "--manifest", manifest_of(fused), "--quiet").out == ""


def test_every_tensor_is_named_that_differs(run: Run, fused: Path) -> None:
    """In its first byte and in its last, alone and with another one."""
    for name, tensor in tensors_of(fused).items():
        for at in (tensor["start"], tensor["start"] + tensor["bytes"] - 1):
            with bytes_of(fused) as data:
                data[at] ^= 1
            (problem,) = problems(fused)
            assert problem.startswith(f"tensor '{name}' differs: SHA-256 ")
            assert f"expected {tensor['sha256']} (bytes {tensor['start']} to " in problem
            with bytes_of(fused) as data:
                data[at] ^= 1
    first, second = list(tensors_of(fused).values())[:2]
    with bytes_of(fused) as data:
        data[first["start"]] ^= 1
        data[second["start"]] ^= 1
    outcome = run("verify", "--manifest", manifest_of(fused), fused)
    assert outcome.code == 4
    assert f"tensor '{second['name']}' differs" in outcome.out
    assert outcome.err.startswith(f"gguf-fuse: verification failed: tensor '{first['name']}'")
    assert outcome.err.endswith(f"(and 1 more); do not use {fused}\n")


def test_a_single_problem_is_one_line_and_one_object(run: Run, fused: Path) -> None:
    with bytes_of(fused) as data:
        data[-100] ^= 1
    arguments = ("verify", "--manifest", manifest_of(fused), fused)
    assert_one_line(run(*arguments), "tensor 'output_norm.weight' differs", code=4)
    said = answer(run(*arguments, "--json"))
    assert (said["exit_code"], said["ok"], len(said["structure"]["problems"])) == (4, False, 1)


def test_what_is_in_no_tensor(fused: Path) -> None:
    """A byte of metadata, of the tensor list, and of padding."""
    whole = fused.read_bytes()
    named = whole.index(b"tiny")
    listed = whole.index(b"output_norm.weight")
    for at in (named, listed, len(whole) - 1):
        with bytes_of(fused) as data:
            data[at] ^= 1
        first = problems(fused)[0]
        agree = f"{fused}: its {len(tensors_of(fused))} tensors agree, but the header, metadata or "
        assert first.startswith(f"{agree}padding differs: SHA-256 "), first
        fused.write_bytes(whole)


def test_a_header_that_cannot_be_read_is_no_error_of_ours(fused: Path) -> None:
    with bytes_of(fused) as data:
        data[0] ^= 1
    agree, broken = problems(fused)
    assert "tensors agree, but the header" in agree
    assert broken.startswith("its header cannot be read: ")


@pytest.mark.parametrize("n_bytes", [0, 100, 5000, -1])
def test_a_file_that_is_cut(fused: Path, n_bytes: int) -> None:
    n_before = fused.stat().st_size
    n_after = n_bytes if n_bytes >= 0 else n_before - 1
    os.truncate(fused, n_after)
    (problem,) = problems(fused)
    assert problem.startswith(f"{fused}: has {n_after} bytes, expected {n_before}")
    lost = [t["name"] for t in tensors_of(fused).values() if t["start"] + t["bytes"] > n_after]
    assert (
        (f"tensor '{lost[0]}' and what follows" in problem) if lost else ("tensor" not in problem)
    )


def test_a_file_with_something_behind_it(fused: Path) -> None:
    n_bytes = fused.stat().st_size
    with fused.open("ab") as stream:
        stream.write(b"x")
    assert problems(fused) == (f"{fused}: has {n_bytes + 1} bytes, expected {n_bytes}",)


def test_another_file_is_one_line(fused: Path) -> None:
    with bytes_of(fused) as data:
        for tensor in tensors_of(fused).values():
            data[tensor["start"]] ^= 1
    (problem,) = problems(fused)
    n = len(tensors_of(fused))
    assert problem.startswith(f"{fused}: another file: {n} of {n} tensors differ; tensor 'token_e")


def renamed(tensor: Tensor) -> None:
    tensor["name"] = "blk.9.attn_q.weight"


def of_another_type(tensor: Tensor) -> None:
    tensor["type"] = "Q8_0"


def of_another_shape(tensor: Tensor) -> None:
    tensor["ne"] = tensor["ne"][::-1]


def with_another_hash(tensor: Tensor) -> None:
    tensor["sha256"] = "0" * 64


def shorter(tensor: Tensor) -> None:
    tensor["bytes"] -= 32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed, ("'blk.1.attn_qkv.weight' is in", "'blk.9.attn_q.weight' is missing in")),
        (of_another_type, ("tensor 'blk.1.attn_qkv.weight': type F16, expected Q8_0",)),
        (of_another_shape, ("'blk.1.attn_qkv.weight': ne [64, 128], expected [128, 64]",)),
        (
            with_another_hash,
            (f"'blk.1.attn_qkv.weight' differs: SHA-256 {HASH}, expected {'0' * 64}",),
        ),
        (shorter, ("differs: SHA-256", "'blk.1.attn_qkv.weight': 16384 bytes, expected 16352")),
    ],
)
def test_a_manifest_that_lies_of_a_sound_file(
    fused: Path, change: Callable[[Tensor], None], words: tuple[str, ...]
) -> None:
    with told(fused) as value:
        tensors = value["files"][0]["tensors"]
        change(next(t for t in tensors if t["name"] == "blk.1.attn_qkv.weight"))
    found = problems(fused)
    assert len(found) == len(words)
    for problem, word in zip(found, words, strict=True):
        assert problem.startswith(f"{manifest_of(fused)}: contradicts itself: {fused} has the ")
        assert word in problem


def test_a_set_is_found_by_any_shard(run: Run, shards: list[Path]) -> None:
    for shard in shards:
        assert verify_manifest(manifest_of(shard), shard).ok
    moved = [shard.rename(shard.with_name(shard.name.replace("set", "other"))) for shard in shards]
    assert run("verify", "--manifest", manifest_of(moved[0]), moved[-1]).code == 0


def test_a_set_that_is_not_whole(run: Run, shards: list[Path]) -> None:
    shards[1].rename(shards[1].with_suffix(".away"))
    outcome = run("verify", "--manifest", manifest_of(shards[0]), shards[0])
    assert_one_line(outcome, f"{shards[1]}: No such file or directory")


def test_exchanged_shards(shards: list[Path]) -> None:
    """Of other sizes, and of one size."""
    away = shards[0].with_name("away")
    shards[0].rename(away)
    shards[1].rename(shards[0])
    away.rename(shards[1])
    found = verify_manifest(manifest_of(shards[0]), shards[0]).problems
    assert [problem.partition(": has ")[0] for problem in found] == [str(s) for s in shards[:2]]
    large = max(shards[:2], key=lambda shard: shard.stat().st_size)
    with told(large) as value:
        for file in value["files"][:2]:
            file["bytes"] = large.stat().st_size
    for shard in shards[:2]:
        os.truncate(shard, large.stat().st_size)
    found = verify_manifest(manifest_of(shards[0]), shards[0]).problems
    assert all(any(str(shard) in problem for problem in found) for shard in shards[:2])
    assert any("differ" in problem for problem in found)


def test_a_set_of_another_count(fused: Path, shards: list[Path]) -> None:
    n = len(shards)
    (problem,) = verify_manifest(manifest_of(shards[0]), fused).problems
    assert problem == (
        f"{fused}: is one file by its name, but {manifest_of(shards[0])} is of {n} shards"
    )
    other = shards[0].with_name("set-00001-of-00009.gguf")
    shutil.copy(shards[0], other)
    (problem,) = verify_manifest(manifest_of(other), other).problems
    assert problem.startswith(f"{other}: is shard 1 of 9 by its name, but ")


def test_of_a_pipe(run: Run, tmp_path: Path) -> None:
    source = pack.save(MODEL, tmp_path / "in.gguf")
    outcome = run("fuse", source, "-", "--manifest", tmp_path / "m.json")
    out = tmp_path / "out.gguf"
    out.write_bytes(outcome.out.encode(errors="surrogateescape"))
    assert verify_manifest(tmp_path / "m.json", out).ok


def test_a_file_at_an_address_is_fetched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pack.save(pack.valid(pack.F16, n_layers=4, n_embd=1024), tmp_path / "in.gguf")
    fused = tmp_path / "there" / "out.gguf"
    fused.parent.mkdir()
    fuse(source, fused, options=Options(sync=False, manifest=manifest_of(fused)))
    with serve(fused.parent) as (address, files):
        report = verify_manifest(manifest_of(fused), f"{address}/out.gguf")
        assert report.ok, report.problems
        asked = sum(last - first + 1 for first, last in files.asked)
        assert asked <= 1.01 * fused.stat().st_size + (1 << 20)  # the header's window, too
        with bytes_of(fused) as data:
            data[-100] ^= 1
        (problem,) = verify_manifest(manifest_of(fused), f"{address}/out.gguf").problems
        assert problem.startswith("tensor 'output_norm.weight' differs")
        monkeypatch.setattr(http, "FIRST_WAIT_S", 0.01)
        files.faults["503"] = 1000
        with pytest.raises(GGUFError, match=r"out\.gguf: the server says 503"):
            verify_manifest(manifest_of(fused), f"{address}/out.gguf")


def test_memory_does_not_grow(run: Run, tmp_path: Path) -> None:
    large = pack.save(pack.valid(pack.F16, n_layers=12, n_embd=2048), tmp_path / "in.gguf")
    out = tmp_path / "out.gguf"
    fuse(large, out, options=Options(sync=False, manifest=tmp_path / "m.json"))
    outcome = run("verify", "--manifest", tmp_path / "m.json", out)
    assert outcome.code == 0
    assert out.stat().st_size > 250 << 20
    assert outcome.memory < 120 << 20


def test_progress_is_of_every_byte(fused: Path) -> None:
    said: list[int] = []
    options = VerifyOptions(on_start=lambda what, n: said.append(-n), on_progress=said.append)
    verify_manifest(manifest_of(fused), fused, options)
    assert sum(said) == 0
    assert said[0] == -fused.stat().st_size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{in}", "{out}"], "--manifest proves FUSED alone: leave out ORIGINAL"),
        (["{out}", "--layers", "0"], "--manifest computes nothing: leave out --layers and --llama"),
        (["{out}", "--llama"], "--manifest computes nothing: leave out --layers and --llama"),
    ],
)
def test_wrong_usage(run: Run, fused: Path, arguments: list[str], words: str) -> None:
    places = {"{in}": str(fused.parent.parent / "in.gguf"), "{out}": str(fused)}
    typed = [places.get(word, word) for word in arguments]
    assert_one_line(run("verify", "--manifest", manifest_of(fused), *typed), words, code=2)


SOUND = {
    "format": 1,
    "program": "gguf-fuse 0.1.0",
    "sources": [],
    "files": [{"name": "a", "bytes": 64, "sha256": "0" * 64, "tensors": []}],
}
TENSOR = {"name": "t", "type": "F32", "ne": [1], "start": 0, "bytes": 4, "sha256": "0" * 64}


def of_file(**changes: Any) -> str:
    return json.dumps(SOUND | {"files": [{**SOUND["files"][0], **changes}]})  # type: ignore[index]


def of_tensors(*tensors: Any) -> str:
    return of_file(tensors=list(tensors))


MALFORMED: dict[str, str | bytes] = {
    "it is not JSON: Expecting value": "",
    "it is not JSON: Extra data": "{} {}",
    "it is not JSON": b"\xff\xfe\x00",
    "nested too deeply": "[" * 100_000,
    "it is not an object": "[]",
    "format is None, this program reads 1": "{}",
    "format is 2, this program reads 1": json.dumps(SOUND | {"format": 2}),
    "format is True": json.dumps(SOUND | {"format": True}),
    "format is 1.0": json.dumps(SOUND | {"format": 1.0}),
    "NaN is no number of JSON": json.dumps(SOUND).replace("64", "NaN"),
    "a key occurs twice": json.dumps(SOUND).replace('"program"', '"format"'),
    "it has no 'files'": json.dumps({"format": 1}),
    "files of it is not a list": json.dumps(SOUND | {"files": {}}),
    "it names no file": json.dumps(SOUND | {"files": []}),
    "a file is not an object": json.dumps(SOUND | {"files": [1]}),
    "file 'a' occurs twice": json.dumps(SOUND | {"files": SOUND["files"] * 2}),  # type: ignore[operator]
    "name of a file is not a text": of_file(name=1),
    "bytes of file 'a' is -1, not a whole number": of_file(bytes=-1),
    "bytes of file 'a' is True, not": of_file(bytes=True),
    "bytes of file 'a' is 1.5, not": of_file(bytes=1.5),
    f"bytes of file 'a' is {1 << 63}": of_file(bytes=1 << 63),
    "sha256 of file 'a' is 'ABC', not 64 hexadecimal digits": of_file(sha256="ABC"),
    "sha256 of file 'a' is '000": of_file(sha256="0" * 64 + "\n"),
    "tensors of file 'a' has 40000 entries, more than": of_tensors(*[1] * 40_000),
    "a tensor is not an object": of_tensors(None),
    "ne of tensor 't' is not a list": of_tensors(TENSOR | {"ne": 1}),
    "ne of tensor 't' is 'x', not": of_tensors(TENSOR | {"ne": ["x"]}),
    "ne of tensor 't' has 9 entries": of_tensors(TENSOR | {"ne": [1] * 9}),
    "type of tensor 't' is not a text": of_tensors(TENSOR | {"type": None}),
    "tensor 't' has no 'start'": of_tensors({"name": "t", "type": "F32", "ne": []}),
    "tensor 't' occurs twice": of_tensors(TENSOR, TENSOR | {"start": 32}),
    "tensors 't' and 'u' overlap": of_tensors(TENSOR, TENSOR | {"name": "u", "start": 3}),
    "tensor 't' ends behind file 'a'": of_tensors(TENSOR | {"start": 61}),
    "name of a tensor is not a text": of_tensors(TENSOR | {"name": ["t"]}),
    "more than 33554432 bytes": b" " * (33 << 20),
}


@pytest.mark.parametrize("words", MALFORMED)
def test_what_is_no_manifest(run: Run, tmp_path: Path, packed: Path, words: str) -> None:
    path, text = tmp_path / "m.json", MALFORMED[words]
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    outcome = run("verify", "--manifest", path, packed)
    assert_one_line(outcome, f"{path}: no manifest of gguf-fuse: {words}")
    assert_cheap(outcome)


def test_a_manifest_that_is_not_there(run: Run, packed: Path) -> None:
    outcome = run("verify", "--manifest", "missing.json", packed)
    assert_one_line(outcome, "missing.json: No such file or directory")
    assert_one_line(run("verify", "--manifest", packed.parent, packed), "Is a directory")


def test_the_verdict_comes_when_the_bar_is_gone(fused: Path) -> None:
    shown = on_a_terminal("verify", "--manifest", manifest_of(fused), fused)
    bar, found, rest = shown.partition("Identical: ")
    assert found and "hashing" in bar and "hashing" not in rest
