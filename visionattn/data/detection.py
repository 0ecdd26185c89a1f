"""Images with boxes: COCO's JSON, Pascal VOC's folders, Hugging Face datasets, and scenes.

As COCO defines it, crowds (and objects that VOC calls difficult) are not learnt from, and detections on them count
neither for nor against a model. What of a box lies outside the image is cut off in training, where boxes of less than a
pixel and images without any box are left out; validation takes all boxes as they are, and all images.
"""

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import VisionattnError
from .annotations import (
    Objects,
    check_size,
    column,
    kind_of,
    not_empty,
    open_hub,
    open_upright,
    read_names,
    root_of,
    split_names,
)
from .config import DataConfig, user_input
from .datasets import ImageSet
from .dense_config import AnnotationConfig
from .scenes import open_scenes

VOC_CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip


class AnnotatedFiles:
    """Image files and their objects.

    Args:
        paths: Of the images.
        records: Of each image as COCO's JSON has it, {"size": [height, width], "objects": [...]}, where `label` counts
            classes from 1. They are kept as text, since loading processes copy Python's objects as they look at them.
        masks: Decode the masks too.
        origin: The file that the records are from, for errors.
    """

    def __init__(self, paths: Sequence[Path], records: Sequence[dict[str, Any]], masks: bool, origin: Path) -> None:
        self.paths, self.masks, self.origin = paths, masks, origin
        self.records = [json.dumps(record).encode() for record in records]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, Objects]:
        record = json.loads(self.records[index])
        image = open_upright(self.paths[index])
        check_size(image, tuple(record["size"]), self.origin)
        return image, _objects(record["objects"], (image.height, image.width), self.masks)

    def filename(self, index: int, **kwargs: Any) -> str:
        """The path of an image."""
        return str(self.paths[index])


class HubObjects:
    """A Hugging Face dataset with columns of images and objects.

    Args:
        dataset: The dataset.
        image: Its column of images.
        objects: Its column of objects.
        read: Makes records of objects of a row of that column.
    """

    def __init__(self, dataset: Any, image: str, objects: str, read: Callable[[dict], list[dict[str, Any]]]) -> None:
        self.dataset, self.image, self.objects, self.read = dataset, image, objects, read

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, Objects]:
        row = self.dataset[index]
        image = row[self.image]
        return image, _objects(self.read(row[self.objects]), (image.height, image.width), masks=False)


def load_detection(config: DataConfig, annotations: AnnotationConfig, masks: bool) -> tuple[ImageSet, ImageSet]:
    """Images with `Objects` to train on and to validate on.

    Args:
        config: Where they are.
        annotations: How they are annotated.
        masks: Whether masks are needed.

    Raises:
        VisionattnError: If there are none, or an annotation is wrong, whose file and id it names.
    """
    train = _open(config, annotations, masks, False, None)
    train = train if kind_of(config) == "scenes" else _only_useful(train)
    return not_empty(train, "object to train on"), load_detection_validation(config, annotations, masks, train.classes)


def load_detection_validation(
    config: DataConfig, annotations: AnnotationConfig, masks: bool, classes: list[str] | None
) -> ImageSet:
    """Images with `Objects` to validate on, labelled as in `classes`, of which there need not be all.

    Args:
        config: Where they are.
        annotations: How they are annotated.
        masks: Whether masks are needed.
        classes: Names of the model's classes.
    """
    return not_empty(_open(config, annotations, masks, True, classes), "image to validate on")


def _open(
    config: DataConfig, annotations: AnnotationConfig, masks: bool, validation: bool, classes: list[str] | None
) -> ImageSet:
    kind, split = kind_of(config), config.val_split if validation else config.train_split
    if kind == "scenes":
        images = open_scenes(annotations, validation, semantic=False)
        _known(images.classes, classes, "scenes")
        return images
    if kind == "hfds":
        if masks:
            raise VisionattnError(f"{config.name} is read without masks: take another detector or COCO's JSON")
        return _open_hub_objects(config, annotations, split, classes)
    root = root_of(config)
    if not ((root / "JPEGImages").is_dir() and (root / "Annotations").is_dir()):
        return _open_coco(config, root, split, masks, classes)
    if masks:
        raise VisionattnError(f"{root} is a VOC folder, read without masks: take another detector or COCO's JSON")
    return _open_voc(config, root, annotations, split, classes)


def _only_useful(images: ImageSet) -> ImageSet:
    """Those images that have an object to learn."""
    source = images.source
    if isinstance(source, AnnotatedFiles):
        records = (json.loads(record) for record in source.records)
        useful = (any(_is_learnt(o, record["size"]) for o in record["objects"]) for record in records)
    else:
        rows = source.dataset.select_columns([source.objects])
        useful = (any(_is_learnt(o, None) for o in source.read(row[source.objects])) for row in rows)
    return ImageSet(source, [i for i, use in enumerate(useful) if use], images.classes, images.name)


