"""Images and their annotations, augmented together. The one module that knows albumentations.

Published schedules are settings of `JointConfig`: Mask R-CNN's 1x is min_size [800], hflip 0.5; multi-scale ones draw
min_size from [480, 512, ..., 800], often with detr_crop 0.5; large-scale jitter is min_size [1024], max_size 1024,
scale [0.1, 2.0], crop 1024; ADE20K's is min_size [512], max_size 2048, scale [0.5, 2.0], crop 512, max_class_share
0.75, hflip 0.5, photometric 0.5.
"""

import os
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .annotations import IGNORED, Objects, tight_boxes
from .config import JointConfig
from .preprocessing import EXTREME

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # importing it would ask the network for a newer version

import albumentations as A  # noqa: E402
import cv2  # noqa: E402

cv2.setNumThreads(0)  # loading processes share the cores already

RESAMPLING = {"area_for_downscale": "image", "mask_interpolation": cv2.INTER_NEAREST_EXACT}
"""Images are averaged as they shrink; the plain nearest pixel would shift masks by half a pixel."""


class _Rescale(A.SmallestMaxSize):
    """To a shorter side of the list, unless that makes the longer one more than `longest`; then by a random factor."""

    longest, factors = 0, (1.0, 1.0)

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = params["shape"][:2]
        scale = min(self.py_random.choice(self.max_size) / min(height, width), self.longest / max(height, width))
        return {"scale": scale * self.py_random.uniform(*self.factors)}


class _Shorter(A.SmallestMaxSize):
    """To a shorter side of the list, unless that makes a very long one of an image of extreme shape."""

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        drawn = super().get_params_dependent_on_data(params, data)
        longest = EXTREME * max(self.max_size)
        return {"scale": min(drawn["scale"], longest / max(params["shape"][:2]))}


class _Scale(A.RandomScale):
    """By a random factor, which leaves at least one pixel."""

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        factor = 1 + self.py_random.uniform(*self.scale_limit)
        return {"scale": max(factor, 1.001 / min(params["shape"][:2]))}

    def get_params(self) -> dict[str, Any]:
        return {}


class _RangeCrop(A.RandomCrop):
    """A part of random height and width between 384 and 600 pixels, as DETR takes it; less only of smaller images."""

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        full_height, full_width = params["shape"][:2]
        height, width = (self.py_random.randint(min(side, 384), min(side, 600)) for side in (full_height, full_width))
        top, left = self.py_random.randint(0, full_height - height), self.py_random.randint(0, full_width - width)
        return {"crop_coords": (left, top, left + width, top + height), "pad_params": None}


class _BalancedCrop(A.RandomCrop):
    """A random part in which no class fills more than a share of the pixels that count, if ten draws find one."""

    most = 1.0

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        for _ in range(10):
            drawn = super().get_params_dependent_on_data(params, data)
            left, top, right, bottom = drawn["crop_coords"]  # in the padded image, whose padding does not count
            counts = np.bincount(data["mask"][top:bottom, left:right].ravel(), minlength=IGNORED + 1)[:IGNORED]
            if self.most == 1 or (np.count_nonzero(counts) > 1 and counts.max() < self.most * counts.sum()):
                break
        return drawn


class ObjectTransform:
    """Image and `Objects` to tensors.

    Args:
        joint: what to do.
        mean: of the channels, for normalisation.
        std: of the channels, for normalisation.
        training: augment, and give what is learnt from: no crowds, and boxes within the image. Else the image is
            resized, and the objects stay as they are in the image's own pixels.

    Returns:
        the image (C, H, W) and a dictionary: "boxes" (N, 4), "labels" (N,) and if there are masks "masks" (N, H, W);
        in validation also "iscrowd", "area" (N,) and "size", the image's own height and width.
    """

    def __init__(self, joint: JointConfig, mean: Sequence[float], std: Sequence[float], training: bool) -> None:
        self.mean, self.std, self.training = mean, std, training
        steps: list[A.BasicTransform | A.Sequential] = []
        if training and joint.detr_crop:
            before = [_Shorter([400, 500, 600], **RESAMPLING), _RangeCrop(600, 600)]
            steps.append(A.Sequential(before, p=joint.detr_crop))
        steps += _resize(joint, training)
        self.crops = training and bool(joint.crop or joint.detr_crop)
        if training and joint.crop:
            steps.append(_crop(A.RandomCrop, joint.crop, mean, 0))
        if training:
            steps += _flip(joint) + _photometric(joint)
        boxes = A.BboxParams("pascal_voc", ["index"], clip=True, filter_invalid_bboxes=True, min_width=1, min_height=1)
        # Boxes are looked after even if nothing is to be done to them, but not without any step.
        self.steps = A.Compose(steps or [A.NoOp()], boxes if training else None)

    def image(self, image: Image.Image) -> Tensor:
        """An image without objects, in validation."""
        return _normalised(self.steps(image=_pixels(image))["image"], self.mean, self.std)

    def __call__(self, image: Image.Image, target: Objects) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.training:
            given = {"boxes": target.boxes, "labels": target.labels, "iscrowd": target.crowd, "area": target.areas}
            if target.masks is not None:
                given["masks"] = target.masks
            given["size"] = np.array([image.height, image.width])
            return self.image(image), {k: torch.from_numpy(v) for k, v in given.items()}
        chosen = np.flatnonzero(target.crowd == 0)
        given = {"image": _pixels(image), "bboxes": target.boxes[chosen], "index": chosen}
        has_masks = target.masks is not None
        if has_masks and len(chosen):
            given["masks"] = target.masks
        _seed(self.steps)
        made = self.steps(**given)
        image_tensor = _normalised(made["image"], self.mean, self.std)
        index = np.asarray(made["index"], np.int64)
        boxes = np.asarray(made["bboxes"], np.float32).reshape(-1, 4)
        labels = target.labels[index]
        if not has_masks:
            return image_tensor, {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)}
        masks = np.zeros((0, *made["image"].shape[:2]), np.uint8)
        if len(index):
            masks = np.asarray(made["masks"])[index]
            visible = masks.any((1, 2))
            masks, boxes, labels = masks[visible], boxes[visible], labels[visible]
            if self.crops:  # what is left of an object may have a smaller box than what is left of its box
                boxes = tight_boxes(masks).astype(np.float32)
        made = {"boxes": boxes, "labels": labels, "masks": masks}
        return image_tensor, {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in made.items()}


