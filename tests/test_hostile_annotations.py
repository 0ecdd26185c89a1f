"""Annotations that are wrong, absurd or meant to do harm: one line that names file and entry, and no undue work."""

import json
import os
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as reference_rle

from visionattn.data.boxes import load_detection
from visionattn.data.config import AnnotationConfig, DataConfig
from visionattn.data.images import ImageSet
from visionattn.data.labels import load_labelled
from visionattn.data.maps import load_segmentation
from visionattn.data.masks import check_mask, decode
from visionattn.errors import VisionattnError

TRAIN = "annotations/instances_train2017.json"


def load(root: Path, masks: bool = False) -> ImageSet:
    return load_detection(DataConfig(root=str(root)), AnnotationConfig(), masks)[0]


def changed(root: Path, where: str, entry: str, value: Any = None, missing: bool = False) -> None:
    """COCO's files, of which the first entry of a list in that of training is changed."""
    layouts.coco(root)
    content = json.loads((root / TRAIN).read_text())
    content[where][0].pop(entry, None)
    if not missing:
        content[where][0][entry] = value
    (root / TRAIN).write_text(json.dumps(content))


def told_in_one_line(root: Path, told: str, masks: bool = False) -> None:
    with pytest.raises(VisionattnError, match=told) as error:
        load(root, masks)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


HUGE = 10**400
ENTRIES = {
    ("annotations", "bbox"): [
        [HUGE, 1, 2, 3],
        [True, 1, 2, 3],
        ["1", 1, 2, 3],
        [None] * 4,
        3,
        "1 2 3 4",
        {},
        [1e300] * 4,
    ],
    ("annotations", "image_id"): [None, True, 1.5, [0], {}, float("nan"), HUGE, "none"],
    ("annotations", "category_id"): [None, True, 1.5, [0], {}, float("inf"), HUGE, "none", -1],
    ("annotations", "area"): ["400", [], float("nan"), HUGE, -1, True],
    ("annotations", "iscrowd"): ["yes", 2, [], 0.5, HUGE],
    ("images", "id"): [None, True, 1.5, [0], {}],
    ("images", "file_name"): [None, 5, True, ["a.png"], "", HUGE],
    ("images", "height"): ["40", True, -40, 40.5, [40], HUGE, float("nan")],
    ("images", "width"): ["60", -60, {}],
    ("categories", "id"): [None, False, 1.5, [1]],
    ("categories", "name"): [None, 1.5, ["cat"], True],
}


@pytest.mark.parametrize(
    "where, entry, value",
    [(*key, value) for key, values in ENTRIES.items() for value in values],
    ids=lambda v: f"{v}"[:9],
)
def test_entries_of_the_wrong_kind_are_named(tmp_path: Path, where: str, entry: str, value: Any):
    changed(tmp_path, where, entry, value)
    one = {"annotations": "annotation", "images": "image", "categories": "category"}[where]
    what = {"image_id": "image", "category_id": "category"}.get(entry, entry)
    told_in_one_line(tmp_path, rf"instances_train2017.json: {one} (number )?\d+ (is of|has).* {what} ?")


REQUIRED = [key for key in ENTRIES if key[1] not in ("area", "iscrowd", "height", "width")]


@pytest.mark.parametrize("where, entry", REQUIRED)
def test_missing_entries_are_named(tmp_path: Path, where: str, entry: str):
    changed(tmp_path, where, entry, missing=True)
    told_in_one_line(tmp_path, rf"instances_train2017.json: \w+ (number )?\d+ has no {entry}")


@pytest.mark.parametrize(
    "text, told",
    [
        ("[]", "expected images, categories and annotations"),
        ("3", "expected images, categories and annotations"),
        ('{"images": 3}', "has the images 3, expected a list"),
        ('{"images": [3]}', "number 1 of the images is 3, expected a mapping"),
        ('{"images": [], "categories": [], "annotations": {"1": 2}}', "has the annotations .*expected a list"),
        ('{"images": []}', "has no categories"),
        ("[" * 100_000, "cannot read"),
        (f'{{"images": {"9" * 5000}}}', "cannot read"),
        ("\x00\x01", "cannot read"),
    ],
)
def test_files_of_another_kind_are_told(tmp_path: Path, text: str, told: str):
    layouts.coco(tmp_path)
    (tmp_path / TRAIN).write_text(text)
    told_in_one_line(tmp_path, f"instances_train2017.json.*{told}|{told}.*instances_train2017.json")


def test_a_name_that_no_system_has_is_told(tmp_path: Path):
    changed(tmp_path, "images", "file_name", "x" * 300)
    images = load(tmp_path)
    with pytest.raises(VisionattnError, match="cannot read .*File name too long"):
        images.load(0)


