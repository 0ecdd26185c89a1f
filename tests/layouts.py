"""The same few images and objects, laid out as people's tools write them.

Each function fills a folder; `SPLIT` are those with splits, `WHOLE` those without.
"""

import json
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT = 60, 40
CLASSES = ["cat", "dog"]
SPLITS = {
    "train": {"a": [("cat", (10, 8, 30, 28)), ("dog", (36, 4, 56, 38))], "b b": [("dog", (2, 2, 22, 34))], "empty": []},
    "val": {"c.1": [("cat", (12, 10, 42, 30))], "nothing": []},
}
"""Objects of each image of each split: class and corners."""

ALL = {name: objects for images in SPLITS.values() for name, objects in images.items()}
LEFTOVERS = (
    ".DS_Store", "._a.png", "._train.txt", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints/a-checkpoint.png",
    ".ipynb_checkpoints/a-checkpoint.xml", "@eaDir/a.png/SYNOFILE_THUMB_M.png", "__MACOSX/a.png",
    "__MACOSX/._a.jpg", "._a.xml", "._data.yaml", "._instances_train.json", ".hidden/b.png", ".hidden/b.txt",
)  # fmt: skip


def litter(root: Path) -> None:
    """What systems leave: next to every file of a folder, and in its folders."""
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        for name in LEFTOVERS:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"\0\5\26\7")


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (90, 60, 30)).save(path)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def outline(corners: tuple) -> list[int]:
    x1, y1, x2, y2 = corners
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def coco_file(
    path: Path, images: dict, file_name="{}.png", first: int = 1, above: str | None = None, **changes
) -> dict:
    """A COCO file, with a super-category of all classes if it is named."""
    categories = [{"id": first + i, "name": n, "supercategory": above or "none"} for i, n in enumerate(CLASSES)]
    if above is not None:
        categories.insert(0, {"id": 0, "name": above, "supercategory": "none"})
    content: dict = {"info": {}, "licenses": [], "images": [], "categories": categories, "annotations": []}
    for number, (name, objects) in enumerate(images.items()):
        entry = {"id": number, "file_name": file_name.format(name), "height": HEIGHT, "width": WIDTH}
        content["images"].append(entry | changes.get("image", {}))
        for label, corners in objects:
            x1, y1, x2, y2 = corners
            content["annotations"].append(
                {
                    "id": len(content["annotations"]),
                    "image_id": number,
                    "category_id": first + CLASSES.index(label),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "segmentation": [outline(corners)],
                    "iscrowd": 0,
                }
                | changes.get("annotation", {})
            )
    write(path, json.dumps(content))
    return content


def coco(root: Path) -> None:
    for split, images in SPLITS.items():
        coco_file(root / f"annotations/instances_{split}2017.json", images)
        for name in images:
            draw(root / f"{split}2017/{name}.png")


def roboflow_coco(root: Path) -> None:
    for split, images in (("train", SPLITS["train"]), ("valid", SPLITS["val"]), ("test", {})):
        coco_file(root / split / "_annotations.coco.json", images, "{}_png.rf.0f1e.png", above="animals")
        for name in images:
            draw(root / split / f"{name}_png.rf.0f1e.png")


def cvat_coco(root: Path) -> None:
    coco_file(root / "annotations/instances_default.json", ALL)
    for name in ALL:
        draw(root / f"images/default/{name}.png")


def cvat_coco_subsets(root: Path) -> None:
    for split, images in (("Train", SPLITS["train"]), ("Validation", SPLITS["val"])):
        coco_file(root / f"annotations/instances_{split}.json", images)
        for name in images:
            draw(root / f"images/{split}/{name}.png")


def label_studio_coco(root: Path) -> None:
    coco_file(root / "result.json", ALL, "images\\{}.png", first=0)
    for name in ALL:
        draw(root / f"images/{name}.png")


def label_studio_coco_of_uploads(root: Path) -> None:
    coco_file(root / "result.json", ALL, "../../label-studio/data/media/upload/1/{}.png", first=0)
    for name in ALL:
        draw(root / f"images/{name}.png")


def coco_of_another_machine(root: Path) -> None:
    for split, images in SPLITS.items():
        name = "C:\\Users\\ann\\data\\{}.png" if split == "train" else "D:/ann/data/{}.png"
        coco_file(root / f"annotations/{split}.json", images, name, image={"height": None, "width": None})
        for name in images:
            draw(root / f"images/{split}/{name}.png")


