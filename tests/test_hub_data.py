"""Hugging Face data sets for classification, from folders on the disk."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionattn.data.config import DataConfig
from visionattn.data.images import load_datasets, load_validation
from visionattn.errors import VisionattnError
from visionattn.training.config import parse_train, parse_validate
from visionattn.training.evaluation import options_of, validate
from visionattn.training.run import train

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def picture(label: int, i: int) -> Image.Image:
    return Image.fromarray(np.full((32, 32, 3), 100 * label + i, np.uint8))


def parquet(folder: Path, names: tuple[str, ...] = ("cat", "dog"), **columns) -> DataConfig:
    """Two splits of labelled images."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    for split, count in (("train", 8), ("validation", 2)):
        rows = [{"image": picture(label, i), "label": label} for i in range(count) for label in range(2)]
        made = datasets.Dataset.from_list(rows, features=features).rename_columns(columns)
        made.to_parquet(folder / f"{split}.parquet")
    return DataConfig(name=f"hfds/{folder}", root=f"{folder}-cache")


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")  # a name with "test" in it would be taken for a split


def test_parquet_files(folder: Path):
    train_images, val_images = load_datasets(parquet(folder))
    assert train_images.classes == val_images.classes == ["cat", "dog"]
    assert (len(train_images), len(val_images)) == (16, 4)
    image, label = train_images.load(5)
    assert label == 1 and np.asarray(image)[0, 0].tolist() == [102] * 3
    assert len(load_validation(parquet(folder))) == 4
    assert train_images.place(3) == f"image 3 of hfds/{folder} (train)"


def test_folders_of_images(folder: Path):
    for split, count in (("train", 3), ("validation", 1)):
        for label, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                picture(label, i).save(folder / split / name / f"{i}.png")
    train_images, val_images = load_datasets(DataConfig(name=f"hfds/{folder}", root=f"{folder}-cache"))
    assert train_images.classes == ["cat", "dog"] and (len(train_images), len(val_images)) == (6, 2)
    labels = [train_images.load(i)[1] for i in range(6)]
    assert sorted(labels) == [0, 0, 0, 1, 1, 1]
    assert all(Path(train_images.place(i)).parent.name == ("cat", "dog")[labels[i]] for i in range(6))


def test_a_run_and_its_validation(folder: Path):
    data = parquet(folder)
    options = ["--data.name", data.name, "--data.root", data.root, "--data.num_workers", "0", "--data.batch_size", "4"]
    made = train(*parse_train([*options, "--epochs", "2", "--output", f"{folder}-runs", "--augment.mixup", "0"]))
    with open(made / "metrics.csv") as file:
        best = max(float(row["val_top1"]) for row in csv.DictReader(file))
    checkpoint = str(made / "checkpoints" / "best.safetensors")
    assert round(validate(parse_validate(["--checkpoint", checkpoint], options_of))["top1"], 4) == best


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: parquet(folder, label="kind"), "does not say which classes it has"),
        (lambda folder: DataConfig(name=f"hfds/{folder / 'nowhere'}"), "cannot open dataset hfds/.*nowhere"),
        (lambda folder: DataConfig(**vars(parquet(folder)) | {"val_split": "held_out"}), "held_out"),
    ],
)
def test_what_cannot_be_read_is_one_clear_error(folder: Path, make, told: str):
    with pytest.raises(VisionattnError, match=told) as error:
        load_datasets(make(folder))
    assert "\n" not in str(error.value)
