"""The program as a whole: help, version, completion, the bare form, signals, encodings."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gguf_fuse import __version__
from gguf_fuse.cli.commands import COMMANDS as LISTED
from tests.conftest import fused_copy, gguf_fuse

Model = Callable[..., Path]

COMMANDS = ["fuse", "unfuse", "inspect", "recipe", "verify", "bench", "compare", "batch", "demo"]
COMMANDS += ["help"]


def test_help_names_the_main_job_and_every_command() -> None:
    shown = gguf_fuse("--help").stdout
    assert "gguf-fuse --fuse-qkv-weights in.gguf out.gguf" in shown
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", shown, re.MULTILINE)
    assert "Exit codes" in shown


@pytest.mark.parametrize("columns", [50, 80])
@pytest.mark.parametrize("command", LISTED)
def test_help_of_a_command_has_an_example_to_be_copied(command: str, columns: int) -> None:
    done = gguf_fuse(command, "--help", env={**os.environ, "COLUMNS": str(columns)})
    assert done.returncode == 0
    example = f"Example: gguf-fuse {command} {LISTED[command].example}"
    assert example in [line.strip() for line in done.stdout.splitlines()]


def loaded_by(*arguments: str | Path) -> set[str]:
    script = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*sys.modules, sep='\\n', file=sys.stderr))\n"
        "from gguf_fuse import cli\n"
        f"sys.argv = ['gguf-fuse', *{list(map(str, arguments))!r}]\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines())


COMPUTES = {"numpy", "gguf", "threadpoolctl", "gguf_fuse.verifying.numbers"}
FETCHES = {"ssl", "http.client", "asyncio", "logging", "pydantic", "gguf_fuse.fetching.address"}
DRAWS = {"rich.progress", "rich.markdown"}  # where there is a progress bar
WRITES = {"gguf_fuse.api", "gguf_fuse.writing.publish", "gguf_fuse.writing.hashing"}
READS = {"gguf_fuse.format.source", "gguf_fuse.planning.plan", "json"}
UNFUSES = {"gguf_fuse.planning.unfuse"}
HEAVY = COMPUTES | FETCHES | DRAWS


@pytest.mark.parametrize(
    ("arguments", "commands", "not_needed"),
    [
        ("--help", "", HEAVY | READS | WRITES | UNFUSES | {"rich"}),
        ("fuse --help", "fuse", HEAVY | WRITES | UNFUSES),
        ("inspect IN", "inspect", HEAVY | WRITES | UNFUSES),
        ("inspect IN --json", "inspect", HEAVY | WRITES | UNFUSES),
        ("fuse IN OUT", "fuse", HEAVY | UNFUSES),
        ("unfuse FUSED OUT", "unfuse", HEAVY),
        ("verify IN FUSED --structure-only", "verify", HEAVY | WRITES | UNFUSES),
    ],
)
def test_a_command_loads_what_it_needs(
    arguments: str, commands: str, not_needed: set[str], model: Model, tmp_path: Path
) -> None:
    files = {"IN": model(), "FUSED": tmp_path / "fused.gguf", "OUT": tmp_path / "out.gguf"}
    assert gguf_fuse("fuse", files["IN"], files["FUSED"]).returncode == 0
    seen = loaded_by(*(files.get(word, word) for word in arguments.split()))
    assert not seen & not_needed
    own = {name.removeprefix("gguf_fuse.cli.") for name in seen if "gguf_fuse.cli." in name}
    assert own & set(COMMANDS) == set(commands.split())


@pytest.mark.parametrize("command", LISTED)
def test_what_help_lists_is_how_a_commands_own_help_begins(command: str) -> None:
    own = " ".join(gguf_fuse("help", command).stdout.split())
    usage, _, words = own.partition(LISTED[command].summary)
    assert usage.startswith("Usage: ") and usage.count("gguf-fuse") == 1 and words


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str) -> None:
    assert gguf_fuse(flag).stdout == f"gguf-fuse {__version__}\n"


@pytest.mark.parametrize(
    ("command", "columns"), [("", 60), ("", 80), ("fuse", 80), *((name, 60) for name in COMMANDS)]
)
def test_help_fits(command: str, columns: int) -> None:
    arguments = [command, "--help"] if command else ["--help"]
    shown = gguf_fuse(*arguments, env={**os.environ, "COLUMNS": str(columns)}).stdout
    assert max(map(len, shown.splitlines())) <= columns
    assert "<" not in shown and "range" not in shown and "[required]" not in shown


@pytest.mark.parametrize("columns", [50, 60, 80, 120])
def test_examples_in_help_are_not_broken(columns: int) -> None:
    shown = gguf_fuse("--help", env={**os.environ, "COLUMNS": str(columns)}).stdout
    lines = [line.strip() for line in shown.splitlines()]
    for example in ("gguf-fuse --fuse-qkv-weights in.gguf out.gguf", "gguf-fuse in.gguf"):
        assert example in lines


def test_options_stand_in_parts() -> None:
    shown = gguf_fuse("fuse", "--help").stdout
    parts = ["Arguments:", "What:", "Output:", "Shards:", "Speed:", "Other:"]
    assert re.findall(r"^\w+:$", shown, re.MULTILINE) == parts
    what, output = shown.index("What:"), shown.index("Output:")
    assert what < shown.index("--dry-run") < output < shown.index("-f, --force")


def test_help_is_a_command_too() -> None:
    assert gguf_fuse("help").stdout == gguf_fuse("--help").stdout
    assert gguf_fuse("help", "fuse").stdout == gguf_fuse("fuse", "-h").stdout


def test_the_bare_flags_stand_in_help() -> None:
    shown = gguf_fuse("--help").stdout
    for flag in ("--fuse-qkv-weights", "--fuse-gate-up-exps"):
        assert re.search(rf"^ +{flag} +\w", shown, re.MULTILINE)


def completed(line: str, shell: str = "bash", cwd: Path | None = None) -> str:
    """What the shell is offered for the last word of the line."""
    environment = {
        **os.environ,
        "_GGUF_FUSE_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(line.count(" ")),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    return str(gguf_fuse(env=environment, cwd=cwd).stdout)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str) -> None:
    assert "inspect" in completed("gguf-fuse ins", shell)
    assert "--fuse-qkv-weights" in completed("gguf-fuse --fuse-q", shell)


def test_completion_offers_gguf_files_and_folders_with_some(tmp_path: Path) -> None:
    (tmp_path / "models" / "deep").mkdir(parents=True)
    for name in ("in.gguf", "in.txt", "models/deep/a.gguf", ".hidden.gguf"):
        (tmp_path / name).write_bytes(b"")
    for line in ("gguf-fuse fuse ", "gguf-fuse --fuse-qkv-weights ", "gguf-fuse verify in.gguf "):
        assert completed(line, cwd=tmp_path).splitlines() == ["in.gguf", "models/"]
    for line in ("gguf-fuse in", "gguf-fuse fuse in.gguf i", "gguf-fuse fuse a b --base i"):
        assert "in.gguf" in completed(line, cwd=tmp_path).splitlines()
    # A folder that is the only choice is entered.
    assert completed("gguf-fuse fuse m", cwd=tmp_path).splitlines() == ["models/deep/a.gguf"]


def test_completion_leaves_names_to_be_quoted_to_the_shell(tmp_path: Path) -> None:
    (tmp_path / "my model.gguf").write_bytes(b"")
    assert completed("gguf-fuse fuse my", cwd=tmp_path).strip() == ""


def test_bare_form_is_the_fuse_command(model: Model, tmp_path: Path) -> None:
    original = model()
    outputs = [tmp_path / name for name in ("bare.gguf", "before.gguf", "command.gguf")]
    assert gguf_fuse("--fuse-qkv-weights", original, outputs[0]).returncode == 0
    assert gguf_fuse("-q", "--fuse-qkv-weights", original, outputs[1]).stdout == ""
    assert gguf_fuse("fuse", original, outputs[2]).returncode == 0
    first, *others = (output.read_bytes() for output in outputs)
    assert others == [first, first]


def test_a_file_alone_is_inspected(model: Model) -> None:
    original = model()
    assert gguf_fuse(original).stdout == gguf_fuse("inspect", original).stdout
    assert gguf_fuse(original, "--json").stdout == gguf_fuse("inspect", original, "--json").stdout
    missing = gguf_fuse("missing.gguf")
    assert missing.stderr == "gguf-fuse: missing.gguf: No such file or directory\n"


def test_an_encoding_without_the_letters(model: Model) -> None:
    original = model("\u6a21\u578b.gguf")
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = gguf_fuse("inspect", original, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="the platform has no SIGHUP")
def test_nohup_is_respected(model: Model, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from gguf_fuse import cli\n"
        "from gguf_fuse.writing import publish as write\n"
        "sync = os.fsync\n"
        "def hang_up(fd):\n    os.kill(os.getpid(), signal.SIGHUP)\n    sync(fd)\n"
        "os.fsync = hang_up\n"
        "cli.main()"
    )
    output = tmp_path / "out.gguf"
    command = [sys.executable, "-c", script, "fuse", str(model()), str(output)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert output.exists()


# Ctrl-C at the n-th import after the first instruction of ours.
_INTERRUPT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
from gguf_fuse.cli.start import main
n = 0
def count(event, arguments):
    global n
    n += event == "import"
    if event == "import" and n == {at}:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(count)
main()
"""


