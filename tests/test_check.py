"""`visionattn check`: all that is wrong with a folder, in one pass, for every layout that training reads."""

import json
from pathlib import Path

import numpy as np
import pytest
from layouts import ALL, SPLIT, SPLITS, WHOLE, coco_file, cvat_yolo, yolo_by_folders
from PIL import Image

from visionattn.cli import main
from visionattn.data.boxes import load_detection
from visionattn.data.check import check
from visionattn.data.config import AnnotationConfig, DataConfig
from visionattn.errors import VisionattnError


def noise(path: Path, seed: int, size: tuple[int, int] = (12, 10), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def photos(root: Path, parts: tuple[str, ...] = ("train", "val")) -> Path:
    for number, (part, name, i) in enumerate((p, n, i) for p in parts for n in ("cat", "dog") for i in range(3)):
        noise(root / part / name / f"{i}.png", number)
    return root


def varied(root: Path) -> Path:
    """The images of a folder as they are, but each of pixels of its own."""
    paths = sorted(path for path in root.rglob("*") if path.suffix in (".png", ".jpg") and "mask" not in str(path))
    for number, path in enumerate(paths):
        with Image.open(path) as image:
            size = image.size
        noise(path, number, size)
    return root


@pytest.mark.parametrize("parts", [("train", "val"), (".",)])
def test_a_clean_folder_of_classes(tmp_path: Path, parts, capsys):
    photos(tmp_path, parts)
    assert main(["check", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "nothing is wrong" in out and not err


def test_all_that_is_wrong_with_a_folder_of_classes(tmp_path: Path, capsys):
    photos(tmp_path)
    cat = tmp_path / "train" / "cat"
    (cat / "0.png").write_bytes((cat / "0.png").read_bytes()[:100])
    (tmp_path / "val" / "dog" / "1.png").write_bytes(b"no image")
    (tmp_path / "val" / "dog" / "0.png").write_bytes(b"")
    noise(cat / "jpeg.png", 90, format="JPEG")
    noise(tmp_path / "train" / "dog" / "again.bmp", 1)  # the pixels of cat/1.png in another file
    noise(tmp_path / "val" / "cat" / "again.png", 2)
    noise(tmp_path / "train" / "cow" / "0.png", 80)
    (tmp_path / "train" / "yak").mkdir()
    noise(tmp_path / "val" / "stray.png", 81)
    assert main(["check", str(tmp_path), "--format", "json", "--quiet"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == "classification" and found["images"] == {"train": 9, "validation": 7}
    lines = [(fault["kind"], fault["told"]) for fault in found["faults"]]

    def is_told(kind: str, *words: str) -> bool:
        return any(kind == k and all(word in text for word in words) for k, text in lines)

    assert is_told("unreadable", "train/cat/0.png") and is_told("unreadable", "val/dog/1.png")
    assert is_told("unreadable", "val/dog/0.png") and is_told("suffix", "jpeg.png", "JPEG")
    assert is_told("duplicate", "again.bmp", "cat/1.png", "cat and dog")
    assert is_told("duplicate", "cat/2.png", "val/cat/again.png", "train and validation")
    assert is_told("class", "cow: train has 1") and is_told("class", "cow: validation has no")
    assert is_told("class", "yak holds no images") and is_told("layout", "stray.png")
    assert len(lines) == 10, lines


def test_duplicates_may_be_held_out(tmp_path: Path):
    photos(tmp_path, (".",))
    noise(tmp_path / "cat" / "again.png", 0)
    (fault,) = check(tmp_path).faults
    assert fault.kind == "duplicate" and "cat/again.png" in fault.told and "held out" in fault.told


def test_photographs_held_out_of_cvats_yolo_are_not_trained_on(tmp_path: Path):
    cvat_yolo(tmp_path)
    for path in tmp_path.rglob("*.txt"):
        if path.parent.name == "obj_train_data":
            path.write_text("0 0.5 0.5 0.2 0.2\n")
    train, val = load_detection(DataConfig(name="folder", root=str(tmp_path)), AnnotationConfig(), False)
    assert len(train) + len(val) in (len(ALL), len(ALL) - 1) and not set(train.indices) & set(val.indices)


@pytest.mark.parametrize("layout", [*SPLIT, *WHOLE], ids=lambda layout: layout.__name__)
def test_layouts_of_boxes_have_no_other_faults_than_their_own(tmp_path: Path, layout):
    layout(tmp_path)
    found = check(varied(tmp_path), least=1)
    split = layout in SPLIT
    assert found.task == "detection"
    assert found.images == ({"train": 3, "validation": 2} if split else {"all images": len(ALL)})
    is_yolo = any("labels" in path.parts or path.stem == "a" for path in tmp_path.rglob("*.txt"))
    told = [fault.told for fault in found.faults if fault.kind != "unannotated"]
    assert told == (["class dog: validation has no readable objects of it"] if split else [])
    lone = [fault.told for fault in found.faults if fault.kind == "unannotated"]
    assert len(lone) == is_yolo and all("nothing" in each for each in lone)


def test_all_that_is_wrong_with_coco(tmp_path: Path):
    content = coco_file(tmp_path / "annotations/instances_train.json", SPLITS["train"] | {"gone": []})
    boxes = {"outside": [40, 10, 30, 10], "flat": [5, 5, 0.2, 9], "negative": [5, 5, -3, 9], "text": ["a", 5, 3, 9]}
    for name, box in boxes.items():
        content["annotations"].append({"id": name, "image_id": 0, "category_id": 1, "bbox": box})
    content["annotations"].append({"id": "of nothing", "image_id": 77, "category_id": 1, "bbox": [1, 1, 5, 5]})
    content["annotations"].append({"id": "of no class", "image_id": 0, "category_id": 9, "bbox": [1, 1, 5, 5]})
    content["images"][1]["width"] = 61
    (tmp_path / "annotations/instances_train.json").write_text(json.dumps(content))
    coco_file(tmp_path / "annotations/instances_val.json", SPLITS["val"])
    for number, (split, name) in enumerate((s, n) for s, images in SPLITS.items() for n in images):
        noise(tmp_path / split / f"{name}.png", number, (60, 40))
    noise(tmp_path / "train" / "unlisted.png", 50)
    faults = [(fault.kind, fault.told) for fault in check(tmp_path, least=1).faults]
    expected = {
        ("annotation", "annotation negative"), ("annotation", "annotation text"),
        ("annotation", "annotation of nothing"),
        ("annotation", "annotation of no class"), ("annotation", "b b.png: the image is 60 x 40, but 61 x 40"),
        ("box", "leaves 60 x 40"), ("box", "less than a pixel"), ("missing", "gone.png is listed"),
        ("unannotated", "unlisted.png"), ("class", "dog: validation has no"),
    }  # fmt: skip
    for kind, text in expected:
        assert sum(kind == k and text in each for k, each in faults) == 1, (kind, text, faults)
    assert len(faults) == len(expected)


def test_yolo_annotations_without_image(tmp_path: Path):
    yolo_by_folders(tmp_path)
    varied(tmp_path)
    (tmp_path / "labels/train/other.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "labels/train/a.txt").write_text("0 0.5 0.5 0.2 0.2\n7 0.5 0.5 0.1 0.1\n0 0.5\n1 0.5 0.5 0.2 0.2\n")
    kinds = [fault.kind for fault in check(tmp_path, least=1).faults]
    assert sorted(kinds) == ["annotation", "annotation", "class", "missing", "unannotated"]


def test_masks(tmp_path: Path):
    def mask(name: str, values: np.ndarray) -> None:
        path = tmp_path / "masks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.astype(np.uint8)).save(path)

    both = np.arange(120).reshape(10, 12) % 2
    for i, (split, name) in enumerate((s, n) for s in ("train", "val") for n in "ab"):
        noise(tmp_path / "images" / split / f"{name}.jpg", i)
        mask(f"{split}/{name}.png", both)
    (tmp_path / "classes.txt").write_text("sky\nsea\n")
    assert not check(tmp_path).faults and check(tmp_path).task == "segmentation"
    mask("train/a.png", both * 7)
    mask("train/b.png", both[:5])
    mask("val/b.png", both * 0 + 255)
    mask("val/lone.png", both)
    noise(tmp_path / "images" / "val" / "bare.jpg", 9)
    faults = [(fault.kind, fault.told) for fault in check(tmp_path, least=1).faults]
    expected = {
        ("annotation", "train/a.png has the value 7"), ("annotation", "12 x 5 according to"),
        ("annotation", "masks/val/bare.png is missing"), ("mask", "images/val/b.jpg: no pixel"),
        ("missing", "val/lone.png is the mask of an image that is not there"),
        ("class", "sky: train has no readable images"), ("class", "sea: train has no readable images"),
    }  # fmt: skip
    for kind, text in expected:
        assert sum(kind == k and text in each for k, each in faults) == 1, (kind, text, faults)
    assert len(faults) == len(expected)


def test_labels_in_a_table(tmp_path: Path):
    for i in range(4):
        noise(tmp_path / f"{i}.png", i)
    (tmp_path / "labels.csv").write_text("file,labels\n0.png,a|b\n1.png,b\n2.png,a\n3.png,b\nnone.png,a\n5.png,b\n")
    found = check(tmp_path, labels="labels.csv", least=1)
    assert [fault.kind for fault in found.faults][:2] == ["annotation"] * 2 and found.images["train"] == 3
    assert all("there is no image" in fault.told for fault in found.faults[:2])


@pytest.mark.parametrize("argv", [["nowhere"], ["."], [".", "--task", "detection"], [".", "--labels", "x.csv"]])
def test_what_cannot_be_checked(tmp_path: Path, argv, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["check", *argv]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and err.startswith("error: ")


def test_what_was_the_same_fault_ends_training(tmp_path: Path):
    """Listing is for `check` alone: what loads for training still stops at the first fault."""
    yolo_by_folders(tmp_path)
    (tmp_path / "labels/train/a.txt").write_text("7 0.5 0.5 0.1 0.1\n")
    check(tmp_path)
    with pytest.raises(VisionattnError, match="of the class 7"):
        load_detection(DataConfig(name="folder", root=str(tmp_path)), AnnotationConfig(), False)
