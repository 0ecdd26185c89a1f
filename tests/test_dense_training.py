"""train.py, validate.py and `visionattn predict` for detection and segmentation."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

import visionattn
from visionattn.cli import main as command
from visionattn.data.config import AnnotationConfig
from visionattn.data.scenes import Scenes
from visionattn.errors import VisionattnError
from visionattn.tasks import make_task
from visionattn.tasks.config import TaskConfig, TtaConfig
from visionattn.training.config import ValidateConfig, parse_train, parse_validate
from visionattn.training.evaluation import options_of, validate
from visionattn.training.run import train
from visionattn.training.trainer import Trainer

QUICK = ["--data.batch_size", "2", "--data.num_workers", "0", "--annotations.scene_count", "12", "--epochs", "2"]
QUICK += ["--annotations.scene_size", "64", "--data.eval_batch_size", "2", "--schedule.warmup_epochs", "0"]
FCOS = ["--task", "detection", "--head_kwargs.fpn_channels", "64"]
RCNN = ["--head_kwargs", '{"fpn_channels": 16, "box_batch_size_per_image": 8, "rpn_pre_nms_top_n_train": 40, '
        '"rpn_post_nms_top_n_train": 20, "rpn_pre_nms_top_n_test": 40, "rpn_post_nms_top_n_test": 20}']  # fmt: skip
MASKS = ["--task", "detection", "--head", "mask_rcnn", *RCNN]
MAPS = ["--task", "segmentation", "--head_kwargs", '{"pyramid_channels": 32, "segmentation_channels": 32}']
TASKS = pytest.mark.parametrize("task", [FCOS, MASKS, MAPS], ids=["boxes", "masks", "maps"])


def parse(tmp_path: Path, *options: str):
    return parse_train([*QUICK, "--output", str(tmp_path), *options])


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def checkpoint(folder: Path, name: str = "best") -> str:
    return str(folder / "checkpoints" / f"{name}.safetensors")


def validated(*options: str) -> dict[str, float]:
    return validate(parse_validate(["--data.num_workers", "0", *options], options_of))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each task."""
    output = tmp_path_factory.mktemp("runs")
    return {name: train(*parse(output, *task)) for name, task in (("fcos", FCOS), ("mask_rcnn", MASKS), ("fpn", MAPS))}


@pytest.mark.parametrize("head, metric", [("fcos", "box_AP"), ("mask_rcnn", "mask_AP"), ("fpn", "mIoU")])
def test_a_run_leaves_metrics_and_pictures_which_validation_repeats(runs, head: str, metric: str, capsys):
    folder, output = runs[head], runs[head] / "results.json"
    assert folder.name == f"test_dinat-{head}-scenes"
    assert [row["epoch"] for row in rows(folder)] == ["0", "1"]
    assert sorted(path.name for path in (folder / "predictions").iterdir()) == ["epoch-001.png", "epoch-002.png"]
    assert Image.open(folder / "predictions" / "epoch-002.png").width >= 128
    (events,) = folder.rglob("events.out.tfevents.*")
    shown = EventAccumulator(str(events)).Reload()
    assert [image.step for image in shown.Images("predictions")] == [6, 12]
    assert Image.open(folder / "curves.png").width > 300
    found = validated("--checkpoint", checkpoint(folder), "--output", str(output))
    best = max(rows(folder), key=lambda row: float(row[f"val_{metric}"]))
    assert {f"val_{name}": f"{value:.4f}" for name, value in found.items()}.items() <= best.items()
    written = json.loads(output.read_text())
    assert (written["head"], written["images"]) == (head, 2) and written[metric] == found[metric]
    assert len(written["per_class"]) == (11 if head == "fpn" else 10)
    assert f"{metric.replace('_', ' ')} " in capsys.readouterr().out


class Killed(BaseException):
    """Stands for a kill: nothing may run after it."""


@TASKS
def test_resumed_runs_end_with_the_same_bits(tmp_path: Path, task: list[str]):
    options = [*task, "--ema.decay", "0.9", "--model_kwargs.drop_path_rate", "0.2", "--optim.accumulation", "2"]
    options += ["--save_every", "1", "--joint.hflip", "0.5", "--joint.scale", "[0.7, 1.3]", "--joint.crop", "64"]
    options += ["--joint.photometric", "0.5"]
    whole = train(*parse(tmp_path / "whole", *options))
    stopped = Trainer(*parse(tmp_path / "stopped", *options))
    loss = stopped.loss

    def stop(model, images, targets, update):
        if update == stopped.updates + 1:
            raise Killed
        return loss(model, images, targets, update)

    stopped.loss = stop
    with pytest.raises(Killed):
        stopped.fit()
    resumed = train(*parse_train(["--resume", str(stopped.folder)]))
    assert rows(resumed) == rows(whole)
    for name in ("last", "best"):
        ours, theirs = load_file(checkpoint(resumed, name)), load_file(checkpoint(whole, name))
        assert ours.keys() == theirs.keys()
        assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]


