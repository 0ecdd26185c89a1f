"""Validation: calibration and per-class accuracy, class maps, test-time augmentation, many models, results files."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.transforms.functional import five_crop, resize

import visionattn
from visionattn.data.class_maps import match_classes
from visionattn.data.config import DataConfig
from visionattn.data.images import ImageSet
from visionattn.errors import VisionattnError
from visionattn.tasks.classification import ClassificationMetrics
from visionattn.tasks.config import TtaConfig
from visionattn.tasks.views import Predictor, Views
from visionattn.training.checkpoint import save_checkpoint
from visionattn.training.config import parse_validate
from visionattn.training.evaluation import ResultFile, options_of, validate, validate_all

ROOT = Path(__file__).parents[1]
SYNSETS = ImageNetInfo().label_names()


def run_validation(*options: object) -> None:
    argv = [*map(str, options), "--data.num_workers", "0"]
    validate_all(parse_validate(argv, lambda checkpoint: {}), argv)


def save_model(path: Path, name: str = "test_dinat", **description) -> torch.nn.Module:
    """A model whose random head tells images apart, and its checkpoint as train.py would leave it."""
    model = visionattn.create_model(name, num_classes=10).eval()
    torch.nn.init.normal_(model.head.weight, std=3.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"img_size": [32, 32], "val_fraction": 0.0525, "crop_pct": 1.0}
    classes = [str(label) for label in range(10)]
    known = {"model": name, "model_kwargs": {"num_classes": 10}, "classes": classes, "data": data}
    save_checkpoint(path, model.state_dict(), known | description)
    return model


def make_images(root: Path, names: list[str], count: int = 3) -> Path:
    """Folder of classes that hold noise."""
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


def logits_of(*probabilities: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_calibration_and_classes_by_hand():
    metrics = ClassificationMetrics(3)
    logits = logits_of((0.9, 0.05, 0.05), (0.92, 0.04, 0.04), (0.2, 0.5, 0.3), (0.1, 0.1, 0.8))
    metrics.update(logits[:3], torch.tensor([0, 1, 1]))
    metrics.update(logits[3:], torch.tensor([1]))
    # Of 15 bins, 0.9 and 0.92 share one (1 of 2 is right), 0.5 is right alone, 0.8 wrong alone.
    expected = abs(1 - 1.82) + abs(1 - 0.5) + abs(0 - 0.8)
    assert metrics.calibration_error() == pytest.approx(100 * expected / 4, rel=1e-5)
    expected = [(1, 100.0), (3, pytest.approx(100 / 3)), (0, None)]
    assert [tuple(figures.values()) for figures in metrics.per_class()] == expected
    computed = metrics.compute()
    assert (computed["top1"], computed["top5"]) == (50, 100)
    assert computed["loss"] == pytest.approx(-(math.log(0.9 * 0.04) + math.log(0.5 * 0.1)) / 4, rel=1e-5)


@pytest.mark.parametrize("value", [1000.0, math.inf])
def test_views_of_a_certain_model_are_averaged(value: float):
    logits = torch.full((2, 3), -value)
    logits[:, 1] = value
    model = torch.nn.Module()
    model.forward = lambda images: logits[: len(images)].half()
    found = Predictor(model, [0, 1, 2], flip=True)(torch.zeros(2, 2, 3, 4, 4))
    assert not found.isnan().any() and found.softmax(1)[:, 1].tolist() == [1, 1]


def test_results_are_json_whatever_the_figures(tmp_path: Path):
    ResultFile(tmp_path / "r.json").add({"model": "m", "loss": math.inf, "ece": math.nan, "top1": 1.5})
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"model": "m", "loss": None, "ece": None, "top1": 1.5}


def test_a_bin_holds_its_upper_bound():
    metrics = ClassificationMetrics(2)
    metrics.update(logits_of((1.0, 0.0), (0.95, 0.05)), torch.tensor([0, 1]))
    assert metrics.calibration_error() == pytest.approx(100 * abs(1 - 1.95) / 2, rel=1e-5)


def test_sums_of_processes_are_those_of_one():
    logits, targets = torch.randn(50, 7), torch.randint(7, (50,))
    whole, *parts = (ClassificationMetrics(7) for _ in range(3))
    whole.update(logits, targets)
    for part, rows in zip(parts, (slice(0, None, 2), slice(1, None, 2)), strict=True):
        part.update(logits[rows], targets[rows])
    parts[0].share(lambda mine: [*mine, parts[1].sums])
    assert parts[0].compute() == pytest.approx(whole.compute())
    assert parts[0].calibration_error() == pytest.approx(whole.calibration_error())
    assert parts[0].per_class() == whole.per_class()


def outputs_for(found: list[str], classes: list[str] | None, num_classes: int) -> list[int]:
    return match_classes(ImageSet([], [], found, "images"), classes, num_classes, "model")


def test_imagenet_and_its_variants_are_matched():
    subset = [SYNSETS[index] for index in (6, 13, 999)]  # as ImageNet-A and -R
    assert outputs_for(SYNSETS, None, 1000) == list(range(1000))
    assert outputs_for(subset, None, 1000) == outputs_for(subset, SYNSETS, 1000) == [6, 13, 999]
    by_index = sorted(map(str, range(1000)))  # as ImageNet-V2, in any order
    assert outputs_for(by_index, None, 1000) == outputs_for(by_index, SYNSETS, 1000) == [int(name) for name in by_index]
    assert outputs_for(by_index, by_index, 1000) == list(range(1000))


def test_a_part_of_ones_own_classes_can_be_mistaken_for_the_others():
    assert outputs_for(["dog"], ["ant", "cat", "dog"], 3) == [2, 0, 1]
    assert outputs_for(["x", "y"], None, 2) == [0, 1]


@pytest.mark.parametrize(
    ("found", "classes", "num_classes", "told"),
    [
        (["cat", "emu"], ["cat", "dog"], 2, "not trained on: emu"),
        (["0", "1"], None, 1000, "model tells 1000 classes apart, images has 2"),
        ([*SYNSETS[:3], "cat"], None, 1000, "images has 4"),
        (SYNSETS[:2], ["cat", "dog"], 2, "not trained on: n01440764, n01443537"),
    ],
)
def test_other_classes_are_refused(found: list[str], classes: list[str] | None, num_classes: int, told: str):
    with pytest.raises(VisionattnError, match=told):
        outputs_for(found, classes, num_classes)


def test_synsets_are_judged_among_themselves(tmp_path: Path, capsys):
    chosen = [13, 99, 777]
    images = make_images(tmp_path / "imagenet-r", [SYNSETS[index] for index in chosen])
    model = visionattn.create_model("test_dinat").eval()
    torch.nn.init.normal_(model.head.weight, std=3.0)
    save_checkpoint(tmp_path / "w.safetensors", model.state_dict(), {})
    output = tmp_path / "r.json"
    options = ["--model", "test_dinat", "--checkpoint", tmp_path / "w.safetensors", "--output", output]
    run_validation(*options, "--data.root", images, "--data.img_size", 32, "--data.crop_pct", 1)
    transform = Views(
        parse_data(crop_pct=1.0, **{key: model.pretrained_cfg[key] for key in ("mean", "std", "interpolation")}),
        TtaConfig(),
    )
    expected = ClassificationMetrics(3)
    for label, index in enumerate(chosen):
        for file in sorted((images / SYNSETS[index]).iterdir()):
            with torch.no_grad(), Image.open(file) as image:
                expected.update(model(transform(image))[:, chosen], torch.tensor([label]))
    written = json.loads(output.read_text())
    assert (written["images"], written["classes"]) == (9, 3)
    assert {key: written[key] for key in expected.compute()} == pytest.approx(expected.compute(), rel=1e-5)
    assert list(written["per_class"].values()) == expected.per_class()
    assert "classes    3 of the model's 1000" in capsys.readouterr().out


def parse_data(**options) -> DataConfig:
    ready = {"img_size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "crop_mode": "center"}
    return DataConfig(**ready | options)


def test_views_are_averaged_as_by_hand():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 60, 3), dtype=np.uint8))
    model = visionattn.create_model("test_dinat", num_classes=10).eval()
    torch.nn.init.normal_(model.head.weight, std=3.0)
    views = Views(parse_data(crop_pct=0.8), TtaConfig("five", True, (1.0, 1.25)))(image)[None]
    probabilities = []
    for size in (40, 50):  # 32 / 0.8, and 1.25 times that
        for crop in five_crop(resize(image, size, interpolation=2), 32):
            x = torch.from_numpy(np.asarray(crop) / 127.5 - 1).permute(2, 0, 1)[None].float()
            with torch.no_grad():
                probabilities += [model(x).softmax(1), model(x.flip(-1)).softmax(1)]
    assert len(probabilities) == 20
    outputs = [3, 1, 2]
    with torch.no_grad():
        averaged = Predictor(model, list(range(10)), flip=True)(views).exp()
        restricted = Predictor(model, outputs)(views[:, :1])
        torch.testing.assert_close(averaged, torch.cat(probabilities).mean(0, keepdim=True), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(restricted, model(views[:, 0])[:, outputs])


@pytest.mark.parametrize("data", [{"crop_pct": 0.9, "crop_mode": "border"}, {"crop_pct": 1.1}])
def test_corners_of_an_image_within_the_crop_are_refused(data: dict):
    with pytest.raises(VisionattnError, match="tta.crops five"):
        Views(parse_data(**data), TtaConfig("five"))


def test_many_checkpoints_one_broken(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, precision in (("a", "no"), ("c", "bf16")):
        save_model(Path("runs", name, "best.safetensors"), precision=precision)
    Path("runs/b").mkdir()
    Path("runs/b/best.safetensors").write_bytes(b"broken")
    options = ["--checkpoint", "runs/*/best.safetensors", "--output"]
    for _ in range(2):
        with pytest.raises(VisionattnError, match="1 of 3 models failed"):
            run_validation(*options, "r.csv")
    assert capsys.readouterr().err.count("error: runs/b/best.safetensors: ") == 2
    with open("r.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["weights"] for row in rows] == [f"runs/{name}/best.safetensors" for name in "acac"]
    assert [row["precision"] for row in rows[:2]] == ["no", "bf16"]
    assert float(rows[0]["images_per_second"]) > 0 and float(rows[0]["peak_memory_mib"]) > 100
    with pytest.raises(VisionattnError, match="1 of 3"):
        run_validation(*options, "r.json")
    records = json.loads(Path("r.json").read_text())
    assert [f"{record['top1']}" for record in records] == [row["top1"] for row in rows[:2]]
    assert sum(entry["images"] for entry in records[0]["per_class"].values()) == records[0]["images"]
    assert sorted(os.listdir()) == ["r.csv", "r.json", "runs"]


def test_many_models(tmp_path: Path, capsys):
    options = ["--model_kwargs.num_classes", 10, "--data.val_fraction", 0.02, "--data.img_size", 64]
    run_validation("--model", "test_va*,test_dinat", *options, "--output", tmp_path / "r.csv")
    with open(tmp_path / "r.csv") as file:
        assert [row["model"] for row in csv.DictReader(file)] == ["test_van", "test_dinat"]
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model", "vam_*"], "no model matches vam_"),
        (["--checkpoint", "nowhere/*"], "no checkpoint matches nowhere"),
        (["--model", "van_*", "--checkpoint", "*"], "not both"),
        (["--model", "test_*", "--output", "r.txt"], "r.txt: expected a name that ends in .json or .csv"),
        (["--model", "test_*", "--output", "nowhere/r.csv"], "no folder nowhere"),
        (["--model", "test_*", "--output", "notes.csv"], "not a table of results"),
        (["--model", "test_dinat", "--tta.scales", "[]"], "tta.scales is empty"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(tmp_path: Path, monkeypatch, capsys, options, told: str):
    monkeypatch.chdir(tmp_path)
    Path("notes.csv").write_text("my notes\n")
    with pytest.raises(VisionattnError, match=told):
        run_validation(*options)
    assert not any(capsys.readouterr())
    assert Path("notes.csv").read_text() == "my notes\n" and os.listdir() == ["notes.csv"]


def test_rows_of_another_version_are_kept(tmp_path: Path):
    output = tmp_path / "r.csv"
    output.write_text("model,old\nmine,1\n")
    save_model(tmp_path / "w.safetensors")
    run_validation("--checkpoint", tmp_path / "w.safetensors", "--output", output)
    with open(output) as file:
        first, second = csv.DictReader(file)
    assert (first["model"], first["old"], first["top1"]) == ("mine", "1", "")
    assert (second["model"], second["old"]) == ("test_dinat", "") and float(second["top1"]) >= 0


def results(checkpoint: Path, *options: str) -> dict[str, float]:
    argv = ["--checkpoint", str(checkpoint), "--data.num_workers", "0", "--data.eval_batch_size", "16", *options]
    return validate(parse_validate(argv, options_of))


@pytest.mark.parametrize("option", ["--fuse", "--channels_last", pytest.param("--compile", marks=pytest.mark.slow)])
def test_faster_execution_gives_the_same_results(tmp_path: Path, option: str):
    save_model(tmp_path / "w.safetensors", "test_van")
    plain = results(tmp_path / "w.safetensors")
    assert results(tmp_path / "w.safetensors", option) == pytest.approx(plain, rel=1e-4)


def test_int8_gives_nearly_the_same_results(tmp_path: Path):
    save_model(tmp_path / "w.safetensors", "test_davit")
    plain = results(tmp_path / "w.safetensors")
    found = results(tmp_path / "w.safetensors", "--int8")
    assert found != plain and found["loss"] == pytest.approx(plain["loss"], rel=1e-2)
    for option in (["--precision", "bf16"], ["--compile"]):
        with pytest.raises(VisionattnError, match="leave out --int8"):
            results(tmp_path / "w.safetensors", "--int8", *option)


def test_two_processes_count_as_one_and_fail_together(tmp_path: Path):
    checkpoint, failing = tmp_path / "w.safetensors", tmp_path / "failing.safetensors"
    save_model(checkpoint)
    results(checkpoint, "--output", str(tmp_path / "one.json"))
    images = make_images(tmp_path / "images", ["0", "1"])
    (images / "0" / "0.png").write_bytes(b"not an image")  # which one of the processes reads
    save_model(failing, data={"name": "folder", "root": str(images), "img_size": [32, 32]})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--output", tmp_path / "two.json", "--data.eval_batch_size", "16", "--data.num_workers", "0"]
    done = subprocess.run(
        [*launch, ROOT / "validate.py", "--checkpoint", f"{failing},{checkpoint}", *options],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        timeout=120,
    )
    assert done.returncode and done.stderr.count(f"error: {failing}: cannot read {images / '0' / '0.png'}") == 1
    one, (two,) = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["images"] == two["images"] == 95 and two["per_class"] == one["per_class"]
    for key in ("top1", "top5", "loss", "ece"):
        assert two[key] == pytest.approx(one[key], rel=1e-5), key
