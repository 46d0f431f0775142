"""The command: its options, what it prints, exit codes, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from gguf import GGMLQuantizationType as T
from typer.testing import CliRunner

from gguf_fuse.cli.entry import app
from gguf_fuse.format.source import GGUFError
from gguf_fuse.format.values import ValueType
from gguf_fuse.measuring.gain import Word
from gguf_fuse.verifying.report import Choice, Report, VerifyOptions
from tests.conftest import fused_copy, gguf_fuse
from tests.models.random_model import ModelSpec, spec_of_size, write_random_model
from tests.verifying.faults import CHECKS, Contents, problems, swap_k_and_v

Model = Callable[..., Path]


def test_json_is_as_documented(pair: tuple[Path, Path]) -> None:
    run = gguf_fuse("verify", *pair, "--json")
    assert (run.returncode, run.stderr) == (0, "")
    value = json.loads(run.stdout)
    assert set(value) == {
        *("format", "command", "exit_code", "error"),
        *("ok", "original", "fused", "exchanged", "structure", "layers", "timing"),
        *("tensors_in", "tensors_out", "bytes_compared", "layers_fused", "layers_fused_experts"),
        *("llama", "layers_split_ssm_in"),
    }
    assert value["ok"] is True
    assert (value["original"], value["fused"]) == tuple(map(str, pair))
    assert (value["tensors_in"] - value["tensors_out"], value["layers_fused"]) == (8, 2)
    assert value["structure"] == {"ok": True, "problems": [], "notes": []}
    for layer, name in zip(value["layers"], ("blk.0", "blk.1"), strict=True):
        assert set(layer) == {"layer", "ok", "checks"}
        assert (layer["layer"], layer["ok"], set(layer["checks"])) == (name, True, CHECKS)
        for found in layer["checks"].values():
            assert set(found) == {"error", "limit", "ok"}
            assert 0 <= found["error"] <= found["limit"] < 1e-4
    assert {"separate_ms", "fused_ms", "expand_ms", "broadcast_ms", "split_ms"} <= set(
        value["timing"]
    )
    assert value["timing"]["fused_is"] in get_args(Word)


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ([], {}),
        (["--n-prompt", "7"], {"n_prompt": 7}),
        (["--n-decode", "7"], {"n_decode": 7}),
        (["--n-seqs", "7"], {"n_seqs": 7}),
        (["--n-kv", "7"], {"n_kv": 7}),
        (["--threads", "7"], {"threads": 7}),
        (["--seed", "7"], {"seed": 7}),
        (["--layers", "1"], {"layers": Choice(frozenset({1}))}),
        (["--structure-only"], {"structure_only": True}),
    ],
)
def test_options_reach_verify(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], changes: dict[str, Any]
) -> None:
    got: list[VerifyOptions] = []

    def stop(original: Path, fused: Path, options: VerifyOptions) -> Report:
        got.append(options)
        raise GGUFError("seen enough")

    monkeypatch.setattr("gguf_fuse.verifying.verify.verify", stop)
    CliRunner().invoke(app, ["verify", "-q", "a.gguf", "b.gguf", *arguments])
    (options,) = got
    own = VerifyOptions(timed=False, on_start=options.on_start, on_progress=options.on_progress)
    assert options == replace(own, **changes)


def test_structure_only_computes_nothing(pair: tuple[Path, Path]) -> None:
    value = json.loads(gguf_fuse("verify", *pair, "--json", "--structure-only").stdout)
    assert value["ok"] is True
    assert value["layers"] == []


@pytest.mark.parametrize("arguments", [[], ["--json"], ["-q"], ["--structure-only"]])
def test_a_fault_ends_with_exit_4(
    tampered: Callable[..., tuple[Path, Path]], arguments: list[str]
) -> None:
    run = gguf_fuse("verify", *tampered(swap_k_and_v), *arguments)
    assert run.returncode == 4
    (line,) = run.stderr.splitlines()
    assert "verification failed: blk.1.attn_qkv.weight: attn_k differs in row 0" in line
    if arguments == []:
        assert "blk.1: decode_split: error" in run.stdout
        assert ", limit " in run.stdout
        assert "Identical" not in run.stdout
    if arguments == ["-q"]:
        assert run.stdout == ""


def test_of_many_problems_twenty_are_shown(model: Model) -> None:
    original = model(n_layer=4)
    other = fused_copy(original)
    contents = Contents.of(other)
    for number in range(23):
        contents.pair(f"key.{number}", ValueType.UINT32, number)
    contents.write()
    n_more = len(problems(original, other)) - 20
    assert n_more == 3
    wide = {**os.environ, "COLUMNS": "200"}
    done = gguf_fuse("verify", original, other, "--structure-only", env=wide)
    shown = done.stdout.splitlines()
    assert len(shown) == 21
    assert shown[0] == "metadata key.0: only in the fused file"
    assert shown[-1] == "and 3 more (--json has all)"
    assert done.stderr.endswith(f"only in the fused file (and 22 more); do not use {other}\n")


def test_files_that_cannot_be_read_end_with_exit_1(pair: tuple[Path, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(pair[1].read_bytes()[:-100])
    for second in (bad, tmp_path / "absent.gguf"):
        run = gguf_fuse("verify", pair[0], second)
        assert run.returncode == 1
        assert len(run.stderr.splitlines()) == 1


def test_exit_codes_of_wrong_layers(pair: tuple[Path, Path]) -> None:
    assert gguf_fuse("verify", *pair, "--layers", "3-1").returncode == 2
    run = gguf_fuse("verify", *pair, "--layers", "0,7")
    assert run.returncode == 1
    assert "no attention layer 7" in run.stderr


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    original = tmp_path_factory.mktemp("large") / "in.gguf"
    spec = ModelSpec(types={"*": T.F16}, n_vocab=1000)
    write_random_model(original, spec_of_size(spec, 300_000_000))
    fused = fused_copy(original)
    yield original, fused
    original.unlink()
    fused.unlink()


def peak(*arguments: str | Path) -> int:
    """Bytes of memory that `gguf-fuse verify` takes at most. Not ru_maxrss: it lives through exec,
    so that the peak of the process that runs the tests would count."""
    script = (
        "import sys\n"
        "from gguf_fuse.cli import main\n"
        "try: main()\n"
        "finally: print(*(l for l in open('/proc/self/status') if 'VmHWM' in l), file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, "verify", "-q", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return int(run.stderr.split()[-2]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_file(large: tuple[Path, Path]) -> None:
    """Python with numpy takes some 50 MB; the files are 300 MB each, a layer's weights 12 MB."""
    assert peak(*large, "--structure-only") < 100e6
    few = ("--n-kv", "300", "--n-prompt", "8", "--threads", "2")
    one = peak(*large, "--layers", "0", *few)
    assert one < 150e6
    assert peak(*large, "--layers", "all", *few) < one + 30e6
