"""What a run does when numbers, signals and disks misbehave, when it stops early, and in how many processes it runs."""

import csv
import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import kills
import pytest
import torch
from safetensors.torch import load_file

import visionattn.training.trainer as trainer_module
from visionattn.errors import VisionattnError
from visionattn.training.checkpoint import read_saved, save_checkpoint, training_state
from visionattn.training.config import parse_train
from visionattn.training.guard import PAUSE, Signals, Stopped
from visionattn.training.run import train
from visionattn.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
QUICK = ["--data.val_fraction", "0.8", "--data.num_workers", "0", "--epochs", "2", "--data.batch_size", "32"]
ROLLBACK = ["--guard.on_divergence", "rollback", "--guard.max_bad_steps", "3", "--save_every", "4", "--epochs", "3"]


def trainer(tmp_path: Path, *options: str) -> Trainer:
    return Trainer(*parse_train([*QUICK, "--output", str(tmp_path), *options]))


def resumed(folder: Path) -> Trainer:
    return Trainer(*parse_train(["--resume", str(folder)]))


def weights(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"{name}.safetensors")


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]


def spoil(run: Trainer, when, what: float = float("nan")) -> Trainer:
    """Make the loss of some updates not finite: those for which `when(update, run)`."""
    loss = run.loss

    def spoilt(model, images, targets, update):
        return loss(model, images, targets, update) * (what if when(update, run) else 1)

    run.loss = spoilt
    return run


def test_updates_that_are_not_finite_are_skipped_and_listed(tmp_path: Path, capsys):
    run = spoil(trainer(tmp_path, "--ema.decay", "0.5", "--optim.accumulation", "2"), lambda update, _: update == 2)
    order = [index for batch in list(run.sampler)[4:6] for _, index in batch]
    updates = run.run_updates()
    run._begin()
    next(updates), next(updates)
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in (run.bare_model, run.ema.module)]
    next(updates)
    for old, model in zip(before, (run.bare_model, run.ema.module), strict=True):
        assert_same_weights(model.state_dict(), old)
    next(updates)
    assert not torch.equal(run.bare_model.head.weight, before[0]["head.weight"])
    with open(run.folder / "skipped.csv") as file:
        (row,) = csv.DictReader(file)
    assert (row["epoch"], row["update"], row["loss"]) == ("0", "2", "nan")
    assert row["images"].split() == [str(index) for index in sorted(order)]
    assert "skipped update 3 of epoch 1: loss nan; images " in capsys.readouterr().out
    assert (run.counted, run.guard.skipped, run.guard.in_a_row) == (3, 1, 0)


def test_too_many_skipped_updates_stop_the_run(tmp_path: Path):
    run = spoil(trainer(tmp_path, "--guard.max_bad_steps", "4"), lambda update, _: update >= 13, float("inf"))
    with pytest.raises(VisionattnError, match="diverged: 4 updates in a row .* update 6 of epoch 2.*optim.lr"):
        run.fit()
    assert training_state(read_saved(run.folder / "checkpoints" / "last.safetensors"))["epoch"] == 1


def diverging(run: Trainer) -> Trainer:
    run.taken = []
    return spoil(
        run, lambda update, run: run.taken.append(update) or (update in (9, 10, 11) and run.schedule.factor > 0.3)
    )


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    run = scored(diverging(trainer(tmp_path_factory.mktemp("runs"), *ROLLBACK)), [1, 2, 3])
    run.fit()
    return run


def test_a_diverged_run_rolls_back_and_goes_on_with_a_lower_rate(rolled_back: Trainer):
    assert rolled_back.guard.rollbacks == 2 and rolled_back.schedule.factor == 0.25
    assert rolled_back.taken == [*range(12), *range(8, 12), *range(8, 33)]  # twice to the save after eight
    lines = (rolled_back.folder / "skipped.csv").read_text().splitlines()[1:]
    assert [line.split(",")[:2] for line in lines] == 2 * [["0", "9"], ["0", "10"], ["1", "0"]]
    with open(rolled_back.folder / "metrics.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2"]
    assert sorted(path.name for path in (rolled_back.folder / "checkpoints").iterdir()) == [
        "best.safetensors",
        "last.safetensors",
    ]


