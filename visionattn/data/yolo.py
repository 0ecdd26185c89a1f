"""YOLO's text files: a line for each object, in a file for each image, as ultralytics, Roboflow, CVAT, labelImg and
Label Studio lay them out."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import VisionattnError, user_input
from .annotations import read_names
from .box_formats import is_number, number_of
from .faults import one
from .images import ImageSet
from .masks import check_mask
from .objects import Found, Wanted, image_set, known_classes, named_classes, place_boxes, refuse_classes, size_of_file
from .paths import SPLITS, child, find_files, locate, refuse_outside, shown

NAMES = ("classes.txt", "obj.names", "_darknet.labels", "labels/classes.txt", "images/classes.txt")
NOTHING = (None, "", "~", "null", "None")


class Description(NamedTuple):
    """What data.yaml, or CVAT's obj.data, says."""

    file: Path
    content: dict[str, Any]
    names: dict[int, str] | None


def find_yolo(root: Path, splits: Sequence[str]) -> Found | None:
    """The images of a split with text files to them, or all images.

    Args:
        root: the folder.
        splits: names of the split, the first as the options have it.
    """
    described = _described(root)
    if described is not None:
        content = described.content
        values = [content[name] for name in splits if content.get(name) not in NOTHING]
        is_all = described.file.suffix == ".data" and content.get("val") in NOTHING  # of what CVAT writes
        if is_all and content.get("train") not in NOTHING:
            return Found(partial(_read_described, root, described, content["train"]), whole=True)
        if values:
            return Found(partial(_read_described, root, described, values[0]))
    images = child(root, ["images"])
    for base in filter(None, (images, root)):
        if folder := child(base, splits):
            return _labelled(root, folder, described)
    if listed := child(root, [f"{name}.txt" for name in splits], Path.is_file):
        files = _listed(listed, root)
        return Found(partial(_read, root, files, listed, described)) if _has_labels(root, files) else None
    if child(root, SPLITS) or (images and child(images, SPLITS)):
        return None
    folder = images or child(root, ["obj_train_data"]) or root
    return _labelled(root, folder, described, whole=True)


def _labelled(root: Path, folder: Path, described: Description | None, whole: bool = False) -> Found | None:
    files = find_files(folder, deep=folder != root)
    if not _has_labels(root, files):
        return None
    return Found(partial(_read, root, files, folder, described), whole)


def _has_labels(root: Path, files: list[Path]) -> bool:
    return any(label_file(path, root).is_file() for path in files)


def label_file(image: Path, root: Path) -> Path:
    """The text file of an image: in labels/ where the image is in images/, else beside it."""
    parts = list(image.relative_to(root).parts) if image.is_relative_to(root) else [image.name]
    folders = [number for number, part in enumerate(parts[:-1]) if part.casefold() == "images"]
    if folders:
        labels = root.joinpath(*parts[: folders[-1]], "labels", *parts[folders[-1] + 1 :]).with_suffix(".txt")
        if labels.is_file() or not image.with_suffix(".txt").is_file():
            return labels
    return image.with_suffix(".txt")


def _described(root: Path) -> Description | None:
    """What the folder's YAML file says, or obj.data."""
    files = find_files(root, (".yaml", ".yml"), deep=False)
    files.sort(key=lambda path: path.stem not in ("data", "dataset"))
    for file in files:
        content = _read_yaml(file)
        if isinstance(content, dict) and "names" in content:
            return Description(file, content, _names(content, file))
    if (file := child(root, ["obj.data"], Path.is_file)) is None:
        return None
    content = dict(map(str.strip, line.split("=", 1)) for line in read_names(file) if "=" in line)
    return Description(file, content | ({"val": content["valid"]} if "valid" in content else {}), None)


def _read_yaml(file: Path) -> Any:
    import yaml

    with user_input(f"cannot read {file}", OSError, ValueError, RecursionError, TypeError, yaml.YAMLError):
        # All that is no list or mapping stays text: classes are called no, on and 1 too. Nothing is merged or built.
        return yaml.load(file.read_text("utf-8-sig"), yaml.BaseLoader)


def _names(content: dict[str, Any], file: Path) -> dict[int, str]:
    """Names of the classes by number."""
    names = content["names"]
    if isinstance(names, list):
        names = {str(number): name for number, name in enumerate(names)}
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) and name for name in names.values()):
        raise VisionattnError(
            f"{file} has the names {shown(names)}: expected a list of names, or a mapping from numbers"
        )
    if wrong := [key for key in names if not (isinstance(key, str) and key.isdecimal() and len(key) < 10)]:
        raise VisionattnError(f"{file} has a name for the class {shown(wrong[0])}: expected whole numbers from 0")
    numbered = {int(key): name for key, name in names.items()}
    count = content.get("nc")
    if count not in NOTHING and count != str(len(numbered)):
        raise VisionattnError(f"{file} has {len(numbered)} names, but nc: {shown(count)}")
    return dict(sorted(numbered.items()))


