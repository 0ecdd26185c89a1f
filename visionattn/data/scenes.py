"""Scenes for detection and segmentation: real handwritten digits on cluttered backgrounds, made as they are asked for.

A scene follows from its split and number alone. Objects differ in scale, shape, colour and contrast and cover each
other, but none loses more than a quarter of its pixels; strokes and pieces of digits lie about, which are no objects.
Boxes and masks are exact: a pixel belongs to the topmost object that covers at least half of it, and a box is tight
around the pixels of its object that can be seen. Scenes to validate on are made of other digits than those to train on.
"""

import gzip
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..errors import optional, user_input
from .annotations import Objects, tight_boxes
from .config import AnnotationConfig
from .images import ImageSet, stratified_split

FASHION = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
MARGIN = 2  # empty pixels around a source, into which its edges fade
MIN_PIXELS = 24


@dataclass(frozen=True)
class Scene:
    """Pixels (H, W, 3), the number of the object at each pixel (H, W), 0 for none, and the objects' labels from 1."""

    pixels: np.ndarray
    owners: np.ndarray
    labels: np.ndarray

    def objects(self) -> Objects:
        """Boxes and masks of what can be seen of the objects."""
        masks = (self.owners == np.arange(1, len(self.labels) + 1)[:, None, None]).astype(np.uint8)
        areas = masks.sum((1, 2), dtype=np.float64)
        return Objects(tight_boxes(masks), self.labels, np.zeros_like(self.labels), areas, masks)

    def semantic(self) -> np.ndarray:
        """The label of the topmost object at each pixel, 0 where there is none."""
        return np.concatenate([[0], self.labels]).astype(np.uint8)[self.owners]


