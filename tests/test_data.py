"""Data: where images come from, which are held out, and that their order depends on (seed, epoch, index) alone."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.data.config import AugmentConfig, DataConfig
from visionattn.data.datasets import load_datasets, load_validation, stratified_split
from visionattn.data.loader import TrainSampler, eval_loader, read_batches, train_loader
from visionattn.data.transforms import eval_transform, train_transform
from visionattn.errors import VisionattnError

PREPARED = dict(img_size=16, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0, crop_mode="center")


def make_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 5, mode: str = "RGB") -> Path:
    """Folder of classes, each with generated images of its own brightness."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20 + i, 24), (60 * label + i, 40, 90)).convert(mode).save(root / name / f"{i}.png")
    return root


def test_digits_hold_out_the_same_stratified_fifth():
    train, val = load_datasets(DataConfig())
    assert len(train) + len(val) == 1797 and len(train.classes) == 10
    assert set(train.indices).isdisjoint(val.indices)
    assert list(val.indices) == list(load_validation(DataConfig()).indices)
    counts = np.bincount([val.load(i)[1] for i in range(len(val))])
    assert counts.min() >= 34 and counts.max() <= 37


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.99])
def test_stratified_split_leaves_every_class_on_both_sides(fraction: float):
    labels = [0] * 3 + [1] * 50 + [2] * 7
    stay, held_out = stratified_split(labels, fraction)
    assert sorted(stay + held_out) == list(range(60))
    assert {labels[i] for i in stay} == {labels[i] for i in held_out} == {0, 1, 2}


@pytest.mark.parametrize("val_name", ["val", "validation", "valid", "eval"])
def test_folder_with_splits(tmp_path: Path, val_name: str):
    make_folder(tmp_path / "train", count=4)
    make_folder(tmp_path / val_name, count=2)
    train, val = load_datasets(DataConfig(root=str(tmp_path)))
    assert (len(train), len(val), train.classes) == (8, 4, ["cat", "dog"])


def test_folder_without_splits_is_split(tmp_path: Path):
    make_folder(tmp_path, count=10)
    train, val = load_datasets(DataConfig(root=str(tmp_path), val_fraction=0.3))
    assert (len(train), len(val)) == (14, 6)
    assert list(load_validation(DataConfig(root=str(tmp_path), val_fraction=0.3)).indices) == list(val.indices)
    assert len(load_validation(DataConfig(root=str(tmp_path), val_fraction=1.0))) == 20


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA"])
def test_images_of_any_mode_become_rgb(tmp_path: Path, mode: str):
    make_folder(tmp_path, mode=mode)
    images = load_validation(DataConfig(root=str(tmp_path)))
    assert images.load(0)[0].mode == "RGB"
    loader = eval_loader(images, eval_transform(DataConfig(**PREPARED)), 4, "RGB", 0)
    assert next(read_batches(loader))[0].shape == (2, 3, 16, 16)


def test_labels_follow_the_classes_of_the_checkpoint(tmp_path: Path):
    make_folder(tmp_path / "val", classes=("dog",))
    images = load_validation(DataConfig(root=str(tmp_path)), ["ant", "cat", "dog"])
    assert {images.load(i)[1] for i in range(len(images))} == {2}


def flat(root: Path) -> None:
    Image.new("RGB", (8, 8)).save(root / "a.png")


def empty_class(root: Path) -> None:
    (make_folder(root) / "emu").mkdir()


def stray(root: Path) -> None:
    flat(make_folder(root))


def other_classes(root: Path) -> None:
    make_folder(root / "train")
    make_folder(root / "val", classes=("cat", "emu"))


def missing_class(root: Path) -> None:
    make_folder(root / "train")
    make_folder(root / "val", classes=("cat",))


def no_train(root: Path) -> None:
    make_folder(root / "val")


