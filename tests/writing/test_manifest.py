"""--manifest: what it tells of new files is what other programs find in them."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from gguf_fuse import __version__
from gguf_fuse.api import Options, fuse, unfuse
from gguf_fuse.format.source import GGUFError, Source
from gguf_fuse.progress import ignore
from gguf_fuse.writing.copy import BLOCK_BYTES, write_all
from gguf_fuse.writing.hashing import hash_beside
from gguf_fuse.writing.place import Copy
from tests import pack
from tests.conftest import FAST, gguf_fuse
from tests.server import Run, assert_one_line
from tests.writing.harness import contents
from tests.writing.test_interruption import SLOWLY, finish, start, wait_written

Model = Callable[..., Path]


def with_manifest(path: Path, **more: Any) -> Options:
    return Options(sync=False, manifest=path, **more)


def assert_true(manifest: Path) -> dict[str, Any]:
    """All that it tells is so: by hashlib, by gguf-py, and by sha256sum."""
    told: dict[str, Any] = json.loads(manifest.read_text())
    assert (told["format"], told["program"]) == (1, f"gguf-fuse {__version__}")
    for file in told["files"]:
        path = manifest.parent / file["name"]
        data = path.read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert file["tensors"] == [
            {
                "name": tensor.name,
                "type": tensor.tensor_type.name,
                "ne": [int(n) for n in tensor.shape],
                "start": int(tensor.data_offset),
                "bytes": int(tensor.n_bytes),
                "sha256": hashlib.sha256(tensor.data.tobytes()).hexdigest(),
            }
            for tensor in GGUFReader(path).tensors
        ]
    check_sums(manifest, len(told["files"]))
    return told


def check_sums(manifest: Path, n_files: int, **options: Any) -> None:
    if shutil.which("sha256sum") is None:
        return
    command = ["sha256sum", "--check", "--strict", manifest.with_suffix(".sha256").name]
    done = subprocess.run(command, cwd=manifest.parent, capture_output=True, **options)
    assert (done.returncode, done.stdout.count(b": OK")) == (0, n_files), done


@pytest.mark.parametrize("threads", [1, 3])
def test_of_a_file_and_of_what_it_was(model: Model, tmp_path: Path, threads: int) -> None:
    original, out, back = model(), tmp_path / "out.gguf", tmp_path / "back.gguf"
    told: list[int] = []
    options = with_manifest(tmp_path / "out.json", threads=threads, on_progress=told.append)
    fuse(original, out, options=options)
    said = assert_true(tmp_path / "out.json")
    assert said["sources"] == [{"path": str(original), "bytes": original.stat().st_size}]
    assert sum(told) == out.stat().st_size
    unfuse(out, back, options=with_manifest(tmp_path / "back.json"))
    said = assert_true(tmp_path / "back.json")
    assert said["files"][0]["sha256"] == hashlib.sha256(original.read_bytes()).hexdigest()


def test_what_is_written_is_the_same_without(model: Model, tmp_path: Path) -> None:
    original, out, plain = model(), tmp_path / "out.gguf", tmp_path / "plain.gguf"
    fuse(original, out, options=with_manifest(tmp_path / "out.json"))
    fuse(original, plain, options=FAST)
    assert out.read_bytes() == plain.read_bytes()
    assert out.stat().st_mode == (tmp_path / "out.json").stat().st_mode


def test_of_shards(model: Model, tmp_path: Path) -> None:
    manifest = tmp_path / "set.json"
    fuse(model(), tmp_path / "set", options=with_manifest(manifest, split_max_tensors=5))
    said = assert_true(manifest)
    shards = sorted(path.name for path in tmp_path.glob("set-*"))
    assert [file["name"] for file in said["files"]] == shards
    assert len(shards) > 2


def test_of_an_adapter_with_computed_tensors(packed: Path, tmp_path: Path) -> None:
    lora = pack.save(pack.lora(), tmp_path / "lora.gguf")
    options = with_manifest(tmp_path / "out.json")
    fuse(lora, tmp_path / "out.gguf", base=packed, options=options)
    said = assert_true(tmp_path / "out.json")
    assert [source["path"] for source in said["sources"]] == [str(lora), str(packed)]


def test_of_a_pipe(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with out.open("wb") as stream:
        arguments = ("fuse", packed, "-", "--manifest", tmp_path / "out.json")
        done = gguf_fuse(*arguments, stdout=stream, text=None)
    assert done.returncode == 0, done.stderr
    fuse(packed, tmp_path / "file.gguf", options=with_manifest(tmp_path / "file.json"))
    piped, filed = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("out", "file"))
    assert piped["files"][0]["name"] == "-"
    assert piped | {"files": filed["files"]} == filed
    with out.open("rb") as stream:  # "-" is standard input to sha256sum
        check_sums(tmp_path / "out.json", 1, stdin=stream)


@pytest.mark.parametrize("name", ["a b.gguf", "a\nb.gguf", "a\\b.gguf", "\u00e9\udcff.gguf"])
def test_names_count_from_the_manifest(packed: Path, tmp_path: Path, name: str) -> None:
    for folder in ("files", "told", "real"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link").symlink_to("real")
    manifests = tmp_path / "told" / "m.json", tmp_path / "files" / "m.json"
    for manifest, out in zip(manifests, ("link", "files"), strict=True):
        fuse(packed, tmp_path / out / name, options=with_manifest(manifest))
        assert_true(manifest)
    (tmp_path / "files").rename(tmp_path / "moved")
    assert_true(tmp_path / "moved" / "m.json")


def test_the_sums_of_a_manifest_without_an_ending(packed: Path, tmp_path: Path) -> None:
    fuse(packed, tmp_path / "out.gguf", options=with_manifest(tmp_path / "told"))
    assert {path.name for path in tmp_path.iterdir()} == {
        *("in.gguf", "out.gguf", "told", "told.sha256")
    }


@pytest.mark.parametrize("out", ["out.gguf", "-"])
@pytest.mark.parametrize(
    ("manifest", "words", "options"),
    [
        ("old.json", "old.json: exists already; --force replaces it", []),
        ("out.json", "out.sha256: exists already; --force replaces it", []),
        ("in.gguf", "input and output are the same file", ["--force"]),
        ("in.gguf", "input and output are the same file", ["--force", "--dry-run"]),
        ("link.json", "input and output are the same file", ["--force"]),
        ("folder", "a folder, not a regular file", ["--force"]),
        ("nowhere/m.json", "nowhere does not exist", []),
        ("/dev/null", "not a regular file", ["--force"]),
        ("-", "'-': a manifest is a file on this machine", []),
        ("https://example.org/m.json", "a manifest is a file on this machine", []),
    ],
)
def test_where_it_cannot_be(
    run: Run, packed: Path, out: str, manifest: str, words: str, options: list[str]
) -> None:
    folder = packed.parent
    (folder / "old.json").write_text("old")
    (folder / "out.sha256").write_text("old")
    (folder / "link.json").symlink_to("in.gguf")
    (folder / "folder").mkdir()
    before = sorted(folder.iterdir())
    name = manifest if manifest.startswith(("-", "/", "http")) else folder / manifest
    to = out if out == "-" else folder / out
    if out == "-" and "--dry-run" not in options:
        options = [*options, "--no-sync"]
    assert_one_line(run("fuse", packed, to, "--manifest", name, *options), words)
    assert sorted(folder.iterdir()) == before
    assert (folder / "old.json").read_text() == "old"


def test_it_cannot_be_the_output(run: Run, packed: Path) -> None:
    folder = packed.parent
    (folder / "link.json").symlink_to("out.gguf")
    for out, manifest in (
        ("out.gguf", "out.gguf"),
        ("out.sha256", "out.json"),
        ("out.gguf", "link.json"),
    ):
        outcome = run("fuse", packed, folder / out, "--manifest", folder / manifest, "--force")
        assert_one_line(outcome, "the manifest and OUT would be the same file")
        assert not (folder / out).exists()


def test_it_cannot_be_standard_output(packed: Path) -> None:
    for name in ("m.json", "m.sha256"):
        with (packed.parent / name).open("wb") as stream:
            manifest = packed.parent / "m.json"
            done = gguf_fuse("fuse", packed, "-", "--manifest", manifest, "-f", stdout=stream)
        said = f"{packed.parent}/{name}: the manifest and standard output are the same file"
        assert (done.returncode, done.stderr) == (1, f"gguf-fuse: {said}\n")
        assert (packed.parent / name).stat().st_size == 0
        (packed.parent / name).unlink()


def test_force_replaces_both(run: Run, packed: Path) -> None:
    folder = packed.parent
    for name in ("out.gguf", "out.json", "out.sha256"):
        (folder / name).write_text("old")
    arguments = ("fuse", packed, folder / "out.gguf", "--manifest", folder / "out.json", "--force")
    outcome = run(*arguments, "--json")
    assert outcome.code == 0, outcome
    assert json.loads(outcome.out)["manifest"] == str(folder / "out.json")
    assert_true(folder / "out.json")
    assert len(contents(folder)) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="watches the writing through /proc")
def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """While blocks are written, and hashed beside that."""
    large = pack.save(pack.valid(pack.F16, n_layers=3, n_embd=2048), tmp_path / "in.gguf")
    arguments = ("fuse", large, tmp_path / "out.gguf", "--manifest", tmp_path / "out.json")
    process = start(*arguments, "--reflink", "never", prelude=SLOWLY)
    wait_written(process, large.stat().st_size // 3)
    process.send_signal(signal.SIGINT)
    said = "gguf-fuse: interrupted; nothing was written\n"
    assert finish(process) == (130, "", said)
    assert list(tmp_path.iterdir()) == [large]


def test_a_manifest_that_the_disk_has_no_room_for(tmp_path: Path, packed: Path, run: Run) -> None:
    """RLIMIT_FSIZE: the manifest is longer than the model, and longer than a file may be."""
    resource = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    file = pack.File(
        pack.valid().pairs, [pack.tensor(f"t{n}", (1,)) for n in range(900)] + pack.valid().tensors
    )
    many = pack.save(file, tmp_path / "many.gguf")
    limit = many.stat().st_size + 4096
    resource += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    arguments = ("fuse", many, tmp_path / "out.gguf", "--manifest", tmp_path / "m.json")
    before = contents(tmp_path)
    outcome = run(*arguments, "--no-sync", prelude=resource)
    assert_one_line(outcome, "m.json: File too large; nothing was written")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("seed", range(20))
def test_blocks_that_come_in_any_order(tmp_path: Path, seed: int) -> None:
    """What lies between the copies is there before; ranges begin and end anywhere."""
    chance = random.Random(seed)
    data = chance.randbytes(chance.randrange(1, 4 * BLOCK_BYTES))
    path, source = tmp_path / "file", Source.find(__file__)
    marks = sorted(chance.sample(range(len(data) + 1), min(8, len(data))))
    pairs = list(zip(marks[::2], marks[1::2], strict=False))
    blocks = [Copy(source, 0, start, end - start) for start, end in pairs]
    path.write_bytes(data)
    with path.open("r+b", buffering=0) as stream:
        for block in blocks:
            write_all(stream.fileno(), memoryview(bytes(block.n_bytes)), block.target)

        def copy(wrote: Callable[[Copy], None]) -> None:
            pieces = [
                block.part(at, min(n_bytes, block.n_bytes - at))
                for block in blocks
                for n_bytes in [chance.randrange(1 << 16, 1 << 20)]
                for at in range(0, block.n_bytes, n_bytes)
            ]
            chance.shuffle(pieces)
            for piece in pieces:
                view = memoryview(data)[piece.target : piece.ends[1]]
                write_all(stream.fileno(), view, piece.target)
                wrote(piece)

        cuts = sorted(chance.choices(range(len(data) + 1), k=8))
        ranges = [(start, end - start) for start, end in zip(cuts[::2], cuts[1::2], strict=True)]
        found = hash_beside(path, len(data), ranges, blocks, copy, ignore)
    assert found.whole == hashlib.sha256(data).hexdigest()
    assert found.ranges == tuple(
        hashlib.sha256(data[start : start + n]).hexdigest() for start, n in ranges
    )


def test_a_new_file_that_is_cut_meanwhile(packed: Path, tmp_path: Path) -> None:
    def cut(n_bytes: int) -> None:
        (new,) = tmp_path.glob("out.gguf.gguf-fuse-*")
        os.truncate(new, 5000)

    options = with_manifest(tmp_path / "m.json", on_progress=ignore)
    before = contents(tmp_path)
    large = pack.save(pack.valid(pack.F16, n_layers=2, n_embd=1024), tmp_path / "large.gguf")
    options = with_manifest(tmp_path / "m.json", on_progress=cut, threads=1)
    with pytest.raises(GGUFError, match=r"out\.gguf: ended at byte .*; nothing was written"):
        fuse(large, tmp_path / "out.gguf", options=options)
    assert contents(tmp_path).keys() == {*before, "large.gguf"}
