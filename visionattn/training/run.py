"""train.py: a run from its options to where its results are, or what it would need, measured on a few updates."""

import shlex
import signal
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..data.loader import read_batches
from .config import TrainConfig
from .evaluation import peak_memory, reset_peak_memory
from .guard import Stopped
from .logging import duration
from .trainer import Trainer

SECONDS = 20.0
"""Time given to the updates that are measured."""


def train(config: TrainConfig, resume: Path | None = None) -> Path | None:
    """Run train.py: train, tell where the results are, and return the run folder; None for a dry run.

    Raises:
        SystemExit: after SIGINT or SIGTERM, with 128 and the number of the signal, once the run is saved.
    """
    trainer = Trainer(config, resume)
    if config.dry_run:
        dry_run(trainer)
        return None
    try:
        folder = trainer.fit()
    except Stopped:
        received = trainer.signals.received or signal.SIGTERM  # another process's
        if trainer.accelerator.is_main_process:
            told = f"stopped by {signal.Signals(received).name} and saved"
            print(f"{told}; continue   {command('train')} --resume {shlex.quote(str(trainer.folder))}", flush=True)
        raise SystemExit(128 + received) from None
    if trainer.accelerator.is_main_process:
        checkpoint = folder / "checkpoints" / "best.safetensors"
        print(trainer.told_best())
        made = ("metrics.csv", "skipped.csv", "curves.png", "predictions/", "config.yaml", "checkpoints/")
        print(f"results    {folder}: {', '.join(name for name in made if (folder / name).exists())}")
        if checkpoint.exists():
            print(f"validate   {command('validate')} --checkpoint {shlex.quote(str(checkpoint))}")
        if {"tensorboard", "all"} & set(config.trackers):
            print(f"compare    tensorboard --logdir {shlex.quote(str(folder.parent))}")
    return folder


def command(name: str) -> str:
    """How `name`, "train" or "validate", is typed by who began this run: with the script, or an installed wheel's."""
    return f"python {name}.py" if Path(sys.argv[0]).name == "train.py" else f"visionattn {name}"


def dry_run(trainer: Trainer) -> None:
    """Train for some updates and print parameters, multiply-adds, peak memory, images/s and the time of the whole run.

    Args:
        trainer: of the run; it is of no further use.

    Raises:
        VisionattnError: if the updates do not go well.
    """
    accelerator, config, model = trainer.accelerator, trainer.config, trainer.bare_model
    trainer.guard.config = replace(trainer.guard.config, on_divergence="stop")  # there is nowhere to go back to
    trainer.folder, trainer.update = None, 0  # nothing is written to a run that is resumed, which may be between epochs
    reset_peak_memory(accelerator.device)
    updates = trainer.run_updates()
    began = time.perf_counter()
    next(updates)  # with what is done once: compiling, allocating, starting the processes that load
    start = time.perf_counter()
    update, count = start - began, 1
    if next(updates, None) is not None:  # all processes must make as many updates
        wanted = torch.tensor(int(SECONDS / (time.perf_counter() - start)), device=accelerator.device)
        count += sum(1 for _ in islice(updates, accelerator.gather(wanted).min().item()))
        update = (time.perf_counter() - start) / count
    memory = torch.tensor(peak_memory(accelerator.device), device=accelerator.device)

    start, seen = time.perf_counter(), 0
    weights = trainer.validated_weights().eval()
    with torch.no_grad(), accelerator.autocast():
        for images, _, _ in read_batches(trainer.val_batches):
            images = send_to_device(images, accelerator.device)
            trainer.task.predict(weights, images)
            seen += 1
            if time.perf_counter() - start > SECONDS:
                break
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        validation = (time.perf_counter() - start) / seen * len(trainer.val_batches)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # some torch count no fused ones
            trainer.task.predict(weights, images[:1])

    memory = accelerator.gather(memory).max().item()
    if not accelerator.is_main_process:
        return
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    total = config.epochs * (trainer.updates * update + validation)
    size = " x ".join(map(str, images[0].shape))
    print(f"model      {config.model}, {size} input")
    print(f"parameters {sum(p.numel() for p in model.parameters()) / 1e6:.3f} M, of which {learning:.3f} M learn")
    print(f"GMACs      {counter.get_total_flops() / 2e9:.3f} for an image, as it is executed")
    print(f"memory     {memory:.0f} MiB at its peak, in each process")
    print(f"images/s   {trainer.sampler.images_per_update / update:.1f} over {count} updates")
    print(f"time       {duration(total)} for {config.epochs} epochs of {trainer.updates} updates and validation")
    print("dry run: nothing was written")
