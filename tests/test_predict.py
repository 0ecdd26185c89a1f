"""`visionattn predict`: which images it finds, what it prints of them, and how it ends."""

import csv
import io
import json
import os
import subprocess
import sys
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

import visionattn
from visionattn.cli import main
from visionattn.data.boxes import load_detection_validation
from visionattn.data.config import AnnotationConfig, DataConfig
from visionattn.training import inputs
from visionattn.training.checkpoint import save_checkpoint
from visionattn.training.opened import names_of_classes

CLASSES = ["cat", "dog", "yak"]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints as train.py writes them, of random weights."""
    torch.manual_seed(0)
    folder, known = tmp_path_factory.mktemp("models"), {"model": "test_dinat", "classes": CLASSES, "data": {}}
    made = {
        "classifier": visionattn.create_model("test_dinat", num_classes=3),
        "detector": visionattn.create_detector("test_dinat", "mask_rcnn", 3, fpn_channels=32),
        "segmenter": visionattn.create_segmenter("test_dinat", "fpn", 3),
    }
    entries: dict[str, dict] = {
        "classifier": {"model_kwargs": {"num_classes": 3}},
        "detector": {"task": "detection", "head": "mask_rcnn", "head_kwargs": {"fpn_channels": 32}, "model_kwargs": {}},
        "segmenter": {"task": "segmentation", "head": "fpn", "head_kwargs": {}, "model_kwargs": {}},
    }
    for name, model in made.items():
        save_checkpoint(folder / f"{name}.safetensors", model.state_dict(), known | entries[name])
    return {name: str(folder / f"{name}.safetensors") for name in made}


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Photographs in a folder and one below, by name, in order."""
    monkeypatch.chdir(tmp_path)
    names = [f"photos/{name}" for name in ("a.png", "b.jpg", "deep/a.png", "deep/c.webp")]
    for number, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40 + number, 50, 3), np.uint8)
        Image.fromarray(pixels).save(name)
    Path("photos/notes.txt").write_text("no image")
    Path("photos/.hidden.png").write_bytes(b"")
    return names


def told(capsys: pytest.CaptureFixture, *argv: str, code: int = 0) -> str:
    assert main(["predict", *argv]) == code
    return capsys.readouterr().out


def named(out: str) -> list[str]:
    return [line.partition(": ")[0] for line in out.splitlines()]


def test_images_are_found_and_told_in_order(models, photos, capsys, monkeypatch):
    with_model = ["--checkpoint", models["classifier"]]
    for names, expected in {
        ("photos",): photos,
        ("photos/**/*.png",): [photos[0], photos[2]],
        ("photos/*",): photos[:2],
        ("photos/deep", "photos/b.jpg"): [photos[2], photos[3], photos[1]],
    }.items():
        assert named(told(capsys, *names, *with_model)) == expected
    monkeypatch.setattr("visionattn.training.predict.BATCH", 3)  # batches change nothing
    at_once = json.loads(told(capsys, "photos", *with_model, "--format", "json"))
    for name, found in zip(photos, at_once, strict=True):
        (alone,) = json.loads(told(capsys, name, *with_model, "--format", "json"))
        assert alone["image"] == found["image"] == name
        assert [each["class"] for each in alone["found"]] == [each["class"] for each in found["found"]]
        one, other = ([each["probability"] for each in entry["found"]] for entry in (alone, found))
        assert one == pytest.approx(other, abs=1e-5)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(photos[1]).read_bytes())))
    assert named(told(capsys, "-", *with_model)) == ["-"]


def test_forms(models, photos, capsys):
    options = ["photos", "--checkpoint", models["classifier"]]
    text = told(capsys, *options, "--top_k", "1").splitlines()
    assert all(line.count("%") == 1 for line in text)
    rows = list(csv.DictReader(io.StringIO(told(capsys, *options, "--format", "csv"))))
    assert [row["image"] for row in rows] == [name for name in photos for _ in CLASSES]
    found = json.loads(told(capsys, *options, "--format", "json", "--json", "kept.json", "--quiet"))
    assert json.loads(Path("kept.json").read_text()) == found
    for entry in found:
        shares = [each["probability"] for each in entry["found"]]
        assert sum(shares) == pytest.approx(1, abs=1e-5) and shares == sorted(shares, reverse=True)
        assert all(CLASSES[each["index"]] == each["class"] for each in entry["found"])
    table = told(capsys, *options, "--format", "table").splitlines()
    assert table[0].split() == ["image", "class", "probability"] and len(table) == 1 + len(rows)
    kept = Path("kept.json").read_bytes()
    assert main(["predict", *options, "--json", "kept.json"]) == 2 and Path("kept.json").read_bytes() == kept
    assert main(["predict", *options, "--json", "kept.json", "--overwrite"]) == 0


