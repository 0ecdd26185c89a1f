"""YAML files and the command line, as typed dataclasses; what is wrong in them is told in one line."""

import argparse
import difflib
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from ..data.config import user_input
from ..errors import VisionattnError

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # --help shows the text under each field
Config = TypeVar("Config")


def make_parser(config: type, prog: str, description: str) -> ArgumentParser:
    """Parser of a script whose options are the fields of a dataclass."""
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file of options; later files and options win. Its key base names files that it changes.",
    )
    parser.add_class_arguments(config)
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:  # `--pretrained` alone means true
            action.nargs, action.const = "?", True
    return parser


def parse(parser: ArgumentParser, config: type[Config], argv: list[str]) -> Config:
    """The options that a command line gives, once `arrange` has dealt with it.

    Raises:
        VisionattnError: If an option is unknown or its value is not what it takes.
    """
    try:
        options = parser.parse_args(argv)
        del options["config"]
        options.pop("resume", None)
        return config(**vars(parser.instantiate(options)))
    except argparse.ArgumentError as error:
        raise VisionattnError(_explain(error, parser)) from error


def arrange(parser: ArgumentParser, argv: list[str]) -> list[str]:
    """Accept dashes for underscores in names, and put what files say first so that the command line overrides it."""
    options, files = [], {}
    arguments = iter(argv)
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            argument = "--" + name[2:].replace("-", "_") + equals + value
        name, equals, value = argument.partition("=")
        if name == "--config" and (file := value if equals else next(arguments, "")):
            files = _merged(files, _read_file(parser, Path(file)))
        else:
            options.append(argument)
    return [f"--config={json.dumps(files)}", *options] if files else options


def _read_file(parser: ArgumentParser, file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The options in a YAML file over those in its bases; each file is checked alone, so that errors name it."""
    if file.resolve() in above:
        chain = " -> ".join(map(str, [*above[above.index(file.resolve()) :], file.resolve()]))
        raise VisionattnError(f"the bases of {file} lead back to it: {chain}")
    with user_input(f"cannot read {above[-1]}: base {file}" if above else f"cannot read {file}", OSError, ValueError):
        text = file.read_text()
    with user_input(f"cannot read {file}", yaml.YAMLError):
        options = yaml.safe_load(text) or {}
    if not isinstance(options, dict):
        raise VisionattnError(f"cannot read {file}: expected options as `name: value`, got {type(options).__name__}")
    bases = options.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise VisionattnError(f"{file}: option base is a file or a list of files, got {bases!r}")
    try:
        parser.parse_object(options)
    except argparse.ArgumentError as error:
        raise VisionattnError(f"{file}: {_explain(error, parser)}") from error
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merged(merged, _read_file(parser, file.parent / base, (*above, file.resolve())))
    return _merged(merged, options)


def _merged(options: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested options with those of `over` in place of theirs."""
    both = {
        key: _merged(options[key], over[key])
        for key in options.keys() & over.keys()
        if isinstance(options[key], dict) and isinstance(over[key], dict)
    }
    return options | over | both


def values_of(option: str, argv: list[str]) -> list[str]:
    """What a command line gives for an option, in order."""
    values = []
    for argument, following in pairwise([*argv, ""]):
        name, equals, value = argument.partition("=")
        if name == option:
            values.append(value if equals else following)
    return values


def _explain(error: Exception, parser: ArgumentParser) -> str:
    """One line for what the parser refused, with the nearest option that exists."""
    message = " ".join(str(error).split())
    unknown = re.search(
        r"unrecognized arguments: (?P<option>\S+)|Option '(?P<key>[^']+)' is not accepted"
        r"|Group '(?P<group>[^']+)' does not accept option '(?P<member>[^']+)'",
        message,
    )
    if unknown is None:
        message = re.sub(r'^Parser key "([^"]+)": ', r"option \1: ", message)
        return re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.(?=\w)", r"\1", message)
    given = unknown["option"] or unknown["key"] or f"{unknown['group']}.{unknown['member']}"
    if unknown["option"] and not given.startswith("--"):
        return f"unexpected argument {given!r}: options are given as --name value (see --help)"
    key = given.lstrip("-").partition("=")[0]
    known = [a.dest for a in parser._actions if a.option_strings and a.dest not in ("help", "print_config")]
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(known)}
    near = difflib.get_close_matches(key, known, 1, 0.7) or difflib.get_close_matches(key, known, 1, 0.5)
    leaf = difflib.get_close_matches(key.rpartition(".")[2], by_leaf, 1, 0.7)
    nearest = by_leaf[leaf[0]] if leaf else near[0] if near else None
    return f"unknown option {given}" + (f"; did you mean --{nearest}?" if nearest else " (see --help)")
