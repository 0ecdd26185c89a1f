"""COCO's JSON, as COCO publishes it and as Roboflow, CVAT, Label Studio and others export it."""

import json
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import VisionattnError, user_input
from .box_formats import check_box, is_box, is_number
from .faults import goes_on, one
from .images import ImageSet
from .masks import check_mask
from .objects import Found, Wanted, image_set, known_classes, place_boxes, refuse_classes, size_of_file
from .paths import SPLITS, child, find_files, is_plain, locate, refuse_outside, shown

WHOLE = ["result", "_annotations.coco", "annotations", "labels", "coco", "instances_default", "default", "instances"]
"""What tools call a file of all images, which is not of any split."""


def find_coco(root: Path, splits: Sequence[str]) -> Found | None:
    """The file of a split in a folder, or the one of all images.

    Args:
        root: the folder.
        splits: names of the split, the first as the options have it.
    """
    for name in splits:
        if (folder := child(root, [name])) and (file := child(folder, ["_annotations.coco.json"], Path.is_file)):
            return Found(partial(_read, root, file, splits[0]))
        folder = root / "annotations"
        there = find_files(folder, (".json",), deep=False) if folder.is_dir() else []
        for pattern in (f"instances_{name}.json", f"{name}.json", f"instances_{name}[0-9]*.json"):
            found = [path for path in there if fnmatchcase(path.name.casefold(), pattern.casefold())]
            if len(found) > 1:
                many = ", ".join(path.name for path in found)
                raise VisionattnError(f"{folder} holds several files of {splits[0]} ({many}): name one by its split")
            if found:
                return Found(partial(_read, root, found[0], splits[0]))
    if child(root, SPLITS, lambda path: (path / "_annotations.coco.json").is_file()):
        return None
    if any(re.fullmatch(rf"(instances_)?({'|'.join(SPLITS)})\d*\.json", path.name.casefold()) for path in there):
        return None
    names = [f"{name}.json" for name in WHOLE]
    file = child(root / "annotations", names, Path.is_file) or child(root, names, Path.is_file)
    return Found(partial(_read, root, file, splits[0]), whole=True) if file else None


def _read(root: Path, file: Path, split: str, wanted: Wanted) -> ImageSet:
    """Images of a COCO file, labelled as in the classes of the model, of which it need not have all."""
    with user_input(f"cannot read {file}", OSError, ValueError, RecursionError):
        content = json.loads(file.read_bytes())  # UTF-8, with or without the mark that Windows sets before it
    if not isinstance(content, dict):
        raise VisionattnError(f"cannot read {file}: expected images, categories and annotations, got {shown(content)}")
    refuse_classes(wanted, file)
    images = _images(_entries(content, "images", file), file)
    items = _entries(content, "annotations", file, optional=True)
    keyed = {}
    for number, item in enumerate(items):
        with one():
            keyed[number] = _keys(item, number + 1, file)
    used = {category for _, _, category in keyed.values()}
    found, number_of = _categories(_entries(content, "categories", file), used, file)
    classes = known_classes(found, wanted.classes, file)
    position = {name: number for number, name in enumerate(classes, 1)}
    label = {key: position[found[number]] for key, number in number_of.items()}
    paths = dict(zip(images, _paths(list(images.values()), root, file, split), strict=True))
    sizes: dict[Any, list[int] | None] = dict.fromkeys(images)
    for key, image in images.items():
        with one():
            sizes[key] = _size(image, paths[key], f"{file}: image {shown(key)}")
    objects: dict[Any, list] = {key: [] for key in images}
    for number, (where, image, category) in keyed.items():
        with one():
            if image not in images:
                raise VisionattnError(f"{where} is of the image {shown(image)}, which the file does not list")
            if category not in label:
                raise VisionattnError(f"{where} is of the category {shown(category)}, which the file does not list")
            kept = _object(items[number], sizes[image], wanted, where)
            objects[image].append(kept | {"label": label[category], "where": where})
    records = place_boxes([(sizes[key], objects[key]) for key in images], wanted, "xywh", file)
    return image_set(list(paths.values()), records, wanted, classes, file)


def _entries(content: dict, name: str, file: Path, optional: bool = False) -> list[dict[str, Any]]:
    entries = content.get(name)
    if entries is None and optional:
        return []
    if not isinstance(entries, list):
        what = f"has no {name}" if name not in content else f"has the {name} {shown(entries)}"
        raise VisionattnError(f"cannot read {file}: it {what}, expected a list")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise VisionattnError(f"{file}: number {number} of the {name} is {shown(entry)}, expected a mapping")
    return entries


