"""Loaders whose sample order and augmentation follow from (seed, epoch, sample index) alone.

Neither the number of workers, nor a restart, nor the number of processes that share a batch changes what is drawn.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ..errors import VisionattnError
from .datasets import ImageSet


class Stream(IntEnum):
    """What randomness is drawn for; each has generators of its own."""

    ORDER = 0
    AUGMENT = 1
    MIX = 2
    MODEL = 3


def derive_seed(seed: int, stream: Stream, *key: int) -> int:
    """A 64-bit seed for the draws of `stream` at `key`."""
    low, high = np.random.SeedSequence((seed, stream, *key)).generate_state(2, np.uint32).tolist()
    return low | high << 32


@contextmanager
def seeded(seed: int, stream: Stream, *key: int) -> Iterator[None]:
    """Draw from Python's, NumPy's and torch's generators as `seed` and `key` say, then put them back."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = derive_seed(seed, stream, *key)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


class TrainSampler(Sampler):
    """This process's batches of (epoch, index), in the order that (seed, epoch) gives.

    Every update takes the next `batch_size * processes * accumulation` images, of which each batch of each process is
    a part. The images that do not fill an update wait for another epoch's order; a set too small for one update is
    repeated to fill it.

    Args:
        length: Number of images.
        batch_size: Images per batch of one process.
        seed: Seed of the order.
        accumulation: Batches of one process per update.
        rank: Number of this process.
        processes: Number of processes.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int = 0, accumulation: int = 1, rank: int = 0, processes: int = 1
    ) -> None:
        self.length, self.batch_size, self.seed, self.accumulation = length, batch_size, seed, accumulation
        self.rank, self.processes = rank, processes
        self.images_per_update = batch_size * processes * accumulation
        self.updates = max(1, length // self.images_per_update)
        self.epoch = self.first_update = 0

    def __len__(self) -> int:
        return (self.updates - self.first_update) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, Stream.ORDER, self.epoch))
        order = torch.randperm(self.length, generator=generator)
        order = order.repeat(-(-self.images_per_update // self.length))
        parts = self.processes * self.accumulation
        half = self.batch_size // 2
        for update in range(self.first_update, self.updates):
            images = order[update * self.images_per_update :][: self.images_per_update]
            # A part is a slice of the front and its mirror image at the back: mixup pairs each image with its mirror
            # in the batch, so the pairs are the same however an update is parted.
            front, back = images[: parts * half].split(half or 1), images[parts * half :].split(self.batch_size - half)
            for batch in range(self.accumulation):
                part = batch * self.processes + self.rank
                mine = torch.cat([*([front[part]] if half else []), back[parts - 1 - part]])
                yield [(self.epoch, index) for index in mine.tolist()]


class SampleDataset(Dataset):
    """Decodes and transforms the image at (epoch, index); an unreadable one comes back as the error it raised."""

    def __init__(self, images: ImageSet, transform: Callable, seed: int, mode: str) -> None:
        self.images, self.transform, self.seed, self.mode = images, transform, seed, mode

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int] | VisionattnError:
        try:
            image, label = self.images.load(key[1], self.mode)
        except VisionattnError as error:
            return error
        with seeded(self.seed, Stream.AUGMENT, *key):
            return self.transform(image), label


def train_loader(
    images: ImageSet, transform: Callable, sampler: TrainSampler, mode: str, num_workers: int
) -> DataLoader:
    """Batches in the sampler's order."""
    return _loader(SampleDataset(images, transform, sampler.seed, mode), sampler, num_workers)


def eval_loader(
    images: ImageSet,
    transform: Callable,
    batch_size: int,
    mode: str,
    num_workers: int,
    rank: int = 0,
    processes: int = 1,
) -> DataLoader:
    """This process's share of the images, each of which falls to exactly one process."""
    mine = [(0, index) for index in range(rank, len(images), processes)]
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    return _loader(SampleDataset(images, transform, 0, mode), batches, num_workers)


def read_batches(loader: DataLoader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The loader's batches; raises the error of an unreadable image as it was raised, whichever worker met it."""
    for batch in loader:
        if isinstance(batch, VisionattnError):
            raise batch
        yield batch


def _loader(dataset: Dataset, batches: Sampler | list, num_workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )


def _collate(samples: list) -> list[torch.Tensor] | VisionattnError:
    # Returned rather than raised: a worker's exception would reach the caller with its traceback as its message.
    return next((sample for sample in samples if isinstance(sample, VisionattnError)), None) or default_collate(samples)
