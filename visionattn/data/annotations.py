"""What sets of annotated images share: objects, files and batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import VisionattnError, optional, user_input
from .config import DataConfig
from .images import ImageSet
from .loader import collate_tensors
from .paths import SYNONYMS, regular

IGNORED = 255
"""Value of the pixels of a semantic map that do not count."""


@dataclass
class Objects:
    """Objects of an image, in its own pixels.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2, where x2 - x1 is the width.
        labels: (N,) from 1 for the first class.
        crowd: (N,) 1 for regions that are not learnt from and where detections do not count; else 0.
        areas: (N,) in pixels, by which sizes are told apart.
        masks: (N, H, W) of 0 and 1, or None where they are not needed.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    masks: np.ndarray | None = None


def tight_boxes(masks: np.ndarray) -> np.ndarray:
    """Boxes around masks.

    Shape:
        (N, H, W), none of them empty, to (N, 4) as x1, y1, x2, y2.
    """
    edges = []
    for axis in (1, 2):  # columns, then rows
        hit = masks.any(axis)
        edges += [hit.argmax(1), hit.shape[1] - hit[:, ::-1].argmax(1)]
    return np.stack([edges[0], edges[2], edges[1], edges[3]], 1).astype(np.float64)


def open_upright(path: Path) -> Image.Image:
    """The image of a file, turned as its EXIF data say."""
    image = Image.open(regular(path))
    ImageOps.exif_transpose(image, in_place=True)
    return image


def check_size(image: Image.Image, size: tuple[int, int], where: object) -> None:
    """Raise an error unless the image has the height and width that its annotations in `where` say."""
    if (image.height, image.width) != size:
        raise VisionattnError(
            f"the image is {image.width} x {image.height}, but {size[1]} x {size[0]} according to {where}"
        )


def read_names(path: str | Path) -> list[str]:
    """Names of classes or of images, a line each; UTF-8, with or without the mark that Windows sets before it."""
    with user_input(f"cannot read {path}", OSError, UnicodeDecodeError):
        return [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines()]


def split_names(split: str) -> list[str]:
    """What a split may be called."""
    return [split, *(name for group in SYNONYMS if split in group for name in group if name != split)]


def kind_of(config: DataConfig) -> str:
    """scenes, folder or hfds: what the options name, or imply by giving a folder or none."""
    name = config.name or ("folder" if config.root is not None else "scenes")
    kind = name.partition("/")[0]
    if kind not in ("scenes", "folder", "hfds"):
        accepted = "scenes, folder or hfds/<Hugging Face dataset>"
        raise VisionattnError(f"unknown dataset {name}: data.name of detection and segmentation is {accepted}")
    if kind == "scenes" and config.root is not None:
        raise VisionattnError(f"scenes take no data.root: add --data.name folder to read {config.root}")
    return kind


def root_of(config: DataConfig) -> Path:
    """The folder of the data."""
    if config.root is None:
        raise VisionattnError("data.name folder needs data.root, the folder of the images and annotations")
    root = Path(config.root)
    if not root.is_dir():
        raise VisionattnError(f"data folder {root} does not exist")
    return root


def open_hub(config: DataConfig, split: str) -> Any:
    """A split of the Hugging Face dataset that data.name names, hfds/<name or folder>."""
    with optional():
        from datasets import load_dataset
    name = config.name.partition("/")[2]
    with user_input(f"cannot open dataset {name} ({split})", Exception):  # readers raise whatever they like
        return load_dataset(name, split=split, cache_dir=config.root)


def column(dataset: Any, kind: str, name: str, *candidates: str) -> str:
    """Name of a Hugging Face dataset's column: the first of the candidates that it has.

    Raises:
        VisionattnError: if it has none of them.
    """
    found = next((candidate for candidate in candidates if candidate in dataset.column_names), None)
    if found is None:
        has, expected = ", ".join(dataset.column_names), " or ".join(candidates)
        raise VisionattnError(f"dataset {name} has no column of {kind}: expected {expected}, found {has}")
    return found


def not_empty(images: ImageSet, what: str) -> ImageSet:
    """The images, of which there must be some."""
    if not len(images):
        raise VisionattnError(f"{images.name} holds no {what}")
    return images


def collate_lists(images: Sequence[Tensor], targets: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
    """A batch of images of any sizes."""
    return list(images), list(targets)


def collate_crops(images: Sequence[Tensor], targets: Sequence[Any]) -> tuple[Tensor, Any]:
    """A batch of images of one size."""
    if len({image.shape for image in images}) > 1:
        sizes = ", ".join(sorted({f"{image.shape[-1]} x {image.shape[-2]}" for image in images}))
        raise VisionattnError(f"images of a batch differ in size ({sizes}): set joint.crop to train on equal crops")
    return collate_tensors(images, targets)
