"""Images that have any number of labels each: folders with a CSV file of them, and lists in Hugging Face datasets."""

import csv
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import VisionattnError, user_input
from .annotations import open_hub, root_of, split_names
from .config import DataConfig
from .faults import one
from .images import ImageSet, check_classes, dataset_name, stratified_split
from .paths import EXTENSIONS, is_plain, locate, regular, shown

LAYOUT = (
    "a CSV file whose first column has the names of the image files, and whose others are either one with the names of "
    "classes, separated by ; or |, or one of 0 and 1 for each class; a column split may say train or validation"
)


class Labelled:
    """Images and their labels as vectors of 0 and 1.

    Args:
        images: `images[i]` is an open file; `images.paths[i]`, if there is such, is its path.
        labels: numbers of the classes of each image.
        classes: how many classes there are.
    """

    def __init__(self, images: Any, labels: Sequence[Sequence[int]], classes: int) -> None:
        self.images, self.labels, self.classes = images, labels, classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        vector = torch.zeros(self.classes)
        vector[list(self.labels[index])] = 1
        return self.images[index], vector

    def filename(self, index: int, **kwargs: Any) -> str | None:
        """Path of an image, where it has one."""
        return self.images.paths[index] if hasattr(self.images, "paths") else None


class Files:
    """Files to open."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __getitem__(self, index: int) -> Any:
        return open(regular(self.paths[index]), "rb")


class HubImages:
    """Images of a Hugging Face dataset, decoded by whoever reads them."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        image = self.dataset[index]["image"]
        return io.BytesIO(image["bytes"]) if image["bytes"] else open(image["path"], "rb")


def labels_of(config: DataConfig, wanted: bool = False) -> str:
    """Where the images that the options name have several labels each: a CSV file, a column, or nowhere, "".

    Args:
        config: where the images are.
        wanted: take a column of lists where there is one of single classes too.
    """
    if config.labels or not _is_hub(config):
        return config.labels
    dataset = open_hub(config, config.val_split)
    return next(iter(_list_columns(dataset)), "") if wanted or "label" not in dataset.column_names else ""


def load_labelled(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """The images to train on and the images to validate on."""
    if not _is_hub(config):
        return _load_tables(config)
    train, val = (_open_hub_lists(config, split) for split in (config.train_split, config.val_split))
    check_classes(val, train)
    return train, val


def load_labelled_validation(config: DataConfig) -> ImageSet:
    """The images to validate on."""
    return _open_hub_lists(config, config.val_split) if _is_hub(config) else _load_tables(config, True)[1]


def _is_hub(config: DataConfig) -> bool:
    return dataset_name(config).partition("/")[0].lower() == "hfds"


@dataclass
class _Table:
    """A CSV file of labels.

    Args:
        path: of the file.
        paths: of the images.
        labels: names of each image's classes.
        splits: names of the splits of the images, or None for all of them.
        classes: names of all classes; in order, if each has a column.
    """

    path: Path
    paths: list[str]
    labels: list[list[str]]
    splits: list[str | None]
    classes: list[str]


def _load_tables(config: DataConfig, only_validation: bool = False) -> tuple[ImageSet, ImageSet]:
    if dataset_name(config) != "folder":
        raise VisionattnError(f"option data.labels is a file of image folders: {config.name} takes none")
    root = root_of(config)
    names = {split: split_names(split) for split in (config.train_split, config.val_split)}
    if (path := next((p for p in (root / config.labels, Path(config.labels)) if p.is_file()), None)) is None:
        found = {
            split: next((path for name in names[split] if (path := root / name / config.labels).is_file()), None)
            for split in names
        }
        lacking = [split for split, path in found.items() if path is None]
        if lacking and not (only_validation and found[config.val_split]):
            where = f"{root / config.labels}, or one for each split, as {root / lacking[0] / config.labels}"
            raise VisionattnError(f"data.labels {config.labels} does not exist: expected {where}")
        val = _read_table(found[config.val_split], root, found[config.val_split].parent)
        if only_validation:
            return _image_set(val, val.classes, range(len(val.paths))), _image_set(val, val.classes)
        train = _read_table(found[config.train_split], root, found[config.train_split].parent)
        if unknown := sorted(set(val.classes) - set(train.classes)):
            raise VisionattnError(f"{val.path} has the class {unknown[0]}, which {train.path} lacks")
        return _image_set(train, train.classes), _image_set(val, train.classes)
    table = _read_table(path, root, root)
    if not any(table.splits):
        stay, held_out = stratified_split([0] * len(table.paths), config.val_fraction)
    else:
        stay, held_out = (
            [i for i, given in enumerate(table.splits) if given in names[split]]
            for split in (config.train_split, config.val_split)
        )
    images = _image_set(table, table.classes)
    for split, part in ((config.train_split, stay), (config.val_split, held_out)):
        if not part and not (only_validation and split == config.train_split):
            raise VisionattnError(f"{table.path} leaves no images for the split {split}")
    if not any(table.splits):
        return replace(images, indices=stay), replace(images, indices=held_out)
    # A split of its own, not a part that data.val_fraction chose, which is what a part of a source says.
    val = replace(table, paths=[table.paths[i] for i in held_out], labels=[table.labels[i] for i in held_out])
    return replace(images, indices=stay), _image_set(val, table.classes)


def _image_set(table: _Table, classes: list[str]) -> ImageSet:
    number = {name: index for index, name in enumerate(classes)}
    labels = [[number[name] for name in names] for names in table.labels]
    source = Labelled(Files(table.paths), labels, len(classes))
    return ImageSet(source, range(len(source)), classes, str(table.path), several=True)


def _read_table(path: Path, root: Path, folder: Path) -> _Table:
    """A CSV file of labels, whose files are in `folder` and nowhere outside of `root`."""
    with user_input(f"cannot read {path}", OSError, ValueError, csv.Error):
        text = path.read_text(encoding="utf-8-sig")
        first = text.partition("\n")[0]
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True))
    rows = [(number, [cell.strip() for cell in row]) for number, row in enumerate(rows, 1) if any(row)]
    if len(rows) < 2 or len(rows[0][1]) < 2:
        raise VisionattnError(f"{path} holds no labels: expected {LAYOUT}")
    (_, header), *rows = rows
    if wrong := next((number for number, row in rows if len(row) != len(header)), None):
        raise VisionattnError(f"{path}: row {wrong} has another number of columns than the first, {len(header)}")
    at = next((i for i, name in enumerate(header) if i and name.lower() == "split"), None)
    columns = [i for i in range(1, len(header)) if i != at]
    if twice := next((name for name in header if header.count(name) > 1), None):
        raise VisionattnError(f"{path} has two columns called {twice}")
    is_list = len(columns) == 1 and not {row[columns[0]] for _, row in rows} <= {"0", "1"}
    read = _listed if is_list else _flagged
    found: dict[str, tuple[list[str], str | None]] = {}
    meant: dict[str, str] = {}  # by which name each was found
    for number, row in rows:
        where = f"{path}, row {number}"
        with one():
            file = _locate(row[0], root, folder, where)
            names = read(row, header, columns, where)
            if os.path.basename(meant.setdefault(file, row[0])) == os.path.basename(row[0]) and meant[file] != row[0]:
                raise VisionattnError(f"{where}: both {meant[file]} and {row[0]} seem to be {file}")
            if file in found and not is_list:
                raise VisionattnError(f"{where}: {row[0]} has a row already")
            before, _ = found.get(file, ([], None))
            found[file] = list(dict.fromkeys([*before, *names])), row[at] if at is not None else None
    labels = [names for names, _ in found.values()]
    classes = sorted({name for names in labels for name in names}) if is_list else [header[i] for i in columns]
    if not classes:
        raise VisionattnError(f"{path} gives no image a label: expected {LAYOUT}")
    if is_list and not any(re.search(r"[;|,]", row[columns[0]]) for _, row in rows):
        spaced = next((name for name in classes if " " in name), None)
        if spaced:
            raise VisionattnError(f"{path}: is {spaced!r} one class or several? Separate classes by ; or |")
    return _Table(path, list(found), labels, [split for _, split in found.values()], classes)


