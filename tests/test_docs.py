"""The README is true: its commands run, its numbers and its output are what the code says.

Of its two scripts, test.sh runs these tests, and .ci/run runs demo.sh.
"""

from __future__ import annotations

import ast
import json
import os
import pydoc
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as T

import gguf_fuse
from gguf_fuse.cli.demo_model import write_demo_model
from gguf_fuse.planning.loaders import ARCHITECTURES, Loader
from tests.models.architectures import LAYOUTS
from tests.quantize import stand_in

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def block(name: str) -> list[str]:
    found = re.search(rf"<!-- {name}.*?-->\n```\n(.*?)```", README, re.DOTALL)
    assert found
    return found[1].splitlines()


# The command; of bench only the first rows, for it is not about how long anything takes.
COMMAND = f"""#!{sys.executable}
import sys
if "bench" in sys.argv:
    from gguf_fuse.measuring import bench
    bench.FULL = bench.Extent(bench.FULL.n_tokens[:1], bench.FULL.n_kv[:1], 0.0, 0.0)
from gguf_fuse.cli import main
main()
"""


def test_commands(tmp_path: Path) -> None:
    write_demo_model(tmp_path / "in.gguf")
    (tmp_path / "gguf-fuse").write_text(COMMAND)
    (tmp_path / "gguf-fuse").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    for line in block("commands"):
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    for name in ("back.gguf", "demo-files/model-back.gguf"):
        assert (tmp_path / name).stat().st_size == (tmp_path / "in.gguf").stat().st_size
    assert (tmp_path / "back.gguf").read_bytes() == (tmp_path / "in.gguf").read_bytes()
    assert (tmp_path / "piped.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


def test_python(tmp_path: Path) -> None:
    write_demo_model(tmp_path / "in.gguf")
    found = re.search(r"<!-- python.*?-->\n```python\n(.*?)```", README, re.DOTALL)
    assert found
    done = subprocess.run(
        [sys.executable, "-c", found[1]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("6 layers fused")
    assert (tmp_path / "back.gguf").read_bytes() == (tmp_path / "in.gguf").read_bytes()


def test_python_for_type_checkers() -> None:
    found = re.search(r"<!-- python.*?-->\n```python\n(.*?)```", README, re.DOTALL)
    assert found
    # As a user has it, without the settings of this project.
    options = ["--strict", "--config-file=", "--cache-dir=.mypy_cache/readme"]
    checker = [sys.executable, "-m", "mypy", *options, "-c", found[1]]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(checker, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_json(tmp_path: Path) -> None:
    write_demo_model(tmp_path / "in.gguf")
    command = [sys.executable, "-m", "gguf_fuse", "fuse", "in.gguf", "out.gguf", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    said, shown = json.loads(done.stdout), json.loads("\n".join(block("json")))
    assert list(said) == list(shown)
    # They depend on the file system: where it shares blocks, these are not copied.
    for answer in (said, shown):
        answer["seconds"] = 0
        answer["bytes_out"] = answer["bytes_copied"] = answer["bytes_cloned"] = 0
    assert said | {"layers": said["layers"][:1]} == shown


def test_every_public_name_is_there() -> None:
    for name in gguf_fuse.__all__:
        assert getattr(gguf_fuse, name) is not None
    shown = [name for name in dir(gguf_fuse) if not name.startswith("_")]
    assert shown == sorted(gguf_fuse.__all__)
    explained = pydoc.plain(pydoc.render_doc(gguf_fuse))
    for name in gguf_fuse.__all__:
        assert re.search(rf"^    (class )?{name}\b", explained, re.MULTILINE), name
    with pytest.raises(AttributeError, match="no attribute 'fuze'"):
        gguf_fuse.fuze  # noqa: B018


def test_type_checkers_see_every_public_name_where_it_lives() -> None:
    tree = ast.parse(Path(gguf_fuse.__file__).read_text())
    seen = {
        imported.name: (node.module, imported.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and "gguf_fuse" in node.module
        for imported in node.names
    }
    assert set(gguf_fuse.__all__) == set(seen)
    assert seen == {
        name: (f"gguf_fuse.{module}", name) for name, module in gguf_fuse._MODULES.items()
    }


def test_the_import_costs_nothing() -> None:
    script = "import sys, gguf_fuse; print(*(n for n in sys.modules if n.startswith('gguf_fuse')))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "gguf_fuse\n"


def test_numbers_of_architectures() -> None:
    measured = [row for row in ARCHITECTURES.values() if row.qkv.proof == "measured"]
    n_fused = sum(row.qkv.loader is Loader.READS_FUSED for row in measured)
    assert f"For {n_fused}\narchitectures the fused file was loaded" in README
    assert len(LAYOUTS) >= 50


def test_gains_are_those_of_the_samples() -> None:
    script = str(ROOT / "scripts" / "gpu_gains.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    table = done.stdout.split("\n\n")[0]
    assert len(table.splitlines()) > 8
    assert table in README


def masked(line: str) -> str:
    """Without what differs from run to run: times, speeds, errors, folders, spaces at the end."""
    names = re.sub(r"\S*/(?=model)", "", line)
    return re.sub(r"[\d.]+ s\b|\([\d.]+ \wB/s\)|\d\.\de-\d\d", "#", names).rstrip()


def test_output_of_the_demo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gguf_fuse", "demo"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "the files are removed again" in done.stdout
    assert list(tmp_path.iterdir()) == []
    printed = [masked(line) for line in done.stdout.splitlines()]
    for line in block("demo"):
        assert masked(line) in printed


@pytest.mark.parametrize("script", ["demo.sh", "test.sh", "convert_and_fuse.sh"])
def test_scripts_are_sound(script: str) -> None:
    path = ROOT / "scripts" / script
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "set -euo pipefail" in path.read_text()


def pipeline(folder: Path, model: Path, quantize: str) -> None:
    """Run convert_and_fuse.sh; conversion only copies the model. quantize: lines of a script."""
    tools = folder / "llama.cpp" / "build" / "bin"
    tools.mkdir(parents=True)
    source = shlex.quote(str(model))
    convert = (
        f"import shutil, sys; shutil.copy({source!r}, sys.argv[sys.argv.index('--outfile') + 1])"
    )
    (folder / "llama.cpp" / "convert_hf_to_gguf.py").write_text(convert)
    (tools / "llama-quantize").write_text(f"#!/bin/sh\n{quantize}\n")
    (tools / "gguf-fuse").write_text(f'#!/bin/sh\nexec {sys.executable} -m gguf_fuse "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    done = subprocess.run(
        [ROOT / "scripts" / "convert_and_fuse.sh", "folder", folder / "out.gguf", "Q4_K"],
        env={**os.environ, "LLAMA_CPP": str(folder / "llama.cpp")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not list(folder.glob("convert-and-fuse*"))


def test_pipeline_with_stand_ins_for_llama_cpp(tmp_path: Path) -> None:
    write_demo_model(tmp_path / "model.gguf")
    pipeline(tmp_path, tmp_path / "model.gguf", 'cp "$1" "$2"')


def test_pipeline_where_the_mix_leaves_nothing_to_fuse(
    model: Callable[..., Path], tmp_path: Path
) -> None:
    mixed = model("mixed.gguf", types={"*": T.Q4_0, "*attn_v.weight": T.Q8_0})
    again = f'[ $# -gt 3 ] && exec {stand_in(tmp_path)} "$@"'
    pipeline(tmp_path, model("f16.gguf", types={"*": T.F16}), f'{again}\ncp {mixed} "$2"')
    layers = gguf_fuse.inspect(tmp_path / "out.gguf").layers
    assert [layer.types for layer in layers] == [("Q8_0",), ("Q8_0",)]


def test_small_runs_of_the_benchmarks(tmp_path: Path) -> None:
    for name, *arguments in (
        ["bench_copy.py", "--size", "5M", "--rounds", "1", "--cp-only", "--json"],
        ["bench_header.py", "--rounds", "1", "--vocab", "2000", "--json"],
        ["bench_stall.py", "--rounds", "1", "--size", "3M"],
    ):
        script = str(ROOT / "scripts" / name)
        command = [sys.executable, script, *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