def test_an_unreadable_image_does_not_end_the_others(models, photos, capsys):
    Path(photos[1]).write_bytes(Path(photos[1]).read_bytes()[:500])
    Path(photos[2]).write_bytes(b"no image")
    options = ["--checkpoint", models["classifier"]]
    assert main(["predict", "photos", *options, "--format", "json"]) == 1
    out, err = capsys.readouterr()
    assert [entry["image"] for entry in json.loads(out)] == [photos[0], photos[3]]
    assert [line.split()[3] for line in err.splitlines()] == [f"{photos[1]}:", f"{photos[2]}:"]
    assert main(["predict", photos[1], *options]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and photos[1] in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.png"], "cannot read nowhere.png: there is no such file"),
        (["none"], "cannot read none: it holds no images: expected files as"),
        (["photos/*.bmp"], "cannot read photos/*.bmp: no image matches it"),
        (["-", "-"], "give - once"),
        (["photos", "--json", "no/where.json"], "there is no folder no"),
        (["photos", "--pretrained"], "--pretrained is for --model"),
        (["photos", "--model", "van_b0"], "says itself which model it is"),
        (["photos", "--top_k", "0"], "from 1 up"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(models, photos, capsys, argv, message):
    Path("none").mkdir()
    assert main(["predict", *argv, "--checkpoint", models["classifier"]]) == 2
    out, err = capsys.readouterr()
    assert message in err and len(err.splitlines()) == 1 and not out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give a checkpoint, or --model NAME --pretrained"),
        (["--model", "test_van"], "random weights"),
        (["--model", "test_van", "--pretrained"], "no weights were released"),
        (["--model", "no_such_model", "--pretrained"], "no_such_model"),
    ],
)
def test_a_model_needs_weights(photos, capsys, argv, message):
    assert main(["predict", "photos", *argv]) == 2
    out, err = capsys.readouterr()
    assert message in err and len(err.splitlines()) == 1 and not out


def test_classifiers_by_name_have_the_names_of_imagenet(photos, tmp_path, capsys):
    model = visionattn.create_model("test_van").eval()
    torch.save(model.state_dict(), "test_van.pth")
    (entry,) = json.loads(
        told(capsys, photos[0], "--model", "test_van", "--checkpoint", "test_van.pth", "--format", "json")
    )
    image = visionattn.data.create_transform(model)(Image.open(photos[0]).convert("RGB"))
    with torch.no_grad():
        shares, numbers = model(image[None]).softmax(1)[0].topk(5)
    assert [each["index"] for each in entry["found"]] == numbers.tolist()
    assert [each["probability"] for each in entry["found"]] == pytest.approx(shares.tolist(), rel=1e-4)
    assert names_of_classes(model)[0] == "tench, Tinca tinca"
    assert entry["found"][0]["class"] == names_of_classes(model)[numbers[0]]
    assert main(["convert", "test_van.pth", "ours.safetensors", "--model", "test_van"]) == 0
    capsys.readouterr()
    for options in (["--checkpoint", "ours.safetensors"], ["--model", "ours.safetensors"]):
        assert json.loads(told(capsys, photos[0], *options, "--format", "json")) == [entry]
    assert names_of_classes(visionattn.create_model("test_van", num_classes=7)) == list("0123456")


def test_objects_are_told_as_coco_has_them(models, photos, capsys):
    options = ["photos", "--checkpoint", models["detector"], "--threshold", "0.1", "--format", "json"]
    content = json.loads(told(capsys, *options))
    assert [each["file_name"] for each in content["images"]] == photos and content["annotations"]
    assert [(each["id"], each["name"]) for each in content["categories"]] == [(1, "cat"), (2, "dog"), (3, "yak")]
    for each in content["annotations"]:
        image = content["images"][each["image_id"]]
        assert each["segmentation"]["size"] == [image["height"], image["width"]] and 0.1 <= each["score"] <= 1
        assert rle.area(each["segmentation"]) == each["area"]
    assert sorted(path.name for path in Path("predictions").rglob("*.png")) == ["a.png", "a.png", "b.png", "c.png"]
    Path("annotations").mkdir()  # it can be learnt from again
    Path("annotations/instances_val.json").write_text(json.dumps(content))
    again = load_detection_validation(DataConfig(name="folder", root="."), AnnotationConfig(), True, None)
    assert len(again) == len(photos)
    assert sum(len(again.load(i)[1].boxes) for i in range(len(again))) == len(content["annotations"])
    rows = csv.DictReader(io.StringIO(told(capsys, *options[:-1], "csv", "--overwrite")))
    assert len(list(rows)) == len(content["annotations"])
    assert set(rows.fieldnames) == {"image", "class", "score", "x", "y", "width", "height"}


