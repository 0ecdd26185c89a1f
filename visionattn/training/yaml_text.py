"""YAML as options are written in it: bounded work, no key twice, no tags of types, nothing that reads two ways."""

import codecs
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import VisionattnError, user_input

MAX_BYTES = 1 << 18
"""Largest file; the longest of options, a weight for each of 22,000 classes, take less."""
MAX_VALUES = 100_000
"""Most values of a text, those behind each alias included."""
MAX_DEPTH = 50
"""Most mappings and lists inside each other."""
MAX_NUMBER = 2**64
"""What whole numbers are below, so that they fit wherever options go."""

NULL = re.compile(r"~|null|Null|NULL|")
TRUE = re.compile(r"true|True|TRUE|yes|Yes|YES|on|On|ON")
FALSE = re.compile(r"false|False|FALSE|no|No|NO|off|Off|OFF")
INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
HEX = re.compile(r"[-+]?0x[0-9a-fA-F]+")
FLOAT = re.compile(
    r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
TWO_WAYS = {
    "a number that begins with 0": re.compile(r"[-+]?0[0-9_]+|[-+]?0o[0-7_]+|[-+]?0b[01_]+"),
    "a time or a number to base 60": re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"),
    "a date": re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ].*)?"),
}
"""What one reader of YAML takes for a number or a date, and another for something else."""
TAGS = {
    "tag:yaml.org,2002:null": NULL,
    "tag:yaml.org,2002:bool": re.compile(f"{TRUE.pattern}|{FALSE.pattern}"),
    "tag:yaml.org,2002:int": re.compile(f"{INT.pattern}|{HEX.pattern}"),
    "tag:yaml.org,2002:float": re.compile(f"{FLOAT.pattern}|{INT.pattern}"),
}
"""Tags that a scalar may have, besides that of texts, and what it may then be."""


