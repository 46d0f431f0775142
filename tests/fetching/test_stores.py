"""Objects of stores: S3 from moto's server, Google's from a server of ranges."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gguf_fuse.api import fuse
from gguf_fuse.format import source
from gguf_fuse.format.source import GGUFError
from gguf_fuse.inspection import inspect
from gguf_fuse.verifying.report import VerifyOptions
from gguf_fuse.verifying.verify import verify
from tests.conftest import FAST
from tests.fetching.server import serve
from tests.fetching.test_http import FUSED, WHOLE

pytest.importorskip("obstore")
moto: Any = pytest.importorskip("moto.server")
boto3: Any = pytest.importorskip("boto3")

SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    client.put_object(Bucket="models", Key="a/in.gguf", Body=WHOLE)
    yield client
    server.stop()


def test_a_model_in_a_bucket(bucket: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    fuse("s3://models/a/in.gguf", out, options=FAST)
    assert out.read_bytes() == FUSED
    assert SECRET.encode() not in FUSED
    assert verify("s3://models/a/in.gguf", out, VerifyOptions(structure_only=True)).ok


def test_an_object_that_is_replaced_meanwhile(bucket: Any, tmp_path: Path) -> None:
    def change(n_bytes: int) -> None:
        other = WHOLE[:-1] + b"\1"
        bucket.put_object(Bucket="models", Key="a/in.gguf", Body=other)

    options = FAST.__class__(sync=False, on_start=change)
    with pytest.raises(GGUFError, match=r"s3://models/a/in.gguf: .*changed while it was read"):
        fuse("s3://models/a/in.gguf", tmp_path / "out.gguf", options=options)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_broken_off_goes_on(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "FETCH_BYTES", 1 << 18)
    n_done = 0

    def stop(n_bytes: int) -> None:
        nonlocal n_done
        n_done += n_bytes
        if n_done > len(WHOLE) // 2:
            raise KeyboardInterrupt

    options = FAST.__class__(sync=False, on_progress=stop)
    with pytest.raises(KeyboardInterrupt, match=r"bytes are kept in .*\.part: the same command"):
        fuse("s3://models/a/in.gguf", tmp_path / "out.gguf", options=options)
    for path in tmp_path.iterdir():
        assert SECRET.encode() not in path.read_bytes()
    result = fuse("s3://models/a/in.gguf", tmp_path / "out.gguf", options=FAST)
    assert result.written.n_resumed > len(WHOLE) // 3
    assert (tmp_path / "out.gguf").read_bytes() == FUSED
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.parametrize("address", ["s3://models/absent.gguf", "s3://nowhere/in.gguf"])
def test_what_is_not_there(bucket: Any, address: str) -> None:
    with pytest.raises(GGUFError, match=r"no such object") as caught:
        inspect(address)
    assert str(caught.value).startswith(f"{address}: ")


def test_a_model_in_a_bucket_of_google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object is had there as from any server of ranges."""
    folder, keys = tmp_path / "there", tmp_path / "keys.json"
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "in.gguf").write_bytes(WHOLE)
    with serve(folder) as (address, files):
        account = dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
        keys.write_text(json.dumps({**account, "gcs_base_url": address, "disable_oauth": True}))
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(keys))
        fuse("gs://models/in.gguf", tmp_path / "out.gguf", options=FAST)
        assert (tmp_path / "out.gguf").read_bytes() == FUSED
        with pytest.raises(GGUFError, match=r"gs://models/absent.gguf: no such object"):
            inspect("gs://models/absent.gguf")
        files.faults["503"] = 2
        assert len(inspect("gs://models/in.gguf").layers) == 4
