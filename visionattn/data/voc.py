"""Pascal VOC's XML: as published, and as labelImg, Roboflow, CVAT and Label Studio write it."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import VisionattnError, user_input
from .annotations import read_names
from .box_formats import is_box, number_of
from .faults import one
from .images import ImageSet
from .objects import Found, Wanted, image_set, known_classes, named_classes, place_boxes, size_of_file
from .paths import EXTENSIONS, SPLITS, child, find_files, is_plain, locate, refuse_outside, shown

VOC_CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip
ORDER = [".jpg", *(kind for kind in EXTENSIONS if kind != ".jpg")]
HARD = {"": 0, "0": 0, "false": 0, "no": 0, "unspecified": 0, "unknown": 0, "1": 1, "true": 1, "yes": 1}


def find_voc(root: Path, splits: Sequence[str]) -> Found | None:
    """The list of a split of a VOC folder, or all its annotations if it has no lists.

    Args:
        root: the folder.
        splits: names of the split, the first as the options have it.
    """
    if not ((root / "JPEGImages").is_dir() and (root / "Annotations").is_dir()):
        return None
    if listed := find_list(root, "Main", splits):
        return Found(partial(_read_listed, root, listed))
    if find_list(root, "Main", SPLITS):
        need_list(root, "Main", splits)  # which are not there
    if default := find_list(root, "Main", ["default"]):
        return Found(partial(_read_listed, root, default), whole=True)
    return Found(partial(_read_files, root, root / "Annotations", root / "JPEGImages"), whole=True)


def find_xml(root: Path, splits: Sequence[str]) -> Found | None:
    """A split's folder of XML files beside their images or next to a folder of them, or such files of all images."""
    places = [(folder, False) for folder in [child(root, splits)] if folder]
    if not child(root, SPLITS):
        places.append((root, True))
    for folder, whole in places:
        images = child(folder, ["images", "JPEGImages"]) or folder
        annotations = child(folder, ["annotations", "labels", "xml", "xmls"]) or folder
        inside = [child(each, splits) for each in (annotations, images)]
        if whole and any(inside):
            annotations, images, whole = inside[0] or annotations, inside[1] or images, False
        elif whole and (child(annotations, SPLITS) or child(images, SPLITS)):
            continue
        if find_files(annotations, (".xml",), deep=annotations != root):
            return Found(partial(_read_files, root, annotations, images), whole)
    return None


def find_list(root: Path, kind: str, splits: Sequence[str]) -> Path | None:
    """The list of a split's images, ImageSets/<kind>/<split>.txt."""
    return child(root / "ImageSets" / kind, [f"{name}.txt" for name in splits], Path.is_file)


def need_list(root: Path, kind: str, splits: Sequence[str]) -> Path:
    """The list of a split's images.

    Raises:
        VisionattnError: there is none.
    """
    if listed := find_list(root, kind, splits):
        return listed
    expected = root / "ImageSets" / kind / f"{splits[0]}.txt"
    raise VisionattnError(f"{root} has no list of the split {splits[0]}: expected {expected}")


