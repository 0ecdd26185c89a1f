"""Loaders whose sample order and augmentation follow from (seed, epoch, sample index) alone.

Neither the number of workers, nor a restart, nor the number of processes that share a batch changes what is drawn.
"""

import logging
import os
import random
import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from functools import partial
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.sharedctypes import RawArray
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from ..errors import VisionattnError
from .images import ImageSet

_logger = logging.getLogger(__name__)


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
    with _generators_put_back():
        _seed_generators(derive_seed(seed, stream, *key))
        yield


@contextmanager
def _generators_put_back() -> Iterator[None]:
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


def _seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


def choose_workers(wanted: int | None, device: torch.device, processes: int = 1) -> int:
    """How many processes load images for a training process: what the options say, else by the cores there are.

    On a CPU training takes the cores itself, and one process in eight cores keeps up with it; beside a GPU all load, up
    to eight, beyond which the disk is slower.

    Args:
        wanted: `data.num_workers`.
        device: that trains.
        processes: that train, among which the cores of the machine are shared.
    """
    if wanted is not None:
        return wanted
    cores = count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return min(max(cores // 8 if device.type == "cpu" else cores, 1), 8)


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Batch(NamedTuple):
    """Images (B, C, H, W), or a list of (C, H, W) of any sizes; their targets and their indices in the image set."""

    images: Tensor | list[Tensor]
    targets: Any
    indices: Tensor


def collate_tensors(images: Sequence[Tensor], targets: Sequence[Any]) -> tuple[Tensor, Any]:
    """A batch of images of one size."""
    return default_collate(list(images)), default_collate(list(targets))


Collate = Callable[[Sequence[Tensor], Sequence[Any]], tuple[Any, Any]]
"""Makes images and targets of a batch of those of samples."""


class TrainSampler(Sampler):
    """This process's batches of (draw, index), in the order that (seed, epoch) gives.

    The draw numbers the occasions on which epochs may have taken the image; its augmentation follows from that.

    Every update takes the next `batch_size * processes * accumulation` images, of which each batch of each process is
    a part. The images that do not fill an update wait for another epoch's order; a set too small for one update is
    repeated to fill it.

    Args:
        length: number of images.
        batch_size: images per batch of one process.
        seed: seed of the order.
        accumulation: batches of one process per update.
        rank: number of this process.
        processes: number of processes.
        repeats: draws in a row of each image an epoch takes; its length stays, so it takes fewer images.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        accumulation: int = 1,
        rank: int = 0,
        processes: int = 1,
        repeats: int = 1,
    ) -> None:
        self.length, self.batch_size, self.seed, self.accumulation = length, batch_size, seed, accumulation
        self.rank, self.processes, self.repeats = rank, processes, repeats
        self.images_per_update = batch_size * processes * accumulation
        self.updates = max(1, length // self.images_per_update)
        self.epoch = self.first_update = 0

    def __len__(self) -> int:
        return (self.updates - self.first_update) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, Stream.ORDER, self.epoch))
        order = torch.randperm(self.length, generator=generator).repeat_interleave(self.repeats)[: self.length]
        draws = torch.arange(self.length) % self.repeats + self.epoch * self.repeats
        order = torch.stack([draws, order], 1).repeat(-(-self.images_per_update // self.length), 1)
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
                yield [(draw, index) for draw, index in mine.tolist()]


class Sample(NamedTuple):
    """What a batch is made of; no image if too many in a row are unreadable."""

    image: Tensor | None
    target: Any
    index: int
    errors: dict[int, str]  # of the unreadable images before it that it stands in for


class SampleDataset(Dataset):
    """Decodes and transforms the image at (draw, index), or the next one that is readable.

    Args:
        images: the images.
        transform: makes a tensor of an image, and its target, from the image and what the set says of it.
        seed: seed of the augmentation.
        mode: what images are converted to.
        num_workers: number of loading processes.
        max_bad: unreadable images that one pass may meet.
        folder: of the data, which errors name the command for that lists all that is wrong in it.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: Callable,
        seed: int,
        mode: str,
        num_workers: int,
        max_bad: int = 0,
        folder: str | None = None,
    ) -> None:
        self.images, self.transform, self.seed, self.mode, self.max_bad = images, transform, seed, mode, max_bad
        self.folder = folder
        self.unreadable: dict[int, str] = {}  # the errors met so far, by image
        self.workers = RawArray("q", 2 * num_workers)  # process id of each and the image that it is at, or -1

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Sample]:
        """Samples of a batch."""
        with _generators_put_back():  # which is too slow to do for each
            return [self._load(*key) for key in keys]

    def _load(self, draw: int, wanted: int) -> Sample:
        errors: dict[int, str] = {}
        for offset in range(min(len(self.images), self.max_bad + 1)):
            index = (wanted + offset) % len(self.images)
            self._note(index)
            try:
                image, target = self.images.load(index, self.mode)
            except VisionattnError as error:
                errors[index] = str(error)
                continue
            try:
                _seed_generators(derive_seed(self.seed, Stream.AUGMENT, draw, wanted))
                image, target = self.transform(image, target)
            except Exception as error:
                error.add_note(f"This happened to {self.images.place(index)}")
                raise
            self._note(-1)
            return Sample(image, target, index, errors)
        return Sample(None, None, wanted, errors)

    def _note(self, index: int) -> None:
        if worker := get_worker_info():
            self.workers[2 * worker.id : 2 * worker.id + 2] = os.getpid(), index