def fiftyone_coco(root: Path) -> None:
    coco_file(root / "labels.json", ALL)
    for name in ALL:
        draw(root / f"data/{name}.png")


def xml(name: str, objects: list, size: str = "", path: str = "", extra: str = "<difficult>0</difficult>") -> str:
    size = size or f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    items = "".join(
        f"<object><name>{label}</name><pose>Unspecified</pose><truncated>0</truncated>{extra}<bndbox>"
        f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for label, (x1, y1, x2, y2) in objects
    )
    path = f"<path>{path}</path>" if path else ""
    return f"<annotation><folder>x</folder><filename>{name}</filename>{path}{size}{items}</annotation>"


def voc(root: Path, marks: str = "") -> None:
    for split, images in SPLITS.items():
        write(root / f"ImageSets/Main/{split}.txt", "".join(f"{name}{marks}\n" for name in images))
        for name, objects in images.items():
            write(root / f"Annotations/{name}.xml", xml(f"{name}.jpg", objects))
            draw(root / f"JPEGImages/{name}.jpg")


def voc_lists_with_marks(root: Path) -> None:
    voc(root, marks="  1")
    listed = root / "ImageSets/Main/train.txt"
    listed.write_text(listed.read_text().replace("b b  1", "b b -1"))


def voc_by_labelimg(root: Path) -> None:
    """Images of any kind, a size of 0 x 0 or none, and difficult left unspecified."""
    for split, images in SPLITS.items():
        write(root / f"ImageSets/Main/{split}.txt", "\n".join(images))
        for name, objects in images.items():
            size = "<size><width>0</width><height>0</height><depth>3</depth></size>" if split == "train" else " "
            told = xml(f"{name}.png", objects, size, f"C:\\data\\{name}.png", "<difficult>Unspecified</difficult>")
            write(root / f"Annotations/{name}.xml", told)
            draw(root / f"JPEGImages/{name}.png")


def labelimg_beside(root: Path) -> None:
    """XML files beside the images."""
    for name, objects in ALL.items():
        write(root / f"{name}.xml", xml(f"{name}.png", objects, path=f"/home/ann/{name}.png"))
        draw(root / f"{name}.png")


def labelimg_without_lists(root: Path) -> None:
    for name, objects in ALL.items():
        write(root / f"Annotations/{name}.xml", xml(f"{name}.png", objects))
        draw(root / f"JPEGImages/{name}.png")


def roboflow_voc(root: Path) -> None:
    for split, images in (("train", SPLITS["train"]), ("valid", SPLITS["val"])):
        for name, objects in images.items():
            write(root / f"{split}/{name}.xml", xml(f"{name}.jpg", objects))
            draw(root / f"{split}/{name}.jpg")


def cvat_voc(root: Path) -> None:
    write(
        root / "labelmap.txt", "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:250,50,83::\ndog:5,50,83::\n"
    )
    write(root / "ImageSets/Main/default.txt", "".join(f"{name}\n" for name in ALL))
    for label in CLASSES:
        write(root / f"ImageSets/Main/{label}_default.txt", "".join(f"{name} -1\n" for name in ALL))
    for name, objects in ALL.items():
        write(root / f"Annotations/{name}.xml", xml(f"{name}.png", objects))
        draw(root / f"JPEGImages/{name}.png")


def label_studio_voc(root: Path) -> None:
    for name, objects in ALL.items():
        write(root / f"Annotations/{name}.xml", xml(name, objects))
        draw(root / f"images/{name}.png")


def yolo_lines(objects: list, polygons: bool = False) -> str:
    lines = []
    for label, (x1, y1, x2, y2) in objects:
        values = [(x1 + x2) / 2 / WIDTH, (y1 + y2) / 2 / HEIGHT, (x2 - x1) / WIDTH, (y2 - y1) / HEIGHT]
        if polygons:
            values = [value / (WIDTH, HEIGHT)[i % 2] for i, value in enumerate(outline((x1, y1, x2, y2)))]
        lines.append(f"{CLASSES.index(label)} {' '.join(map(str, values))}\n")
    return "".join(lines)


def yolo_files(root: Path, images: dict, pictures: str, labels: str, polygons: bool = False) -> None:
    for name, objects in images.items():
        draw(root / pictures / f"{name}.jpg")
        if name != "nothing":  # no file is as good as an empty one
            write(root / labels / f"{name}.txt", yolo_lines(objects, polygons))


def ultralytics(root: Path) -> None:
    write(
        root / "data.yaml", "path: ../datasets/pets\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n"
    )
    for split, images in SPLITS.items():
        yolo_files(root, images, f"images/{split}", f"labels/{split}")


