"""YAML files, checkpoints and the command line, as typed dataclasses; what is wrong in them is told in one line.

Every value is read here, and jsonargparse checks single values alone, against types that are no classes: in a group of
options or in a free dictionary it would import what `class_path` names.
"""

import difflib
import re
import types
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, set_loader, set_parsing_settings

from ..errors import VisionattnError, user_input
from ..recipes import PREFIX, recipe_path
from .yaml_text import MAX_DEPTH, Plain, checked, explain, read, read_file, resolved, to_yaml

if find_spec("docstring_parser"):  # which only train.py and validate.py need: --help shows the text under each field
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
AS_IT_IS = "as it is"
set_loader(AS_IT_IS, lambda text: text)  # texts are read here, once
Config = TypeVar("Config")
NUMBERS = {
    "PositiveInt": "a whole number above 0",
    "NonNegativeInt": "a whole number from 0 up",
    "PositiveFloat": "a number above 0",
    "NonNegativeFloat": "a number from 0 up",
    "ClosedUnitInterval": "a number from 0 to 1",
    "OpenUnitInterval": "a number between 0 and 1",
}
"""What jsonargparse's restricted types take."""

ALONE = ("help", "config", "print_config", "resume")
"""What the command line takes besides the options, and files do not."""


@dataclass
class Source:
    """Where options come from.

    Args:
        place: what errors call it; empty for the command line.
        values: of the options by their full names, those of a free dictionary in one.
        lines: of the options in a file.
    """

    place: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def refusal(self, told: str, name: str = "") -> VisionattnError:
        """The error that tells what is wrong, with its place and the line of the option."""
        line = f" (line {self.lines[name]})" if name in self.lines else ""
        return VisionattnError((f"{self.place}: " if self.place else "") + told + line)


def make_parser(config: type, prog: str, description: str) -> ArgumentParser:
    """Parser of a script whose options are the fields of a dataclass: it explains them, and checks single values."""
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, parser_mode=AS_IT_IS)
    parser.add_argument(
        "--config",
        metavar="CONFIG",
        help="YAML file of options, or recipe:NAME for one that comes with visionattn (recipe:digits); later files and "
        "options win. Its key base names files that it changes.",
    )
    parser.add_argument("--print_config", action="store_true", help="Print every option with its value, and exit.")
    parser.add_class_arguments(config)
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:  # `--pretrained` alone means true
            action.nargs = "?"
    return parser


