"""Reading checkpoints and converting published layouts to ours."""

import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import product
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import VisionattnError

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

WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict"),
    *("state_dict", "model_state_dict", "model", "module", "net", "teacher"),
)
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")
PARTS = ("vision_tower.", "visual.")
"""Prefixes under which checkpoints of larger models hold a backbone; what is not under them is dropped."""
TRAINING_STATE = "training_state."
"""Prefix of what a training checkpoint holds besides the model."""


def renumber(template: str, offset: int) -> Callable[[re.Match], str]:
    """Replacement that adds `offset` to the number in the pattern's first group.

    Args:
        template: the new text, with "{0}" for the number and "{1}", "{2}", ... for the pattern's further groups.
        offset: what to add.
    """
    return lambda m: template.format(int(m[1]) + offset, *m.groups()[1:])


def read_checkpoint(path: str | PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a checkpoint file, read without executing anything it holds.

    Args:
        path: a .safetensors file, or one that torch.save wrote.

    Returns:
        The (nested, for .pth files) dictionary that the file holds, and the safetensors header's metadata.

    Raises:
        VisionattnError: if the file is missing, damaged, or holds more than tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise VisionattnError(f"checkpoint {path} does not exist or is not a file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as f:
                return {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as e:
            raise VisionattnError(f"checkpoint {path} is damaged or not a safetensors file ({_one_line(e)})") from e
    try:
        with torch.serialization.safe_globals([Namespace]):  # plain options, which scripts save beside the weights
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load raises whatever its unpickler and archive reader meet
        raise VisionattnError(
            f"checkpoint {path} is damaged or holds more than tensors and plain containers ({_one_line(e)})"
        ) from e
    if not isinstance(content, Mapping):
        raise VisionattnError(f"checkpoint {path} holds a {type(content).__name__}, expected a dictionary of tensors")
    return dict(content), {}


def _one_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def unwrap(state_dict: Mapping, averaged: bool = True) -> dict[str, Tensor]:
    """The flat state dict inside wrapper keys (`model`, `state_dict`, ...).

    Args:
        state_dict: tensors by name, possibly wrapped.
        averaged: take averaged weights rather than others, where there are both.

    Raises:
        VisionattnError: if there are no tensors.
    """
    wrappers = sorted(WRAPPERS, key=lambda k: ("ema" in k) != averaged)
    while inner := next((state_dict[k] for k in wrappers if isinstance(state_dict.get(k), Mapping)), None):
        state_dict = inner
    tensors = {k: v for k, v in state_dict.items() if isinstance(v, Tensor) and not k.startswith(TRAINING_STATE)}
    if not tensors:
        raise VisionattnError(f"expected a state dict, got a dictionary with {_some(list(map(str, state_dict)))}")
    return tensors


def convert_state_dict(state_dict: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """A state dict in any published layout of the model's family, in the model's own layout.

    The layout is detected by its keys; wrapper keys and prefixes (`model`, `state_dict`, `module.`, ...) are removed. A
    classifier in the state dict is dropped where the model has none. Our own layout is returned unchanged.

    Args:
        state_dict: tensors by name, possibly wrapped.
        model: the model to convert for.

    Returns:
        State dict with exactly the model's keys.

    Raises:
        VisionattnError: if no layout of the family fits; the message says which keys are missing and left over.
    """
    expected = set(model.state_dict())
    source = unwrap(state_dict, getattr(model, "averaged_weights", True))
    candidates = [source]
    for part in PARTS:
        if inside := {k.removeprefix(part): v for k, v in source.items() if k.startswith(part)}:
            candidates.append(source := inside)
    while source and (prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in source)), None)):
        source = {k.removeprefix(prefix): v for k, v in source.items()}
        candidates.append(source)
    layouts = [[], *getattr(model, "layouts", {}).values()]
    adapt, converted = getattr(model, "adapt_state_dict", dict), []
    for candidate, rules in product(reversed(candidates), layouts):
        with suppress(RuntimeError, ValueError):  # tensors of a shape that the layout does not have
            converted.append(adapt(_apply(rules, candidate)))
    if "head.weight" not in expected:
        converted = [{k: v for k, v in c.items() if not k.startswith("head.")} for c in converted]
    best = min(converted, key=lambda c: len(expected ^ c.keys()))
    if missing_or_left := expected ^ best.keys():
        name = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
        missing, left = (sorted(missing_or_left & side) for side in (expected, best.keys()))
        raise VisionattnError(f"state dict does not fit {name}: missing {_some(missing)}; left over {_some(left)}")
    return best


def _some(keys: list[str]) -> str:
    return f"{len(keys)} keys ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})" if keys else "none"


def _apply(rules: list[Rule], state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for key, value in state_dict.items():
        for pattern, replacement, *transform in rules:
            key, count = re.subn(pattern, replacement, key)
            if count and transform:
                value = transform[0](value)
        if split := re.fullmatch(r"(.*)\{(.*)\|(.*)\}(.*)", key):
            before, first, second, after = split.groups()
            out[before + first + after], out[before + second + after] = value.unbind(0)
        elif part := re.fullmatch(r"(.*)#(\d+)", key):
            parts.setdefault(part[1], {})[int(part[2])] = value
        elif key:
            out[key] = value
    return out | {key: torch.cat([pieces[i] for i in sorted(pieces)]) for key, pieces in parts.items()}


def load_checkpoint(model: nn.Module, path: str | PathLike) -> None:
    """Load a checkpoint file of any published layout of the model's family, strictly.

    Args:
        model: the model to load into.
        path: a .safetensors or .pth file.

    Raises:
        VisionattnError: if the file cannot be read or does not fit the model; the model is then unchanged.
    """
    converted = convert_state_dict(read_checkpoint(path)[0], model)
    own = model.state_dict()
    wrong = [
        f"{k} {tuple(v.shape)} instead of {tuple(own[k].shape)}"
        for k, v in converted.items()
        if v.shape != own[k].shape
    ]
    if wrong:
        name = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
        raise VisionattnError(f"checkpoint {path} does not fit {name}: {_some(wrong)}")
    model.load_state_dict(converted, strict=True)
