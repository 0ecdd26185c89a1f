"""Runs that are resumed with other options, and what run folders and results hold if things go wrong around them."""

import csv
import errno
import math
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import visionattn
import visionattn.training.trainer as trainer_module
from visionattn.errors import VisionattnError
from visionattn.training.checkpoint import make_folder, read_saved, remove_unused, save_checkpoint, training_state
from visionattn.training.config import parse_train
from visionattn.training.evaluation import ResultFile
from visionattn.training.logging import RunLog
from visionattn.training.run import dry_run, train
from visionattn.training.trainer import Trainer
from visionattn.weights.description import read_description

QUICK = ["--data.num_workers", "0", "--data.batch_size", "4", "--epochs", "2", "--save_every", "1", "--trackers", "[]"]
QUICK += ["--schedule.warmup_epochs", "0"]
SCENES = ["--data.num_workers", "0", "--data.batch_size", "2", "--annotations.scene_count", "10", "--epochs", "2"]
SCENES += ["--annotations.scene_size", "64", "--trackers", "[]", "--save_every", "1", "--schedule.warmup_epochs", "0"]
TASKS = {
    "detection": ["--task", "detection", "--head_kwargs.fpn_channels", "64"],
    "segmentation": [
        "--task",
        "segmentation",
        "--head_kwargs",
        '{"pyramid_channels": 32, "segmentation_channels": 32}',
    ],
}


class Killed(BaseException):
    """Stands for a kill: nothing may run after it."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of two classes, eight images each to train on and two to validate on."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                image.save(root / split / name / f"{i}.png")
    return str(root)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunLog, "_draw", lambda self: None)  # matplotlib is slow


def killed(run: Trainer, epoch: int, update: int, validates: bool = False) -> Path:
    """The folder of a run that is killed before an update."""
    make = run._make_update
    if not validates:
        run._validate = lambda: dict.fromkeys({run.task.metric, *run.task.shown}, 3.0)

    def stop(batches):
        if (run.epoch, run.update) == (epoch, update):
            raise Killed
        return make(batches)

    run._make_update = stop
    with pytest.raises(Killed):
        run.fit()
    return run.folder


PLAIN = ["--augment.mixup", "0"]
RICH = ["--keep_best", "3", "--ema.decay", "0.9", "--optim.layer_decay", "0.8", "--guard.on_divergence", "rollback"]
RICH += ["--freeze", "[stem]", "--optim.accumulation", "2", "--data.batch_size", "2", "--augment.mixup", "0.4"]
RICH += ["--grad_checkpointing", "--channels_last", "--model_kwargs.drop_path_rate", "0.1"]
DISTILLED = ["--distill.model", "test_dinat", "--distill.features", "1"]


@pytest.fixture(scope="module")
def begun(images: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs killed within their second and last epoch."""
    output = tmp_path_factory.mktemp("begun")
    made, draw = {}, RunLog._draw
    RunLog._draw = lambda self: None
    for name, options in (("plain", PLAIN), ("rich", RICH)):
        argv = [*QUICK, *options, "--data.root", images, "--output", str(output), "--name", name]
        made[name] = killed(Trainer(*parse_train(argv)), 1, 2)
    argv = [*QUICK, *PLAIN, *DISTILLED, "--distill.checkpoint", str(made["plain"] / "checkpoints/best.safetensors")]
    argv += ["--data.root", images, "--output", str(output), "--name", "distilled"]
    made["distilled"] = killed(Trainer(*parse_train(argv)), 1, 2)
    RunLog._draw = draw
    return made


def resumed(begun: Path, tmp_path: Path, *options: str) -> Trainer:
    folder = tmp_path / begun.name
    shutil.copytree(begun, folder)
    return Trainer(*parse_train(["--resume", str(folder), *options]))


def finish(run: Trainer, scores: Callable[[int], float] = lambda epoch: 50.0 + epoch) -> list[int]:
    """Let a run end, with these scores of its epochs; the epochs in metrics.csv."""
    run._validate = lambda: {"top1": scores(run.epoch), "top5": 0.0, "loss": 0.0}
    run.fit()
    assert run.folder / "checkpoints" / "best.safetensors" in (run.folder / "checkpoints").iterdir()
    with open(run.folder / "metrics.csv") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