def one_class(root: Path) -> None:
    make_folder(root, classes=("cat",))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root.rmdir(), "does not exist"),
        (lambda root: None, "no class folders"),
        (flat, "no class folders"),
        (empty_class, "emu holds no images"),
        (stray, "a.png lies outside"),
        (other_classes, "emu"),
        (missing_class, "lacks the classes dog"),
        (no_train, "no train/"),
        (one_class, "one class only"),
    ],
)
def test_bad_folders_are_refused_in_one_line(tmp_path: Path, make, message: str):
    root = tmp_path / "images"
    root.mkdir()
    make(root)
    with pytest.raises(VisionattnError, match=message) as error:
        load_datasets(DataConfig(root=str(root)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named(tmp_path: Path, workers: int):
    make_folder(tmp_path)
    broken = tmp_path / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    images = load_validation(DataConfig(root=str(tmp_path), val_fraction=1.0))
    with pytest.raises(VisionattnError, match=str(broken)) as error:
        list(read_batches(eval_loader(images, eval_transform(DataConfig(**PREPARED)), 2, "RGB", workers)))
    assert "\n" not in str(error.value)


def test_order_and_augmentation_depend_on_seed_epoch_and_index_alone():
    images, _ = load_datasets(DataConfig(val_fraction=0.9))
    augment = AugmentConfig(scale=(0.3, 1.0), hflip=0.5, color_jitter=0.4, auto_augment="rand-m9-mstd0.5", re_prob=0.5)
    transform = train_transform(DataConfig(**PREPARED), augment)

    def epochs(seed: int, workers: int) -> list[list[torch.Tensor]]:
        sampler = TrainSampler(len(images), 32, seed)
        loader = train_loader(images, transform, sampler, "RGB", workers)
        drawn = []
        for sampler.epoch in range(2):
            random.random(), np.random.rand(), torch.rand(1)  # other draws in between must not matter
            drawn.append([torch.cat([x.flatten(), y.float()]) for x, y in read_batches(loader)])
        return drawn

    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    reference = epochs(0, 0)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), expected)
    for workers in (1, 2):
        for ours, theirs in zip(epochs(0, workers), reference, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(reference[0][0], reference[1][0])
    assert not torch.equal(reference[0][0], epochs(1, 0)[0][0])


def test_loading_leaves_the_generators_of_the_process_alone():
    images, _ = load_datasets(DataConfig())
    loader = train_loader(
        images, train_transform(DataConfig(**PREPARED), AugmentConfig(re_prob=1.0)), TrainSampler(64, 8), "RGB", 0
    )
    dataset = loader.dataset
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    dataset[(0, 3)]
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


@pytest.mark.parametrize("batch_size", [1, 6, 7])
@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (1, 2), (2, 3)])
def test_parts_of_an_update_hold_the_same_images(batch_size: int, processes: int, accumulation: int):
    parts = processes * accumulation
    whole = list(TrainSampler(100, batch_size * parts, seed=3))
    shares = [list(TrainSampler(100, batch_size, 3, accumulation, rank, processes)) for rank in range(processes)]
    for update, images in enumerate(whole):
        batches = [share[update * accumulation + i] for i in range(accumulation) for share in shares]
        assert sorted(key for batch in batches for key in batch) == sorted(images)
        if batch_size % 2 == 0:  # mixup's pairs: each image with its mirror in the batch
            partner = dict(zip(images, reversed(images), strict=True))
            assert all(partner[a] == b for batch in batches for a, b in zip(batch, reversed(batch), strict=True))


def test_sampler_resumes_within_an_epoch_and_fills_small_sets():
    sampler = TrainSampler(40, 4, seed=1, accumulation=2)
    batches = list(sampler)
    sampler.first_update = 3
    assert list(sampler) == batches[6:] and len(sampler) == 4
    assert [len(batch) for batch in TrainSampler(5, 16)] == [16]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_validation_counts_every_image_once(processes: int):
    images = load_validation(DataConfig(val_fraction=0.02))
    transform = eval_transform(DataConfig(**PREPARED))
    loaders = [eval_loader(images, transform, 8, "RGB", 0, rank, processes) for rank in range(processes)]
    labels = sorted(label for loader in loaders for _, batch in read_batches(loader) for label in batch.tolist())
    assert labels == sorted(images.load(i)[1] for i in range(len(images)))
