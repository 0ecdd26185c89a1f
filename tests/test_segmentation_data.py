"""Semantic maps: read as ADE20K, Cityscapes and VOC define them, refused by file, augmented together with the image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.data.annotations import IGNORED
from visionattn.data.config import AnnotationConfig, DataConfig, JointConfig
from visionattn.data.joint import MapTransform
from visionattn.data.loader import Stream, seeded
from visionattn.data.maps import load_segmentation
from visionattn.errors import VisionattnError

MEAN, STD = (0.5,) * 3, (0.5,) * 3


def save(path: Path, values: object, size: tuple[int, int] = (6, 8)) -> None:
    """An image of one colour, or a mask with these values in its first row and the first of them elsewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(values, str):
        Image.new("RGB", size[::-1], values).save(path)
        return
    mask = np.full(size, values[0], np.uint8)
    mask[0, : len(values)] = values
    Image.fromarray(mask).save(path)


def plain_folder(root: Path, values: list[int], names: str = "sky\ngrass\n") -> DataConfig:
    for split in ("training", "validation"):
        save(root / "images" / split / "a.jpg", "red")
        save(root / "annotations" / split / "a.png", values)
    if names:
        (root / "classes.txt").write_text(names)
    return DataConfig(root=str(root))


def load(config: DataConfig, **annotations):
    return load_segmentation(config, AnnotationConfig(**annotations))


def test_ade20k_ignores_zero(tmp_path: Path):
    config = plain_folder(tmp_path, [1, 0, 3, 1], names="")
    rows = [f"{i}\t0.1\t10\t1\tname {i}" for i in range(1, 4)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]))
    train, val = load(config)
    assert train.classes == ["name 1", "name 2", "name 3"] and (len(train), len(val)) == (1, 1)
    image, labels = train.load(0)
    assert image.size == (8, 6) and labels[0, :4].tolist() == [0, IGNORED, 2, 0] and labels[1:].max() == 0


def test_cityscapes_has_nineteen_classes(tmp_path: Path):
    for split in ("train", "val"):
        save(tmp_path / "leftImg8bit" / split / "bonn" / "bonn_1_leftImg8bit.png", "red")
        save(tmp_path / "gtFine" / split / "bonn" / "bonn_1_gtFine_labelIds.png", [7, 33, 0, 9, 26])
    train, _ = load(DataConfig(root=str(tmp_path)))
    assert len(train.classes) == 19 and train.classes[0] == "road" and train.classes[-1] == "bicycle"
    assert train.load(0)[1][0, :5].tolist() == [0, 18, IGNORED, IGNORED, 13]