CHANGES = [
    ("plain", ["--keep_best", "3", "--optim.lr", "1e-5"]),
    ("rich", ["--keep_best", "1", "--ema.decay", "0"]),
    ("rich", ["--keep_best", "2", "--optim.accumulation", "1"]),
    ("plain", ["--freeze", "[stem, stages.0]", "--ema.decay", "0.9"]),
    ("plain", ["--freeze", "[backbone]", "--optim.layer_decay", "0.7"]),
    ("rich", ["--freeze", "[]", "--optim.layer_decay", "null", "--optim.weight_decay", "0"]),
    ("plain", ["--optim.name", "sgd", "--optim.momentum", "0.5"]),
    ("rich", ["--optim.name", "muon", "--data.batch_size", "8"]),
    ("plain", ["--optim.name", "adagrad", "--optim.weight_decay", "0"]),
    ("plain", ["--optim.clip_mode", "agc", "--optim.accumulation", "2", "--optim.betas", "[0.8, 0.9]"]),
    ("plain", ["--data.batch_size", "2", "--augment.mixup", "0.2", "--augment.cutmix", "1"]),
    ("rich", ["--augment.mixup", "0", "--augment.auto_augment", "rand-m9", "--augment.repeats", "2"]),
    ("plain", ["--data.img_size", "40", "--seed", "7", "--precision", "bf16", "--log_every", "1"]),
    ("plain", ["--loss.bce", "true", "--loss.class_weights", "balanced", "--schedule.name", "plateau"]),
    ("rich", ["--schedule.name", "onecycle", "--schedule.warmup_epochs", "1", "--guard.on_divergence", "stop"]),
    ("plain", ["--grad_checkpointing", "--channels_last", "--model_kwargs.drop_path_rate", "0.2"]),
    ("rich", ["--grad_checkpointing", "false", "--channels_last", "false", "--trackers", "[tensorboard]"]),
    ("plain", ["--profile", "4-20", "--early_stopping", "5", "--guard.on_divergence", "rollback"]),
    ("distilled", ["--distill.model", ""]),
    ("distilled", ["--distill.features", "0", "--ema.decay", "0.5"]),
    ("plain", ["--distill.features", "1"]),
]


@pytest.mark.parametrize(("begins", "options"), CHANGES, ids=[f"{run} {' '.join(o)}" for run, o in CHANGES])
def test_options_may_change_when_a_run_is_resumed(begun, tmp_path: Path, begins: str, options: list[str]):
    if options == ["--distill.features", "1"]:
        options = [*DISTILLED, "--distill.checkpoint", str(begun["plain"] / "checkpoints" / "best.safetensors")]
    if "--precision" in options:
        AcceleratorState._reset_state(True)  # accelerate has one precision in a process
    run = resumed(begun[begins], tmp_path, *options, "--save_every", "0")
    before = run.bare_model.head.weight.clone()
    assert finish(run) == [0, 1]
    assert not torch.equal(run.bare_model.head.weight, before)
    kept = sorted(path.stem for path in (run.folder / "checkpoints").glob("epoch-*"))
    assert kept == ["epoch-0", "epoch-1"] * (run.config.keep_best > 1)
    assert read_description(run.folder / "checkpoints" / "best.safetensors")["epoch"] == 1
    if run.config.profile:
        assert (run.folder / "trace-4-20.json").exists()
    if "--precision" in options:
        AcceleratorState._reset_state(True)


def test_a_run_that_was_changed_can_be_resumed_again(begun, tmp_path: Path):
    run = resumed(begun["rich"], tmp_path, "--optim.name", "lion", "--freeze", "[]", "--keep_best", "1")
    finish(run)
    again = Trainer(*parse_train(["--resume", str(run.folder), "--keep_best", "2", "--epochs", "3"]))
    assert (again.epoch, again.best) == (2, 51)
    state = run.optimizer.state[run.bare_model.head.weight]["exp_avg"]
    assert torch.equal(again.optimizer.state[again.bare_model.head.weight]["exp_avg"], state)
    finish(again, lambda epoch: 10.0)
    kept = sorted(path.stem for path in (run.folder / "checkpoints").iterdir())
    assert kept == ["best", "epoch-1", "epoch-2", "last"]