@pytest.mark.parametrize("at", [6, 10, 14])
def test_a_run_that_rolls_back_may_be_interrupted_anywhere(tmp_path: Path, rolled_back: Trainer, at: int):
    run, told = scored(diverging(trainer(tmp_path, *ROLLBACK)), [1, 2, 3]), []
    loss = run.loss

    def interrupted(model, images, targets, update):
        if update == at and not told:
            told.append(os.kill(os.getpid(), signal.SIGTERM))
        return loss(model, images, targets, update)

    run.loss = interrupted
    with pytest.raises(Stopped):
        run.fit()
    again = scored(diverging(resumed(run.folder)), [1, 2, 3])
    assert 11 * again.epoch + again.update == at + 1
    again.fit()
    assert_same_weights(weights(run.folder), weights(rolled_back.folder))
    assert (run.folder / "skipped.csv").read_text() == (rolled_back.folder / "skipped.csv").read_text()


def test_a_signal_in_a_validation_ends_it_and_the_validation_is_made_again(tmp_path: Path, monkeypatch):
    whole, run = trainer(tmp_path, "--name", "whole"), trainer(tmp_path)
    whole.fit()
    evaluate = trainer_module.evaluate
    monkeypatch.setattr(
        trainer_module, "evaluate", lambda *args: (os.kill(os.getpid(), signal.SIGINT), evaluate(*args))[1]
    )
    with pytest.raises(Stopped):
        run.fit()
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again = resumed(run.folder)
    assert (again.epoch, again.update) == (0, 11)
    again.fit()
    assert_same_weights(weights(run.folder), weights(whole.folder))


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    signals = Signals()
    with signals.noted():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # what a launcher hands on
        assert signals.received == signal.SIGINT and not ended
        signals.since -= PAUSE
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [143]


def launch(*command: str, **kwargs) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **kwargs,
    )


def test_sigterm_to_all_processes_of_a_run_saves_it(tmp_path: Path):
    options = [*QUICK, "--output", str(tmp_path), "--epochs", "9", "--data.num_workers", "1", "--log_every", "1"]
    process = launch(ROOT / "train.py", *options)
    line = process.stdout.readline()
    assert line.startswith("epoch 1/9"), line + process.stderr.read()
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143, err
    assert "stopped by SIGTERM and saved; continue   python train.py --resume" in out and not err
    assert training_state(read_saved(tmp_path / "test_dinat-digits" / "checkpoints" / "last.safetensors"))["epoch"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_two_processes_at_the_same_update(tmp_path: Path, number: int):
    options = [*QUICK, "--output", str(tmp_path), "--data.batch_size", "16", "--epochs", "3", "--data.num_workers", "1"]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ROOT / "train.py"]
    whole = launch(*two, *options, "--name", "whole")
    assert whole.wait() == 0, whole.stderr.read()
    process = launch(*two, *options, "--name", "part")
    process.stdout.readline()
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert "and saved; continue" in out, err
    process = launch(*two, "--resume", str(tmp_path / "part"))
    assert process.wait() == 0, process.stderr.read()
    assert_same_weights(weights(tmp_path / "part"), weights(tmp_path / "whole"))


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path):
    run = trainer(tmp_path)
    run._begin()
    last = run.folder / "checkpoints" / "last.safetensors"
    before = last.read_bytes()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(VisionattnError, match=f"cannot write {last}: .*File too large") as error:
            run._save_last()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "\n" not in str(error.value)
    assert os.listdir(last.parent) == ["last.safetensors"] and last.read_bytes() == before


