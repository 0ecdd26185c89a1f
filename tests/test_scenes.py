"""Scenes: exact annotations, the same ones always, other digits to validate on, and no way around looking at them."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from visionattn.data.config import AnnotationConfig
from visionattn.data.scenes import Scenes, open_scenes
from visionattn.errors import VisionattnError
from visionattn.tasks.detection import DetectionMetrics
from visionattn.tasks.segmentation import SegmentationMetrics

SMALL = AnnotationConfig(scene_count=60)


def make_fashion(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        images, labels = rng.integers(100, 256, (20, 28, 28), np.uint8), (np.arange(20) % 10).astype(np.uint8)
        (root / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes()))
        (root / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
    return root


def test_a_scene_follows_from_its_split_and_number():
    train, again = Scenes(SMALL, False, False), Scenes(SMALL, False, False)
    later = [again.compose(i) for i in (7, 3, 7)]
    for i, scene in zip((7, 3, 7), later, strict=True):
        assert np.array_equal(train.compose(i).pixels, scene.pixels)
        assert np.array_equal(train.compose(i).owners, scene.owners)
    assert not np.array_equal(train.compose(7).pixels, Scenes(SMALL, True, False).compose(7).pixels)


def test_annotations_are_exact():
    objects, semantic = Scenes(SMALL, False, False), Scenes(SMALL, False, True)
    for index in range(60):
        image, found = objects[index]
        same_image, labels = semantic[index]
        assert image.size == (96, 96) and image.tobytes() == same_image.tobytes()
        assert 1 <= len(found.labels) <= 6 and found.labels.min() >= 1 and found.labels.max() <= 10
        assert found.masks.sum(0).max() == 1  # a pixel has one owner
        assert np.array_equal((found.masks * found.labels[:, None, None]).sum(0), labels)
        for box, mask, area in zip(found.boxes.astype(int), found.masks, found.areas, strict=True):
            x1, y1, x2, y2 = box
            inside = mask[y1:y2, x1:x2]
            assert area == mask.sum() == inside.sum() >= 16
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


def test_validation_has_other_digits():
    train, val = Scenes(SMALL, False, False), Scenes(SMALL, True, False)
    assert len(train) == 60 and len(val) == 6
    assert len(train.digits) + len(val.digits) == 1797
    shared = {digit.tobytes() for digit in train.digits} & {digit.tobytes() for digit in val.digits}
    assert not shared


def test_guesses_that_ignore_the_image_fail():
    """The objects of another scene, and everything background."""
    train, val = (open_scenes(AnnotationConfig(scene_count=1000), v, semantic=False) for v in (False, True))
    metrics = DetectionMetrics(False, 10)
    for index in range(len(val)):
        truth, guess = val.load(index)[1], train.load(index)[1]
        boxes, labels = torch.tensor(guess.boxes), torch.tensor(guess.labels)
        found = {
            "boxes": boxes,
            "labels": labels,
            "scores": torch.ones(len(labels)),
            "input_size": torch.tensor([96, 96]),
        }
        target = {"boxes": truth.boxes, "labels": truth.labels, "iscrowd": truth.crowd, "area": truth.areas}
        target = {name: torch.tensor(value) for name, value in target.items()} | {"size": torch.tensor([96, 96])}
        metrics.update([found], [target])
    assert metrics.compute()["box_AP50"] < 3
    val = open_scenes(AnnotationConfig(scene_count=1000), True, semantic=True)
    metrics = SegmentationMetrics(11)
    background = torch.eye(11)[0][:, None, None].expand(11, 96, 96)
    for index in range(len(val)):
        metrics.update([background], [torch.tensor(val.load(index)[1].astype(np.int64))])
    assert metrics.compute()["mIoU"] < 10


def test_items_of_fashion_mnist(tmp_path: Path):
    config = AnnotationConfig(fashion=str(make_fashion(tmp_path)), scene_count=40)
    train, val = (open_scenes(config, validation, semantic=False) for validation in (False, True))
    assert train.classes == val.classes and len(train.classes) == 20 and train.classes[19] == "ankle boot"
    labels = np.concatenate([train.load(i)[1].labels for i in range(40)])
    assert (labels > 10).any() and (labels <= 10).any()


def test_missing_files_of_fashion_mnist_are_one_clear_error(tmp_path: Path):
    with pytest.raises(VisionattnError, match="annotations.fashion .* does not hold"):
        open_scenes(AnnotationConfig(fashion=str(tmp_path)), False, semantic=False)
