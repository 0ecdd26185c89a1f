"""Folders and annotations as people's tools leave them mean what their tools say they do."""

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import layouts
import numpy as np
import pytest
from PIL import Image

from visionattn.data.boxes import load_detection
from visionattn.data.config import AnnotationConfig, DataConfig
from visionattn.data.images import ImageSet, load_datasets, load_validation
from visionattn.data.maps import load_segmentation
from visionattn.errors import VisionattnError


def load(root: Path, masks: bool = False, **options) -> tuple[ImageSet, ImageSet]:
    return load_detection(DataConfig(root=str(root), val_fraction=0.4), AnnotationConfig(**options), masks)


def contents(images: ImageSet) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Objects of each image by its name, as `layouts` has them."""
    found = {}
    for number in range(len(images)):
        objects = images.load(number)[1]
        name = Path(images.place(number)).stem.removesuffix("_png.rf.0f1e")
        boxes = [tuple(box) for box in objects.boxes.round(3).tolist()]
        found[name] = [(images.classes[label - 1], box) for label, box in zip(objects.labels, boxes, strict=True)]
        if objects.masks is not None:
            for mask, (x1, y1, x2, y2) in zip(objects.masks, objects.boxes.round().astype(int), strict=True):
                assert mask.sum() == mask[y1:y2, x1:x2].sum() == (x2 - x1) * (y2 - y1)
    return found


def useful(images: dict) -> dict:
    return {name: objects for name, objects in images.items() if objects}


@pytest.mark.parametrize("make", layouts.SPLIT, ids=lambda make: make.__name__)
def test_splits_of_each_tool(tmp_path: Path, make: Callable):
    make(tmp_path)
    layouts.litter(tmp_path)
    train, val = load(tmp_path)
    assert contents(train) == useful(layouts.SPLITS["train"]) and contents(val) == layouts.SPLITS["val"]
    assert [name for name in train.classes if name in layouts.CLASSES] == layouts.CLASSES
    assert len(train.classes) in (2, 20)  # VOC's own are those of VOC


@pytest.mark.parametrize("make", layouts.WHOLE, ids=lambda make: make.__name__)
def test_a_part_of_what_is_not_split_is_held_out(tmp_path: Path, make: Callable):
    make(tmp_path)
    layouts.litter(tmp_path)
    train, val = load(tmp_path)
    assert train.classes == layouts.CLASSES and len(val) == 2
    held_out = contents(val)
    assert contents(train) == useful({n: objects for n, objects in layouts.ALL.items() if n not in held_out})
    assert all(layouts.ALL[name] == objects for name, objects in held_out.items())
    assert contents(load(tmp_path)[1]) == held_out


@pytest.mark.parametrize("make", layouts.WITH_MASKS, ids=lambda make: make.__name__)
def test_masks_of_each_tool(tmp_path: Path, make: Callable):
    make(tmp_path)
    train, val = load(tmp_path, masks=True)
    assert contents(train).items() <= layouts.ALL.items() and train.load(0)[1].masks.any()


def coco(root: Path, change: Callable[[dict], object], options: dict | None = None) -> tuple[ImageSet, ImageSet]:
    """COCO's files with a change to the one of training."""
    layouts.coco(root)
    file = root / "annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return load(root, **options or {})


def above(name: str, **category) -> Callable[[dict], None]:
    """Puts a super-category above all others."""

    def change(content: dict) -> None:
        for each in content["categories"]:
            each["supercategory"] = name
        content["categories"].insert(0, {"id": 0, "name": name, "supercategory": "none"} | category)

    return change


def ids_as_text(content: dict) -> None:
    for category in content["categories"]:
        category["id"] = str(category["id"])
    for image in content["images"]:
        image["id"] = float(image["id"])


@pytest.mark.parametrize(
    "change",
    [
        above("animals"),
        above("dog"),
        above("animals", id="zero"),
        above("animals", supercategory="animals"),
        ids_as_text,
    ],
)
def test_categories_that_are_no_classes_and_ids_as_text(tmp_path: Path, change: Callable):
    train, _ = coco(tmp_path, change)
    assert train.classes == ["cat", "dog"] and contents(train) == useful(layouts.SPLITS["train"])