def _is_learnt(item: dict[str, Any], size: Sequence[int] | None) -> bool:
    x, y, width, height = item["bbox"]
    right, bottom = x + width, y + height
    if size is not None:
        x, y, right, bottom = max(x, 0), max(y, 0), min(right, size[1]), min(bottom, size[0])
    return not item.get("iscrowd", 0) and right - x >= 1 and bottom - y >= 1


def _objects(items: list[dict[str, Any]], size: tuple[int, int], masks: bool) -> Objects:
    boxes = np.array([item["bbox"] for item in items], np.float64).reshape(-1, 4)
    areas = np.array([item.get("area", item["bbox"][2] * item["bbox"][3]) for item in items], np.float64)
    boxes[:, 2:] += boxes[:, :2]
    labels = np.array([item["label"] for item in items], np.int64)
    crowd = np.array([item.get("iscrowd", 0) for item in items], np.int64)
    shapes = None
    if masks:
        shapes = np.zeros((len(items), *size), np.uint8)
        for i, item in enumerate(items):
            shapes[i] = _decode(item["segmentation"], size)
    return Objects(boxes, labels, crowd, areas, shapes)


def _decode(segmentation: list | dict[str, Any], size: tuple[int, int]) -> np.ndarray | int:
    """The mask (H, W) of polygons or a run-length code; 0 where there is no polygon of three points."""
    from faster_coco_eval.core import mask as rle

    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            segmentation = rle.frPyObjects(segmentation, *size)
        return rle.decode(segmentation)
    polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
    return rle.decode(rle.merge(rle.frPyObjects(polygons, *size))) if polygons else 0


def _check(item: dict[str, Any], size: Sequence[int] | None, masks: bool, where: str) -> None:
    """Raise an error if an annotation has no proper box or mask."""
    box = item.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
        raise VisionattnError(f"{where} has no bbox of four numbers (x, y, width, height), but {box!r}")
    if not all(map(math.isfinite, box)) or box[2] < 0 or box[3] < 0:
        raise VisionattnError(f"{where} has the bbox {box}: expected finite numbers, width and height not below 0")
    if not masks:
        return
    mask = item.get("segmentation")
    if isinstance(mask, dict) and {"size", "counts"} <= mask.keys():
        if list(mask["size"]) != list(size):
            raise VisionattnError(
                f"{where} has a mask of {mask['size'][1]} x {mask['size'][0]} for an image of {size[1]} x {size[0]}"
            )
    elif not isinstance(mask, list) or not all(isinstance(p, list) and len(p) % 2 == 0 for p in mask):
        raise VisionattnError(f"{where} has no segmentation: expected polygons or a run-length code (size and counts)")


def _open_coco(config: DataConfig, root: Path, split: str, masks: bool, classes: list[str] | None) -> ImageSet:
    """Images of a COCO file, labelled as in `classes`, of which it need not have all."""
    file = _coco_file(config, root, split)
    with user_input(f"cannot read {file}", OSError, ValueError, KeyError, TypeError, AttributeError):
        content = json.loads(file.read_text())
        images = {image["id"]: image for image in content["images"]}
        categories = {category["id"]: category["name"] for category in content["categories"]}
        found = [categories[number] for number in sorted(categories)]
        classes = _known(found, classes, file)
        label = {number: classes.index(name) + 1 for number, name in categories.items()}
        objects: dict[Any, list] = {number: [] for number in images}
        for item in content.get("annotations", ()):
            where = f"{file}: annotation {item.get('id')}"
            if item["image_id"] not in images:
                raise VisionattnError(f"{where} is of the image {item['image_id']}, which the file does not list")
            if item["category_id"] not in label:
                raise VisionattnError(f"{where} is of the category {item['category_id']}, which the file does not list")
            image = images[item["image_id"]]
            _check(item, (image["height"], image["width"]), masks, where)
            kept = ("bbox", "area", "iscrowd", *(["segmentation"] if masks else []))
            record = {key: item[key] for key in kept if key in item}
            objects[item["image_id"]].append(record | {"label": label[item["category_id"]]})
        records = [
            {"size": [images[number]["height"], images[number]["width"]], "objects": objects[number]}
            for number in images
        ]
        names = [image["file_name"] for image in images.values()]
    part = file.stem.removeprefix("instances_")
    named = [base / name for base in (root, root / "images") for name in (part, split)]
    folders = [file.parent, *named, root / "images", root]
    folder = next((folder for folder in folders if names and (folder / names[0]).is_file()), None)
    if names and folder is None:
        raise VisionattnError(f"{file} lists the image {names[0]}, which is not in {root / part}, nor in other places")
    source = AnnotatedFiles([folder / name for name in names], records, masks, file)
    return ImageSet(source, range(len(names)), classes, str(file))