def train_loader(
    images: ImageSet,
    transform: Callable,
    sampler: TrainSampler,
    mode: str,
    num_workers: int,
    max_bad_fraction: float = 0.0,
    collate: Collate = collate_tensors,
    folder: str | None = None,
) -> DataLoader:
    """Batches in the sampler's order; up to `max_bad_fraction` of an epoch's images may be unreadable, and replaced."""
    taken = sampler.updates * sampler.accumulation * sampler.batch_size / sampler.repeats
    max_bad = int(max_bad_fraction * taken)
    dataset = SampleDataset(images, transform, sampler.seed, mode, num_workers, max_bad, folder)
    return _loader(dataset, sampler, num_workers, collate)


def eval_loader(
    images: ImageSet,
    transform: Callable,
    batch_size: int,
    mode: str,
    num_workers: int,
    rank: int = 0,
    processes: int = 1,
    collate: Collate = collate_tensors,
    folder: str | None = None,
) -> DataLoader:
    """This process's share of the images, each of which falls to exactly one process."""
    mine = [(0, index) for index in range(rank, len(images), processes)]
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    return _loader(SampleDataset(images, transform, 0, mode, num_workers, folder=folder), batches, num_workers, collate)


def read_batches(loader: DataLoader) -> Iterator[Batch]:
    """The loader's batches of one pass; an image that is replaced is logged the first time.

    Raises:
        VisionattnError: too many images are unreadable, or a loading process died.
    """
    dataset, bad = loader.dataset, set()
    for batch, errors in _named_deaths(loader):
        bad |= errors.keys()
        if batch is None or len(bad) > dataset.max_bad:
            told = (
                f" ({len(bad)} images are unreadable, more than data.max_bad_fraction allows)" if len(bad) > 1 else ""
            )
            if dataset.folder:
                told += f"; all that is wrong: visionattn check {shlex.quote(dataset.folder)}"
            raise VisionattnError(next(reversed(errors.values())) + told)
        for index, error in errors.items():
            if index not in dataset.unreadable:
                _logger.warning("%s; the next readable image stands in for it", error)
        dataset.unreadable |= errors
        yield batch


def _named_deaths(loader: DataLoader) -> Iterator[tuple[Batch | None, dict[int, str]]]:
    """The loader's batches; if a loading process dies, an error says at which image."""
    try:
        yield from _without_interruption(loader)
    except Exception as error:  # of the connection to the process, or torch's own once it has noticed
        workers, images = loader.dataset.workers, loader.dataset.images
        current = {pid: index for pid, index in zip(workers[::2], workers[1::2], strict=True) if pid}
        alive = {process.sentinel: process.pid for process in active_children() if process.pid in current}
        if len(alive) == len(current):  # one may be dying just now
            for sentinel in wait(list(alive), timeout=1):
                del alive[sentinel]
        dead = current.keys() - alive.values()
        if not dead:
            raise
        places = ", ".join(images.place(current[pid]) for pid in dead if current[pid] >= 0) or "no image"
        raise VisionattnError(f"a loading process was killed, or ran out of memory, at {places}") from error


def _without_interruption(loader: DataLoader) -> Iterator:
    """Iterate without torch's signal handler, which raises a worker's death at any moment, as while a file is written.

    The death is then found when a batch of that worker is awaited.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _loader(dataset: SampleDataset, batches: Sampler | list, num_workers: int, collate: Collate) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=partial(_collate, collate),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )


def _collate(collate: Collate, samples: list[Sample]) -> tuple[Batch | None, dict[int, str]]:
    # Errors are returned, not raised: a worker's exception would reach the caller with its traceback as its message.
    images, targets, indices, errors = zip(*samples, strict=True)
    errors = {index: error for found in errors for index, error in found.items()}
    if any(image is None for image in images):
        return None, errors
    try:
        return Batch(*collate(images, targets), torch.tensor(indices)), errors
    except VisionattnError as error:
        return None, errors | {indices[0]: str(error)}
