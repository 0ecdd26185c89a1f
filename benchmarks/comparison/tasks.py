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
SIDE, CANVAS, ITEM, STEP = 32, 64, 16, 8
"""Sides in pixels of an image, of a canvas, and of an item on it, and what the places of items are multiples of."""
CLASSES = (1, 2, 8, 9)
"""Of the items on canvases, which are easily told apart: of Fashion-MNIST trousers, pullovers, bags and boots."""
ALONE = 1 / 3
"""Share of the epochs, the first ones, in which canvases have one item, of which the class is to be told."""
UNDECIDED = 0.05
"""An answer whose probability is nearer to one half counts one half."""


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

    def outputs(self, epoch: int | None = None) -> slice:
        """The outputs that answer, in an epoch or in tests."""
        return slice(None)

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

    def credit(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B,) what answers are worth, 1 if they are right."""
        return (logits.argmax(1) == labels).double()

    def tests(self, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images and labels to test on."""
        return self.test.images(self.test.pixels[samples]), torch.from_numpy(self.test.labels[samples])


class SameOrDifferent:
    """Whether two items at random places of a canvas, which do not overlap, are of the same class (1) or not (0).

    Both items are of every class equally often and at every place equally often whatever the answer is, so that nothing
    tells it but the two together: the least loss of a network that adds up what each place says by itself is that of no
    answer. Training comes so near to it that the sign of what is left is accident, and right for one to two pairs in
    three. Hence what is not decided counts one half.

    Every epoch has pairs of its own. In the first epochs the first item of each pair is alone, and its class is asked
    for by outputs of their own, so that what is learned after them is the exchange.

    Args:
        train: items to make pairs of to train on.
        test: items to make pairs of to test on.
        count: pairs of an epoch.
        epochs: of training.
        test_count: pairs to test on.
    """

    img_size, patch_size, num_classes = CANVAS, 8, 2 + len(CLASSES)

    def __init__(self, train: Items, test: Items, count: int, epochs: int, test_count: int = 4000) -> None:
        self.count, self.test_count, self.alone = count, test_count, round(ALONE * epochs)
        self.scale, both = train, (train, test)
        self.members = [[np.flatnonzero(items.labels == label) for label in CLASSES] for items in both]
        shape = (-1, ITEM, SIDE // ITEM, ITEM, SIDE // ITEM)
        self.small = [items.pixels.reshape(shape).mean((2, 4)) for items in both]

    def __len__(self) -> int:
        return self.count

    def outputs(self, epoch: int | None = None) -> slice:
        """The outputs that answer, in an epoch or in tests."""
        return slice(2, None) if epoch is not None and epoch < self.alone else slice(2)

    def batch(self, seed: int, epoch: int, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images and answers of samples to train on."""
        return self._draw([self.pair(False, seed, epoch, int(i)) for i in samples], False, epoch < self.alone)

    def tests(self, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images and answers to test on."""
        return self._draw([self.pair(True, 0, 0, int(i)) for i in samples], True)

    def credit(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B,) what answers are worth: 1 if they are right, one half if they are not decided."""
        own = logits.double().softmax(1).gather(1, labels[:, None])[:, 0]
        return torch.where((own - 0.5).abs() < UNDECIDED, 0.5, (own > 0.5).double())

    def distances(self) -> np.ndarray:
        """Pixels between the middles of the two items of every pair to test on."""
        places = np.array([self.pair(True, 0, 0, i)[2] for i in range(self.test_count)])  # (n, 2, 2)
        return np.hypot(*(places[:, 0] - places[:, 1]).T)

    def pair(self, test: bool, seed: int, epoch: int, sample: int) -> tuple[np.ndarray, ...]:
        """Two items, their classes, and (top, left) of each: a function of seed, epoch and sample."""
        rng, members = np.random.default_rng((test, seed, epoch, sample)), self.members[test]
        first = rng.integers(len(members))
        second = first if sample % 2 else (first + rng.integers(1, len(members))) % len(members)
        items = np.array([rng.choice(members[label]) for label in (first, second)])
        places = np.zeros((2, 2), int)
        while (abs(places[0] - places[1]) < ITEM).all():
            places = STEP * rng.integers((CANVAS - ITEM) // STEP + 1, size=(2, 2))
        return items, np.array([first, second]), places

    def _draw(self, pairs: list[tuple], test: bool, alone: bool = False) -> tuple[Tensor, Tensor]:
        canvas = np.zeros((len(pairs), CANVAS, CANVAS), np.float32)
        for i, (items, _, places) in enumerate(pairs):
            for item, (top, left) in list(zip(items, places, strict=True))[: 1 if alone else 2]:
                canvas[i, top : top + ITEM, left : left + ITEM] = self.small[test][item]
        labels = np.stack([labels for _, labels, _ in pairs])
        answers = labels[:, 0] if alone else (labels[:, 0] == labels[:, 1]).astype(np.int64)
        return self.scale.images(canvas), torch.from_numpy(answers)
