"""Making models: the one place that knows names and places, backbones, weights and heads.

A name is looked up in the registry; a file or repository says itself which model it is of, and is checked first. What
makes a variant is what timm calls too.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.models import PretrainedCfg, build_model_with_cfg
from torch import nn

from .arguments import check_arguments, check_types, hints, made_with, with_meaning
from .backbone import Backbone, Hierarchical
from .backbone.extractors import extractor_class
from .errors import UnknownArgumentError, VisionattnError, optional
from .registry import BUILDER_ARGUMENTS, FEATURE_ARGUMENTS, MODEL_ARGUMENTS, find, list_models, makes_variants, tagged
from .weights import layouts
from .weights.description import Described, check_made, describe_place, is_place, load_described
from .weights.download import find_published
from .weights.layouts import load_pretrained

Loads = Sequence[Callable[[nn.Module], None]]
"""What loads weights to start from, one after the other."""


def create_model(
    name: str | os.PathLike[str],
    pretrained: bool | None = None,
    checkpoint_path: str = "",
    checkpoint_prefix: str = "",
    **kwargs: Any,
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
        the model, or a list-of-maps feature extractor with `features_only=True`. If the file is train.py's checkpoint
        of a detector or segmenter: that, with `**kwargs` those of `create_detector` or `create_segmenter` (another
        `num_classes` or `head` is then new); or with `features_only=True` the features of its backbone.

    Raises:
        UnknownModelError: if there is no such name or tag.
        UnknownArgumentError: if the model does not take one of the arguments, or not of that type.
        VisionattnError: if weights cannot be fetched or read, or do not fit, or a file does not name its model.
    """
    if checkpoint_prefix and not checkpoint_path:
        raise UnknownArgumentError("checkpoint_prefix chooses from what checkpoint_path holds: give both")
    check_types({"name": name}, {"name": str | os.PathLike}, "create_model takes ", " as")
    if not is_place(name := os.fspath(name)):
        return _make(name, kwargs, bool(pretrained), _loads(None, checkpoint_path, checkpoint_prefix))
    described = describe_place(name, kwargs.get("cache_dir"), pretrained is not False)
    headed = described.task != "classification" and not kwargs.get("features_only")
    create = _create_trained if headed else create_described
    return create(described, pretrained, checkpoint_path, checkpoint_prefix, **kwargs)


