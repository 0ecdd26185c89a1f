"""Names of models, what is known of them, and the bridge that offers them to timm."""

import difflib
import fnmatch
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from os import PathLike
from types import ModuleType
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, generate_default_cfgs
from timm.models import register_model as register_with_timm
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .backbone import Isotropic
from .errors import UnknownModelError, VisionattnError

BUILDER_ARGUMENTS = {
    "features_only": bool,
    "cache_dir": str | PathLike | None,
    "pretrained_cfg": str | Mapping | PretrainedCfg | None,
    "pretrained_cfg_overlay": Mapping | None,
    **dict.fromkeys(("pretrained_strict", "pretrained_model_args"), Any),
}
"""What the builder takes besides the arguments of the model's class, and its types."""
FEATURE_ARGUMENTS = {"out_indices": int | Sequence, "feature_cls": Any, "output_fmt": str}
"""What it takes besides these with `features_only`."""
MODEL_ARGUMENTS = {"img_size", "output_stride"}
"""What every model takes besides the arguments of its class."""
TIMM_PREFIX = "va_"
"""What timm's registry has our names a second time with: these are ours there even if timm has models so called."""


@dataclass(frozen=True)
class Weights:
    """One set of published weights of a model, or of published figures where the weights were not released.

    Args:
        urls: where the file is, the most reliable place first.
        hf_hub_id: repository on the Hugging Face hub.
        top1: published ImageNet-1k top-1 accuracy in percent.
        img_size: image size of the evaluation in pixels.
        crop_pct: part of the resized short side that the evaluation crops.
        num_classes: classes of the published head.
        gmacs: multiply-adds in 1e9, where `img_size` is not the variant's.
        cfg: further entries of timm's `PretrainedCfg` (mean, std, crop_mode, ...).
        page: where the file can be fetched by hand, if it has no address of its own.
        note: what one must know to use them.
    """

    urls: tuple[str, ...] = ()
    hf_hub_id: str | None = None
    top1: float | None = None
    img_size: int = 224
    crop_pct: float = 0.875
    num_classes: int = 1000
    gmacs: float | None = None
    cfg: dict = field(default_factory=dict)
    page: str = ""
    note: str = ""


@dataclass(frozen=True)
class Family:
    """What the variants of a family have in common.

    Args:
        name: name of the family.
        papers: (title, arXiv id) pairs.
        origin: repository of the published code.
        license: licence of the published code and weights.
    """

    name: str
    papers: tuple[tuple[str, str], ...]
    origin: str
    license: str


@dataclass(frozen=True)
class Variant:
    """One named model.

    Args:
        kwargs: arguments of the model's class.
        gmacs: multiply-adds in 1e9 at the default image size, of linear maps, convolutions and attention products.
        weights: published weights by tag, the default first.
        recipe: facts of the published training recipe that belong to the variant, drop path rate above all.
        img_size: default image size in pixels.
        model: class of the model, where the family has several.
    """

    kwargs: dict
    gmacs: float
    weights: dict[str, Weights] = field(default_factory=dict)
    recipe: dict = field(default_factory=dict)
    img_size: int = 224
    model: type[nn.Module] | None = None


@dataclass(frozen=True)
class ModelInfo:
    """What `model_info` returns.

    Attributes:
        name: name of the model.
        family: name of its family.
        params: number of parameters, for which the model is made, without memory, when it is first asked for.
        gmacs: multiply-adds in 1e9 at `input_size`.
        input_size: (channels, height, width) of the default input.
        top1: published ImageNet-1k top-1 accuracy of the default weights in percent, None where there is none.
        weights: published weights by tag; `urls` and `hf_hub_id` say where they are.
        license: licence of the published code and weights.
        papers: (title, arXiv id) pairs.
        origin: repository of the published code.
        recipe: facts of the published training recipe.
    """

    name: str
    family: str
    gmacs: float | None
    input_size: tuple[int, int, int]
    top1: float | None
    weights: dict[str, Weights]
    license: str
    papers: tuple[tuple[str, str], ...]
    origin: str
    recipe: dict

    @property
    def params(self) -> int:
        return _count_parameters(self.name)