def test_voc_masks(tmp_path: Path):
    save(tmp_path / "JPEGImages" / "a.jpg", "red")
    save(tmp_path / "SegmentationClass" / "a.png", [0, 15, 255])
    for split in ("train", "val"):
        (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (tmp_path / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("a\n")
    train, _ = load(DataConfig(root=str(tmp_path)))
    assert train.classes[15] == "person" and train.load(0)[1][0, :3].tolist() == [0, 15, IGNORED]


def test_empty_names_are_ignored_and_equal_ones_are_one_class(tmp_path: Path):
    config = plain_folder(tmp_path, [0, 1, 2, 3, 255], names="sky\n\ngrass\nsky\n")
    train, _ = load(config)
    assert train.classes == ["sky", "grass"]
    assert train.load(0)[1][0, :5].tolist() == [0, IGNORED, 1, 0, IGNORED]


def test_hugging_face_datasets_with_masks(tmp_path_factory: pytest.TempPathFactory):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("masks")  # a name with "test" in it would be taken for a split
    mask = Image.fromarray(np.array([[0, 1], [255, 0]], np.uint8))
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    rows = [{"image": Image.new("RGB", (2, 2)), "annotation": mask}]
    for split in ("train", "validation"):
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}.parquet")
    (folder / "names.txt").write_text("sky\ngrass")
    config = DataConfig(name=f"hfds/{folder}", root=str(folder / "cache"))
    with pytest.raises(VisionattnError, match="annotations.classes"):
        load(config)
    train, _ = load(config, classes=str(folder / "names.txt"))
    assert train.classes == ["sky", "grass"] and train.load(0)[1].tolist() == [[0, 1], [IGNORED, 0]]


@pytest.mark.parametrize(
    "wrong, told",
    [
        (lambda mask: save(mask, [2]), "a.png has the value 2, which is of no class"),
        (lambda mask: save(mask, "blue"), "a.png has 3 channels"),
        (lambda mask: save(mask, [0], (6, 6)), "a.jpg: the image is 8 x 6, but 6 x 6 according to .*a.png"),
        (lambda mask: mask.write_bytes(b"no image"), "cannot read .*a.jpg: .*a.png"),
    ],
)
def test_wrong_masks_are_named(tmp_path: Path, wrong, told: str):
    config = plain_folder(tmp_path, [0, 1])
    wrong(tmp_path / "annotations" / "training" / "a.png")
    with pytest.raises(VisionattnError, match=told):
        load(config)[0].load(0)


def test_sixteen_bit_masks_keep_their_values(tmp_path: Path):
    config = plain_folder(tmp_path, [0])
    file = tmp_path / "annotations" / "training" / "a.png"
    Image.fromarray(np.full((6, 8), 1, np.uint16)).save(file)
    assert (load(config)[0].load(0)[1] == 1).all()
    Image.fromarray(np.full((6, 8), 256, np.uint16)).save(file)
    with pytest.raises(VisionattnError, match="a.png has the value 256"):
        load(config)[0].load(0)


def test_folders_that_lack_something_are_one_clear_error(tmp_path: Path):
    with pytest.raises(VisionattnError, match="no layout that is known"):
        load(DataConfig(root=str(tmp_path)))
    config = plain_folder(tmp_path, [0], names="")
    with pytest.raises(VisionattnError, match="does not name its classes"):
        load(config)
    (tmp_path / "classes.txt").write_text("sky\n")
    (tmp_path / "annotations" / "validation" / "a.png").unlink()
    with pytest.raises(VisionattnError, match="a.png is missing: every image of validation"):
        load(config)


def halves(size: tuple[int, int] = (40, 60)) -> tuple[Image.Image, np.ndarray]:
    """An image whose left half is red and of class 1."""
    labels = np.zeros(size, np.uint8)
    labels[:, : size[1] // 2] = 1
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[labels == 1] = (255, 0, 0)
    return Image.fromarray(pixels), labels


ADE = JointConfig(min_size=(48,), max_size=96, scale=(0.5, 2.0), crop=48, hflip=0.5)


def test_maps_go_with_the_image_and_borders_do_not_count():
    transform = MapTransform(ADE, (0.0,) * 3, (1.0,) * 3, training=True)
    filled = 0
    for draw in range(20):
        with seeded(0, Stream.AUGMENT, draw):
            image, labels = transform(*halves())
        assert image.shape == (3, 48, 48) and labels.shape == (48, 48) and labels.dtype == torch.int64
        counted = labels != IGNORED
        assert ((image[0] > 0.5) != (labels == 1))[counted].float().mean() < 0.03  # at the edge of a resized image
        filled += int((~counted).any())
    assert 0 < filled < 20


def test_augmentation_follows_from_the_seed_alone():
    results = []
    for warm_ups in (0, 3):
        transform = MapTransform(JointConfig(**vars(ADE) | {"photometric": 0.5}), MEAN, STD, training=True)
        for other in range(warm_ups):
            with seeded(1, Stream.AUGMENT, other):
                transform(*halves((50, 50)))
        with seeded(0, Stream.AUGMENT, 4):
            results.append(transform(*halves()))
    (first, labels), (again, labels_again) = results
    assert torch.equal(first, again) and torch.equal(labels, labels_again)


def test_crops_of_one_class_are_drawn_again():
    labels = np.zeros((40, 400), np.uint8)
    labels[:, 180:] = 1
    image = Image.fromarray(np.zeros((40, 400, 3), np.uint8))
    shares = {}
    for most in (1.0, 0.75):
        transform = MapTransform(JointConfig(crop=40, max_class_share=most), MEAN, STD, training=True)
        shares[most] = 0
        for draw in range(40):
            with seeded(0, Stream.AUGMENT, draw):
                shares[most] += int(transform(image, labels)[1].unique().numel() == 2)
    assert shares[0.75] > 2 * shares[1.0]


def test_validation_resizes_images_and_leaves_maps():
    image, labels = MapTransform(ADE, MEAN, STD, training=False)(*halves())
    assert image.shape == (3, 48, 72) and labels.shape == (40, 60)
    assert torch.equal(labels, torch.tensor(halves()[1].astype(np.int64)))