def test_what_an_optimizer_is_told_anew_counts_and_what_it_has_learnt_stays(begun, tmp_path: Path):
    told = ["--optim.weight_decay", "0", "--optim.betas", "[0.5, 0.6]", "--optim.eps", "0.01", "--freeze", "[stem]"]
    run = resumed(begun["plain"], tmp_path, *told)
    groups = run.optimizer.param_groups
    assert {(tuple(group["betas"]), group["eps"], group["weight_decay"]) for group in groups} == {((0.5, 0.6), 0.01, 0)}
    saved = training_state(read_saved(begun["plain"] / "checkpoints" / "last.safetensors"))["optimizer"]["state"]
    learn = {name: parameter for name, parameter in run.bare_model.named_parameters() if parameter.requires_grad}
    assert len(run.optimizer.state) == len(learn) < len(saved)
    for name, parameter in learn.items():
        assert torch.equal(run.optimizer.state[parameter]["exp_avg"], saved[name]["exp_avg"])


def test_an_epoch_goes_on_after_as_many_images(begun, tmp_path: Path):
    assert (training_state(read_saved(begun["plain"] / "checkpoints" / "last.safetensors"))["update"]) == 2  # of 4
    assert resumed(begun["plain"], tmp_path / "a", "--data.batch_size", "8").update == 1
    assert resumed(begun["plain"], tmp_path / "b", "--data.batch_size", "2").update == 4
    assert resumed(begun["plain"], tmp_path / "c", "--data.batch_size", "16").update == 0


def test_the_best_of_fewer_epochs_is_among_the_best_of_more(begun, tmp_path: Path):
    run = resumed(begun["plain"], tmp_path, "--keep_best", "2")
    first = load_file(run.folder / "checkpoints" / "best.safetensors")
    run.ranking[0][0] = 99.0
    finish(run)
    assert [epoch for _, epoch in run.ranking] == [0, 1]
    for name in ("best", "epoch-0"):
        kept = load_file(run.folder / "checkpoints" / f"{name}.safetensors")
        assert all(torch.equal(kept[key], first[key]) for key in first)


def test_weights_that_are_gone_are_no_best(begun, tmp_path: Path):
    shutil.copytree(begun["plain"], tmp_path / "copy")
    (tmp_path / "copy" / "checkpoints" / "best.safetensors").unlink()
    run = Trainer(*parse_train(["--resume", str(tmp_path / "copy")]))
    assert run.best is None
    assert finish(run, lambda epoch: -epoch) == [0, 1]
    assert [epoch for _, epoch in run.ranking] == [1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--output", "elsewhere"], "option output cannot change"),
        (["--name", "other"], "option name cannot change"),
        (["--pretrained"], "option pretrained cannot change"),
        (["--checkpoint", "x.safetensors"], "option checkpoint cannot change"),
        (["--model", "test_van"], "option model cannot change"),
        (["--task", "segmentation"], "option task cannot change"),
        (["--loss.multi_label", "true"], "option loss.multi_label cannot change"),
        (["--model_kwargs.embed_dim", "8"], "option model_kwargs.embed_dim cannot change"),
        (["--profile", "1-3"], "profile is of no use: 1-3 is over"),
        (["--profile", "90-99"], "profile is of no use: 90-99 is past the end"),
    ],
)
def test_what_cannot_change_is_refused_and_nothing_is_written(begun, tmp_path: Path, options: list[str], told: str):
    before = {path: path.read_bytes() for path in begun["plain"].rglob("*") if path.is_file()}
    with pytest.raises(VisionattnError, match=told) as error:
        Trainer(*parse_train(["--resume", str(begun["plain"]), *options]))
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in begun["plain"].rglob("*") if path.is_file()} == before