def ultralytics_polygons(root: Path) -> None:
    """Lists of folders and of files, and polygons."""
    write(root / "pets.yaml", "train: [part1/images, part2/images]\nval: val.txt\nnc: 2\nnames: ['cat', 'dog']\n")
    write(root / "val.txt", "./images/val/c.1.jpg\n/home/ann/pets/images/val/nothing.jpg\n")
    yolo_files(root, {"a": SPLITS["train"]["a"]}, "part1/images", "part1/labels", True)
    rest = {name: objects for name, objects in SPLITS["train"].items() if name != "a"}
    yolo_files(root, rest, "part2/images", "part2/labels", True)
    yolo_files(root, SPLITS["val"], "images/val", "labels/val", True)


def roboflow_yolo(root: Path) -> None:
    write(
        root / "data.yaml",
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['cat', 'dog']\n",
    )
    for split, images in (("train", SPLITS["train"]), ("valid", SPLITS["val"])):
        yolo_files(root, images, f"{split}/images", f"{split}/labels")


def yolo_by_folders(root: Path) -> None:
    write(root / "classes.txt", "cat\ndog\n\n")
    for split, images in SPLITS.items():
        yolo_files(root, images, f"images/{split}", f"labels/{split}")


def label_studio_yolo(root: Path) -> None:
    write(root / "classes.txt", "cat\ndog\n")
    write(root / "notes.json", '{"categories": []}')
    yolo_files(root, ALL, "images", "labels")


def labelimg_yolo(root: Path) -> None:
    write(root / "classes.txt", "cat\ndog\n")
    yolo_files(root, ALL, ".", ".")


def cvat_yolo(root: Path) -> None:
    write(root / "obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    write(root / "obj.names", "cat\ndog\n")
    write(root / "train.txt", "".join(f"data/obj_train_data/{name}.jpg\n" for name in ALL))
    yolo_files(root, ALL, "obj_train_data", "obj_train_data")


def cvat_ultralytics(root: Path) -> None:
    write(root / "data.yaml", "names:\n  0: cat\n  1: dog\npath: .\ntrain: train.txt\nval: val.txt\n")
    for split, images in SPLITS.items():
        write(root / f"{split}.txt", "".join(f"data/images/{split}/{name}.jpg\n" for name in images))
        yolo_files(root, images, f"images/{split}", f"labels/{split}")


def cvat_images(root: Path, subsets: bool = False) -> None:
    labels = "".join(f"<label><name>{name}</name><attributes></attributes></label>" for name in CLASSES)
    images = ""
    for split, names in SPLITS.items():
        subset = f' subset="{split.capitalize()}"' if subsets else ""
        for number, (name, objects) in enumerate(names.items()):
            shapes = "".join(
                f'<box label="{label}" occluded="0" xtl="{x1}.00" ytl="{y1}.00" xbr="{x2}.00" ybr="{y2}.00"></box>'
                if number % 2
                else f'<polygon label="{label}" points="{x1}.0,{y1};{x2},{y1};{x2},{y2}.0;{x1},{y2}"></polygon>'
                for label, (x1, y1, x2, y2) in objects
            )
            size = f'width="{WIDTH}" height="{HEIGHT}"'
            images += f'<image id="{number}" name="{name}.png"{subset} {size}><tag label="cat"></tag>{shapes}</image>'
            draw(root / "images" / (split.capitalize() if subsets else "") / f"{name}.png")
    meta = f"<meta><task><labels>{labels}</labels></task></meta>"
    write(root / "annotations.xml", f"<annotations><version>1.1</version>{meta}{images}</annotations>")


def cvat_images_of_subsets(root: Path) -> None:
    cvat_images(root, subsets=True)


SPLIT = [
    coco, roboflow_coco, cvat_coco_subsets, coco_of_another_machine, voc, voc_lists_with_marks, voc_by_labelimg,
    roboflow_voc, cvat_images_of_subsets, ultralytics, ultralytics_polygons, roboflow_yolo, yolo_by_folders,
    cvat_ultralytics,
]  # fmt: skip
WHOLE = [
    cvat_coco, label_studio_coco, label_studio_coco_of_uploads, fiftyone_coco, labelimg_beside, labelimg_without_lists,
    cvat_voc, cvat_images, label_studio_voc, label_studio_yolo, labelimg_yolo, cvat_yolo,
]  # fmt: skip
WITH_MASKS = [coco, roboflow_coco, cvat_coco, ultralytics_polygons]
