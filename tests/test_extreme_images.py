"""Images of extreme shape: what they cost to prepare is bounded, and what is seen of them is what it should be."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import visionattn
from visionattn.data import preprocessing
from visionattn.data.annotations import Objects
from visionattn.data.config import AugmentConfig, DataConfig, JointConfig
from visionattn.data.joint import MapTransform, ObjectTransform
from visionattn.data.transforms import eval_transform, train_transform
from visionattn.tasks.config import TtaConfig
from visionattn.tasks.views import Views

PREPARED = DataConfig(
    img_size=64, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.875, crop_mode="center"
)
SHAPES = pytest.mark.parametrize("shape", [(60000, 1), (1, 60000), (1, 5000), (3000, 7)], ids=str)
MOST = 16 << 20
"""Pixels, of three bytes each, that any step may make of an image; at 64 x 64 some thousand are used."""


def noise(shape: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape[::-1], 3), dtype=np.uint8))


@pytest.fixture
def resized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes in pixels of what Pillow is asked to make."""
    sizes, resize = [], Image.Image.resize

    def noted(self, size, *args, **kwargs):
        sizes.append(size[0] * size[1])
        assert sizes[-1] < MOST, f"{self.size} to {size}"
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", noted)
    return sizes


@SHAPES
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_validation_of_any_shape_is_cheap(resized, shape: tuple[int, int], mode: str):
    for size, crop_pct in ((64, 0.875), (64, 1.5), ((64, 48), 0.9)):
        data = replace(PREPARED, img_size=size, crop_pct=crop_pct, crop_mode=mode)
        height, width = (size, size) if isinstance(size, int) else size
        assert eval_transform(data)(noise(shape)).shape == (3, height, width)
    assert max(resized) <= 100_000


@SHAPES
@pytest.mark.parametrize("crop_mode", ["rrc", "rkrc", "rkrr"])
def test_training_on_any_shape_is_cheap(resized, shape: tuple[int, int], crop_mode: str):
    for policy in (None, "rand-m9-mstd0.5", "augmix-m3", "trivial"):
        augment = AugmentConfig(train_crop_mode=crop_mode, auto_augment=policy)
        assert train_transform(PREPARED, augment)(noise(shape)).shape == (3, 64, 64)
    assert max(resized) <= 400_000


@SHAPES
def test_views_of_any_shape_are_cheap(resized, shape: tuple[int, int]):
    assert Views(PREPARED, TtaConfig("five", True, (1.0, 1.3)))(noise(shape)).shape == (10, 3, 64, 64)
    assert max(resized) <= 100_000


def test_the_preparation_of_a_model_is_cheap(resized):
    transform = visionattn.data.create_transform(visionattn.create_model("test_dinat"))
    assert transform(noise((60000, 1))).shape == (3, 32, 32) and max(resized) <= 100_000


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("tta", [TtaConfig(), TtaConfig("five")], ids=["center", "five"])
def test_crops_are_the_pixels_of_the_whole_image_resized(monkeypatch, interpolation: str, tta: TtaConfig):
    for shape in ((500, 9), (9, 500), (640, 12), (97, 96)):
        smooth = Image.fromarray(np.asarray(noise(shape)) // 4 + 96)  # no overshoot to be cut off between directions
        for size in (32, (24, 32)):
            views = Views(replace(PREPARED, img_size=size, interpolation=interpolation), tta)
            monkeypatch.setattr(preprocessing, "EXTREME", 10**9)
            whole = views(smooth)
            monkeypatch.setattr(preprocessing, "EXTREME", 0)
            part = views(smooth)
            # Pillow rounds to whole numbers after each direction, and begins with the one that makes less work.
            assert (127.5 * (part - whole)).abs().max() < 2.01, (shape, size)


JOINTS = [
    JointConfig(),
    JointConfig(min_size=(200,), max_size=333, hflip=0.5),
    JointConfig(min_size=(160,), max_size=400, detr_crop=1.0),
    JointConfig(scale=(0.1, 2.0), crop=128, photometric=0.5),
    JointConfig(min_size=(128,), max_size=512, scale=(0.5, 2.0), crop=128, max_class_share=0.75),
]


@SHAPES
@pytest.mark.parametrize("joint", JOINTS, ids=range(len(JOINTS)))
@pytest.mark.parametrize("training", [True, False], ids=["train", "val"])
def test_images_and_their_annotations_of_any_shape_are_cheap(shape: tuple[int, int], joint: JointConfig, training):
    width, height = shape
    objects = Objects(
        np.array([[0.0, 0, width, height]]), np.array([1]), np.array([0]), np.array([width * height]),
        np.ones((1, height, width), np.uint8),
    )  # fmt: skip
    image, means = noise(shape), (PREPARED.mean, PREPARED.std)
    tracemalloc.start()
    try:
        made, target = ObjectTransform(joint, *means, training)(image, objects)
        assert min(made.shape) > 0 and (not training or target["masks"].shape[1:] == made.shape[1:])
        if not joint.detr_crop:
            made, target = MapTransform(joint, *means, training)(image, np.zeros((height, width), np.uint8))
            assert not training or target.shape == made.shape[1:]
        assert tracemalloc.get_traced_memory()[1] < 3 * MOST
    finally:
        tracemalloc.stop()


def test_ordinary_images_draw_as_ever():
    """The steps that bound the resizing draw no more and no other numbers than albumentations' own."""
    import albumentations as A

    from visionattn.data.joint import RESAMPLING, _Scale, _Shorter

    image = np.asarray(noise((90, 70)))
    for ours, theirs, size in ((_Shorter, A.SmallestMaxSize, [40, 50, 60]), (_Scale, A.RandomScale, (-0.5, 1.0))):
        seen = []
        for kind in (ours, theirs):
            steps = A.Compose([kind(size, **RESAMPLING, p=1), A.HorizontalFlip(p=0.5)], seed=3)
            seen.append([steps(image=image)["image"] for _ in range(6)])
        assert all(np.array_equal(a, b) for a, b in zip(*seen, strict=True))
        assert len({a.shape for a in seen[0]}) > 1
