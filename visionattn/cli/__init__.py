"""The `visionattn` command."""

from importlib import import_module
from typing import Any

from ..errors import optional, run
from ..progress import set_quiet
from ..version import __version__
from .parser import Command, Parser
from .scripts import SCRIPTS

MODULES = ("catalog", "predict", "explain", "check", "speed", "share", "export", "plot", "demo", "scripts")
"""Modules of this package, each with its `COMMANDS`."""


def commands() -> dict[str, Command]:
    """The commands by name."""
    found = [command for name in MODULES for command in import_module(f".{name}", __name__).COMMANDS]
    return {command.name: command for command in (*found, COMPLETION)}


def _add_completion(parser: Parser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="which shell")


def _complete(args: Any) -> None:
    with optional():
        import shtab

    print(shtab.complete(make_parser(commands()), args.shell))


COMPLETION = Command("completion", "print what completes these commands in a shell", _add_completion, _complete)


def make_parser(known: dict[str, Command]) -> Parser:
    """The parser of all commands, from which shell completion is made too."""
    parser = Parser(prog="visionattn", description="Vision backbones built on attention.")
    parser.add_argument("--quiet", action="store_true", help="print results and errors alone")
    parser.add_argument("--version", action="version", version=__version__)
    subcommands = parser.add_subcommands(required=True, dest="command", metavar="COMMAND")
    for command in known.values():
        own = Parser(description=command.help[0].upper() + command.help[1:] + ".")
        command.add(own)
        own.add_argument("--quiet", action="store_true", help="print results and errors alone")
        subcommands.add_subcommand(command.name, own, help=command.help)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for a request that cannot be met."""

    def call(arguments: list[str]) -> int | None:
        arguments = arguments if argv is None else argv
        known = commands()
        if arguments[:1] == ["--quiet"]:  # each command has it, too
            arguments = [*arguments[1:2], "--quiet", *arguments[2:]]
        if arguments and arguments[0] in SCRIPTS:  # which read their own options
            return SCRIPTS[arguments[0]](arguments[1:])
        args = make_parser(known).parse_args(arguments)
        own = args[args.command]
        set_quiet(own.quiet)
        return known[args.command].run(own)

    return run(call)
