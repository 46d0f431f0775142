"""The picture of a benchmark, and what stands in its way."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from gguf_fuse.format.source import GGUFError
from gguf_fuse.measuring import bench as benchmark
from gguf_fuse.measuring.plot import check_plot, plot
from tests.measuring.conftest import run_bench, some_result

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


def test_plot_without_matplotlib_is_one_line(
    short: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name)
    )
    outcome = run_bench("--plot", tmp_path / "decode.png")
    assert outcome.exit_code == 1
    assert outcome.stderr.count("\n") == 1
    assert "gguf-fuse[plot]" in outcome.stderr
    assert outcome.stdout == ""


@pytest.mark.parametrize("name", ["decode.jpg", "decode", "absent/decode.png"])
def test_plots_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"must end in|does not exist"):
        check_plot(tmp_path / name)


def test_a_plot_with_too_long_a_name_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 300)
    outcome = run_bench("--plot", folder / "decode.png")
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert outcome.stderr == f"gguf-fuse: {folder}: File name too long\n"


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib")
def test_plot_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(GGUFError, match=r"a\.png: is a folder; --plot wants the name of a file"):
        plot(some_result(), tmp_path / "a.png")


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib")
def test_nothing_to_plot(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"a\.png: nothing to draw"):
        plot(replace(some_result(), decode=()), tmp_path / "a.png")


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib")
def test_a_plot_that_cannot_be_written_loses_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "bench", lambda *arguments, **named: some_result())
    outcome = run_bench("--plot", "/proc/self/a.png")
    assert outcome.exit_code == 1
    assert "1024" in outcome.stdout


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib")
@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml")])
def test_plot_draws_a_file(tmp_path: Path, name: str, magic: bytes) -> None:
    plot(some_result(), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(magic)


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib")
def test_the_command_draws_all_curves(
    short: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from matplotlib.axes import Axes

    result, curves = some_result(), list[tuple[list[float], list[float]]]()
    draw = Axes.plot

    def spy(axes: Axes, x: Any, y: Any, *arguments: Any, **named: Any) -> Any:
        curves.append((x, y))
        return draw(axes, x, y, *arguments, **named)

    monkeypatch.setattr(Axes, "plot", spy)
    monkeypatch.setattr(benchmark, "bench", lambda *arguments, **named: result)
    assert run_bench("-q", "--plot", tmp_path / "a.svg").exit_code == 0
    columns = zip(*(asdict(row).values() for row in result.decode), strict=True)
    n_kv, *times = map(list, columns)
    assert curves == [(n_kv, column) for column in times]
    drawn = (tmp_path / "a.svg").read_text()
    for label in (
        "K and V expanded to all heads",
        "broadcast",
        "split over KV",
        "merely read once",
    ):
        assert f"{label} -->" in drawn  # a text is drawn as curves, with itself as a comment