@dataclass(frozen=True)
class Plain:
    """A scalar without quotes, which an option of text takes as it stands and any other as YAML reads it."""

    text: str

    @property
    def is_null(self) -> bool:
        return NULL.fullmatch(self.text) is not None

    def value(self) -> str | int | float | bool | None:
        """What YAML reads.

        Raises:
            ValueError: if that differs from reader to reader, or is not of this world.
        """
        text = self.text
        if self.is_null:
            return None
        if TRUE.fullmatch(text) or FALSE.fullmatch(text):
            return TRUE.fullmatch(text) is not None
        for what, form in TWO_WAYS.items():
            if form.fullmatch(text):
                raise ValueError(f"{text} reads as {what}: write a plain number, or a text in quotes")
        if INT.fullmatch(text) or HEX.fullmatch(text):
            return checked(int(text, 0) if len(text) < 30 else MAX_NUMBER)
        if FLOAT.fullmatch(text):
            return checked(float(text.lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan")))
        return text


class Located(dict):
    """A mapping that knows the line of each of its keys."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}

    def add(self, other: "Located") -> None:
        """Take the keys of another mapping that this one lacks."""
        for key in [key for key in other if key not in self]:
            self[key], self.lines[key] = other[key], other.lines[key]


def checked(value: Any) -> Any:
    """The value, if it is no number that is out of all bounds.

    Raises:
        ValueError: if it is one.
    """
    if isinstance(value, int) and abs(value) >= MAX_NUMBER:
        raise ValueError("a whole number as large as that is more than any option takes")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("expected a finite number, got one that is not")
    return value


def resolved(value: Any) -> Any:
    """What a text says, with each plain scalar as YAML reads it.

    Raises:
        ValueError: if one of them reads in more ways than one.
    """
    if isinstance(value, Plain):
        return value.value()
    if isinstance(value, list):
        return [resolved(item) for item in value]
    if isinstance(value, Mapping):
        return {key: resolved(item) for key, item in value.items()}
    return checked(value)


def read_file(file: Path, told: str) -> Located:
    """The mapping in a YAML file; `told` begins what is said of one that cannot be read.

    Raises:
        VisionattnError: if it is not a text, not YAML, no mapping, or more than options can need.
    """
    with user_input(told, OSError, ValueError), open(file, "rb") as opened:
        content = opened.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise VisionattnError(f"{told}: options take no more than {MAX_BYTES >> 10} KiB, this is a larger file")
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    with user_input(f"{told}: it is not a text in UTF-8", UnicodeDecodeError):
        text = content.decode("utf-16" if wide else "utf-8-sig")
    try:
        found = read(text)
    except (yaml.YAMLError, ValueError) as error:
        raise VisionattnError(f"{told}: {explain(error)}") from error
    if isinstance(found, Plain) and found.is_null:
        return Located()
    if not isinstance(found, Located):
        kind = "list" if isinstance(found, list) else "text" if isinstance(found, str) else found.text
        raise VisionattnError(f"{told}: expected options as `name: value`, got {kind}")
    return found


def explain(error: Exception) -> str:
    """What is wrong with a text, with its line, in a few words."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"{error.problem or error.context} (line {mark.line + 1}, column {mark.column + 1})"


def read(text: str) -> Any:
    """The value that a YAML text holds: `Located` mappings, lists, texts that were quoted, and `Plain` scalars.

    Aliases and merge keys stand for what they name; the values behind them count towards the most that there may be.

    Raises:
        yaml.YAMLError: if the text is not YAML.
        ValueError: if it says more than options can need, or the same twice.
    """
    events = yaml.parse(text, Loader=yaml.SafeLoader)  # the parser in Python, which has no stack of C to exhaust
    composer = _Composer(events)
    try:
        return composer.document()
    finally:
        events.close()


class _Composer:
    """Makes values of YAML's events.

    Args:
        events: of a text.
    """

    def __init__(self, events: Iterator[yaml.Event]) -> None:
        self.events = events
        self.anchors: dict[str, tuple[Any, int] | None] = {}  # values with their sizes; None: not yet at its end
        self.values = 0

    def document(self) -> Any:
        next(self.events)  # the start of the stream
        value: Any = Plain("")
        for number, event in enumerate(self.events):
            if isinstance(event, yaml.StreamEndEvent):
                break
            if number:
                raise ValueError(f"a second document begins in {_line(event)}: expected one")
            value = self.value(next(self.events), 0)
            next(self.events)  # the end of the document
        return value

    def value(self, event: yaml.Event, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"{_line(event)} is nested more than {MAX_DEPTH} deep")
        before = self.values
        if isinstance(event, yaml.AliasEvent):
            return self.aliased(event)
        self.count(1, event)
        if event.anchor:
            self.anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            value: Any = _scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            _check_tag(event, "seq")
            value = []
            while not isinstance(item := next(self.events), yaml.SequenceEndEvent):
                value.append(self.value(item, depth + 1))
        else:
            _check_tag(event, "map")
            value = self.mapping(depth)
        if event.anchor:
            self.anchors[event.anchor] = value, self.values - before
        return value

    def aliased(self, event: yaml.AliasEvent) -> Any:
        if event.anchor not in self.anchors:
            raise yaml.composer.ComposerError(None, None, f"nothing is called &{event.anchor}", event.start_mark)
        if (named := self.anchors[event.anchor]) is None:
            raise ValueError(f"{_line(event)}: *{event.anchor} stands inside what it names")
        value, size = named
        self.count(size, event)
        return value

    def mapping(self, depth: int) -> Located:
        found, merged = Located(), Located()
        lines: dict[str, int] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            line = event.start_mark.line + 1
            key = self.value(event, depth + 1)
            if isinstance(key, Plain):
                with user_input(f"line {line}", ValueError):
                    is_text = isinstance(key.value(), str)
                key = key.text if is_text else key
            if not isinstance(key, str):
                what = key.text or "nothing" if isinstance(key, Plain) else f"a {type(key).__name__}"
                raise ValueError(f"line {line}: expected a name as `name: value`, got {what}")
            if key in lines:
                raise ValueError(f"{key} is given twice (in line {lines[key]} and line {line})")
            lines[key] = line
            value = self.value(next(self.events), depth + 1)
            if key != "<<":
                found[key], found.lines[key] = value, line
                continue
            for base in value if isinstance(value, list) else [value]:
                if not isinstance(base, Located):
                    raise ValueError(f"line {line}: << takes an alias of a mapping, or a list of such")
                merged.add(base)
        found.add(merged)
        return found

    def count(self, values: int, event: yaml.Event) -> None:
        self.values += values
        if self.values > MAX_VALUES:
            raise ValueError(f"{_line(event)} makes it more than {MAX_VALUES} values, those behind aliases included")


def _scalar(event: yaml.ScalarEvent) -> str | Plain:
    if event.tag in (None, "!"):
        return Plain(event.value) if event.tag is None and event.implicit[0] else event.value
    if event.tag == "tag:yaml.org,2002:str":
        return event.value
    if event.tag not in TAGS or not TAGS[event.tag].fullmatch(event.value):
        raise ValueError(f"{_line(event)}: {event.value[:40]!r} with the tag {event.tag} is not read")
    return Plain(event.value)


def _check_tag(event: yaml.CollectionStartEvent, kind: str) -> None:
    if event.tag not in (None, "!", f"tag:yaml.org,2002:{kind}"):
        raise ValueError(f"{_line(event)}: the tag {event.tag} is not read")


def _line(event: yaml.Event) -> str:
    return f"line {event.start_mark.line + 1}"


class _Dumper(yaml.SafeDumper):
    """Quotes what would be read as something else than the text that it is."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    try:
        is_text = isinstance(Plain(text).value(), str)
    except ValueError:
        is_text = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, None if is_text else "'")


_Dumper.add_representer(str, _represent_text)


def to_yaml(config: Any) -> str:
    """Every option with its value, as a file that --config reads."""
    return yaml.dump(plain(config), Dumper=_Dumper, sort_keys=False)


def plain(config: Any) -> dict[str, Any]:
    """A dataclass as nested dicts of JSON's types."""
    return json.loads(json.dumps(asdict(config)))
