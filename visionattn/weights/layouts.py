"""Converting published layouts to ours, and fitting weights to other models of their family."""

import logging
import math
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from ..errors import VisionattnError, printable, told_of
from ..layers.spectral import folded, renamed
from .files import read_checkpoint
from .unwrap import flatten, some, unwrap

_logger = logging.getLogger("visionattn")

Rule = (
    tuple[str, str | Callable[[re.Match], str]]
    | tuple[str, str | Callable[[re.Match], str], Callable[[Tensor], Tensor]]
)
"""One line of a layout: (pattern, replacement) or (pattern, replacement, transform).

The rules of a layout are applied to every key in order, each as `re.sub(pattern, replacement, key)`; a transform is
applied to the tensor where its pattern matched. In the resulting key
    ""           drops the entry,
    "...#0"      is part 0 of a concatenation along the first dimension with "...#1" and so on,
    "{a|b}"      unbinds the first dimension into the entries with "a" and with "b" in that place.
"""

UNBOUND, PART = re.compile(r"(.*)\{(.*)\|(.*)\}(.*)"), re.compile(r"(.*)#(\d+)")
MISFITS = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
"""What rules raise for tensors of a shape that their layout does not have."""
TABLES = ("pos_embed.weight", ".proj_n", ".proj_back_n")
"""Ends of the names of tables with a row for every patch, which may be resampled without a change of shape."""
NAMES = {"stem", "stages", "blocks", "hidden", "pos_embed", "cls_token", "norm", "feature_norms", "head", "aux_head"}
"""What the names of our models' tensors begin with; others are not a family's, but a loss's or a metric's."""
HEAD = re.compile(r"(?:(?:cls_)?head\.(?:fc\.)?|fc\.|classifier\.)(weight|bias)")
"""What frameworks call the classifier that they put beside a backbone."""


