"""What the mixers are compared on: items of Fashion-MNIST, and whether two on a canvas are of the same class."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from visionattn.data.config import DataConfig
from visionattn.data.images import ImageSet, load_datasets

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""
SIDE, CANVAS, ITEM = 32, 64, 16
"""Sides in pixels of an image, of a canvas, and of an item on it."""


@dataclass(frozen=True)
class Items:
    """Images of one kind of things.

    Args:
        pixels: (n, 32, 32), from 0 to 1, zero-padded.
        labels: (n,).
        mean: of the pixels to train on, the padding included.
        std: likewise.
    """

    pixels: np.ndarray
    labels: np.ndarray
    mean: float
    std: float

    def images(self, pixels: np.ndarray) -> Tensor:
        """(B, H, W) pixels to (B, 1, H, W) of mean 0 and deviation 1."""
        return torch.from_numpy((pixels - self.mean) / self.std)[:, None]


@cache
def load_items(root: str) -> tuple[Items, Items]:
    """Items to train and to test on.

    Args:
        root: folder of Fashion-MNIST's files, into which torchvision downloads them if it has none; "digits" for the
            digits of scikit-learn.
    """
    digits = root == "digits"
    config = DataConfig() if digits else DataConfig("torch/fashion_mnist", root, download=True)
    (pixels, labels), test = (_arrays(images, 3 if digits else 1) for images in load_datasets(config))
    scale = float(pixels.mean()), float(pixels.std())
    return Items(pixels, labels, *scale), Items(*test, *scale)


def _arrays(images: ImageSet, times: int) -> tuple[np.ndarray, np.ndarray]:
    loaded = [images.load(i, "L") for i in range(len(images))]
    pixels = np.array([image for image, _ in loaded], np.float32).repeat(times, 1).repeat(times, 2) / 255
    margin = (SIDE - pixels.shape[1]) // 2
    return np.pad(pixels, ((0, 0), (margin, margin), (margin, margin))), np.array([label for _, label in loaded])


class Classify:
    """Which of the classes an item is of.

    Args:
        train: items to train on.
        test: items to test on.
        count: the first so many of those to train on.
        augment: mirror and shift them, by at most 2 pixels.
    """

    img_size, patch_size = SIDE, 4

    def __init__(self, train: Items, test: Items, count: int, augment: bool = False) -> None:
        self.train, self.test, self.count, self.augment = train, test, min(count, len(train.labels)), augment
        self.num_classes, self.test_count = int(train.labels.max()) + 1, len(test.labels)

    def __len__(self) -> int:
        return self.count

    def batch(self, seed: int, epoch: int, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images and labels of samples to train on."""
        pixels = self.train.pixels[samples]
        if self.augment:
            pixels = np.stack([self._moved(x, seed, epoch, int(i)) for x, i in zip(pixels, samples, strict=True)])
        return self.train.images(pixels), torch.from_numpy(self.train.labels[samples])

    def _moved(self, x: np.ndarray, seed: int, epoch: int, sample: int) -> np.ndarray:
        rng = np.random.default_rng((seed, epoch, sample))
        top, left, mirror = rng.integers((5, 5, 2))
        return np.pad(x[:, ::-1] if mirror else x, 2)[top : top + SIDE, left : left + SIDE]

    def tests(self, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images and labels to test on."""
        return self.test.images(self.test.pixels[samples]), torch.from_numpy(self.test.labels[samples])


class SameOrDifferent:
    """Whether two items at random places of a canvas, which do not overlap, are of the same class (1) or not (0).

    Both items are of every class equally often and at every place equally often whatever the answer is, so that nothing
    tells it but the two together. Every epoch has pairs of its own.

    Args:
        train: items to make pairs of to train on.
        test: items to make pairs of to test on.
        count: pairs of an epoch.
        test_count: pairs to test on.
    """

    img_size, patch_size, num_classes = CANVAS, 8, 2

    def __init__(self, train: Items, test: Items, count: int, test_count: int = 4000) -> None:
        self.train, self.test, self.count, self.test_count = train, test, count, test_count
        self.members = [[np.flatnonzero(items.labels == c) for c in np.unique(train.labels)] for items in (train, test)]
        self.small = [
            items.pixels.reshape(-1, ITEM, SIDE // ITEM, ITEM, SIDE // ITEM).mean((2, 4)) for items in (train, test)
        ]

    def __len__(self) -> int:
        return self.count

    def batch(self, seed: int, epoch: int, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images and answers of samples to train on."""
        return self._draw([self.pair(False, seed, epoch, int(i)) for i in samples], False)

    def tests(self, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images and answers to test on."""
        return self._draw([self.pair(True, 0, 0, int(i)) for i in samples], True)

    def distances(self) -> np.ndarray:
        """Pixels between the middles of the two items of every pair to test on."""
        places = np.array([self.pair(True, 0, 0, i)[1] for i in range(self.test_count)])  # (n, 2, 2)
        return np.hypot(*(places[:, 0] - places[:, 1]).T)

    def pair(self, test: bool, seed: int, epoch: int, sample: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Two items, their (top, left) each, and the answer: a function of seed, epoch and sample."""
        rng, members = np.random.default_rng((test, seed, epoch, sample)), self.members[test]
        same = sample % 2
        first = rng.integers(len(members))
        second = first if same else (first + rng.integers(1, len(members))) % len(members)
        items = np.array([rng.choice(members[c]) for c in (first, second)])
        places = rng.integers(CANVAS - ITEM + 1, size=(2, 2))
        while (abs(places[0] - places[1]) < ITEM).all():
            places = rng.integers(CANVAS - ITEM + 1, size=(2, 2))
        return items, places, same

    def _draw(self, pairs: list[tuple[np.ndarray, np.ndarray, int]], test: bool) -> tuple[Tensor, Tensor]:
        canvas = np.zeros((len(pairs), CANVAS, CANVAS), np.float32)
        for i, (items, places, _) in enumerate(pairs):
            for item, (top, left) in zip(items, places, strict=True):
                canvas[i, top : top + ITEM, left : left + ITEM] = self.small[test][item]
        return self.train.images(canvas), torch.tensor([same for _, _, same in pairs])
