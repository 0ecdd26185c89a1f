"""CVAT's own XML, "CVAT for images": one file for all images, with boxes and polygons."""

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import VisionattnError, user_input
from .box_formats import is_box, is_number, number_of
from .faults import one
from .images import ImageSet
from .masks import check_mask
from .objects import Found, Wanted, image_set, known_classes, place_boxes, refuse_classes, size_of_file
from .paths import child, locate, refuse_outside, shown


def find_cvat(root: Path, splits: Sequence[str]) -> Found | None:
    """The images of a subset of annotations.xml, or all of them if it has no subsets.

    Args:
        root: the folder.
        splits: names of the split, the first as the options have it.
    """
    file = child(root, ["annotations.xml"], Path.is_file)
    if file is None:
        return None
    with user_input(f"cannot read {file}", OSError, ElementTree.ParseError, ValueError, LookupError):
        tree = ElementTree.parse(file).getroot()
    images = tree.findall("image")
    if tree.tag != "annotations" or not images:
        return None
    subsets = {image.get("subset", "default").casefold() for image in images}
    if subsets == {"default"}:
        return Found(partial(_read, root, file, tree, images), whole=True)
    mine = [image for image in images if image.get("subset", "default").casefold() in splits]
    return Found(partial(_read, root, file, tree, mine)) if mine else None


def _read(
    root: Path, file: Path, tree: ElementTree.Element, images: list[ElementTree.Element], wanted: Wanted
) -> ImageSet:
    refuse_classes(wanted, file)
    if wanted.annotations.box_format not in (None, "xyxy"):
        raise VisionattnError(f"{file} has boxes by their corners, in pixels: leave annotations.box_format out")
    found = [name.strip() for name in (label.findtext("name") for label in tree.iter("label")) if name]
    classes = known_classes(list(dict.fromkeys(found)), wanted.classes, file)
    label = {name: number for number, name in enumerate(classes, 1) if name in found}
    paths, objects = [], []
    for image in images:
        name, where = image.get("name", ""), f"{file}: image {shown(image.get('id'))}"
        subset = image.get("subset", "default")
        path = None
        with one():
            path = locate(name, [root / "images" / subset, root / "images", root / subset, root], root)
            if path is None:
                refuse_outside(name, root, f"{where} has the name")
        if path is None:
            continue
        sides = [number_of(image.get(side)) for side in ("height", "width")]
        size = [int(side) for side in sides if is_number(side) and side >= 1]
        size = size if len(size) == 2 else size_of_file(path)
        paths.append(path)
        shapes, items = [shape for shape in image if shape.tag != "tag"], []
        for number, shape in enumerate(shapes, 1):
            with one():
                items.append(_object(shape, label, size, wanted, f"{where}, {shape.tag} {number}"))
        objects.append((size, items))
    return image_set(paths, place_boxes(objects, wanted, "xyxy", file), wanted, classes, file)


def _object(
    shape: ElementTree.Element, label: dict[str, int], size: list[int] | None, wanted: Wanted, where: str
) -> dict[str, Any]:
    name = shape.get("label", "").strip()
    if name not in label:
        raise VisionattnError(f"{where} has the label {shown(name)}, which the file does not list")
    found: dict[str, Any] = {"label": label[name], "where": where}
    if shape.tag == "box":
        if wanted.masks:
            raise VisionattnError(f"{where} is a box: masks need polygons, or take another detector")
        box = [number_of(shape.get(edge)) for edge in ("xtl", "ytl", "xbr", "ybr")]
        if not is_box(box):
            raise VisionattnError(f"{where} has no four finite numbers (xtl, ytl, xbr, ybr)")
        return found | {"bbox": _turned(box, number_of(shape.get("rotation") or "0"))}
    if shape.tag != "polygon":
        raise VisionattnError(f"{where} is neither a box nor a polygon: export the annotations as COCO's JSON")
    points = [number_of(value) for pair in shape.get("points", "").split(";") for value in pair.split(",")]
    if len(points) < 6 or len(points) % 2 or not all(map(is_number, points)):
        raise VisionattnError(f"{where} has no three points of two finite numbers")
    found["bbox"] = [min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2])]
    return found | ({"segmentation": check_mask([points], size, where)} if wanted.masks else {})


def _turned(box: list[float], degrees: float | None) -> list[float]:
    """The box around one that is turned about its centre."""
    if not degrees or not is_number(degrees):
        return box
    sine, cosine = abs(math.sin(math.radians(degrees))), abs(math.cos(math.radians(degrees)))
    x1, y1, x2, y2 = box
    x, y, width, height = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 2, (y2 - y1) / 2
    width, height = cosine * width + sine * height, sine * width + cosine * height
    return [x - width, y - height, x + width, y + height]
