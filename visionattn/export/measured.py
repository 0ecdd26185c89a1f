"""What an exported file costs in accuracy and what it gains in speed, on images of a folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, pil_to_tensor

from ..data.config import DataConfig
from ..data.images import load_datasets, to_mode
from ..data.paths import find_files
from ..data.preprocessing import create_transform, model_preprocessing
from ..errors import VisionattnError, user_input
from ..measure import in_turns
from ..progress import track
from .about import about_model, task_of
from .graph import traced
from .running import Run, as_list

CALIBRATION = 64
"""Images that ranges of values are found with."""


@dataclass(frozen=True)
class Folder:
    """Images of a folder.

    Args:
        calibration: paths of some to find ranges of values with, those of train/ where there is one.
        files: paths of those that accuracy is measured on.
        labels: of these, as the model counts classes; None where the folder's classes are not the model's.
    """

    calibration: list[str]
    files: list[str]
    labels: list[int] | None


def open_folder(path: str | Path, model: nn.Module) -> Folder:
    """The images of a folder: a folder per class, with train/ and val/ or without, or any images.

    Args:
        path: of the folder.
        model: whose classes are looked for in the names of the folders, or counted.

    Raises:
        VisionattnError: if it holds no images.
    """
    if not Path(path).is_dir():
        raise VisionattnError(f"--data {path} is not a folder")
    try:
        train, val = load_datasets(DataConfig(root=str(path)))
    except VisionattnError:
        files = [str(file) for file in find_files(path)]
        if not files:
            raise VisionattnError(f"{path} holds no images") from None
        return Folder(_some(files), files, None)
    names, labels = about_model(model)["classes"] or [], None
    known = {name: number for number, name in enumerate(names)}
    if subset := infer_imagenet_subset(model):  # whose folders go by their numbers in WordNet
        known |= {name: number for number, name in enumerate(ImageNetInfo(subset).label_names())}
    if known.keys() >= set(val.classes):
        labels = [known[val.classes[val.source.samples[i][1]]] for i in val.indices]
    elif len(val.classes) == getattr(model, "num_classes", None):
        labels = [val.source.samples[i][1] for i in val.indices]
    taken = [[images.place(i) for i in range(len(images))] for images in (train, val)]
    return Folder(_some(taken[0]), taken[1], labels if task_of(model) == "classification" else None)


def prepared(file: str, model: nn.Module, size: tuple[int, int] | None = None) -> Tensor:
    """An image (1, C, H, W) as the model wants it; for dense prediction it is resized to `size`, not cropped.

    Args:
        file: of the image.
        model: whose preparation it is.
        size: height and width; None: the model's own.
    """
    own = model_preprocessing(model)
    size = size or own["input_size"][1:]
    with user_input(f"cannot read {file}", OSError, ValueError), Image.open(file) as opened:
        image = to_mode(opened, "L" if own["input_size"][0] == 1 else "RGB")
    if task_of(model) in ("classification", "features"):
        return create_transform(model, input_size=(own["input_size"][0], *size))(image)[None]
    image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return normalize(pil_to_tensor(image).float() / 255, own["mean"], own["std"])[None]


def calibration(folder: Folder, model: nn.Module, size: tuple[int, int] | None = None) -> list[Tensor]:
    """The folder's images to find ranges of values with, prepared."""
    return [prepared(file, model, size) for file in track(folder.calibration, "images for int8")]


@torch.no_grad()
def compare(run: Run, model: nn.Module, folder: Folder, size: tuple[int, int] | None = None) -> list[dict]:
    """What the model and the file that was made from it are worth on the images of a folder.

    Args:
        run: the file's.
        model: the model.
        folder: with the images.
        size: height and width of the images; None: the model's own.

    Returns:
        a row for PyTorch and one for the file: "top1" in per cent where labels are known, "agree", the per cent of
        images (of pixels, for segmenters) that are given the model's class, and "ms" for an image; of detectors and
        feature extractors "ms" alone.
    """
    module, classifies = traced(model), task_of(model) in ("classification", "segmentation")
    right, same, count = [0, 0], 0.0, len(folder.files)
    if classifies:
        for number, file in enumerate(track(folder.files, "images compared")):
            x = prepared(file, model, size)
            ours, theirs = (as_list(call(x))[0].argmax(1) for call in (module, run))
            same += (ours == theirs).float().mean().item()
            if folder.labels is not None:
                right = [
                    n + int(out.item() == folder.labels[number]) for n, out in zip(right, (ours, theirs), strict=True)
                ]
    x = prepared(folder.files[0], model, size)
    rows = [{"ms": 1e3 * median(times)} for times in in_turns([lambda: module(x), lambda: run(x)], 7, _seconds)]
    for row, n, share in zip(rows, right, (1.0, same / count), strict=True):
        row |= {"agree": 100 * share} if classifies else {}
        row |= {"top1": 100 * n / count} if folder.labels is not None else {}
    return rows


def _seconds(call, times: int = 1) -> float:
    begin = perf_counter()
    for _ in range(times):
        call()
    return (perf_counter() - begin) / times


def _some(files: Sequence[str]) -> list[str]:
    return list(files[:: max(1, len(files) // CALIBRATION)][:CALIBRATION])