def test_other_classes_are_refused_even_if_they_are_as_many(begun, images: str, tmp_path: Path):
    for split in ("train", "val"):
        shutil.copytree(Path(images, split, "dog"), tmp_path / split / "ape")
        shutil.copytree(Path(images, split, "cat"), tmp_path / split / "bee")
    with pytest.raises(VisionattnError, match="classes are not those of the data"):
        Trainer(*parse_train(["--resume", str(begun["plain"]), "--data.root", str(tmp_path)]))


def test_a_run_is_resumed_without_the_weights_that_it_started_from(begun, images: str, tmp_path: Path):
    start = tmp_path / "start.safetensors"
    shutil.copy(begun["plain"] / "checkpoints" / "best.safetensors", start)
    argv = [*QUICK, *PLAIN, "--checkpoint", str(start), "--data.root", images, "--output", str(tmp_path)]
    folder = killed(Trainer(*parse_train(argv)), 1, 1)
    start.unlink()
    run = Trainer(*parse_train(["--resume", str(folder)]))
    assert finish(run) == [0, 1] and run.config.checkpoint == str(start)


@pytest.mark.parametrize("task", TASKS)
def test_detection_and_segmentation_are_resumed_with_other_options(tmp_path: Path, task: str):
    folder = killed(Trainer(*parse_train([*SCENES, *TASKS[task], "--output", str(tmp_path)])), 1, 1)
    for options in (
        ["--joint.hflip", "0.5", "--joint.crop", "48", "--freeze", "[backbone]", "--keep_best", "2"],
        ["--joint.crop", "null", "--freeze", "[]", "--ema.decay", "0.9", "--data.batch_size", "4", "--epochs", "3"],
    ):
        run = Trainer(*parse_train(["--resume", str(folder), *options]))
        run._validate = lambda run=run: dict.fromkeys((run.task.metric, *run.task.shown), 3.0 + run.epoch)
        run.fit()
        assert run.best == 3.0 + run.epoch - 1


def begin(tmp_path: Path, images: str, *options: str) -> Trainer:
    return Trainer(*parse_train([*QUICK, *PLAIN, "--data.root", images, "--output", str(tmp_path / "runs"), *options]))


def spoil(run: Trainer, when: Callable[[int], bool]) -> Trainer:
    loss = run.loss
    run.loss = lambda model, x, y, update: loss(model, x, y, update) * (math.nan if when(update) else 1)
    return run


