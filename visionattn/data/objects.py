"""Image files and the objects in them, whatever the layout they were read from."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from ..errors import VisionattnError
from .annotations import Objects, check_size, open_upright, read_names
from .box_formats import check_box, check_format, to_xywh
from .config import AnnotationConfig
from .faults import one
from .images import ImageSet
from .masks import decode
from .paths import child, regular


class Found(NamedTuple):
    """Annotations that a folder holds."""

    read: "Callable[[Wanted], ImageSet]"
    whole: bool = False
    """They are of all images, not of a split."""


class Wanted(NamedTuple):
    """What is to be read from a layout."""

    annotations: AnnotationConfig
    masks: bool
    classes: list[str] | None
    """Of the model, which the data may not exceed; None: those of the data."""


class AnnotatedFiles:
    """Image files and their objects.

    Args:
        paths: of the images.
        records: of each image as COCO's JSON has it, {"size": [height, width], "objects": [...]}, where `label` counts
            classes from 1; without a size where the file could not be read either. They are kept as text, since loading
            processes copy Python's objects as they look at them.
        masks: decode the masks too.
        origin: what the records are from, for errors.
    """

    def __init__(self, paths: Sequence[Path], records: Sequence[dict[str, Any]], masks: bool, origin: Path) -> None:
        self.paths, self.masks, self.origin = paths, masks, origin
        self.records = [json.dumps(record).encode() for record in records]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, Objects]:
        record = json.loads(self.records[index])
        image = open_upright(self.paths[index])
        if record["size"] is None:
            raise VisionattnError("its size could not be read when the annotations were")
        check_size(image, tuple(record["size"]), self.origin)
        return image, to_objects(record["objects"], (image.height, image.width), self.masks)

    def filename(self, index: int, **kwargs: Any) -> str:
        """The path of an image."""
        return str(self.paths[index])


def to_objects(items: list[dict[str, Any]], size: tuple[int, int], masks: bool) -> Objects:
    """Objects of an image.

    Args:
        items: as the records of `AnnotatedFiles` have them.
        size: height and width of the image.
        masks: decode the masks too.
    """
    boxes = np.array([item["bbox"] for item in items], np.float64).reshape(-1, 4)
    areas = np.array([item.get("area", item["bbox"][2] * item["bbox"][3]) for item in items], np.float64)
    boxes[:, 2:] += boxes[:, :2]
    labels = np.array([item["label"] for item in items], np.int64)
    crowd = np.array([item.get("iscrowd", 0) for item in items], np.int64)
    shapes = None
    if masks:
        shapes = np.zeros((len(items), *size), np.uint8)
        for i, item in enumerate(items):
            shapes[i] = decode(item["segmentation"], size)
    return Objects(boxes, labels, crowd, areas, shapes)


def place_boxes(
    images: Sequence[tuple[list[int] | None, list[dict[str, Any]]]],
    wanted: Wanted,
    default: str,
    origin: object,
    from_one: bool = False,
) -> list[dict[str, Any]]:
    """Records of images whose objects have boxes as they are written.

    Args:
        images: size (height, width), if known, and objects of each, with the key "where" for errors.
        wanted: says how boxes are written, if not as such annotations have them.
        default: how such annotations have them.
        origin: they are from, for errors.
        from_one: corners are pixels, counted from 1.

    Raises:
        VisionattnError: a box has a negative side, or many are not what they are read as.
    """
    written = [(item["bbox"], size) for size, items in images for item in items if not item.get("iscrowd")]
    boxes, sizes = zip(*written, strict=True) if written else ((), ())
    box_format = wanted.annotations.box_format or default
    with one():
        box_format = check_format(boxes, sizes, wanted.annotations.box_format, default, origin)
    records = []
    for size, items in images:
        if size is None and box_format.startswith("relative"):
            items = []  # the image cannot be read, as will be told where it is loaded
        kept = []
        for item in items:
            where, written = item.pop("where"), item["bbox"]
            x, y, width, height = to_xywh(written, box_format, size)
            box = [x - 1, y - 1, width + 1, height + 1] if from_one else [x, y, width, height]
            with one():
                check_box(box, written, where)
                kept.append(item | {"bbox": box})
        records.append({"size": size, "objects": kept})
    return records


def size_of_file(file: Path | BinaryIO) -> list[int] | None:
    """Height and width of an image as `open_upright` gives it, from the head of its file; None if it has none."""
    try:
        with Image.open(regular(file) if isinstance(file, Path) else file) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return [image.width, image.height] if turned else [image.height, image.width]
    except Exception:  # decoders raise whatever they like; loading tells it with the name
        return None


def known_classes(found: list[str], classes: list[str] | None, where: object) -> list[str]:
    """The classes of the model, or those found if there is none yet.

    Raises:
        VisionattnError: if the model lacks some of them, or two have one name.
    """
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise VisionattnError(f"{where} has two categories of the name {twice}")
    if classes is None:
        return found
    if unknown := sorted(set(found) - set(classes)):
        raise VisionattnError(f"{where} has classes that the model is not trained on: {', '.join(unknown[:5])}")
    return classes


def named_classes(annotations: AnnotationConfig, root: Path | None = None, *files: str) -> list[str] | None:
    """Names of the classes that the options give, or the first of some files in the folder, a line each.

    Raises:
        VisionattnError: a line between others is empty, so that the rest may be numbered wrongly.
    """
    file = annotations.classes or (root and child(root, files, Path.is_file))
    if not file:
        return None
    names = read_names(file)
    while names and not names[-1]:
        names.pop()
    if "" in names:
        raise VisionattnError(f"{file} has an empty line {names.index('') + 1}: expected the name of a class in each")
    return names


def refuse_classes(wanted: Wanted, file: object) -> None:
    """Raise an error if the options name classes that the data name themselves."""
    if wanted.annotations.classes:
        raise VisionattnError(f"annotations.classes would change nothing: {file} names the classes itself")


def image_set(paths: list[Path], records: list[dict], wanted: Wanted, classes: list[str], origin: Path) -> ImageSet:
    """The images of a layout."""
    return ImageSet(AnnotatedFiles(paths, records, wanted.masks, origin), range(len(paths)), list(classes), str(origin))