def read_list(root: Path, listed: Path, folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files of a folder that a list of images means, whichever of the suffixes they have.

    Entries may be followed by 1, 0 or -1, as in VOC's lists of a class, and may be paths.

    Raises:
        VisionattnError: an entry leads out of the data.
    """
    found = []
    for line in filter(None, read_names(listed)):
        bare = line.rsplit(None, 1)[0] if line.split()[-1] in ("1", "0", "-1") else line
        for entry in dict.fromkeys((line, bare, bare.strip("\"'"))):
            if path := _file_of(entry, root, folder, suffixes):
                break
        else:
            if not is_plain(bare):
                refuse_outside(bare, root, f"{listed} lists")
            path = folder / f"{bare}{suffixes[0]}"  # reading it says that it is missing
        found.append(path)
    return found


def _file_of(entry: str, root: Path, folder: Path, suffixes: Sequence[str]) -> Path | None:
    stem = entry[: -len(Path(entry).suffix)] if Path(entry).suffix.lower() in EXTENSIONS else entry
    for spelt in dict.fromkeys((entry, stem)):
        for suffix in suffixes:
            if path := locate(f"{spelt}{suffix}", [folder], root):
                return path
    return None


def _read_listed(root: Path, listed: Path, wanted: Wanted) -> ImageSet:
    classes = wanted.classes or named_classes(wanted.annotations) or _labelmap(root) or VOC_CLASSES
    paths, trees, images = [], [], root / "JPEGImages"
    for file in read_list(root, listed, root / "Annotations", [".xml"]):
        with one():
            tree = _parse(file)
            own = image_beside(file, root / "Annotations", images)
            paths.append(own if own.is_file() else _image_of(tree, file, root, [own.parent, images]) or own)
            trees.append((file, tree))
    return _make(paths, trees, listed, wanted, classes)


def image_beside(file: Path, folder: Path, images: Path) -> Path:
    """The image in a folder of the same name as a file in another, whatever its kind; JPEG if there is none."""
    below = file.parent.relative_to(folder) if file.is_relative_to(folder) else ""
    stem = images / below / file.stem
    candidates = [stem.with_name(f"{stem.name}{suffix}") for suffix in ORDER]
    return next((path for path in candidates if path.is_file()), candidates[0])


def _labelmap(root: Path) -> list[str] | None:
    """Classes of CVAT's labelmap.txt, whose lines are `name:colour:parts:actions`."""
    if not (root / "labelmap.txt").is_file():
        return None
    names = [line.rsplit(":", 3)[0] for line in read_names(root / "labelmap.txt") if line and not line.startswith("#")]
    return [name for name in names if name != "background"]


def _read_files(root: Path, annotations: Path, images: Path, wanted: Wanted) -> ImageSet:
    """Images of all XML files of a folder; the classes are those that occur, if no file names them."""
    paths, trees = [], []
    for file in find_files(annotations, (".xml",), deep=annotations != root):
        with one():
            tree = _parse(file)
            below = file.parent.relative_to(annotations)
            folders = list(dict.fromkeys((images / below, file.parent, images, root / "images", root)))
            path = _image_of(tree, file, root, folders)
            if path is None:
                named = shown(_name(tree) or file.stem)
                raise VisionattnError(f"{file} is of the image {named}, which is not in {images}")
            paths.append(path)
            trees.append((file, tree))
    given = named_classes(wanted.annotations, root, "classes.txt", "predefined_classes.txt") or _labelmap(root)
    names = {_text(item, "name") for _, tree in trees for item in tree.findall("object")}
    classes = known_classes(given or sorted(names - {""}), wanted.classes, annotations)
    return _make(paths, trees, annotations, wanted, classes)


def _parse(file: Path) -> ElementTree.Element:
    with user_input(f"cannot read {file}", OSError, ElementTree.ParseError, ValueError, LookupError):
        return ElementTree.parse(file).getroot()


def _name(tree: ElementTree.Element) -> str:
    return _text(tree, "filename")


def _text(item: ElementTree.Element, name: str) -> str:
    return (item.findtext(name) or "").strip()


def _image_of(tree: ElementTree.Element, file: Path, root: Path, folders: list[Path]) -> Path | None:
    """The image of an XML file: of its own name, or that which it tells."""
    own = (folder / f"{file.stem}{suffix}" for folder in folders for suffix in ORDER)
    told = locate(_name(tree), folders, root) if _name(tree) else None
    if told is not None and told.stem == file.stem:
        return told
    return next((path for path in own if path.is_file()), told)


def _make(
    paths: list[Path], trees: list[tuple[Path, ElementTree.Element]], origin: Path, wanted: Wanted, classes: list[str]
) -> ImageSet:
    if wanted.masks:
        raise VisionattnError(f"{origin} is VOC's, read without masks: take another detector or COCO's JSON")
    sizes = [_size(tree, path) for path, (_, tree) in zip(paths, trees, strict=True)]
    images = [(size, _objects(file, tree, classes)) for size, (file, tree) in zip(sizes, trees, strict=True)]
    box_format = wanted.annotations.box_format
    if box_format == "xywh":  # what runs were saved with, to which it meant nothing
        wanted = wanted._replace(annotations=replace(wanted.annotations, box_format=None))
    elif box_format not in (None, "xyxy", "relative_xyxy"):
        raise VisionattnError(f"{origin} has boxes by their corners: annotations.box_format is xyxy or relative_xyxy")
    # VOC counts from 1 and to the last pixel; other formats are what their names say.
    records = place_boxes(images, wanted, "xyxy", origin, from_one=wanted.annotations.box_format is None)
    return image_set(paths, records, wanted, classes, origin)


def _size(tree: ElementTree.Element, path: Path) -> list[int] | None:
    """Height and width, of the file where the annotations have none that can be."""
    sides = []
    for side in ("height", "width"):
        try:
            sides.append(int(float(tree.findtext(f"size/{side}") or 0)))
        except (ValueError, OverflowError):
            return size_of_file(path)
    return sides if min(sides) > 0 else size_of_file(path)


def _objects(file: Path, tree: ElementTree.Element, classes: Sequence[str]) -> list[dict[str, Any]]:
    label, objects = {name: number for number, name in enumerate(classes, 1)}, []
    for number, item in enumerate(tree.findall("object"), 1):
        with one():
            objects.append(_object(item, label, f"{file}: object {number}"))
    return objects


def _object(item: ElementTree.Element, label: dict[str, int], where: str) -> dict[str, Any]:
    name = _text(item, "name")
    if not name:
        raise VisionattnError(f"{where} has no name")
    if name not in label:
        raise VisionattnError(
            f"{where} is a {shown(name)}, none of the classes: name yours with --annotations.classes FILE"
        )
    box = [number_of(item.findtext(f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax")]
    if not is_box(box):
        raise VisionattnError(f"{where} has no bndbox of four finite numbers (xmin, ymin, xmax, ymax)")
    hard = HARD.get(_text(item, "difficult").casefold())
    if hard is None:
        raise VisionattnError(f"{where} has difficult {shown(_text(item, 'difficult'))}: expected 0 or 1")
    return {"bbox": box, "label": label[name], "iscrowd": hard, "where": where}