def test_a_run_that_diverges_before_its_first_checkpoint_leaves_what_it_tells_of(tmp_path: Path, images: str, capsys):
    run = spoil(begin(tmp_path, images, "--guard.max_bad_steps", "3", "--save_every", "0"), lambda update: True)
    with pytest.raises(VisionattnError, match="diverged"):
        run.fit()
    assert "all in skipped.csv" in capsys.readouterr().out
    assert len((run.folder / "skipped.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("foreign", ["notes.txt", "checkpoints/mine.safetensors", "sub/config.yaml", "trace-1-2.json"])
def test_what_is_not_of_the_beginning_keeps_a_run_folder(tmp_path: Path, images: str, foreign: str):
    run = begin(tmp_path, images)
    run._begin()
    kept = run.folder / foreign
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("x")
    remove_unused(run.folder)
    assert kept.exists() and (run.folder / "config.yaml").exists()
    kept.unlink()
    remove_unused(run.folder)
    assert not run.folder.exists()


def test_a_trace_is_kept_of_a_run_that_comes_to_nothing(tmp_path: Path, images: str):
    run = begin(tmp_path, images, "--profile", "0-3", "--save_every", "0")
    images, seen = run.train_batches.dataset, []
    load = images._load

    def failing(*key):
        seen.append(key)
        if len(seen) > 5:
            raise VisionattnError("cannot read it")
        return load(*key)

    images._load = failing
    with pytest.raises(VisionattnError, match="cannot read it"):
        run.fit()
    assert (run.folder / "trace-0-3.json").exists()


def test_a_validation_that_fails_loses_no_training(tmp_path: Path, images: str, monkeypatch):
    run = begin(tmp_path, images, "--save_every", "0")

    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(trainer_module, "evaluate", fail)
    with pytest.raises(RuntimeError, match="memory"):
        run.fit()
    monkeypatch.undo()
    again = Trainer(*parse_train(["--resume", str(run.folder), "--data.eval_batch_size", "1"]))
    assert (again.epoch, again.update) == (0, again.updates)
    assert torch.equal(again.bare_model.head.weight, run.bare_model.head.weight)


def test_a_dry_run_of_a_resumed_run_writes_nothing(begun, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("visionattn.training.run.SECONDS", 0.1)
    folder = tmp_path / "copy"
    shutil.copytree(begun["plain"], folder)
    state = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    init = Trainer.__init__

    def spoilt(self, *args):
        init(self, *args)
        self.update = self.updates  # between the last update and the validation
        spoil(self, lambda update: update % 4 == 1)

    monkeypatch.setattr(Trainer, "__init__", spoilt)
    assert train(*parse_train(["--resume", str(folder), "--dry_run", "true"])) is None
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == state
    told = capsys.readouterr().out
    assert "nothing was written" in told and "images/s" in told and "skipped.csv" not in told


def test_a_diverging_dry_run_is_one_clear_error(tmp_path: Path, images: str):
    run = spoil(
        begin(tmp_path, images, "--guard.max_bad_steps", "2", "--guard.on_divergence", "rollback"), lambda _: True
    )
    with pytest.raises(VisionattnError, match="diverged"):
        dry_run(run)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--optim.lr", "1e30", "--optim.clip_grad", "0"], "no best among 1 epochs: each ended in skipped updates"),
        ([], "best top1 nothing to count in 1 epochs"),
    ],
)
def test_a_run_without_a_best_epoch_says_so(tmp_path: Path, images: str, monkeypatch, capsys, options, told: str):
    monkeypatch.setattr(Trainer, "_validate", lambda self: {"top1": math.nan, "top5": math.nan, "loss": math.nan})
    config, _ = parse_train(
        [*QUICK, *PLAIN, "--data.root", images, "--output", str(tmp_path), "--epochs", "1", *options]
    )
    if options:
        init = Trainer.__init__
        monkeypatch.setattr(
            Trainer, "__init__", lambda self, *args: init(self, *args) or spoil(self, lambda _: True) and None
        )
    folder = train(config)
    out = capsys.readouterr().out
    assert told in out and "-1.0000" not in out
    best = folder / "checkpoints" / "best.safetensors"
    assert best.exists() == ("\nvalidate   " in out) == (not options)


def test_a_finished_run_that_kept_no_best_is_resumed(begun, tmp_path: Path, capsys):
    shutil.copytree(begun["plain"], tmp_path / "copy")
    (tmp_path / "copy" / "checkpoints" / "best.safetensors").unlink()
    train(*parse_train(["--resume", str(tmp_path / "copy"), "--epochs", "1"]))
    out = capsys.readouterr().out
    assert "no best among 1 epochs" in out and "\nvalidate   " not in out


def _add_rows(path: Path, writer: int, count: int) -> None:
    output = ResultFile(path, many=True)
    for row in range(count):
        output.add({"model": f"{writer}-{row}", "images": row, f"own_{writer % 2}": writer, "per_class": {}})


def test_writers_of_one_table_lose_no_rows(tmp_path: Path):
    path, context = tmp_path / "results.csv", multiprocessing.get_context("fork")
    writers = [context.Process(target=_add_rows, args=(path, writer, 15)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 4
    with open(path) as file:
        table = list(csv.DictReader(file))
    assert sorted(row["model"] for row in table) == sorted(f"{w}-{r}" for w in range(4) for r in range(15))
    assert all(row[f"own_{int(row['model'][0]) % 2}"] == row["model"][0] for row in table)
    assert os.listdir(tmp_path) == [path.name]


def test_runs_that_start_together_have_folders_of_their_own(tmp_path: Path):
    config, _ = parse_train(["--output", str(tmp_path), "--name", "mine"])
    (tmp_path / f".mine.{os.getpid()}").mkdir()  # of a run that was killed as it began, in another container
    made, barrier = [], threading.Barrier(8)

    def start():
        barrier.wait()
        made.extend(make_folder(config, lambda folder: (folder / "first").touch()).name for _ in range(5))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == sorted(["mine", *(f"mine-{i}" for i in range(2, 41))])
    assert all((tmp_path / name / "first").exists() and (tmp_path / name / "config.yaml").exists() for name in made)


def test_a_name_that_is_taken_in_the_last_moment_is_not_used(tmp_path: Path, monkeypatch):
    config, _ = parse_train(["--output", str(tmp_path), "--name", "mine"])
    rename, taken = Path.rename, []

    def late(self, target):
        if not taken:
            taken.append(target)
            (target / "checkpoints").mkdir(parents=True)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    assert make_folder(config, lambda folder: None).name == "mine-2"


def test_a_run_folder_that_cannot_be_filled_leaves_nothing(tmp_path: Path):
    def fill(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(VisionattnError, match="No space left"):
        make_folder(parse_train(["--output", str(tmp_path), "--name", "mine"])[0], fill)
    assert not os.listdir(tmp_path)


def test_what_others_put_into_a_run_folder_does_no_harm(begun, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(begun["rich"], folder)
    checkpoints = folder / "checkpoints"
    for stray in (".ipynb_checkpoints", ".tmpabcdef", "sub", ".last.safetensors.1.tmp"):
        (checkpoints / stray).mkdir()
        (checkpoints / stray / "copy.txt").write_text("mine")
    (folder / ".ipynb_checkpoints").mkdir()
    kept = [checkpoints / ".hidden", checkpoints / "epoch-1-mine.safetensors", folder / "notes.txt"]
    stale = [checkpoints / ".best.safetensors.77.tmp", checkpoints / ".tmpAb3xYz", folder / ".metrics.csv.tmp"]
    for path in (*kept, *stale):
        path.write_text("x")
    run = Trainer(*parse_train(["--resume", str(folder)]))
    assert finish(run) == [0, 1]
    assert all(path.exists() for path in kept) and not any(path.exists() for path in stale)
    assert all((checkpoints / stray / "copy.txt").exists() for stray in (".ipynb_checkpoints", ".tmpabcdef", "sub"))


def test_metrics_of_another_version_stay_in_the_table(begun, tmp_path: Path):
    shutil.copytree(begun["plain"], tmp_path / "copy")
    table = tmp_path / "copy" / "metrics.csv"
    table.write_text("epoch,val_mAP,seconds\n0,3.0,1\n")
    run = Trainer(*parse_train(["--resume", str(tmp_path / "copy")]))
    assert finish(run) == [0, 1]
    with open(table) as file:
        first, last = csv.DictReader(file)
    assert (first["val_mAP"], first["val_top1"], last["val_mAP"], last["val_top1"]) == ("3.0", "", "", "51.0000")


def test_types_of_numbers_survive_a_checkpoint(tmp_path: Path):
    state = {"optimizer": {"momentum_dtype": torch.bfloat16, "others": [torch.float32, None]}}
    save_checkpoint(tmp_path / "c.safetensors", {"w": torch.ones(1)}, {}, state)
    assert training_state(read_saved(tmp_path / "c.safetensors")) == state


def resumes_with_the_same_bits(tmp_path: Path, *argv: str) -> None:
    """Of two runs, one was killed in its second epoch."""
    argv = [*QUICK, *argv, "--data.img_size", "32", "--output", str(tmp_path)]
    whole = train(parse_train([*argv, "--name", "whole"])[0])
    stopped = killed(Trainer(*parse_train([*argv, "--name", "stopped"])), 1, 2, validates=True)  # which changes some
    train(*parse_train(["--resume", str(stopped)]))
    ours, theirs = (load_file(run / "checkpoints" / "last.safetensors") for run in (stopped, whole))
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", visionattn.list_models("test_*"))
def test_every_family_resumes_with_the_same_bits(images: str, tmp_path: Path, name: str):
    argv = "--model", name, "--model_kwargs.drop_path_rate", "0.1", "--data.root", images
    resumes_with_the_same_bits(tmp_path, *argv)
