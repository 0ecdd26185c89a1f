"""Options that would have no effect are refused, wherever they are given; what recipes and checkpoints bring is not."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import layouts
import numpy as np
import pytest
from PIL import Image

import visionattn
from visionattn.cli import main as command
from visionattn.cli.catalog import models_table
from visionattn.errors import VisionattnError
from visionattn.tasks import TASKS
from visionattn.tasks.useless import RULES, given
from visionattn.training.checkpoint import save_checkpoint
from visionattn.training.config import TrainConfig, ValidateConfig, parse_train, parse_validate
from visionattn.training.evaluation import options_of, validate
from visionattn.training.trainer import Trainer

DETECTION, SEGMENTATION = "--task detection", "--task segmentation"


def make_images(root: Path, *splits: str) -> Path:
    for split in splits:
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(np.full((32, 32, 3), 40 * i, np.uint8)).save(root / split / name / f"{i}.png")
    return root


USELESS = [
    ("--checkpoint x.pth --pretrained", "pretrained is of no use beside checkpoint"),
    ("--data.train_split fit", "data.train_split is of no use without data.root"),
    ("--data.val_split test", "data.val_split is of no use without data.root"),
    ("--data.root ROOT --data.val_split tset", "data.val_split is of no use to a data.root without that folder"),
    ("--data.root ROOT --data.train_split tarin", "data.train_split is of no use to a data.root without that folder"),
    ("--data.root ROOT --data.val_fraction 0.3", "data.val_fraction is of no use to data with a split"),
    ("--data.name torch/cifar10 --data.root . --data.val_fraction 0.3", "data.val_fraction is of no use"),
    ("--data.name hfds/x --data.val_fraction 0.3", "data.val_fraction is of no use"),
    ("--data.download", "data.download is of no use without a data.name of torch/"),
    ("--data.name hfds/x --data.download", "data.download is of no use"),
    ("--augment.re_mode const", "augment.re_mode is of no use without augment.re_prob"),
    ("--augment.re_count 2", "augment.re_count is of no use without augment.re_prob"),
    ("--augment.mixup 0 --augment.mix_prob 0.5", "augment.mix_prob is of no use without augment.mixup"),
    ("--augment.mixup 0 --augment.mix_mode elem", "augment.mix_mode is of no use without augment.mixup"),
    ("--augment.mix_switch_prob 0.3", "augment.mix_switch_prob is of no use without both"),
    ("--augment.color_jitter_prob 0.3", "augment.color_jitter_prob is of no use without augment.color_jitter"),
    ("--augment.color_jitter 0.3 --augment.auto_augment rand-m9", "augment.color_jitter is of no use with"),
    ("--loss.bce_threshold 0.2", "loss.bce_threshold is of no use without loss.bce"),
    ("--loss.bce_sum", "loss.bce_sum is of no use without loss.bce"),
    ("--optim.name sgd --optim.betas [0.9,0.99]", "optim.betas is of no use to this optim.name"),
    ("--optim.name sgd --optim.eps 0.1", "optim.eps is of no use to this optim.name"),
    ("--optim.momentum 0.5", "optim.momentum is of no use to this optim.name"),
    ("--optim.clip_grad 0 --optim.clip_mode agc", "optim.clip_mode is of no use without optim.clip_grad"),
    ("--schedule.warmup_epochs 0 --schedule.warmup_lr 1e-3", "schedule.warmup_lr is of no use without"),
    ("--schedule.warmup_epochs 0 --schedule.warmup_prefix", "schedule.warmup_prefix is of no use without"),
    ("--schedule.name constant --schedule.min_lr 1e-3", "schedule.min_lr is of no use to this schedule.name"),
    ("--schedule.decay_epochs 3", "schedule.decay_epochs is of no use to this schedule.name"),
    ("--schedule.decay_milestones [3]", "schedule.decay_milestones is of no use to this schedule.name"),
    ("--schedule.decay_rate 0.5", "schedule.decay_rate is of no use to this schedule.name"),
    ("--schedule.patience_epochs 3", "schedule.patience_epochs is of no use to this schedule.name"),
    ("--ema.warmup false", "ema.warmup is of no use without ema.decay"),
    ("--distill.alpha 0.3", "distill.alpha is of no use without distill.model"),
    ("--distill.checkpoint x", "distill.checkpoint is of no use without distill.model"),
    ("--distill.kwargs.drop_rate 0.1", "distill.kwargs is of no use without distill.model"),
    ("--distill.features 1", "distill.features is of no use without distill.model"),
    ("--distill.model test_van --distill.alpha 0 --distill.hard", "distill.hard is of no use with distill.alpha 0"),
    ("--distill.model test_van --distill.hard --distill.temperature 2", "distill.temperature is of no use with"),
    ("--distill.model test_van --distill.feature_loss mse", "distill.feature_loss is of no use without"),
    ("--guard.max_rollbacks 5", "guard.max_rollbacks is of no use without guard.on_divergence rollback"),
    ("--guard.rollback_lr_factor 0.1", "guard.rollback_lr_factor is of no use without"),
    (f"{DETECTION} --data.crop_pct 0.9", "data.crop_pct is of no use to detection"),
    (f"{DETECTION} --data.root COCO --data.val_fraction 0.5", "data.val_fraction is of no use to data with a split"),
    (f"{DETECTION} --data.val_fraction 0.5", "data.val_fraction is of no use to data with a split"),
    (f"{SEGMENTATION} --data.val_fraction 0.5", "data.val_fraction is of no use to segmentation"),
    (f"{DETECTION} --joint.max_size 500", "joint.max_size is of no use without joint.min_size"),
    (f"{SEGMENTATION} --joint.max_class_share 0.5", "joint.max_class_share is of no use without joint.crop"),
    (f"{SEGMENTATION} --loss.auxiliary 0.1", "loss.auxiliary is of no use without head_kwargs.auxiliary"),
    (f"{SEGMENTATION} --annotations.box_format xyxy", "annotations.box_format is of no use to segmentation"),
    (f"{DETECTION} --annotations.box_format xyxy", "annotations.box_format is of no use to scenes"),
    (f"{DETECTION} --annotations.classes x.txt", "annotations.classes is of no use to scenes"),
    (f"{DETECTION} --data.root COCO --annotations.classes x.txt", "annotations.classes is of no use to COCO"),
    (f"{DETECTION} --data.root COCO --annotations.scene_size 64", "annotations.scene_size is of no use to other data"),
    (f"{DETECTION} --data.root COCO --annotations.fashion x", "annotations.fashion is of no use to other data"),
]


@pytest.mark.parametrize(("options", "told"), USELESS)
def test_options_without_effect_are_refused(tmp_path: Path, options: str, told: str):
    make_images(tmp_path / "images", "train", "val")
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / "coco" / "annotations" / f"instances_{split}.json").write_text("{}")
    argv = options.replace("ROOT", str(tmp_path / "images")).replace("COCO", str(tmp_path / "coco")).split()
    with pytest.raises(VisionattnError, match=f"option {told}.*: leave it out"):
        parse_train(argv)


@pytest.mark.parametrize(
    "options",
    [
        "--augment.re_prob 0.1 --augment.re_mode const --augment.cutmix 1 --augment.mix_switch_prob 0.3",
        "--loss.bce --loss.bce_threshold 0.2 --optim.name sgd --optim.momentum 0.8 --ema.decay 0.9 --ema.warmup false",
        "--schedule.name step --schedule.decay_epochs 3 --schedule.decay_rate 0.5 --schedule.warmup_lr 1e-4",
        "--distill.model test_van --distill.alpha 0.2 --distill.temperature 2 --distill.features 1",
        "--augment.color_jitter 0.3 --augment.auto_augment 3a --augment.color_jitter_prob 0.5 --data.val_fraction 0.3",
        f"{SEGMENTATION} --joint.crop 64 --joint.max_class_share 0.5 --joint.eval_size 64 --joint.max_size 90",
        f"{DETECTION} --augment.repeats 2 --annotations.scene_size 64 --joint.min_size [64] --joint.max_size 90",
    ],
)
def test_options_that_have_what_they_need_are_taken(options: str):
    assert list(given(parse_train(options.split())[0], TrainConfig(), "task")) == ["task"] * ("--task" in options)


def test_a_part_is_held_out_where_annotations_are_of_all_images(tmp_path: Path):
    layouts.cvat_coco(tmp_path)
    argv = [*DETECTION.split(), "--data.root", str(tmp_path), "--data.val_fraction", "0.4"]
    assert parse_train(argv)[0].data.val_fraction == 0.4


def test_every_option_that_is_looked_at_exists():
    def names(config: object, prefix: str = "") -> set[str]:
        found = set()
        for each in fields(config):
            value = getattr(config, each.name)
            found |= {prefix + each.name} | (names(value, f"{prefix}{each.name}.") if is_dataclass(value) else set())
        return found

    known = names(TrainConfig()) | names(ValidateConfig())
    for name in (
        name for group in (*(t.of_no_use for t in TASKS.values()), *(r.options for r in RULES)) for name in group
    ):
        assert name in known, name


def test_what_recipes_bring_may_be_switched_off(tmp_path: Path):
    (tmp_path / "base.yaml").write_text("augment: {re_prob: 0.2, re_mode: const}\nschedule: {warmup_lr: 1.0e-4}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nschedule: {warmup_epochs: 0}\n")
    mine = ["--config", str(tmp_path / "mine.yaml")]
    assert parse_train([*mine, "--augment.re_prob", "0"])[0].augment.re_mode == "const"
    (tmp_path / "all.yaml").write_text((tmp_path / "base.yaml").read_text())
    assert parse_train(["--config", str(tmp_path / "all.yaml"), "--schedule.warmup_epochs", "0"])
    (tmp_path / "wrong.yaml").write_text("base: base.yaml\naugment: {re_prob: 0, re_count: 3}\n")
    with pytest.raises(VisionattnError, match="option augment.re_count is of no use without augment.re_prob"):
        parse_train(["--config", str(tmp_path / "wrong.yaml")])


def test_a_profile_past_the_end_is_refused_before_anything_is_written(tmp_path: Path):
    options = ["--data.num_workers", "0", "--data.val_fraction", "0.9", "--output", str(tmp_path), "--epochs", "2"]
    with pytest.raises(VisionattnError, match="profile is of no use: 4-9 is past the end, the run has 4 updates"):
        Trainer(*parse_train([*options, "--profile", "4-9"]))
    assert not list(tmp_path.iterdir())


def test_a_model_that_learns_as_its_paper_says_takes_no_options_for_it(tmp_path: Path):
    options = ["--data.num_workers", "0", "--output", str(tmp_path), "--model", "test_sparsifiner", "--distill.model"]
    options += [
        "test_sparsifiner",
        "--distill.checkpoint",
        str(tmp_path / "teacher.safetensors"),
        "--distill.alpha",
        "0.3",
    ]
    teacher = visionattn.create_model("test_sparsifiner", num_classes=10)
    description = {"model": "test_sparsifiner", "model_kwargs": {"num_classes": 10}}
    save_checkpoint(tmp_path / "teacher.safetensors", teacher.state_dict(), description)
    with pytest.raises(VisionattnError, match="distill.alpha is of no use to test_sparsifiner"):
        Trainer(*parse_train(options))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("made") / "best.safetensors"
    data = {"img_size": [32, 32], "eval_img_size": [40, 40], "batch_size": 8, "val_fraction": 0.02}
    classes = [str(label) for label in range(10)]
    model = visionattn.create_model("test_dinat", num_classes=10)
    description = {"model": "test_dinat", "model_kwargs": {"num_classes": 10}, "classes": classes, "data": data}
    save_checkpoint(path, model.state_dict(), description)
    return str(path)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--data.batch_size 4", "data.batch_size is of no use to validation"),
        ("--data.max_bad_fraction 0.5", "data.max_bad_fraction is of no use to validation"),
        ("--data.img_size 64", "data.img_size is of no use beside data.eval_img_size"),
        ("--pretrained", "pretrained is of no use beside checkpoint"),
        ("--data.download", "data.download is of no use"),
        ("--joint.eval_size 64", "joint.eval_size is of no use to classification"),
        ("--task detection --joint.hflip 0.5", "joint.hflip is of no use to validation"),
    ],
)
def test_options_without_effect_on_validation_are_refused(checkpoint: str, options: str, told: str):
    with pytest.raises(VisionattnError, match=f"option {told}"):
        validate(parse_validate(["--checkpoint", checkpoint, *options.split()], options_of))


def test_what_a_checkpoint_brings_is_not_refused(checkpoint: str):
    found = validate(parse_validate(["--checkpoint", checkpoint, "--data.num_workers", "0"], options_of))
    assert 0 <= found["top1"] <= 100


@pytest.mark.parametrize(
    ("task", "option", "told"),
    [
        (None, ["--output", "x"], "option --output is of no use to classification"),
        (None, ["--overwrite"], "option --overwrite is of no use to classification"),
        (None, ["--threshold", "0.3"], "option --threshold is of no use to classification"),
        ("segmentation", ["--threshold", "0.3"], "option --threshold is of no use to segmentation"),
    ],
)
def test_predict_refuses_what_its_task_has_no_use_for(tmp_path: Path, checkpoint: str, capsys, task, option, told: str):
    if task:
        checkpoint = str(tmp_path / "c.safetensors")
        description = {"task": task, "model": "test_dinat", "model_kwargs": {}, "head": "fpn", "head_kwargs": {}}
        description |= {"classes": ["a", "b"], "data": {}}
        save_checkpoint(Path(checkpoint), visionattn.create_segmenter("test_dinat", "fpn", 2).state_dict(), description)
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    assert command(["predict", "--checkpoint", checkpoint, str(tmp_path / "a.png"), *option]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_table_of_pretrained_models_has_no_others(capsys):
    assert command(["list", "test_van", "--table", "--pretrained"]) == 0
    assert capsys.readouterr().out.count("\n") == 2
    assert "`test_van`" in models_table("test_van") and "`van_b0`" in models_table("van_b0", pretrained=True)


@pytest.mark.parametrize("option", [["--private"], ["--message", "mine"]])
def test_push_to_a_folder_takes_no_options_of_repositories(tmp_path: Path, checkpoint: str, capsys, option: list[str]):
    assert command(["push", checkpoint, f"local-dir:{tmp_path / 'x'}", *option]) == 2
    assert f"option {option[0]} is of no use" in capsys.readouterr().err
