"""Where in an image the evidence for a class is: Grad-CAM and attention rollout."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Isotropic
from ..backbone.base import output_of
from ..backbone.hierarchical import Stage
from ..errors import VisionattnError
from .capture import Images, Pass, as_batch, backbone_of, capture, evaluating, maps_of, watch
from .map import OF_TOKENS, ON_MAP, Map

TINY = 1e-30
LEAST = 4
"""Positions a side that a map has at least, to tell places apart."""


class Relevance(NamedTuple):
    """How much each place of images counts.

    Args:
        layer: what it was found at.
        values: (B, H, W) of the images, from 0 to 1.
        classes: (B,), what it counts for.
    """

    layer: str
    values: Tensor
    classes: Tensor


def cam_layers(model: nn.Module) -> list[str]:
    """Names of the stages and blocks that Grad-CAM can look at, from the first to the last.

    Args:
        model: one of ours.

    Raises:
        VisionattnError: if there are none.
    """
    names, backbone = {module: name for name, module in model.named_modules()}, backbone_of(model)
    if isinstance(backbone, Isotropic):
        # What the last block makes of the patches is no concern of a head that takes the class token.
        found = backbone.blocks[:-1] if backbone.global_pool == "token" else backbone.blocks
    else:
        stages = [module for module in model.modules() if isinstance(module, Stage)]
        found = [part for stage in stages for part in (*stage.blocks[:-1], stage)]
    if not len(found):
        raise VisionattnError("Grad-CAM looks at stages and blocks of our backbones: this model has none")
    return [names[part] for part in found]


def grad_cam(
    model: nn.Module, images: Images, target: int | Sequence[int] | None = None, layers: Sequence[str] = ()
) -> list[Relevance]:
    """Grad-CAM: the sum of a layer's channels, each weighted by its mean gradient, where that is positive.

    "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", arXiv 1610.02391.

    Args:
        model: a classifier; or a segmenter, whose score of a class is that of the pixels that it gives to it, or a
            detector, whose score of a class is that of the boxes of it that it finds.
        images: as for `attention_maps`.
        target: class, or one for each image; None for that with the highest score. Those of detectors count from 1.
        layers: some of `cam_layers(model)`; if empty the last one whose map has four positions a side, or the last.

    Returns:
        relevance at each of the layers.

    Raises:
        VisionattnError: if there is no such layer or class.
    """
    images = as_batch(model, images)
    cams, classes = _cams(model, images, target, layers)
    return [Relevance(name, _on_image(cam, images), classes) for name, cam in cams.items()]


def _cams(
    model: nn.Module, images: Tensor, target: int | Sequence[int] | None, layers: Sequence[str]
) -> tuple[dict[str, Tensor], Tensor]:
    """Grad-CAM (B, h, w) at each layer, and the classes."""
    known, modules, kept = cam_layers(model), dict(model.named_modules()), {}
    default, layers = not layers, list(layers) or known
    if unknown := [name for name in layers if name not in known]:
        raise VisionattnError(f"no layer {unknown[0]} for Grad-CAM: there are {', '.join(known)}")

    def keep(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        kept[name] = output_of(output)

    handles = [modules[name].register_forward_hook(partial(keep, name)) for name in layers]
    try:
        with evaluating(model), torch.enable_grad(), watch(model) as found:
            scores, classes = class_scores(model(images.detach().requires_grad_()), target)
            if default:
                sides = {name: min(found.grid or _side(modules[name], kept[name])) for name in known}
                layers = [name for name in known if sides[name] >= LEAST][-1:] or known[-1:]
            grads = torch.autograd.grad(scores.sum(), [kept[name] for name in layers])
    finally:
        for handle in handles:
            handle.remove()
    cams, backbone = {}, backbone_of(model)
    for name, grad in zip(layers, grads, strict=True):
        if isinstance(backbone, Isotropic):
            index = list(backbone.blocks).index(modules[name])
            maps = [backbone._split(x, index)[0].mT.unflatten(2, found.grid) for x in (kept[name].detach(), grad)]
        elif isinstance(modules[name], Stage):
            maps = [kept[name].detach(), grad]
        else:  # a block, whose maps have channels last
            maps = [x.permute(0, 3, 1, 2) for x in (kept[name].detach(), grad)]
        weights = maps[1].mean((2, 3), keepdim=True)
        cams[name] = (weights * maps[0]).sum(1).relu()
    return cams, classes


def _side(module: nn.Module, output: Tensor) -> tuple[int, int]:
    """Height and width of the map that a stage or a block made."""
    return tuple(output.shape[2:] if isinstance(module, Stage) else output.shape[1:3])


def class_scores(output: Any, target: int | Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Score (B,) of a class for each image, and the classes (B,).

    Args:
        output: of a model: logits (B, classes) of a classifier or (B, classes, H, W) of a segmenter, or what a detector
            finds in each image.
        target: class, or one for each image; None for that with the highest score, or with most pixels.

    Raises:
        VisionattnError: if there is no such class, or none was found.
    """
    if isinstance(output, list) and not all(isinstance(each, dict) for each in output):
        raise VisionattnError("expected a classifier, a segmenter or a detector, got an extractor of features")
    count = len(output)
    targets = [target] * count if target is None or isinstance(target, int) else list(target)
    if len(targets) != count:
        raise VisionattnError(f"expected a class for each of {count} images, got {len(targets)}")
    if isinstance(output, list):  # of a detector
        if lacking := [t for found, t in zip(output, targets, strict=True) if not _boxes(found, t).any()]:
            raise VisionattnError(
                "nothing was found" if lacking[0] is None else f"no box of class {lacking[0]} was found"
            )
        targets = [int(f["labels"][0]) if t is None else t for f, t in zip(output, targets, strict=True)]
        scores = [f["scores"][_boxes(f, t)].sum() for f, t in zip(output, targets, strict=True)]
        return torch.stack(scores), torch.tensor(targets)
    if output.ndim not in (2, 4):
        raise VisionattnError(f"expected logits (B, classes) or (B, classes, H, W), got {tuple(output.shape)}")
    chosen = output.argmax(1)
    best = chosen if output.ndim == 2 else chosen.flatten(1).mode(1).values
    classes = torch.tensor([int(b) if t is None else t for b, t in zip(best, targets, strict=True)], device=best.device)
    if outside := [t for t in classes.tolist() if not 0 <= t < output.shape[1]]:
        raise VisionattnError(f"expected a class from 0 to {output.shape[1] - 1}, got {outside[0]}")
    scores = output[torch.arange(count), classes]
    if output.ndim == 4:
        scores = (scores * (chosen == classes[:, None, None])).sum((1, 2))
    return scores, classes


