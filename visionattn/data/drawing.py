"""Pictures of what a model finds: boxes, masks and semantic maps over the image."""

import colorsys
import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from .annotations import IGNORED


def palette(count: int) -> list[tuple[int, int, int]]:
    """Colours that differ, and stay the same when their number grows: golden steps around the circle of hues."""
    steps = ((0.6180339887 * i % 1, 0.9 - 0.25 * (i % 2), 1 - 0.2 * (i % 3)) for i in range(count))
    return [tuple(round(255 * part) for part in colorsys.hsv_to_rgb(*step)) for step in steps]


def draw_objects(
    image: Image.Image, found: dict[str, Tensor], classes: Sequence[str], threshold: float = 0.5
) -> Image.Image:
    """The image with boxes, names and, if there are any, masks.

    Args:
        image: the image.
        found: "boxes", "labels" from 1 and, if any, "masks" (N, H, W) in the image's pixels; "scores" if a model found
            them.
        classes: names of the classes.
        threshold: least score of what is drawn.
    """
    found = {name: value.cpu() for name, value in found.items()}
    scores = found.get("scores")
    drawn = torch.arange(len(found["boxes"])) if scores is None else (scores >= threshold).nonzero()[:, 0]
    picture = pil_to_tensor(image.convert("RGB"))
    if not len(drawn):
        return to_pil_image(picture)
    labels = found["labels"][drawn].tolist()
    names = [classes[label - 1] for label in labels]
    if scores is not None:
        names = [f"{name} {100 * score:.0f}" for name, score in zip(names, scores[drawn].tolist(), strict=True)]
    colours = [palette(len(classes))[label - 1] for label in labels]
    if "masks" in found:
        picture = draw_segmentation_masks(picture, found["masks"][drawn].bool(), 0.5, colours)
    boxes = found["boxes"][drawn]
    edges = torch.tensor([image.width - 1, image.height - 1, image.width - 1, image.height - 1], dtype=boxes.dtype)
    return to_pil_image(draw_bounding_boxes(picture, boxes.clamp(min=0).minimum(edges), names, colours))


def draw_map(image: Image.Image, labels: Tensor, classes: Sequence[str]) -> Image.Image:
    """The image under the colours of its classes; background and pixels that do not count stay as they are.

    Args:
        image: the image.
        labels: (H, W), the class of each pixel.
        classes: names of the classes.
    """
    labels = labels.cpu()
    shown = [label for label in labels.unique().tolist() if label != IGNORED and classes[label] != "background"]
    picture = pil_to_tensor(image.convert("RGB"))
    if not shown:
        return to_pil_image(picture)
    masks = torch.stack([labels == label for label in shown])
    colours = palette(len(classes))
    return to_pil_image(draw_segmentation_masks(picture, masks, 0.6, [colours[label] for label in shown]))


def to_image(tensor: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """The image of a normalised tensor (C, H, W)."""
    tensor = tensor.detach().cpu().float() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return to_pil_image(tensor.clamp(0, 1))


def grid(pictures: Sequence[Image.Image], gap: int = 4) -> Image.Image:
    """Pictures side by side, in rows that make about a square."""
    columns = math.ceil(math.sqrt(len(pictures)))
    width, height = max(p.width for p in pictures) + gap, max(p.height for p in pictures) + gap
    sheet = Image.new("RGB", (columns * width - gap, math.ceil(len(pictures) / columns) * height - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet
