"""The picture of a benchmark, and what stands in its way."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from gguf_fuse.format.source import GGUFError
from gguf_fuse.measuring import bench as benchmark
from gguf_fuse.measuring.plot import LINE, apart, check_plot, plot
from tests.measuring.conftest import row, run_bench, timed

ROWS = list(timed().decode())
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
        plot(timed(), ROWS, tmp_path / "a.png")


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib")
def test_nothing_to_plot(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"a\.png: nothing to draw"):
        plot(timed(), [], tmp_path / "a.png")


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib")
def test_a_plot_that_cannot_be_written_loses_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "prepare", lambda *arguments, **named: timed())
    outcome = run_bench("--plot", "/proc/self/a.png")
    assert outcome.exit_code == 1
    assert "1024" in outcome.stdout


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib")
@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml")])
def test_plot_draws_a_file(tmp_path: Path, name: str, magic: bytes) -> None:
    plot(timed(), ROWS, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(magic)


def words(picture: Path) -> list[str]:
    """What stands in an SVG, as text."""
    texts = ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")
    return [each.text or "" for each in texts]


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib")
def test_the_command_draws_all_curves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.axes import Axes

    curves, draw = list[tuple[list[float], list[float]]](), Axes.plot

    def spy(axes: Axes, x: Any, y: Any, *arguments: Any, **named: Any) -> Any:
        curves.append((x, y))
        return draw(axes, x, y, *arguments, **named)

    monkeypatch.setattr(Axes, "plot", spy)
    monkeypatch.setattr(benchmark, "prepare", lambda *arguments, **named: timed())
    assert run_bench("-q", "--plot", tmp_path / "a.svg").exit_code == 0
    n_kv = [512, 1024]
    assert curves == [(n_kv, [factor * n for n in n_kv]) for factor in (8.0, 2.0, 1.0, 0.5)]
    shown = words(tmp_path / "a.svg")
    for label in ("K and V expanded", "broadcast", "split over KV", "K and V merely read"):
        assert label in shown
    for tick in ("512", "1k", "100 ms", "10000 ms"):
        assert tick in shown
    assert "medians of 9 rounds in turn, with their middle half" in shown
    assert any("32 heads, 8 KV heads, 128 wide" in each and "threads: 2" in each for each in shown)


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib")
@pytest.mark.parametrize("stream", [[0.8, 1.0, 1.2] * 3, [2.1] * 9])
def test_a_floor_in_doubt_is_marked(stream: list[float], tmp_path: Path) -> None:
    noisy = row(2048, expand=8.0, broadcast=3.0, split=2.0, stream=1.0)
    noisy.ms["stream"] = stream
    plot(timed(), [*ROWS, noisy], tmp_path / "a.svg")
    shown = words(tmp_path / "a.svg")
    assert {"1k", "2k*"} <= set(shown)
    assert any("reading was noisy" in each for each in shown)


def test_labels_do_not_overlap() -> None:
    moved = apart([0.5, 0.1, 0.51, 0.11])
    assert moved == pytest.approx([0.5, 0.1, 0.5 + LINE, 0.1 + LINE])
