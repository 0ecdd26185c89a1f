"""All that is wrong with the images and annotations of a folder, in any layout that training reads."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import VisionattnError, user_input
from ..progress import track
from .annotations import IGNORED, Objects, split_names
from .boxes import LAYOUTS, open_objects
from .config import AnnotationConfig, DataConfig
from .faults import listing
from .images import FolderImages, ImageSet, natural, split_folders
from .labels import load_labelled
from .loader import count_cores
from .maps import open_maps
from .paths import child, class_files, find_files
from .yolo import NAMES, find_yolo, label_file

PARTS = ("train", "validation")
WHOLE = "all images"
"""Stands for both parts where what is validated on is held out."""
FORMATS = {"MPO": "JPEG"}
"""Formats that go by another's suffix."""


@dataclass(frozen=True)
class Fault:
    """Something that is wrong.

    Args:
        kind: layout, class, annotation, missing, unreadable, suffix, duplicate, box, mask or unannotated.
        told: what it is, with its place, in a line.
    """

    kind: str
    told: str


@dataclass
class Checked:
    """What came out.

    Args:
        task: that the data are of.
        images: how many there are of each part.
        faults: all that is wrong.
    """

    task: str
    images: dict[str, int]
    faults: list[Fault] = field(default_factory=list)


class Seen(NamedTuple):
    """What reading an image told: faults, a hash of its pixels unless it cannot be read, and numbers of its classes."""

    faults: list[Fault]
    digest: bytes | None
    labels: list[int]


def check(
    root: str | Path,
    task: str | None = None,
    labels: str = "",
    annotations: AnnotationConfig | None = None,
    masks: bool = False,
    least: int = 2,
) -> Checked:
    """Read everything once, and list all that is wrong.

    Args:
        root: folder of the data, as data.root.
        task: classification, detection or segmentation; None: the one whose layout the folder has.
        labels: CSV file of images with several labels, as data.labels.
        annotations: how they are annotated, where the data do not say it.
        masks: check the masks of objects too.
        least: images, or objects, that each class needs in training.

    Raises:
        VisionattnError: if there is no such folder, or nothing in it that training would read.
    """
    root = Path(root)
    if not root.is_dir():
        raise VisionattnError(f"{root} is no folder" if root.exists() else f"folder {root} does not exist")
    config = DataConfig(name="folder", root=str(root), labels=labels)
    task = task or ("classification" if labels else find_task(root))
    with listing() as met:
        if task != "classification":
            sets, faults = _annotated(config, task, annotations or AnnotationConfig(), masks)
        elif labels:
            sets, faults = dict(zip(PARTS, load_labelled(config), strict=True)), []
        else:
            sets, faults = _class_folders(config)
    found = Checked(task, {part: len(images) for part, images in sets.items()})
    found.faults = [*faults, *(Fault("annotation", told) for told in dict.fromkeys(met))]
    seen = {part: _read(images, part) for part, images in sets.items()}
    found.faults += [fault for each in seen.values() for one in each for fault in one.faults]
    found.faults += _duplicates(sets, seen, by_class=task == "classification" and not labels)
    found.faults += _classes(sets, seen, {"detection": "objects"}.get(task, "images"), least)
    if task != "classification" and not any(fault.kind == "layout" for fault in faults):
        found.faults += _left_over(root, sets, task)
    return found


def find_task(root: Path) -> str:
    """The task whose layout a folder has: of objects, of maps, or else of classes."""
    splits = [split_names(part) for part in PARTS]
    try:
        if any(find(root, names) for names in splits for find in LAYOUTS):
            return "detection"
    except VisionattnError:  # it has the layout, and something is wrong with it, which will be told
        return "detection"
    maps = (root / "leftImg8bit").is_dir() or (root / "SegmentationClass").is_dir()
    pairs = (root / "images").is_dir() and child(root, ("annotations", "masks", "labels"))
    return "segmentation" if maps or pairs else "classification"


