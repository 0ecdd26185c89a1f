"""Runs whose weights are split over two processes by FSDP2: what they compute, leave behind and refuse."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file

from visionattn.errors import VisionattnError
from visionattn.training import trainer
from visionattn.training.config import parse_train, parse_validate
from visionattn.training.evaluation import make_accelerator, options_of, validate
from visionattn.training.run import train
from visionattn.training.sharding import check_sharding
from visionattn.training.trainer import Trainer

pytestmark = pytest.mark.slow
OPTIONS = ["--data.val_fraction", "0.8", "--data.num_workers", "0", "--epochs", "2", "--save_every", "6"]
OPTIONS += ["--optim.accumulation", "2", "--ema.decay", "0.9"]
OPTIONS += ["--data.eval_batch_size", "359"]  # of 1437 images the processes get 719 and 718: 3 batches and 2
DENSE = ["--task", "segmentation", "--annotations.scene_count", "32", "--annotations.scene_size", "64", "--epochs", "2"]
DENSE += ["--head_kwargs", '{"pyramid_channels": 32, "segmentation_channels": 32, "dropout": 0}', "--ema.decay", "0.9"]
DENSE += ["--schedule.warmup_epochs", "0", "--data.num_workers", "0", "--optim.lr", "1e-4"]
HALF, WHOLE = ["--data.batch_size", "8"], ["--data.batch_size", "16"]


def make_split_accelerator(precision: str, **kwargs):
    """What a launch with FSDP makes on GPUs; accelerate has no FSDP for CPUs, torch has."""
    accelerator = make_accelerator(precision, **kwargs)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


class Killed(BaseException):
    """Stands for a kill: nothing may run after it."""


class KilledTrainer(Trainer):
    """Stops in its second epoch, after a checkpoint."""

    def _make_update(self, batches):
        if (self.epoch, self.update) == (1, 8):
            raise Killed
        return super()._make_update(batches)


def main(output: str) -> None:
    """Runs of each of two processes: one to the end, one that is killed, copied and resumed."""
    trainer.make_accelerator = make_split_accelerator
    PartialState.destroy_process_group = lambda self, group=None: None  # torch keeps it for further runs of a process
    options = [*OPTIONS, *HALF, "--output", output, "--name"]
    train(*parse_train([*options, "whole"]))
    killed = KilledTrainer(*parse_train([*options, "resumed"]))
    try:
        killed.fit()
    except Killed:
        if os.environ["RANK"] == "0":
            shutil.copytree(killed.folder, Path(output, "killed"))
    train(*parse_train(["--resume", str(killed.folder)]))
    train(*parse_train([*DENSE, "--data.batch_size", "2", "--output", output, "--name", "dense"]))


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"{name}.safetensors")


def assert_same_metrics(ours: Path, theirs: Path) -> None:
    for our, their in zip(rows(ours), rows(theirs), strict=True):
        assert {key: float(value) for key, value in our.items()} == pytest.approx(
            {key: float(value) for key, value in their.items()}, rel=1e-4
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, __file__, output], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return output


def test_split_run_learns_as_one_process(tmp_path: Path, folder: Path):
    one = train(*parse_train([*OPTIONS, *WHOLE, "--output", str(tmp_path)]))
    assert_same_metrics(folder / "whole", one)
    ours, theirs = weights(folder / "whole", "last"), weights(one, "last")
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4, msg=key)


def test_split_segmenter_learns_as_one_process(tmp_path: Path, folder: Path):
    one = train(*parse_train([*DENSE, "--data.batch_size", "4", "--output", str(tmp_path)]))
    for ours, theirs in zip(rows(folder / "dense"), rows(one), strict=True):
        assert float(ours["train_loss"]) == pytest.approx(float(theirs["train_loss"]), rel=1e-4)
        assert float(ours["val_mIoU"]) == pytest.approx(float(theirs["val_mIoU"]), abs=0.1)


def test_resumed_split_run_ends_as_one_that_was_never_stopped(folder: Path):
    assert rows(folder / "resumed") == rows(folder / "whole")
    for name in ("last", "best"):
        ours, theirs = weights(folder / "resumed", name), weights(folder / "whole", name)
        assert ours.keys() == theirs.keys()
        assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]


def test_one_process_resumes_a_split_run(folder: Path):
    train(*parse_train(["--resume", str(folder / "killed"), *WHOLE]))
    assert_same_metrics(folder / "killed", folder / "whole")


def test_validation_repeats_what_a_split_run_recorded(folder: Path):
    checkpoint = folder / "whole" / "checkpoints" / "best.safetensors"
    results = validate(parse_validate(["--checkpoint", str(checkpoint), "--data.num_workers", "0"], options_of))
    best = max(rows(folder / "whole"), key=lambda row: float(row["val_top1"]))
    assert results["top1"] == pytest.approx(float(best["val_top1"]), abs=1e-3)
    assert results["loss"] == pytest.approx(float(best["val_loss"]), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "plugin", "told"),
    [
        (["--precision", "fp16"], {}, "bf16"),
        (["--channels_last"], {}, "channels_last"),
        (["--optim.name", "muon"], {}, "adamw"),
        (["--optim.clip_mode", "agc"], {}, "norm or value"),
        ([], {"cpu_offload": True}, "fsdp_offload_params"),
        ([], {"activation_checkpointing": True}, "--grad_checkpointing"),
        ([], {"fsdp_version": 1}, "fsdp_version"),
        ([], None, "fsdp2.yaml"),
    ],
)
def test_what_a_split_run_cannot_do_is_refused(options: list[str], plugin: dict | None, told: str):
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    if plugin is not None:
        plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2} | plugin)
        accelerator = SimpleNamespace(
            distributed_type=DistributedType.FSDP,
            is_fsdp2=plugin.fsdp_version == 2,
            state=SimpleNamespace(fsdp_plugin=plugin),
        )
    with pytest.raises(VisionattnError, match=told):
        check_sharding(parse_train(options)[0], accelerator)


if __name__ == "__main__":
    main(sys.argv[1])