def _boxes(found: dict[str, Tensor], target: int | None) -> Tensor:
    return found["labels"] == target if target is not None else found["labels"] > 0


def rollout(model: nn.Module, images: Images, target: int | Sequence[int] | None = None) -> list[Relevance]:
    """Attention rollout: how much each place of the image counts, by what all blocks weigh by.

    "Quantifying Attention Flow in Transformers", arXiv 2005.00928: the rows of (A + I) / 2, with A a layer's attention
    averaged over its heads, are multiplied from the last layer to the first. Weights of linear attention count by their
    size, shared so that rows sum to 1. Of that product one row is wanted, so that here one row is multiplied, and never
    a matrix:

        r <- (r + r A) / 2

    It begins at the class token where the head takes that, which is the paper's; elsewhere, since a mean over all
    places tells nothing apart, at the Grad-CAM of the last map. On maps it is drawn larger from stage to stage as the
    maps are. Where a block has no attention between places r is multiplied by the mean size of its gates instead, or
    convolved by that of its kernels: r <- (r + r g / mean(g)) / 2. Blocks that weigh no places, attention between
    channels for one, leave it as it is.

    Args:
        model: a classifier.
        images: as for `attention_maps`.
        target: class, or one for each image, that it begins with; None for that with the highest score. Of no effect
            where it begins at the class token.

    Returns:
        relevance before each layer, from the first to the last: the first one is the answer.

    Raises:
        VisionattnError: if no layer has maps, or there is no such class.
    """
    images, backbone = as_batch(model, images), backbone_of(model)
    with torch.no_grad(), evaluating(model), capture(model) as found:
        scores, classes = class_scores(model(images), target)
    if isinstance(backbone, Isotropic) and backbone.global_pool == "token":
        r, token = images.new_zeros(len(images), *found.grid), images.new_ones(len(images))
    else:
        cams, classes = _cams(model, images, target, ())
        r, token = _shared(*cams.values()), None
    steps = []
    with torch.no_grad(), evaluating(model):
        while found.calls:  # what a layer got is let go with it
            (maps,) = maps_of(model, Pass([found.calls.pop()]))
            r, token = _step(maps, r, token)
            steps.append(Relevance(maps[0].layer, _on_image(r, images), classes))
    return steps[::-1]


