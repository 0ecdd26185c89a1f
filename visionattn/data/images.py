"""Where images come from: the digits of scikit-learn, image folders, and what timm's dataset factory opens."""

import gzip
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from timm.data import create_dataset
from timm.utils.misc import natural_key
from torchvision.datasets import DatasetFolder

from ..errors import VisionattnError, all_lines, optional, require, shortened, user_input
from .config import DataConfig
from .paths import EXTENSIONS, SYNONYMS, child, class_files, find_files, is_data, regular

IDX_FOLDERS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}


@dataclass(frozen=True)
class ImageSet:
    """Labelled images that are decoded when asked for.

    Args:
        source: `source[i]` is (PIL image or binary file, label).
        indices: those entries of the source that belong to the set.
        classes: names of the classes, by label.
        name: what errors call the source.
        several: whether labels are vectors of 0 and 1, for any number of classes at once.
    """

    source: Any
    indices: Sequence[int]
    classes: list[str]
    name: str
    several: bool = False

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int, mode: str = "RGB") -> tuple[Image.Image, int]:
        """The image, as `to_mode` converts it, and its label."""
        try:
            image, label = self.source[self.indices[index]]
            if not isinstance(image, Image.Image):
                with image, Image.open(image) as file:
                    return to_mode(file, mode), label
            return to_mode(image, mode), label
        except Exception as error:  # decoders raise whatever they like
            raise VisionattnError(f"cannot read {self.place(index)}: {why_unreadable(error)}") from error

    def place(self, index: int) -> str:
        """Where the image comes from: its path if it has one."""
        index = self.indices[index]
        known = hasattr(self.source, "filename")
        return (known and self.source.filename(index, absolute=True)) or f"image {index} of {self.name}"


