"""How the command line is understood: help, completion, and what wrong usage is told.

Written for click's interface, which typer has had from another package in every other release: only
names that all of them have are used.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup

from gguf_fuse.cli.commands import COMMANDS
from gguf_fuse.cli.outcome import EXIT_USAGE, complain, failing
from gguf_fuse.planning.fusions import ALL, QKV

UsageError: type[Any] = typer.BadParameter.__mro__[1]  # typer has no public name for it

WHAT, OUTPUT, SHARDS, SPEED, OTHER = "What", "Output", "Shards", "Speed", "Other"  # parts of --help
_COLUMN = 25  # of --help: where the words begin
_PARTS = (WHAT, "Options", OUTPUT, SHARDS, SPEED, OTHER)

# What other programs call an option of ours; spelling is `difflib`'s.
_OTHER_NAMES = {
    "--overwrite": "--force",
    "--yes": "--force",
    "-y": "--force",
    "--jobs": "--threads",
    "-j": "--threads",
    "-t": "--threads",
    "--parallel": "--threads",
    "--silent": "--quiet",
    "--check": "--verify",
    "-n": "--dry-run",
    "-v": "--version",
    "--arch": "--any-architecture",
}


_ALL = "; gguf-fuse --help lists all"


def option(*names: str, part: str, **settings: Any) -> Any:
    """An option that stands in this part of --help."""
    return typer.Option(*names, rich_help_panel=part, **settings)


class Command(TyperCommand):
    """A command: its help is grouped, too many arguments are told in our words."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_options(self, ctx, formatter)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", *map(_argument, _parameters(self, ctx, "argument"))]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.allow_extra_args = True
        extra: list[str] = super().parse_args(ctx, args)
        if extra and not ctx.resilient_parsing:
            usage = " ".join([ctx.command_path, *self.collect_usage_pieces(ctx)])
            raise UsageError(f"{extra[0]!r} is one argument too many: {usage}", ctx)
        return extra


