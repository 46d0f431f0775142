"""Faults in the numbers, without a look at the bytes: each check catches what it can see."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from gguf_fuse.cli.entry import app
from gguf_fuse.format.parser import read_header
from gguf_fuse.format.source import GGUFError
from gguf_fuse.verifying.numbers import compare_numbers
from gguf_fuse.verifying.trial import Checks, Trial
from tests.conftest import fused_copy, gguf_fuse
from tests.verifying.faults import (
    CHECKS,
    QUICK,
    Contents,
    Fault,
    change_a_k_norm,
    change_a_value,
    change_the_bias,
    change_the_scale,
    change_the_sinks,
    check,
    drop_the_bias,
    lose_a_row,
    record_another_version,
    record_the_first_layer_alone,
    swap_k_and_v,
    swap_two_heads,
    take_the_q_of_another_layer,
)

Model = Callable[..., Path]


def failed_checks(original: Path, fused: Path) -> set[str]:
    """Names of the checks of blk.1 that fail; blk.0 must be right. Without the record, which tells
    nothing of the weights."""
    contents = Contents.of(fused)
    contents.pairs = {k: v for k, v in contents.pairs.items() if not k.startswith("gguf_fuse.")}
    contents.write()
    headers = read_header(original), read_header(fused)
    right, wrong = compare_numbers(*headers, ["blk.0", "blk.1"], QUICK, n_blas=1)
    assert right.ok
    return {name for name, found in wrong.checks.items() if not found.ok}


@pytest.mark.parametrize(
    "fault",
    [
        swap_k_and_v,
        swap_two_heads,
        drop_the_bias,
        change_the_bias,
        take_the_q_of_another_layer,
        change_the_scale,
    ],
)
def test_numbers_alone_catch_wrong_weights(
    tampered: Callable[..., tuple[Path, Path]], fault: Fault
) -> None:
    assert failed_checks(*tampered(fault)) == CHECKS


@pytest.mark.parametrize(
    ("architecture", "fault"), [("gpt-oss", change_the_sinks), ("qwen3", change_a_k_norm)]
)
def test_numbers_alone_catch_wrong_attention(
    tampered: Callable[..., tuple[Path, Path]], architecture: str, fault: Fault
) -> None:
    found = failed_checks(*tampered(fault, architecture=architecture, scales="none"))
    assert found == CHECKS - {"projection"}


def test_numbers_alone_catch_other_metadata(
    tampered: Callable[..., tuple[Path, Path]],
) -> None:
    original, fused = tampered(change_a_value)
    found, _ = compare_numbers(
        read_header(original), read_header(fused), ["blk.0", "blk.1"], QUICK, n_blas=1
    )
    assert found.checks["projection"].ok
    assert not found.checks["prefill"].ok


@pytest.mark.parametrize(
    "fault", [lose_a_row, record_another_version, record_the_first_layer_alone, change_a_value]
)
def test_files_that_differ_in_more_than_data_are_not_computed(
    tampered: Callable[..., tuple[Path, Path]], fault: Fault
) -> None:
    report = check(*tampered(fault))
    assert not report.ok
    assert (report.layers, report.timing) == ((), None)


def test_a_mistake_of_our_own_is_not_the_fault_of_a_file(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(self: Trial) -> Checks:
        raise ValueError("shapes do not fit")

    monkeypatch.setattr(Trial, "checks", mistaken)
    with pytest.raises(ValueError, match="shapes do not fit"):
        check(*pair)
    done = CliRunner().invoke(app, ["verify", *map(str, pair)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert re.fullmatch(
        r"gguf-fuse: internal error, please report it: ValueError: shapes do not fit "
        r"\(test_numbers\.py, line \d+\)\n",
        done.stderr,
    )


# -- files that are not any more what was compared -----------------------------------------------


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(32))


def cut(path: Path) -> None:
    os.truncate(path, 100)


def replace_it(path: Path) -> None:
    copy = shutil.copy(path, path.with_name("copy.gguf"))
    Path(copy).replace(path)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("change", [grow, cut, Path.unlink, replace_it])
@pytest.mark.parametrize("when", ["before the first layer", "after the last"])
def test_a_file_that_changes_while_numbers_are_computed(
    model: Model, which: int, change: Callable[[Path], None], when: str
) -> None:
    """The bytes were compared and are equal, but nobody knows what the file is now."""
    original = model(n_layer=1)
    files = original, fused_copy(original)
    stages: list[str] = []

    def on_start(stage: str, total: int) -> None:
        stages.append(stage)
        if (stage, when) == ("computing", "before the first layer"):
            change(files[which])

    def on_progress(n: int) -> None:
        if (stages[-1], when) == ("computing", "after the last"):
            change(files[which])

    with pytest.raises(GGUFError, match=re.escape(f"{files[which]}: ")):
        check(*files, on_start=on_start, on_progress=on_progress)
    assert stages == ["comparing", "computing"]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_progress_is_of_all_bytes_and_then_of_all_layers(model: Model, threads: int) -> None:
    """Though both go on at the same time."""
    original = model(n_layer=3)
    told: list[tuple[str, int]] = []
    done: list[int] = []

    def on_start(what: str, total: int) -> None:
        told.append((what, total))
        done.append(0)

    def on_progress(n: int) -> None:
        done[-1] += n

    own = {"threads": threads, "on_start": on_start, "on_progress": on_progress}
    report = check(original, fused_copy(original), **own)
    assert told == [("comparing", report.structure.n_bytes), ("computing", 3)]
    assert done == [report.structure.n_bytes, 3]


def scaled(path: Path, part: str, factor: float) -> Path:
    contents = Contents.of(path)
    ne, tensor_type, data = contents.tensors[f"blk.1.{part}.weight"]
    values = np.frombuffer(data, np.float32).copy()
    values[:64] *= np.float32(factor)  # one row of 64
    contents.tensors[f"blk.1.{part}.weight"] = (ne, tensor_type, values.tobytes())
    return contents.write()


@pytest.mark.parametrize(
    ("factor", "left"),
    [(np.nan, set()), (np.inf, set()), (1e8, {"projection"}), (1e30, {"projection"})],
)
@pytest.mark.parametrize("part", ["attn_q", "attn_k"])
def test_what_float32_cannot_tell_is_not_checked(
    model: Model, part: str, factor: float, left: set[str]
) -> None:
    """A limit of nan, infinity or a hundred would let everything through, and look like a check."""
    original = scaled(model(), part, factor)
    fused = fused_copy(original)
    report = check(original, fused, n_kv=600)
    assert report.ok
    sound, other = report.layers
    assert (set(sound.checks), sound.note) == (CHECKS, None)
    assert set(other.checks) == left
    assert (other.note or "").endswith("not finite, or too large for float32")
    shown = gguf_fuse("verify", original, fused)
    assert "attention computed PARTLY, in 1 of 2 layers" in shown.stdout
    assert shown.stderr == ""


@pytest.mark.parametrize("columns", [45, 120])
def test_a_weight_that_is_not_finite_in_the_fused_file_fails(model: Model, columns: int) -> None:
    original = model()
    fused = scaled(fused_copy(original), "attn_qkv", np.nan)
    report = check(original, fused)
    assert [layer.ok for layer in report.layers] == [True, False]
    shown = gguf_fuse(
        "verify", original, fused, "--verbose", env={**os.environ, "COLUMNS": str(columns)}
    )
    assert shown.returncode == 4
    assert re.search(r"^blk\.1 .* nan .*over$", shown.stdout, re.MULTILINE)
    printed = json.loads(gguf_fuse("verify", original, fused, "--json").stdout)
    assert printed["layers"][1]["checks"]["projection"]["error"] is None


@pytest.mark.parametrize("seed", range(5))
def test_limits_leave_room_for_other_seeds(pair: tuple[Path, Path], seed: int) -> None:
    assert check(*pair, seed=seed, n_kv=600).ok
