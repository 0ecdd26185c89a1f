"""State dicts in the published layouts again: the rules of a layout, applied backwards.

A rule's replacement becomes what is looked for, and its pattern what is put in place. Which rules had to do with a
name is not known beforehand: all ways back are tried, those that do not lead forward again to the same name are left
out, and of the others the one is taken that accounts for the most of the name.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import takewhile

import torch
from torch import Tensor, nn

from ..errors import VisionattnError
from .layouts import UNBOUND, Rule, _renamed, renumber

TOKEN = re.compile(r"\\(.)|\(\?:([^()]*)\)|(\((?:[^()]|\([^()]*\))*\))|(.)")
"""Of a pattern: an escaped character, a choice, a group (which may hold ones that are no captures), or a character."""


def _pieces(pattern: str) -> Iterator[list[str | tuple[int, str]]]:
    """Ways to write what a pattern matches: texts, and (number, source) of its groups; none if it has other parts."""
    pieces: list[list[str | tuple[int, str]]] = [[]]
    count = 0
    for escaped, choice, group, character in TOKEN.findall(pattern.removeprefix("^").removesuffix("$")):
        if group:
            count += 1
            options: list[str | tuple[int, str]] = [(count, group)]
        elif choice:
            options = [option.replace("\\.", ".") for option in choice.split("|")]
        elif escaped:
            options = [escaped]
            if escaped.isalnum():
                return
        elif character in "[]*+?{}|^$.()":
            return
        else:
            options = [character]
        pieces = [[*piece, option] for piece in pieces for option in options]
    yield from pieces


def _backwards(rule: Rule) -> Iterator[tuple[re.Pattern, Callable[[re.Match], list[str]]]]:
    """A rule backwards, for each way to write what it matches: what to look for, and what may have been there."""
    pattern, replacement = rule[:2]
    if isinstance(replacement, renumber):
        template, group = replacement.template, replacement.group
    elif isinstance(replacement, str) and replacement:
        template, group = re.sub(r"\\(\d)", r"{\1}", re.sub(r"[{}]", r"\g<0>\g<0>", replacement)), 0
    else:
        return
    for pieces in _pieces(pattern):
        groups = {piece[0]: piece[1] for piece in pieces if not isinstance(piece, str)}
        known = [group, *(i for i in groups if i != group)]  # in the order of the template's numbers
        order: list[int] = []
        look = ""
        for double, index, text in re.findall(r"(\{\{|\}\})|\{(\d)\}|([^{}]+)", template):
            if index:
                order.append(known[int(index)])
                look += r"(\d+)" if order[-1] == group else groups[order[-1]]
            else:
                look += re.escape(double[:1] or text)

        def put(match: re.Match, pieces=pieces, order=order) -> list[str]:
            values = dict(zip(order, match.groups(), strict=True))
            numbers = replacement.numbers(int(values[group])) if group else [0]
            return ["".join(_written(piece, values | {group: number}) for piece in pieces) for number in numbers]

        if set(order) == set(groups):
            start, end = "^" * pattern.startswith("^"), "$" * pattern.endswith("$")
            yield re.compile(start + look + end), put


def _written(piece: str | tuple[int, str], values: Mapping[int, object]) -> str:
    return piece if isinstance(piece, str) else str(values[piece[0]])


def published_name(rules: list[Rule], name: str) -> str | None:
    """The name that the rules make `name` of; of several, that which most of `name` speaks for.

    Args:
        rules: of a layout.
        name: as the rules leave it, so with "#0" if it is a part.
    """
    found = {name: 0}
    for rule in reversed(rules):
        for pattern, replace in _backwards(rule):
            for text, score in list(found.items()):
                for match in pattern.finditer(text):
                    for new in replace(match):
                        changed = text[: match.start()] + new + text[match.end() :]
                        found[changed] = max(score + len(match[0]), found.get(changed, 0))
    ways = [(score, -i, text) for i, (text, score) in enumerate(found.items()) if _renamed(rules, text)[0] == name]
    return max(ways)[2] if ways else None


def to_layout(model: nn.Module, layout: str) -> dict[str, Tensor]:
    """A state dict of ours in a published layout.

    Args:
        model: of ours.
        layout: one of its `layouts`.

    Raises:
        VisionattnError: if a tensor has no name there.
    """
    state_dict, rules = model.state_dict(), model.layouts[layout]
    out: dict[str, Tensor] = getattr(model, "published_buffers", dict)()
    parts = sum(isinstance(rule[1], str) and "#" in rule[1] for rule in rules)
    pairs = [_pair(rules, i) for i, rule in enumerate(rules) if isinstance(rule[1], str) and "{" in rule[1]]
    for key, value in state_dict.items():
        if (both := next((p for p in pairs if any(key.endswith(end) for end in p[1:])), None)) is not None:
            name, first, second = both
            if key.endswith(second):
                continue
            stem = key.removesuffix(first)
            published = published_name(rules, stem + name)
            values = {published: torch.stack([value, state_dict[stem + second]])}
        elif names := list(takewhile(_is_whole, (published_name(rules, f"{key}#{i}") for i in range(parts)))):
            values = dict(zip(names, value.chunk(len(names)), strict=True))
        else:
            values = {published_name(rules, key): value}
        for name, tensor in values.items():
            if name is None:
                raise VisionattnError(f"the published layout has no name for {key}")
            for transform in reversed(_renamed(rules, name)[1]):
                tensor = getattr(transform, "back", lambda each: each)(tensor)
            out[name] = tensor.contiguous()
    return out


def _is_whole(name: str | None) -> bool:
    """Whether a name is one, and that of no part."""
    return name is not None and "#" not in name


def _pair(rules: list[Rule], index: int) -> tuple[str, str, str]:
    """What a rule that unbinds a tensor ends as: "...{a|b}...", and the ends of the two names."""
    name = _renamed(rules[index + 1 :], rules[index][1])[0]
    before, first, second, after = UNBOUND.fullmatch(name).groups()
    return name, before + first + after, before + second + after