def _read_described(root: Path, described: Description, value: Any, wanted: Wanted) -> ImageSet:
    """Images of a value of data.yaml: a folder, a list in a text file, or several of them."""
    file, paths, base = described.file, [], described.content.get("path")
    base = locate(base, [root], root, os.path.isdir) if isinstance(base, str) else None
    for name in value if isinstance(value, list) else [value]:
        if not isinstance(name, str) or not name:
            raise VisionattnError(
                f"{file} has the path {shown(value)}: expected a folder, a text file, or a list of them"
            )
        place = locate(name, [base, root] if base else [root], root, os.path.exists)
        if place is None:
            refuse_outside(name, root, f"{file} has the path")
        paths += find_files(place) if place.is_dir() else _listed(place, root)
    if not _has_labels(root, paths):
        what = f"text files of boxes for the {len(paths)} images" if paths else "images"
        raise VisionattnError(f"{file}: {shown(value)} has no {what}: expected images/ and labels/ side by side")
    return _read(root, paths, file, described, wanted)


def _listed(listed: Path, root: Path) -> list[Path]:
    """Images of a text file with a path in each line."""
    paths = []
    for name in filter(None, read_names(listed)):
        with one():
            path = locate(name, [listed.parent, root], root)
            if path is None:
                refuse_outside(name, root, f"{listed} lists")
            paths.append(path)
    return paths


def _read(root: Path, paths: list[Path], origin: Path, described: Description | None, wanted: Wanted) -> ImageSet:
    if described is not None and described.names:
        refuse_classes(wanted, described.file)
        names = described.names
    else:
        given = named_classes(wanted.annotations, root, *NAMES, f"{origin.name}/_darknet.labels")
        if given is None:
            raise VisionattnError(
                f"{root} does not name its classes: add data.yaml with names, classes.txt with a name in each line, or "
                "give --annotations.classes FILE"
            )
        names = dict(enumerate(given))
    classes = known_classes(list(names.values()), wanted.classes, origin)
    position = {name: number for number, name in enumerate(classes, 1)}
    label = {number: position[name] for number, name in names.items()}
    points = described is not None and "kpt_shape" in described.content
    images = []
    for path in paths:
        size, file, items, lines = size_of_file(path), label_file(path, root), [], []
        if file.is_file():  # no file: nothing to be found in the image
            with one():
                lines = _lines(file)
        for number, line in lines:
            with one():
                items.append(_object(line, label, points, f"{file}: line {number}", size, wanted))
        images.append((size, items))
    return image_set(paths, place_boxes(images, wanted, "relative_cxcywh", origin), wanted, classes, origin)


def _lines(file: Path) -> list[tuple[int, list[str]]]:
    with user_input(f"cannot read {file}", OSError, UnicodeDecodeError):
        lines = file.read_text("utf-8-sig").splitlines()
    return [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]


def _object(
    line: list[str], label: dict[int, int], points: bool, where: str, size: list[int] | None, wanted: Wanted
) -> dict[str, Any]:
    """An object of a line: the class and a box, or the class and a polygon; key points are left out."""
    values = [number_of(text) for text in line]
    if wrong := [text for text, value in zip(line, values, strict=True) if not is_number(value)]:
        raise VisionattnError(f"{where} has {shown(wrong[0])}: expected finite numbers")
    number, box = values[0], values[1:]
    if number not in label:
        raise VisionattnError(f"{where} is of the class {shown(line[0])}, which has no name")
    if points and len(box) > 4:
        box = box[:4]
    found: dict[str, Any] = {"label": label[int(number)], "where": where}
    box_format = wanted.annotations.box_format or "relative_cxcywh"
    if len(box) == 4:
        if wanted.masks:
            raise VisionattnError(f"{where} is a box: masks need polygons, or take another detector")
        return found | {"bbox": box}
    if len(box) < 6 or len(box) % 2:
        raise VisionattnError(
            f"{where} has {len(line)} columns: expected a class and four numbers of a box, or pairs of a polygon"
        )
    xs, ys = box[::2], box[1::2]
    left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
    found["bbox"] = {
        "xywh": [left, top, right - left, bottom - top],
        "xyxy": [left, top, right, bottom],
        "cxcywh": [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top],
    }[box_format.removeprefix("relative_")]
    if wanted.masks and size is not None:
        sides = size[::-1] if box_format.startswith("relative") else (1, 1)
        polygon = [value * sides[number % 2] for number, value in enumerate(box)]
        found["segmentation"] = check_mask([polygon], size, where)
    return found
