"""A task from outside the package, the mean colour of an image: a class and a line in TASKS are all that it takes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import visionattn
from visionattn.cli import main as command
from visionattn.errors import VisionattnError
from visionattn.tasks import TASKS, Known
from visionattn.tasks.task import Metrics, Task
from visionattn.training.config import parse_train, parse_validate
from visionattn.training.evaluation import validate_all
from visionattn.training.guard import Stopped
from visionattn.training.run import train
from visionattn.training.trainer import Trainer
from visionattn.weights.files import read_checkpoint

CHANNELS = ["red", "green", "blue"]


class MeanColour:
    """An image, prepared, and its mean; processes are handed it, so that it is no function in a function."""

    def __init__(self, image: Callable) -> None:
        self.image = image

    def __call__(self, image, label):
        image = self.image(image)
        return image, image.mean((1, 2))


class Colour(Task):
    """The mean of each channel of an image, of the digits for example."""

    metric, shown, unit = "closeness", ("closeness", "error"), ""

    def load(self):
        return tuple(replace(images, indices=images.indices[:96], classes=CHANNELS) for images in super().load())

    def load_validation(self, classes):
        images = super().load_validation(classes)
        return replace(images, indices=images.indices[:96], classes=CHANNELS)

    def create_model(self, num_classes):
        return super().create_model(len(CHANNELS))

    def transform(self, training: bool) -> Callable:
        return MeanColour(super().transform(training).image)

    def make_loss(self, images, training_loss):
        return ColourLoss()

    def predict(self, model: nn.Module, images: Tensor) -> Tensor:
        return model(images).float()

    def metrics(self, images, rank: int, processes: int) -> Metrics:
        return ColourMetrics()

    def summarise(self, found: Tensor, classes: list[str], threshold: float | None) -> str:
        return ", ".join(f"{name} {value:.2f}" for name, value in zip(classes, found.tolist(), strict=True))


class ColourLoss(nn.Module):
    def forward(self, model: nn.Module, images: Tensor, targets: Tensor, update: int) -> Tensor:
        return nn.functional.mse_loss(model(images).float(), targets)


class ColourMetrics(Metrics):
    def __init__(self) -> None:
        self.errors: list[float] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.errors += (outputs - targets).abs().mean(1).tolist()

    def share(self, gather: Callable) -> None:
        self.errors = gather(self.errors)

    def compute(self) -> dict[str, float]:
        error = sum(self.errors) / len(self.errors)
        return {"closeness": 100 / (1 + error), "error": error}


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch):
    useless = ("loss", "distill", "tta", "augment.mixup")
    monkeypatch.setitem(TASKS, "colour", Known(f"{__name__}:Colour", "class", useless=useless))


def stop_at(loss: nn.Module, update: int) -> Callable:
    def stopping(*args):
        if args[-1] == update:
            raise Stopped
        return loss(*args)

    return stopping


OPTIONS = [
    *(
        "--task",
        "colour",
        "--model",
        "test_van",
        "--data.img_size",
        "32",
        "--data.batch_size",
        "31",
        "--data.eval_batch_size",
        "64",
    ),
    *(
        "--trackers",
        "[]",
        "--data.num_workers",
        "0",
        "--epochs",
        "2",
        "--data.val_fraction",
        "0.1",
        "--schedule.warmup_epochs",
        "0",
    ),
]


def test_a_task_from_outside_is_trained_resumed_validated_and_predicts(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    argv = [*OPTIONS, "--output", str(tmp_path)]
    whole = train(*parse_train([*argv, "--name", "whole"]))
    stopped = Trainer(*parse_train([*argv, "--name", "stopped"]))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(stopped, "loss", stop_at(stopped.loss, 4))
        stopped.fit()
    assert (stopped.epoch, stopped.update) == (1, 1)
    resumed = train(*parse_train(["--resume", str(stopped.folder)]))
    for name in ("best", "last"):
        ours, theirs = (read_checkpoint(run / "checkpoints" / f"{name}.safetensors")[0] for run in (whole, resumed))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs)
    rows = [line.rsplit(",", 1)[0] for line in (whole / "metrics.csv").read_text().splitlines()]
    assert rows == [line.rsplit(",", 1)[0] for line in (resumed / "metrics.csv").read_text().splitlines()]
    assert rows[0].startswith("epoch,train_loss,val_closeness,val_error,lr") and len(rows) == 3

    opened: list[str] = []  # each file is read once

    def noted(path: Path, mode: str):
        opened.append(path.name)
        return open(path, mode)

    monkeypatch.setattr("visionattn.weights.files.open", noted, raising=False)
    best = str(whole / "checkpoints" / "best.safetensors")
    validate_all(parse_validate(["--checkpoint", best], lambda _: {}), ["--checkpoint", best])
    assert f"closeness  {max(row.split(',')[2] for row in rows[1:])}\n" in capsys.readouterr().out
    assert opened == ["best.safetensors"]
    assert command(["predict", "docs/digits.png", "--checkpoint", best]) == 0
    assert "docs/digits.png: red " in capsys.readouterr().out
    assert opened == ["best.safetensors"] * 2
    assert Trainer(*parse_train(["--resume", str(whole)])).epoch == 2
    assert opened.count("last.safetensors") == 1
    with pytest.raises(VisionattnError, match="colour") as told:
        visionattn.create_model(best)
    assert "\n" not in str(told.value)
    assert visionattn.create_model("test_van", num_classes=3, checkpoint_path=best)


def test_the_command_line_knows_it(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SystemExit):
        parse_train(["--help"])
    assert "{classification,detection,segmentation,colour}" in "".join(capsys.readouterr().out.split())
    with pytest.raises(VisionattnError, match="'segmentation', 'colour'.*Got value: color") as told:
        parse_train(["--task", "color"])
    assert "\n" not in str(told.value)
    with pytest.raises(VisionattnError, match="option augment.mixup is of no use to colour"):
        parse_train([*OPTIONS, "--augment.mixup", "0.1"])
    with pytest.raises(VisionattnError, match="option data.train_split is of no use without data.root"):
        parse_train([*OPTIONS, "--data.train_split", "fit"])
    for option in (["--head", "fpn"], ["--joint.crop", "8"], ["--annotations.classes", "c.txt"]):
        with pytest.raises(VisionattnError, match=f"option {option[0][2:]} is of no use to colour"):
            parse_train([*OPTIONS, *option])