class Program(TyperGroup):
    """All commands, and what a command line without one means."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*COMMANDS, *self.commands]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Of those in the table, only the one that is wanted is imported."""
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        return _load(cmd_name)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            print(ctx.get_help(), file=sys.stderr)
            raise typer.Exit(EXIT_USAGE)
        return super().parse_args(ctx, self._with_command(args, ctx))

    def _with_command(self, args: list[str], ctx: Any) -> list[str]:
        """Flags of fuse mean fuse, a file alone means inspect. Raises UsageError for two files."""
        words = [word for word in args if not word.startswith("-")]
        if args and args[0] in self.list_commands(ctx):
            return args
        # By its beginning: a misspelled flag gets fuse's own message, which names the right one.
        flags = ("--fuse-", *(fusion.flag for fusion in ALL))
        if any(word.replace("_", "-").startswith(flags) for word in args):
            return ["fuse", *args]
        if ctx.resilient_parsing or not words or not _is_path(words[0]):
            return args
        inspects = {name for each in _load("inspect").params for name in each.opts}
        others = set(args) - {*words, *inspects, *ctx.help_option_names}
        if len(words) == 1 and not others:
            return ["inspect", *args]
        meant = ["inspect"] if len(words) > 2 else [QKV.flag]
        if all(word.isprintable() for word in args):
            raise UsageError(f"did you mean: {shlex.join(['gguf-fuse', *meant, *args])}", ctx)
        raise UsageError(f"no command{_ALL}", ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = self.list_commands(ctx)
        if args[0] not in known and not ctx.resilient_parsing:
            raise UsageError(f"no command {args[0]!r}{_similar(args[0], known) or _ALL}", ctx)
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        found = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-"):
            return found
        return [*found, *_load("inspect").params[0].shell_complete(ctx, incomplete)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            others = [(n, c.get_short_help_str(limit=999)) for n, c in self.commands.items()]
            formatter.write_dl(
                [*((name, each.summary) for name, each in COMMANDS.items()), *others]
            )
        _write_options(self, ctx, formatter)


@functools.cache
def _load(name: str) -> Any:
    one = typer.Typer(add_completion=False, rich_markup_mode=None)
    function = getattr(importlib.import_module(f"gguf_fuse.cli.{name}"), name)
    example = f"\b\nExample: gguf-fuse {name} {COMMANDS[name].example}"  # \b: not broken
    one.command(name, cls=Command, epilog=example)(failing(function))
    return typer.main.get_command(one)


def _is_path(word: str) -> bool:
    # Of os: what cannot be a name is not there, either.
    return word.endswith(".gguf") or os.sep in word or os.path.exists(word)  # noqa: PTH110


def _parameters(command: Any, ctx: Any, kind: str) -> list[Any]:
    parameters = command.get_params(ctx)
    return [each for each in parameters if each.param_type_name == kind and not each.hidden]


def _argument(argument: Any) -> str:
    name = (argument.metavar or argument.name.upper()).strip("[]")
    return name if argument.required else f"[{name}]"


def _write_options(command: Any, ctx: Any, formatter: Any) -> None:
    """Arguments, then options by their parts, each as "-f, --force" or "--threads N"."""
    arguments = [
        (_argument(each).ljust(_COLUMN), each.help or "")
        for each in _parameters(command, ctx, "argument")
    ]
    parts: dict[str, list[tuple[str, str]]] = {"Arguments": arguments} | {p: [] for p in _PARTS}
    for option in _parameters(command, ctx, "option"):
        names = sorted(option.opts, key=len)
        shown = ", ".join(names) if names[0][1] != "-" else f"    {names[0]}"
        shown += "".join(f"/{other}" for other in option.secondary_opts)
        shown += "" if option.is_flag else f" {option.metavar or 'N'}"
        general = option.name == "help" or "completion" in option.name
        part = OTHER if general else getattr(option, "rich_help_panel", None) or "Options"
        parts[part].append((shown.ljust(_COLUMN), _explained(option)))
    for part, rows in parts.items():
        if rows:
            with formatter.section(part):
                formatter.write_dl(rows, col_max=_COLUMN)


def _explained(option: Any) -> str:
    """The help, with a number that is the default, unless it tells that itself."""
    words, default = option.help or "", option.default
    if isinstance(default, bool) or not isinstance(default, int) or "default" in words:
        return words
    return f"{words.removesuffix('.')} (default: {default})."


def complete_path(incomplete: str) -> list[str]:
    """GGUF files, and folders that may hold some; a folder that is the only choice is entered.

    Nothing where a name would have to be quoted, so that the shell completes it itself.
    """
    folder, start = os.path.split(incomplete)
    try:
        with os.scandir(folder or ".") as entries:
            found = [e for e in entries if e.name.startswith(start) and (start or e.name[0] != ".")]
            typed = incomplete.removesuffix(start)
            folders = sorted(f"{typed}{e.name}{os.sep}" for e in found if e.is_dir())
    except OSError:
        return []
    files = sorted(f"{typed}{e.name}" for e in found if e.name.endswith(".gguf"))
    if any(shlex.quote(path) != path for path in (*files, *folders)):
        return []
    if len(folders) == 1 and not files:
        return complete_path(folders[0])
    return [*files, *folders]


def understand(app: typer.Typer, arguments: Sequence[str]) -> None:
    """The command that the arguments ask for; wrong usage is one line on stderr and exit 2."""
    try:
        code = app(list(arguments), prog_name="gguf-fuse", standalone_mode=False)
    except UsageError as error:
        complain(_told(error))
        code = EXIT_USAGE
    sys.exit(code)


def _told(error: Any) -> str:
    """What is wrong and what is right, in our words: those of typer differ by release."""
    if hasattr(error, "possibilities"):
        options = [name for option in error.ctx.command.params for name in option.opts]
        return f"no option {error.option_name}{_similar(error.option_name, options)}"
    parameter = getattr(error, "param", None)
    if parameter is None:
        hint = getattr(error, "param_hint", None)
        message = error.message.rstrip(".")
        if message[1:2].islower():  # no name in capitals, as OUT
            message = message[:1].lower() + message[1:]
        return f"{hint}: {message}" if hint else message
    if hasattr(error, "param_type"):
        usage = " ".join(
            [error.ctx.command_path, *error.ctx.command.collect_usage_pieces(error.ctx)]
        )
        return f"{_argument(parameter)} is missing: {usage}"
    name = max(parameter.opts, key=len)
    bounds = parameter if hasattr(parameter, "min") else parameter.type
    if hasattr(bounds, "min") and bounds.min is not None:
        most = f"from {bounds.min} to {bounds.max}" if bounds.max else f", {bounds.min} or more"
        return f"{name} takes a whole number {most}".replace(" ,", ",")
    choices = (parameter.metavar or "").split("|")
    return (
        f"{name} takes {' or '.join(choices)}" if len(choices) > 1 else f"{name}: {error.message}"
    )


def _similar(word: str, known: Any) -> str:
    """What was meant, as the end of a message."""
    spelled = word.replace("_", "-")
    other = _OTHER_NAMES.get(spelled)
    near = [other] if other in known else difflib.get_close_matches(spelled, known, n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""