def test_two_images_or_categories_of_one_id_are_told(tmp_path: Path):
    layouts.coco(tmp_path)
    content = json.loads((tmp_path / TRAIN).read_text())
    for where, told in (
        ("images", "image 0 is listed twice, as a.png and b b.png"),
        ("categories", "category 1 is listed"),
    ):
        twice = json.loads(json.dumps(content))
        twice[where][1]["id"] = twice[where][0]["id"]
        (tmp_path / TRAIN).write_text(json.dumps(twice))
        told_in_one_line(tmp_path, told)


def test_marks_and_other_encodings_of_windows_are_read(tmp_path: Path):
    layouts.coco(tmp_path)
    text = (tmp_path / TRAIN).read_text()
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / TRAIN).write_bytes(text.encode(encoding))
        assert len(load(tmp_path)) == 2


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A picture outside of the folder of the data, which lies in `data` beside it."""
    path = tmp_path / "secret.png"
    layouts.draw(path)
    (tmp_path / "data").mkdir()
    return path


@pytest.mark.parametrize(
    "name",
    ["{secret}", "../../secret.png", "..\\..\\secret.png", "a/../../../secret.png", "../train2017/../../secret.png",
     "a\0b.png", "/" * 5000, "../" * 2000 + "x.png", "/dev/zero", "../..", "/", "\ud800.png", "a\nb.png"],
    ids=ascii,
)  # fmt: skip
def test_names_lead_nowhere_outside_of_the_data(secret: Path, name: str):
    root = secret.parent / "data"
    changed(root, "images", "file_name", name.format(secret=secret))
    if "\n" in name or name == "\ud800.png":  # merely not there, as is told where it is loaded
        with pytest.raises(VisionattnError, match="cannot read"):
            load(root).load(0)
        return
    told_in_one_line(root, "image 0 has the file_name .*, which is there neither as it stands nor by its last part")


@pytest.mark.parametrize("relative", [False, True])
def test_names_that_come_back_into_the_data_are_read(secret: Path, monkeypatch: pytest.MonkeyPatch, relative: bool):
    root = secret.parent / "data"
    monkeypatch.chdir(secret.parent)
    for name in (f"{root}/train2017/a.png", "../train2017/a.png", f"{root}/x/../train2017/./a.png", "b/../a.png"):
        changed(root, "images", "file_name", name)
        images = load(Path("data") if relative else root)
        assert os.path.samefile(images.place(0), root / "train2017/a.png") and images.load(0)[0].size == (60, 40)


def test_a_file_of_the_same_name_outside_is_not_taken(secret: Path):
    root = secret.parent / "data"
    changed(root, "images", "file_name", str(secret))
    layouts.draw(root / "train2017/secret.png")
    assert load(root).place(0) == str(root / "train2017/secret.png")


def test_two_names_are_not_one_file(tmp_path: Path):
    changed(tmp_path, "images", "file_name", "/ann/1/b.png")
    content = json.loads((tmp_path / TRAIN).read_text())
    content["images"][1]["file_name"] = "/ann/2/b.png"
    layouts.draw(tmp_path / "train2017/b.png")
    (tmp_path / TRAIN).write_text(json.dumps(content))
    told_in_one_line(tmp_path, "both /ann/1/b.png and /ann/2/b.png seem to be .*b.png")


def test_links_of_the_user_lead_where_they_lead(tmp_path: Path):
    root, elsewhere = tmp_path / "data", tmp_path / "disk"
    root.mkdir()
    layouts.coco(root)
    (root / "train2017").rename(elsewhere)
    os.symlink(elsewhere, root / "train2017")
    assert load(root).load(0)[0].size == (60, 40)
    os.symlink(root, tmp_path / "link")
    assert load(tmp_path / "link").load(0)[0].size == (60, 40)


@pytest.mark.parametrize("name", ["../../secret", "{secret}", "/etc/passwd", "../../secret.png"])
def test_lists_of_voc_lead_nowhere_outside(secret: Path, name: str):
    root = secret.parent / "data"
    secret.with_suffix(".xml").write_text(layouts.xml("a.jpg", []))
    layouts.voc(root)
    (root / "ImageSets/Main/train.txt").write_text(name.format(secret=secret.with_suffix("")))
    told_in_one_line(root, "train.txt lists .*, which is there neither .*nothing outside of it is read")
    layouts.write(root / "SegmentationClass/a.png", "")
    layouts.write(root / "ImageSets/Segmentation/train.txt", name.format(secret=secret.with_suffix("")))
    with pytest.raises(VisionattnError, match="train.txt lists .*nothing outside of it is read"):
        load_segmentation(DataConfig(root=str(root)), AnnotationConfig())


def test_file_names_of_xml_lead_nowhere_outside(secret: Path):
    root = secret.parent / "data"
    layouts.write(root / "Annotations/z.xml", layouts.xml(str(secret), []))
    layouts.write(root / "images/x.txt", "")
    told_in_one_line(root, "z.xml is of the image .*secret.png, which is not in")


def test_lists_of_yolo_lead_nowhere_outside(secret: Path):
    root = secret.parent / "data"
    layouts.ultralytics_polygons(root)
    for name in (secret, "../secret.png"):
        (root / "val.txt").write_text(f"images/val/c.1.jpg\n{name}\n")
        told_in_one_line(root, "val.txt lists .*secret.png, .*nothing outside of it is read")


def bombs() -> dict[str, tuple[Any, str]]:
    random = np.random.default_rng(0).integers(0, 60, 2_000_000).tolist()
    return {
        "far": ([[0, 0, 1e9, 0, 1e9, 1e9]], "polygons of .* pixels around"),
        "beyond": ([[0, 0, 1e30, 0, 1e30, 1e30]], "polygon with 1e\\+30: expected finite numbers"),
        "zigzag": ([random], "polygons of .* pixels around"),
        "nan": ([[0, 0, float("nan"), 0, 5, 5]], "polygon with nan"),
        "inf": ([[0, 0, float("inf"), 0, 5, 5]], "polygon with inf"),
        "digits": ([[0, 0, HUGE, 0, 5, 5]], "polygon with"),
        "text": ([[0, 0, "5", 0, 5, 5]], "polygon with 5"),
        "null": ([[0, 0, None, 0, 5, 5]], "polygon with None"),
        "bool": ([[0, 0, True, 0, 5, 5]], "polygon with True"),
        "odd": ([[0, 0, 5, 0, 5]], "no segmentation"),
        "nothing": (None, "no segmentation"),
        "word": ("x", "no segmentation"),
        "size": ({"size": [10**9, 10**9], "counts": [10**18]}, "mask of the size"),
        "other size": ({"size": [400, 600], "counts": [240000]}, "mask of 600 x 400 for an image of 60 x 40"),
        "size of text": ({"size": "40 60", "counts": [2400]}, "mask of the size"),
        "one side": ({"size": [40], "counts": [2400]}, "mask of the size"),
        "number": ({"size": 40, "counts": [2400]}, "mask of the size"),
        "too few": ({"size": [40, 60], "counts": [5, 5]}, "runs do not fill its 60 x 40"),
        "too many": ({"size": [40, 60], "counts": [10**18]}, "counts|runs"),
        "negative": ({"size": [40, 60], "counts": [-5, 2405]}, "runs do not fill"),
        "fractions": ({"size": [40, 60], "counts": [1.5, 2398.5]}, "mask with the counts"),
        "no counts": ({"size": [40, 60], "counts": None}, "mask with the counts None"),
        "no code": ({"size": [40, 60], "counts": "\x7f\u20ac"}, "mask with the counts"),
        "cut code": ({"size": [40, 60], "counts": "ooooo"}, "mask with the counts"),
        "long code": ({"size": [40, 60], "counts": "o" * 20 + "0"}, "run of more than"),
        "wrong code": ({"size": [40, 60], "counts": "0123456789"}, "runs do not fill"),
    }  # fmt: skip


BOMBS = bombs()


@pytest.mark.parametrize("kind", BOMBS)
def test_masks_that_cannot_be_drawn_are_named(tmp_path: Path, kind: str):
    mask, told = BOMBS[kind]
    changed(tmp_path, "annotations", "segmentation", mask)
    told_in_one_line(tmp_path, f"instances_train2017.json: annotation 0 has .*({told})", masks=True)
    assert len(load(tmp_path)) == 2  # which boxes alone do not ask for


def test_a_size_that_is_claimed_costs_nothing(tmp_path: Path):
    """Masks are drawn in the size of the image, not in that of the file."""
    layouts.coco(tmp_path)
    content = json.loads((tmp_path / TRAIN).read_text())
    content["images"][0] |= {"height": 999_999, "width": 999_999}
    content["annotations"][0]["segmentation"] = {"size": [999_999, 999_999], "counts": [999_999**2]}
    (tmp_path / TRAIN).write_text(json.dumps(content))
    with pytest.raises(VisionattnError, match="the image is 60 x 40, but 999999 x 999999 according to"):
        load(tmp_path, masks=True).load(0)


def test_long_polygons_are_drawn(tmp_path: Path):
    angles = np.linspace(0, 2 * np.pi, 500_000)
    polygon = np.stack([30 + 20 * np.cos(angles), 20 + 15 * np.sin(angles)], 1).ravel().tolist()
    changed(tmp_path, "annotations", "segmentation", [polygon])
    assert abs(load(tmp_path, masks=True).load(0)[1].masks[0].sum() - np.pi * 20 * 15) < 50


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_run_lengths_are_read_as_by_the_reference(density: float):
    random = np.random.default_rng(7)
    for size in ((1, 1), (40, 60), (301, 257)):
        pixels = np.asfortranarray(random.random(size) < density, np.uint8)
        pixels[: size[0] // 2, : size[1] // 2] = pixels[0, 0]  # long runs too
        code = reference_rle.encode(pixels)
        mask = {"size": list(size), "counts": code["counts"].decode()}
        assert np.array_equal(decode(check_mask(mask, size, "x"), size), pixels)


def test_xml_that_is_wrong_is_named(tmp_path: Path):
    layouts.voc(tmp_path)
    good = layouts.xml("a.jpg", [("cat", (1, 1, 20, 20))])
    for wrong, told in (
        (good.replace("<xmin>2", "<xmin>nan"), "object 1 has no bndbox of four finite numbers"),
        (good.replace("<xmin>2", "<xmin>1e999"), "object 1 has no bndbox of four finite numbers"),
        (good.replace("<ymax>20</ymax>", ""), "object 1 has no bndbox of four finite numbers"),
        (good.replace("bndbox", "box"), "object 1 has no bndbox of four finite numbers"),
        (good.replace("<name>cat</name>", ""), "object 1 has no name"),
        (good.replace("<difficult>0", "<difficult>perhaps"), "object 1 has difficult perhaps"),
        (good.replace("<xmax>20", "<xmax>1"), "object 1 has the bbox"),
        (good[:-5], "cannot read .*a.xml"),
        ('<!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/passwd">]><annotation>&f;</annotation>', "cannot read .*a.xml"),
    ):
        (tmp_path / "Annotations/a.xml").write_text(wrong)
        if told.endswith("bbox"):
            wrong = wrong.replace("<xmax>1<", "<xmax>0<")
            (tmp_path / "Annotations/a.xml").write_text(wrong)
        told_in_one_line(tmp_path, f"a.xml.*{told}|{told}")


def test_entities_of_xml_do_not_multiply(tmp_path: Path):
    layouts.voc(tmp_path)
    entities = "".join(f'<!ENTITY e{i + 1} "{f"&e{i};" * 10}">' for i in range(10))
    bomb = f'<!DOCTYPE x [<!ENTITY e0 "ha">{entities}]><annotation>&e10;</annotation>'
    (tmp_path / "Annotations/a.xml").write_text(bomb)
    told_in_one_line(tmp_path, "cannot read .*a.xml: .*amplification")


@pytest.mark.parametrize("value", [0.5, float("nan"), -1.0, 3e9])
def test_maps_of_fractions_are_refused(tmp_path: Path, value: float):
    for split in ("train", "val"):
        layouts.draw(tmp_path / f"images/{split}/a.jpg")
        (tmp_path / f"masks/{split}").mkdir(parents=True)
        pixels = np.zeros((layouts.HEIGHT, layouts.WIDTH), np.float32)
        pixels[0, 0] = value
        Image.fromarray(pixels).save(tmp_path / f"masks/{split}/a.tif")
        (tmp_path / f"masks/{split}/a.tif").rename(tmp_path / f"masks/{split}/a.png")
    (tmp_path / "classes.txt").write_text("sky\ngrass\n")
    images, _ = load_segmentation(DataConfig(root=str(tmp_path)), AnnotationConfig())
    with pytest.raises(VisionattnError, match="a.png has (fractions for pixels|the value)"):
        images.load(0)


def labels_of(root: Path, *names: object) -> ImageSet:
    for name in ("a.png", "deep/b.png"):
        layouts.draw(root / name)
    rows = "".join(f"{name},cat;dog\n" for name in names)
    (root / "labels.csv").write_text(f"file,labels\n{rows}a,cat\ndeep/b.png,dog\n")
    return load_labelled(DataConfig(root=str(root), labels="labels.csv"))[0]


def test_tables_of_labels_lead_nowhere_outside(secret: Path):
    root = secret.parent / "data"
    for name in (secret, "../secret.png", "..\\secret.png", "/etc/passwd"):
        with pytest.raises(VisionattnError, match="row 2: .* is outside of"):
            labels_of(root, name)
    for name in ("C:\\ann\\deep\\b.png", "/ann/a.png", "https://x.org/a.png"):
        paths = labels_of(root, name).source.images.paths
        assert sorted(paths) == [str(root / "a.png"), str(root / "deep/b.png")]
    with pytest.raises(VisionattnError, match="both /ann/1/a.png and /ann/2/a.png seem to be .*a.png"):
        labels_of(root, "/ann/1/a.png", "/ann/2/a.png")
