"""Commands whose n-th call fails, or comes with a signal; and what must be so after each of them.

The calls are those of libc (`failing_calls.c`, loaded before it), the files are real ones. Each
run is a process forked by `tests.server`, so that thousands of them take seconds.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import pack
from tests.server import Outcome, Run, serve
from tests.shards import in_three

FACTOR = float(os.environ.get("GGUF_FUSE_HARNESS", "1"))  # how much more than usual is tried
SEED = 0

TEMPORARY_NAME = re.compile(r".+\.gguf-fuse-[0-9a-f]{8}\.tmp")  # as README tells them

_ARM = "import ctypes; ctypes.CDLL(None).harness_arm({}, {}, {}, {}, {:d}, {!r}.encode())"

Files = dict[str, str]  # the hash of each, by name


def _models(files: Files) -> Files:
    """Without the manifest, which may be there before what it tells of."""
    return {name: hash for name, hash in files.items() if not name.startswith("out.gguf.")}


def contents(folder: Path) -> Files:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@dataclass
class Scenario:
    """A command; OUT and what was there before it are in a folder of their own.

    old: files of that folder, before. no_links: on a file system that has neither second names nor
    a rename that replaces nothing. The folder's files after a run that nothing stopped are
    found by one.
    """

    arguments: Sequence[str | Path]
    folder: Path
    old: dict[str, bytes] = field(default_factory=dict)
    no_links: bool = False
    calls: list[str] = field(default_factory=list)
    before: Files = field(default_factory=dict)
    after: Files = field(default_factory=dict)
    out: bytes = b""

    def prepare(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for name, data in self.old.items():
            (self.folder / name).write_bytes(data)


class Harness:
    """What it needs of a folder, a server, and the inputs, which are compared after each run."""

    def __init__(self, run: Run, folder: Path, inputs: Sequence[Path]) -> None:
        self.run, self.folder, self.n_runs = run, folder, 0
        model, fused, lora, first = inputs
        self.inputs = model.parent
        self.untouched = contents(self.inputs)
        out = folder / "out"
        one, set_of_3 = out / "out.gguf", out / "out-00001-of-00003.gguf"
        old = {"out.gguf": b"precious", "other": b"of someone else"}
        told = ("--manifest", out / "out.gguf.json")
        old_told = {**old, "out.gguf.json": b"old manifest", "out.gguf.sha256": b"old sums"}
        old_set = {set_of_3.name.replace("00001-", f"0000{n}-"): b"old %d" % n for n in (1, 2, 3)}
        self.scenarios = {
            name: Scenario([command, *arguments], out, before, "no links" in name)
            for name, command, before, *arguments in (
                ("fuse", "fuse", {}, model, one),
                ("unfuse", "unfuse", {}, fused, one),
                ("fuse --force", "fuse", old, model, one, "--force"),
                ("fuse, no links", "fuse", {}, model, one),
                ("merge", "fuse", {}, first, one),
                ("shards", "fuse", {}, first, set_of_3),
                ("shards --force", "fuse", old_set, first, set_of_3, "--force"),
                ("stdout", "fuse", {}, model, "-"),
                ("adapter --base", "fuse", {}, lora, one, "--base", model),
                ("manifest", "fuse", {}, model, one, *told),
                ("manifest --force", "fuse", old_told, model, one, "--force", *told),
                ("manifest of stdout", "fuse", {}, model, "-", *told),
            )
        }
        for name, scenario in self.scenarios.items():
            outcome = self._run(scenario, 0)
            assert outcome.code == 0, (name, outcome)
            scenario.before = {
                name: hashlib.sha256(data).hexdigest() for name, data in scenario.old.items()
            }
            scenario.after, scenario.out = contents(out), _bytes(outcome)
            scenario.calls = (folder / "log").read_text().splitlines()
            assert len(scenario.calls) > 20, (name, scenario.calls)

    def _run(
        self, scenario: Scenario, at: int, variant: int = 0, sticky: int = 0, number: int = 0
    ) -> Outcome:
        scenario.prepare()
        log = str(self.folder / "log")
        arm = _ARM.format(at, variant, sticky, number, scenario.no_links, log)
        return self.run(*scenario.arguments, prelude=arm)

    def fail(self, name: str, most: int) -> int:
        """Each call fails, with one of two errors, alone or with all of its kind after it.

        At most so many of these are tried, by chance.
        """
        scenario = self.scenarios[name]
        places = range(1, len(scenario.calls) + 1)
        cases = [(at, v, s) for at in places for v in (0, 1) for s in (0, 1)]
        for at, variant, sticky in _chosen(cases, most):
            outcome = self._run(scenario, at, variant, sticky)
            what = f"{name}: call {at} ({scenario.calls[at - 1]}), error {variant}, sticky {sticky}"
            assert outcome.code in (0, 1), (what, outcome)
            call = scenario.calls[at - 1]
            heard = call != "write 2" and not (sticky and call.startswith("write"))
            self._check(scenario, outcome, what, heard)
        return self.n_runs

    def stop(self, name: str, number: int, most: int) -> int:
        """The signal comes with one of the calls."""
        scenario = self.scenarios[name]
        for at in _chosen(range(1, len(scenario.calls) + 1), most):
            outcome = self._run(scenario, at, number=number)
            what = f"{name}: signal {number} at call {at} ({scenario.calls[at - 1]})"
            assert outcome.code in (0, 128 + number), (what, outcome)
            self._check(scenario, outcome, what, heard=True)
        return self.n_runs

    def kill(self, name: str, most: int) -> int:
        """SIGKILL cannot be caught: only the order of the steps protects what is there.

        A set is loaded by its first shard: where that is, all of them are of one kind. The next
        run finds what is left in its way, and does not mind.
        """
        scenario = self.scenarios[name]
        for at in _chosen(range(1, len(scenario.calls) + 1), most):
            outcome = self._run(scenario, at, number=signal.SIGKILL)
            context = f"{name}: killed at call {at} ({scenario.calls[at - 1]})", outcome
            assert outcome.code == -signal.SIGKILL, context
            assert contents(self.inputs) == self.untouched, context
            now = contents(scenario.folder)
            stray = {name for name in now if name not in scenario.after}
            assert all(TEMPORARY_NAME.fullmatch(name) for name in stray), context
            files = {name: hash for name, hash in now.items() if name not in stray}
            if min(scenario.after) in files:
                was, will = map(_models, (scenario.before, scenario.after))
                assert _models(files) in (was, will), (*context, now)
                assert _models(files) != will or files == scenario.after, (*context, now)
            if files != scenario.after:  # what was there is lost by no kill
                assert set(scenario.before.values()) <= set(now.values()), (*context, now)
            again = self.run(*scenario.arguments, *([] if scenario.old else ["--force"]))
            assert again.code == 0, (context, again)
            assert scenario.after.items() <= contents(scenario.folder).items(), context
            self.n_runs += 1
        return self.n_runs

    def _check(self, scenario: Scenario, outcome: Outcome, what: str, heard: bool) -> None:
        self.n_runs += 1
        err, context = outcome.err, (what, outcome)
        now = contents(scenario.folder)
        assert contents(self.inputs) == self.untouched, context
        assert "Traceback" not in err and "Exception ignored" not in err, context
        stray = {name for name in now if name.endswith(".tmp")}
        named = {name for name in stray if name in err}
        files = {name: hash for name, hash in now.items() if name not in stray}
        if outcome.code == 0:
            assert files == scenario.after and not stray, context
            assert "-" not in scenario.arguments or _bytes(outcome) == scenario.out, context
            return
        assert stray == named, (*context, stray)
        if "could not be undone" in err:
            assert stray or [name for name in set(now) - set(scenario.before) if name in err]
        else:
            assert files in (scenario.before, scenario.after), (*context, now)
        if not heard:
            return
        assert err.splitlines()[-1].startswith("gguf-fuse: "), context
        if "-" in scenario.arguments:  # the table may stand before that line
            self._check_stdout(scenario, outcome, context)
            return
        assert err.count("\n") == 1, context
        if files == scenario.after:
            assert "there and whole" in err, context
        assert "nothing was written" not in err or files == scenario.before, context
        assert "there and whole" not in err or files == scenario.after, context

    def _check_stdout(self, scenario: Scenario, outcome: Outcome, context: object) -> None:
        went = _bytes(outcome)
        assert scenario.out.startswith(went), context
        if "all of it was written" in outcome.err:
            assert went == scenario.out, context
        elif went:
            _, _, rest = outcome.err.partition("at least ")
            assert int(rest.split()[0]) <= len(went), context


def _bytes(outcome: Outcome) -> bytes:
    return outcome.out.encode(errors="surrogateescape")


def _chosen(cases: Sequence[object], most: int) -> Sequence[object]:
    most = int(most * FACTOR)
    return cases if len(cases) <= most else random.Random(SEED).sample(cases, most)


@contextmanager
def harness(folder: Path) -> Iterator[Harness]:
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("needs Linux and a C compiler")
    library = folder / "failing_calls.so"
    source = Path(__file__).with_name("failing_calls.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    served, inputs = folder / "served", folder / "inputs"
    served.mkdir()
    inputs.mkdir()
    model = pack.save(pack.valid(), inputs / "in.gguf")
    fused = pack.save(pack.fused(pack.valid()), inputs / "fused.gguf")
    lora = pack.save(pack.lora(), inputs / "lora.gguf")
    warm = [["fuse", str(lora), str(served / "lora.gguf"), "--base", str(model)]]
    with serve(served, warm, LD_PRELOAD=str(library)) as run:
        yield Harness(run, folder, (model, fused, lora, in_three(model)[0]))
