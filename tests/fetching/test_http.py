"""Models at an address: the same file comes out as from a disk, or one line says why not."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gguf_fuse.api import fuse, unfuse
from gguf_fuse.fetching import http, place
from gguf_fuse.format.shards import read_model
from gguf_fuse.format.source import GGUFError
from gguf_fuse.inspection import inspect
from gguf_fuse.verifying.report import VerifyOptions
from gguf_fuse.verifying.verify import verify
from tests import pack
from tests.conftest import FAST, gguf_fuse
from tests.fetching.server import Files, serve

MODEL = pack.valid(pack.F16, n_layers=4, n_embd=512)
WHOLE = MODEL.pack()
FUSED = pack.fused(MODEL).pack()


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Files]]:
    monkeypatch.setattr(http, "FIRST_WAIT_S", 0.01)
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "in.gguf").write_bytes(WHOLE)
    with serve(folder) as (address, files):
        yield address, files


def test_the_same_file_as_from_a_disk(there: tuple[str, Files], tmp_path: Path) -> None:
    address, files = there
    out = tmp_path / "out.gguf"
    result = fuse(f"{address}/in.gguf", out, options=FAST)
    assert out.read_bytes() == FUSED
    assert result.source.path == f"{address}/in.gguf"
    # Each byte once: beyond the first window of the header, which is looked at before.
    assert sum(last - first + 1 for first, last in files.asked) <= 1.05 * len(WHOLE) + (1 << 20)
    with (tmp_path / "piped.gguf").open("wb") as pipe:
        done = gguf_fuse("fuse", f"{address}/in.gguf", "-", stdout=pipe, stderr=None, text=None)
    assert done.returncode == 0
    assert (tmp_path / "piped.gguf").read_bytes() == FUSED
    assert verify(f"{address}/in.gguf", out, VerifyOptions(structure_only=True)).ok
    (files.folder / "out.gguf").write_bytes(FUSED)
    both = verify(f"{address}/in.gguf", f"{address}/out.gguf", VerifyOptions(structure_only=True))
    assert (both.ok, both.structure.n_fused) == (True, 4)
    with pytest.raises(GGUFError, match="are the same file"):
        verify(f"{address}/in.gguf", f"{address}/in.gguf")
    unfuse(f"{address}/out.gguf", tmp_path / "back.gguf", options=FAST)
    assert (tmp_path / "back.gguf").read_bytes() == WHOLE


def test_inspect_reads_the_header_alone(tmp_path: Path, there: tuple[str, Files]) -> None:
    address, files = there
    tokens = pack.Array(pack.STRING, [f"token {n}" for n in range(200_000)])
    large = pack.valid(pack.F16, n_layers=2, n_embd=2048).key("x.tokens", pack.ARRAY, tokens)
    (files.folder / "large.gguf").write_bytes(large.pack())
    assert len(inspect(f"{address}/large.gguf").layers) == 2
    n_header = len(large.pack()) - sum(len(tensor.data) for tensor in large.tensors)
    n_fetched = sum(last - first + 1 for first, last in files.asked)
    assert n_fetched < max(1.6 * n_header, 1 << 21)
    assert len(files.asked) < 8


@pytest.mark.parametrize("fault", ["429", "503", "cut"])
def test_what_passes_is_tried_again(there: tuple[str, Files], tmp_path: Path, fault: str) -> None:
    address, files = there
    files.faults[fault] = 3
    fuse(f"{address}/in.gguf", tmp_path / "out.gguf", options=FAST)
    assert (tmp_path / "out.gguf").read_bytes() == FUSED
    assert files.faults[fault] == 0


@pytest.mark.parametrize("command", ["inspect IN", "fuse IN OUT", "fuse IN OUT -q"])
def test_who_waits_for_a_server_says_so(
    there: tuple[str, Files], tmp_path: Path, command: str
) -> None:
    address, files = there
    files.faults["429"] = 1  # which asks to come again in a second
    words = {"IN": f"{address}/in.gguf", "OUT": tmp_path / "out.gguf"}
    done = gguf_fuse(*(words.get(word, word) for word in command.split()))
    assert done.returncode == 0
    said = "the server says 429 Too Many Requests; trying again in 1 s"
    assert done.stderr == ("" if "-q" in command else f"gguf-fuse: {address}/in.gguf: {said}\n")


def test_those_who_wait_at_the_same_time_say_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, told, now = place.Waits(), list[str](), [100.0]
    monkeypatch.setattr(place.time, "monotonic", lambda: now[0])
    waits.tell = told.append
    for seconds in (0.5, 4.0, 4.2):
        waits.begin("http://a/b.gguf: it broke off", seconds)
    now[0] = 105.0
    waits.begin("http://a/b.gguf: it broke off", 8.1)
    assert told == [f"http://a/b.gguf: it broke off; trying again in {n} s" for n in (4, 8)]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("200", "it gives no ranges; download the file"),
        ("wrong range", "asked for bytes "),
        ("other version", "changed while it was read"),
        ("503", "the server says 503 Service Unavailable (6 tries)"),
    ],
)
@pytest.mark.parametrize("from_the_start", [True, False])
def test_what_is_wrong_is_never_accepted(
    there: tuple[str, Files], tmp_path: Path, fault: str, words: str, from_the_start: bool
) -> None:
    address, files = there

    def on_start(n_bytes: int) -> None:
        files.faults[fault] = 1000

    if from_the_start and fault != "other version":
        on_start(0)
    options = FAST.__class__(sync=False, on_start=on_start)
    with pytest.raises(GGUFError) as caught:
        fuse(f"{address}/in.gguf", tmp_path / "out.gguf", options=options)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{address}/in.gguf: ")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_another_version_amid_the_reading(there: tuple[str, Files], tmp_path: Path) -> None:
    address, files = there

    def change(n_bytes: int) -> None:
        files.etag = '"two"'

    options = FAST.__class__(sync=False, on_start=change)
    with pytest.raises(GGUFError, match="changed while it was read"):
        fuse(f"{address}/in.gguf", tmp_path / "out.gguf", options=options)
    assert not (tmp_path / "out.gguf").exists()


def test_a_set_of_shards_is_found_by_name(there: tuple[str, Files], tmp_path: Path) -> None:
    address, files = there
    fuse(f"{address}/in.gguf", files.folder / "set", options=FAST.__class__(split_max_tensors=5))
    first = next(iter(sorted(files.folder.glob("set-00001-*")))).name
    unfuse(f"{address}/{first}", tmp_path / "back.gguf", options=FAST)
    assert (tmp_path / "back.gguf").read_bytes() == WHOLE


def test_secrets_go_only_where_they_belong(
    there: tuple[str, Files], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, files = there
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password s3cret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with serve(files.folder) as (elsewhere, others):
        files.redirect = elsewhere
        options = FAST.__class__(sync=False, manifest=tmp_path / "m.json")
        fuse(f"{address}/in.gguf?signature=s3cret", tmp_path / "out.gguf", options=options)
    assert all("Authorization" in headers for headers in files.headers)
    assert not any("Authorization" in headers for headers in others.headers)
    for name in ("out.gguf", "m.json", "m.sha256"):
        assert b"s3cret" not in (tmp_path / name).read_bytes()
    assert json.loads((tmp_path / "m.json").read_text())["sources"] == [
        {"address": f"{address}/in.gguf", "bytes": len(WHOLE), "etag": '"one"'}
    ]
    files.redirect, files.secret = None, "another"
    with pytest.raises(GGUFError, match="401") as caught:
        inspect(f"{address}/in.gguf?signature=s3cret")
    assert "s3cret" not in str(caught.value)
    with pytest.raises(GGUFError, match=r"netrc may have it"):
        inspect(address.replace("//", "//me:s3cret@") + "/in.gguf")


@pytest.mark.parametrize(
    ("name", "words"),
    [("absent.gguf", "404 Not Found"), ("empty.gguf", "it is empty")],
)
def test_what_is_not_there(there: tuple[str, Files], name: str, words: str) -> None:
    address, files = there
    (files.folder / "empty.gguf").write_bytes(b"")
    with pytest.raises(GGUFError, match=words):
        inspect(f"{address}/{name}")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate")
def test_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_WAIT_S", 0.01)
    (tmp_path / "in.gguf").write_bytes(WHOLE)
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext"
    alternative = ["subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run([*command.split(), *alternative], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serve(tmp_path, context) as (address, _):
        with pytest.raises(GGUFError, match="its certificate is not trusted"):
            inspect(f"{address}/in.gguf")
        http._tls.cache_clear()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        fuse(f"{address}/in.gguf", tmp_path / "out.gguf", options=FAST)
    http._tls.cache_clear()
    assert (tmp_path / "out.gguf").read_bytes() == FUSED


def test_nobody_answers(there: tuple[str, Files], tmp_path: Path) -> None:
    address, _ = there
    with pytest.raises(GGUFError, match=r"Connection refused \(2 tries\)"):
        inspect("http://127.0.0.1:9/in.gguf")
    with pytest.raises(GGUFError, match=r"SSL.*\(2 tries\)"):
        inspect(address.replace("http:", "https:") + "/in.gguf")
    with serve(tmp_path / "there") as (soon_gone, files):
        model = read_model(f"{soon_gone}/in.gguf")
        files.faults["cut"] = 1  # of the connection that is open still
    with pytest.raises(GGUFError, match=r"Connection refused \(6 tries\)"):  # it was there once
        model.sources[0].read(1 << 20, 100)
    with pytest.raises(GGUFError, match="ftp:// is not known"):
        inspect("ftp://127.0.0.1/in.gguf")