class MapTransform:
    """Image and semantic map to tensors.

    Args:
        joint: what to do.
        mean: of the channels, for normalisation.
        std: of the channels, for normalisation.
        training: augment both. Else the image is resized, and the map stays as it is.

    Shape:
        Image and (h, w) to (C, H, W) and (H, W).
    """

    def __init__(self, joint: JointConfig, mean: Sequence[float], std: Sequence[float], training: bool) -> None:
        self.mean, self.std, self.training = mean, std, training
        steps = _resize(joint, training)
        if training:
            if joint.crop:
                crop = _crop(_BalancedCrop, joint.crop, mean, IGNORED)
                crop.most = joint.max_class_share
                steps.append(crop)
            steps += _flip(joint) + _photometric(joint)
        self.steps = A.Compose(steps)

    def image(self, image: Image.Image) -> Tensor:
        """An image without a map, in validation."""
        return _normalised(self.steps(image=_pixels(image))["image"], self.mean, self.std)

    def __call__(self, image: Image.Image, target: np.ndarray) -> tuple[Tensor, Tensor]:
        if not self.training:
            return self.image(image), torch.from_numpy(target.astype(np.int64))
        _seed(self.steps)
        made = self.steps(image=_pixels(image), mask=target)
        return _normalised(made["image"], self.mean, self.std), torch.from_numpy(made["mask"].astype(np.int64))


def _seed(steps: A.Compose) -> None:
    """Let albumentations, which has generators of its own, draw as those say that the loader seeds for each sample.

    Its steps share the generators: `set_random_seed` would give each its own of one seed, and so draw the same for all.
    """
    seed = random.getrandbits(64)
    steps.set_random_state(np.random.default_rng(seed), random.Random(seed))


def _resize(joint: JointConfig, training: bool) -> list[A.BasicTransform]:
    sizes, factors = list(joint.min_size or ()), joint.scale
    if not training:
        sizes, factors = [joint.eval_size] if joint.eval_size else sorted(sizes)[-1:], (1.0, 1.0)
    if sizes:
        step = _Rescale(sizes, **RESAMPLING)
        step.longest, step.factors = joint.max_size, factors
        return [step]
    low, high = factors
    return [_Scale((low - 1, high - 1), **RESAMPLING, p=1)] if factors != (1, 1) else []


def _crop(kind: type[A.RandomCrop], size: int | tuple[int, int], mean: Sequence[float], fill: int) -> A.RandomCrop:
    height, width = (size, size) if isinstance(size, int) else size
    colour = tuple(round(255 * value) for value in mean)
    return kind(height, width, pad_if_needed=True, pad_position="top_left", fill=colour, fill_mask=fill)


def _flip(joint: JointConfig) -> list[A.BasicTransform]:
    return [A.HorizontalFlip(p=joint.hflip)] if joint.hflip else []


def _photometric(joint: JointConfig) -> list[A.BasicTransform]:
    """The changes and their strengths of SSD's photometric distortion, which segmentation took over."""
    none, strengths = (1.0, 1.0), [("contrast", (0.5, 1.5)), ("saturation", (0.5, 1.5)), ("hue", (-0.1, 0.1))]
    if not joint.photometric:
        return []
    still = {"brightness": none, "contrast": none, "saturation": none, "hue": (0.0, 0.0)}
    steps = [A.ColorJitter(**still | {name: strength}, p=joint.photometric) for name, strength in strengths]
    return [A.RandomBrightnessContrast(32 / 255, 0, brightness_by_max=True, p=joint.photometric), *steps]


def _pixels(image: Image.Image) -> np.ndarray:
    pixels = np.array(image)  # a copy, which may be written to
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _normalised(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    if pixels.ndim == 2:  # OpenCV drops the axis of a single channel
        pixels = pixels[..., None]
    tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().div_(255)
    return tensor.sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])