def _key(entry: dict[str, Any], name: str, where: str) -> int | str:
    """A number or text that identifies an image or category; whole numbers are the same as text and as fractions."""
    if name not in entry:
        raise VisionattnError(f"{where} has no {name}")
    value = entry[name]
    if isinstance(value, str) and re.fullmatch(r"\s*(0|-?[1-9]\d{0,17})\s*", value):
        return int(value)
    if isinstance(value, float) and value.is_integer() and is_number(value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise VisionattnError(f"{where} has the {name} {shown(value)}: expected a whole number or text")
    return value


def _keys(item: dict[str, Any], number: int, file: Path) -> tuple[str, int | str, int | str]:
    """What errors call an annotation, its image and its category."""
    where = f"{file}: annotation {shown(item['id'])}" if "id" in item else f"{file}: annotation number {number}"
    return where, _key(item, "image_id", where), _key(item, "category_id", where)


def _images(entries: list[dict[str, Any]], file: Path) -> dict[int | str, dict[str, Any]]:
    images: dict[int | str, dict[str, Any]] = {}
    for number, image in enumerate(entries, 1):
        with one():
            key = _key(image, "id", f"{file}: image number {number}")
            name, where = image.get("file_name"), f"{file}: image {shown(key)}"
            if not isinstance(name, str) or not name:
                what = f"has the file_name {shown(name)}: expected text" if "file_name" in image else "has no file_name"
                raise VisionattnError(f"{where} {what}")
            if key in images and images[key]["file_name"] != name:
                twice = f"{shown(images[key]['file_name'])} and {shown(name)}"
                raise VisionattnError(f"{where} is listed twice, as {twice}")
            images[key] = image
    return images


def _categories(
    entries: list[dict[str, Any]], used: set[int | str], file: Path
) -> tuple[list[str], dict[int | str, int]]:
    """Names of the classes, and the number of each category's.

    A category that no annotation uses and others have as their super-category is no class. One that has the name of
    another is the same class, if it is its super-category or at most one of them is used.
    """
    names, above = {}, {}
    for number, category in enumerate(entries, 1):
        key = _key(category, "id", f"{file}: category number {number}")
        name, where = category.get("name"), f"{file}: category {shown(key)}"
        name = str(name) if type(name) is int and is_number(name) else name
        if not isinstance(name, str):
            what = f"has the name {shown(name)}: expected text" if "name" in category else "has no name"
            raise VisionattnError(f"{where} {what}")
        if names.setdefault(key, name) != name:
            raise VisionattnError(f"{where} is listed twice, as {shown(names[key])} and {shown(name)}")
        above[key] = category.get("supercategory")
    below: dict[str, set[int | str]] = {}  # categories under each super-category
    for key, upper in above.items():
        if isinstance(upper, str):
            below.setdefault(upper, set()).add(key)
    uppers = {key for key, name in names.items() if below.get(name, {key}) - {key}}
    same: dict[str, list[int | str]] = {}
    for key in sorted(names, key=lambda key: (isinstance(key, str), key)):
        if key in used or key not in uppers:
            same.setdefault(names[key], []).append(key)
    for name, keys in same.items():
        if len(used.intersection(keys)) > 1 and not uppers.intersection(keys):
            raise VisionattnError(f"{file} has two categories of the name {shown(name)}")
    return list(same), {key: number for number, keys in enumerate(same.values()) for key in keys}


def _paths(images: list[dict[str, Any]], root: Path, file: Path, split: str) -> list[Path]:
    """Where the images are: names as they stand are looked for in the folder that has one of the first."""
    part = file.stem.removeprefix("instances_")
    named = [base / name for base in (root, root / "images") for name in (part, split)]
    folders = [file.parent, *named, root / "images", root, root / "data"]
    plain = [image["file_name"] for image in images if is_plain(image["file_name"])]
    few = [(folder, name) for name in plain[:20] for folder in folders]
    folder = next((folder for folder, name in few if os.path.isfile(folder / name)), None)
    paths, meant = [], {}
    for image in images:
        name = image["file_name"]
        if is_plain(name) and folder is not None:
            paths.append(folder / name)
            continue
        path = locate(name, folders, root)
        if path is None and goes_on():  # reading it says that it is missing
            paths.append(root / part / re.split(r"[/\\]", name)[-1])
            continue
        if path is None and is_plain(name):
            raise VisionattnError(
                f"{file} lists the image {shown(name)}, which is not in {root / part}, nor in other places"
            )
        if path is None:
            refuse_outside(name, root, f"{file}: image {shown(image['id'])} has the file_name")
        if meant.setdefault(path, name) != name:
            raise VisionattnError(f"{file}: both {shown(meant[path])} and {shown(name)} seem to be {path}")
        paths.append(path)
    return paths


def _size(image: dict[str, Any], path: Path, where: str) -> list[int] | None:
    """Height and width, of the file where the image does not say."""
    sides = []
    for name in ("height", "width"):
        side = image.get(name)
        if side is not None and (not is_number(side) or side < 0 or side != int(side)):
            raise VisionattnError(f"{where} has the {name} {shown(side)}: expected a whole number of pixels")
        sides.append(int(side or 0))
    return sides if all(sides) else size_of_file(path)


def _object(item: dict[str, Any], size: list[int] | None, wanted: Wanted, where: str) -> dict[str, Any]:
    """What is kept of an annotation, checked."""
    box, area, crowd = item.get("bbox"), item.get("area"), item.get("iscrowd")
    if not isinstance(box, list) or len(box) != 4 or not {type(value) for value in box} <= {int, float}:
        raise VisionattnError(f"{where} has no bbox of four numbers (x, y, width, height), but {shown(box)}")
    if not is_box(box):
        raise VisionattnError(
            f"{where} has the bbox {shown(box)}: expected finite numbers, width and height not below 0"
        )
    if wanted.annotations.box_format in (None, "xywh"):
        check_box(box, box, where)
    if area is not None and (type(area) not in (int, float) or not 0 <= area <= 1e18):
        raise VisionattnError(f"{where} has the area {shown(area)}: expected a number of pixels")
    if crowd not in (None, 0, 1):
        raise VisionattnError(f"{where} has the iscrowd {shown(crowd)}: expected 0 or 1")
    kept = {"bbox": box} | ({} if area is None else {"area": area}) | ({} if crowd is None else {"iscrowd": int(crowd)})
    if wanted.masks:
        kept["segmentation"] = check_mask(item.get("segmentation"), size, where)
    return kept