def _coco_file(config: DataConfig, root: Path, split: str) -> Path:
    for name in split_names(config, split):
        if (file := root / name / "_annotations.coco.json").is_file():
            return file
        folder = root / "annotations"
        for pattern in (f"instances_{name}.json", f"{name}.json", f"instances_{name}[0-9]*.json"):
            found = sorted(folder.glob(pattern))
            if len(found) > 1:
                many = ", ".join(path.name for path in found)
                raise VisionattnError(f"{folder} holds several files of {split} ({many}): name one by its split")
            if found:
                return found[0]
    raise VisionattnError(
        f"{root} has no annotations of {split}: expected annotations/instances_{split}.json, "
        f"{split}/_annotations.coco.json, or VOC's JPEGImages/ and Annotations/"
    )


def _known(found: list[str], classes: list[str] | None, where: object) -> list[str]:
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise VisionattnError(f"{where} has two categories of the name {twice}")
    if classes is None:
        return found
    if unknown := sorted(set(found) - set(classes)):
        raise VisionattnError(f"{where} has classes that the model is not trained on: {', '.join(unknown[:5])}")
    return classes


def _open_voc(
    config: DataConfig, root: Path, annotations: AnnotationConfig, split: str, classes: list[str] | None
) -> ImageSet:
    classes = classes or (read_names(annotations.classes) if annotations.classes else VOC_CLASSES)
    lists = [root / "ImageSets" / "Main" / f"{name}.txt" for name in split_names(config, split)]
    listed = next((path for path in lists if path.is_file()), None)
    if listed is None:
        raise VisionattnError(f"{root} has no list of the split {split}: expected {lists[0]}")
    paths, records = [], []
    for name in read_names(listed):
        if name:
            records.append(_read_voc(root / "Annotations" / f"{name}.xml", classes))
            paths.append(root / "JPEGImages" / f"{name}.jpg")
    return ImageSet(AnnotatedFiles(paths, records, False, root), range(len(paths)), list(classes), str(listed))


def _read_voc(file: Path, classes: Sequence[str]) -> dict[str, Any]:
    with user_input(f"cannot read {file}", OSError, ElementTree.ParseError, AttributeError, TypeError, ValueError):
        tree = ElementTree.parse(file)
        size = [int(tree.find("size").findtext(side)) for side in ("height", "width")]
        objects = []
        for number, item in enumerate(tree.findall("object"), 1):
            where, name = f"{file}: object {number}", item.findtext("name")
            if name not in classes:
                raise VisionattnError(
                    f"{where} is a {name}, none of VOC's classes: name yours with --annotations.classes FILE"
                )
            left, top, right, bottom = (
                float(item.find("bndbox").findtext(edge)) for edge in ("xmin", "ymin", "xmax", "ymax")
            )
            box = [left - 1, top - 1, right - left + 1, bottom - top + 1]  # VOC counts from 1 and to the last pixel
            record = {"bbox": box, "label": classes.index(name) + 1, "iscrowd": int(item.findtext("difficult", "0"))}
            _check(record, None, False, where)
            objects.append(record)
    return {"size": size, "objects": objects}


def _open_hub_objects(
    config: DataConfig, annotations: AnnotationConfig, split: str, classes: list[str] | None
) -> ImageSet:
    dataset = open_hub(config, split)
    name = f"{config.name} ({split})"
    image = column(dataset, "images", name, "image", "img")
    objects = column(dataset, "objects", name, "objects", "annotations", "faces")
    feature = dataset.features[objects]
    fields = getattr(feature, "feature", feature)  # a list of structures, or a structure of lists
    boxes = next((key for key in ("bbox", "boxes", "bboxes") if key in fields), None)
    labels = next((key for key in ("category", "categories", "label", "labels", "category_id") if key in fields), None)
    if boxes is None or labels is None:
        raise VisionattnError(f"dataset {name} has no bbox and category in {objects}, but {', '.join(fields)}")
    kind = getattr(fields[labels], "feature", fields[labels])
    found = read_names(annotations.classes) if annotations.classes else getattr(kind, "names", None)
    if not found:
        raise VisionattnError(f"dataset {name} does not name its classes: do so with --annotations.classes FILE")
    positions = [_known(found, classes, name).index(known) + 1 for known in found]
    corners = annotations.box_format == "xyxy"

    def read(row: dict[str, list] | list[dict]) -> list[dict[str, Any]]:
        columns = row if isinstance(row, dict) else {key: [item[key] for item in row] for key in fields}
        items = []
        for number, (box, label) in enumerate(zip(columns[boxes], columns[labels], strict=True)):
            if not 0 <= label < len(positions):
                raise VisionattnError(f"{name}: object {number} of an image has the label {label} of {len(positions)}")
            x, y, *rest = map(float, box)
            box = [x, y, rest[0] - x, rest[1] - y] if corners else [x, y, *rest]
            _check({"bbox": box}, None, False, f"{name}: object {number} of an image")
            extra = {key: columns[key][number] for key in ("area", "iscrowd") if columns.get(key)}
            items.append({"bbox": box, "label": positions[label]} | extra)
        return items

    return ImageSet(HubObjects(dataset, image, objects, read), range(len(dataset)), classes or list(found), name)
