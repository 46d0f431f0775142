"""Any call of the system may fail, and a signal may come with any: what is said then is so."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest

from tests.writing.harness import Harness, harness

NAMES = [
    "fuse",
    "unfuse",
    "fuse --force",
    "fuse, no links",
    "merge",
    "shards",
    "shards --force",
    "stdout",
]
NAMES += ["adapter --base", "manifest", "manifest --force", "manifest of stdout"]


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    with harness(tmp_path_factory.mktemp("harness")) as tried:
        yield tried


@pytest.fixture
def count(
    tried: Harness, record_property: Callable[[str, object], None]
) -> Iterator[Callable[[str], None]]:
    """Tell how many runs there were, at the end of pytest's output."""
    before = tried.n_runs
    yield lambda what: record_property("harness", f"{what}: {tried.n_runs - before} runs")


@pytest.mark.parametrize("name", NAMES)
def test_a_call_fails(name: str, tried: Harness, count: Callable[[str], None]) -> None:
    tried.fail(name, most=72)
    count(f"failing calls, {name}")


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_comes(name: str, tried: Harness, count: Callable[[str], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        tried.stop(name, number, most=18)
    count(f"signals, {name}")


@pytest.mark.parametrize(
    "name",
    ["fuse", "fuse --force", "shards", "shards --force", "manifest", "manifest --force"],
)
def test_killed(name: str, tried: Harness, count: Callable[[str], None]) -> None:
    tried.kill(name, most=18)
    count(f"kills, {name}")
