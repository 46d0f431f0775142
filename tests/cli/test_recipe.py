"""recipe --run: with llama-quantize itself where there is one, and with a stand-in that may err."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from gguf import GGMLQuantizationType as T

from tests.compare import sha256
from tests.edit import tensors_in
from tests.planning.test_recipe import MIXES, WANT_MATRIX, of_mix
from tests.quantize import REAL, needs_llama_quantize, stand_in
from tests.server import Run, assert_one_line

Model = Callable[..., Path]

SMALL_BLOCKS = {"*": T.Q4_0, "blk.0.attn_v.weight": T.Q8_0}  # gguf-py makes and reads these


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@needs_llama_quantize
@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix not in WANT_MATRIX])
@pytest.mark.parametrize("way", ["raise", "lower"])
def test_llama_quantize_itself(model: Model, run: Run, tmp_path: Path, mix: str, way: str) -> None:
    path, output = of_mix(model, mix), tmp_path / "out.gguf"
    before = sha256(path)
    done = run("recipe", path, output, "--run", "--way", way, "--llama-quantize", REAL or "")
    assert done.code == 0, done.err
    assert "4 layers fused" in done.out
    assert sha256(path) == before
    shown = json.loads(run("inspect", output, "--json").out)
    assert {layer["status"] for layer in shown["layers"]} == {"fused"}


@pytest.fixture
def mixed(model: Model) -> Path:
    return model("mixed.gguf", types=SMALL_BLOCKS)


def test_run_changes_what_it_says_and_fuses(mixed: Path, run: Run, tmp_path: Path) -> None:
    before, output = sha256(mixed), tmp_path / "out.gguf"
    done = run("recipe", mixed, output, "--run", "--llama-quantize", stand_in(tmp_path), "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert (told["run"], told["result"]["layers_fused"]) == ("raise", 2)
    assert told["result"]["input"] == str(mixed)
    types = types_of(output)
    assert (types["blk.0.attn_qkv.weight"], types["blk.1.attn_qkv.weight"]) == ("Q8_0", "Q4_0")
    with tensors_in(mixed) as old, tensors_in(output) as new:
        rows = len(old["blk.0.attn_v.weight"])
        assert (new["blk.0.attn_qkv.weight"][-rows:] == old["blk.0.attn_v.weight"]).all()
    assert sha256(mixed) == before
    assert left_in(tmp_path) == {"mixed.gguf", "out.gguf"}


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"llama-quantize"}


def test_from_the_unquantized_model(model: Model, mixed: Path, run: Run, tmp_path: Path) -> None:
    f16, output = model("f16.gguf", types={"*": T.F16}), tmp_path / "out.gguf"
    words = ("--from", f16, "--way", "lower", "--llama-quantize", stand_in(tmp_path))
    done = run("recipe", mixed, output, "--run", *words)
    assert done.code == 0, done.err
    with tensors_in(f16) as old, tensors_in(output) as new:
        v = old["blk.0.attn_v.weight"]
        anew = gguf.quants.quantize(v.astype("f4"), T.Q4_0)
        assert (new["blk.0.attn_qkv.weight"][-len(v) :] == anew).all()


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (r"^output\.weight$=q8_0", "output.weight: Q8_0 [64, 320], not Q4_0 [64, 320]"),
        (r"attn_q\.weight=q4_0", "blk.0.attn_q.weight: Q4_0 [64, 64], not Q8_0 [64, 64]"),
    ],
)
def test_another_type_than_was_asked_for_is_found(
    mixed: Path, run: Run, tmp_path: Path, first: str, said: str
) -> None:
    program = stand_in(tmp_path, "--tensor-type", first)
    done = run("recipe", mixed, tmp_path / "out.gguf", "--run", "--llama-quantize", program)
    assert_one_line(done, "llama-quantize did not do as told", said, code=4)
    assert left_in(tmp_path) == {"mixed.gguf"}


def test_bytes_that_changed_elsewhere_are_found(mixed: Path, run: Run, tmp_path: Path) -> None:
    program = stand_in(tmp_path)
    spoil = "import sys; f = open(sys.argv[-2], 'r+b'); f.seek(-1, 2); f.write(b'!')"
    program.write_text(
        program.read_text().replace("exec ", "") + f'{sys.executable} -c "{spoil}" "$@"\n'
    )
    done = run("recipe", mixed, tmp_path / "out.gguf", "--run", "--llama-quantize", program)
    assert_one_line(done, "token_embd.weight differs in row", code=4)
    assert left_in(tmp_path) == {"mixed.gguf"}


def test_what_cannot_be_run(model: Model, mixed: Path, run: Run, tmp_path: Path) -> None:
    output, program = tmp_path / "out.gguf", tmp_path / "llama-quantize"
    words = ("recipe", mixed, output, "--run", "--llama-quantize", program)
    assert_one_line(run(*words), "llama-quantize: not found", "--llama-quantize FILE")
    program.write_text("#!/bin/sh\necho 'main: failed to quantize: no room' >&2\necho; exit 1\n")
    program.chmod(0o755)
    assert_one_line(run(*words), "llama-quantize failed: no room")
    wants_matrix = of_mix(model, "IQ2_XS")
    assert_one_line(run("recipe", wants_matrix, *words[2:]), "IQ2_XS", "give --imatrix FILE")
    output.write_bytes(b"mine")
    assert_one_line(run(*words), "exists already")
    assert_one_line(run("recipe", mixed, mixed, *words[3:], "-f"), "are the same file")
    assert output.read_bytes() == b"mine"
    assert left_in(tmp_path) == {"mixed.gguf", "out.gguf", "in.gguf"}
    assert run("recipe", mixed, "--run").code == 2


def test_interrupted_it_stops_llama_quantize_and_leaves_nothing(
    mixed: Path, tmp_path: Path
) -> None:
    program, started = tmp_path / "llama-quantize", tmp_path / "pid"
    program.write_text(
        f"#!/bin/sh\necho $$ > {started}.new\nmv {started}.new {started}\nexec sleep 60\n"
    )
    program.chmod(0o755)
    command = [sys.executable, "-m", "gguf_fuse", "recipe", mixed, tmp_path / "out.gguf", "--run"]
    process = subprocess.Popen([*command, "--llama-quantize", program], stderr=subprocess.PIPE)
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert process.stderr and b"interrupted" in process.stderr.read()
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert left_in(tmp_path) == {"mixed.gguf", "pid"}


def test_inspect_and_fuse_point_to_it(model: Model, mixed: Path, run: Run, tmp_path: Path) -> None:
    line = f"to fuse layers of mixed types too: gguf-fuse recipe {mixed}\n"
    assert line in run("inspect", mixed).out
    assert line in run("fuse", mixed, tmp_path / "out.gguf").out
    assert "gguf-fuse recipe" not in run("inspect", tmp_path / "out.gguf").out
    nothing = model(types={"*": T.Q4_0, "*attn_v.weight": T.Q8_0})
    refused = run("fuse", nothing, tmp_path / "none.gguf")
    assert_one_line(refused, "gguf-fuse recipe shows how", code=3)