def _step(maps: list[Map], r: Tensor, token: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Relevance of places (B, H, W) and of the class token (B,) before a layer, of that after it."""
    if attention := [each for each in maps if each.kind == "attention" and "query_channel" not in each.axes]:
        return _attended(attention, r, token)
    if gates := [each.values.abs().mean(1) for each in maps if each.axes[-2:] == ("row", "col")]:
        r = _resized(r, gates[0].shape[1:])
        gated = sum(r * gate / gate.mean((1, 2), keepdim=True).clamp(min=TINY) for gate in gates) / len(gates)
        return _shared(r + gated), token
    if kernels := [each.values.abs().mean(1) for each in maps if each.kind == "kernel"]:
        kernel = kernels[0] / kernels[0].sum((1, 2), keepdim=True).clamp(min=TINY)
        spread = F.conv_transpose2d(r[None], kernel[:, None], padding=kernel.shape[-1] // 2, groups=len(r))
        return _shared(r + spread[0]), token
    return r, token


def _attended(maps: list[Map], r: Tensor, token: Tensor | None) -> tuple[Tensor, Tensor | None]:
    heads, size = sum(each.size("head") for each in maps), max(each.key_size for each in maps)
    total, own = 0, None
    for each in maps:
        if each.axes in (OF_TOKENS, ON_MAP):  # rows that a mask has shortened, or of linear attention
            sizes, keys = each.values.abs(), -1 if each.axes == OF_TOKENS else (-2, -1)
            each = replace(each, values=sizes / sizes.sum(keys, keepdim=True).clamp(min=TINY))
        spread, own = each.spread(_resized(r, each.queries), token)
        total = total + _resized(spread.sum(1), size) / heads
    r = _resized(r, size) + total
    if own is None:  # there is no class token yet
        return _shared(r), None
    token = own.mean(1) if token is None else token + own.mean(1)
    whole = (r.sum((1, 2)) + token).clamp(min=TINY)
    return r / whole[:, None, None], token / whole


def _shared(r: Tensor) -> Tensor:
    """Relevance (B, H, W) that sums to 1; the same everywhere where there is none."""
    r = r + (r.sum((1, 2), keepdim=True) <= TINY)
    return r / r.sum((1, 2), keepdim=True)


def _resized(r: Tensor, size: Sequence[int]) -> Tensor:
    """Relevance on a map of another size, with its sum."""
    if r.shape[1:] == tuple(size):
        return r
    resized = F.interpolate(r[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]
    return resized * (r.sum((1, 2)) / resized.sum((1, 2)).clamp(min=TINY))[:, None, None]


def _on_image(r: Tensor, images: Tensor) -> Tensor:
    """Relevance as large as the images, from 0 to 1."""
    r = F.interpolate(r[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return r / r.amax((1, 2), keepdim=True).clamp(min=TINY)