@pytest.fixture(scope="module")
def many_sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes cut to many sizes: a COCO folder, and in maps/ a folder of masks."""
    root, scenes = tmp_path_factory.mktemp("sizes"), Scenes(AnnotationConfig(scene_count=120), True, False)
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": n} for i, n in enumerate("0123456789")],
    }
    sizes = [(96, 96), (70, 90), (96, 96), (50, 90), (90, 50), (70, 90), (33, 64), (96, 80), (64, 64), (41, 96)]
    for folder in ("annotations", "val2017", "maps/images/val", "maps/masks/val"):
        (root / folder).mkdir(parents=True)
    (root / "maps" / "classes.txt").write_text("\n".join(["background", *"0123456789"]))
    for i, (height, width) in enumerate(sizes):
        scene = scenes.compose(i)
        content["images"].append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        for place in ("val2017", "maps/images/val"):
            Image.fromarray(scene.pixels[:height, :width]).save(root / place / f"{i}.png")
        Image.fromarray(scene.semantic()[:height, :width]).save(root / "maps/masks/val" / f"{i}.png")
        for box, label in zip(scene.objects().boxes.tolist(), scene.labels.tolist(), strict=True):
            x1, y1, x2, y2 = np.array(box).clip(0, [width, height] * 2).tolist()
            if x2 > x1 and y2 > y1:
                item = {"id": len(content["annotations"]), "image_id": i, "category_id": label - 1}
                content["annotations"].append(
                    item | {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                )
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("model", ["test_dinat", "test_attnet", "test_convit", "test_hornet"])  # global ones too
@pytest.mark.parametrize("task", [FCOS, MAPS], ids=["boxes", "maps"])
def test_results_do_not_depend_on_how_images_are_batched(tmp_path: Path, many_sizes: Path, model: str, task: list[str]):
    kept = ["--head_kwargs", '{"fpn_channels": 64, "score_thresh": 0, "detections_per_img": 300}']
    run = Trainer(*parse(tmp_path, *task, *(kept if task is FCOS else []), "--model", model))
    if task is FCOS:  # boxes of about the objects' size everywhere, with scores that depend on the features
        torch.nn.init.ones_(run.bare_model.head.regression_head.bbox_reg.bias)
        torch.nn.init.normal_(run.bare_model.head.classification_head.cls_logits.weight, std=0.5)
    run._begin()
    root = many_sizes if task is FCOS else many_sizes / "maps"
    data = ["--data.name", "folder", "--data.root", str(root)]
    found = [
        validated("--checkpoint", checkpoint(run.folder, "last"), *data, "--data.eval_batch_size", str(size))
        for size in (1, 3, 10)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-3, nan_ok=True)
    assert found[0] == pytest.approx(found[2], abs=1e-3, nan_ok=True)
    assert found[0]["box_AR100" if task is FCOS else "pixel_accuracy"] > 0


@pytest.fixture
def another_precision():
    """accelerate takes its precision once for each process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@TASKS
def test_mixed_precision_and_layout(tmp_path: Path, another_precision, task: list[str]):
    # Maps of one pixel have gradients of any value in torch's bf16 convolutions on CPUs.
    options = ["--precision", "bf16", "--channels_last", "--epochs", "1", "--annotations.scene_size", "160"]
    run = Trainer(*parse(tmp_path, *task, *options))
    folder = run.fit()
    assert run.guard.skipped == 0 and float(rows(folder)[0]["train_loss"]) < 20
    AcceleratorState._reset_state(reset_partial_state=True)
    assert validated("--checkpoint", checkpoint(folder)).keys() == {key[4:] for key in rows(folder)[0] if "val_" in key}