def create_described(
    described: Described,
    pretrained: bool | None = None,
    checkpoint_path: str = "",
    checkpoint_prefix: str = "",
    **kwargs: Any,
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
    loads = _loads(None if pretrained is False else described, checkpoint_path, checkpoint_prefix)
    return _make_described(described, kwargs, loads)


def create_detector(
    backbone: str | os.PathLike[str],
    head: str,
    num_classes: int,
    pretrained_backbone: bool | None = None,
    backbone_kwargs: dict[str, Any] | None = None,
    fpn_channels: int = 256,
    anchor_sizes: Sequence[int] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Create a detector: a head of torchvision's over a backbone of any family.

    It is called as torchvision's are, `detector(images, targets)` in training and `detector(images)` in evaluation; see
    `Detector`. Images come normalised and at the size to look at them; with `min_size` and `max_size` they are resized
    as in torchvision, with `image_mean` and `image_std` normalised. torchvision has no Cascade R-CNN, and so neither is
    there one here.

    Args:
        backbone: name of the backbone, as for `create_model`.
        head: "faster_rcnn", "mask_rcnn", "retinanet" or "fcos".
        num_classes: classes of objects, without the background; labels count from 1.
        pretrained_backbone: load the backbone's weights. None: as `create_model` does, for files and repositories only.
        backbone_kwargs: arguments of the backbone; `checkpoint_path` may also name a file of a published detector.
        fpn_channels: channels of the feature pyramid and the head of masks.
        anchor_sizes: side of the smallest anchor, in pixels, of each of the five levels: strides 4 to 64 for R-CNNs, 8
            to 128 for the others. For FCOS they set the sizes of the objects that a level finds. None: torchvision's.
        **kwargs: further options of torchvision's model (`box_score_thresh`, `box_detections_per_img`, ...).

    Returns:
        the detector, an instance of torchvision's class.

    Raises:
        UnknownModelError: if there is no such backbone.
        UnknownArgumentError: if backbone or head do not take one of the arguments.
        VisionattnError: if there is no such head.
    """
    with optional():  # whose libraries are heavy
        from .heads.detector import make_detector

    maps = partial(_make_maps, backbone, pretrained_backbone, backbone_kwargs)
    return make_detector(maps, head, num_classes, fpn_channels, anchor_sizes, **kwargs)


def create_segmenter(
    backbone: str | os.PathLike[str],
    head: str,
    num_classes: int,
    pretrained_backbone: bool | None = None,
    backbone_kwargs: dict[str, Any] | None = None,
    auxiliary: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Create a segmenter: a decoder of segmentation_models_pytorch over a backbone of any family.

    Args:
        backbone: name of the backbone, as for `create_model`.
        head: "upernet", "fpn" (semantic FPN), "segformer" or "unet".
        num_classes: number of classes, with the background if that is one.
        pretrained_backbone: load the backbone's weights. None: as `create_model` does, for files and repositories only.
        backbone_kwargs: arguments of the backbone; `checkpoint_path` may also name a file of a published segmenter.
        auxiliary: add a second, convolutional head on the map of stride 16. In training the model then returns the
            logits of both, for the published UPerNets' loss.
        **kwargs: options of the decoder (`decoder_channels`, `dropout`, `segmentation_channels`, ...).

    Raises:
        UnknownModelError: if there is no such backbone.
        UnknownArgumentError: if backbone or head do not take one of the arguments.
        VisionattnError: if there is no such head, or it cannot have such options.
    """
    with optional():
        from .heads.segmenter import make_segmenter

    maps = partial(_make_maps, backbone, pretrained_backbone, backbone_kwargs)
    return make_segmenter(maps, head, num_classes, auxiliary, **kwargs)


CREATE = {"detection": create_detector, "segmentation": create_segmenter}
"""What makes the models that are a head over a backbone, by the tasks of their checkpoints."""


def check_described(described: Described) -> None:
    """Refuse a place that holds other tensors than those of the model that it describes; see `check_made`."""
    if described.task == "classification":
        check_made(described, lambda: _make_described(described, {}))
    elif described.task in CREATE:
        check_made(described, lambda: _make_trained(described))
    else:
        known = f"expected one of classification, {', '.join(CREATE)}, got {described.task!r}"
        raise VisionattnError(f"{described.place}: entry task: {known}: name the model, with this as checkpoint_path")


def _loads(described: Described | None, checkpoint_path: str | os.PathLike, checkpoint_prefix: str) -> Loads:
    loads: list[Callable[[nn.Module], None]] = [] if described is None else [described.load]
    if checkpoint_path:
        loads.append(partial(load_described, path=checkpoint_path, checkpoint_prefix=checkpoint_prefix))
    return loads


def _make_described(described: Described, kwargs: dict[str, Any], loads: Loads = ()) -> nn.Module:
    overlay = described.cfg | (kwargs.get("pretrained_cfg_overlay") or {})
    return _make(described.name, described.kwargs | kwargs | {"pretrained_cfg_overlay": overlay}, False, loads)


def _make(name: str, kwargs: dict[str, Any], pretrained: bool, loads: Loads = ()) -> nn.Module:
    """A model by its name, with its published weights if they are asked for, and then with what else is loaded."""
    base, tag, entry = find(name)
    if tag:
        kwargs = kwargs | {"pretrained_cfg": tagged(base, tag, entry.cfgs)}
    if entry.variant is not None:
        return make_variant(base, kwargs, pretrained, loads)
    model = entry.build(pretrained=pretrained, **with_meaning(kwargs, entry.takes))
    for load in loads:
        load(model)
    return model


@makes_variants
def make_variant(name: str, kwargs: dict[str, Any], pretrained: bool = False, loads: Loads = ()) -> nn.Module:
    """A model of a family, by timm's builder.

    Args:
        name: registered name.
        kwargs: arguments of the model's class and of the builder.
        pretrained: load the published weights.
        loads: what else is loaded, after these.
    """
    _, _, entry = find(name)
    cls, variant, cfgs = entry.takes, entry.variant, entry.cfgs
    kwargs = with_meaning(kwargs, cls)
    features = kwargs.get("features_only")
    others = BUILDER_ARGUMENTS | (FEATURE_ARGUMENTS if features else {})
    check_types(kwargs, others, f"{name} takes ", " as")
    own = kwargs.keys() - others.keys()
    check_arguments(name, {key: kwargs[key] for key in own}, hints(cls).keys() | MODEL_ARGUMENTS, hints(cls))
    cfg = kwargs.pop("pretrained_cfg", None) or next(iter(cfgs))
    cfg = tagged(name, cfg, cfgs) if isinstance(cfg, str) else cfg
    cfg = cfg if isinstance(cfg, dict) else cfg.to_dict()
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    if pretrained:
        published = find_published(name, cfg, overlay, variant, kwargs.get("cache_dir"))
        loads = [partial(load_pretrained, weights=published), *loads]
    if loads and features:
        kwargs["num_classes"] = 0  # whatever the file's classes
    if (size := kwargs.get("img_size")) is not None:
        overlay = {"input_size": (cfg["input_size"][0], *_checked_size(size))} | overlay
        if "img_size" not in hints(cls):
            del kwargs["img_size"]
    feature_cfg = {"feature_cls": "list"} | cls.feature_cfg
    feature_cfg |= {key: kwargs.pop(key) for key in kwargs.keys() & FEATURE_ARGUMENTS}
    feature_cfg["feature_cls"] = extractor_class(feature_cfg["feature_cls"])
    output_stride = kwargs.pop("output_stride", None)
    chosen, pooled = set(kwargs), {}

    def construct(**kwargs) -> nn.Module:
        chosen_kwargs = {key: value for key, value in kwargs.items() if key in chosen}
        with made_with(name, chosen_kwargs):
            model = cls(**kwargs)
        model.pretrained_cfg = cfg
        model.check.name, model.made_as = name, variant.kwargs | chosen_kwargs
        if size and min(_checked_size(size)) < (least := model.check.size):
            raise UnknownArgumentError(f"{name} expects an img_size of at least {least}, got {size}")
        if output_stride is not None:
            _dilate(model, output_stride)
        for load in loads:
            load(model)
        prepared = overlay.get("input_size") or cfg.get("input_size") or PretrainedCfg.input_size
        pooled["pool_size"] = model.pool_size(prepared[1:])
        return model

    model = build_model_with_cfg(
        construct,
        name,
        False,  # timm's own loading knows one source and none of the layouts
        pretrained_cfg=cfg,
        pretrained_cfg_overlay=overlay,
        feature_cfg=feature_cfg,
        **variant.kwargs | kwargs,
    )
    model.pretrained_cfg["pool_size"] = overlay.get("pool_size") or pooled["pool_size"]
    return model


def _dilate(model: Backbone, output_stride: int) -> None:
    strides = [info["reduction"] for info in model.feature_info]
    if output_stride == strides[-1]:
        return
    if not model.dilates:
        entries = [find(name)[2] for name in list_models()]
        able = sorted({entry.family.name for entry in entries if getattr(entry.takes, "dilates", False)})
        raise VisionattnError(
            f"{model.check.name} has maps of strides {strides} and no others: output_stride {output_stride} needs a "
            f"pyramid of one of the families {', '.join(able)}"
        )
    model.dilate(output_stride)


def _checked_size(size: int | tuple[int, int]) -> tuple[int, int]:
    sizes = (size, size) if isinstance(size, int) else tuple(size)
    if len(sizes) != 2 or any(not isinstance(s, int) or s < 1 for s in sizes):
        raise UnknownArgumentError(f"expected img_size in pixels, one number or (height, width), got {size!r}")
    return sizes


def find_widths(
    state_dict: Mapping, name: str, model_kwargs: Mapping[str, Any], checkpoint_prefix: str = ""
) -> dict[str, int]:
    """The numbers of classes and input channels of a state dict, as arguments of a model, where they are not its own.

    Args:
        state_dict: tensors by name, possibly wrapped, in any layout of the model's family.
        name: of the model.
        model_kwargs: its other arguments.
        checkpoint_prefix: where in it the weights are, as for `create_model`.
    """
    with torch.device("meta"):
        return layouts.find_widths(state_dict, create_model(name, **model_kwargs), checkpoint_prefix)


def _make_maps(
    name: str | os.PathLike, pretrained: bool | None, kwargs: dict[str, Any] | None, strides: Sequence[int]
) -> nn.Module:
    """`FeatureMaps` of a backbone by what `create_model` takes; its `checkpoint_path` may be of a model with a head."""
    from .heads.pyramid import FeatureMaps

    name, kwargs = os.fspath(name), dict(kwargs or {})
    if headed := sorted({"num_classes", "features_only", "out_indices"} & kwargs.keys()):
        raise UnknownArgumentError(f"{name} as a backbone takes no {', '.join(headed)}")
    checkpoint, prefix = kwargs.pop("checkpoint_path", ""), kwargs.pop("checkpoint_prefix", "")
    described, kwargs["num_classes"] = None, 0
    if is_place(name):
        described = describe_place(name, kwargs.get("cache_dir"), pretrained is not False)
        check_described(described)
        backbone = _make_described(described, kwargs)
    else:
        backbone = _make(name, kwargs, bool(pretrained))
    if not isinstance(backbone, Backbone):
        raise VisionattnError(f"expected a backbone of visionattn's families, got {name}, a {type(backbone).__name__}")
    if isinstance(backbone, Hierarchical):
        backbone.add_feature_norms([i for i, info in enumerate(backbone.feature_info) if info["reduction"] in strides])
    for load in _loads(None if pretrained is False else described, checkpoint, prefix):
        load(backbone)  # after the norms of features, which the file may have
    return FeatureMaps(backbone, strides)


def _create_trained(
    described: Described, pretrained: bool | None, checkpoint_path: str, checkpoint_prefix: str, **kwargs
) -> nn.Module:
    """The detector or segmenter of a checkpoint of train.py.

    Under another head only the backbone's weights are its own; the classifier of other `num_classes` is new.
    """
    check_described(described)
    entries, model = described.entries, _make_trained(described, **kwargs)
    if pretrained is not False:
        described.load(model if kwargs.get("head") in (None, entries["head"]) else model.inner)
    if checkpoint_path:
        load_described(model, checkpoint_path, checkpoint_prefix)
    own = {key: entries["data"][key] for key in ("mean", "std") if entries["data"].get(key)}
    if kwargs.get("num_classes") in (None, len(entries["classes"])):
        own["label_names"] = entries["classes"]
    model.inner.pretrained_cfg = model.inner.pretrained_cfg | own
    return model


def _make_trained(
    described: Described,
    head: str | None = None,
    num_classes: int | None = None,
    backbone_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The model of a checkpoint without its weights; arguments are in place of its own, which hold under its head."""
    entries = described.entries
    options = entries["head_kwargs"] if head in (None, entries["head"]) else {}
    return CREATE[described.task](
        described.name,
        head or entries["head"],
        len(entries["classes"]) if num_classes is None else num_classes,
        backbone_kwargs=described.kwargs | (backbone_kwargs or {}),
        **options | kwargs,
    )