def parse(
    parser: ArgumentParser, config: type[Config], argv: list[str], brought: tuple[str, Mapping[str, Any]] | None = None
) -> Config:
    """The options: those of the command line over those in its files, over those that a checkpoint brings.

    Args:
        parser: from `make_parser`.
        config: the dataclass.
        argv: the command line.
        brought: name of a checkpoint, and the options that it brings.

    Raises:
        SystemExit: after --help and --print_config.
        VisionattnError: if an option is unknown or its value is not what it takes.
    """
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        raise SystemExit(0)
    pairs, values, read_before = list(_pairs(config, argv)), {}, {}
    if brought:
        values = _collected(parser, config, *brought).values
    for name, text in pairs:
        if name == "config":
            file = recipe_path(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else Path(text)
            values = _merged(values, _read_options(parser, config, file, read_before))
    for name, text in pairs:
        if name not in ALONE:
            _take(config, values, name, text)
    made = _made(config, values, _typed(parser, Source(values=values)))
    if any(name == "print_config" for name, _ in pairs):
        print(to_yaml(made), end="")
        raise SystemExit(0)
    return made


def values_of(option: str, argv: list[str]) -> list[str]:
    """What a command line gives for an option, in order."""
    values = []
    for argument, following in pairwise([*argv, ""]):
        name, equals, value = argument.partition("=")
        if name == option:
            values.append(value if equals else following)
    return values


def _pairs(config: type, argv: list[str]) -> Iterator[tuple[str, str]]:
    """Names and values of a command line; dashes in names stand for underscores."""
    known, arguments = _types(config), list(argv)[::-1]
    while arguments:
        argument = arguments.pop()
        if not argument.startswith("--"):
            raise VisionattnError(f"unexpected argument {argument!r}: options are given as --name value (see --help)")
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        if name not in known and name not in ALONE and not _dictionary(config, name):
            raise VisionattnError(_unknown(config, f"--{name}"))
        if equals:
            pass
        elif name == "print_config":
            value = "true"
        elif arguments and not arguments[-1].startswith("--"):
            value = arguments.pop()
        elif known.get(name) is bool:
            value = "true"
        else:
            raise VisionattnError(f"option {name}: expected one argument")
        yield name, value


def _take(config: type, values: dict[str, Any], name: str, text: str) -> None:
    """Put what the command line gives for an option in its place."""
    own, hint = Source(), _types(config).get(name)
    with user_input(f"option {name}", ValueError):
        try:
            value = read(text)
        except yaml.YAMLError as error:
            if _is_group(hint) or _is_free(hint):
                raise ValueError(explain(error)) from error
            value = text
        if hint is None:
            dictionary = _dictionary(config, name)
            within = name.removeprefix(f"{dictionary}.").split(".")
            value = resolved(value) if text.strip() else text
            values[dictionary] = _with_entry(values.get(dictionary, {}), within, value)
        elif _is_group(hint):
            if not isinstance(value, Mapping):
                value = read_file(Path(text), f"cannot read {text}, which option {name} names")
            _collect(config, own, value, f"{name}.")
            values |= _merged(values, own.values)
        elif _is_free(hint):
            _collect(config, own, {name: value})
            values |= own.values
        else:
            is_list = isinstance(value, list) and any(get_origin(each) is tuple for each in _members(hint))
            is_null = isinstance(value, Plain) and value.is_null and text and type(None) in _members(hint)
            raw = _takes_text(hint) and not (is_list or is_null)
            values[name] = text if raw else _as_taken(value, hint)


def _read_options(
    parser: ArgumentParser, config: type, file: Path, read_before: dict[Path, dict], above: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """The options in a YAML file over those in its bases; each file is checked alone, so that errors name it."""
    told = f"cannot read {above[-1]}: base {file}" if above else f"cannot read {file}"
    with user_input(told, OSError, ValueError, RuntimeError):
        path = file.resolve()
    if path in above:
        chain = " -> ".join(map(str, [*above[above.index(path) :], path]))
        raise VisionattnError(f"the bases of {file} lead back to it: {chain}")
    if len(above) > MAX_DEPTH:
        raise VisionattnError(f"{above[0]} has bases of bases, more than {MAX_DEPTH} deep")
    if path in read_before:  # a base of many files is read once
        return read_before[path]
    options = read_file(file, told)
    bases = resolved(options.pop("base", []))
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise VisionattnError(f"{file}: option base is a file or a list of files, got {bases!r}")
    own = _collected(parser, config, str(file), options)
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merged(merged, _read_options(parser, config, file.parent / base, read_before, (*above, path)))
    read_before[path] = _merged(merged, own.values)
    return read_before[path]


def _collected(parser: ArgumentParser, config: type, place: str, options: Mapping[str, Any]) -> Source:
    """The options that a file or a checkpoint gives, which are found to be of their types."""
    source = Source(place)
    _collect(config, source, options)
    _typed(parser, source)
    return source


def _collect(config: type, source: Source, options: Mapping[str, Any], prefix: str = "") -> None:
    """Add nested options to those of a source, under their full names."""
    known = _types(config)
    for key, value in options.items():
        name = prefix + key
        hint, dictionary = known.get(name), _dictionary(config, name)
        if line := getattr(options, "lines", {}).get(key):
            source.lines[name] = line
        if hint is None and dictionary is None:
            raise source.refusal(_unknown(config, name), name)
        if name in source.values:
            raise source.refusal(f"option {name} is given twice", name)
        if (_is_group(hint) or _is_free(hint)) and not isinstance(value, Mapping):
            raise source.refusal(f"option {name}: expected options as `name: value`, got {_told(value)}", name)
        if _is_group(hint):
            _collect(config, source, value, f"{name}.")
            continue
        try:
            if dictionary and hint is None:
                within = name.removeprefix(f"{dictionary}.").split(".")
                source.values[dictionary] = _with_entry(source.values.get(dictionary, {}), within, resolved(value))
            else:
                source.values[name] = resolved(value) if _is_free(hint) else _as_taken(value, hint)
        except ValueError as error:
            raise source.refusal(f"option {name}: {error}", name) from error


def _as_taken(value: Any, hint: Any) -> Any:
    """A value as an option of this type takes it: a scalar without quotes as its text, or as what YAML reads.

    Raises:
        ValueError: if it is a text, a null or a mapping, and the option takes no such thing.
    """
    members = _members(hint)
    if isinstance(value, list):
        parts = [part for each in members if get_origin(each) is tuple for part in get_args(each) if part is not ...]
        return [_as_taken(item, Union[tuple(parts)]) for item in value] if parts else resolved(value)  # noqa: UP007
    if isinstance(value, Plain):
        if _takes_text(hint) and not value.is_null:
            return value.text
        value = value.value()
    if isinstance(value, str) and not _takes_text(hint):  # a number in quotes is one where no text is taken
        value = Plain(value).value()
    no_text = isinstance(value, str) and not _takes_text(hint)
    no_null = value is None and type(None) not in members
    if no_text or no_null or isinstance(value, Mapping):
        raise ValueError(f"expected {_type_name(hint)}, got {_told(value)}")
    return checked(value)


def _typed(parser: ArgumentParser, source: Source) -> Mapping[str, Any]:
    """All options with values of their types, free dictionaries apart."""
    try:
        return parser.parse_object({name: value for name, value in source.values.items() if type(value) is not dict})
    except ArgumentError as error:
        told = re.sub(r'^Parser key "([^"]+)"( element \d+)?: ', r"option \1: ", " ".join(str(error).split()))
        name = told.partition(":")[0].removeprefix("option ")
        told = re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.(?=\w)", r"\1", told)
        told = re.sub(r"Not of type (\w+): (\S+) (does not conform to restriction .*|not an? \w+)", _refused, told)
        several = r"Does not validate .* Subtypes: \[(.+), NoneType\] .* Given value: (.*)"
        told = re.sub(several, _refused, told)
        raise source.refusal(told, name) from error


def _refused(found: re.Match) -> str:
    """What jsonargparse says of a number, in our words."""
    return f"expected {NUMBERS.get(found[1], found[1])}, got {found[2]}"


def _made(config: type[Config], values: dict[str, Any], typed: Mapping[str, Any], prefix: str = "") -> Config:
    """The dataclass of the options, with those in it."""
    options = {}
    for name, hint in ((each.name, each.type) for each in fields(config)):
        if _is_group(hint):
            options[name] = _made(hint, values, typed, f"{prefix}{name}.")
        elif _is_free(hint):
            options[name] = values.get(prefix + name, {})
        else:
            options[name] = _bare(typed[prefix + name])
    return config(**options)


def _bare(value: Any) -> Any:
    """A value without jsonargparse's subclasses of numbers."""
    if isinstance(value, tuple):
        return tuple(map(_bare, value))
    kind = next((kind for kind in (bool, int, float) if isinstance(value, kind)), None)
    return kind(value) if kind else value


def _merged(options: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Options with those of `over` in place of theirs; entries of dictionaries one by one."""
    both = {
        key: _merged(options[key], over[key])
        for key in options.keys() & over.keys()
        if isinstance(options[key], dict) and isinstance(over[key], dict)
    }
    return options | over | both


def _with_entry(dictionary: dict[str, Any], within: list[str], value: Any) -> dict[str, Any]:
    """The dictionary with a value at a path of keys."""
    first, *rest = within
    if len(rest) > MAX_DEPTH:
        raise ValueError(f"a name of {len(within)} parts is nested too deep")
    if rest:
        inner = dictionary.get(first)
        value = _with_entry(inner if isinstance(inner, dict) else {}, rest, value)
    return dictionary | {first: value}


@cache
def _types(config: type, prefix: str = "") -> dict[str, Any]:
    """Types of all options by their full names, groups of options and free dictionaries among them."""
    found = {}
    for each in fields(config):
        found[prefix + each.name] = each.type
        if is_dataclass(each.type):
            found |= _types(each.type, f"{prefix}{each.name}.")
    return found


def _is_group(hint: Any) -> bool:
    return is_dataclass(hint)


def _is_free(hint: Any) -> bool:
    return get_origin(hint) is dict


def _dictionary(config: type, name: str) -> str | None:
    """The free dictionary that an entry of this name is of."""
    return next((key for key, hint in _types(config).items() if _is_free(hint) and name.startswith(f"{key}.")), None)


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _takes_text(hint: Any) -> bool:
    literals = [value for each in _members(hint) if get_origin(each) is Literal for value in get_args(each)]
    return str in _members(hint) or any(isinstance(value, str) for value in literals)


def _type_name(hint: Any) -> str:
    plain = isinstance(hint, type) and not get_args(hint)
    name = hint.__name__ if plain else re.sub(r"(\w+\.)+(?=\w)", "", str(hint))
    return re.sub("|".join(NUMBERS), lambda found: NUMBERS[found[0]], name)


def _told(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, (Mapping, list)):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    if isinstance(value, Plain):
        return value.text or "null"
    return "null" if value is None else repr(value)


def _unknown(config: type, given: str) -> str:
    """What to say of an option that does not exist, with the nearest that does."""
    name = given.lstrip("-")
    if name in ALONE:
        return f"{name} is for the command line alone; a file names others with its key base"
    known = [key for key, hint in _types(config).items() if not _is_group(hint)]
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(known)}
    near = difflib.get_close_matches(name, known, 1, 0.7) or difflib.get_close_matches(name, known, 1, 0.5)
    leaf = difflib.get_close_matches(name.rpartition(".")[2], by_leaf, 1, 0.7)
    if near and "." not in near[0] and name not in by_leaf:  # of no group, as what was given
        leaf = []
    nearest = by_leaf[leaf[0]] if leaf else near[0] if near else None
    return f"unknown option {given}" + (f"; did you mean --{nearest}?" if nearest else " (see --help)")
