"""The training loop: plain PyTorch over accelerate. A run is a function of its options."""

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, send_to_device
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor

from ..backbone import Mechanics
from ..data.loader import Batch, Stream, choose_workers, derive_seed, read_batches
from ..errors import VisionattnError
from ..layers.product import get_pointwise, set_pointwise
from ..layers.spectral import SETTLED, advance
from ..monitoring import AttentionMonitor
from ..tasks import make_task
from ..weights.files import write_file
from .build import check_resumable, make_loaders, make_model, memory_format
from .checkpoint import read_saved, remove_temporaries, remove_unused
from .config import TrainConfig
from .distill import Distillation, check_own, make_teacher
from .evaluation import evaluate, make_accelerator
from .guard import Diverged, Guard, Signals, Stopped
from .logging import Gallery, Profiler, RunLog, check_trackers, check_window
from .optim import Schedule, make_optimizer
from .resume import Kept
from .sharding import check_sharding, distribute, gathered, joined
from .yaml_text import to_yaml


class Trainer(Kept):
    """One run: everything it needs is built, checked and, to resume, loaded before anything is written.

    Args:
        config: options of the run.
        resume: run folder to continue.
    """

    def __init__(self, config: TrainConfig, resume: Path | None = None) -> None:
        super().__init__()
        check_trackers(config.trackers)
        self.accelerator = accelerator = make_accelerator(
            config.precision,
            gradient_accumulation_steps=config.optim.accumulation,
            log_with=list(config.trackers) or None,
            project_dir=config.output,  # RunLog moves it to the run folder
        )
        check_sharding(config, accelerator)
        if accelerator.device.type == "cpu":  # threads that wait for a core which a loading process has are very slow
            workers = choose_workers(config.data.num_workers, accelerator.device, accelerator.num_processes)
            spare = (os.cpu_count() or 1) - workers
            torch.set_num_threads(max(1, min(torch.get_num_threads(), spare)))

        route = get_pointwise() if config.pointwise == "auto" else config.pointwise
        config = replace(config, pointwise=broadcast_object_list([route])[0])
        set_pointwise(config.pointwise)

        self.task = make_task(config)
        images = self.task.load()
        self.classes = images[0].classes
        saved = None if resume is None else read_saved(resume / "checkpoints" / "last.safetensors")
        if saved is not None:
            check_resumable(self.task, len(self.classes), saved)
        model, self.frozen = make_model(self.task, len(self.classes), accelerator, saved is not None)
        self.config = config = self.task.resolve(model)
        self.sampler, self.train_batches, self.val_batches = make_loaders(
            self.task, model, images, accelerator.process_index, accelerator.num_processes
        )
        self.updates = self.sampler.updates

        # What a paper adds to the loop is the model's own. Any module can be registered.
        self.mechanics = model if isinstance(model, Mechanics) else Mechanics()
        self.bare_model = self.student = model
        training_loss = self.mechanics.training_loss
        if config.distill.model:
            teacher = make_teacher(config.distill, len(self.classes)).to(accelerator.device)
            if self.mechanics.learns_from_teacher:
                check_own(config)
                self.mechanics.learn_from(teacher)
            else:
                distillation = Distillation(config, teacher, len(self.classes), model, accelerator)
                self.student, training_loss = distillation.student or model, distillation.loss
        self.loss = self.task.make_loss(images[0], training_loss).to(accelerator.device)
        optimizer = make_optimizer(config.optim, model, self.mechanics.learning_rates())
        if self.student is not model:
            optimizer.add_param_group({"params": list(self.student.projection.parameters())})
        self.schedule = Schedule(config, optimizer, self.updates)
        self.ema = ModelEmaV3(model, config.ema.decay, use_warmup=config.ema.warmup) if config.ema.decay else None
        self.monitor = AttentionMonitor(model) if config.monitor == "attention" else None
        if config.compile:
            self.student.compile()
        self.model, self.optimizer = distribute(accelerator, self.student, optimizer, self.ema and self.ema.module)
        self.guard, self.signals = Guard(config.guard, accelerator), Signals()
        self.profiler: Profiler | None = None
        self.folder = resume
        if saved is not None:
            self.go_on_from(saved)
        if config.profile:
            check_window(config.profile, config.epochs * self.updates, self.epoch * self.updates + self.update, resume)

    def fit(self) -> Path:
        """Train to the last epoch; the run folder.

        Raises:
            Stopped: after a signal, once the run is saved.
        """
        began_here = self.folder is None
        if began_here:
            self._begin()
        elif self.accelerator.is_main_process:
            write_file(self.folder / "config.yaml", to_yaml(self.config))
            remove_temporaries(self.folder)
        self.log = RunLog(self.folder, self.accelerator, self.config, self.task, self.updates, self.epoch)
        if self.config.profile and self.accelerator.is_main_process:
            self.profiler = Profiler(self.config.profile, self.folder)
        came_to_nothing = False
        try:
            with self.signals.noted():
                while not self._is_finished():
                    self.log.start_epoch(self.epoch, self.update)
                    try:
                        self._train_epoch()
                        self._end_epoch(self._validate())
                    except Diverged:
                        self._roll_back()
        except Stopped:
            self._save_last(regular=False)
            raise
        except VisionattnError:
            came_to_nothing = began_here and not self.has_saved
            raise
        finally:
            if self.profiler:
                self.profiler.stop()
            self.log.stop()
            if came_to_nothing and self.accelerator.is_main_process:
                remove_unused(self.folder)
        return self.folder

    def _is_finished(self) -> bool:
        patience = self.config.early_stopping
        stale = bool(patience and self.ranking) and self.epoch - 1 - self.ranking[0][1] >= patience
        return self.epoch >= self.config.epochs or stale

    def _train_epoch(self) -> None:
        config = self.config
        for loss in self.run_updates():
            self.log.step(self.sampler.images_per_update)
            if (self.update - 1) % config.log_every == 0 or self.update == self.updates:
                self.log.report(loss, self._lr())
            if self.monitor and (found := self.monitor.take()):
                self.log.watch(found)
            if config.save_every and self.update % config.save_every == 0 and self.update < self.updates:
                self._save_last()

    def run_updates(self) -> Iterator[float]:
        """Train to the end of the epoch; the loss of each update, once it is made.

        Raises:
            Stopped: after a signal.
            Diverged: if the run is to be rolled back.
        """
        self.model.train()
        for module in self.frozen:
            module.eval()
        self.sampler.epoch, self.sampler.first_update = self.epoch, self.update
        batches = read_batches(self.train_batches)
        while self.update < self.updates:
            try:
                parts = [next(batches) for _ in range(self.config.optim.accumulation)]
            except VisionattnError:
                # By the loading processes too, which ended. Processes that hold parts can only save together.
                if self.signals.received and not self.accelerator.is_fsdp2:
                    raise Stopped from None
                raise
            loss, stop = self._make_update(parts)
            yield loss
            if stop:
                raise Stopped

    def _make_update(self, batches: list[Batch]) -> tuple[float, bool]:
        """One update of the weights; its loss, and whether a process was told to stop."""
        accelerator, config = self.accelerator, self.config
        update = self.epoch * self.updates + self.update
        if self.profiler:
            self.profiler.step(update)
        self.schedule.step(update)
        self.mechanics.advance(update / self.updates)
        if config.sigma_reparam:
            advance(self.bare_model)
        losses = []
        for part, (images, targets, _) in enumerate(batches):
            # What the model draws (drop path, dropout) follows from the step too, so no state of generators is kept.
            self._seed(derive_seed(config.seed, Stream.MODEL, update, part, accelerator.process_index))
            images, targets = send_to_device((images, targets), accelerator.device, non_blocking=True)
            if isinstance(images, Tensor):
                images = images.to(memory_format=memory_format(config))
            with accelerator.accumulate(self.model):
                with self._watching(part):
                    loss = self.loss(self.model, images, targets, update)
                accelerator.backward(loss)
            losses.append(loss.detach())
        loss = torch.stack(losses).mean()
        bad = (loss + self._clip_gradients()).isfinite().logical_not()
        # What all processes must agree on goes in one message, and the device is waited for once.
        told = torch.stack([loss, bad.float(), bad.new_tensor(self.signals.received > 0).float()])
        loss, bad, stop = accelerator.reduce(told).tolist()
        loss /= accelerator.num_processes
        self._step(loss, bool(bad), torch.cat([batch.indices for batch in batches]))
        self.update += 1
        return loss, bool(stop)

    def _watching(self, part: int) -> AbstractContextManager:
        """Look at the forward pass of a batch, if it is one to be watched."""
        due = self.update % self.config.monitor_every == 0 or self.update == self.updates - 1
        if self.monitor is None or part or not due or not self.accelerator.is_main_process:
            return nullcontext()
        return self.monitor.watching()

    def _seed(self, seed: int) -> None:
        """Seed what the model draws with. torch.manual_seed keeps a stack trace for each device that is not there."""
        torch.default_generator.manual_seed(seed)
        if self.accelerator.device.type != "cpu":
            torch.get_device_module(self.accelerator.device).manual_seed(seed)

    def _clip_gradients(self) -> Tensor:
        """Clip the gradients; their norm before that."""
        optim, parameters = self.config.optim, self.model.parameters()
        by_norm = optim.clip_grad and optim.clip_mode == "norm"
        norm = joined(self.accelerator.clip_grad_norm_(parameters, optim.clip_grad if by_norm else math.inf))
        if optim.clip_grad and not by_norm:
            dispatch_clip_grad(self.model.parameters(), optim.clip_grad, mode=optim.clip_mode)
        return norm

    def _step(self, loss: float, bad: bool, images: Tensor) -> None:
        """Apply the gradients, unless they or the loss are bad."""
        scaler = self.accelerator.scaler
        # fp16 looks for its scale by trial: gradients that overflow are no fault of the data while it can be lowered.
        overflow = bad and scaler is not None and math.isfinite(loss) and scaler.get_scale() > 1
        if overflow or not bad:
            self.optimizer.step()
        elif scaler is not None:
            scaler.update()
        self.optimizer.zero_grad()
        if overflow:
            return
        if bad:
            self.guard.bad(self.folder, self.epoch, self.update, loss, images)
            return
        self.guard.good()
        self.train_loss += loss
        self.counted += 1
        if self.ema:
            self.ema.update(self.bare_model, step=self.epoch * self.updates + self.update + 1)

    def _validate(self) -> dict[str, float]:
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        images, model = self.val_batches.dataset.images, self.validated_weights().eval()
        if self.ema and self.config.sigma_reparam:  # averages of singular vectors are none
            advance(model, SETTLED)
        metrics, gallery = self.task.metrics(images, rank, processes), Gallery(self.task, images.classes)
        # Several processes go on together to the next update, where they stop together.
        held = gathered(model, self.accelerator) if processes > 1 else self.signals.stopping()
        predict = partial(self.task.predict, model)
        try:
            with held:
                found = evaluate(predict, self.val_batches, self.accelerator, metrics, gallery.add)
        except Exception:  # in all processes: what was trained is kept, and resuming validates it again
            self._save_last(regular=False)
            raise
        if picture := gallery.picture():
            self.log.show(self.epoch, picture)
        return found

    def _end_epoch(self, metrics: dict[str, float]) -> None:
        score = metrics[self.task.metric]
        score = -1.0 if math.isnan(score) else score  # as COCO's tools put that there is nothing to count
        self.schedule.observe(self.epoch, score)
        if not self.guard.in_a_row:  # weights that make no finite loss are not kept
            self._rank(score, metrics)
        train_loss = self.train_loss / self.counted if self.counted else math.nan
        best = math.nan if self.best is None or self.best < 0 else self.best
        self.log.end_epoch(train_loss, self._lr(), metrics, best)
        self.epoch, self.update = self.epoch + 1, 0
        self.train_loss, self.counted = 0.0, 0
        self._save_last(metrics)

    def _lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)


def __getattr__(name: str) -> Any:
    if name != "train":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    warnings.warn(f"{__name__}.train is {__package__}.run.train now", FutureWarning, stacklevel=2)
    return import_module(f"{__package__}.run").train
