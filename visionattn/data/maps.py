"""Images with a class for every pixel: ADE20K's, Cityscapes', VOC's and plain folders, Hugging Face datasets, scenes.

Pixels of the value 255 do not count, nor do those that the layout calls unlabelled: 0 of ADE20K, what Cityscapes leaves
out of its 19 classes, and values whose line in a file of class names is empty.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import VisionattnError
from .annotations import (
    IGNORED,
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
from .config import AnnotationConfig, DataConfig
from .faults import one
from .images import ImageSet
from .paths import child, find_files, regular
from .scenes import open_scenes
from .voc import VOC_CLASSES, image_beside, need_list, read_list

STRETCHED = {"L;2": 85, "L;4": 17}
"""Grey values of two and of four bits, as optimisers of PNG write them: Pillow stretches them to eight."""


class Labelling:
    """What the values of masks mean.

    Args:
        names: the class of each value, from 0; empty for one that does not count. Equal names are one class.
    """

    def __init__(self, names: Sequence[str]) -> None:
        if len(names) > IGNORED:
            raise VisionattnError(f"expected names of at most {IGNORED} values, got {len(names)}")
        self.classes = list(dict.fromkeys(name for name in names if name))
        self.table = np.full(IGNORED + 1, -1, np.int16)
        self.table[IGNORED] = IGNORED
        self.table[: len(names)] = [self.classes.index(name) if name else IGNORED for name in names]

    def __call__(self, mask: Image.Image, where: object) -> np.ndarray:
        """The labels (H, W) of a mask's pixels."""
        values = values_of(mask, where)
        if values.ndim != 2:
            raise VisionattnError(f"{where} has {values.shape[2]} channels: expected one number for each pixel")
        if values.dtype.kind == "f" and not np.array_equal(values, np.rint(values)):
            raise VisionattnError(f"{where} has fractions for pixels: expected whole numbers, from 0 to {IGNORED}")
        known = values.astype(np.uint8) if values.dtype == bool else values.clip(0, IGNORED)
        labels = self.table[known.astype(np.uint8)]
        wrong = (labels < 0) | (known != values)
        if wrong.any():
            raise VisionattnError(f"{where} has the value {values[wrong][0]}, which is of no class")
        return labels.astype(np.uint8)


def values_of(mask: Image.Image, where: object) -> np.ndarray:
    """The numbers that a mask's file has for its pixels, one for each or several.

    Raises:
        VisionattnError: the file changed them as it was written.
    """
    if mask.format in ("JPEG", "MPO"):
        raise VisionattnError(f"{where} is a JPEG, which changes the values of pixels: expected PNG")
    raw = mask.tile[0].args if getattr(mask, "tile", None) else None
    raw = raw[0] if isinstance(raw, tuple) and raw else raw
    return np.asarray(mask) // STRETCHED[raw] if raw in STRETCHED else np.asarray(mask)


class MaskedFiles:
    """Image files and their masks.

    Args:
        pairs: paths of an image and its mask.
        labelling: what the values of masks mean.
    """

    def __init__(self, pairs: Sequence[tuple[Path, Path]], labelling: Labelling) -> None:
        self.pairs, self.labelling = pairs, labelling

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        path, mask_path = self.pairs[index]
        image = open_upright(path)
        with Image.open(regular(mask_path)) as file:
            labels = self.labelling(file, mask_path)
        check_size(image, labels.shape, mask_path)
        return image, labels

    def filename(self, index: int, **kwargs: Any) -> str:
        """The path of an image."""
        return str(self.pairs[index][0])


class HubMasks:
    """A Hugging Face dataset with columns of images and masks."""

    def __init__(self, dataset: Any, image: str, mask: str, labelling: Labelling) -> None:
        self.dataset, self.image, self.mask, self.labelling = dataset, image, mask, labelling

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        row = self.dataset[index]
        labels = self.labelling(row[self.mask], "its mask")
        check_size(row[self.image], labels.shape, "its mask")
        return row[self.image], labels


def load_segmentation(config: DataConfig, annotations: AnnotationConfig) -> tuple[ImageSet, ImageSet]:
    """Images with semantic maps (H, W) of bytes to train on and to validate on.

    Args:
        config: where they are.
        annotations: how they are annotated.

    Raises:
        VisionattnError: if there are none.
    """
    train = not_empty(_open(config, annotations, False), "image to train on")
    return train, load_segmentation_validation(config, annotations, train.classes)


def load_segmentation_validation(
    config: DataConfig, annotations: AnnotationConfig, classes: list[str] | None
) -> ImageSet:
    """Images with semantic maps to validate on.

    Args:
        config: where they are.
        annotations: how they are annotated.
        classes: names of the model's classes, which are to be those of the data.
    """
    images = not_empty(_open(config, annotations, True), "image to validate on")
    if classes is not None and images.classes != classes:
        raise VisionattnError(f"{images.name} has other classes than the model, or in another order")
    return images


