"""Arguments, checked against the signature of what takes them before it is called."""

import inspect
import math
import re
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import UnknownArgumentError, VisionattnError, one_line

UNFIT = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)
"""What layers raise that are asked for what cannot be: 0 heads, or other numbers of stages than of dilations."""

FREE = re.compile("num_classes|in_chans|img_size|.*drop.*|.*_rate")
"""Arguments of models that change no use of the same weights, or to which weights are fitted and it is told."""


@cache
def hints(function: Callable) -> dict[str, Any]:
    """Types of the arguments of a function or class; where one is not annotated, what its default says of it.

    Args:
        function: the function or class.
    """
    try:
        annotated = get_type_hints(function.__init__ if isinstance(function, type) else function)
    except (NameError, TypeError, AttributeError):  # annotations that are no types, or no function of Python's
        annotated = {}
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            found[name] = annotated.get(name, _hint_of(parameter.default))
            if parameter.default is None:
                found[name] = Union[found[name], None]  # noqa: UP007 - types may be texts here
    return found


def _hint_of(default: Any) -> Any:
    if isinstance(default, (bool, str)):
        return type(default)
    if isinstance(default, Real):
        return float
    return Sequence if isinstance(default, (tuple, list)) else Any


def with_meaning(arguments: Mapping[str, Any], function: Callable) -> dict[str, Any]:
    """The arguments without those that are None where the function has no use for None, as timm leaves them out.

    Args:
        arguments: by name.
        function: the function or class that takes them.
    """
    types = hints(function)
    return {k: v for k, v in arguments.items() if v is not None or (k in types and fits(None, types[k]))}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as `typing` writes it. Sequences may be of any kind, and numbers of any library.

    Args:
        value: the value.
        hint: the type.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint in (None, NoneType):
        return value is None
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in inner)
    if hint is bool or isinstance(value, bool):
        return isinstance(value, bool) and hint is bool
    if hint is int:
        return isinstance(value, Integral)
    if hint is float:
        return isinstance(value, Real) and math.isfinite(value)
    kind = origin or hint
    if kind in (tuple, list, Sequence):
        if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__len__") or not hasattr(value, "__iter__"):
            return False
        if kind is tuple and inner and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(map(fits, value, inner))
        return not inner or all(fits(each, inner[0]) for each in value)
    if kind in (dict, Mapping):
        return isinstance(value, Mapping) and (not inner or all(fits(k, inner[0]) for k in value))
    if kind is type or kind is Callable:
        return callable(value)
    if isinstance(hint, type):
        return isinstance(value, hint) or _is_restricted(value, hint)
    return True


def _is_restricted(value: Any, hint: type) -> bool:
    """Whether a value is of one of jsonargparse's restricted kinds of numbers and texts, such as PositiveInt."""
    base = next((each for each in (int, float, str) if issubclass(hint, each)), None)
    if base in (None, hint) or not fits(value, base):
        return False
    try:
        hint(value)
    except (ValueError, TypeError):
        return False
    return True


def check_arguments(
    name: str, given: Mapping[str, Any], accepted: Collection[str], types: Mapping[str, Any] | None = None
) -> None:
    """Refuse arguments that something does not take, or not of that type.

    Args:
        name: what takes them.
        given: the arguments, by name.
        accepted: names that it takes.
        types: by name; of those that have none nothing is expected.

    Raises:
        UnknownArgumentError: says which they are and what is accepted.
    """
    if unknown := sorted(given.keys() - set(accepted)):
        told = f"{name} got unknown arguments {', '.join(unknown)}; it takes {', '.join(sorted(accepted)) or 'none'}"
        raise UnknownArgumentError(told)
    check_types(given, types or {}, f"{name} takes ", " as")


def check_types(values: Mapping[str, Any], types: Mapping[str, Any], before: str, after: str) -> None:
    """Refuse values of another type.

    Args:
        values: by name.
        types: by name; of those that have none nothing is expected.
        before: what an error says before the name.
        after: what it says between the name and the type.

    Raises:
        UnknownArgumentError: says which it is, what it is and what is expected.
    """
    for name, value in values.items():
        if name in types and not fits(value, types[name]):
            raise UnknownArgumentError(f"{before}{name}{after} {describe(types[name])}, got {reprlib.repr(value)}")


def differing(one: Mapping[str, Any], other: Mapping[str, Any], made: Callable | None = None) -> dict[str, tuple]:
    """Values by name of arguments of a model that differ and change what is computed from the same weights.

    Args:
        one: arguments of a model.
        other: likewise.
        made: what they are arguments of: its defaults stand for those that are not given. None: what is not given is
            None.
    """
    known = {} if made is None else inspect.signature(made).parameters
    defaults = {name: each.default for name, each in known.items() if each.default is not each.empty}
    found = {}
    for name in sorted(one.keys() | other.keys()):
        pair = tuple(_plain(values.get(name, defaults.get(name))) for values in (one, other))
        comparable = made is None or name in defaults or name in one.keys() & other.keys()
        if comparable and pair[0] != pair[1] and not FREE.fullmatch(name):
            found[name] = pair
    return found


def _plain(value: Any) -> Any:
    """Without the differences between what was given and what was read from a file."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()} or None
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def made_with(name: str, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Makes one line of what layers raise that do not go together.

    Args:
        name: of what is made.
        arguments: that somebody chose for it.
    """
    try:
        yield
    except VisionattnError:
        raise
    except UNFIT as e:
        told = ", ".join(f"{key}={reprlib.repr(value)}" for key, value in arguments.items())
        raise VisionattnError(f"{name} cannot be made with {told or 'its arguments'} ({one_line(e)})") from e


def describe(hint: Any) -> str:
    """A type as an error names it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(describe(each) for each in inner)
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if hint in (None, NoneType):
        return "null"
    kind = origin or hint
    if kind in (tuple, list, Sequence):
        if kind is tuple and inner and inner[-1] is not Ellipsis:
            return f"({', '.join(describe(each) for each in inner)})"
        return f"a list of {describe(inner[0])}" if inner else "a list"
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false", dict: "a mapping"}
    names |= {Mapping: "a mapping", Callable: "a function", type: "a class"}
    return names.get(kind) or getattr(kind, "__name__", str(kind))