class FolderImages:
    """Files and their labels.

    Args:
        samples: path and label of each.
    """

    def __init__(self, samples: list[tuple[str, int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return open(regular(path), "rb"), label

    def filename(self, index: int, **kwargs: Any) -> str:
        """The path of an image."""
        return self.samples[index][0]


def why_unreadable(error: Exception) -> str:
    """What an error that decoding an image raised tells: not how the file was opened, but which one if it says that."""
    told = all_lines(error)
    return "it is no image" if isinstance(error, UnidentifiedImageError) and "<" in told else told


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image's first frame, upright, in 8 bits: "RGB" or "L".

    Transparency is dropped, as timm and torchvision do, not blended with a background. 16-bit grey is scaled to 8 bits,
    where Pillow would clip it.

    Raises:
        ValueError: the image is of 32-bit numbers, whose range is unknown.
    """
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers of unknown range; expected 8 or 16 bits")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns if transparency is dropped from a palette directly
    if image.mode != mode:
        return image.convert(mode)
    image.load()  # convert would copy it too
    return image


def load_datasets(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """The images to train on and the images to validate on."""
    kind = dataset_name(config)
    if kind == "digits":
        train, val = _split(_digits(), config.val_fraction)
    elif kind == "folder":
        train_folder, val_folder = split_folders(config)
        if train_folder == val_folder:
            raise VisionattnError(
                f"{config.root} holds {val_folder.name}/ to validate on, but no {config.train_split}/"
            )
        train = _open_folder(train_folder)
        if len(train.classes) < 2:
            raise VisionattnError(f"{train_folder} holds one class only ({train.classes[0]}): at least two are needed")
        if val_folder is None:
            train, val = _split(train, config.val_fraction)
        else:
            val = _open_folder(val_folder, train.classes)
            if missing := sorted(set(train.classes) - set(val.classes)):
                raise VisionattnError(f"{val_folder} lacks the classes {_few(missing)} of {train_folder}")
    else:
        train = _open_by_timm(config, kind, config.train_split)
        val = _open_by_timm(config, kind, config.val_split)
        check_classes(val, train)
    return _not_empty(train, config), _not_empty(val, config)


def load_validation(config: DataConfig) -> ImageSet:
    """The images to validate on."""
    kind = dataset_name(config)
    if kind == "digits":
        val = _split(_digits(), config.val_fraction)[1]
    elif kind == "folder":
        train_folder, val_folder = split_folders(config)
        images = _open_folder(val_folder or train_folder)
        val = images if val_folder else _split(images, config.val_fraction)[1]
    else:
        val = _open_by_timm(config, kind, config.val_split)
    return _not_empty(val, config)


def dataset_name(config: DataConfig) -> str:
    """What the options name, or imply by giving a folder."""
    if config.name == "digits" and config.root is not None:
        raise VisionattnError(f"digits take no data.root: add --data.name folder to read {config.root}")
    return config.name or ("folder" if config.root is not None else "digits")


def stratified_split(labels: Sequence[int], fraction: float) -> tuple[list[int], list[int]]:
    """Indices that stay and indices held out: the same share of each class, always the same ones."""
    labels, rng = np.asarray(labels), np.random.default_rng(0)
    held_out = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = round(fraction * len(members))
        if 0 < fraction < 1:  # both sides should see every class
            count = min(max(count, 1), len(members) - 1)
        held_out.extend(members[:count].tolist())
    return sorted(set(range(len(labels))) - set(held_out)), sorted(held_out)


def _split(images: ImageSet, fraction: float) -> tuple[ImageSet, ImageSet]:
    samples = images.source.samples if hasattr(images.source, "samples") else images.source
    stay, held_out = stratified_split([label for _, label in samples], fraction)
    return replace(images, indices=stay), replace(images, indices=held_out)


def _digits() -> ImageSet:
    with optional():
        from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)  # 8 x 8 counts from 0 to 16
    source = [(Image.fromarray(image), int(label)) for image, label in zip(pixels, digits.target, strict=True)]
    return ImageSet(source, range(len(source)), [str(name) for name in digits.target_names], "digits")


def split_folders(config: DataConfig) -> tuple[Path, Path | None]:
    """The folders to train and to validate on; no second where the first is to be split."""
    if config.root is None:
        raise VisionattnError("data.name folder needs data.root, the folder of the images")
    root = Path(config.root)
    if not root.is_dir():
        raise VisionattnError(f"image folder {shortened(root)} does not exist")

    def find(split: str) -> Path | None:
        names = [split, *(name for group in SYNONYMS if split in group for name in group)]
        # In other letters only one that is not a class itself.
        return child(
            root, names, lambda path: path.is_dir() and (path.name in names or not find_files(path, deep=False))
        )

    train, val = find(config.train_split), find(config.val_split)
    return train or val or root, val


def _open_folder(folder: Path, classes: list[str] | None = None) -> ImageSet:
    """Images of the folders in a folder, each a class, to which deeper folders belong."""
    expected = f"expected {folder}/<class>/<image>, with images as {', '.join(EXTENSIONS)}"
    with user_input(f"cannot read {folder}", OSError):
        files, strays = class_files(folder), find_files(folder, deep=False)
    if not files:
        raise VisionattnError(f"{folder} holds no class folders: {expected}")
    if strays:
        raise VisionattnError(f"{strays[0]} lies outside the class folders: {expected}")
    if empty := sorted(name for name, images in files.items() if not images):
        raise VisionattnError(f"class folder {folder / empty[0]} holds no images: {expected}")
    found = sorted(files, key=natural)
    if classes is not None and (unknown := sorted(set(found) - set(classes))):
        raise VisionattnError(f"{folder} holds classes that the model was not trained on: {_few(unknown)}")
    label = {name: number for number, name in enumerate(classes or found)}
    samples = [(str(path), label[name]) for name, images in files.items() for path in images]
    samples.sort(key=lambda sample: natural(sample[0]))
    return ImageSet(FolderImages(samples), range(len(samples)), found, str(folder))


def natural(name: str) -> tuple[list, str]:
    """The order of timm's folders, in which names differ that it takes for equal, such as 1 and 01."""
    return natural_key(name), name


def _open_by_timm(config: DataConfig, name: str, split: str) -> ImageSet:
    kind = name.partition("/")[0].lower()
    if kind not in ("torch", "hfds"):
        accepted = "digits, folder, torch/<torchvision dataset> or hfds/<Hugging Face dataset>"
        raise VisionattnError(f"unknown dataset {name}: data.name is {accepted}")
    if kind == "hfds":
        require("datasets")
    if kind == "torch" and config.root is None:
        raise VisionattnError(f"data.name {name} needs data.root, the folder of its files")
    readable = _unpacked(config.root, name)
    with user_input(f"cannot open dataset {name}", Exception), readable as root:  # readers raise whatever they like
        dataset = create_dataset(name, root=root, split=split, download=config.download)
    source = getattr(dataset, "reader", dataset)
    if isinstance(source, DatasetFolder):
        _leave_out_leftovers(source)
    classes = list(getattr(source, "class_to_idx", None) or getattr(source, "classes", ()))
    if not classes:
        raise VisionattnError(f"dataset {name} does not say which classes it has")
    images = ImageSet(source, range(len(source)), [str(c) for c in classes], f"{name} ({split})")
    if stray := [label for label in _labels(source) if label not in range(len(classes))]:
        raise VisionattnError(f"{images.name} has the label {stray[0]}, but {len(classes)} classes")
    return images


def _leave_out_leftovers(folder: DatasetFolder) -> None:
    """Take out of what torchvision read as classes and images what systems leave in folders."""
    folder.classes = [name for name in folder.classes if is_data(name)]
    label = {folder.class_to_idx[name]: number for number, name in enumerate(folder.classes)}
    folder.class_to_idx = {name: number for number, name in enumerate(folder.classes)}
    kept = [(path, old) for path, old in folder.samples if all(map(is_data, Path(path).relative_to(folder.root).parts))]
    folder.samples = folder.imgs = [(path, label[old]) for path, old in kept]
    folder.targets = [label for _, label in folder.samples]


def _labels(source: Any) -> list[int]:
    """The labels that occur in what timm opened, where they can be had without decoding images."""
    if hasattr(source, "label_key"):  # hfds
        return source.dataset.unique(source.label_key)
    return np.unique(getattr(source, "targets", [])).tolist()


def check_classes(images: ImageSet, train: ImageSet) -> None:
    """Refuse images to validate on that have other classes than those to train on, or number them in another way."""
    if unknown := sorted(set(images.classes) - set(train.classes)):
        raise VisionattnError(f"{images.name} has classes that {train.name} lacks: {_few(unknown)}")
    if missing := sorted(set(train.classes) - set(images.classes)):
        raise VisionattnError(f"{images.name} lacks the classes {_few(missing)} of {train.name}")
    if images.classes != train.classes:
        raise VisionattnError(f"{images.name} numbers its classes in another order than {train.name}")


@contextmanager
def _unpacked(root: str | None, name: str) -> Iterator[str | None]:
    """The folder for torchvision to read: `root`, or an unpacked copy if it holds packed files of MNIST's kind."""
    folder = IDX_FOLDERS.get(name.partition("/")[2].lower())
    packed = sorted(Path(root).glob("*-ubyte.gz")) if folder and root else []
    if not packed:
        yield root
        return
    with TemporaryDirectory() as copy:  # torchvision reads it whole, at once
        raw = Path(copy, folder, "raw")
        raw.mkdir(parents=True)
        for path in packed:
            with gzip.open(path) as source, open(raw / path.stem, "wb") as target:
                shutil.copyfileobj(source, target)
        yield copy


def _not_empty(images: ImageSet, config: DataConfig) -> ImageSet:
    if not len(images):
        raise VisionattnError(f"data.val_fraction {config.val_fraction} of {images.name} leaves no images on one side")
    return images


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