@TASKS
def test_frozen_backbones_stay_as_they_are(tmp_path: Path, task: list[str]):
    run = Trainer(*parse(tmp_path, *task, "--freeze", "[backbone]"))
    before = {name: p.clone() for name, p in run.bare_model.named_parameters()}
    next(run.run_updates())
    changed = {name for name, p in run.bare_model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and not [name for name in changed if name.startswith(run.bare_model.backbone_name)]
    assert not run.bare_model.inner.training and run.bare_model.training


def test_runs_start_from_classifiers_and_from_detectors_of_other_classes(tmp_path: Path, runs, caplog):
    classifier = visionattn.create_model("test_dinat", num_classes=7)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    run = Trainer(*parse(tmp_path, *FCOS, "--checkpoint", str(tmp_path / "classifier.pth")))
    for name, value in run.bare_model.inner.stages.state_dict().items():
        assert torch.equal(value, classifier.stages.state_dict()[name])
    caplog.clear()
    names = tmp_path / "names.txt"
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "masks" / "train").mkdir(parents=True)
    names.write_text("sky\ngrass\n")
    for split in ("train", "val"):
        for folder in ("images", "masks"):
            (tmp_path / folder / split).mkdir(parents=True, exist_ok=True)
            Image.new("RGB" if folder == "images" else "L", (64, 64)).save(tmp_path / folder / split / "a.png")
    data = ["--data.name", "folder", "--data.root", str(tmp_path), "--annotations.classes", str(names)]
    run = Trainer(
        *parse_train([*MAPS, *data, "--output", str(tmp_path / "out"), "--checkpoint", checkpoint(runs["fpn"])])
    )
    trained = load_file(checkpoint(runs["fpn"]))
    own = run.bare_model.state_dict()
    new = {name for name in own if own[name].shape != trained[name].shape or not torch.equal(own[name], trained[name])}
    assert new == {"segmentation_head.0.weight", "segmentation_head.0.bias"}
    assert "re-initialised" in caplog.text


def test_checkpoints_make_their_models(runs):
    model = visionattn.create_model(checkpoint(runs["mask_rcnn"]), box_score_thresh=0.0).eval()
    assert model.pretrained_cfg["label_names"] == [str(i) for i in range(10)]
    found = model([torch.randn(3, 64, 80)])[0]
    assert len(found["boxes"]) and found["masks"].shape[-2:] == (64, 80)
    assert visionattn.create_model(checkpoint(runs["fpn"]))(torch.randn(2, 3, 64, 64)).shape == (2, 11, 64, 64)
    with pytest.raises(VisionattnError, match="unknown arguments windows"):
        visionattn.create_model(checkpoint(runs["fcos"]), windows=3)


@pytest.mark.parametrize("head", ["fcos", "mask_rcnn", "fpn"])
def test_predictions_are_drawn(tmp_path: Path, runs, head: str, capsys):
    for i, size in enumerate([(96, 96), (60, 90)]):
        Scenes(AnnotationConfig(), True, False)[i][0].resize(size).save(tmp_path / f"{i}.jpg")
    images, output = [str(tmp_path / "0.jpg"), str(tmp_path / "1.jpg")], str(tmp_path / "new" / "out")
    options = ["predict", "--checkpoint", checkpoint(runs[head]), "--output", output]
    threshold = [] if head == "fpn" else ["--threshold", "0.01"]
    assert command([*options, *threshold, *images]) == 0
    assert [Image.open(Path(output) / f"{i}.png").size for i in range(2)] == [(96, 96), (60, 90)]
    assert capsys.readouterr().out.count("\n") == 2
    before = (Path(output) / "0.png").read_bytes()
    assert command([*options, *threshold, *images]) == 2
    assert "exists" in capsys.readouterr().err and (Path(output) / "0.png").read_bytes() == before
    assert command([*options, "--overwrite", *images]) == 0
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    for wrong, told, code in (
        ("broken.jpg", "broken.jpg", 1),  # which does not end the others
        ("nowhere.jpg", "nowhere.jpg", 1),
        ("new/../0.jpg", "several images", 2),
    ):
        assert command([*options, "--overwrite", images[0], str(tmp_path / wrong)]) == code
        assert told in capsys.readouterr().err
    assert command([*options, "--overwrite", str(tmp_path / "broken.jpg")]) == 2


def test_checkpoints_are_explained(tmp_path: Path, runs, capsys):
    Scenes(AnnotationConfig(), True, False)[0][0].resize((90, 60)).save(tmp_path / "a.png")
    options = ["explain", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    assert command([*options, "--checkpoint", checkpoint(runs["fpn"]), "--class", "background"]) == 0
    assert "class 0 (background)" in capsys.readouterr().out and (tmp_path / "out" / "a-gradcam.png").exists()


class Certain(torch.nn.Module):
    """Tells class 0 everywhere, of which other classes have a probability of exactly 0."""

    def __init__(self, value: float = 1000.0) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [torch.full_like(x[:, 0], self.value), *(-torch.full_like(x[:, :3], self.value)).unbind(1)], 1
        )


@pytest.mark.parametrize("value", [1000.0, float("inf")])
@pytest.mark.parametrize("tta", [TtaConfig(), TtaConfig(flip=True), TtaConfig(flip=True, scales=(0.5, 1.0, 1.5))])
def test_a_certain_model_stays_certain_when_its_maps_are_resized(tta: TtaConfig, value: float):
    task, image = make_task(ValidateConfig("segmentation", tta=tta)), torch.randn(3, 40, 56)
    with torch.no_grad():
        (found,) = task.predict(Certain(value), [image])
    assert not found.isnan().any()
    for size in ((40, 56), (97, 33), (20, 28)):
        assert not task.to_full_size(found, size).any()


