"""Hugging Face datasets with columns of images and boxes."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import VisionattnError
from .annotations import Objects, column, open_hub
from .box_formats import check_box, check_format, is_box, to_xywh
from .config import AnnotationConfig, DataConfig
from .images import ImageSet
from .objects import known_classes, named_classes, size_of_file, to_objects
from .paths import shown

LOOKED_AT = 200
"""Rows by which the format of the boxes is judged."""


class HubObjects:
    """A Hugging Face dataset with columns of images and objects.

    Args:
        dataset: the dataset.
        image: its column of images.
        objects: its column of objects.
        read: makes records of objects of a row of that column and the image's height and width, if known.
    """

    def __init__(self, dataset: Any, image: str, objects: str, read: Callable[..., list[dict[str, Any]]]) -> None:
        self.dataset, self.image, self.objects, self.read = dataset, image, objects, read

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, Objects]:
        row = self.dataset[index]
        image = row[self.image]
        size = image.height, image.width
        return image, to_objects(self.read(row[self.objects], size), size, masks=False)


def open_hub_objects(
    config: DataConfig, annotations: AnnotationConfig, split: str, classes: list[str] | None
) -> ImageSet:
    """A split of a Hugging Face dataset, labelled as in `classes`, of which it need not have all."""
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
    found = named_classes(annotations) or getattr(kind, "names", None)
    if not found:
        raise VisionattnError(f"dataset {name} does not name its classes: do so with --annotations.classes FILE")
    positions = [known_classes(list(found), classes, name).index(known) + 1 for known in found]

    def columns_of(row: dict[str, list] | list[dict]) -> dict[str, list]:
        return row if isinstance(row, dict) else {key: [item[key] for item in row] for key in fields}

    def boxes_of(columns: dict[str, list]) -> list[list[float]]:
        for number, box in enumerate(columns[boxes]):
            if not is_box(box):
                told = f"{name}: object {number} of an image has the bbox {shown(box)}"
                raise VisionattnError(f"{told}: expected four finite numbers")
        return columns[boxes]

    looked_at = dataset.select(range(min(len(dataset), LOOKED_AT)))
    written = [boxes_of(columns_of(row[objects])) for row in looked_at.select_columns([objects])]
    sizes = [[size] * len(each) for size, each in zip(_sizes(looked_at, image), written, strict=True)]
    box_format = check_format(sum(written, []), sum(sizes, []), annotations.box_format, "xywh", name)

    def read(row: dict[str, list] | list[dict], size: tuple[int, int] | None) -> list[dict[str, Any]]:
        columns, items = columns_of(row), []
        for number, (box, label) in enumerate(zip(boxes_of(columns), columns[labels], strict=True)):
            where = f"{name}: object {number} of an image"
            if not isinstance(label, int) or not 0 <= label < len(positions):
                raise VisionattnError(f"{where} has the label {shown(label)} of {len(positions)}")
            pixels = to_xywh(box, box_format, size or (1000, 1000))  # any that a box shows in, where it is not known
            check_box(pixels, box, where)
            extra = {key: columns[key][number] for key in ("area", "iscrowd") if columns.get(key)}
            items.append({"bbox": pixels, "label": positions[label]} | extra)
        return items

    return ImageSet(HubObjects(dataset, image, objects, read), range(len(dataset)), classes or list(found), name)


def _sizes(dataset: Any, image: str) -> list[list[int] | None]:
    """Height and width of the images, from the heads of their files."""
    from datasets import Image as Images

    files = dataset.select_columns([image])
    if not isinstance(dataset.features[image], Images):
        return [None] * len(files)
    rows = (row[image] for row in files.cast_column(image, Images(decode=False)))
    return [size_of_file(io.BytesIO(row["bytes"]) if row["bytes"] else Path(row["path"])) for row in rows]