def test_a_super_category_with_objects_is_a_class(tmp_path: Path):
    def change(content: dict) -> None:
        above("animals")(content)
        content["annotations"][0]["category_id"] = 0

    assert coco(tmp_path, change)[0].classes == ["animals", "cat", "dog"]


def test_published_super_categories_are_classes(tmp_path: Path):
    """COCO's person is its own super-category, and stays the first class of a part without persons."""

    def change(content: dict) -> None:
        content["categories"].insert(0, {"id": 0, "name": "person", "supercategory": "person"})

    assert coco(tmp_path, change)[0].classes == ["person", "cat", "dog"]


@pytest.mark.parametrize("missing", [{"height": None, "width": None}, {"height": 0, "width": 0}, {"width": None}])
def test_sizes_are_read_from_the_images(tmp_path: Path, missing: dict):
    train, _ = coco(tmp_path, lambda content: [image.update(missing) for image in content["images"]])
    assert contents(train) == useful(layouts.SPLITS["train"])


def test_sizes_of_photographs_are_those_of_the_upright_ones(tmp_path: Path):
    def change(content: dict) -> None:
        for image in content["images"]:
            del image["height"], image["width"]
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (40, 60)).save(tmp_path / "train2017/a.png", exif=exif)

    assert contents(coco(tmp_path, change)[0]) == useful(layouts.SPLITS["train"])


def as_format(box_format: str) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        for item in content["annotations"]:
            x, y, width, height = item["bbox"]
            if box_format.endswith("xyxy"):
                width, height = x + width, y + height
            if box_format.endswith("cxcywh"):
                x, y = x + width / 2, y + height / 2
            if box_format.startswith("relative"):
                x, y, width, height = x / 60, y / 40, width / 60, height / 40
            item["bbox"] = [x, y, width, height]

    return change


FORMATS = ["xyxy", "cxcywh", "relative_xywh", "relative_xyxy", "relative_cxcywh"]


@pytest.mark.parametrize("box_format", FORMATS)
def test_boxes_in_each_format(tmp_path: Path, box_format: str):
    train, val = layouts.SPLITS.values()
    layouts.coco(tmp_path)
    for split in ("train", "val"):
        file = tmp_path / f"annotations/instances_{split}2017.json"
        content = json.loads(file.read_text())
        as_format(box_format)(content)
        file.write_text(json.dumps(content))
    loaded = load(tmp_path, box_format=box_format)
    assert contents(loaded[0]) == useful(train) and contents(loaded[1]) == val


@pytest.mark.parametrize(
    "box_format, told",
    [
        ("xyxy", "1 of 3 boxes leave their images .* give --annotations.box_format xyxy"),
        ("relative_xywh", "look relative, from 0 to 1: give --annotations.box_format relative_xywh"),
        ("relative_xyxy", "look relative, from 0 to 1: give --annotations.box_format relative_xyxy"),
        ("relative_cxcywh", "look relative, from 0 to 1: give --annotations.box_format relative_"),
    ],
)
def test_boxes_of_another_format_are_told(tmp_path: Path, box_format: str, told: str):
    with pytest.raises(VisionattnError, match=told) as error:
        coco(tmp_path, as_format(box_format))
    assert "\n" not in str(error.value)


def test_boxes_that_are_meant_as_they_stand(tmp_path: Path):
    train, _ = coco(tmp_path, as_format("xyxy"), {"box_format": "xywh"})
    assert train.load(0)[1].boxes[0].tolist() == [10, 8, 40, 36]


def test_a_few_sloppy_boxes_are_no_other_format(tmp_path: Path):
    def change(content: dict) -> None:
        content["annotations"] += [content["annotations"][0] | {"bbox": [5, 5, 9 + i, 9]} for i in range(20)]
        content["annotations"][0]["bbox"] = [40, 30, 45, 35]

    assert len(coco(tmp_path, change)[0]) == 2