def _listed(row: list[str], header: list[str], columns: list[int], where: str) -> list[str]:
    """Names of classes in a column, separated."""
    parts = re.split(r"[;|,]", row[columns[0]].strip("[] "))
    return [name for part in parts if (name := part.strip(" '\""))]


def _flagged(row: list[str], header: list[str], columns: list[int], where: str) -> list[str]:
    """Names of the classes in whose columns there is a 1."""
    if wrong := next((i for i in columns if row[i] not in ("0", "1")), None):
        raise VisionattnError(f"{where}: expected 0 or 1 for the class {header[wrong]}, got {row[wrong]!r}")
    return [header[i] for i in columns if row[i] == "1"]


def _locate(name: str, root: Path, folder: Path, where: str) -> str:
    """Path of the file of this name, with or without its extension, in a folder of the data."""
    candidates = (locate(f"{name}{extension}", [folder], root) for extension in ("", *EXTENSIONS) if name)
    if found := next((path for path in candidates if path is not None), None):
        return str(found)
    if not is_plain(name):
        raise VisionattnError(f"{where}: {shown(name)} is outside of {root}, which has none of its name")
    raise VisionattnError(f"{where}: there is no image {name or 'without a name'} in {folder}")


def _list_columns(dataset: Any) -> list[str]:
    """The columns of a Hugging Face dataset that hold lists of classes."""
    from datasets import ClassLabel

    kinds = dataset.features.items()
    return [name for name, kind in kinds if isinstance(getattr(kind, "feature", None), ClassLabel)]


def _open_hub_lists(config: DataConfig, split: str) -> ImageSet:
    dataset, name = open_hub(config, split), f"{config.name} ({split})"
    from datasets import Image

    column = config.labels
    if column not in (found := _list_columns(dataset)):
        known = f"; it has {', '.join(found)}" if found else ""
        raise VisionattnError(f"{name} has no column {column} of lists of classes{known}: change data.labels")
    image = next((key for key, kind in dataset.features.items() if isinstance(kind, Image)), None)
    if image is None:
        raise VisionattnError(f"{name} has no column of images")
    classes = dataset.features[column].feature.names
    labels = [[] if row is None else list(row) for row in dataset[column]]
    if stray := next((label for row in labels for label in row if label not in range(len(classes))), None):
        raise VisionattnError(f"{name} has the label {stray}, but {len(classes)} classes")
    images = dataset.select_columns([image]).rename_columns({image: "image"} if image != "image" else {})
    source = Labelled(HubImages(images.cast_column("image", Image(decode=False))), labels, len(classes))
    return ImageSet(source, range(len(source)), classes, name, several=True)
