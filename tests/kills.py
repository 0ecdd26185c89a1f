"""Kill train.py at random moments, resume it each time, and compare what it ends with to a run that was never killed.

    python tests/kills.py --kills 20 --task detection

Runs of some seconds on the digits, with mixup, or on scenes, with crops and flips; with EMA, accumulation and drop
path. Images are loaded by 0, 1 and 2 processes in turn; all runs must end with the same bits.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
OPTIONS = ["--optim.accumulation", "2", "--epochs", "4", "--ema.decay", "0.9", "--save_every", "2"]
OPTIONS += ["--model_kwargs.drop_path_rate", "0.2", "--keep_best", "2", "--trackers", "[]"]
SCENES = ["--annotations.scene_count", "96", "--data.batch_size", "4", "--data.eval_batch_size", "4"]
SCENES += ["--joint.scale", "[0.7,1.3]", "--joint.crop", "96", "--joint.hflip", "0.5", "--joint.photometric", "0.5"]
TASKS = {
    "classification": [
        *("--data.val_fraction", "0.8", "--data.batch_size", "16"),
        *("--augment.mixup", "0.5", "--augment.cutmix", "1"),
    ],
    "detection": [
        *SCENES,
        "--head",
        "mask_rcnn",
        "--head_kwargs",
        '{"fpn_channels": 16, "box_batch_size_per_image": 16}',
    ],
    "segmentation": [*SCENES, "--head_kwargs.pyramid_channels", "32", "--head_kwargs.segmentation_channels", "32"],
}


def start(*options: str) -> subprocess.Popen:
    """train.py with these options, on one thread."""
    command = [sys.executable, str(ROOT / "train.py"), *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def kill_until_done(
    begin: list[str], output: Path, workers: int, kills: int, moments: random.Random, longest: float
) -> int:
    """Run once, killed up to `kills` times; the number of kills that came before the end.

    Args:
        begin: Options of the run.
        output: Folder for the run folder, `run`.
        workers: Loading processes.
        kills: Kills at most.
        moments: Draws how long to wait after training has begun.
        longest: Seconds to wait at most.
    """
    last = output / "run" / "checkpoints" / "last.safetensors"
    begin = [*begin, "--output", str(output), "--name", "run", "--data.num_workers", str(workers)]
    options, done = begin, 0
    while True:
        process = start(*options)
        if done == kills:
            if process.wait():
                raise SystemExit(f"train.py ended with {process.returncode} after {done} kills")
            return done
        began = last.stat().st_mtime_ns if last.exists() else 0
        while process.poll() is None and (not last.exists() or last.stat().st_mtime_ns == began):
            time.sleep(0.01)
        try:
            process.wait(moments.uniform(0, longest))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done += 1
            states = "while a file was written" if list((output / "run").rglob(".*")) else ""
            print(f"  killed {done} {states}", flush=True)
            options = ["--resume", str(output / "run")]
            continue
        if process.returncode:
            raise SystemExit(f"train.py ended with {process.returncode} after {done} kills")
        return done


def differences(ours: Path, theirs: Path) -> list[str]:
    """What of two run folders' checkpoints and metrics differs in a bit."""
    kept, files = ({path.name for path in (folder / "checkpoints").iterdir()} for folder in (ours, theirs))
    if kept != files:
        return sorted(kept ^ files)
    found = []
    for name in sorted(files):
        a, b = (load_file(folder / "checkpoints" / name) for folder in (ours, theirs))
        found += [f"{name}: {key}" for key in a.keys() | b.keys() if key not in a or not torch.equal(a[key], b[key])]
    return found + (["metrics.csv"] if metrics(ours) != metrics(theirs) else [])


def metrics(folder: Path) -> list[str]:
    """The lines of metrics.csv but for their last column, the time."""
    return [line.rpartition(",")[0] for line in (folder / "metrics.csv").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--longest", type=float, default=4.0, help="seconds of training before a kill, at most")
    parser.add_argument("--task", choices=TASKS, default="classification", help="of the runs")
    args = parser.parse_args()
    begin = ["--task", args.task, *OPTIONS, *TASKS[args.task]]
    moments, left, workers, began = random.Random(args.seed), args.kills, 0, time.time()
    with tempfile.TemporaryDirectory() as folder:
        if start(*begin, "--output", folder, "--name", "whole", "--data.num_workers", "1").wait():
            raise SystemExit("train.py failed without a kill")
        print(f"a run that is not killed takes {time.time() - began:.0f} s with its start", flush=True)
        while left:
            run = tempfile.mkdtemp(dir=folder)
            print(f"{workers} loading processes", flush=True)
            left -= kill_until_done(begin, Path(run), workers, min(left, -(-args.kills // 3)), moments, args.longest)
            if found := differences(Path(run, "run"), Path(folder, "whole")):
                raise SystemExit(f"differs: {', '.join(found)}")
            print("  the same bits", flush=True)
            workers = (workers + 1) % 3
    print(f"{args.kills} kills in {time.time() - began:.0f} s: no bit differs")


if __name__ == "__main__":
    main()