def _class_folders(config: DataConfig) -> tuple[dict[str, ImageSet], list[Fault]]:
    """Images of a folder for each class, as far as they are where they should be."""
    train, val = split_folders(config)
    faults, files = [], {}
    folders = {WHOLE: train} if val is None else dict(zip(PARTS, (train, val), strict=True))
    if train == val:
        faults.append(Fault("layout", f"{config.root} holds {val.name}/ to validate on, but no train/"))
        del folders["train"]
    for part, folder in folders.items():
        with user_input(f"cannot read {folder}", OSError):
            files[part], strays = class_files(folder), find_files(folder, deep=False)
        faults += [Fault("layout", f"{path} lies outside the class folders") for path in strays]
        empty = sorted(name for name, images in files[part].items() if not images)
        faults += [Fault("class", f"class folder {folder / name} holds no images") for name in empty]
    classes = sorted({name for each in files.values() for name in each}, key=natural)
    if not any(images for each in files.values() for images in each.values()):
        raise VisionattnError(f"{config.root} holds nothing that training reads: expected a folder for each class")
    if len(classes) < 2:
        faults.append(Fault("class", f"there is one class only ({classes[0]}): at least two are needed"))
    label = {name: number for number, name in enumerate(classes)}
    sets = {}
    for part, each in files.items():
        samples = [(str(path), label[name]) for name, images in each.items() for path in images]
        samples.sort(key=lambda sample: natural(sample[0]))
        sets[part] = ImageSet(FolderImages(samples), range(len(samples)), classes, str(folders[part]))
    return sets, faults


def _annotated(
    config: DataConfig, task: str, annotations: AnnotationConfig, masks: bool
) -> tuple[dict[str, ImageSet], list[Fault]]:
    """Images with objects or maps; a part that cannot be opened is a fault, unless none can."""
    sets, refused, classes = {}, {}, None
    for part in PARTS:
        try:
            if task == "detection":
                found = next(filter(None, (f(Path(config.root), split_names(part)) for f in LAYOUTS)), None)
                whole = found is not None and found.whole
                images = open_objects(config, annotations, masks, part == "validation", classes)
                images = ImageSet(images.source, range(len(images.source)), images.classes, images.name)
            else:
                whole, images = False, open_maps(config, Path(config.root), annotations, part)
        except VisionattnError as error:
            refused[part] = str(error)
            continue
        sets[WHOLE if whole else part], classes = images, images.classes
    if not sets:
        raise VisionattnError(next(iter(refused.values())))
    return sets, [Fault("layout", told) for told in dict.fromkeys(refused.values())]


def _read(images: ImageSet, part: str) -> list[Seen]:
    """Read all images of a part, on as many threads as there are cores: decoding leaves Python's lock alone."""
    with ThreadPool(count_cores()) as pool:
        seen = pool.imap(lambda index: _look(images, index), range(len(images)), chunksize=4)
        return list(track(seen, f"reading {part}", len(images)))


def _look(images: ImageSet, index: int) -> Seen:
    place = images.place(index)
    if not Path(place).is_file():
        return Seen([Fault("missing", f"{place} is listed, but there is no such file")], None, [])
    faults = _wrong_suffix(Path(place))
    try:
        image, target = images.load(index)
    except VisionattnError as error:  # of its annotation, if it is one of ours that became it
        kind = "annotation" if isinstance(error.__cause__, VisionattnError) else "unreadable"
        return Seen([*faults, Fault(kind, str(error))], None, [])
    digest = blake2b(image.tobytes(), digest_size=16, key=str(image.size).encode()).digest()
    if isinstance(target, Objects):
        labels = (target.labels[target.crowd == 0] - 1).tolist()
        return Seen([*faults, *_wrong_boxes(place, image.size, target, images.classes)], digest, labels)
    if isinstance(target, int):
        return Seen(faults, digest, [target])
    if isinstance(target, np.ndarray):
        counts = np.bincount(target.ravel(), minlength=IGNORED + 1)[:IGNORED]
        empty = [] if counts.any() else [Fault("mask", f"{place}: no pixel of its mask counts")]
        return Seen([*faults, *empty], digest, counts.nonzero()[0].tolist())
    return Seen(faults, digest, target.nonzero().flatten().tolist())  # a vector of 0 and 1


def _wrong_suffix(path: Path) -> list[Fault]:
    try:
        with Image.open(path) as image:
            kind = FORMATS.get(image.format, image.format)
    except Exception:  # decoders raise whatever they like; loading tells it
        return []
    if Image.registered_extensions().get(path.suffix.lower()) == kind:
        return []
    return [Fault("suffix", f"{path} is a {kind} by its content")]