def test_yolo_boxes_in_pixels_are_told_and_read(tmp_path: Path):
    layouts.yolo_by_folders(tmp_path)
    for split, images in layouts.SPLITS.items():
        for name, objects in images.items():
            lines = [f"{layouts.CLASSES.index(n)} {x1} {y1} {x2} {y2}" for n, (x1, y1, x2, y2) in objects]
            (tmp_path / f"labels/{split}/{name}.txt").write_text("\n".join(lines))
    with pytest.raises(VisionattnError, match="look in pixels, .*--annotations.box_format xyxy"):
        load(tmp_path)
    assert contents(load(tmp_path, box_format="xyxy")[0]) == useful(layouts.SPLITS["train"])


def test_voc_boxes_are_corners_whatever_runs_were_saved_with(tmp_path: Path):
    layouts.voc(tmp_path)
    assert contents(load(tmp_path, box_format="xywh")[1]) == layouts.SPLITS["val"]
    assert load(tmp_path, box_format="xyxy")[1].load(0)[1].boxes.tolist() == [[13, 11, 42, 30]]
    with pytest.raises(VisionattnError, match="boxes by their corners: annotations.box_format is xyxy"):
        load(tmp_path, box_format="cxcywh")


def test_voc_boxes_between_zero_and_one_are_told(tmp_path: Path):
    layouts.voc(tmp_path)
    for file in (tmp_path / "Annotations").iterdir():
        for edge, side in (("xmin", 60), ("ymin", 40), ("xmax", 60), ("ymax", 40)):
            parts = file.read_text().split(f"<{edge}>")
            scaled = [f"{int(part.split('<')[0]) / side}<{part.split('<', 1)[1]}" for part in parts[1:]]
            file.write_text(f"<{edge}>".join([parts[0], *scaled]))
    with pytest.raises(VisionattnError, match="look relative.*--annotations.box_format relative_xyxy"):
        load(tmp_path)


YOLO_WRONG = [
    ("labels/train/a.txt", "0 0.5 0.5 0.2", r"a.txt: line 1 has 4 columns"),
    ("labels/train/a.txt", "\n2 0.5 0.5 0.2 0.2", r"a.txt: line 2 is of the class 2, which has no name"),
    ("labels/train/a.txt", "-1 0.5 0.5 0.2 0.2", r"a.txt: line 1 is of the class -1"),
    ("labels/train/a.txt", "0.5 0.5 0.5 0.2 0.2", r"a.txt: line 1 is of the class 0.5"),
    ("labels/train/a.txt", "cat 0.5 0.5 0.2 0.2", r"a.txt: line 1 has cat: expected finite"),
    ("labels/train/a.txt", "0 nan 0.5 0.2 0.2", r"a.txt: line 1 has nan: expected finite"),
    ("labels/train/a.txt", "0 1e999 0.5 0.2 0.2", r"a.txt: line 1 has 1e999"),
    ("labels/train/a.txt", "0 0.5 0.5 -0.2 0.2", r"a.txt: line 1 has the bbox"),
    ("data.yaml", "names: 3\ntrain: images/train\n", r"data.yaml has the names 3: expected a list"),
    ("data.yaml", "names: {a: b}\ntrain: images/train\n", r"data.yaml has a name for the class a"),
    ("data.yaml", "names: [a, b]\nnc: 3\ntrain: images/train\n", r"data.yaml has 2 names, but nc: 3"),
    ("data.yaml", "names: [a, [b]]\ntrain: images/train\n", r"data.yaml has the names"),
    ("data.yaml", "names: [a, b\n", r"cannot read .*data.yaml"),
    ("data.yaml", "names: [a, b]\ntrain: {x: y}\n", r"data.yaml has the path .*: expected a folder"),
    ("data.yaml", "names: [a, b]\ntrain: images/none\n", r"data.yaml has the path images/none, which is not there"),
    ("data.yaml", "names: [a, b]\ntrain: /etc\n", r"data.yaml has the path /etc, .*nothing outside of it is read"),
    (
        "data.yaml",
        "names: [a, b]\ntrain: ../../../etc\n",
        r"has the path ../../../etc, .*nothing outside of it is read",
    ),
    ("data.yaml", "names: [a, b]\npath: /etc\ntrain: .\nval: /etc/passwd\n", r"/etc/passwd, .*nothing outside of it"),
]


