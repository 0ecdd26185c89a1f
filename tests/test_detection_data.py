"""Boxes and masks: read as COCO and VOC define them, refused with file and id, augmented together with the image."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as reference_rle

from visionattn.data.annotations import Objects, collate_crops, collate_lists, tight_boxes
from visionattn.data.boxes import load_detection
from visionattn.data.config import AnnotationConfig, DataConfig, JointConfig
from visionattn.data.joint import ObjectTransform
from visionattn.data.loader import Stream, seeded
from visionattn.data.scenes import Scenes
from visionattn.errors import VisionattnError

MEAN, STD = (0.5,) * 3, (0.5,) * 3
SQUARE = [[10, 10, 30, 10, 30, 30, 10, 30]]


def coco(annotations: list[dict], images: int = 3, categories: tuple[str, ...] = ("cat", "dog")) -> dict:
    return {
        "images": [{"id": 7 + i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in range(images)],
        "categories": [{"id": 3 * i + 1, "name": name} for i, name in enumerate(categories)],
        "annotations": [{"id": 100 + i, "image_id": 7, "category_id": 4} | a for i, a in enumerate(annotations)],
    }


def write_coco(root: Path, train: dict, val: dict | None = None) -> DataConfig:
    (root / "annotations").mkdir()
    for split, content in (
        ("train2017", train),
        ("val2017", val or coco([{"bbox": [1, 1, 5, 5], "segmentation": SQUARE}])),
    ):
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        (root / split).mkdir()
        for image in content["images"]:
            Image.new("RGB", (60, 40), (90, 60, 30)).save(root / split / image["file_name"])
    return DataConfig(name="folder", root=str(root))


def load(config: DataConfig, masks: bool = False, annotations: AnnotationConfig | None = None):
    return load_detection(config, annotations or AnnotationConfig(), masks)


def test_coco_boxes_masks_and_crowds(tmp_path: Path):
    crowd = np.zeros((40, 60), np.uint8, order="F")
    crowd[5:20, 5:9] = 1
    compressed = reference_rle.encode(crowd)
    compressed["counts"] = compressed["counts"].decode()
    plain = {"size": [40, 60], "counts": [5 * 40 + 5, 15, 25, 15, 25, 15, 25, 15, 40 * 60 - 8 * 40 - 20]}
    pair = [[0, 0, 10, 0, 10, 10, 0, 10], [20.5, 20.5, 40, 20.5, 40, 30.5], [1, 2, 3, 4]]
    annotations = [
        {"bbox": [10, 10, 20, 20], "segmentation": SQUARE, "area": 400},
        {"bbox": [0, 0, 40, 30], "segmentation": pair, "area": 250.5, "category_id": 1},
        {"bbox": [5, 5, 4, 15], "segmentation": compressed, "area": 60, "iscrowd": 1},
        {"bbox": [5, 5, 4, 15], "segmentation": plain, "area": 60, "iscrowd": 1},
    ]
    train, _ = load(write_coco(tmp_path, coco(annotations)), masks=True)
    assert train.classes == ["cat", "dog"]
    assert len(train) == 1  # the others have no objects
    image, objects = train.load(0)
    assert image.size == (60, 40)
    assert objects.boxes[:2].tolist() == [[10, 10, 30, 30], [0, 0, 40, 30]]
    assert objects.labels.tolist() == [2, 1, 2, 2] and objects.crowd.tolist() == [0, 0, 1, 1]
    assert objects.areas.tolist() == [400, 250.5, 60, 60]
    polygons = reference_rle.merge(reference_rle.frPyObjects(pair[:2], 40, 60))
    assert np.array_equal(objects.masks[1], reference_rle.decode(polygons))
    assert np.array_equal(objects.masks[2], crowd) and np.array_equal(objects.masks[3], crowd)
    assert objects.masks[0].sum() == 400
    _, target = ObjectTransform(JointConfig(), MEAN, STD, training=True)(image, objects)
    assert target["labels"].tolist() == [2, 1]  # crowds are not learnt from
    _, target = ObjectTransform(JointConfig(), MEAN, STD, training=False)(image, objects)
    assert target["iscrowd"].tolist() == [0, 0, 1, 1] and target["size"].tolist() == [40, 60]


def test_boxes_beyond_the_image_are_cut_off_and_empty_ones_left_out_in_training(tmp_path: Path):
    annotations = [
        {"bbox": [-10, 5, 30, 10]},
        {"bbox": [50, 30, 100, 100]},
        {"bbox": [5, 5, 0, 9]},
        {"bbox": [5, 5, 0.5, 0.5]},
        {"bbox": [70, 5, 9, 9]},
        {"bbox": [5, 5, 0, 9], "image_id": 8},
        {"bbox": [70, 5, 9, 9], "image_id": 9},
    ]
    content = coco(annotations, images=4)
    train, val = load(write_coco(tmp_path, content, content))
    assert (len(train), len(val)) == (1, 4)
    _, target = ObjectTransform(JointConfig(hflip=1.0), MEAN, STD, training=True)(*train.load(0))
    assert torch.allclose(target["boxes"], torch.tensor([[40.0, 5, 60, 15], [0, 30, 10, 40]]))
    transform = ObjectTransform(JointConfig(), MEAN, STD, training=False)
    assert transform(*val.load(0))[1]["boxes"].tolist()[0] == [-10, 5, 20, 15]
    assert [len(transform(*val.load(i))[1]["boxes"]) for i in range(4)] == [5, 1, 1, 0]


def test_validation_may_lack_classes_but_have_no_others(tmp_path: Path):
    only_dog = coco([{"bbox": [1, 1, 5, 5], "category_id": 1}], categories=("dog",))
    _, val = load(write_coco(tmp_path, coco([{"bbox": [1, 1, 5, 5]}]), only_dog))
    assert val.classes == ["cat", "dog"] and val.load(0)[1].labels.tolist() == [2]
    file = tmp_path / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps(coco([], categories=("cow",))))
    with pytest.raises(VisionattnError, match="instances_val2017.json has classes .* not trained on: cow"):
        load(DataConfig(root=str(tmp_path)))


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"bbox": [1, 2, 3]}, "annotation 100 has no bbox of four numbers"),
        ({"bbox": [1, 2, -3, 4]}, "annotation 100 has the bbox"),
        ({"bbox": [1, float("nan"), 3, 4]}, "annotation 100 has the bbox"),
        ({"bbox": [1, 2, 3, 4], "category_id": 9}, "annotation 100 is of the category 9"),
        ({"bbox": [1, 2, 3, 4], "image_id": 1}, "annotation 100 is of the image 1"),
        ({"bbox": [1, 2, 3, 4]}, "annotation 100 has no segmentation"),
        (
            {"bbox": [1, 2, 3, 4], "segmentation": {"size": [4, 6], "counts": [24]}},
            "annotation 100 has a mask of 6 x 4 for an image of 60 x 40",
        ),
    ],
)
def test_wrong_annotations_are_named_by_file_and_id(tmp_path: Path, wrong: dict, told: str):
    config = write_coco(tmp_path, coco([wrong]))
    with pytest.raises(VisionattnError, match=f"instances_train2017.json: {told}"):
        load(config, masks=True)


def test_images_of_another_size_are_named(tmp_path: Path):
    config = write_coco(tmp_path, coco([{"bbox": [1, 1, 5, 5]}]))
    Image.new("RGB", (30, 40)).save(tmp_path / "train2017" / "0.png")
    with pytest.raises(VisionattnError, match="0.png: the image is 30 x 40, but 60 x 40 according to .*train2017.json"):
        load(config)[0].load(0)


@pytest.mark.parametrize("text, told", [("{", "cannot read .*json"), ('{"images": []}', "cannot read .*categories")])
def test_broken_files_are_one_clear_error(tmp_path: Path, text: str, told: str):
    config = write_coco(tmp_path, coco([]))
    (tmp_path / "annotations" / "instances_train2017.json").write_text(text)
    with pytest.raises(VisionattnError, match=told):
        load(config)


def test_scenes_are_the_default_and_other_data_is_refused():
    train, val = load(DataConfig(), masks=True)
    assert (len(train), len(val)) == (2000, 200) and train.load(0)[1].masks is not None
    with pytest.raises(VisionattnError, match="unknown dataset digits: .* scenes, folder or hfds/"):
        load(DataConfig(name="digits"))
    with pytest.raises(VisionattnError, match="scenes take no data.root"):
        load(DataConfig(name="scenes", root="x"))


def test_data_without_annotations_is_one_clear_error(tmp_path: Path):
    with pytest.raises(VisionattnError, match="expected annotations/instances_train.json"):
        load(DataConfig(root=str(tmp_path)))
    with pytest.raises(VisionattnError, match="holds no object to train on"):
        load(write_coco(tmp_path, coco([])))


def write_voc(root: Path, name: str = "dog") -> DataConfig:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for stem in ("a", "b"):
        Image.new("RGB", (60, 40)).save(root / "JPEGImages" / f"{stem}.jpg")
        boxes = [(name, 0, 1, 1, 10, 20), ("cat", 1, 11, 12, 60, 40)]
        items = "".join(
            f"<object><name>{label}</name><difficult>{hard}</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
            f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for label, hard, x1, y1, x2, y2 in boxes
        )
        size = "<size><width>60</width><height>40</height></size>"
        (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{size}{items}</annotation>")
    (root / "ImageSets/Main/train.txt").write_text("a\n")
    (root / "ImageSets/Main/val.txt").write_text("b\n")
    return DataConfig(root=str(root))


def test_voc_counts_from_one_and_does_not_learn_difficult_objects(tmp_path: Path):
    train, val = load(write_voc(tmp_path))
    assert len(train.classes) == 20 and (len(train), len(val)) == (1, 1)
    objects = val.load(0)[1]
    assert objects.boxes.tolist() == [[0, 0, 10, 20], [10, 11, 60, 40]]
    assert [train.classes[label - 1] for label in objects.labels] == ["dog", "cat"]
    assert objects.crowd.tolist() == [0, 1]


def test_voc_with_other_classes(tmp_path: Path):
    config = write_voc(tmp_path, name="emu")
    with pytest.raises(VisionattnError, match="a.xml: object 1 is a emu, .*annotations.classes"):
        load(config)
    (tmp_path / "names.txt").write_text("emu\ncat\n")
    train, _ = load(config, annotations=AnnotationConfig(classes=str(tmp_path / "names.txt")))
    assert train.classes == ["emu", "cat"] and train.load(0)[1].labels.tolist() == [1, 2]


def write_hub(folder: Path, boxes: list[list[float]], labels: list[int]) -> DataConfig:
    """A Hugging Face dataset of an image without objects and one with these."""
    datasets = pytest.importorskip("datasets")
    row = {"image": Image.new("RGB", (60, 40)), "objects": {"bbox": boxes, "category": labels}}
    empty = {"image": Image.new("RGB", (60, 40)), "objects": {"bbox": [], "category": []}}
    objects = {"bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": None}
    objects["category"] = datasets.List(datasets.ClassLabel(names=["cat", "dog"]))
    features = datasets.Features({"image": datasets.Image(), "objects": objects})
    dataset = datasets.Dataset.from_list([empty, row], features=features)
    for split in ("train", "validation"):
        dataset.to_parquet(folder / f"{split}.parquet")
    return DataConfig(name=f"hfds/{folder}", root=str(folder / "cache"))


WRITTEN = {
    "xywh": [5.0, 6.0, 20.0, 30.0],
    "xyxy": [5.0, 6.0, 25.0, 36.0],
    "cxcywh": [15.0, 21.0, 20.0, 30.0],
    "relative_xywh": [0.125, 0.25, 0.5, 0.625],
    "relative_xyxy": [0.125, 0.25, 0.625, 0.875],
    "relative_cxcywh": [0.375, 0.5625, 0.5, 0.625],
}


@pytest.mark.parametrize("box_format", WRITTEN)
def test_hugging_face_datasets_with_boxes(tmp_path_factory: pytest.TempPathFactory, box_format: str):
    folder = tmp_path_factory.mktemp("boxes")  # a name with "test" in it would be taken for a split
    config = write_hub(folder, [WRITTEN[box_format]], [1])
    train, val = load(config, annotations=AnnotationConfig(box_format=box_format))
    assert train.classes == ["cat", "dog"] and (len(train), len(val)) == (1, 2)
    expected = [7.5, 10, 37.5, 35] if box_format.startswith("relative") else [5, 6, 25, 36]
    assert train.load(0)[1].boxes.tolist() == [expected] and train.load(0)[1].labels.tolist() == [2]
    assert val.load(0)[1].boxes.shape == (0, 4)


@pytest.mark.parametrize(
    "boxes, labels, told",
    [
        ([[5, 6, 55, 36], [20, 10, 59, 40]], [1, 0], "2 of 2 boxes leave their images .*box_format xyxy"),
        ([[0.3, 0.3, 0.9, 0.8]], [1], "look relative.*box_format relative_xyxy"),
        ([[5, 6, 5]], [1], "object 0 of an image has the bbox .*: expected four finite numbers"),
        ([[5, 6, float("nan"), 5]], [1], "object 0 of an image has the bbox"),
        ([[5, 6, -5, 5]], [1], "object 0 of an image has the bbox"),
        ([[5, 6, 5, 5]], [None], "object 0 of an image has the label None of 2"),
    ],
)
def test_wrong_boxes_of_hugging_face_datasets_are_told(
    tmp_path_factory: pytest.TempPathFactory, boxes: list, labels: list, told: str
):
    with pytest.raises(VisionattnError, match=told):
        load(write_hub(tmp_path_factory.mktemp("boxes"), boxes, labels))


LARGE = JointConfig(min_size=(96, 128), max_size=160, scale=(0.3, 2.0), crop=(96, 112), hflip=0.5, photometric=0.5)


def test_augmentation_follows_from_the_seed_alone():
    """Whatever the same transform made of other images before, in whichever process."""
    image, objects = Scenes(AnnotationConfig(), False, False)[0]
    other = Scenes(AnnotationConfig(), False, False)[1]
    results = []
    for _ in range(2):
        transform = ObjectTransform(LARGE, MEAN, STD, training=True)
        for warm_up in range(len(results)):
            with seeded(3, Stream.AUGMENT, warm_up):
                transform(*other)
        with seeded(0, Stream.AUGMENT, 5, 2):
            results.append(transform(image, objects))
    with seeded(0, Stream.AUGMENT, 6, 2):
        differs = transform(image, objects)
    (first, first_target), (again, again_target) = results
    assert torch.equal(first, again)
    assert all(torch.equal(value, again_target[key]) for key, value in first_target.items())
    assert not torch.equal(first, differs[0])


class Drawn(torch.utils.data.Dataset):
    """Augmented scenes, drawn as the loader does."""

    def __init__(self) -> None:
        self.scenes = Scenes(AnnotationConfig(), False, False)
        self.transform = ObjectTransform(LARGE, MEAN, STD, training=True)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        with seeded(0, Stream.AUGMENT, 0, index):
            return self.transform(*self.scenes[index])[0]


def test_augmentation_is_the_same_in_loading_processes():
    here = list(torch.utils.data.DataLoader(Drawn(), batch_size=None))
    there = list(torch.utils.data.DataLoader(Drawn(), batch_size=None, num_workers=1))
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_steps_of_the_augmentation_draw_independently():
    pixels = np.full((8, 8, 3), 60, np.uint8)
    pixels[:, :4] = (200, 150, 100)
    nothing = Objects(np.zeros((0, 4)), *(np.zeros(0, np.int64) for _ in range(2)), np.zeros(0))
    transform = ObjectTransform(JointConfig(hflip=0.5, photometric=0.3), (0.0,) * 3, (1.0,) * 3, training=True)
    combinations = set()
    for draw in range(30):
        with seeded(0, Stream.AUGMENT, draw):
            image = transform(Image.fromarray(pixels), nothing)[0]
        flipped = bool(image[0, 0, 7] > image[0, 0, 0])
        upright = (image.flip(-1) if flipped else image) * 255
        changed = bool((upright.permute(1, 2, 0).round() != torch.from_numpy(pixels)).any())
        combinations.add((flipped, changed))
    assert len(combinations) == 4


@pytest.mark.parametrize("joint", [LARGE, JointConfig(detr_crop=1.0, min_size=(96,), hflip=1.0)])
def test_boxes_and_masks_go_with_the_image(joint: JointConfig):
    """Rectangles of a colour each are found where boxes and masks say."""
    image, masks = np.zeros((120, 160, 3), np.uint8), np.zeros((2, 120, 160), np.uint8)
    masks[0, 20:70, 30:90], masks[1, 80:110, 100:150] = 1, 1
    image[masks[0] > 0], image[masks[1] > 0] = (250, 0, 0), (0, 250, 0)
    zeros = np.zeros(2, np.int64)
    objects = Objects(tight_boxes(masks), np.array([1, 2]), zeros, masks.sum((1, 2)).astype(float), masks)
    joint = JointConfig(**vars(joint) | {"photometric": 0.0})
    transform = ObjectTransform(joint, (0.0,) * 3, (1.0,) * 3, training=True)
    seen = 0
    for draw in range(12):
        with seeded(0, Stream.AUGMENT, draw):
            made, target = transform(Image.fromarray(image), objects)
        assert target["masks"].shape[1:] == made.shape[1:] and len(target["boxes"]) == len(target["masks"])
        for label, box, mask in zip(target["labels"], target["boxes"], target["masks"], strict=True):
            coloured = tight_boxes((made[label - 1] > 0.5).numpy()[None])[0]
            assert np.abs(coloured - box.numpy()).max() <= 1  # edges fall between the pixels of a resized image
            assert np.array_equal(tight_boxes(mask.numpy()[None])[0], box)
            seen += 1
    assert seen >= 10


def test_large_scale_jitter_fills_up_and_makes_one_size():
    scenes = Scenes(AnnotationConfig(), False, False)
    transform = ObjectTransform(JointConfig(min_size=(64,), max_size=64, scale=(0.1, 2.0), crop=64), MEAN, STD, True)
    sizes = set()
    for draw in range(20):
        with seeded(0, Stream.AUGMENT, draw):
            image, target = transform(*scenes[draw])
        assert image.shape == (3, 64, 64) and target["boxes"].shape == (len(target["labels"]), 4)
        assert target["boxes"].dtype == torch.float32 and target["labels"].dtype == torch.int64
        sizes.add(int((image.abs().amax(0) > 0.01).any(0).sum()))
    assert len(sizes) > 5


def test_validation_resizes_images_and_leaves_objects():
    image = Image.new("RGB", (200, 100))
    objects = Objects(np.array([[1.0, 2, 3, 4]]), np.array([1]), np.array([0]), np.array([4.0]))
    joint = JointConfig(min_size=(32, 64), max_size=100, scale=(0.1, 2.0), crop=16, hflip=1.0)
    made, target = ObjectTransform(joint, MEAN, STD, training=False)(image, objects)
    assert made.shape == (3, 50, 100) and target["boxes"].tolist() == [[1, 2, 3, 4]]
    assert ObjectTransform(JointConfig(), MEAN, STD, training=False)(image, objects)[0].shape == (3, 100, 200)


def test_images_without_objects():
    image, empty = Image.new("RGB", (40, 30)), np.zeros(0)
    objects = Objects(empty.reshape(0, 4), empty.astype(int), empty.astype(int), empty, np.zeros((0, 30, 40), np.uint8))
    made, target = ObjectTransform(JointConfig(crop=32), MEAN, STD, training=True)(image, objects)
    assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 32, 32)
    assert made.shape == (3, 32, 32)


def test_batches():
    images = [torch.zeros(3, 4, 5), torch.zeros(3, 4, 6)]
    assert [image.shape for image in collate_lists(images, [{}, {}])[0]] == [(3, 4, 5), (3, 4, 6)]
    assert collate_crops(images[:1], [torch.zeros(4, 5)])[1].shape == (1, 4, 5)
    with pytest.raises(VisionattnError, match="5 x 4, 6 x 4.*joint.crop"):
        collate_crops(images, [torch.zeros(4, 5), torch.zeros(4, 6)])
