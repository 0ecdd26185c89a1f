"""What the trainer costs beside the model: its updates against those of a bare loop, with a model that takes 1 ms.

Both loops take the same batches from memory, so that only what is between them is timed; they alternate.
"""

import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import Parser
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import visionattn
import visionattn.training.trainer as trainer_module
from visionattn.data.loader import Batch
from visionattn.errors import run as run_script
from visionattn.measure import positive
from visionattn.training.config import parse_train
from visionattn.training.logging import RunLog
from visionattn.training.trainer import Trainer


class Stub(nn.Module):
    """A linear head after a millisecond."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.head = nn.Linear(3, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        end = time.perf_counter() + 1e-3
        while time.perf_counter() < end:
            pass
        return self.head(x[:, :, 0, 0])


def millisecond(pretrained: bool = False, **kwargs) -> nn.Module:
    return Stub(**kwargs)


def bare_loop(model: nn.Module, batches: list[Batch], steps: int) -> float:
    """Seconds for so many steps as a script of ten lines takes them."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    start = time.perf_counter()
    for images, targets, _ in itertools.islice(itertools.cycle(batches), steps):
        loss = cross_entropy(model(images), targets, label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


def trainer_loop(run: Trainer, steps: int) -> float:
    """Seconds for so many updates of the trainer, with what it logs."""
    run.update, run.updates = 0, steps
    run.log.start_epoch(0, 0)
    start = time.perf_counter()
    run._train_epoch()
    return time.perf_counter() - start


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--steps", type=positive, default=200, help="steps of a repetition")
    parser.add_argument("--repeats", type=positive, default=7, help="of each loop, of which the median counts")
    args = parser.parse_args(argv)
    visionattn.register_model(millisecond)
    torch.set_num_threads(1)
    batches = [Batch(torch.randn(8, 3, 8, 8), torch.randint(10, (8,)), torch.arange(8)) for _ in range(16)]
    trainer_module.read_batches = lambda loader: itertools.cycle(batches)
    print("| trainer | bare loop ms | trainer ms | overhead ms |\n|---|---|---|---|")
    for name, more in (
        ("as the bare loop", ["--augment.mixup", "0"]),
        ("with mixup and EMA", ["--ema.decay", "0.999"]),
    ):
        with tempfile.TemporaryDirectory() as folder:
            options = ["--model", "millisecond", "--data.num_workers", "0", "--output", folder, *more]
            run = Trainer(*parse_train([*options, "--data.batch_size", "8"]))
            run.folder = Path(folder)
            run.log = RunLog(run.folder, run.accelerator, run.config, run.task, args.steps, 0)
            bare_loop(Stub(), batches, 20), trainer_loop(run, 20)
            pairs = [
                (bare_loop(Stub(), batches, args.steps), trainer_loop(run, args.steps)) for _ in range(args.repeats)
            ]
            bare, ours = (1e3 * statistics.median(times) / args.steps for times in zip(*pairs, strict=True))
            print(f"| {name} | {bare:.3f} | {ours:.3f} | {ours - bare:.3f} |", flush=True)


if __name__ == "__main__":
    sys.exit(run_script(main))