def _open(config: DataConfig, annotations: AnnotationConfig, validation: bool) -> ImageSet:
    kind, split = kind_of(config), config.val_split if validation else config.train_split
    if kind == "scenes":
        return open_scenes(annotations, validation, semantic=True)
    if kind == "hfds":
        return _open_hub_masks(config, annotations, split)
    return open_maps(config, root_of(config), annotations, split)


def open_maps(config: DataConfig, root: Path, annotations: AnnotationConfig, split: str) -> ImageSet:
    """Images and masks of a split, in the layout that the folder has.

    Args:
        config: options of the data.
        root: the folder.
        annotations: how they are annotated.
        split: its name.
    """
    names = read_names(annotations.classes) if annotations.classes else None
    splits = split_names(split)
    if (root / "leftImg8bit").is_dir():
        names = names or _cityscapes_names()
        images, masks = _split_folder(root / "leftImg8bit", splits), _split_folder(root / "gtFine", splits)
        pairs = [
            (path, masks / path.parent.name / path.name.replace("leftImg8bit", "gtFine_labelIds"))
            for path in find_files(images)
            if path.parent.parent == images
        ]
    elif (root / "SegmentationClass").is_dir():
        names = names or ["background", *VOC_CLASSES]
        listed = need_list(root, "Segmentation", splits)
        masks = read_list(root, listed, root / "SegmentationClass", [".png"])
        pairs = [(image_beside(path, root / "SegmentationClass", root / "JPEGImages"), path) for path in masks]
    elif (root / "images").is_dir():
        names = names or _folder_names(root)
        folder = child(root, ("annotations", "masks", "labels"))
        if folder is None:
            raise VisionattnError(f"{root} holds images/ but no annotations/, masks/ or labels/")
        images, masks = _split_folder(root / "images", splits), _split_folder(folder, splits)
        pairs = [(path, (masks / path.relative_to(images)).with_suffix(".png")) for path in find_files(images)]
    else:
        raise VisionattnError(
            f"{root} has no layout that is known: expected images/{split} and annotations/{split} (ADE20K's), "
            f"leftImg8bit/{split} and gtFine/{split} (Cityscapes'), or JPEGImages and SegmentationClass (VOC's)"
        )
    kept = []
    for pair in pairs:
        with one():
            if missing := next((path for path in pair if not path.is_file()), None):
                raise VisionattnError(f"{missing} is missing: every image of {split} needs its mask")
            kept.append(pair)
    pairs, labelling = kept, Labelling(names)
    with one():
        _check_second_class(pairs, labelling, names)
    return ImageSet(MaskedFiles(pairs, labelling), range(len(pairs)), labelling.classes, f"{root} ({split})")


def _check_second_class(pairs: Sequence[tuple[Path, Path]], labelling: Labelling, names: Sequence[str]) -> None:
    """Raise an error if masks of two classes have 255 where they mean the second: these pixels would not count."""
    if len(names) != 2 or len(labelling.classes) != 2:
        return
    seen = False
    for _, path in pairs:
        with suppress(Exception), Image.open(regular(path)) as file:  # loading tells what is wrong with it
            values = values_of(file, path)
            found = set(np.unique(values).tolist())
            if values.ndim > 2 or found - {0, IGNORED}:
                return
            seen |= IGNORED in found
    if seen:
        raise VisionattnError(
            f"the masks in {pairs[0][1].parent} have the values 0 and {IGNORED} alone, and {IGNORED} does not count: "
            f"write 1 for {names[1]}"
        )


def _split_folder(folder: Path, splits: list[str]) -> Path:
    found = child(folder, splits)
    if found is None:
        raise VisionattnError(f"{folder} holds no {splits[0]}/")
    return found


def _folder_names(root: Path) -> list[str]:
    """Names of the values: ADE20K's list, where 0 is what is in no class, or classes.txt."""
    if (root / "objectInfo150.txt").is_file():
        rows = read_names(root / "objectInfo150.txt")[1:]
        return ["", *(row.split("\t")[-1].strip() for row in rows if row)]
    if (root / "classes.txt").is_file():
        return read_names(root / "classes.txt")
    raise VisionattnError(
        f"{root} does not name its classes: add classes.txt, a line for each value of the masks from 0, or give "
        "--annotations.classes FILE"
    )


def _cityscapes_names() -> list[str]:
    from torchvision.datasets import Cityscapes

    named = {c.id: "" if c.ignore_in_eval else c.name for c in Cityscapes.classes if c.id >= 0}
    return [named[value] for value in range(len(named))]


def _open_hub_masks(config: DataConfig, annotations: AnnotationConfig, split: str) -> ImageSet:
    dataset, name = open_hub(config, split), f"{config.name} ({split})"
    image = column(dataset, "images", name, "image", "pixel_values", "img")
    mask = column(dataset, "masks", name, "annotation", "mask", "label", "segmentation", "semantic_mask", "labels")
    if not annotations.classes:
        raise VisionattnError(f"dataset {name} does not name the values of its masks: add --annotations.classes FILE")
    labelling = Labelling(read_names(annotations.classes))
    return ImageSet(HubMasks(dataset, image, mask, labelling), range(len(dataset)), labelling.classes, name)