@pytest.mark.parametrize("at", [1, 3, 30, 60, 80, 100, 110])
def test_ctrl_c_while_the_program_is_loaded(at: int, model: Model, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _INTERRUPT.format(at=at), "fuse", str(model()), "out.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr in (
        "gguf-fuse: interrupted; nothing was written\n",
        "gguf-fuse: interrupted\n",  # in the command itself, before its file is begun
    )
    assert not (tmp_path / "out.gguf").exists()


# numpy's compiled modules swallow what is raised while they are loaded.
_SWALLOW = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from gguf_fuse.cli.start import main
class Finder:
    def find_spec(name, path, target=None):
        try:
            if name == "numpy":
                signal.raise_signal(signal.SIGINT)
        except BaseException:
            pass
sys.meta_path.insert(0, Finder)
main()
"""


def test_ctrl_c_in_an_import_that_swallows_what_is_raised(model: Model) -> None:
    original = model()
    command = [sys.executable, "-c", _SWALLOW, "verify", str(original), str(fused_copy(original))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "gguf-fuse: interrupted\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the platform has no /dev/full")
@pytest.mark.parametrize(
    ("arguments", "code"),
    [("--help", 1), ("--version", 1), ("fuse --help", 1), ("fuse IN OUT -f", 1), ("fuse", 2)],
)
def test_what_is_printed_finds_no_room(arguments: str, code: int, model: Model) -> None:
    """One line where standard error still takes it, the right code where it does not."""
    original = model()
    out = original.with_name("out.gguf")
    paths = {"IN": str(original), "OUT": str(out)}
    words = [paths.get(word, word) for word in arguments.split()]
    with Path("/dev/full").open("w") as full:
        done = gguf_fuse(*words, stdout=full)
        silent = gguf_fuse(*words, stdout=full, stderr=full)
    assert done.returncode == silent.returncode == code
    if code == 1:
        whole = f"; {out} is there and whole" if "OUT" in arguments else ""
        line = f"gguf-fuse: standard output: No space left on device{whole}\n"
        assert done.stderr == line


@pytest.mark.skipif(os.name != "posix", reason="POSIX shells close streams")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams(closed: str, model: Model) -> None:
    """Their numbers go to no file that is written: what a library prints would go into it."""
    original = model()
    command = f'"$0" -m gguf_fuse fuse "$1" "$1.out" {closed}'
    done = subprocess.run(["sh", "-c", command, sys.executable, str(original)], check=False)
    assert done.returncode == 0
    assert gguf_fuse("verify", original, f"{original}.out", "--structure-only").returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit of Linux")
@pytest.mark.parametrize("mib", [20, 25, 30, 40, 60, 100])
def test_too_little_address_space(mib: int, model: Model) -> None:
    """One line, whatever could not be loaded; less than this, and Python itself does not start."""
    original = model()
    command = f'ulimit -v {mib * 1024}; "$0" -m gguf_fuse fuse "$1" "$1.out"'
    arguments = ["sh", "-c", command, sys.executable, str(original)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        assert done.returncode == 1
        assert re.fullmatch("gguf-fuse: .*not enough memory.*\n", done.stderr), done.stderr
        assert done.stdout == ""
