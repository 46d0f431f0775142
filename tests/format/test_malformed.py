"""Bad input: every malformed file gives exit 1 and one clear line, soon, and writes nothing.

Each case runs in a process of its own, forked from a server that has imported everything, so that
its processor time and its peak memory are the tool's own and can be held to a bound.
"""

from __future__ import annotations

import json
import os
import pty
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import pytest
from gguf import GGUFReader

from tests import pack
from tests.conftest import gguf_fuse
from tests.pack import (
    ARRAY,
    BOOL,
    F32,
    FLOAT32,
    INT32,
    INT64,
    Q4_0,
    Q6_K,
    STRING,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    Array,
    File,
    Pair,
    Tensor,
    fused,
    tensor,
    valid,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and wait4")

MAX_SECONDS = 1.0  # of processor time, beyond what --version takes
MAX_MEMORY = 200 << 20
MAX_LINE = 2000  # a line that scrolls the screen away is not a clear one
COMMANDS = ("fuse", "unfuse", "inspect")
Q, K, V = (f"blk.0.attn_{part}.weight" for part in "qkv")
QKV = "blk.0.attn_qkv.weight"
LONG, INT = struct.Struct("<Q"), struct.Struct("<I")

# -- running ------------------------------------------------------------------------------------

# Limits that only keep a defect from hurting the machine: the tests measure, and ask for less.
_SERVER = """
import contextlib, io, json, os, resource, signal, sys, traceback
from gguf_fuse import cli
for command in ("inspect", "fuse", "unfuse"):  # import whatever is imported only on use
    for path in sys.argv[1:]:
        sys.argv = ["gguf-fuse", command, path, path]
        del sys.argv[3 if command == "inspect" else 4 :]
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            with contextlib.suppress(SystemExit):
                cli.main()
for line in sys.stdin:
    job = json.loads(line)
    if (child := os.fork()) == 0:
        for fd, path in ((1, job["out"]), (2, job["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        signal.alarm(30)
        resource.setrlimit(resource.RLIMIT_CPU, (6, 6))
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
        if job["uid"]:
            os.setuid(job["uid"])
        sys.argv, code = ["gguf-fuse", *job["arguments"]], 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status, used = os.wait4(child, 0)
    kib = used.ru_maxrss // 1024 if sys.platform == "darwin" else used.ru_maxrss
    answer = [os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, kib * 1024]
    print(json.dumps(answer), flush=True)
"""


@dataclass(frozen=True)
class Outcome:
    """What a command did; seconds: of processor time beyond the start of the program."""

    code: int
    out: str
    err: str
    seconds: float
    memory: int


class Run(Protocol):
    def __call__(self, *arguments: str | Path, uid: int = 0) -> Outcome: ...


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("streams")
    out, err = folder / "out", folder / "err"
    pipe = subprocess.PIPE
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # its buffers count as memory
    sound = save(valid(), folder / "sound.gguf")
    command = [sys.executable, "-c", _SERVER, str(sound), str(folder / "missing.gguf")]
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
    assert server.stdin and server.stdout

    def ask(*arguments: str | Path, uid: int = 0) -> Outcome:
        assert server.stdin and server.stdout
        texts = [str(argument) for argument in arguments]
        job = {"arguments": texts, "out": str(out), "err": str(err), "uid": uid}
        print(json.dumps(job), file=server.stdin, flush=True)
        code, seconds, memory = json.loads(server.stdout.readline())
        printed, complained = out.read_bytes().decode(), err.read_bytes().decode()
        return Outcome(code, printed, complained, seconds - baseline, memory)

    baseline = 0.0
    baseline = ask("--version").seconds
    yield ask
    server.stdin.close()
    server.wait()
    server.stdout.close()


def shell(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[Any]:
    """The real command in a process of its own, as a shell starts it."""
    command = [sys.executable, "-m", "gguf_fuse", *map(str, arguments)]
    settings = {"capture_output": True, "text": True, "timeout": 60} | options
    return subprocess.run(command, check=False, **settings)  # type: ignore[call-overload, no-any-return]


def command_line(command: str, source: Path) -> list[str | Path]:
    """OUT is beside IN, so that whatever is left behind shows in the folder."""
    return [command, source] if command == "inspect" else [command, source, source.parent / "out"]


def assert_one_line(outcome: Outcome, *words: str, code: int = 1) -> None:
    """The contract of every failure."""
    assert "Traceback" not in outcome.err, outcome.err
    assert outcome.code == code, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("gguf-fuse: ")
    assert outcome.err.endswith("\n")
    line = outcome.err[:-1]
    assert line.isprintable(), f"not one line of plain text: {line!r}"
    assert [word for word in words if word not in line] == [], line
    assert len(line) < MAX_LINE, f"a line of {len(line)} characters: {line[:200]}..."


def assert_cheap(outcome: Outcome) -> None:
    assert outcome.seconds < MAX_SECONDS, outcome
    assert outcome.memory < MAX_MEMORY, f"{outcome.memory >> 20} MiB: {outcome}"


# -- malformed files ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sparse:
    """A file with a hole of zeros after its first bytes: large, but takes no room on the disk."""

    head: bytes
    n_bytes: int


Content = bytes | File | Sparse


@dataclass(frozen=True)
class Case:
    name: str
    words: tuple[str, ...]
    make: Callable[[], Content]


CASES: list[Case] = []


def evil(*words: str) -> Callable[[Callable[[], Content]], None]:
    """Registers a maker of a malformed file, and what its error line must contain."""

    def register(make: Callable[[], Content]) -> None:
        CASES.append(Case(make.__name__, words, make))

    return register


def save(content: Content, path: Path) -> Path:
    if isinstance(content, Sparse):
        path.write_bytes(content.head)
        os.truncate(path, content.n_bytes)
    else:
        path.write_bytes(content.pack() if isinstance(content, File) else content)
    return path


def bare(*pairs: Pair, tensors: tuple[Tensor, ...] = ()) -> File:
    """Without tensors nothing is behind the header, no padding either."""
    return File(list(pairs), list(tensors), alignment=32 if tensors else 1)


def head_of(file: File, n_bytes: int) -> Sparse:
    return Sparse(file.pack(), n_bytes)


# the first bytes


@evil("not a GGUF file")
def empty_file() -> Content:
    return b""


@evil("truncated", "4")
def four_bytes() -> Content:
    return b"GGUF"


@evil("not a GGUF file")
def three_bytes() -> Content:
    return b"GGU"


@evil("not a GGUF file", "PK")
def a_zip_file() -> Content:
    return b"PK\3\4" + bytes(100)


@evil("not a GGUF file", "git lfs pull")
def a_git_lfs_pointer() -> Content:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 42\n"


@evil("not a GGUF file", "FUGG")
def magic_backwards() -> Content:
    return b"FUGG" + valid().pack()[4:]


@evil("not a GGUF file", r"\x1b")
def magic_is_a_terminal_escape() -> Content:
    return b"\x1b[2J" + valid().pack()[4:]


@evil("version 0")
def version_0() -> Content:
    return replace(valid(), version=0)


@evil("version 1", "not supported")
def version_1() -> Content:
    return replace(valid(), version=1)


@evil("version 99")
def version_99() -> Content:
    return replace(valid(), version=99)


@evil("version 4294967295")
def version_all_ones() -> Content:
    return replace(valid(), version=2**32 - 1)


@evil("version 1")
def version_1_with_an_empty_string_24_bytes() -> Content:  # ollama#17033
    return replace(bare(), version=1).pack()[:24].ljust(24, b"\0")


@evil("metadata pairs", "more than")
def only_the_version_is_swapped() -> Content:
    data = valid().pack()
    return data[:4] + data[7:3:-1] + data[8:]


@evil("not supported")
def swapped_garbage() -> Content:
    data = valid().pack()
    return data[:4] + b"".join(data[i : i + 4][::-1] for i in range(4, len(data), 4))[1:]


# counts and lengths


@evil(str(2**63), "tensors")
def tensor_count_2_63() -> Content:
    return replace(valid(), n_tensors=2**63)


@evil(str(2**64 - 1), "tensors")
def tensor_count_minus_1() -> Content:
    return replace(valid(), n_tensors=2**64 - 1)


@evil(str(2**63), "metadata pairs")
def metadata_count_2_63() -> Content:
    return replace(valid(), n_pairs=2**63)


@evil("tensor")
def one_tensor_too_many() -> Content:
    return replace(valid(), n_tensors=11)


@evil("tensor 1 of 10")
def one_pair_too_many() -> Content:
    return replace(valid(), n_pairs=9)


@evil("'tokenizer.ggml.scores'", "9 dimensions")
def one_pair_too_few() -> Content:
    return replace(valid(), n_pairs=7)


@evil("metadata pair 1 of 8", str(2**63))
def key_length_2_63() -> Content:
    file = valid()
    file.pairs[0] = replace(file.pairs[0], key_length=2**63)
    return file


@evil("metadata pair 1 of 1", "65536")
def key_of_64_kib() -> Content:
    return bare(Pair("k" * 65536, UINT8, 1))


@evil("empty key")
def empty_key() -> Content:
    return valid().key("", UINT8, 1)


@evil("'llama.block_count'", "twice")
def duplicate_key() -> Content:
    return valid().key("llama.block_count", UINT32, 3, old="general.name")


@evil("key", "UTF-8", r"\xff")
def key_is_not_utf8() -> Content:
    file = valid()
    file.pairs.append(Pair(b"general.\xff\xfe", UINT8, 1))
    return file


@evil("'general.name'", "13")
def unknown_kind_of_value() -> Content:
    return valid().key("general.name", 13, b"abc")


@evil("'general.name'", str(2**32 - 1))
def kind_of_value_all_ones() -> Content:
    return valid().key("general.name", 2**32 - 1, b"abc")


@evil("'general.name'")
def string_length_2_63() -> Content:  # L19003, ggml#1516
    return valid().key("general.name", STRING, LONG.pack(2**63) + b"abc")


@evil("'general.name'")
def string_length_wraps_back() -> Content:
    return valid().key("general.name", STRING, LONG.pack(2**64 - 16) + b"abc")


@evil("'general.name'")
def string_length_one_more_than_the_file() -> Content:
    return valid().key("general.name", STRING, LONG.pack(1 << 16) + b"abc")


# arrays


@evil("'k'", str(2**63))
def array_length_2_63_in_a_tiny_file() -> Content:  # L27188
    return bare(Pair("k", ARRAY, Array(UINT8, length=2**63)))


@evil("'k'", str(2**63))
def string_array_length_2_63() -> Content:
    return bare(Pair("k", ARRAY, Array(STRING, length=2**63)))


@evil("'k'", str(2**61))
def array_length_times_size_wraps_to_0() -> Content:
    return bare(Pair("k", ARRAY, Array(UINT64, length=2**61)))


@evil("'k'", "13")
def unknown_kind_of_element() -> Content:
    return bare(Pair("k", ARRAY, Array(13, length=1)))


@evil("'k'")
def array_longer_than_the_file() -> Content:
    return bare(Pair("k", ARRAY, Array(FLOAT32, [1.0], length=4)))


@evil("'k'", "nests arrays")
def arrays_9_deep() -> Content:
    value = Array(UINT8, [1])
    for _ in range(8):
        value = Array(ARRAY, [value])
    return bare(Pair("k", ARRAY, value))


@evil("'k'", "nests arrays")
def arrays_100000_deep() -> Content:
    level = INT.pack(ARRAY) + LONG.pack(1)
    return bare(Pair("k", ARRAY, level * 100_000))


@evil("'k'", str(2**63))
def array_of_2_63_arrays() -> Content:
    return bare(Pair("k", ARRAY, Array(ARRAY, length=2**63)))


@evil("'k'", "truncated")
def array_of_100000_arrays_and_one_more() -> Content:
    return bare(Pair("k", ARRAY, Array(ARRAY, [Array(UINT8)] * 100_000, length=100_001)))


@evil("'k'", "truncated")
def arrays_7_deep_and_5_wide() -> Content:
    value = Array(STRING, [""])
    for _ in range(6):
        value = Array(ARRAY, [value] * 5)
    return bare(Pair("k", ARRAY, value)).pack()[:-1]


@evil("'k'", str(2**63))
def huge_array_inside_an_array() -> Content:
    return bare(Pair("k", ARRAY, Array(ARRAY, [Array(STRING, length=2**63)])))


@evil("'k'", "truncated")
def a_million_empty_strings_and_one_more() -> Content:
    value = INT.pack(STRING) + LONG.pack(10**6 + 1) + bytes(8 * 10**6)
    return bare(Pair("k", ARRAY, value + bytes(7)))


# known keys


@evil("general.alignment", "0")
def alignment_0() -> Content:  # CVE-2025-0317
    return valid().key("general.alignment", UINT32, 0)


@evil("general.alignment", "33", "power of two")
def alignment_33() -> Content:
    return valid().key("general.alignment", UINT32, 33)


@evil("general.alignment", str(2**30))
def alignment_2_30() -> Content:
    return valid().key("general.alignment", UINT32, 2**30)


@evil("general.alignment", str(2**31))
def alignment_2_31() -> Content:
    return valid().key("general.alignment", UINT32, 2**31)


@evil("general.alignment", "UINT64", "UINT32")
def alignment_of_64_bits() -> Content:  # L26318
    return valid().key("general.alignment", UINT64, 32)


@evil("general.alignment", "STRING", "UINT32")
def alignment_is_a_string() -> Content:
    return valid().key("general.alignment", STRING, "32")


@evil("general.alignment", "array of UINT32")
def alignment_is_an_array() -> Content:
    return valid().key("general.alignment", ARRAY, Array(UINT32, [32]))


@evil("'llama.block_count'", "STRING", "integer")
def block_count_is_a_string() -> Content:  # CVE-2024-8063
    return valid().key("llama.block_count", STRING, "2")


@evil("'llama.block_count'", "FLOAT32", "integer")
def block_count_is_a_float() -> Content:
    return valid().key("llama.block_count", FLOAT32, 2.0)


@evil("'llama.block_count'", "array of UINT32", "integer")
def block_count_is_an_array() -> Content:
    return valid().key("llama.block_count", ARRAY, Array(UINT32, [2]))


@evil("'general.architecture'", "UINT32", "STRING")
def architecture_is_a_number() -> Content:
    return valid().key("general.architecture", UINT32, 1)


@evil("'general.architecture'", "array of STRING", "must be STRING")
def architecture_is_an_array() -> Content:
    return valid().key("general.architecture", ARRAY, Array(STRING, ["llama"]))


@evil("tokenizer.ggml.scores", "UINT8", "FLOAT32")
def scores_are_bytes() -> Content:  # L26690
    return valid().key("tokenizer.ggml.scores", ARRAY, Array(UINT8, [1, 2, 3]))


@evil("tokenizer.ggml.scores", "2", "3")
def scores_shorter_than_tokens() -> Content:
    return valid().key("tokenizer.ggml.scores", ARRAY, Array(FLOAT32, [0.0, 1.0]))


@evil("tokenizer.ggml.scores", "FLOAT32", "array")
def scores_are_one_number() -> Content:
    return valid().key("tokenizer.ggml.scores", FLOAT32, 1.0)


@evil("tokenizer.ggml.token_type", "2", "3")
def token_types_shorter_than_tokens() -> Content:
    return valid().key("tokenizer.ggml.token_type", ARRAY, Array(INT32, [1, 1]))


@evil("tokenizer.ggml.token_type", "UINT8", "INT32")
def token_types_are_bytes() -> Content:
    return valid().key("tokenizer.ggml.token_type", ARRAY, Array(UINT8, [1, 1, 1]))


@evil("tokenizer.ggml.tokens", "UINT32", "STRING")
def tokens_are_numbers() -> Content:
    return valid().key("tokenizer.ggml.tokens", ARRAY, Array(UINT32, [1, 2, 3]))


@evil("tokenizer.ggml.tokens", "STRING", "array")
def tokens_are_one_string() -> Content:
    return valid().key("tokenizer.ggml.tokens", STRING, "abc")


@evil("tokenizer.ggml.merges", "UINT8", "STRING")
def merges_are_bytes() -> Content:
    return valid().key("tokenizer.ggml.merges", ARRAY, Array(UINT8, [1]))


@evil("tokenizer.ggml.tokens", "truncated")
def a_token_longer_than_the_file() -> Content:  # CVE-2025-49847
    tokens = LONG.pack(2**31 + 8) + b"<s>"
    value = INT.pack(STRING) + LONG.pack(3) + tokens
    return valid().key("tokenizer.ggml.tokens", ARRAY, value)


# tensors


@evil("tensor 1 of 10", "empty name")
def empty_tensor_name() -> Content:
    return valid().tensor("token_embd.weight", name="")


@evil("tensor 1 of 10", str(2**63))
def tensor_name_length_2_63() -> Content:
    return valid().tensor("token_embd.weight", name_length=2**63)


@evil("tensor 3 of 10", "UTF-8", r"\xff")
def tensor_name_is_not_utf8() -> Content:
    return valid().tensor(K, name=b"blk.0.attn_\xff.weight")


@evil("tensor 3 of 10", "UTF-8")
def tensor_name_is_a_surrogate() -> Content:
    return valid().tensor(K, name=b"blk.0.\xed\xa0\x80")


@evil(repr(Q), "twice")
def duplicate_tensor() -> Content:
    return valid().tensor(V, name=Q)


@evil(repr(Q), "5 dimensions", "4")
def five_dimensions() -> Content:  # ggml#709
    return valid().tensor(Q, ne=(32, 32, 1, 1, 1))


@evil(repr(Q), str(2**32 - 1))
def dimension_count_all_ones() -> Content:
    return valid().tensor(Q, n_dims=2**32 - 1)


@evil(repr(Q), "dimension of 0", "[32, 0]")
def dimension_0() -> Content:  # L18586, ggml#1517
    return valid().tensor(Q, ne=(32, 0))


@evil(repr(Q), "[0]")
def dimension_0_of_an_unknown_type() -> Content:
    return valid().tensor(Q, ne=(0,), type=999)


@evil(repr(Q), "truncated")
def dimension_2_63() -> Content:
    return valid().tensor(Q, ne=(2**63, 2))


@evil(repr(Q))
def dimensions_wrap_to_0() -> Content:  # CVE-2026-33298
    return valid().tensor(Q, ne=(2**32, 2**32))


@evil(repr(Q))
def dimensions_wrap_to_the_true_size() -> Content:  # CVE-2025-53630: mod 2**64 this is 4096 bytes
    return valid().tensor(Q, ne=(32, 2**59 + 32))


@evil(repr(Q))
def four_dimensions_all_ones() -> Content:  # CVE-2026-27940
    return valid().tensor(Q, ne=(2**64 - 1,) * 4)


@evil(repr(Q), "33", "32", "Q4_0")
def row_is_no_multiple_of_the_block() -> Content:
    return valid().tensor(Q, ne=(33, 32), type=Q4_0)


@evil(repr(Q), "32", "256", "Q6_K")
def row_is_shorter_than_the_block() -> Content:
    return valid().tensor(Q, type=Q6_K)


@evil("'output_norm.weight'", "truncated")
def tensor_ends_beyond_the_file() -> Content:  # CVE-2026-7482
    return valid().tensor("output_norm.weight", ne=(4096,))


@evil("'output_norm.weight'", str(1 << 20), "truncated")
def tensor_begins_beyond_the_file() -> Content:
    return Sparse(valid().tensor("output_norm.weight", offset=1 << 20).pack(), 1 << 20)


@evil("'output_norm.weight'")
def offset_2_63() -> Content:
    return valid().tensor("output_norm.weight", offset=2**63)


@evil("'output_norm.weight'")
def offset_wraps_back() -> Content:
    return valid().tensor("output_norm.weight", offset=2**64 - 32)


@evil(repr(K), "offset 4488", "alignment 32")
def offset_is_unaligned() -> Content:
    return valid().tensor(K, offset=4480 + 8)


@evil("offset 16", "alignment 32")
def laid_out_for_alignment_16_without_the_key() -> Content:  # ollama#18130
    tensors = (tensor("a.weight", (4,)), tensor("b.weight", (4,)))
    return replace(bare(tensors=tensors), alignment=16).pack() + bytes(64)


@evil("overlaps", "offset 384")
def two_tensors_at_one_place() -> Content:
    return valid().tensor(K, offset=384)


@evil(repr(Q), "overlaps", "offset 4480")
def tensors_overlap_by_one_row() -> Content:
    return valid().tensor(Q, ne=(32, 33))


@evil("overlaps")
def whole_tensor_inside_another() -> Content:
    return valid().tensor("blk.1.attn_output.weight", offset=0)


@evil("overlaps")
def two_tensors_of_unknown_type_at_one_place() -> Content:
    return valid().tensor(Q, type=999, offset=4480).tensor(K, type=999)


@evil("'b.weight'")
def unknown_type_with_no_data_at_the_end() -> Content:
    ghost = Tensor("b.weight", (32,), 999, b"")
    return bare(tensors=(tensor("a.weight", (32,)), ghost))


# what a terminal would obey


EVIL_NAME = "x\n\x1b[31m[red]\r\x07\x9b\u2028\u202e\u200b\0[/]"


@evil(r"x\n\x1b[31m[red]\r\x07\x9b\u2028\u202e\u200b\x00[/]", "5 dimensions")
def tensor_name_with_terminal_escapes() -> Content:
    return valid().tensor(Q, name=EVIL_NAME, n_dims=5)


@evil(r"x\n\x1b[31m[red]\r\x07\x9b\u2028\u202e\u200b\x00[/]", "13")
def key_with_terminal_escapes() -> Content:
    return valid().key(EVIL_NAME, 13, b"")


@evil("dimensions")
def tensor_name_of_60000_bytes() -> Content:
    return valid().tensor(Q, name="blk." * 15000, n_dims=5)


@evil("13")
def key_of_60000_bytes() -> Content:
    return valid().key("key." * 15000, 13, b"")


# large headers

NOTHING = Pair("", UINT8, 0)


@evil()
def array_of_600_mb_then_nothing() -> Content:
    return head_of(bare(Pair("k", ARRAY, Array(UINT8, length=600 << 20)), NOTHING), 700 << 20)


@evil()
def array_of_40_million_empty_strings_then_nothing() -> Content:
    return head_of(bare(Pair("k", ARRAY, Array(STRING, length=40 << 20)), NOTHING), 400 << 20)


@evil()
def a_million_empty_arrays() -> Content:
    value = INT.pack(ARRAY) + LONG.pack(10**6) + bytes(12 * 10**6)
    return bare(Pair("k", ARRAY, value), Pair("end", 99, b""))


@evil()
def keys_without_end() -> Content:
    pairs = b"".join(LONG.pack(8) + b"%08d" % i + b"\0\0\0\0\1" for i in range(700_000))
    return replace(bare(), n_pairs=700_001).pack() + pairs


@evil()
def tensors_without_end() -> Content:
    infos = b"".join(
        LONG.pack(8) + b"%08d" % i + bytes(8) + LONG.pack(32 * i) for i in range(700_000)
    )
    return replace(bare(), n_tensors=700_000).pack() + infos


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 45


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed(case: Case, run: Run, tmp_path: Path) -> None:
    path = save(case.make(), tmp_path / "evil.gguf")
    outcomes = [run(*command_line(command, path)) for command in COMMANDS]
    for outcome in outcomes:
        assert_one_line(outcome, str(path), *case.words)
    for outcome in outcomes:
        assert_cheap(outcome)
    assert len({outcome.err for outcome in outcomes}) == 1, "every command finds the same error"
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_type_without_data_is_not_called_an_overlap(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "evil.gguf"
    path.write_bytes(bare(tensors=(Tensor("only.weight", (32,), 999, b""),)).pack())
    outcome = run("inspect", path)
    assert_one_line(outcome, "'only.weight'")
    assert "overlaps" not in outcome.err


@pytest.mark.parametrize("command", COMMANDS)
def test_truncated_at_every_boundary_and_inside_every_field(
    command: str, run: Run, tmp_path: Path
) -> None:
    file, path = valid(), tmp_path / "cut.gguf"
    data, at, cuts = file.pack(), 0, []
    for name, field in file.fields():
        cuts += [(at, f"before {name}")]
        cuts += [(at + len(field) // 2, f"inside {name}")] if len(field) > 1 else []
        at += len(field)
    n_needed = len(data) - len(file.fields()[-1][1])  # the padding of the last tensor may miss
    cuts += [(n_needed - 1, "one byte before the end")]
    cuts = [cut for cut in cuts if cut[0] < n_needed]
    for n_bytes, where in cuts if command == "fuse" else cuts[:: 3 if command == "inspect" else 5]:
        path.write_bytes(data[:n_bytes])
        outcome = run(*command_line(command, path))
        try:
            assert_one_line(outcome, str(path), "not a GGUF" if n_bytes < 4 else "truncated")
            assert_cheap(outcome)
            assert list(tmp_path.iterdir()) == [path]
        except AssertionError as error:
            raise AssertionError(f"cut {where}, at byte {n_bytes}: {error}") from error


def test_without_the_padding_of_the_last_tensor_it_is_whole(run: Run, tmp_path: Path) -> None:
    file, path = valid(), tmp_path / "whole.gguf"
    data, last = file.pack(), len(file.fields()[-1][1])
    path.write_bytes(data[:-last])
    assert run("fuse", path, tmp_path / "out").code == 0
    assert (tmp_path / "out").read_bytes() == fused(file).pack()


@pytest.mark.parametrize("name", ["four_bytes", "array_length_2_63_in_a_tiny_file", "dimension_0"])
def test_malformed_in_a_real_process(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    path = save(case.make(), tmp_path / "evil.gguf")
    result = shell("--fuse-qkv-weights", path, tmp_path / "out")
    outcome = Outcome(result.returncode, result.stdout, result.stderr, 0.0, 0)
    assert_one_line(outcome, str(path), *case.words)
    assert list(tmp_path.iterdir()) == [path]


# -- the bases are sound: another reader reads them ---------------------------------------------


def nested(file: File) -> File:
    inner = Array(ARRAY, [Array(STRING, ["a", "b"]), Array(UINT16, [1, 2, 3])])
    return file.key("test.nested", ARRAY, Array(ARRAY, [inner, Array(FLOAT32)]))


def aligned(file: File, alignment: int) -> File:
    return replace(file, alignment=alignment).key("general.alignment", UINT32, alignment)


VALID: dict[str, Callable[[], File]] = {
    "plain": valid,
    "f16": lambda: valid(pack.F16),
    "q8_0": lambda: valid(pack.Q8_0),
    "version 2": lambda: replace(valid(), version=2),
    "big endian": lambda: replace(valid(), order=">"),
    "big endian, version 2": lambda: replace(valid(), order=">", version=2),
    "alignment 8": lambda: aligned(valid(), 8),
    "alignment 16": lambda: aligned(valid(), 16),
    "alignment 64": lambda: aligned(valid(), 64),
    "alignment 4096": lambda: aligned(valid(), 4096),
    "nested arrays": lambda: nested(valid()),
    "empty arrays": lambda: valid().key("test.empty", ARRAY, Array(STRING)),
    "strings that are not UTF-8": lambda: valid().key(
        "test.bytes", STRING, LONG.pack(2) + b"\xff\xfe"
    ),
    "arrays 8 deep": lambda: valid().key("test.deep", ARRAY, _deep(8)),
}


def _deep(depth: int) -> Array:
    value = Array(UINT8, [1])
    for _ in range(depth - 1):
        value = Array(ARRAY, [value])
    return value


@pytest.mark.parametrize("name", VALID)
def test_valid_variant(name: str, run: Run, tmp_path: Path) -> None:
    """gguf-py reads it and the output; ours is what was packed by hand, and so is the way back."""
    file = VALID[name]()
    source, middle, back = (tmp_path / name for name in ("in.gguf", "fused.gguf", "back.gguf"))
    source.write_bytes(file.pack())
    assert run("fuse", source, middle).code == 0
    assert middle.read_bytes() == fused(file).pack()
    assert run("unfuse", middle, back).code == 0
    assert back.read_bytes() == file.pack()
    for path, wanted in ((source, file), (middle, fused(file))):
        reader = GGUFReader(path)
        read = {found.name: bytes(found.data.tobytes()) for found in reader.tensors}
        assert read == {tensor.name: tensor.data for tensor in wanted.tensors}


# -- sound headers with hostile content ---------------------------------------------------------


def test_layer_number_of_5000_digits(run: Run, tmp_path: Path) -> None:
    """Python refuses to convert it: that must not be a traceback."""
    file = valid()
    for part in "qkv":
        file.tensor(f"blk.1.attn_{part}.weight", name=f"blk.{'9' * 5000}.attn_{part}.weight")
    path = save(file, tmp_path / "digits.gguf")
    for command in COMMANDS:
        outcome = run(*command_line(command, path))
        assert "Traceback" not in outcome.err
        assert outcome.code in (0, 1, 3)


SPARSE: dict[str, tuple[str, Callable[[], Content]]] = {
    "a scale of 1 GB": ("inspect", lambda: _big_tensor("blk.0.attn_q.scale")),
    "an array of 30 MB as split.count": ("fuse", lambda: _big_value("split.count")),
    "an array of 30 MB as general.type": ("fuse", lambda: _big_value("general.type")),
    "an array of 30 MB as general.name": ("inspect", lambda: _big_value("general.name")),
    "an array of 30 MB as head count": (
        "unfuse",
        lambda: _big_value("llama.attention.head_count", unrecorded()),
    ),
    "an array of 30 MB as record": ("unfuse", lambda: _big_value("gguf_fuse.rows", fused(valid()))),
}


def _big_tensor(name: str) -> Content:
    file = valid()
    size = len(file.pack())
    big = Tensor(name, (1 << 28,), F32, b"")
    return head_of(replace(file, tensors=[*file.tensors, big]), size + (1 << 30) + 4096)


def _big_value(key: str, file: File | None = None) -> Content:
    """The rest of the file follows the zeros, so that its tensors are where they should be."""
    return (
        (file or valid())
        .key(key, ARRAY, Array(UINT8, bytes(0)))
        .key(
            key,
            ARRAY,
            INT.pack(UINT8) + LONG.pack(30 << 20) + bytes(30 << 20),
        )
    )


def unrecorded() -> File:
    """Fused by someone else: without our record."""
    file = fused(valid())
    return replace(file, pairs=file.pairs[:-4])


@pytest.mark.parametrize("name", SPARSE)
def test_large_values_are_not_unpacked(name: str, run: Run, tmp_path: Path) -> None:
    command, make = SPARSE[name]
    path = save(make(), tmp_path / "big.gguf")
    outcome = run(*command_line(command, path))
    assert "Traceback" not in outcome.err, outcome.err[-500:]
    assert outcome.code in (0, 1, 3)
    assert len(outcome.err) < MAX_LINE
    assert len(outcome.out) < 10 * MAX_LINE
    assert_cheap(outcome)


def test_alignment_of_256_mb_takes_no_memory(run: Run, tmp_path: Path) -> None:
    big = 1 << 28
    tensors = [
        replace(tensor, offset=index * big, data=b"")
        for index, tensor in enumerate(valid().tensors)
    ]
    file = replace(valid(), tensors=tensors).key("general.alignment", UINT32, big)
    path = save(head_of(file, big * (len(tensors) + 1)), tmp_path / "wide.gguf")
    outcome = run("fuse", path, tmp_path / "out", "--dry-run")
    assert "Traceback" not in outcome.err, outcome.err
    assert outcome.code in (0, 1)
    assert_cheap(outcome)


@pytest.mark.parametrize("command", ["fuse", "inspect"])
@pytest.mark.parametrize("place", ["name", "architecture", "tensor"])
def test_terminal_escapes_in_a_sound_file_are_not_obeyed(
    place: str, command: str, run: Run, tmp_path: Path
) -> None:
    file = valid()
    if place == "name":
        file.key("general.name", STRING, EVIL_NAME)
    elif place == "architecture":
        file.key("general.architecture", STRING, EVIL_NAME)
    else:  # the reason why a layer is left names what stands in the way
        file.tensors.append(replace(file.tensors[-1], name=f"blk.0.attn_q.{EVIL_NAME}"))
    path = save(file, tmp_path / "in.gguf")
    outcome = run(*command_line(command, path))
    assert "Traceback" not in outcome.err, outcome.err
    for line in (outcome.out + outcome.err).split("\n"):
        assert line.isprintable(), repr(line)


def test_markup_in_a_name_is_shown_as_it_is(run: Run, tmp_path: Path) -> None:
    path = save(valid().key("general.name", STRING, "[red]a[/red] \\[b] [/]"), tmp_path / "in.gguf")
    outcome = run("inspect", path)
    assert outcome.code == 0
    assert "[red]a[/red] \\[b] [/]" in outcome.out


@pytest.mark.parametrize("kind", [UINT32, FLOAT32, ARRAY])
def test_name_of_another_kind(kind: int, run: Run, tmp_path: Path) -> None:
    value = Array(ARRAY, [Array(UINT8, [1])]) if kind == ARRAY else 7
    path = save(valid().key("general.name", kind, value), tmp_path / "in.gguf")
    assert run("inspect", path).code == 0
    assert json.loads(run("inspect", path, "--json").out)["n_tensors"] == 10


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_never_two_tensors_of_one_name_in_the_output(kind: str, run: Run, tmp_path: Path) -> None:
    """An attn_qkv tensor is there already, beside attn_q, attn_k and attn_v of the same kind."""
    file = valid()
    for name, n in (("q", 32), ("k", 16), ("v", 16), ("qkv", 64)):
        if name == "qkv" or kind == "bias":
            ne = (n,) if kind == "bias" else (32, n)
            file.tensors.append(tensor(f"blk.0.attn_{name}.{kind}", ne))
    path, out = save(file, tmp_path / "in.gguf"), tmp_path / "out.gguf"
    outcome = run("fuse", path, out)
    assert "Traceback" not in outcome.err
    assert outcome.code in (0, 1)
    if outcome.code == 0:  # the other layer was fused
        names = [found.name for found in GGUFReader(out).tensors]
        assert len(set(names)) == len(names)
        assert Q in names


def test_a_lone_fused_bias_is_not_brought_to_life(run: Run, tmp_path: Path) -> None:
    """Unread beside separate weights, it would be added once the weights are fused."""
    file = valid()
    file.tensors.append(tensor("blk.0.attn_qkv.bias", (64,)))
    path, out = save(file, tmp_path / "in.gguf"), tmp_path / "out.gguf"
    outcome = run("fuse", path, out)
    assert outcome.code in (0, 1)
    if outcome.code == 0:
        assert Q in [found.name for found in GGUFReader(out).tensors]


# -- hostile records ----------------------------------------------------------------------------


def record(key: str, kind: int, value: object) -> Callable[[], File]:
    return lambda: fused(valid()).key(f"gguf_fuse.{key}", kind, value)


def rows(*numbers: int, kind: int = UINT64) -> Callable[[], File]:
    return record("rows", ARRAY, Array(kind, [*numbers, 32, 16, 16]))


def positions(*numbers: int, kind: int = UINT64) -> Callable[[], File]:
    return record("positions", ARRAY, Array(kind, [*numbers, 5, 6, 7]))


def names(*texts: str) -> Callable[[], File]:
    return record("tensors", ARRAY, Array(STRING, texts))


def without(key: str) -> Callable[[], File]:
    file = fused(valid())
    return lambda: replace(file, pairs=[p for p in file.pairs if p.key != f"gguf_fuse.{key}"])


def beside(name: str) -> Callable[[], File]:
    file = fused(valid())
    return lambda: replace(file, tensors=[*file.tensors, tensor(name, (32, 32))])


def _flat_quantized() -> File:
    """One row of 96 elements in 3 blocks: no row of its own to split."""
    flat = tensor(QKV, (96,), Q4_0)
    file = fused(valid()).tensor(QKV, ne=flat.ne, type=Q4_0, data=flat.data)
    return file.key("gguf_fuse.rows", ARRAY, Array(UINT64, [48, 24, 24, 32, 16, 16]))


SECOND = "blk.1.attn_qkv.weight"
RECORDS: dict[str, tuple[tuple[str, ...], Callable[[], File]]] = {
    "rows too many": ((QKV, "64", "33, 16, 16"), rows(33, 16, 16)),
    "rows too few": ((QKV, "64", "31, 16, 16"), rows(31, 16, 16)),
    "a row count of 0": ((QKV, "64", "64, 0, 0"), rows(64, 0, 0)),
    "negative rows that add up": ((QKV, "-16"), rows(48, 32, -16, kind=INT64)),
    "huge rows": ((QKV, str(2**64 - 1)), rows(2**64 - 1, 16, 16)),
    "rows that add up modulo 2^64": ((QKV, str(2**63)), rows(2**63, 2**63, 64)),
    "rows are floats": (("gguf_fuse.rows",), rows(32, 16, 16, kind=FLOAT32)),
    "rows are flags": (("gguf_fuse.rows",), rows(1, 1, 1, kind=BOOL)),
    "five rows": (("gguf_fuse.rows", "5"), rows(32, 16)),
    "seven rows": (("gguf_fuse.rows", "7"), rows(32, 16, 8, 8)),
    "rows are one number": (("gguf_fuse.rows",), record("rows", UINT64, 32)),
    "rows are arrays": (("gguf_fuse.rows",), record("rows", ARRAY, _deep(2))),
    "no rows": (("gguf_fuse.rows",), without("rows")),
    "no positions": (("gguf_fuse.positions",), without("positions")),
    "no names": (("gguf_fuse.tensors",), without("tensors")),
    "a position twice": (("gguf_fuse.positions",), positions(1, 2, 2)),
    "a position twice in two layers": (("gguf_fuse.positions",), positions(1, 2, 5)),
    "a position beyond the end": (("gguf_fuse.positions", "10"), positions(1, 2, 10)),
    "a huge position": (("gguf_fuse.positions",), positions(1, 2, 2**64 - 1)),
    "a negative position": (("gguf_fuse.positions",), positions(1, 2, -1, kind=INT64)),
    "five positions": (("gguf_fuse.positions", "5"), positions(1, 2)),
    "positions are floats": (("gguf_fuse.positions",), positions(1, 2, 3, kind=FLOAT32)),
    "a name twice": (("gguf_fuse.tensors", "twice"), names(QKV, QKV)),
    "a name that is not there": (
        ("blk.7.attn_qkv.weight",),
        names("blk.7.attn_qkv.weight", SECOND),
    ),
    "a name that is not fused": (("output_norm.weight",), names("output_norm.weight", SECOND)),
    "an empty name": (("gguf_fuse.tensors",), names("", SECOND)),
    "a name with escapes": ((r"\x1b",), names("\x1b[2J\n.attn_qkv.weight", SECOND)),
    "a name of 60,000 bytes": (("gguf_fuse.tensors",), names("x" * 60_000, SECOND)),
    "one name for two layers": (("gguf_fuse.rows",), names(QKV)),
    "names are numbers": (
        ("gguf_fuse.tensors",),
        record("tensors", ARRAY, Array(UINT32, [1, 2])),
    ),
    "names are one string": (("gguf_fuse.tensors",), record("tensors", STRING, QKV)),
    "version 0": (("gguf_fuse.version", "0"), record("version", UINT32, 0)),
    "version 3": (("gguf_fuse.version", "3"), record("version", UINT32, 3)),
    "version is a string": (("gguf_fuse.version",), record("version", STRING, "1")),
    "version is a long array": (
        ("gguf_fuse.version",),
        record("version", ARRAY, Array(UINT8, bytes(100_000))),
    ),
    "version with escapes": (("gguf_fuse.version",), record("version", STRING, "\x1b[2J\n")),
    "attn_q beside the fused tensor": ((repr(Q),), beside(Q)),
    "attn_v beside the fused tensor": (
        (repr("blk.1.attn_v.weight"),),
        beside("blk.1.attn_v.weight"),
    ),
    "a fused tensor without dimensions": (
        (QKV,),
        lambda: fused(valid()).tensor(QKV, ne=(), data=bytes(4)),
    ),
    "a quantized fused tensor of one row": ((QKV,), _flat_quantized),
    "a fused tensor of unknown type": (
        (QKV, "type 999"),
        lambda: fused(valid()).tensor(QKV, type=999),
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_hostile_record(name: str, run: Run, tmp_path: Path) -> None:
    words, make = RECORDS[name]
    path = save(make(), tmp_path / "evil.gguf")
    before = path.read_bytes()
    outcome = run("unfuse", path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path], "an unfused file was written"
    assert_one_line(outcome, str(path), *words)
    assert_cheap(outcome)
    assert path.read_bytes() == before
    assert "Traceback" not in run("inspect", path).err
    assert "Traceback" not in run("fuse", path, tmp_path / "out", "--dry-run").err


def test_a_record_without_its_version(run: Run, tmp_path: Path) -> None:
    """Refused, or split by the head counts: not half of each."""
    path, out = save(without("version")(), tmp_path / "in.gguf"), tmp_path / "out"
    if run("unfuse", path, out).code == 0:
        assert out.read_bytes() == valid().pack()
    else:
        assert not out.exists()


def test_an_empty_record_beside_fused_tensors(run: Run, tmp_path: Path) -> None:
    file = fused(valid()).key("gguf_fuse.tensors", ARRAY, Array(STRING))
    for key in ("rows", "positions"):
        file.key(f"gguf_fuse.{key}", ARRAY, Array(UINT64))
    outcome = run("unfuse", save(file, tmp_path / "evil.gguf"), tmp_path / "out")
    assert outcome.code in (1, 3)
    assert "no attention layer has" not in outcome.err, "two have"
    assert not (tmp_path / "out").exists()


UNRECORDED: dict[str, tuple[tuple[str, ...], Callable[[], File]]] = {
    "no head count": (
        (QKV, "64"),
        lambda: unrecorded().key("test", UINT8, 1, old="llama.attention.head_count"),
    ),
    "rows do not add up": (
        (QKV, "64"),
        lambda: unrecorded().key("llama.attention.head_count_kv", UINT32, 4),
    ),
    "head count 0": (
        (QKV, "64"),
        lambda: unrecorded().key("llama.attention.head_count", UINT32, 0),
    ),
    "head count is a string": (
        (QKV, "64"),
        lambda: unrecorded().key("llama.attention.head_count", STRING, "4"),
    ),
    "negative head count": (
        (QKV, "64"),
        lambda: unrecorded().key("llama.attention.head_count", INT32, -4),
    ),
    "negative lengths that add up": (
        (QKV, "64"),
        lambda: (
            unrecorded()
            .key("llama.attention.key_length", INT32, -8)
            .key("llama.attention.value_length", INT32, 56)
        ),
    ),
    "head counts for one layer of two": (
        (SECOND, "64"),
        lambda: unrecorded().key("llama.attention.head_count", ARRAY, Array(UINT32, [4])),
    ),
    "a fused tensor without dimensions": (
        (QKV,),
        lambda: unrecorded().tensor(QKV, ne=(), data=bytes(4)),
    ),
    "a fused tensor of one row": ((QKV,), lambda: unrecorded().tensor(QKV, ne=(64,))),
    "a quantized fused tensor of one row": (
        (QKV,),
        lambda: unrecorded().tensor(QKV, ne=(64,), type=Q4_0, data=bytes(36)),
    ),
    "attn_q beside the fused tensor": (
        (repr(Q),),
        lambda: replace(unrecorded(), tensors=[*unrecorded().tensors, tensor(Q, (32, 32))]),
    ),
    "a fused bias of another length": (
        ("blk.0.attn_qkv.bias",),
        lambda: replace(
            unrecorded(), tensors=[*unrecorded().tensors, tensor("blk.0.attn_qkv.bias", (63,))]
        ),
    ),
}


@pytest.mark.parametrize("name", UNRECORDED)
def test_fused_by_someone_else_and_not_to_be_split(name: str, run: Run, tmp_path: Path) -> None:
    words, make = UNRECORDED[name]
    path = save(make(), tmp_path / "evil.gguf")
    outcome = run("unfuse", path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path], "an unfused file was written"
    assert_one_line(outcome, str(path), *words)
    assert_cheap(outcome)


def test_fused_by_someone_else_and_split(run: Run, tmp_path: Path) -> None:
    """The base of the cases above is sound."""
    path = save(unrecorded(), tmp_path / "in.gguf")
    assert run("unfuse", path, tmp_path / "out").code == 0
    assert (tmp_path / "out").read_bytes() == valid().pack()


# -- paths --------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(valid(), tmp_path / "in.gguf")


def assert_input_refused(run: Run, path: Path | str, *words: str) -> None:
    folder = Path(path).parent
    before = sorted(folder.iterdir()) if folder.is_dir() else []
    for command in COMMANDS:
        out = [] if command == "inspect" else [folder / "out"]
        outcome = run(command, path, *out)
        assert_one_line(outcome, *words)
        assert_cheap(outcome)
    assert not folder.is_dir() or sorted(folder.iterdir()) == before


def test_input_is_missing(run: Run, tmp_path: Path) -> None:
    assert_input_refused(run, tmp_path / "no.gguf", f"{tmp_path}/no.gguf", "No such file")


def test_input_in_a_missing_folder(run: Run, tmp_path: Path) -> None:
    assert_input_refused(run, tmp_path / "no" / "no.gguf", "No such file")


def test_input_is_a_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    assert_input_refused(run, tmp_path / "folder.gguf", "folder.gguf", "not a regular file")


def test_input_is_a_pipe_that_nobody_writes_to(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    assert_input_refused(run, tmp_path / "pipe.gguf", "pipe.gguf", "not a regular file")


def test_input_is_a_socket(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.gguf")
        assert_input_refused(run, tmp_path / "socket.gguf", "not a regular file")


def test_input_is_an_endless_device(run: Run, tmp_path: Path) -> None:
    for command in COMMANDS:
        out = [] if command == "inspect" else [tmp_path / "out"]
        assert_one_line(run(command, "/dev/zero", *out), "/dev/zero", "not a regular file")


def test_input_is_a_broken_link(run: Run, tmp_path: Path) -> None:
    (tmp_path / "link.gguf").symlink_to("nowhere")
    assert_input_refused(run, tmp_path / "link.gguf", "link.gguf", "No such file")


def test_input_is_a_link_to_itself(run: Run, tmp_path: Path) -> None:
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    assert_input_refused(run, tmp_path / "loop.gguf", "loop.gguf", "symbolic links")


def test_input_name_is_too_long(run: Run, tmp_path: Path) -> None:
    assert_input_refused(run, tmp_path / ("x" * 300), "name too long")


def test_input_name_is_empty(run: Run, tmp_path: Path) -> None:
    assert_one_line(run("inspect", ""), "not a regular file")


def test_input_from_a_pipe(run: Run, tmp_path: Path) -> None:
    assert_one_line(run("fuse", "-", tmp_path / "out.gguf"), "-: No such file", "give a file")


def let_others_in(folder: Path) -> None:
    while folder != Path("/") and folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o001:
        folder.chmod(0o755)
        folder = folder.parent


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="root can become another user")
def test_input_that_may_not_be_read(run: Run, tmp_path: Path) -> None:
    let_others_in(tmp_path)
    model = save(valid(), tmp_path / "in.gguf")
    model.chmod(0o600)
    assert_one_line(run("inspect", model, uid=65534), f"{model}: Permission denied")


def test_input_name_with_escapes(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "\x1b[31mred\n[red].gguf"
    path.write_bytes(b"GGUF")
    assert_input_refused(run, path, r"\x1b[31mred\n[red].gguf", "truncated")


@pytest.mark.parametrize("command", COMMANDS)
def test_name_that_is_not_utf8(command: str, tmp_path: Path) -> None:
    """A name may hold any byte: it works, and prints, in the strict locale of most people."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.gguf"))
    save(fused(valid()) if command == "unfuse" else valid(), path)
    locale = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    result = shell(*command_line(command, path), text=False, env=locale)
    assert b"Traceback" not in result.stderr, result.stderr
    assert result.returncode == 0


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="root can become another user")
def test_input_is_unreadable(run: Run, model: Path) -> None:
    model.chmod(0)
    for command in COMMANDS:
        outcome = run(*command_line(command, model), uid=65534)
        assert_one_line(outcome, str(model), "Permission denied")


def test_output_is_the_input(run: Run, model: Path) -> None:
    before = model.read_bytes()
    (model.parent / "soft.gguf").symlink_to("in.gguf")
    (model.parent / "hard.gguf").hardlink_to(model)
    (model.parent / "folder").symlink_to(".")
    listing = sorted(model.parent.iterdir())
    for out in ("in.gguf", "soft.gguf", "hard.gguf", "folder/in.gguf", "./in.gguf"):
        for options in ([], ["--force"], ["--dry-run"]):
            outcome = run("fuse", model, f"{model.parent}/{out}", *options)
            assert_one_line(outcome, Path(out).name, "same file")
    assert model.read_bytes() == before
    assert sorted(model.parent.iterdir()) == listing


def test_input_through_a_link_is_the_output(run: Run, model: Path) -> None:
    link = model.parent / "soft.gguf"
    link.symlink_to("in.gguf")
    assert_one_line(run("fuse", link, model, "-f"), "same file")


def test_output_exists(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("precious")
    for options in ([], ["--dry-run"]):
        outcome = run("fuse", model, out, *options)
        assert_one_line(outcome, str(out), "exists", "--force")
    assert out.read_text() == "precious"
    assert sorted(tmp_path.iterdir()) == [model, out]
    assert run("fuse", model, out, "--force").code == 0
    assert out.read_bytes() == fused(valid()).pack()


def test_arguments_like_those_of_gguf_split_merge(run: Run, model: Path, tmp_path: Path) -> None:
    """L9498: a glob that matches two shards, and the second is taken for the output."""
    second = tmp_path / "in2.gguf"
    second.write_bytes(valid().pack())
    assert_one_line(run("fuse", model, second), "exists", "--force")
    assert run("fuse", model, second, tmp_path / "out.gguf").code == 2
    assert second.read_bytes() == valid().pack()


def test_output_is_a_folder(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for out in ("folder", "folder/", "", "."):
        outcome = run("fuse", model, f"{tmp_path}/{out}", "-f")
        assert_one_line(outcome, "not a regular file")
    assert list((tmp_path / "folder").iterdir()) == []


def test_output_is_a_pipe_on_the_disk(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "pipe"
    os.mkfifo(out)
    assert_one_line(run("fuse", model, out, "-f"), str(out), "not a regular file")
    assert stat.S_ISFIFO(out.stat().st_mode)


def test_output_is_a_device(run: Run, model: Path, tmp_path: Path) -> None:
    """The classic accident of root: `-o /dev/null` replaced by a file."""
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")
    assert_one_line(run("fuse", model, device, "-f"), str(device), "not a regular file")
    assert stat.S_ISCHR(device.stat().st_mode)


def test_output_that_is_a_pipe_by_name(model: Path, tmp_path: Path) -> None:
    done = gguf_fuse("fuse", model, "/dev/stdout")
    assert (done.returncode, done.stdout) == (1, "")
    assert "/dev/stdout: not a regular file; use - to write to standard output" in done.stderr


def test_output_with_a_slash_at_the_end(run: Run, model: Path, tmp_path: Path) -> None:
    assert_one_line(run("fuse", model, f"{tmp_path}/new/"), "new/: a folder")
    assert list(tmp_path.iterdir()) == [model]


def test_output_in_a_missing_folder(run: Run, model: Path, tmp_path: Path) -> None:
    outcome = run("fuse", model, tmp_path / "no" / "out.gguf")
    assert_one_line(outcome, str(tmp_path / "no"), "does not exist")
    assert list(tmp_path.iterdir()) == [model]


def test_output_below_a_file(run: Run, model: Path, tmp_path: Path) -> None:
    assert_one_line(run("fuse", model, model / "out.gguf"), f"{model} is not a folder")


def test_output_name_is_too_long(run: Run, model: Path, tmp_path: Path) -> None:
    assert_one_line(run("fuse", model, tmp_path / ("x" * 300)), "name too long")
    assert_one_line(run("fuse", model, tmp_path / ("x" * 300) / "out"))
    assert list(tmp_path.iterdir()) == [model]


def test_output_name_is_as_long_as_can_be(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / ("\u00e9" * 125 + ".gguf")
    assert run("fuse", model, out).code == 0
    assert sorted(tmp_path.iterdir()) == [model, out]


def test_output_is_a_link_to_itself(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "loop"
    out.symlink_to("loop")
    assert_one_line(run("fuse", model, out), str(out), "symbolic links")


def test_output_through_a_broken_link(run: Run, model: Path, tmp_path: Path) -> None:
    """The file appears where the link points; the link stays."""
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/out.gguf")
    assert run("fuse", model, tmp_path / "link").code == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "out.gguf").read_bytes() == fused(valid()).pack()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="root can become another user")
def test_output_in_a_folder_of_someone_else(run: Run, tmp_path: Path) -> None:
    """Readable input, unwritable folder."""
    let_others_in(tmp_path)
    model = save(valid(), tmp_path / "in.gguf")
    model.chmod(0o644)
    outcome = run("fuse", model, tmp_path / "out.gguf", uid=65534)
    assert_one_line(outcome, "Permission denied")
    assert list(tmp_path.iterdir()) == [model]


def test_output_on_a_terminal(model: Path) -> None:
    master, slave = pty.openpty()
    result = shell("fuse", model, "-", capture_output=False, stdout=slave, stderr=subprocess.PIPE)
    os.close(slave)
    os.set_blocking(master, False)
    try:
        shown = os.read(master, 1000)
    except OSError:  # nothing was written
        shown = b""
    os.close(master)
    assert result.returncode == 2
    assert "terminal" in result.stderr
    assert shown == b""


def test_output_on_a_full_device(model: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    for arguments in (("inspect", model), ("inspect", model, "--json"), ("fuse", model, "-")):
        with Path("/dev/full").open("w") as full:
            result = shell(*arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)
        assert "Traceback" not in result.stderr, (arguments, result.stderr)
        assert result.returncode == 1
        assert result.stderr.startswith("gguf-fuse: standard output: ")
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("out", ["-", "out.gguf"])
def test_standard_output_is_closed(out: str, model: Path) -> None:
    script = f'"$0" -m gguf_fuse fuse "$1" {out} >&-'
    command = ["sh", "-c", script, sys.executable, str(model)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=model.parent, check=False)
    assert "Traceback" not in result.stderr, result.stderr
    assert result.returncode in ((1, 2) if out == "-" else (0,))
    assert model.read_bytes() == valid().pack()


@pytest.mark.parametrize(
    "arguments",
    [
        ["fuse", "{in}", "-", "--json"],
        ["unfuse", "{in}", "-", "--json"],
        ["fuse", "{in}", "{out}", "--no-such-option"],
        ["fuse", "{in}", "{out}", "--threads", "0"],
        ["fuse", "{in}", "{out}", "--threads", "many"],
        ["fuse", "{in}", "{out}", "--on-mismatch", "guess"],
        ["fuse", "{in}"],
        ["fuse"],
        ["--fuse-qkv-weights", "{in}"],
        ["inspect", "{in}", "{out}"],
        ["no-such-command"],
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments: list[str], run: Run, model: Path, tmp_path: Path) -> None:
    places = {"{in}": str(model), "{out}": str(tmp_path / "out")}
    outcome = run(*(places.get(argument, argument) for argument in arguments))
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == [model]


# -- files that are sound, and refused ----------------------------------------------------------


def test_mismatch_is_an_error_when_asked_for(run: Run, tmp_path: Path) -> None:
    half = tensor(V, (32, 16), pack.F16)
    path = save(valid().tensor(V, type=pack.F16, data=half.data), tmp_path / "in.gguf")
    outcome = run("fuse", path, tmp_path / "out", "--on-mismatch", "error")
    assert_one_line(outcome, str(path), "blk.0", "F32, F32, F16")
    assert list(tmp_path.iterdir()) == [path]
    assert run("fuse", path, tmp_path / "out", "--on-mismatch", "skip").code == 0


def test_nothing_to_fuse(run: Run, tmp_path: Path) -> None:
    path = save(bare(Pair("general.architecture", STRING, "llama")), tmp_path / "in.gguf")
    assert_one_line(run("fuse", path, tmp_path / "out"), str(path), "nothing to fuse", code=3)
    assert_one_line(run("unfuse", path, tmp_path / "out"), str(path), "nothing to unfuse", code=3)
    assert list(tmp_path.iterdir()) == [path]


def test_no_room_for_the_record(run: Run, tmp_path: Path) -> None:
    """No file is written that could not be read again: that takes 65,536 pairs at most."""
    file, path, out = valid(), tmp_path / "in.gguf", tmp_path / "out"
    file.pairs += [Pair(f"k{i}", UINT8, 0) for i in range(65_520 - len(file.pairs))]
    save(file, path)
    assert run("fuse", path, out).code == 0
    assert run("inspect", out).code == 0
    save(file.key("one.more", UINT8, 0), path)
    outcome = run("fuse", path, tmp_path / "no")
    assert_one_line(outcome, f"{path}: 65521 metadata pairs leave no room", "65520 would")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("command", ["fuse", "unfuse"])
@pytest.mark.parametrize("kind", [UINT8, UINT16, UINT32, INT32, UINT64])
def test_shard(kind: int, command: str, run: Run, tmp_path: Path) -> None:
    file = (fused(valid()) if command == "unfuse" else valid()).key("split.no", kind, 0)
    path = save(file.key("split.count", kind, 3), tmp_path / "model-00001-of-00003.gguf")
    outcome = run(command, path, tmp_path / "out")
    assert_one_line(outcome, str(path), "missing of 3 shards: 2, 3", "model-00002-of-00003.gguf")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [(STRING, "3"), (FLOAT32, 3.0), (ARRAY, Array(UINT16, [0, 3]))])
def test_shard_with_a_count_of_the_wrong_kind(
    value: tuple[int, object], run: Run, tmp_path: Path
) -> None:
    """Taking part of a model for the whole one makes a corrupt file (mesh-llm#177)."""
    path = save(valid().key("split.count", *value), tmp_path / "in.gguf")
    assert_one_line(run("fuse", path, tmp_path / "out"), str(path), "split.count")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("command", ["fuse", "unfuse"])
@pytest.mark.parametrize("kind", ["adapter", "imatrix"])
def test_no_model(kind: str, command: str, run: Run, tmp_path: Path) -> None:
    """A model that says it is something else."""
    path = save(valid().key("general.type", STRING, kind), tmp_path / "in.gguf")
    outcome = run(command, path, tmp_path / "out", "--any-architecture")
    words, code = ("adapter.type", 1) if kind == "adapter" else ("nothing to", 3)
    assert_one_line(outcome, str(path), words, code=code)
    assert list(tmp_path.iterdir()) == [path]


A, B = ".lora_a", ".lora_b"
F64 = 28  # no quant: gguf-py knows its size alone


def lora(type: int = F32, rank: int = 4) -> File:
    """An adapter for `valid()`: Q, K and V of two layers."""
    pairs = [
        Pair("general.type", STRING, "adapter"),
        Pair("general.architecture", STRING, "llama"),
        Pair("adapter.type", STRING, "lora"),
        Pair("adapter.lora.alpha", FLOAT32, 8.0),
    ]
    tensors = []
    for layer in range(2):
        for part, rows in (("q", 32), ("k", 16), ("v", 16)):
            name = f"blk.{layer}.attn_{part}.weight"
            # Zeros: random bytes may be infinite.
            tensors += [Tensor(name + A, (32, rank), type, bytes(4 * 32 * rank))]
            tensors += [Tensor(name + B, (rank, rows), type, bytes(4 * rank * rows))]
    return File(pairs, tensors)


def lacking(file: File, *names: str) -> File:
    file.tensors = [tensor for tensor in file.tensors if tensor.name not in names]
    return file


BAD_ADAPTERS = {
    "control vector": (lora().key("adapter.type", STRING, "other"), "only LoRA"),
    "no type": (File(lora().pairs[:2], lora().tensors), "only LoRA"),
    "type of the wrong kind": (lora().key("adapter.type", UINT32, 1), "only LoRA"),
    "alpha of the wrong kind": (lora().key("adapter.lora.alpha", STRING, "8"), "no float32"),
    "no B": (lacking(lora(), K + B), f"{K + A!r} has no lora_b"),
    "no A": (lacking(lora(), K + A), f"{K + B!r} has no lora_a"),
    "three dimensions": (lora().tensor(Q + A, ne=(32, 2, 2)), "3 dimensions"),
    "one dimension": (lora().tensor(Q + B, ne=(128,)), "1 dimensions"),
    "ranks differ": (lora().tensor(Q + B, ne=(2, 64)), "rank 4"),
    "row lengths differ": (
        lora().tensor(Q + A, ne=(16, 8)).tensor(Q + B, ne=(8, 16)),
        "row lengths",
    ),
    "unknown type": (lora(142), "type 142"),
    "type that cannot be decoded": (
        lora().tensor(Q + A, type=F64, data=bytes(8 * 32 * 4)),
        f"{Q + A!r} is of F64, which cannot be joined with others; convert the adapter to F16",
    ),
    "rows of K unknown": (
        lacking(lora(), *(f"blk.{i}.attn_k.weight{end}" for i in (0, 1) for end in (A, B))),
        "--base",
    ),
    "rows of K ambiguous": (
        lacking(lora(), Q + A, Q + B)
        .tensor("blk.1.attn_q.weight" + B, ne=(4, 31))
        .tensor("blk.1.attn_q.weight" + A, ne=(32, 4))
        .key("general.architecture", STRING, "bitnet"),
        "needs separate",
    ),
    "unknown architecture": (
        lora().key("general.architecture", STRING, "new"),
        "--any-architecture",
    ),
    "already fused, and again": (lora().key("gguf_fuse.version", UINT32, 1), "already"),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_bad_adapter(case: str, run: Run, tmp_path: Path) -> None:
    file, reason = BAD_ADAPTERS[case]
    path = save(file, tmp_path / "in.gguf")
    outcome = run("fuse", path, tmp_path / "out")
    assert_one_line(outcome, str(path), reason, code=3 if case.startswith("already") else 1)
    assert list(tmp_path.iterdir()) == [path]


def test_adapter_and_its_base(run: Run, tmp_path: Path) -> None:
    path, out = save(lora(), tmp_path / "in.gguf"), tmp_path / "out"
    base = save(valid(), tmp_path / "base.gguf")
    other = save(valid(n_embd=64), tmp_path / "other.gguf")
    assert_one_line(run("fuse", path, out, "--base", other), str(path), "32 rows, 64 in the base")
    assert_one_line(run("fuse", path, out, "--base", path), str(path), "general.type")
    assert_one_line(run("fuse", path, out, "--base", tmp_path / "no"), "No such file")
    assert_one_line(run("fuse", base, out, "--base", other), str(base), "--base is for")
    assert not out.exists()
    assert run("fuse", path, out, "--base", base).code == 0


@pytest.mark.parametrize("kind", ["adapter", "imatrix"])
def test_verify_compares_models_only(kind: str, run: Run, tmp_path: Path) -> None:
    path, out = tmp_path / "in.gguf", tmp_path / "out"
    save(lora() if kind == "adapter" else matrix(Q, K, V), path)
    assert run("fuse", path, out).code == 0
    assert_one_line(run("verify", path, out), str(path), kind, "unfuse")


@pytest.mark.parametrize("kind", ["adapter", "imatrix"])
def test_experts_are_fused_in_models_only(kind: str, run: Run, tmp_path: Path) -> None:
    path = save(lora() if kind == "adapter" else matrix(Q, K, V), tmp_path / "in.gguf")
    outcome = run("fuse", path, tmp_path / "out", "--fuse-gate-up-exps")
    assert_one_line(outcome, f"{path}: of general.type '{kind}' only Q, K and V can be fused")
    assert list(tmp_path.iterdir()) == [path]


NAMES = ["blk.0.attn_qkv.weight", "blk.1.attn_qkv.weight"]


def fused_lora() -> File:
    """What gguf-fuse makes of `lora()`."""
    file = lora()
    rows, ranks = [32, 16, 16] * 2, [4] * 6
    positions = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    for key, kind, items in (
        ("tensors", STRING, NAMES),
        ("rows", UINT64, rows),
        ("ranks", UINT64, ranks),
        ("types", INT64, [F32] * 12),
        ("positions", INT64, positions),
        ("stored", INT64, [-1] * 12),
    ):
        file.key(f"gguf_fuse.{key}", ARRAY, Array(kind, items))
    file.pairs.insert(4, Pair("gguf_fuse.version", UINT32, 1))
    file.tensors = []
    for name in NAMES:
        file.tensors += [Tensor(name + A, (32, 16), F32, bytes(4 * 32 * 16))]
        file.tensors += [Tensor(name + B, (16, 64), F32, bytes(4 * 16 * 64))]
    return file


def test_what_the_damaged_adapters_would_be(run: Run, tmp_path: Path) -> None:
    path, out = save(lora(), tmp_path / "in.gguf"), tmp_path / "out"
    assert run("fuse", path, out).code == 0
    assert out.read_bytes() == fused_lora().pack()
    assert run("unfuse", out, tmp_path / "back").code == 0
    assert (tmp_path / "back").read_bytes() == lora().pack()


DAMAGED_RECORDS: dict[str, tuple[str, int, Any]] = {
    "version": ("version", UINT32, 2),
    "no name": ("tensors", ARRAY, Array(STRING, [])),
    "a name twice": ("tensors", ARRAY, Array(STRING, NAMES[:1] * 2)),
    "another name": (
        "tensors",
        ARRAY,
        Array(STRING, ["blk.0.attn_qkv.weight", "blk.7.attn_qkv.weight"]),
    ),
    "no attn_qkv": ("tensors", ARRAY, Array(STRING, [NAMES[0], "token_embd.weight"])),
    "names of the wrong kind": ("tensors", ARRAY, Array(UINT8, [1, 2])),
    "rows too few": ("rows", ARRAY, Array(UINT64, [32, 16])),
    "rows that do not add up": ("rows", ARRAY, Array(UINT64, [32, 16, 17] * 2)),
    "no rows": ("rows", ARRAY, Array(UINT64, [32, 32, 0] * 2)),
    "rows as a string": ("rows", STRING, "32"),
    "ranks too large": ("ranks", ARRAY, Array(UINT64, [4, 4, 9] * 2)),
    "ranks huge": ("ranks", ARRAY, Array(UINT64, [1 << 63, 4, 4] * 2)),
    "negative ranks": ("ranks", ARRAY, Array(INT64, [-4, 8, 8] * 2)),
    "no ranks": ("ranks", ARRAY, Array(UINT64, [0] * 6)),
    "unknown type": ("types", ARRAY, Array(INT64, [142] * 12)),
    "quantized type": ("types", ARRAY, Array(INT64, [Q4_0] * 12)),
    "negative type": ("types", ARRAY, Array(INT64, [-1] * 12)),
    "a place twice": ("positions", ARRAY, Array(INT64, [0] * 12)),
    "a place that is none": ("positions", ARRAY, Array(INT64, [*range(11), 99])),
    "a negative place": ("positions", ARRAY, Array(INT64, [*range(11), -1])),
    "stored nowhere": ("stored", ARRAY, Array(INT64, [0] * 12)),
    "stored before": ("stored", ARRAY, Array(INT64, [-2] * 12)),
}


@pytest.mark.parametrize("case", DAMAGED_RECORDS)
def test_damaged_record_of_an_adapter(case: str, run: Run, tmp_path: Path) -> None:
    key, kind, value = DAMAGED_RECORDS[case]
    path = save(fused_lora().key(f"gguf_fuse.{key}", kind, value), tmp_path / "in.gguf")
    assert_one_line(run("unfuse", path, tmp_path / "out"), str(path), "record of the fusion")
    assert list(tmp_path.iterdir()) == [path]


def test_a_recorded_type_whose_blocks_no_row_fills(run: Run, tmp_path: Path) -> None:
    """Said to be kept whole, in Q4_0, though B has rows of 4."""
    file = fused_lora().key(
        "gguf_fuse.types", ARRAY, Array(INT64, [F32, F32, F32, Q4_0, Q4_0, Q4_0] * 2)
    )
    file.key("gguf_fuse.stored", ARRAY, Array(INT64, [-1, -1, -1, 0, 0, 0] * 2))
    path = save(file, tmp_path / "in.gguf")
    words = ("gguf_fuse.types has 2 for rows of 4", "record of the fusion")
    assert_one_line(run("unfuse", path, tmp_path / "out"), str(path), *words)
    assert list(tmp_path.iterdir()) == [path]


def test_adapter_fused_elsewhere(run: Run, tmp_path: Path) -> None:
    file = fused_lora()
    path = save(File(file.pairs[:4], file.tensors), tmp_path / "in.gguf")
    assert_one_line(run("unfuse", path, tmp_path / "out"), str(path), "no record")
    assert list(tmp_path.iterdir()) == [path]


def matrix(*names: str) -> File:
    pairs = [Pair("general.type", STRING, "imatrix")]
    tensors = []
    for name in names:
        tensors += [Tensor(f"{name}.in_sum2", (32,), F32, bytes(128))]
        tensors += [Tensor(f"{name}.counts", (1,), F32, bytes(4))]
    return File(pairs, tensors)


BAD_MATRICES = {
    "no counts": (lacking(matrix(Q, K, V), f"{K}.counts"), "has no counts"),
    "no sums": (lacking(matrix(Q, K, V), f"{K}.in_sum2"), "has no in_sum2"),
    "no float32": (matrix(Q, K, V).tensor(f"{K}.counts", type=26), "is of I32"),
    "shapes differ": (matrix(Q, K, V).tensor(f"{K}.in_sum2", ne=(16, 2)), "blk.0: in_sum2"),
    "both": (matrix(Q, K, V, QKV, "blk.0.attn_output.weight"), "has an entry already"),
    "the old format": (b"\x10\0\0\0\x13\0\0\0blk.0.attn_k.weight" + bytes(64), "not a GGUF file"),
}


@pytest.mark.parametrize("case", BAD_MATRICES)
def test_bad_importance_matrix(case: str, run: Run, tmp_path: Path) -> None:
    content, reason = BAD_MATRICES[case]
    path = save(content, tmp_path / "in.gguf")
    assert_one_line(run("fuse", path, tmp_path / "out"), str(path), reason)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("version", Pair("", UINT32, 7), "is 7, this release knows 1"),
        ("tensors", Pair("", ARRAY, Array(STRING, [f"{QKV}.counts"])), "6 numbers, not 3"),
        (
            "tensors",
            Pair("", ARRAY, Array(STRING, [f"{QKV}.in_sum2", "blk.7.attn_qkv.weight.counts"])),
            "'blk.7.attn_qkv.weight.counts' is recorded, which the file does not have",
        ),
        ("positions", Pair("", ARRAY, Array(UINT64, [0, 2, 4])), "3 numbers, not 6"),
        ("positions", Pair("", ARRAY, Array(UINT64, [0, 2, 4, 1, 3, 99])), "among 6 tensors"),
        ("positions", Pair("", ARRAY, Array(UINT64, [0, 2, 4, 0, 3, 5])), "a number twice"),
        ("positions", Pair("", STRING, "0"), "missing or of the wrong type"),
    ],
)
def test_damaged_record_of_an_importance_matrix(
    key: str, value: Pair, problem: str, run: Run, tmp_path: Path
) -> None:
    path, fused_path = save(matrix(Q, K, V), tmp_path / "in.gguf"), tmp_path / "fused"
    assert run("fuse", path, fused_path).code == 0
    file = matrix(QKV)
    file.key("gguf_fuse.version", UINT32, 1)
    file.key("gguf_fuse.tensors", ARRAY, Array(STRING, [f"{QKV}.in_sum2", f"{QKV}.counts"]))
    file.key("gguf_fuse.positions", ARRAY, Array(UINT64, [0, 2, 4, 1, 3, 5]))
    assert fused_path.read_bytes() == file.pack()
    save(file.key(f"gguf_fuse.{key}", value.kind, value.value), fused_path)
    outcome = run("unfuse", fused_path, tmp_path / "out")
    assert_one_line(outcome, str(fused_path), problem, "record of the fusion")
    assert not (tmp_path / "out").exists()


REFUSED = {
    "bitnet": "needs separate",  # NEEDS_SEPARATE
    "qwen4exp": "crashes",  # CRASHES
    "gpt2": "fused",  # ALREADY_FUSED
    "mamba": "no attention",  # NO_ATTENTION
    "frobnicate": "not known",  # UNKNOWN
    "LLaMA": "not known",
    "": "not known",
    "\x1b[2J": r"\x1b[2J",
    "clip": "projector",
}


@pytest.mark.parametrize("name", REFUSED)
def test_architecture_is_refused(name: str, run: Run, tmp_path: Path) -> None:
    file = valid().key("general.architecture", STRING, name)
    path, out = save(file, tmp_path / "in.gguf"), tmp_path / "out.gguf"
    outcome = run("fuse", path, out)
    assert_one_line(outcome, str(path), REFUSED[name], "--any-architecture")
    assert list(tmp_path.iterdir()) == [path]
    if name == "clip":  # its loader splits into equal parts: K and V of fewer rows cannot be fused
        for part, n in (("k", 32), ("v", 32)):
            for layer in range(2):
                whole = tensor(f"blk.{layer}.attn_{part}.weight", (32, n))
                file.tensor(str(whole.name), ne=whole.ne, data=whole.data)
        save(file, path)
    assert run("fuse", path, out, "--any-architecture").code == 0
    assert out.read_bytes() == fused(file).pack()


def test_architecture_is_missing(run: Run, tmp_path: Path) -> None:
    file = valid()
    del file.pairs[0]
    path, out = save(file, tmp_path / "in.gguf"), tmp_path / "out.gguf"
    assert_one_line(run("fuse", path, out), str(path), "--any-architecture")
    assert run("fuse", path, out, "--any-architecture").code == 0
    assert out.read_bytes() == fused(file).pack()