def test_a_checkpoint_that_reads_back_otherwise_is_not_put_in_place(tmp_path: Path, monkeypatch):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"w": torch.ones(2)}, {})
    import visionattn.weights.files as files

    save_file = files.save_file

    def flipped(tensors, file, metadata):
        save_file(tensors, file, metadata)
        content = bytearray(Path(file).read_bytes())
        content[-1] ^= 1
        Path(file).write_bytes(content)

    monkeypatch.setattr(files, "save_file", flipped)
    with pytest.raises(VisionattnError, match="damaged"):
        save_checkpoint(path, {"w": torch.zeros(2)}, {})
    assert torch.equal(load_file(path)["w"], torch.ones(2)) and os.listdir(tmp_path) == [path.name]


def scored(run: Trainer, scores: list[float]) -> Trainer:
    """A run whose validations give these scores."""
    run._validate = lambda: {"top1": scores[run.epoch], "top5": 0.0, "loss": 0.0}
    return run


def test_the_best_epochs_are_kept(tmp_path: Path):
    run = scored(trainer(tmp_path, "--keep_best", "2", "--epochs", "5"), [3, 5, 4, 5, 2])
    run.fit()
    names = sorted(path.stem for path in (run.folder / "checkpoints").iterdir())
    assert names == ["best", "epoch-1", "epoch-3", "last"]
    assert_same_weights(weights(run.folder, "best"), weights(run.folder, "epoch-1"))


def test_early_stopping_counts_over_interruptions(tmp_path: Path):
    scores = [3, 5, 4, 5, 2, 9]
    run = scored(trainer(tmp_path, "--early_stopping", "3", "--epochs", "6"), scores)
    train_epoch = run._train_epoch
    run._train_epoch = lambda: (train_epoch(), run.epoch == 3 and os.kill(os.getpid(), signal.SIGTERM))
    evaluate, run._validate = run._validate, lambda: (run.signals.stopping().__enter__(), evaluate())[1]
    with pytest.raises(Stopped):
        run.fit()
    again = scored(resumed(run.folder), scores)
    again.fit()
    assert again.epoch == 5 and again.best == 5
    again = scored(resumed(run.folder), scores)
    again.fit()
    assert again.epoch == 5


def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path):
    begin = [*kills.OPTIONS, *kills.TASKS["classification"]]
    train(*parse_train([*begin, "--output", str(tmp_path), "--name", "whole", "--data.num_workers", "0"]))
    kills.kill_until_done(begin, tmp_path, 1, 1, random.Random(3), 2.0)
    assert kills.differences(tmp_path / "run", tmp_path / "whole") == []


@pytest.mark.slow
@pytest.mark.parametrize(("task", "count"), [("classification", 20), ("detection", 6), ("segmentation", 6)])
def test_kills_change_no_bit(monkeypatch, task: str, count: int):
    monkeypatch.setattr(sys, "argv", ["kills.py", "--kills", str(count), "--task", task])
    kills.main()


STEPS = """
import json, sys
from visionattn.training.config import parse_train
from visionattn.training.trainer import Trainer

run = Trainer(*parse_train(sys.argv[1:]))
losses = []
while len(losses) < 20:
    losses += run.run_updates()
    run.epoch, run.update = run.epoch + 1, 0
if run.accelerator.is_main_process:
    print(json.dumps(losses[:20]), flush=True)
"""


def test_two_processes_take_the_steps_of_one(tmp_path: Path):
    (tmp_path / "steps.py").write_text(STEPS)
    options = [
        "--data.val_fraction",
        "0.5",
        "--data.num_workers",
        "0",
        "--augment.re_prob",
        "0.5",
        "--output",
        tmp_path,
    ]
    found = []
    for processes in (1, 2):
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        batch = ["--data.batch_size", str(32 // processes)]
        process = launch(*command, tmp_path / "steps.py", *options, *batch, cwd=ROOT)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        found.append(json.loads(out.splitlines()[-1]))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