@dataclass(frozen=True)
class renumber:  # noqa: N801 - called like the function that replacements are
    """Replacement that changes a number, to `number * times // step + offset`.

    Args:
        template: the new text, with "{0}" for the number and "{1}", "{2}", ... for the pattern's other groups.
        offset: what to add.
        step: what to divide by.
        times: what to multiply with.
        group: the group of the pattern that is the number.
    """

    template: str
    offset: int
    step: int = 1
    times: int = 1
    group: int = 1

    def __call__(self, m: re.Match) -> str:
        others = [text for i, text in enumerate(m.groups(), 1) if i != self.group]
        return self.template.format(int(m[self.group]) * self.times // self.step + self.offset, *others)

    def numbers(self, number: int) -> list[int]:
        """Those that become this one."""
        first, rest = divmod((number - self.offset) * self.step, self.times)
        return [] if rest or first < 0 else list(range(first, first + self.step))


@dataclass(frozen=True)
class Flatten:
    """Transform of a convolution's weight to that of a linear map; other weights stay as they are.

    Args:
        kernel: its height and width, for the way back.
    """

    kernel: tuple[int, int] = (1, 1)

    def __call__(self, weight: Tensor) -> Tensor:
        return weight.flatten(1) if weight.shape[2:] == self.kernel else weight

    def back(self, weight: Tensor) -> Tensor:
        """The kernel again."""
        return weight.unflatten(1, (-1, *self.kernel)) if weight.ndim == 2 else weight


@dataclass
class _Conversion:
    """A state dict in our layout.

    Args:
        tensors: fitted to the model's configuration by its `adapt_state_dict`.
        found: what the file held, before that.
        left_out: names of the file's other tensors.
    """

    tensors: dict[str, Tensor]
    found: dict[str, Tensor]
    left_out: list[str]


def _convert(
    state_dict: Mapping, model: nn.Module, made_for: Mapping[str, Any] | None = None, checkpoint_prefix: str = ""
) -> _Conversion:
    """The part of a state dict, and the layout, that fit the model's names best."""
    own = model.state_dict()
    flat = flatten(state_dict)
    state_dict = renamed(flat)
    matrices = state_dict.keys() != flat.keys()  # also of convolutions
    if not any(key.rpartition(".")[2] == "u" for key in own):  # then it is no model from sigma_reparam
        state_dict = folded(state_dict)
    layouts = [[], *getattr(model, "layouts", {}).values()]
    adapt = partial(model.adapt_state_dict, made_for=made_for or {}) if hasattr(model, "adapt_state_dict") else dict
    merge = getattr(model, "merge_state_dict", dict)

    @cache
    def meets(name: str) -> list[bool]:
        return [not own.keys().isdisjoint(_targets(rules, name)) for rules in layouts]

    def converted(source: dict[str, Tensor]) -> list[tuple[dict, dict]]:
        pairs = []
        for rules in layouts:
            with suppress(*MISFITS):
                found = merge(_apply(rules, source))
                if matrices:
                    found = {k: v.view_as(own[k]) if _is_matrix_of(v, own.get(k)) else v for k, v in found.items()}
                pairs.append((adapt(found), found))
        if not pairs:
            raise VisionattnError(f"state dict does not fit {_name(model)}: its tensors have shapes of no layout")
        return sorted(pairs, key=lambda pair: len(own.keys() ^ pair[0].keys()))

    def misfits(source: dict[str, Tensor]) -> float:
        with suppress(VisionattnError):
            tensors = converted(source)[0][0]
            return sum(k not in own or k not in tensors or tensors[k].shape != own[k].shape for k in {*own, *tensors})
        return math.inf

    unwrapped = unwrap(state_dict, meets, misfits, getattr(model, "averaged_weights", True), checkpoint_prefix)
    tensors, found = converted(unwrapped.tensors)[0]
    left_out, head = dict(unwrapped.others), {}
    for key, name in unwrapped.beside.items():
        if (match := HEAD.fullmatch(name)) and (ours := f"{_heads(model)[0]}{match[1]}") in own and ours not in found:
            head.setdefault(ours, left_out.pop(key))
    first = {key.partition(".")[0]: key for key in reversed(left_out)}.values()  # one of each kind is told of first
    return _Conversion(tensors | head, found | head, sorted(left_out, key=lambda k: k not in first))


def convert_state_dict(state_dict: Mapping, model: nn.Module, checkpoint_prefix: str = "") -> dict[str, Tensor]:
    """A state dict in any published layout of the model's family, in the model's own layout.

    The layout is detected by its keys, and so are wrappers and prefixes (`state_dict`, `module.`, `model.backbone.`,
    ...): the weights are where the most of the model's names are met. A classifier in the state dict is dropped where
    the model has none, as are tensors that no model of ours has, a loss's for one. Our own layout is returned as it is.

    Args:
        state_dict: tensors by name, possibly wrapped.
        model: the model to convert for.
        checkpoint_prefix: where the weights are, if there are several that fit equally well: "student" for one.

    Returns:
        state dict with exactly the model's keys.

    Raises:
        VisionattnError: if no layout of the family fits; the message says which keys are missing and left over.
    """
    return _strictly(state_dict, model, checkpoint_prefix)[0]


def _strictly(state_dict: Mapping, model: nn.Module, checkpoint_prefix: str) -> tuple[dict[str, Tensor], list[str]]:
    """The model's state dict, and what of the file is not in it."""
    own, made_for = model.state_dict(), {}
    inner = getattr(model, "inner", model)
    if (grid := getattr(inner, "grid_size", None)) is not None:
        made_for["img_size"] = [length * inner.patch_size for length in grid]
    conversion = _convert(state_dict, model, made_for, checkpoint_prefix)
    tensors = conversion.tensors
    for prefix in _heads(model):
        if not any(k.startswith(prefix) for k in own):
            tensors = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    tensors = _without_strays(tensors, own)
    _check(tensors, model)
    return tensors, [k for k in conversion.found if k not in tensors] + conversion.left_out


def fit_state_dict(
    state_dict: Mapping, model: nn.Module, made_for: Mapping[str, Any] | None = None, checkpoint_prefix: str = ""
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """A state dict of any layout, number of classes, input channels, image size or window, for this model.

    Position tables and filters are resampled as the family does, the first convolution follows timm's rule for other
    channels. A head for other classes is replaced by the model's own; so are head and last norm where the file is of a
    model for dense prediction, and norms of features where it is not.

    Args:
        state_dict: tensors by name, possibly wrapped.
        model: the model to fit them to.
        made_for: arguments of the model that they were made for, as far as they are known. Without an `img_size`,
            tables of positions are those of square images.
        checkpoint_prefix: where the weights are, if there are several that fit equally well.

    Returns:
        state dict with the model's keys and shapes, and names of what was "re-initialised", "dropped" and "resized".

    Raises:
        VisionattnError: if it does not fit otherwise.
    """
    return _fit(_convert(state_dict, model, made_for, checkpoint_prefix), model)


def check_held(state_dict: Mapping, model: nn.Module, made_for: Mapping[str, Any] | None = None) -> None:
    """Refuse a state dict that is not of this very model, which may be on the meta device and stay there.

    Args:
        state_dict: tensors by name, possibly wrapped.
        model: what the state dict is said to be of. It may have what models for dense prediction lack.
        made_for: its arguments.

    Raises:
        VisionattnError: says what differs.
    """
    conversion = _convert({k: v.to("meta") for k, v in flatten(state_dict).items()}, model, made_for)
    own, found = _shapes(model.state_dict()), _shapes(conversion.found)
    if other := [f"{k} {found[k]} instead of {own[k]}" for k in found if k in own and found[k] != own[k]]:
        raise VisionattnError(f"the tensors are of another model: {some(other)}")
    _fit(conversion, model)


def _fit(conversion: _Conversion, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    own = model.state_dict()
    tensors, found, heads = dict(conversion.tensors), conversion.found, _heads(model)
    for prefix in heads:
        theirs, ours = ({k: v for k, v in d.items() if k.startswith(prefix)} for d in (tensors, own))
        if _shapes(theirs) != _shapes(ours):
            tensors = {k: v for k, v in tensors.items() if k not in theirs} | ours
    optional = tuple(getattr(model, "optional", ()))
    tensors = {k: v for k, v in tensors.items() if k in own or not k.startswith(optional)}
    if not any(k.startswith(heads) for k in found):
        tensors = {k: v for k, v in tensors.items() if k in own or not re.match(r"norm\d", k)}
        tensors = {k: v for k, v in own.items() if k.startswith(optional)} | tensors
    tensors = {k: v for k, v in own.items() if k.startswith("feature_norms.")} | tensors
    weight = f"{getattr(model, 'first_conv', '')}.weight"
    if weight in tensors and weight in own and tensors[weight].ndim == 4:
        theirs, ours = tensors[weight].shape[1], own[weight].shape[1]
        tensors[weight] = adapt_input_conv(ours, tensors[weight], base_chans=theirs)
    tensors = _without_strays(tensors, own)
    _check(tensors, model)
    old = {k: f"{k} {tuple(found[k].shape)}" if k in found else k for k in tensors}
    fresh = [k for k, v in tensors.items() if v.numel() and v.data_ptr() == own[k].data_ptr()]
    return tensors, {
        "re-initialised": [f"{old[k]} as {tuple(own[k].shape)}" if k in found else k for k in fresh],
        "dropped": [k for k in found if k not in tensors] + conversion.left_out,
        "resized": [
            f"{old[k]} to {tuple(v.shape)}"
            for k, v in tensors.items()
            if k in found and k not in fresh and (v.shape != found[k].shape or k.endswith(TABLES) and v is not found[k])
        ],
    }


def find_widths(state_dict: Mapping, model: nn.Module, checkpoint_prefix: str = "") -> dict[str, int]:
    """The numbers of classes and input channels of a state dict, as arguments of a model, where they are not its own.

    Args:
        state_dict: tensors by name, possibly wrapped, in any layout of the model's family.
        model: a model that differs in nothing else.
        checkpoint_prefix: where the weights are, if there are several that fit equally well.
    """
    own, found = model.state_dict(), _convert(state_dict, model, None, checkpoint_prefix).found
    widths, head, conv = {}, f"{_heads(model)[0]}weight", f"{getattr(model, 'first_conv', '')}.weight"
    if head in own and (classes := len(found.get(head, ()))) != len(own[head]):
        widths["num_classes"] = classes
    if conv in own and conv in found and found[conv].ndim == 4 and found[conv].shape[1] != own[conv].shape[1]:
        widths["in_chans"] = found[conv].shape[1]
    return widths


def _heads(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the classifiers' names."""
    names = getattr(model, "classifier", "head")
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in tensors.items()}


def _without_strays(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leaves out what is no part of any model; the rest of a larger model is refused by `_check`."""
    tops = NAMES | {k.partition(".")[0] for k in own}
    return {k: v for k, v in tensors.items() if k.partition(".")[0] in tops or re.match(r"norm\d\.", k)}


def _check(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuses tensors that are not the model's by name, shape or kind."""
    own = model.state_dict()
    name = _name(model)
    if own.keys() != tensors.keys():
        missing, left = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        raise VisionattnError(f"state dict does not fit {name}: missing {some(missing)}; left over {some(left)}")
    wrong = [
        f"{k} {v.dtype} {tuple(v.shape)} instead of {own[k].dtype} {tuple(own[k].shape)}"
        for k, v in tensors.items()
        if v.shape != own[k].shape or _kind(v) != _kind(own[k])
    ]
    if wrong:
        raise VisionattnError(f"state dict does not fit {name}: {some(wrong)}")


def _name(model: nn.Module) -> str:
    return getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)


def _kind(value: Tensor) -> tuple[bool, bool]:
    return value.is_floating_point(), value.is_complex()


def _is_matrix_of(weight: Tensor, kernel: Tensor | None) -> bool:
    return kernel is not None and kernel.ndim == 4 and weight.shape == kernel.flatten(1).shape


def _renamed(rules: list[Rule], key: str) -> tuple[str, list[Callable[[Tensor], Tensor]]]:
    """What the rules make of a key, and the transforms of those that match it."""
    transforms = []
    for pattern, replacement, *transform in rules:
        key, count = re.subn(pattern, replacement, key)
        transforms += transform if count else []
    return key, transforms


def _apply(rules: list[Rule], state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for key, value in state_dict.items():
        key, transforms = _renamed(rules, key)
        for transform in transforms:
            value = transform(value)
        if both := UNBOUND.fullmatch(key):
            before, first, second, after = both.groups()
            out[before + first + after], out[before + second + after] = value.unbind(0)
        elif part := PART.fullmatch(key):
            parts.setdefault(part[1], {})[int(part[2])] = value
        elif key:
            out[key] = value
    return out | {key: torch.cat([pieces[i] for i in sorted(pieces)]) for key, pieces in parts.items()}


def _targets(rules: list[Rule], key: str) -> list[str]:
    """The names that the rules make of one."""
    with suppress(*MISFITS):
        key = _renamed(rules, key)[0]
        if both := UNBOUND.fullmatch(key):
            return [both[1] + both[2] + both[4], both[1] + both[3] + both[4]]
        return [PART.sub(r"\1", key)]
    return []


def load_checkpoint(
    model: nn.Module, path: str | PathLike, checkpoint_prefix: str = "", content: Mapping[str, Any] | None = None
) -> None:
    """Load a checkpoint file of any published layout of the model's family, strictly: as the very model that it is of.

    What else the file holds, and what a family may do without and this file does, is logged in one line.

    Args:
        model: the model to load into.
        path: a file that `read_checkpoint` reads.
        checkpoint_prefix: where in the file the weights are, if there are several that fit equally well.
        content: of the file, where it has been read already.

    Raises:
        VisionattnError: if the file cannot be read or does not fit the model; the model is then unchanged.
    """
    content = read_checkpoint(path)[0] if content is None else content
    with told_of(f"checkpoint {path}"):
        tensors, dropped = _strictly(content, model, checkpoint_prefix)
        own = model.state_dict()
        kept = [k for k, v in tensors.items() if v.numel() and v.data_ptr() == own[k].data_ptr()]
        model.load_state_dict(tensors, strict=True)
    _tell(path, {"dropped": dropped, "left as they were": kept})


def load_pretrained(
    model: nn.Module,
    weights: str | PathLike | Mapping,
    made_for: Mapping[str, Any] | None = None,
    place: str | PathLike = "",
    checkpoint_prefix: str = "",
) -> None:
    """Load weights to start from, fitted to the model by `fit_state_dict`.

    What was re-initialised, dropped or resized is logged in one line.

    Args:
        model: the model to load into.
        weights: a file that `read_checkpoint` reads, or a state dict.
        made_for: arguments of the model that they were made for, as for `fit_state_dict`.
        place: file that the state dict is from.
        checkpoint_prefix: where in the file the weights are, if there are several that fit equally well.

    Raises:
        VisionattnError: if the file cannot be read or does not fit the model; the model is then unchanged.
    """
    if not isinstance(weights, Mapping):
        weights, place = read_checkpoint(weights)[0], weights
    with told_of(f"checkpoint {place}") if place else nullcontext():
        tensors, report = fit_state_dict(weights, model, made_for, checkpoint_prefix)
        model.load_state_dict(tensors, strict=True)
    _tell(place or "state dict", report)


def _tell(place: str | PathLike, report: dict[str, list[str]]) -> None:
    """Logs what was not used as it is, at the level that Python shows by default."""
    if told := "; ".join(f"{what} {some(keys)}" for what, keys in report.items() if keys):
        _logger.warning("%s: %s", printable(Path(place).name), told)
