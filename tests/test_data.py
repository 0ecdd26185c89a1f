"""Data: where images come from, which are held out, and that their order depends on (seed, epoch, index) alone."""

import gzip
import os
import random
import signal
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from visionattn.data.config import AugmentConfig, DataConfig
from visionattn.data.images import ImageSet, load_datasets, load_validation, stratified_split
from visionattn.data.loader import Batch, TrainSampler, choose_workers, eval_loader, read_batches, train_loader
from visionattn.data.transforms import OnImage, eval_transform, train_transform
from visionattn.errors import VisionattnError

PREPARED = dict(img_size=16, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0, crop_mode="center")
STRONG = AugmentConfig(scale=(0.3, 1.0), hflip=0.5, color_jitter=0.4, auto_augment="rand-m9-mstd0.5", re_prob=0.5)


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
    loader = eval_loader(images, OnImage(eval_transform(DataConfig(**PREPARED))), 4, "RGB", 0)
    assert next(read_batches(loader)).images.shape == (2, 3, 16, 16)


def load_saved(root: Path, image: Image.Image, name: str, mode: str = "RGB", **options) -> Image.Image:
    """What becomes of an image that was saved under a name."""
    (root / "cat").mkdir()
    image.save(root / "cat" / name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_validation(DataConfig(root=str(root), val_fraction=1.0)).load(0, mode)[0]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, name: str, mode: str):
    pixels = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    image = load_saved(tmp_path, Image.fromarray(pixels), name, mode)
    assert image.mode == mode
    assert np.array_equal(np.asarray(image.convert("L")), pixels // 256)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_of_unknown_range_are_refused_by_path(tmp_path: Path, kind: type):
    with pytest.raises(VisionattnError, match=r"cat/a\.tif: .*range"):
        load_saved(tmp_path, Image.fromarray(np.ones((8, 8), kind)), "a.tif")


def test_cmyk_becomes_rgb(tmp_path: Path):
    image = load_saved(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.jpg")
    assert image.mode == "RGB" and np.allclose(image.getpixel((4, 4)), (255, 0, 0), atol=3)


def test_photographs_stand_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    sideways = Image.new("L", (16, 8))
    sideways.paste(255, (0, 0, 8, 8))
    image = load_saved(tmp_path, sideways, "a.jpg", exif=exif)
    assert image.size == (8, 16) and image.getpixel((4, 2))[0] > 250 and image.getpixel((4, 13))[0] < 5


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_animations_give_their_first_frame(tmp_path: Path, name: str):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    image = load_saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
    assert image.mode == "RGB" and np.allclose(image.getpixel((4, 4)), (200, 0, 0), atol=8)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_dropped(tmp_path: Path, mode: str):
    image = Image.new("RGBA", (8, 8), (90, 90, 90, 40)).convert(mode)
    assert load_saved(tmp_path, image, "a.png").getpixel((0, 0)) == (90, 90, 90)


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


def one_line_error(loader: DataLoader) -> str:
    """What ends a pass over the loader. pytest.raises would keep its frames, and its workers wait for the collector."""
    try:
        list(read_batches(loader))
    except VisionattnError as error:
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError("nothing was raised")


def test_workers_are_chosen_by_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for cores, of_cpu, of_gpu, of_four in ((1, 1, 1, 1), (2, 1, 2, 1), (16, 2, 8, 4), (128, 8, 8, 8)):
        monkeypatch.setattr("visionattn.data.loader.count_cores", lambda cores=cores: cores)
        assert choose_workers(None, cpu) == of_cpu
        assert (choose_workers(None, gpu), choose_workers(None, gpu, 4)) == (of_gpu, of_four)
        assert choose_workers(0, gpu) == 0 and choose_workers(5, cpu) == 5


def test_errors_name_the_command_that_finds_them_all(tmp_path: Path):
    make_folder(tmp_path)
    (tmp_path / "dog" / "3.png").write_bytes(b"")
    images = load_validation(DataConfig(root=str(tmp_path), val_fraction=1.0))
    transform = OnImage(eval_transform(DataConfig(**PREPARED)))
    loader = eval_loader(images, transform, 2, "RGB", 0, folder=str(tmp_path))
    assert one_line_error(loader).endswith(f"; all that is wrong: visionattn check {tmp_path}")


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named(tmp_path: Path, workers: int):
    make_folder(tmp_path)
    broken = tmp_path / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    images = load_validation(DataConfig(root=str(tmp_path), val_fraction=1.0))
    loader = eval_loader(images, OnImage(eval_transform(DataConfig(**PREPARED))), 2, "RGB", workers)
    assert one_line_error(loader).startswith(f"cannot read {broken}: ")


def batches_of(images: ImageSet, sampler: TrainSampler, workers: int, augment: AugmentConfig = STRONG) -> list[Batch]:
    return list(
        read_batches(
            train_loader(images, OnImage(train_transform(DataConfig(**PREPARED), augment)), sampler, "RGB", workers)
        )
    )


def assert_same_batches(ours: list[Batch], theirs: list[Batch]) -> None:
    assert all(torch.equal(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_of_training_is_replaced_by_the_next(tmp_path: Path, caplog, workers: int):
    make_folder(tmp_path, count=8)
    images, _ = load_datasets(DataConfig(root=str(tmp_path), val_fraction=0.0001))
    transform = train_transform(DataConfig(**PREPARED), STRONG)
    sampler = TrainSampler(len(images), 7, seed=2)
    for bad in (3, 4):
        Path(images.place(bad)).write_bytes(b"not an image")
    loader = train_loader(images, OnImage(transform), sampler, "RGB", workers, max_bad_fraction=0.2)
    for sampler.epoch in range(2):
        expected = [index for batch in sampler for _, index in batch]
        found = [index for batch in read_batches(loader) for index in batch.indices.tolist()]
        assert found == [5 if index in (3, 4) else index for index in expected]
    assert sorted(loader.dataset.unreadable) == [3, 4]
    assert sorted(caplog.messages) == sorted(set(caplog.messages)) and len(caplog.messages) == 2
    assert all(any(images.place(bad) in message for message in caplog.messages) for bad in (3, 4))
    Path(images.place(5)).write_bytes(b"")
    assert "3 images are unreadable" in one_line_error(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_folder_of_which_nothing_is_readable_ends_the_run(tmp_path: Path, workers: int):
    make_folder(tmp_path)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    images, _ = load_datasets(DataConfig(root=str(tmp_path)))
    loader = train_loader(
        images, OnImage(eval_transform(DataConfig(**PREPARED))), TrainSampler(8, 4), "RGB", workers, 1.0
    )
    assert "8 images are unreadable" in one_line_error(loader)


class Kill:
    """Transform that ends its process at images of one brightness."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        if image.getpixel((0, 0))[0] == 63:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3, 8, 8)


def test_death_of_a_worker_names_the_image(tmp_path: Path):
    images = load_validation(DataConfig(root=str(make_folder(tmp_path)), val_fraction=1.0))
    error = one_line_error(eval_loader(images, OnImage(Kill()), 2, "RGB", 2))
    assert "killed" in error and error.endswith(str(tmp_path / "dog" / "3.png"))


@pytest.mark.parametrize("repeats", [1, 3])
def test_order_and_augmentation_depend_on_seed_epoch_and_index_alone(repeats: int):
    images, _ = load_datasets(DataConfig(val_fraction=0.9))
    transform = train_transform(DataConfig(**PREPARED), STRONG)

    def epochs(seed: int, workers: int) -> list[Batch]:
        sampler = TrainSampler(len(images), 32, seed, repeats=repeats)
        loader = train_loader(images, OnImage(transform), sampler, "RGB", workers)
        drawn = []
        for sampler.epoch in range(2):
            random.random(), np.random.rand(), torch.rand(1)  # other draws in between must not matter
            drawn += read_batches(loader)
        return drawn

    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    reference = epochs(0, 0)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), expected)
    for workers in (1, 2):
        assert_same_batches(epochs(0, workers), reference)
    assert not torch.equal(reference[0].images, reference[len(reference) // 2].images)
    assert not torch.equal(reference[0].images, epochs(1, 0)[0].images)


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_goes_on_within_an_epoch(workers: int):
    images, _ = load_datasets(DataConfig(val_fraction=0.9))
    sampler = TrainSampler(len(images), 16, accumulation=2)
    sampler.epoch = 3
    whole = batches_of(images, sampler, 0)
    sampler.first_update = 2
    assert_same_batches(batches_of(images, sampler, workers), whole[4:])


def test_processes_see_what_one_process_sees():
    images, _ = load_datasets(DataConfig(val_fraction=0.9))
    one = batches_of(images, TrainSampler(len(images), 32), 0)
    two = [batches_of(images, TrainSampler(len(images), 16, rank=rank, processes=2), rank) for rank in range(2)]
    for whole, *parts in zip(one, *two, strict=True):
        theirs = {
            index: image for part in parts for index, image in zip(part.indices.tolist(), part.images, strict=True)
        }
        assert len(theirs) == len(whole.indices)
        assert all(torch.equal(theirs[i], image) for i, image in zip(whole.indices.tolist(), whole.images, strict=True))


@pytest.mark.parametrize("processes", [1, 2])
def test_repeated_augmentation(processes: int):
    samplers = [
        TrainSampler(96, 16 // processes, 5, rank=rank, processes=processes, repeats=3) for rank in range(processes)
    ]
    epochs = []
    for epoch in range(2):
        for sampler in samplers:
            sampler.epoch = epoch
        keys = [key for sampler in samplers for batch in sampler for key in batch]
        assert len(keys) == 96 and len(set(keys)) == 96 and len({index for _, index in keys}) == 32
        epochs.append(set(keys))
    assert epochs[0].isdisjoint(epochs[1])


def test_loading_leaves_the_generators_of_the_process_alone():
    images, _ = load_datasets(DataConfig())
    loader = train_loader(
        images,
        OnImage(train_transform(DataConfig(**PREPARED), AugmentConfig(re_prob=1.0))),
        TrainSampler(64, 8),
        "RGB",
        0,
    )
    dataset = loader.dataset
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    dataset.__getitems__([(0, 3)])
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
    loaders = [eval_loader(images, OnImage(transform), 8, "RGB", 0, rank, processes) for rank in range(processes)]
    labels = sorted(label for loader in loaders for batch in read_batches(loader) for label in batch.targets.tolist())
    assert labels == sorted(images.load(i)[1] for i in range(len(images)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m10-n5-p1", "original", "v0", "augmix-m3", "3a", "trivial"]
)
def test_policies_change_images_of_any_kind(policy: str, channels: int):
    config = DataConfig(img_size=16, mean=(0.5,) * channels, std=(0.5,) * channels, interpolation="bicubic")
    fixed = AugmentConfig(scale=(1, 1), ratio=(1, 1))
    policy = AugmentConfig(scale=(1, 1), ratio=(1, 1), auto_augment=policy, color_jitter=0.3)
    image = load_validation(DataConfig()).load(0, "RGB" if channels == 3 else "L")[0]
    plain, change = train_transform(config, fixed)(image), train_transform(config, policy)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    changed = [change(image) for _ in range(150)]
    assert all(x.shape == (channels, 16, 16) and x.isfinite().all() for x in changed)
    assert sum(not torch.equal(x, plain) for x in changed) > 50


@pytest.mark.parametrize(
    "options",
    [
        dict(train_crop_mode="rkrc"),
        dict(train_crop_mode="rkrr"),
        dict(grayscale_prob=1.0),
        dict(gaussian_blur_prob=1.0),
        dict(color_jitter=0.4, color_jitter_prob=0.99),
        dict(re_prob=1.0, re_mode="rand", re_count=3),
        dict(vflip=1.0),
    ],
)
def test_each_augmentation_changes_the_image(options: dict):
    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)
    fixed = dict(scale=(1, 1), ratio=(1, 1))
    config = DataConfig(**PREPARED | {"img_size": 24})
    plain = train_transform(config, AugmentConfig(**fixed))(Image.fromarray(pixels))
    options = fixed | options | ({"scale": (0.5, 0.6)} if "train_crop_mode" in options else {})
    random.seed(1), torch.manual_seed(1)
    change = train_transform(config, AugmentConfig(**options))
    changed = [change(Image.fromarray(pixels)) for _ in range(4)]
    assert all(x.shape == plain.shape for x in changed) and not all(torch.equal(x, plain) for x in changed)


def test_policy_that_cannot_rotate_is_refused():
    config = DataConfig(**PREPARED | {"interpolation": "lanczos"})
    with pytest.raises(VisionattnError, match="augment.interpolation bicubic"):
        train_transform(config, AugmentConfig(auto_augment="3a"))
    train_transform(config, AugmentConfig(auto_augment="3a", interpolation="bicubic"))


def test_size_of_validation_may_differ():
    image = Image.new("RGB", (50, 40))
    config = DataConfig(**PREPARED, eval_img_size=(24, 32))
    assert eval_transform(config)(image).shape == (3, 24, 32)
    assert train_transform(config, AugmentConfig())(image).shape == (3, 16, 16)
    assert eval_transform(DataConfig(**PREPARED))(image).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("classes", "targets", "message"),
    [
        (["cat", "emu"], [0, 1], r"\(validation\) has classes that .*\(train\) lacks: emu"),
        (["cat"], [0], "lacks the classes dog of"),
        (["dog", "cat"], [0, 1], "another order"),
        (["cat", "dog"], [0, -1], "has the label -1, but 2 classes"),
    ],
)
def test_label_spaces_must_agree(monkeypatch, classes: list[str], targets: list[int], message: str):
    class Dataset(list):
        def __init__(self, classes: list[str], targets: list[int]) -> None:
            super().__init__(zip(targets, targets, strict=True))
            self.classes, self.targets = classes, targets

    def create_dataset(name: str, split: str, **kwargs) -> Dataset:
        return Dataset(["cat", "dog"], [0, 1]) if split == "train" else Dataset(classes, targets)

    monkeypatch.setattr("visionattn.data.images.create_dataset", create_dataset)
    with pytest.raises(VisionattnError, match=message):
        load_datasets(DataConfig(name="torch/cifar10", root="."))


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_is_read_from_local_files(tmp_path: Path, packed: bool):
    """As Debian's package has them, and as torchvision does."""
    folder = tmp_path if packed else tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 20), ("t10k", 10)):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            content = (np.arange(np.prod(shape)) % 10).astype(np.uint8)
            data = struct.pack(f">I{len(shape)}I", 0x800 + len(shape), *shape) + content.tobytes()
            path = folder / f"{split}-{kind}-ubyte"
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(data)) if packed else path.write_bytes(data)
    train, val = load_datasets(DataConfig(name="torch/fashion_mnist", root=str(tmp_path)))
    assert (len(train), len(val), len(train.classes)) == (20, 10, 10)
    image, label = train.load(3)
    assert image.size == (28, 28) and label == 3