def test_views_of_an_image_one_pixel_high_are_averaged():
    task = make_task(ValidateConfig("segmentation", tta=TtaConfig(scales=(0.25, 1.0))))
    with torch.no_grad():
        (found,) = task.predict(Certain(), [torch.randn(3, 1, 50)])
    assert found.shape == (4, 1, 50) and not found.argmax(0).any()


def test_views_of_segmentation_are_averaged_as_by_hand():
    config = ValidateConfig("segmentation", "test_dinat", tta=TtaConfig(flip=True, scales=(0.5, 1.0)))
    task, image = make_task(config), torch.randn(3, 64, 80)
    model = make_task(TaskConfig("segmentation")).create_model(4).eval()
    torch.nn.init.normal_(model.segmentation_head[0].weight, std=0.5)
    with torch.no_grad():
        (found,), total = task.predict(model, [image]), 0
        for view in (image[None], F.interpolate(image[None], (32, 40), mode="bilinear", antialias=True)):
            for logits in (model(view), model(view.flip(-1)).flip(-1)):
                total = total + F.interpolate(logits, (64, 80), mode="bilinear").softmax(1)[0] / 4
    torch.testing.assert_close(found.softmax(0), total, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found.softmax(0), model(image[None])[0].softmax(0), atol=1e-2)


# Dropout is drawn for each process, and AdamW's first steps make much of rounding where gradients are next to nothing.
SHARED = ["--head_kwargs.dropout", "0", "--optim.name", "sgd", "--optim.lr", "0.05"]


def main(output: str) -> None:
    """Runs of each of two processes."""
    PartialState.destroy_process_group = lambda self, group=None: None  # torch keeps it for further runs of a process
    for task in ([*MAPS, *SHARED], FCOS, MASKS):
        folder = train(*parse(Path(output), *task, "--annotations.scene_count", "30"))
        found = validated("--checkpoint", checkpoint(folder))
        if os.environ["RANK"] == "0":
            (folder / "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_as_good_as_one(tmp_path: Path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run([*command, tmp_path / "two"], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    for folder in sorted((tmp_path / "two").iterdir()):  # its metrics, shared, are those of one process
        alone = validated("--checkpoint", checkpoint(folder))
        assert json.loads((folder / "found.json").read_text()) == pytest.approx(alone, nan_ok=True, abs=1e-6)
        assert (folder / "predictions" / "epoch-002.png").is_file()
    # What a pixel loses does not depend on the process, unlike detectors' losses, which go by objects of a batch.
    one = train(*parse(tmp_path, *MAPS, *SHARED, "--annotations.scene_count", "30", "--data.batch_size", "4"))
    for ours, theirs in zip(rows(one), rows(tmp_path / "two" / one.name), strict=True):
        for name, value in ours.items():
            assert float(value) == pytest.approx(float(theirs[name]), rel=1e-3), name


@TASKS
def test_dry_run_leaves_nothing(tmp_path: Path, task: list[str], capsys, monkeypatch):
    monkeypatch.setattr("visionattn.training.run.SECONDS", 0.1)
    assert train(*parse(tmp_path, *task, "--dry_run")) is None
    assert "64 x 64 input" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([*FCOS, "--augment.hflip", "0.5"], "option augment.hflip is of no use to detection"),
        ([*MAPS, "--loss.smoothing", "0"], "option loss.smoothing is of no use to segmentation"),
        ([*MAPS, "--distill.model", "van_b0"], "option distill.model is of no use"),
        (["--joint.hflip", "0.5"], "option joint.hflip is of no use to classification"),
        (["--head", "fpn"], "option head is of no use to classification"),
        ([*FCOS, "--head", "fpn"], "expected head one of faster_rcnn, mask_rcnn, retinanet, fcos, got 'fpn'"),
        ([*FCOS, "--head_kwargs.fpn_chanels", "64"], "fpn_chanels"),
        ([*MAPS, "--model_kwargs.num_classes", "3"], "num_classes"),
        (["--task", "detektion"], "detektion"),
        ([*FCOS, "--data.root", "."], "option annotations.scene_.* is of no use to other data than scenes"),
        (["--task", "segmentation", "--data.name", "digits"], "unknown dataset digits"),
        ([*MAPS, "--joint.scale", "[0.5, 2]"], "images of a batch differ in size"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path: Path, options: list[str], told: str):
    quick = QUICK if {"segmentation", "detection"} & {*options} and "--data.name" not in options else []
    with pytest.raises(VisionattnError, match=told) as error:
        train(*parse_train([*quick, "--output", str(tmp_path / "runs"), *options]))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.safetensors"))


if __name__ == "__main__":
    main(sys.argv[1])
