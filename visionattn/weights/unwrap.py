"""Finding a model's weights in what training frameworks save: dictionaries in dictionaries, under any prefix.

The whole content is looked at as one flat dictionary, in which a wrapper (`state_dict`) is a prefix like any other
(`module.`, `model.backbone.`). The weights are under the prefix where the most of the model's names are met.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, islice

import torch
from torch import Tensor

from ..errors import VisionattnError, shortened

TRAINING_STATE = "training_state."
"""Prefix of what a training checkpoint holds besides the model."""
INSIDE = re.compile(r"(?<![^.])(?:_\w*|module)\.")
"""Parts of names that wrappers of modules put in anywhere: `_orig_mod.`, `_fsdp_wrapped_module.`, `module.`."""
AVERAGED = {"ema", "swa", "averaged", "averaging"}
"""Words of prefixes, between dots and underscores, under which averaged weights lie."""
DEEPEST = 12
"""Parts of a prefix."""
LONGEST_NAME = 256
SAMPLE = 64
"""Names by which a prefix is judged first."""
MOST_PREFIXES = 512
"""That are tried, those of the most tensors first."""


@dataclass
class Unwrapped:
    """The weights of a model among what a file holds.

    Args:
        prefix: under which they lie.
        tensors: their names without it.
        others: the other tensors of the file, with their whole names.
    """

    prefix: str
    tensors: dict[str, Tensor]
    others: dict[str, Tensor]

    @property
    def beside(self) -> dict[str, str]:
        """The names of what lies beside the weights' prefix, as a head does beside `backbone.`, each as from there."""
        around = self.prefix[:-1].rpartition(".")[0]
        around = around and f"{around}."
        return {key: bare(key.removeprefix(around)) for key in self.others if key.startswith(around)}


def unwrap(
    content: Mapping,
    meets: Callable[[str], Sequence[bool]],
    misfits: Callable[[dict[str, Tensor]], float],
    averaged: bool = True,
    checkpoint_prefix: str = "",
) -> Unwrapped:
    """The weights of a model among what a file holds.

    Args:
        content: what the file holds: tensors by name, in any nesting of dictionaries.
        meets: says of a name, for each layout of the family, whether it is one of the model's.
        misfits: how many tensors are not the model's, by name or shape; decides where as many names are met.
        averaged: take averaged weights rather than others, where there are both.
        checkpoint_prefix: prefix, or a part of one, that chooses between several sets of weights.

    Raises:
        VisionattnError: if there are no tensors, some that are not plain, or several sets that fit equally well.
    """
    flat = flatten(content)
    if not flat:
        raise VisionattnError(f"expected a state dict, got a dictionary with {some(list(map(str, content)))}")
    under, given = _by_prefix(flat), checkpoint_prefix.strip(".")
    if given:
        under = {prefix: keys for prefix, keys in under.items() if f".{given}." in f".{prefix}"}
    if not under:
        tops = sorted({key.partition(".")[0] for key in flat})
        raise VisionattnError(f"holds nothing under checkpoint_prefix {shortened(given)}; it has {some(tops)}")
    found: dict[str, frozenset[str]] = {}
    most = 1
    for prefix, keys in islice(sorted(under.items(), key=lambda item: -len(item[1])), MOST_PREFIXES):
        if len(keys) < most:
            break
        met = _met(keys, len(prefix), meets)
        if len(met) > most:
            found, most = {}, len(met)
        if len(met) == most and met not in found.values():  # as they are where a prefix is only a wrapper's
            found[prefix] = met
    best = list(found) or [max((p for p, keys in under.items() if len(keys) == max(map(len, under.values()))), key=len)]
    sets = {prefix: _without(prefix, flat) for prefix in best}
    if len(best) > 1:
        best = [prefix for prefix in best if _is_averaged(prefix) == averaged] or best
    if len(best) > 1:
        wrong = {prefix: misfits(sets[prefix]) for prefix in best}
        best = [prefix for prefix in best if wrong[prefix] == min(wrong.values())]
        best = [prefix for prefix in best if prefix == f"{given}."] or best
        if wrong[best[0]] < most and any(not _same(sets[best[0]], sets[prefix]) for prefix in best[1:]):
            names = " and ".join(shortened(prefix[:-1], 100) or "no prefix" for prefix in best[:4])
            raise VisionattnError(f"holds weights under {names} that fit equally well: choose one by checkpoint_prefix")
    prefix = best[0]
    for key in found.get(prefix, ()):
        value = flat[key]
        plain = value.layout == torch.strided and not value.is_quantized
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes() and not value.is_meta:
            raise VisionattnError(f"expected plain tensors, got {key} as {value.layout} of {tuple(value.shape)}")
    taken = {id(value) for value in sets[prefix].values()}
    others = {key: value for key, value in flat.items() if not key.startswith(prefix) or id(value) not in taken}
    return Unwrapped(prefix, sets[prefix], others)


def flatten(content: Mapping) -> dict[str, Tensor]:
    """Tensors by the names that lead to them, joined by dots.

    Args:
        content: dictionaries of tensors and dictionaries; what is there twice is taken once.
    """
    flat: dict[str, Tensor] = {}
    seen: set[int] = set()

    def visit(inner: Mapping, path: str, depth: int) -> None:
        seen.add(id(inner))
        for key, value in inner.items():
            if not isinstance(key, str | int) or len(name := f"{path}{key}") > LONGEST_NAME:
                continue
            if isinstance(value, Tensor) and not name.startswith(TRAINING_STATE):
                flat[name] = value
            elif isinstance(value, Mapping) and depth < DEEPEST and id(value) not in seen:
                visit(value, f"{name}.", depth + 1)

    visit(content, "", 0)
    return flat


def bare(name: str) -> str:
    """A name without what wrappers of modules put into it."""
    return INSIDE.sub("", name)


def some(names: list[str]) -> str:
    """The number of names, and the first of them."""
    shown = ", ".join(shortened(name, 100) for name in names[:4])
    return f"{len(names)} keys ({shown}{', ...' if len(names) > 4 else ''})" if names else "none"


def _by_prefix(flat: Collection[str]) -> dict[str, list[str]]:
    under: dict[str, list[str]] = {"": list(flat)}
    for key in flat:
        parts = key.split(".")[:-1]
        for end in range(1, min(len(parts), DEEPEST) + 1):
            under.setdefault(".".join(parts[:end]) + ".", []).append(key)
    return under


def _without(prefix: str, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, value in flat.items():
        if key.startswith(prefix):
            tensors.setdefault(bare(key[len(prefix) :]), value)
    return tensors


def _met(keys: list[str], start: int, meets: Callable[[str], Sequence[bool]]) -> frozenset[str]:
    """The keys under a prefix that are names of the model, in the layout where the most are."""
    if not any(any(meets(bare(key[start:]))) for key in keys[:: len(keys) // SAMPLE + 1]):
        return frozenset()
    layouts = zip(*(meets(bare(key[start:])) for key in keys), strict=True)
    return max((frozenset(compress(keys, met)) for met in layouts), key=len)


def _is_averaged(prefix: str) -> bool:
    return not AVERAGED.isdisjoint(re.split(r"[._]", prefix.lower()))


def _same(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(value, others[key]) for key, value in some.items())