def test_names_of_nothing_are_told_and_the_others_go_on(models, photos, capsys):
    Path("none").mkdir()
    Path("link.png").symlink_to("nowhere")
    names = [photos[0], "none", "link.png", "*.bmp", photos[1]]
    assert main(["predict", *names, "--checkpoint", models["classifier"]]) == 1
    out, err = capsys.readouterr()
    assert named(out) == photos[:2] and [line.split()[3] for line in err.splitlines()] == [
        "none:",
        "link.png:",
        "*.bmp:",
    ]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["detector", "segmenter", "classifier"])
def test_a_table_has_its_heads_whatever_is_found(models, photos, capsys, kind):
    Image.new("RGB", (1, 1)).save("one.png")
    options = ["--threshold", "1"] if kind == "detector" else []
    out = told(capsys, "one.png", "--checkpoint", models[kind], "--format", "csv", *options)
    assert out.startswith("image,class,") and (kind != "detector" or len(out.splitlines()) == 1)


def test_maps_are_told_as_coco_has_them(models, photos, capsys):
    content = json.loads(told(capsys, "photos", "--checkpoint", models["segmenter"], "--format", "json"))
    for image in content["images"]:
        parts = [each for each in content["annotations"] if each["image_id"] == image["id"]]
        assert sum(each["share"] for each in parts) == pytest.approx(1)
        covered = sum(rle.decode(each["segmentation"]).astype(int) for each in parts)
        assert covered.shape == (image["height"], image["width"]) and (covered == 1).all()


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/slow.png":
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):  # of whoever has had enough
                for _ in range(20):
                    self.wfile.write(b"x" * 2**18)
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(photos):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_addresses(models, photos, server, capsys, monkeypatch):
    options = ["--checkpoint", models["classifier"]]
    address = f"{server}/{photos[0]}"
    (here,) = told(capsys, photos[0], *options).splitlines()
    (there,) = told(capsys, address, *options).splitlines()
    assert there == here.replace(photos[0], address)
    told(capsys, address, photos[1], "--checkpoint", models["segmenter"], "--output", "drawn")
    assert {path.name for path in Path("drawn").iterdir()} == {"a.png", "b.png"}
    monkeypatch.setattr(inputs, "MOST_BYTES", 2**20)
    for wrong, message in {
        f"{server}/none.png": "404",
        f"{server}/photos/notes.txt": "it is no image",
        f"{server}/slow.png": "larger than 1 MiB",
        "http://127.0.0.1:1/a.png": "refused",
    }.items():
        assert main(["predict", wrong, *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line and wrong in line
    assert main(["predict", f"{server}/none.png", address, *options]) == 1
    assert named(capsys.readouterr().out) == [address]
    monkeypatch.setattr(inputs, "MOST_BYTES", 2**27)
    monkeypatch.setattr(inputs, "MOST_SECONDS", 0.0)
    assert main(["predict", address, *options]) == 2 and "within 0 s" in capsys.readouterr().err


LEAN = """
import sys
from importlib.machinery import PathFinder
hidden, find = set(sys.argv.pop(1).split(",")), PathFinder.find_spec
PathFinder.find_spec = lambda name, *a: None if str(name).partition(".")[0] in hidden else find(name, *a)
from visionattn.cli import main
sys.exit(main())
"""
LACKING = "accelerate,docstring_parser,typeshed_client,matplotlib,sklearn,tensorboard,albumentations,cv2,torchmetrics"


def test_a_base_install_predicts_classes_and_the_bar_keeps_results_apart(models, photos):
    """The bar goes to a terminal, and what is printed meanwhile to where stdout leads."""
    terminal, end = os.openpty()
    argv = [sys.executable, "-c", LEAN, LACKING, "predict", "photos", "--checkpoint", models["classifier"]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=end, text=True, env=environment, timeout=300)
    os.close(end)
    bar = os.read(terminal, 2**16).decode()
    assert done.returncode == 0, bar
    assert named(done.stdout) == photos and "predicting" in bar and "cat" not in bar
