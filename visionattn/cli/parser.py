"""What the commands have in common."""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from types import FunctionType
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from ..errors import VisionattnError


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        name: what it is called.
        help: what it does, in a line.
        add: adds its options to a parser.
        run: does it, with the options; what it returns is the exit code, None is 0.
    """

    name: str
    help: str
    add: Callable[["Parser"], None]
    run: Callable[[Any], int | None]


class Parser(ArgumentParser):
    """A parser that takes values as they are given, tells what is wrong in one line and takes no abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            exit_on_error=False, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        if isinstance(read := kwargs.get("type"), FunctionType):  # which jsonargparse calls with what it has read, too
            kwargs["type"] = wraps(read)(lambda value: read(value) if isinstance(value, str) else value)
        return super().add_argument(*names, **kwargs)

    def error(self, message: str, *_: Any) -> NoReturn:
        if message.startswith('expected "command"'):
            message = f"give a command: {', '.join(self._subcommands_action.choices)}"
        if lacking := re.match(r"the following arguments are required: (\w+)\.(\w+)", message):
            self.prog, message = f"visionattn {lacking[1]}", f"give {lacking[2].upper().removesuffix('S')}"
        told = re.sub(r'Parser key "([^"]*)":\s*', r"option \1: ", re.sub(r"<class '(\w+)'>", r"\1", message))
        raise VisionattnError(f"{told.rstrip('.')} (see {self.prog.replace(' [options]', '')} --help)")

    def add_kwargs(self) -> None:
        """The option by which a model is made with arguments of its own."""
        told = "arguments of the model, 'mixer=agent' for one"
        self.add_argument("--kwargs", nargs="+", type=key_value, default=[], metavar="KEY=VALUE", help=told)


def key_value(text: str) -> tuple[str, Any]:
    """`KEY=VALUE`, whose value is JSON if it can be read so, else the text.

    Raises:
        ArgumentTypeError: if there is no `=`.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text}")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value