def _wrong_boxes(place: str, size: tuple[int, int], objects: Objects, classes: Sequence[str]) -> Iterator[Fault]:
    """Objects whose box or mask has nothing, or leaves the image by more than a pixel."""
    (width, height), masks = size, objects.masks
    for number, (x1, y1, x2, y2) in enumerate(objects.boxes.tolist()):
        where = f"{place}: object {number + 1} ({classes[objects.labels[number] - 1]})"
        box = ", ".join(f"{value:g}" for value in (x1, y1, x2 - x1, y2 - y1))
        if x2 - x1 < 1 or y2 - y1 < 1:
            yield Fault("box", f"{where} has the box {box} (x, y, width, height) of less than a pixel")
        elif x1 < -1 or y1 < -1 or x2 > width + 1 or y2 > height + 1:
            yield Fault("box", f"{where} has the box {box} (x, y, width, height), which leaves {width} x {height}")
        if masks is not None and not masks[number].any():
            yield Fault("mask", f"{where} has a mask without a pixel")


def _duplicates(sets: dict[str, ImageSet], seen: dict[str, list[Seen]], by_class: bool) -> Iterator[Fault]:
    """Images of the same pixels in both parts, or in two classes; or at all where a part will be held out."""
    first: dict[bytes, tuple[str, str, list[int]]] = {}
    for part, images in sets.items():
        for index, (_, digest, labels) in enumerate(seen[part]):
            if digest is None:
                continue
            place = images.place(index)
            one, where, known = first.setdefault(digest, (place, part, labels))
            if one == place:
                continue
            same = f"{one} and {place} have the same pixels"
            if by_class and labels != known:
                names = " and ".join(images.classes[each[0]] for each in (known, labels))
                yield Fault("duplicate", f"{same}, in the classes {names}")
            elif part != where:
                yield Fault("duplicate", f"{same}, in {where} and {part}")
            elif part == WHOLE:
                yield Fault("duplicate", f"{same}, of which one may be held out to validate on")


def _classes(sets: dict[str, ImageSet], seen: dict[str, list[Seen]], what: str, least: int) -> Iterator[Fault]:
    """Classes that a part lacks, or of which there are too few."""
    counts: dict[str, Counter] = {}
    for part, images in sets.items():
        counts[part] = Counter(images.classes[label] for one in seen[part] for label in one.labels)
    for name in dict.fromkeys(name for images in sets.values() for name in images.classes):
        found = {part: counts[part][name] for part in sets}
        for part, count in found.items() if any(found.values()) else ():  # lists of names may be of more than there is
            if not count:
                yield Fault("class", f"class {name}: {part} has no readable {what} of it")
            elif part != "validation" and count < least:
                yield Fault("class", f"class {name}: {part} has {count} of its {what}, fewer than {least}")


def _left_over(root: Path, sets: dict[str, ImageSet], task: str) -> Iterator[Fault]:
    """Images without annotation, and annotations without image, beside those that belong together."""
    listed = {Path(images.place(index)) for images in sets.values() for index in range(len(images))}
    if task == "segmentation":
        yield from _lone_masks([pair for images in sets.values() for pair in images.source.pairs])
        return
    is_yolo = any(next((f for f in LAYOUTS if f(root, split_names(part))), None) is find_yolo for part in PARTS)
    described = {path.stem for path in find_files(root, (".xml",))}
    for folder in sorted({path.parent for path in listed}):
        for path in find_files(folder, deep=False):
            if path not in listed and path.stem not in described:
                yield Fault("unannotated", f"{path} has no annotation")
    if is_yolo:
        files = {label_file(path, root): path for path in listed}
        for file, path in sorted(files.items()):
            if not file.is_file():
                yield Fault("unannotated", f"{path} has no {file}: add an empty one if nothing is to be found in it")
        for folder in sorted({file.parent for file in files}):
            for file in find_files(folder, (".txt",), deep=False):
                if file not in files and _has_boxes(file):
                    yield Fault("missing", f"{file} annotates an image that is not there")


def _has_boxes(file: Path) -> bool:
    """Whether a text file beside those of images is like them, not a list of names."""
    if file.name in {Path(name).name for name in NAMES}:
        return False
    try:
        words = file.read_text("utf-8-sig").split()
        return bool(words) and all(float(word) is not None for word in words)
    except (OSError, ValueError):
        return False


def _lone_masks(pairs: Sequence[tuple[Path, Path]]) -> Iterator[Fault]:
    """Masks beside those of images that go by the name of no image."""
    folders = defaultdict(set)
    for image, mask in pairs:
        if image.stem == mask.stem:  # Cityscapes has further files beside its masks
            folders[mask.parent].add(image.parent)
    for folder, images in sorted(folders.items()):
        stems = {path.stem for each in images for path in find_files(each, deep=False)}
        for mask in find_files(folder, (".png",), deep=False):
            if mask.stem not in stems:
                yield Fault("missing", f"{mask} is the mask of an image that is not there")
