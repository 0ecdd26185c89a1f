"""Images with boxes: COCO's JSON, Pascal VOC's XML, YOLO's text files, Hugging Face datasets, and scenes.

As COCO defines it, crowds (and objects that VOC calls difficult) are not learnt from, and detections on them count
neither for nor against a model. What of a box lies outside the image is cut off in training, where boxes of less than a
pixel and images without any box are left out; validation takes all boxes as they are, and all images.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import VisionattnError
from .annotations import kind_of, not_empty, root_of, split_names
from .coco import find_coco
from .config import AnnotationConfig, DataConfig
from .cvat import find_cvat
from .hub_objects import HubObjects, open_hub_objects
from .images import ImageSet, stratified_split
from .objects import Found, Wanted, known_classes
from .scenes import open_scenes
from .voc import find_voc, find_xml
from .yolo import find_yolo

LAYOUTS = (find_voc, find_coco, find_yolo, find_cvat, find_xml)
"""Each finds annotations of one kind in a folder."""


def load_detection(config: DataConfig, annotations: AnnotationConfig, masks: bool) -> tuple[ImageSet, ImageSet]:
    """Images with `Objects` to train on and to validate on.

    Args:
        config: where they are.
        annotations: how they are annotated.
        masks: whether masks are needed.

    Raises:
        VisionattnError: if there are none, or an annotation is wrong, whose file and id it names.
    """
    train = open_objects(config, annotations, masks, False, None)
    train = train if kind_of(config) == "scenes" else _only_useful(train)
    return not_empty(train, "object to train on"), load_detection_validation(config, annotations, masks, train.classes)


def load_detection_validation(
    config: DataConfig, annotations: AnnotationConfig, masks: bool, classes: list[str] | None
) -> ImageSet:
    """Images with `Objects` to validate on, labelled as in `classes`, of which there need not be all.

    Args:
        config: where they are.
        annotations: how they are annotated.
        masks: whether masks are needed.
        classes: names of the model's classes.
    """
    return not_empty(open_objects(config, annotations, masks, True, classes), "image to validate on")


def open_objects(
    config: DataConfig, annotations: AnnotationConfig, masks: bool, validation: bool, classes: list[str] | None
) -> ImageSet:
    """All images of a split with their `Objects`; arguments as of `load_detection_validation`.

    Args:
        config: where they are.
        annotations: how they are annotated.
        masks: whether masks are needed.
        validation: take the split to validate on.
        classes: names of the model's classes, or None.
    """
    kind, split = kind_of(config), config.val_split if validation else config.train_split
    if kind == "scenes":
        images = open_scenes(annotations, validation, semantic=False)
        known_classes(images.classes, classes, "scenes")
        return images
    if kind == "hfds":
        if masks:
            raise VisionattnError(f"{config.name} is read without masks: take another detector or COCO's JSON")
        return open_hub_objects(config, annotations, split, classes)
    root, found = root_of(config), find_layout(config, split)
    if found is None:
        raise VisionattnError(
            f"{root} has no annotations of {split}: expected annotations/instances_{split}.json, "
            f"{split}/_annotations.coco.json, VOC's JPEGImages/ and Annotations/, images with XML files, CVAT's "
            f"annotations.xml, or YOLO's data.yaml or images/{split}/ and labels/{split}/"
        )
    images = found.read(Wanted(annotations, masks, classes))
    if not found.whole:
        return images
    stay, held_out = stratified_split([0] * len(images), config.val_fraction)
    return replace(images, indices=held_out if validation else stay)


def find_layout(config: DataConfig, split: str) -> Found | None:
    """The annotations of a split in the folder of the data, or those of all its images."""
    root, splits = root_of(config), split_names(split)
    return next((found for find in LAYOUTS if (found := find(root, splits))), None)


def _only_useful(images: ImageSet) -> ImageSet:
    """Those images that have an object to learn, or cannot be read, which is for the loader to tell."""
    source = images.source
    if isinstance(source, HubObjects):
        rows = source.dataset.select_columns([source.objects])
        useful = [any(_is_learnt(o, None) for o in source.read(rows[i][source.objects], None)) for i in images.indices]
    else:
        records = [json.loads(source.records[i]) for i in images.indices]
        useful = [r["size"] is None or any(_is_learnt(o, r["size"]) for o in r["objects"]) for r in records]
    return replace(images, indices=[i for i, use in zip(images.indices, useful, strict=True) if use])


def _is_learnt(item: dict[str, Any], size: Sequence[int] | None) -> bool:
    x, y, width, height = item["bbox"]
    right, bottom = x + width, y + height
    if size is not None:
        x, y, right, bottom = max(x, 0), max(y, 0), min(right, size[1]), min(bottom, size[0])
    return not item.get("iscrowd", 0) and right - x >= 1 and bottom - y >= 1