@pytest.mark.parametrize("name, text, told", YOLO_WRONG)
def test_wrong_yolo_files_are_named_by_file_and_line(tmp_path: Path, name: str, text: str, told: str):
    layouts.ultralytics(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(VisionattnError, match=told) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_yaml_bombs_are_text(tmp_path: Path):
    layouts.ultralytics(tmp_path)
    doubled = "".join(f"b{i + 1}: &b{i + 1} {{<<: [{', '.join([f'*b{i}'] * 9)}]}}\n" for i in range(12))
    rest = "train: images/train\nval: images/val\nnames: [no, 1]\n"
    (tmp_path / "data.yaml").write_text(f"b0: &b0 {{x: 1}}\n{doubled}{rest}")
    assert load(tmp_path)[0].classes == ["no", "1"]
    nested = "n0: &n0 [x]\n" + "".join(f"n{i + 1}: &n{i + 1} [{', '.join([f'*n{i}'] * 9)}]\n" for i in range(9))
    for wrong in ("names: *n9\n", "names: [*n9]\n", "names: [a, b]\nnc: *n9\n", "names: [a, b]\ntrain: *n9\n"):
        (tmp_path / "data.yaml").write_text(f"{nested}{wrong}")
        with pytest.raises(VisionattnError, match="data.yaml has") as error:
            load(tmp_path)
        assert len(str(error.value)) < 400
    for bomb in ("loop: &loop [*loop]\n", f"deep: {'[' * 5000}\n", "? [1]\n: 2\n"):
        (tmp_path / "data.yaml").write_text(f"{bomb}{rest}")
        with pytest.raises(VisionattnError, match="cannot read .*data.yaml"):
            load(tmp_path)


def test_key_points_are_left_out(tmp_path: Path):
    layouts.ultralytics(tmp_path)
    file = tmp_path / "data.yaml"
    file.write_text(file.read_text() + "kpt_shape: [2, 2]\n")
    for label in (tmp_path / "labels").rglob("*.txt"):
        label.write_text("".join(f"{line} 0.1 0.9 0.9 0.1\n" for line in label.read_text().splitlines()))
    assert contents(load(tmp_path)[0]) == useful(layouts.SPLITS["train"])


def test_boxes_without_polygons_are_no_masks(tmp_path: Path):
    layouts.ultralytics(tmp_path)
    with pytest.raises(VisionattnError, match="a.txt: line 1 is a box: masks need polygons"):
        load(tmp_path, masks=True)


def test_classes_that_the_data_name_cannot_be_named_again(tmp_path: Path):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    for make in (layouts.coco, layouts.ultralytics):
        make(tmp_path / make.__name__)
        with pytest.raises(VisionattnError, match="annotations.classes would change nothing: .* names the classes"):
            load(tmp_path / make.__name__, classes=str(names))


def test_names_with_an_empty_line_between_are_refused(tmp_path: Path):
    layouts.yolo_by_folders(tmp_path)
    (tmp_path / "classes.txt").write_text("cat\n\ndog\n")
    with pytest.raises(VisionattnError, match="classes.txt has an empty line 2"):
        load(tmp_path)


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def labelled(images: ImageSet) -> list[tuple[str, str]]:
    samples = images.source.samples
    return [(images.classes[samples[i][1]], "/".join(Path(samples[i][0]).parts[-2:])) for i in images.indices]


@pytest.mark.parametrize("base", ["", "train", "Train"])
def test_the_folder_below_the_root_or_split_is_the_class(tmp_path: Path, base: str):
    for name in ("cat/1.png", "cat/2.png", "dog/2020/1.png", "dog/2021/deep/2.png"):
        image(tmp_path / base / name)
        if base:
            image(tmp_path / "Val" / name)
    layouts.litter(tmp_path)
    train, val = load_datasets(DataConfig(root=str(tmp_path), val_fraction=0.5))
    assert train.classes == val.classes == ["cat", "dog"]
    everything = [("cat", "cat/1.png"), ("cat", "cat/2.png"), ("dog", "2020/1.png"), ("dog", "deep/2.png")]
    assert labelled(train) == everything if base else sorted(labelled(train) + labelled(val)) == everything


def test_classes_of_validation_are_labelled_as_in_training(tmp_path: Path):
    for name in ("cat/1.png", "dog/x/1.png", "emu/1.png"):
        image(tmp_path / "train" / name)
    for name in ("cat/x/1.png", "dog/1.png", "emu/1.png"):
        image(tmp_path / "val" / name)
    train, val = load_datasets(DataConfig(root=str(tmp_path)))
    assert [label for _, label in val.source.samples] == [0, 1, 2] and train.classes == val.classes


def test_classes_and_images_come_in_timms_order(tmp_path: Path):
    """And those that it takes for equal in one order, whatever the folder's own is."""
    for name in ("n10", "n9", "b", "A", "01", "1"):
        for file in ("10.png", "9.png", "09.png", "a.JPG"):
            image(tmp_path / name / file)
    images = load_validation(DataConfig(root=str(tmp_path), val_fraction=1.0))
    assert images.classes == ["01", "1", "A", "b", "n9", "n10"]
    files = ["09.png", "9.png", "10.png", "a.JPG"]
    found = labelled(images)
    assert [each for each in found if each[0] == "n10"] == [("n10", f"n10/{file}") for file in files]
    equal = [f"{name}/{file}" for same in (files[:2], files[2:3], files[3:]) for name in ("01", "1") for file in same]
    assert found[:8] == [(name.split("/")[0], name) for name in equal]


def test_links_lead_to_images_once_and_back_to_nothing(tmp_path: Path):
    for name in ("elsewhere/1.png", "root/dog/1.png", "root/cat/x/2.png"):
        image(tmp_path / name)
    root = tmp_path / "root"
    os.symlink(tmp_path / "elsewhere", root / "cat" / "linked")
    os.symlink(root / "cat", root / "cat" / "loop1")
    os.symlink(root / "cat", root / "cat" / "x" / "loop2")
    os.symlink(root, root / "dog" / "all")
    os.symlink("itself.png", root / "dog" / "itself.png")
    images = load_validation(DataConfig(root=str(root), val_fraction=1.0))
    found = [("cat", "linked/1.png"), ("cat", "x/2.png"), ("dog", "dog/1.png"), ("dog", "dog/itself.png")]
    assert labelled(images) == found
    with pytest.raises(VisionattnError, match="cannot read .*itself.png"):
        images.load(3)


def test_pipes_are_no_images(tmp_path: Path):
    for name in ("cat/1.png", "dog/1.png"):
        image(tmp_path / name)
    os.mkfifo(tmp_path / "dog" / "2.png")
    images = load_validation(DataConfig(root=str(tmp_path), val_fraction=1.0))
    with pytest.raises(VisionattnError, match="cannot read .*2.png: it is no regular file"):
        images.load(2)


def mask(path: Path, values: list[int] = (0, 1)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((8, 8), np.uint8)
    pixels[0, : len(values)] = values
    Image.fromarray(pixels).save(path)


def segmentation(root: Path) -> tuple[ImageSet, ImageSet]:
    return load_segmentation(DataConfig(root=str(root)), AnnotationConfig())


@pytest.mark.parametrize("layout", ["plain", "cityscapes", "voc"])
def test_leftovers_are_no_images_of_segmentation(tmp_path: Path, layout: str):
    for split in ("train", "val"):
        if layout == "plain":
            image(tmp_path / f"images/{split}/deep/a.jpg")
            mask(tmp_path / f"masks/{split}/deep/a.png")
            (tmp_path / "classes.txt").write_text("\ufeffsky\ngrass\n", "utf-8")
        elif layout == "cityscapes":
            image(tmp_path / f"leftImg8bit/{split}/bonn/a_leftImg8bit.png")
            mask(tmp_path / f"gtFine/{split}/bonn/a_gtFine_labelIds.png", [7, 8])
        else:
            image(tmp_path / "JPEGImages/a.png")
            mask(tmp_path / "SegmentationClass/a.png")
            layouts.write(tmp_path / f"ImageSets/Segmentation/{split}.txt", "a  1\n")
    layouts.litter(tmp_path)
    train, val = segmentation(tmp_path)
    assert (len(train), len(val)) == (1, 1) and train.load(0)[1][0, :2].tolist() == [0, 1]
    assert layout != "plain" or train.classes == ["sky", "grass"]


def test_torchvisions_folders_are_without_leftovers(tmp_path: Path):
    for name in (
        "train/cat/1.png",
        "train/dog/x/2.png",
        "train/.ipynb_checkpoints/3.png",
        "val/cat/1.png",
        "val/dog/1.png",
    ):
        image(tmp_path / name)
    layouts.litter(tmp_path)
    train, val = load_datasets(DataConfig(name="torch/image_folder", root=str(tmp_path)))
    assert labelled(train) == [("cat", "cat/1.png"), ("dog", "x/2.png")] and train.classes == val.classes == [
        "cat",
        "dog",
    ]
    assert train.load(1)[1] == 1


def test_a_class_may_be_called_like_a_split(tmp_path: Path):
    for name in ("Train/1.png", "Train/2.png", "Boat/1.png", "Boat/2.png"):
        image(tmp_path / name)
    assert load_datasets(DataConfig(root=str(tmp_path)))[0].classes == ["Boat", "Train"]


def small_grey_png(path: Path, bits: int, values: list[int]) -> None:
    """An 8 x 8 grey PNG of so many bits, as optimisers write them; Pillow does not."""
    row = sum(value << (8 - bits * (i + 1)) for i, value in enumerate(values)).to_bytes(1) + bytes(bits - 1)
    head, body = struct.pack(">IIBBBBB", 8, 8, bits, 0, 0, 0, 0), zlib.compress((b"\0" + row) * 8)
    chunks = [(b"IHDR", head), (b"IDAT", body), (b"IEND", b"")]
    parts = [len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4) for kind, data in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def plain_masks(root: Path, names: str = "sky\ngrass\ntree\n") -> Path:
    for split in ("train", "val"):
        image(root / f"images/{split}/a.jpg")
        mask(root / f"masks/{split}/a.png")
    (root / "classes.txt").write_text(names)
    return root / "masks/train/a.png"


@pytest.mark.parametrize("bits, values", [(2, [0, 1, 2]), (4, [2, 1])])
def test_values_of_few_bits_are_not_stretched(tmp_path: Path, bits: int, values: list[int]):
    small_grey_png(plain_masks(tmp_path), bits, values)
    assert segmentation(tmp_path)[0].load(0)[1][3, : len(values)].tolist() == values


def test_masks_that_blurred_are_refused(tmp_path: Path):
    path = plain_masks(tmp_path)
    Image.new("L", (8, 8), 1).save(path, format="jpeg")
    with pytest.raises(VisionattnError, match="a.png is a JPEG, which changes the values"):
        segmentation(tmp_path)[0].load(0)


def test_masks_of_0_and_255_do_not_lose_their_class(tmp_path: Path):
    path = plain_masks(tmp_path, "background\nroad\n")
    mask(path, [0, 255])
    with pytest.raises(VisionattnError, match="values 0 and 255 alone, and 255 does not count: write 1 for road"):
        segmentation(tmp_path)
    Image.fromarray(np.full((8, 8), 255, np.uint8)).convert("1").save(path)
    assert (segmentation(tmp_path)[0].load(0)[1] == 1).all()