@dataclass(frozen=True)
class Entry:
    """What is registered under a name.

    Args:
        build: makes the model.
        takes: what has the arguments of the model in its signature: its class, or `build`.
        family: of the model, None for one of `register_model`; so are the others.
        variant: the model's own facts.
        cfgs: timm's configurations by tag.
    """

    build: Callable[..., nn.Module]
    takes: Callable[..., nn.Module]
    family: Family | None = None
    variant: Variant | None = None
    cfgs: dict[str, PretrainedCfg] = field(default_factory=dict)


_entries: dict[str, Entry] = {}
_aliases: dict[str, str] = {}
_plain_in_timm: set[str] = set()
_make: Callable[[str, dict[str, Any], bool], nn.Module]


def register_model(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Decorator that registers a function `build(pretrained=False, **kwargs)` as a model of the function's name.

    Args:
        build: makes the model.

    Returns:
        `build`, unchanged.

    Raises:
        VisionattnError: if the name is taken.
    """
    return _register(build.__name__, Entry(build, build)).build


def register_family(
    family: Family, model: type[nn.Module], variants: dict[str, Variant], aliases: dict[str, str] | None = None
) -> None:
    """Register the variants of a family, here and with timm: prefixed, and plainly where timm lacks the name.

    Args:
        family: what the variants have in common.
        model: class of the variants that name none.
        variants: variants by name.
        aliases: old names of variants.
    """
    module = sys.modules[model.__module__]
    for name, variant in variants.items():
        cls = variant.model or model
        cfgs = {tag: _pretrained_cfg(name, tag, family, variant, cls) for tag in variant.weights or {"": None}}
        entry = _register(name, Entry(_builder(name), cls, family, variant, cfgs))
        if not timm.is_model(name):
            _offer(module, name, entry.build, cfgs)
            _plain_in_timm.add(name)
        _offer(module, TIMM_PREFIX + name, _builder(name, {"architecture": TIMM_PREFIX + name}), cfgs)
    _aliases.update(aliases or {})


def _offer(module: ModuleType, name: str, build: Callable[..., nn.Module], cfgs: dict[str, PretrainedCfg]) -> None:
    """Register a model with timm."""
    build.__name__, build.__module__ = name, module.__name__
    tagged = {f"{name}.{tag}" if tag else name: cfg for tag, cfg in cfgs.items()}
    module.default_cfgs = getattr(module, "default_cfgs", {}) | generate_default_cfgs(tagged)
    register_with_timm(build)


def makes_variants(make: Callable[[str, dict[str, Any], bool], nn.Module]) -> Callable:
    """Decorator of the function that makes the models of families: create.py's, as it takes weights to do so.

    Args:
        make: takes registered name, arguments and whether to load the published weights.
    """
    global _make
    _make = make
    return make


def _builder(name: str, overlay: dict[str, str] | None = None) -> Callable[..., nn.Module]:
    """What makes a variant, under another name too, so that what timm saves of it is found again."""

    def build(pretrained: bool = False, **kwargs) -> nn.Module:
        given = kwargs.get("pretrained_cfg_overlay") or {}
        if overlay and isinstance(given, Mapping):  # others are refused where all arguments are
            kwargs["pretrained_cfg_overlay"] = overlay | given
        return _make(name, kwargs, pretrained)

    return build


def timm_name(name: str) -> str:
    """What timm, and what builds on it, knows a model of ours by: its name, prefixed if timm has another so called.

    Args:
        name: registered name, without a tag.
    """
    return name if name in _plain_in_timm else TIMM_PREFIX + name


def _register(name: str, entry: Entry) -> Entry:
    if name in _entries or name in _aliases:
        raise VisionattnError(f"a model named {name} is registered already")
    _entries[name] = entry
    return entry


def _pretrained_cfg(name: str, tag: str, family: Family, variant: Variant, cls: type[nn.Module]) -> PretrainedCfg:
    weights = variant.weights.get(tag, Weights(img_size=variant.img_size))
    size = weights.img_size
    patch = inspect.signature(cls).parameters.get("patch_size")
    stride = variant.kwargs.get("patch_size", 4 if patch is None else patch.default)
    if not issubclass(cls, Isotropic):
        stride *= 8  # of the map that is pooled, where it is not the grid of the patches
    facts = {
        "url": weights.urls[0] if weights.urls else None,
        "hf_hub_id": weights.hf_hub_id,
        "architecture": name,
        "tag": tag or None,
        "input_size": (3, size, size),
        "min_input_size": None,
        "pool_size": (-(-size // stride),) * 2,
        "num_classes": weights.num_classes,
        "crop_pct": weights.crop_pct,
        "interpolation": "bicubic",
        "first_conv": cls.first_conv,
        "classifier": cls.classifier,
        "license": family.license,
        "origin_url": family.origin,
        "paper_name": family.papers[0][0],
        "paper_ids": tuple(f"arXiv:{arxiv}" for _, arxiv in family.papers),
    }
    return PretrainedCfg(**facts | weights.cfg)


def tagged(name: str, tag: str, cfgs: dict[str, PretrainedCfg]) -> PretrainedCfg:
    """The configuration of a tag.

    Args:
        name: of the model.
        tag: of its weights.
        cfgs: configurations by tag.

    Raises:
        UnknownModelError: if there is none.
    """
    if tag not in cfgs:
        raise UnknownModelError(f"{name} has no weights tagged {tag}; it has {', '.join(filter(None, cfgs)) or 'none'}")
    return cfgs[tag]


def find(name: str) -> tuple[str, str, Entry]:
    """(name, tag, entry) of a model name with optional tag, aliases resolved.

    Args:
        name: registered name or alias, with or without a tag.

    Raises:
        UnknownModelError: if there is no such name.
    """
    base, _, tag = name.partition(".")
    plain = base.removeprefix(TIMM_PREFIX)
    base = plain if plain in _entries or plain in _aliases else base
    base = _aliases.get(base, base)
    if base not in _entries:
        near = difflib.get_close_matches(base, [*_entries, *_aliases], n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see visionattn.list_models()"
        raise UnknownModelError(f"unknown model {name}; {hint}")
    return base, tag, _entries[base]


def list_models(filter: str | Iterable[str] = "", pretrained: bool = False) -> list[str]:
    """Registered names, sorted.

    Args:
        filter: shell pattern or patterns, `"dinat_*"`; all names if empty.
        pretrained: only names with published weights, each with its tag.
    """
    patterns = [filter] if isinstance(filter, str) else list(filter)
    names = []
    for name, entry in _entries.items():
        if any(not p or fnmatch.fnmatch(name, p) for p in patterns or [""]):
            names += (
                [f"{name}.{tag}" for tag, cfg in entry.cfgs.items() if tag and cfg.has_weights]
                if pretrained
                else [name]
            )
    return sorted(names)


class _Undrawn(TorchFunctionMode):
    """Leaves tensors without memory as they are, where initialisation would write to them step by step."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        tensor = args[0] if args else (kwargs or {}).get("tensor")
        in_place = re.fullmatch(r"[a-z]\w*_", getattr(func, "__name__", ""))
        return tensor if in_place and isinstance(tensor, Tensor) and tensor.is_meta else func(*args, **kwargs or {})


@cache
def _count_parameters(name: str) -> int:
    with torch.device("meta"), _Undrawn():
        return sum(p.numel() for p in _entries[name].build().parameters())


def model_info(name: str) -> ModelInfo:
    """What is known of a model without its weights.

    Args:
        name: registered name with optional tag.

    Raises:
        UnknownModelError: if there is no such name or tag.
    """
    base, tag, entry = find(name)
    if entry.variant is None:
        return ModelInfo(base, "", None, (3, 224, 224), None, {}, "", (), "", {})
    cfg = tagged(base, tag, entry.cfgs) if tag else next(iter(entry.cfgs.values()))
    weights = entry.variant.weights
    chosen = weights[cfg.tag] if cfg.tag else Weights()
    family = entry.family
    return ModelInfo(
        name=base,
        family=family.name,
        gmacs=chosen.gmacs or entry.variant.gmacs,
        input_size=cfg.input_size,
        top1=chosen.top1,
        weights=weights,
        license=family.license,
        papers=family.papers,
        origin=family.origin,
        recipe=entry.variant.recipe,
    )