class Scenes:
    """The scenes of a split.

    Args:
        config: their size and so on.
        validation: make those to validate on.
        semantic: `scenes[i]` is (image, semantic map); else (image, objects).

    Attributes:
        names: names of the objects, by label - 1.
    """

    def __init__(self, config: AnnotationConfig, validation: bool, semantic: bool) -> None:
        self.size, self.most = config.scene_size, config.scene_objects
        self.validation, self.semantic = validation, semantic
        self.count = math.ceil(config.scene_count / 10) if validation else config.scene_count
        pixels, labels = _digits(validation)
        self.digits, self.names = pixels, [str(digit) for digit in range(10)]
        self.by_class = [pixels[labels == digit] for digit in range(10)]
        if config.fashion:
            pixels, labels = _fashion(Path(config.fashion), validation)
            self.by_class += [pixels[labels == item] for item in range(10)]
            self.names += FASHION

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, Objects | np.ndarray]:
        scene = self.compose(index)
        return Image.fromarray(scene.pixels), scene.semantic() if self.semantic else scene.objects()

    def compose(self, index: int) -> Scene:
        """The scene of this number."""
        rng = np.random.default_rng((int(self.validation), index))
        canvas = self._background(rng)
        owners = np.zeros((self.size, self.size), np.intp)
        labels: list[int] = []
        full = [0]  # pixels of each object, the covered ones included
        for _ in range(rng.integers(1, self.most + 1)):
            label = int(rng.integers(len(self.by_class)))
            for _ in range(5):  # places; one that would cover others too much is given up
                alpha, shade, top, left = self._item(rng, label)
                window = np.s_[top : top + alpha.shape[0], left : left + alpha.shape[1]]
                inside = alpha >= 0.5
                covered = np.bincount(owners[window][inside], minlength=len(full))
                seen = np.bincount(owners.ravel(), minlength=len(full)) - covered
                if inside.sum() >= MIN_PIXELS and (4 * seen >= 3 * np.array(full)).all():
                    labels.append(label + 1)
                    full.append(int(inside.sum()))
                    owners[window][inside] = len(labels)
                    _paint(rng, canvas[window], alpha, shade)
                    break
        canvas += rng.standard_normal(canvas.shape[:2], np.float32)[..., None] * rng.uniform(2, 12)
        return Scene(canvas.clip(0, 255).astype(np.uint8), owners, np.array(labels, np.int64))

    def _item(self, rng: np.random.Generator, label: int) -> tuple[np.ndarray, np.ndarray, int, int]:
        """Opacity and brightness of an object, and where it lies."""
        members = self.by_class[label]
        source = members[rng.integers(len(members))]
        side = int(self.size * rng.uniform(0.3, 0.5))
        value = _distorted(rng, source, side, rng.uniform(-0.25, 0.25))
        if label < 10:
            alpha, shade = (value - 70) / 90, np.ones_like(value)
        else:  # an item's silhouette, with its own pattern
            alpha, shade = value / 40, 0.35 + 0.65 * value / 255
        top, left = rng.integers(self.size - side + 1, size=2)
        return alpha.clip(0, 1), shade, top, left

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        """Blurred patches of colour, stripes, strokes and pieces of digits."""
        size = self.size
        cells = rng.integers(2, 8)
        patches = rng.uniform(0, 255, 3) + rng.uniform(-1, 1, (cells, cells, 3)) * rng.uniform(10, 90)
        image = Image.fromarray(patches.clip(0, 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(image)
        for _ in range(rng.integers(0, 4)):
            points = rng.integers(0, size, (rng.integers(2, 5), 2))
            colour = tuple(rng.integers(0, 256, 3).tolist())
            draw.line([tuple(point) for point in points.tolist()], colour, int(rng.integers(1, 4)), joint="curve")
        canvas = np.asarray(image).astype(np.float32)
        angle, period = rng.uniform(0, math.pi), rng.uniform(4, 24)
        across = np.arange(size, dtype=np.float32) * (2 * math.pi / period)
        waves = np.sin(across[:, None] * math.sin(angle) + across * math.cos(angle), dtype=np.float32)
        canvas += waves[..., None] * rng.uniform(0, 25)
        for _ in range(rng.integers(0, 3)):
            piece = self.digits[rng.integers(len(self.digits))].copy()
            piece[:, rng.integers(3, 5) :] = 0  # the left half or less, turned so that it is no digit
            side = int(size * rng.uniform(0.2, 0.45))
            value = _distorted(rng, piece, side, rng.uniform(0.25, 1.75) * math.pi)
            top, left = rng.integers(size - side + 1, size=2)
            alpha = ((value - 70) / 90).clip(0, 1)
            _paint(rng, canvas[top : top + side, left : left + side], alpha, np.ones_like(alpha))
        return canvas


def open_scenes(config: AnnotationConfig, validation: bool, semantic: bool) -> ImageSet:
    """The scenes of a split.

    Args:
        config: their size and so on.
        validation: those to validate on.
        semantic: annotated by semantic maps, whose first class is the background; else by objects.
    """
    scenes = Scenes(config, validation, semantic)
    names = [*(["background"] if semantic else []), *scenes.names]
    return ImageSet(scenes, range(len(scenes)), names, "scenes")


def _distorted(rng: np.random.Generator, source: np.ndarray, side: int, angle: float) -> np.ndarray:
    """The source at the size `side`, turned, sheared and stretched."""
    reach = source.shape[0]  # with its margin; the source fills the square once
    stretch = rng.uniform(0.85, 1.2)
    shear = rng.uniform(-0.2, 0.2)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = turn @ np.array([[stretch, shear], [0, 1 / stretch]]) * ((reach - 2 * MARGIN + 1) / side)
    shift = reach / 2 - matrix @ [side / 2, side / 2]
    coefficients = (*matrix[0], shift[0], *matrix[1], shift[1])
    image = Image.fromarray(source).transform(
        (side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC
    )
    return np.asarray(image).astype(np.float32)


def _paint(rng: np.random.Generator, window: np.ndarray, alpha: np.ndarray, shade: np.ndarray) -> None:
    """Lay an object of a new colour, as bright or dark as to stand out, over a part of the canvas."""
    behind = window.mean((0, 1))
    colours = rng.uniform(0, 255, (6, 3)).astype(np.float32)
    contrast = np.abs((colours - behind) @ np.array([0.3, 0.6, 0.1], np.float32))
    enough = np.flatnonzero(contrast > 60)
    colour = colours[enough[0] if len(enough) else contrast.argmax()]
    window += alpha[..., None] * (shade[..., None] * colour - window)


def _digits(validation: bool) -> tuple[np.ndarray, np.ndarray]:
    """Digits of one side of the split that `--data.name digits` makes, with margins, and what they are."""
    with optional():
        from sklearn.datasets import load_digits

    digits = load_digits()
    stay, held_out = stratified_split(digits.target, 0.2)
    chosen = held_out if validation else stay
    pixels = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)  # 8 x 8 counts from 0 to 16
    return _with_margin(pixels), digits.target[chosen]


def _fashion(folder: Path, validation: bool) -> tuple[np.ndarray, np.ndarray]:
    """Items of Fashion-MNIST, with margins, and what they are."""
    part = "t10k" if validation else "train"
    with user_input(f"annotations.fashion {folder} does not hold Fashion-MNIST's files", OSError, ValueError):
        images, labels = (
            gzip.decompress((folder / f"{part}-{name}-ubyte.gz").read_bytes())
            for name in ("images-idx3", "labels-idx1")
        )
        pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    return _with_margin(pixels), np.frombuffer(labels, np.uint8, offset=8)


def _with_margin(pixels: np.ndarray) -> np.ndarray:
    return np.pad(pixels, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)))
