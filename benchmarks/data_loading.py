"""Images per second and core of our data pipeline, against timm's own loader on the same JPEGs and transforms.

    python benchmarks/data_loading.py [--workers 0 1] [--images 640] [--size 224] [--rounds 5]

The JPEGs, 500 x 375, are crops of scikit-learn's two photographs, written to a temporary folder. Both loaders decode,
crop, flip, apply RandAugment, normalise and collate on one core, either in the process itself or in one worker. They
take turns, an epoch each; the table gives the median speed of each and the median of the rounds' ratios ours / timm.
"""

import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from common import Parser
from PIL import Image
from timm.data import create_dataset, create_loader

from visionattn.data.config import AugmentConfig, DataConfig
from visionattn.data.images import load_validation
from visionattn.data.loader import TrainSampler, read_batches, train_loader
from visionattn.data.transforms import OnImage, train_transform
from visionattn.errors import run
from visionattn.measure import positive


def write_jpegs(folder: Path, count: int) -> None:
    """Random crops of two photographs, in a folder for each."""
    from sklearn.datasets import load_sample_images  # slow to import, and not for --help

    rng = np.random.default_rng(0)
    for label, photo in enumerate(load_sample_images().images):
        (folder / str(label)).mkdir()
        for i in range(count // 2):
            top, left = (rng.integers(0, size - part + 1) for size, part in zip(photo.shape, (375, 500), strict=False))
            crop = Image.fromarray(photo[top : top + 375, left : left + 500])
            crop.save(folder / str(label) / f"{i}.jpg", quality=90)


def images_per_second(batches: Iterable) -> float:
    """Speed of one epoch."""
    images, start = 0, time.perf_counter()
    for batch in batches:
        images += len(batch[0])
    return images / (time.perf_counter() - start)


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=(0, 1), help="loading processes to measure with")
    parser.add_argument("--images", type=positive, default=640, help="number of JPEGs")
    parser.add_argument("--size", type=positive, default=224, help="height and width of the inputs in pixels")
    parser.add_argument("--batch", type=positive, default=64, help="images per batch")
    parser.add_argument("--rounds", type=positive, default=5, help="epochs of each, taken in turns")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    augment = AugmentConfig(hflip=0.5, auto_augment="rand-m9-mstd0.5-inc1", scale=(0.08, 1.0), ratio=(0.75, 1.3333))
    with TemporaryDirectory() as folder:
        write_jpegs(Path(folder), args.images)
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        config = DataConfig(root=folder, img_size=args.size, mean=mean, std=std, interpolation="bicubic")
        images, transform = load_validation(DataConfig(root=folder, val_fraction=1.0)), train_transform(config, augment)
        print(f"{'workers':>8} {'timm images/s':>14} {'ours images/s':>14} {'ours / timm':>12}")
        for workers in args.workers:
            sampler = TrainSampler(len(images), args.batch)
            ours = train_loader(images, OnImage(transform), sampler, "RGB", workers)
            theirs = create_loader(
                create_dataset("", root=folder, split="none"),
                (3, args.size, args.size),
                args.batch,
                is_training=True,
                use_prefetcher=False,
                num_workers=workers,
                persistent_workers=workers > 0,
                device=torch.device("cpu"),
            )
            theirs.dataset.transform = transform
            speeds = []
            for sampler.epoch in range(args.rounds + 1):
                our_speed, timm_speed = images_per_second(read_batches(ours)), images_per_second(theirs)
                speeds.append((timm_speed, our_speed, our_speed / timm_speed))
            timm_speed, our_speed, ratio = map(median, zip(*speeds[1:], strict=True))  # the first starts the workers
            print(f"{workers:>8} {timm_speed:>14.1f} {our_speed:>14.1f} {ratio:>12.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
