"""Training and validation: what a run leaves behind, resuming, determinism, options, and how bad input is refused."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import visionattn
from visionattn.errors import VisionattnError, run
from visionattn.training.checkpoint import read_saved, save_checkpoint, training_state
from visionattn.training.config import parse_train, parse_validate
from visionattn.training.evaluation import options_of, validate
from visionattn.training.run import train
from visionattn.training.trainer import Trainer
from visionattn.weights import load_checkpoint
from visionattn.weights.description import read_description

ROOT = Path(__file__).parents[1]
QUICK = ["--data.val_fraction", "0.8", "--data.num_workers", "0", "--epochs", "2", "--data.batch_size", "32"]
RICH = ["--ema.decay", "0.9", "--augment.mixup", "0.5", "--augment.cutmix", "1", "--optim.accumulation", "2"]
RICH += ["--epochs", "3", "--save_every", "2", "--model_kwargs.drop_path_rate", "0.2", "--loss.smoothing", "0.1"]


def trainer(tmp_path: Path, *options: str) -> Trainer:
    return Trainer(*parse_train([*QUICK, "--output", str(tmp_path), *options]))


def train_quickly(tmp_path: Path, *options: str) -> Path:
    return train(*parse_train([*QUICK, "--output", str(tmp_path), *options]))


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def weights(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"{name}.safetensors")


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_quickly(tmp_path_factory.mktemp("runs"), "--ema.decay", "0.9")


def script(name: str, *options: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.run([sys.executable, ROOT / name, *options], capture_output=True, text=True, env=env)


def test_run_folder_is_complete(folder: Path):
    assert folder.name == "test_dinat-digits"
    assert [row["epoch"] for row in rows(folder)] == ["0", "1"]
    assert Image.open(folder / "curves.png").width > 300
    assert list(folder.rglob("events.out.tfevents.*"))
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
    description = read_description(folder / "checkpoints" / "best.safetensors")
    assert description["model"] == "test_dinat" and description["model_kwargs"]["num_classes"] == 10
    assert description["classes"] == [str(i) for i in range(10)]
    assert description["preprocessing"]["input_size"] == [3, 32, 32]
    model = visionattn.create_model("test_dinat", num_classes=10)
    for name in ("best", "last"):
        load_checkpoint(model, folder / "checkpoints" / f"{name}.safetensors")


def test_config_file_is_complete_and_runs_again(folder: Path, tmp_path: Path):
    options = yaml.safe_load((folder / "config.yaml").read_text())
    assert options["data"]["mean"] and options["optim"]["betas"] is None and options["data"]["name"] == "digits"
    again = train(*parse_train(["--config", str(folder / "config.yaml"), "--output", str(tmp_path)]))
    assert rows(again) == rows(folder)
    assert_same_weights(weights(again), weights(folder))


def test_validation_repeats_what_training_recorded(folder: Path, tmp_path: Path):
    best = max(rows(folder), key=lambda row: float(row["val_top1"]))
    results = tmp_path / "results.json"
    checkpoint = folder / "checkpoints" / "best.safetensors"
    done = script("validate.py", "--checkpoint", str(checkpoint), "--output", str(results))
    assert done.returncode == 0, done.stderr
    assert f"top-1      {best['val_top1']} %" in done.stdout and f"loss       {best['val_loss']}" in done.stdout
    recorded = read_description(checkpoint)["metrics"]
    written = json.loads(results.read_text())
    assert {key: written[key] for key in recorded} == recorded
    assert (
        validate(parse_validate(["--checkpoint", str(checkpoint), "--data.num_workers", "0"], options_of)) == recorded
    )


def test_names_of_run_folders_are_never_reused(tmp_path: Path):
    names = [train_quickly(tmp_path, "--epochs", "1", "--name", "mine").name for _ in range(2)]
    assert names == ["mine", "mine-2"]


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_quickly(tmp_path_factory.mktemp("runs"), *RICH)


class Killed(BaseException):
    """Stands for a kill: nothing may run after it."""


@pytest.mark.parametrize("where", ["in an epoch", "before the metrics", "before the last checkpoint", "after an epoch"])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(tmp_path: Path, monkeypatch, never_stopped, where: str):
    stopped = trainer(tmp_path, *RICH)
    save, loss = stopped._save, stopped.loss
    saves = []

    def stop_at_save(name: str, *args, **kwargs) -> None:
        saves.append((name, stopped.epoch, stopped.update))
        if where == "before the metrics" and saves[-1][:2] == ("best", 1):
            raise Killed
        if where == "before the last checkpoint" and saves[-1] == ("last", 2, 0):
            raise Killed
        save(name, *args, **kwargs)
        if where == "after an epoch" and saves[-1] == ("last", 2, 0):
            raise Killed

    def stop_at_loss(model, images, targets, update):
        if where == "in an epoch" and update == stopped.updates + 3:
            raise Killed
        return loss(model, images, targets, update)

    monkeypatch.setattr(stopped, "_save", stop_at_save)
    monkeypatch.setattr(stopped, "loss", stop_at_loss)
    with pytest.raises(Killed):
        stopped.fit()

    resumed = train(*parse_train(["--resume", str(stopped.folder)]))
    assert resumed == stopped.folder
    assert rows(resumed) == rows(never_stopped)
    for name in ("last", "best"):
        assert_same_weights(weights(resumed, name), weights(never_stopped, name))


def test_resume_goes_on_beyond_the_end(tmp_path: Path):
    folder = train_quickly(tmp_path, "--epochs", "1")
    train(*parse_train(["--resume", str(folder)]))
    assert len(rows(folder)) == 1
    train(*parse_train(["--resume", str(folder), "--epochs", "2"]))
    assert [row["epoch"] for row in rows(folder)] == ["0", "1"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["epochs"] == 2


def test_kill_leaves_loadable_checkpoints(tmp_path: Path):
    command = [sys.executable, ROOT / "train.py", *QUICK, "--output", str(tmp_path), "--epochs", "50"]
    process = subprocess.Popen(
        [*command, "--save_every", "1"], stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    last = tmp_path / "test_dinat-digits" / "checkpoints" / "last.safetensors"
    deadline = time.time() + 300
    while not (last.exists() and training_state(read_saved(last))["epoch"]) and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    epoch = training_state(read_saved(last))["epoch"]
    for name in ("best", "last"):
        load_checkpoint(visionattn.create_model("test_dinat", num_classes=10), last.with_name(f"{name}.safetensors"))
    train(*parse_train(["--resume", str(tmp_path / "test_dinat-digits"), "--epochs", str(epoch + 1)]))
    assert [row["epoch"] for row in rows(tmp_path / "test_dinat-digits")] == [str(i) for i in range(epoch + 1)]


def test_accumulated_gradients_equal_those_of_a_big_batch(tmp_path: Path):
    options = ["--epochs", "1", "--optim.name", "sgd", "--optim.lr", "0.05", "--augment.mixup", "1"]
    big = train_quickly(tmp_path, *options, "--data.batch_size", "32")
    parts = train_quickly(tmp_path, *options, "--data.batch_size", "8", "--optim.accumulation", "4")
    theirs = load_file(parts / "checkpoints" / "best.safetensors")
    for key, value in load_file(big / "checkpoints" / "best.safetensors").items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_two_processes_train_as_one(tmp_path: Path):
    options = [*QUICK, "--output", str(tmp_path), "--epochs", "1", "--optim.name", "sgd", "--augment.mixup", "1"]
    one = train(*parse_train([*options, "--name", "one"]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ROOT / "train.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, *options, "--name", "two", "--data.batch_size", "16"], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    (ours,), (theirs,) = rows(tmp_path / "two"), rows(one)
    for key in ("train_loss", "val_loss", "val_top1"):
        assert float(ours[key]) == pytest.approx(float(theirs[key]), rel=1e-3)


def test_any_state_survives_a_checkpoint(tmp_path: Path):
    state = {"a": [1, 2.5, None, (True, "x")], "b": {0: {"t": torch.arange(6).view(2, 3).T}}, "inf": float("inf")}
    save_checkpoint(tmp_path / "c.safetensors", {"w": torch.ones(2)}, {"model": "m"}, state)
    read = training_state(read_saved(tmp_path / "c.safetensors"))
    assert torch.equal(read["b"][0].pop("t"), state["b"][0].pop("t"))
    assert read == state
    assert os.listdir(tmp_path) == ["c.safetensors"]


def test_tied_parameters_survive_a_checkpoint(tmp_path: Path):
    model = visionattn.create_model("test_sparsifiner", share_inout_proj=True)
    save_checkpoint(tmp_path / "c.safetensors", model.state_dict(), {"model": "test_sparsifiner"})
    other = visionattn.create_model("test_sparsifiner", share_inout_proj=True)
    load_checkpoint(other, tmp_path / "c.safetensors")
    assert_same_weights(other.state_dict(), model.state_dict())


def test_files_and_command_line_override_each_other_in_order(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("epochs: 3\nseed: 4\ndata: {batch_size: 8}\n")
    (tmp_path / "b.yaml").write_text("seed: 5\ndata: {num_workers: 0}\n")
    files = ["--config", str(tmp_path / "a.yaml"), f"--config={tmp_path / 'b.yaml'}"]
    config, _ = parse_train(["--data.batch-size", "16", *files, "--pretrained", "--model-kwargs.drop_path_rate", "0.1"])
    assert (config.epochs, config.seed, config.data.batch_size, config.data.num_workers) == (3, 5, 16, 0)
    assert config.pretrained and config.model_kwargs == {"drop_path_rate": 0.1}


@pytest.mark.parametrize("name", ["train.py", "validate.py"])
def test_help_explains_every_option(name: str):
    text = " ".join(script(name, "--help").stdout.split())
    options = re.split(r" (?=--[a-z_.]+ )", text[text.index("--config CONFIG YAML") :])
    for option in options:
        if not option.startswith(("--print_config", "--data CONFIG", "--help")) and "CONFIG Path to" not in option:
            assert re.search(r"[a-z]{3,} [a-z]+", option.partition("(type")[0]), option


IMAGES = ["--data.name", "folder", "--data.root", "images"]


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(capsys, monkeypatch, main, *options: str) -> str:
    """The one line on stderr of a script that exits with code 2."""
    monkeypatch.setattr(sys, "argv", ["script", *options])
    capsys.readouterr()
    assert run(main) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def train_main(argv: list[str]) -> None:
    train(*parse_train(argv))


def validate_main(argv: list[str]) -> None:
    validate(parse_validate(argv, options_of))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--data.root", "nowhere"], "nowhere does not exist"),
        (["--model", "test_dinta"], "test_dinat"),
        (["--model_kwargs.windows", "3"], "windows"),
        (["--data.bath_size", "3"], "did you mean --data.batch_size"),
        (["--batch-size", "3"], "did you mean --data.batch_size"),
        (["--config", "typo.yaml"], "data.num_workers"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", "broken.yaml"], "broken.yaml"),
        (["--epochs", "many"], "epochs"),
        (["--epochs", "0"], "epochs"),
        (["--precision", "fp8"], "bf16"),
        (["stray"], "stray"),
        (["--optim.name", "adamm"], "adam"),
        (["--augment.auto_augment", "foo"], "foo"),
        (["--augment.mixup", "1", "--data.batch_size", "7"], "odd"),
        (["--data.name", "foo"], "foo"),
        (["--data.name", "torch/cifar10", "--data.root", "."], "torch/cifar10"),
        (["--checkpoint", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--checkpoint", "truncated.safetensors"], "truncated.safetensors"),
        (["--resume", "nowhere"], "nowhere"),
        (["--resume", "."], "not a run folder"),
        (["--resume", "run", "--model", "test_dinat", "--model_kwargs.embed_dim", "8"], "embed_dim cannot change"),
        (["--trackers", "[foo]"], "foo"),
        (["--output", "truncated.safetensors"], "truncated.safetensors"),
    ],
)
def test_bad_input_of_training_is_refused_in_one_line(
    tmp_path: Path, monkeypatch, capsys, folder: Path, options: list[str], told: str
):
    monkeypatch.chdir(tmp_path)
    Path("typo.yaml").write_text("data: {num_worker: 3}\n")
    Path("broken.yaml").write_text("data: [\n")
    last = (folder / "checkpoints" / "last.safetensors").read_bytes()
    Path("truncated.safetensors").write_bytes(last[:5000])
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/config.yaml").write_text((folder / "config.yaml").read_text())
    Path("run/checkpoints/last.safetensors").write_bytes(last)
    before = tree(tmp_path)
    assert told in refusal(capsys, monkeypatch, train_main, *options)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "--checkpoint"),
        (["--checkpoint", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--checkpoint", "truncated.safetensors"], "truncated.safetensors"),
        (["--checkpoint", "best.safetensors", "--model", "dinat_mini"], "dinat_mini"),
        (["--checkpoint", "best.safetensors", "--data.root", "images"], "folder"),
        (["--checkpoint", "best.safetensors", *IMAGES, "--data.val_fraction", "1"], "not trained on"),
        (["--model", "test_dinat"], "1000"),
        (["--chekpoint", "best.safetensors"], "did you mean --checkpoint"),
    ],
)
def test_bad_input_of_validation_is_refused_in_one_line(
    tmp_path: Path, monkeypatch, capsys, folder: Path, options: list[str], told: str
):
    monkeypatch.chdir(tmp_path)
    best = (folder / "checkpoints" / "best.safetensors").read_bytes()
    Path("best.safetensors").write_bytes(best)
    Path("truncated.safetensors").write_bytes(best[:-1000])
    for name in ("cat", "dog"):
        Path("images", name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(Path("images", name, "a.png"))
    before = tree(tmp_path)
    assert told in refusal(capsys, monkeypatch, validate_main, *options)
    assert tree(tmp_path) == before


def test_unreadable_image_stops_the_script_in_one_line(tmp_path: Path):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(30):
            Image.new("RGB", (32, 32), (i, 90, 200)).save(tmp_path / "images" / name / f"{i}.png")
    broken = tmp_path / "images" / "dog" / "7.png"
    broken.write_bytes(b"not an image")
    before = tree(tmp_path)
    output = ["--output", str(tmp_path / "runs"), "--data.batch_size", "4", "--data.num_workers", "1"]
    done = script("train.py", "--data.root", str(tmp_path / "images"), *output)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: cannot read {broken}") and done.stderr.count("\n") == 1, done.stderr
    assert f"visionattn check {tmp_path / 'images'}\n" in done.stderr
    (folder,) = (tmp_path / "runs").iterdir()  # it is one to validate on: what was trained until then is kept
    assert training_state(read_saved(folder / "checkpoints" / "last.safetensors"))["counted"] > 0
    after = tree(tmp_path)
    assert {path: after[path] for path in before} == before


def test_diverging_loss_stops_the_run(tmp_path: Path):
    with pytest.raises(VisionattnError, match="diverged: 10 updates in a row .*optim.lr"):
        train_quickly(tmp_path, "--optim.name", "sgd", "--optim.lr", "1e30", "--optim.clip_grad", "0")


@pytest.mark.slow
def test_default_run_reads_digits(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", ROOT / "train.py", "--output", str(tmp_path)],
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert max(float(row["val_top1"]) for row in rows(tmp_path / "test_dinat-digits")) >= 97
