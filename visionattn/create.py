"""Creating models: by names, by files and by repositories."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from .arguments import with_meaning
from .errors import UnknownArgumentError, UnknownModelError, optional
from .registry import Entry, find, tagged
from .weights.description import Described, check_made, describe_file, describe_repository, load_described

REPOSITORIES = ("hf-hub", "hf_hub", "local-dir")
FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")


def create_model(
    name: str | os.PathLike,
    pretrained: bool | None = None,
    checkpoint_path: str = "",
    checkpoint_prefix: str = "",
    **kwargs,
) -> nn.Module:
    """Create a model.

    Weights of the family that do not fit as they are, for other classes, channels, image or window sizes, are adapted;
    what was re-initialised, dropped or resized is logged in one line.

    Args:
        name: registered name with optional tag of its weights, `dinat_small` or `dinat_small.in1k`; or what names model
            and weights: `path/to/file.safetensors` of `visionattn convert` or train.py, `hf-hub:user/repository` or
            `local-dir:folder`. What these say is checked before anything is made by it.
        pretrained: load the weights, the published ones of the tag or of the first one for a registered name. None:
            no for a registered name, yes for files and repositories.
        checkpoint_path: file, or folder with one, to load in any published layout of the family, as any training
            framework wraps it; after `pretrained`. Of a detector or segmenter, ours or others', the backbone is taken.
        checkpoint_prefix: where in that file the weights are, "student" for one, if there are several that fit equally
            well.
        **kwargs: arguments of the model's class (`num_classes`, `in_chans`, `drop_path_rate`, ...) and of timm's
            builder (`features_only`, `out_indices`, ...). None is passed on where the class has a use for it, such as
            `layer_scale=None`; elsewhere it stands for the default. `img_size` is the size that position tables are
            made for, where a model has some, and the one that its data are prepared at; `output_stride` the stride of
            the last map, smaller than the published one where the family's blocks can be dilated.

    Returns:
        The model, or a list-of-maps feature extractor with `features_only=True`. If the file is train.py's checkpoint
        of a detector or segmenter: that, with `**kwargs` those of `create_detector` or `create_segmenter` (another
        `num_classes` or `head` is then new); or with `features_only=True` the features of its backbone.

    Raises:
        UnknownModelError: if there is no such name or tag.
        UnknownArgumentError: if the model does not take one of the arguments, or not of that type.
        VisionattnError: if weights cannot be fetched or read, or do not fit, or a file does not name its model.
    """
    if checkpoint_prefix and not checkpoint_path:
        raise UnknownArgumentError("checkpoint_prefix chooses from what checkpoint_path holds: give both")
    if not is_place(name := os.fspath(name)):
        base, tag, entry = find(name)
        if tag:
            kwargs["pretrained_cfg"] = tagged(base, tag, entry.cfgs)
        load = partial(load_described, path=checkpoint_path, checkpoint_prefix=checkpoint_prefix)
        load = load if checkpoint_path else None
        return _make(entry, bool(pretrained), load, kwargs)
    described = describe_place(name, kwargs.get("cache_dir"), pretrained is not False)
    if described.task != "classification" and not kwargs.get("features_only"):
        with optional():
            from .heads.trained import create_trained  # whose libraries are heavy

        return create_trained(described, pretrained is not False, checkpoint_path, checkpoint_prefix, **kwargs)
    return create_described(described, pretrained, checkpoint_path, checkpoint_prefix, **kwargs)


def create_described(
    described: Described,
    pretrained: bool | None = None,
    checkpoint_path: str = "",
    checkpoint_prefix: str = "",
    **kwargs,
) -> nn.Module:
    """The classifier or feature extractor that a place describes, or that has the backbone it describes.

    Args:
        described: what the place says.
        pretrained: load its weights, unless it is False.
        checkpoint_path: file to load after those.
        checkpoint_prefix: where in that file the weights are, as for `create_model`.
        **kwargs: in place of the arguments that the place says.
    """
    check_described(described)

    def start(model: nn.Module) -> None:
        if pretrained is not False:
            described.load(model)
        if checkpoint_path:
            load_described(model, checkpoint_path, checkpoint_prefix)

    return make_described(described, start if pretrained is not False or checkpoint_path else None, **kwargs)


def is_place(name: str) -> bool:
    """Whether a name is that of a file or a repository, which say themselves which model they are of.

    Args:
        name: what `create_model` takes.
    """
    return ":" in name or name.endswith(FILE_SUFFIXES)


def describe_place(name: str, cache_dir: str | None = None, weights: bool = True) -> Described:
    """What a file or a repository says of its model.

    Args:
        name: of the file or repository.
        cache_dir: folder for downloads; None for the usual ones.
        weights: read the weights of a repository too.

    Raises:
        UnknownModelError: if it is neither.
        VisionattnError: if it cannot be read, or what it says cannot be.
    """
    kind = name.partition(":")[0]
    if kind in REPOSITORIES:
        return describe_repository(name, cache_dir, weights)
    if name.endswith(FILE_SUFFIXES):
        return describe_file(name)
    raise UnknownModelError(f"unknown model {name}: expected a name, a file, hf-hub:... or local-dir:...")


def plain_name(name: str) -> str:
    """The registered name of a model that a file or a repository is of; other names as they are.

    Args:
        name: what `create_model` takes.
    """
    return describe_place(name, weights=False).name if is_place(name) else name


def check_described(described: Described) -> None:
    """Refuse a place that holds other tensors than those of the model that it describes; see `check_made`."""
    if described.task == "classification":
        check_made(described, lambda: make_described(described, None))
    else:
        with optional():
            from .heads.trained import make_trained

        check_made(described, lambda: make_trained(described))


def make_described(described: Described, start: Callable[[nn.Module], None] | None, **kwargs) -> nn.Module:
    """The classifier or backbone that a place describes, without its weights.

    Args:
        described: what the place says.
        start: loads weights.
        **kwargs: in place of the arguments that the place says.
    """
    base, tag, entry = find(described.name)
    if tag:
        kwargs["pretrained_cfg"] = tagged(base, tag, entry.cfgs)
    overlay = described.cfg | (kwargs.get("pretrained_cfg_overlay") or {})
    return _make(entry, False, start, described.kwargs | kwargs | {"pretrained_cfg_overlay": overlay})


def _make(
    entry: Entry, pretrained: bool, start: Callable[[nn.Module], None] | None, kwargs: dict[str, Any]
) -> nn.Module:
    if entry.variant is not None:
        return entry.build(pretrained=pretrained, start=start, **kwargs)
    model = entry.build(pretrained=pretrained, **with_meaning(kwargs, entry.takes))
    if start is not None:
        start(model)
    return model
