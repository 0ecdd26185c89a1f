"""The training loop: plain PyTorch over accelerate. A run is a function of its options."""

import difflib
import itertools
import math
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import nn

from ..backbone import Backbone
from ..data.config import user_input
from ..data.datasets import dataset_name, load_datasets
from ..data.loader import Stream, TrainSampler, derive_seed, eval_loader, read_batches, train_loader
from ..data.transforms import eval_transform, preprocessing, resolve_preprocessing, train_transform
from ..errors import VisionattnError
from ..registry import create_model
from ..tasks.classification import Classification
from ..weights import load_checkpoint
from .checkpoint import read_training_state, save_checkpoint, write_text
from .config import OptimConfig, TrainConfig, plain, to_yaml
from .evaluation import evaluate, image_mode, make_accelerator
from .logging import RunLog


class Trainer:
    """One run: everything it needs is built, checked and, to resume, loaded before anything is written.

    Args:
        config: Options of the run.
        resume: Run folder to continue.
    """

    def __init__(self, config: TrainConfig, resume: Path | None = None) -> None:
        self.accelerator = accelerator = make_accelerator(
            config.precision,
            gradient_accumulation_steps=config.optim.accumulation,
            log_with=list(config.trackers),
            project_dir=config.output,  # RunLog moves it to the run folder
        )
        rank, processes = accelerator.process_index, accelerator.num_processes
        if accelerator.device.type == "cpu":  # threads that wait for a core which a loading process has are very slow
            spare = (os.cpu_count() or 1) - config.data.num_workers
            torch.set_num_threads(max(1, min(torch.get_num_threads(), spare)))

        train_images, val_images = load_datasets(config.data)
        self.classes = train_images.classes
        self.model_kwargs = config.model_kwargs | {"num_classes": len(self.classes)}
        torch.manual_seed(derive_seed(config.seed, Stream.MODEL))
        model = create_model(
            config.model, pretrained=config.pretrained, checkpoint_path=config.checkpoint, **self.model_kwargs
        )
        data = replace(resolve_preprocessing(config.data, model), name=dataset_name(config.data))
        self.config = config = replace(config, data=data)

        self.sampler = TrainSampler(
            len(train_images), data.batch_size, config.seed, config.optim.accumulation, rank, processes
        )
        mode = image_mode(model)
        transform = train_transform(data, config.augment)
        self.train_batches = train_loader(train_images, transform, self.sampler, mode, data.num_workers)
        self.val_batches = eval_loader(
            val_images, eval_transform(data), data.eval_batch_size, mode, data.num_workers, rank, processes
        )
        self.updates = self.sampler.updates

        # What a paper adds to the loop is the model's own. Any module can be registered; a bare Backbone adds nothing.
        self.mechanics = model if isinstance(model, Backbone) else Backbone(0, 0, 0, 0.0, 0)
        self.task = Classification(
            config.loss, config.augment, len(self.classes), config.seed, self.mechanics.training_loss
        )
        optimizer = make_optimizer(config.optim, model)
        self.schedule = make_schedule(config, optimizer, self.updates)
        model.to(accelerator.device)
        self.ema = ModelEmaV3(model, config.ema.decay, use_warmup=config.ema.warmup) if config.ema.decay else None
        if config.teacher:
            published = not config.teacher_checkpoint
            teacher = create_model(config.teacher, published, config.teacher_checkpoint, **config.teacher_kwargs)
            self.mechanics.learn_from(teacher.to(accelerator.device))
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.bare_model = accelerator.unwrap_model(self.model)
        self.epoch = self.update = 0  # where the next update is
        self.train_loss = torch.zeros((), device=accelerator.device)  # sum over this epoch
        self.best: float | None = None
        self.folder = resume
        if resume is not None:
            self._load(resume / "checkpoints" / "last.safetensors")

    def fit(self) -> Path:
        """Train to the last epoch; the run folder."""
        began_here = self.folder is None
        if began_here:
            self._begin()
        elif self.accelerator.is_main_process:
            write_text(self.folder / "config.yaml", to_yaml(self.config))
        self.log = RunLog(
            self.folder, self.accelerator, self.config.epochs, self.updates, self.epoch, plain(self.config)
        )
        try:
            while self.epoch < self.config.epochs:
                self.log.start_epoch(self.epoch, self.update)
                lr = self._train_epoch()
                metrics = evaluate(self._weights(), self.val_batches, self.accelerator)
                self._end_epoch(lr, metrics)
        except VisionattnError:
            if began_here and self.best is None and self.accelerator.is_main_process:
                shutil.rmtree(self.folder)  # stopped by an unreadable image before there was anything to keep
            raise
        finally:
            self.log.stop()
        return self.folder

    def _train_epoch(self) -> float:
        accelerator, config, optim = self.accelerator, self.config, self.config.optim
        self.model.train()
        self.sampler.epoch, self.sampler.first_update = self.epoch, self.update
        lr = 0.0
        for i, (images, targets) in enumerate(read_batches(self.train_batches)):
            update = self.epoch * self.updates + self.update
            if i % optim.accumulation == 0:
                self.schedule.step_update(update)
                self.mechanics.advance(update / self.updates)
            # What the model draws (drop path, dropout) follows from the step too, so no state of generators is kept.
            torch.manual_seed(
                derive_seed(config.seed, Stream.MODEL, update, i % optim.accumulation, accelerator.process_index)
            )
            images, targets = (x.to(accelerator.device, non_blocking=True) for x in (images, targets))
            with accelerator.accumulate(self.model):
                loss = self.task.loss(self.model, images, targets, update)
                accelerator.backward(loss)
                if accelerator.sync_gradients and optim.clip_grad:
                    self._clip_gradients()
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.train_loss += loss.detach()
            if not accelerator.sync_gradients:
                continue
            if self.ema:
                self.ema.update(self.bare_model, step=update + 1)
            self.update += 1
            self.log.step(self.sampler.images_per_update)
            lr = max(group["lr"] for group in self.optimizer.param_groups)
            if (self.update - 1) % config.log_every == 0 or self.update == self.updates:
                self.log.report(loss.item(), lr)
            if config.save_every and self.update % config.save_every == 0 and self.update < self.updates:
                self.train_loss = accelerator.reduce(self.train_loss, "mean")
                self._save("last", state=True)
        return lr

    def _clip_gradients(self) -> None:
        optim, parameters = self.config.optim, self.model.parameters()
        if optim.clip_mode == "norm":
            self.accelerator.clip_grad_norm_(parameters, optim.clip_grad)
        else:
            self.accelerator.unscale_gradients()
            dispatch_clip_grad(parameters, optim.clip_grad, mode=optim.clip_mode)

    def _end_epoch(self, lr: float, metrics: dict[str, float]) -> None:
        batches = self.updates * self.config.optim.accumulation
        train_loss = self.accelerator.reduce(self.train_loss, "mean").item() / batches
        if not math.isfinite(train_loss):
            raise VisionattnError(f"the loss of epoch {self.epoch + 1} is {train_loss}: try a lower --optim.lr")
        score = metrics[self.task.metric]
        improved = self.best is None or score > self.best
        self.best = score if improved else self.best
        if improved:
            self._save("best", metrics)
        self.log.end_epoch(train_loss, lr, metrics, self.best, self.task.metric)
        self.epoch, self.update = self.epoch + 1, 0
        self.train_loss.zero_()
        self._save("last", metrics, state=True)

    def _begin(self) -> None:
        """Make the run folder, at once with options and a checkpoint in it: it can be resumed from then on."""
        folder = [""]
        if self.accelerator.is_main_process:
            config = self.config
            images = config.data.root if config.data.name == "folder" else config.data.name
            wanted = Path(config.output, config.name or f"{config.model}-{Path(images).resolve().name}")
            with user_input(f"cannot write to {config.output}", OSError):
                self.folder = wanted.with_name(f".{wanted.name}.{os.getpid()}")  # until it is complete
                (self.folder / "checkpoints").mkdir(parents=True)
                write_text(self.folder / "config.yaml", to_yaml(config))
                self._save("last", state=True)
                numbered = (wanted.with_name(f"{wanted.name}-{number}") for number in itertools.count(2))
                free = next(path for path in itertools.chain([wanted], numbered) if not path.exists())
                folder[0] = str(self.folder.rename(free))
        self.folder = Path(broadcast_object_list(folder)[0])

    def _load(self, path: Path) -> None:
        if not path.is_file():
            raise VisionattnError(f"cannot resume {self.folder}: it has no checkpoints/{path.name}")
        state = read_training_state(path)
        load_checkpoint(self.bare_model, path)
        if self.ema:
            self.ema.set(self.bare_model)
        if state["raw_weights"]:
            self.bare_model.load_state_dict(state["raw_weights"])
        with user_input(f"cannot resume {self.folder} with these options", ValueError, KeyError):
            self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.epoch, self.update, self.best = state["epoch"], state["update"], state["best"]
        self.train_loss.copy_(state["train_loss"])

    def _save(self, name: str, metrics: dict[str, float] | None = None, state: bool = False) -> None:
        """Write a checkpoint; with `state`, one that can be resumed."""
        if not self.accelerator.is_main_process:
            return
        config, scaler = self.config, self.accelerator.scaler
        description = {
            "model": config.model,
            "model_kwargs": self.model_kwargs,
            "classes": self.classes,
            "preprocessing": preprocessing(config.data),
            "data": plain(config.data),
            "precision": config.precision,
            "epoch": self.epoch,
            "metrics": metrics,
        }
        training_state = {
            "epoch": self.epoch,
            "update": self.update,
            "best": self.best,
            "train_loss": self.train_loss,
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "raw_weights": self.bare_model.state_dict() if self.ema else None,
        }
        path = self.folder / "checkpoints" / f"{name}.safetensors"
        save_checkpoint(path, self._weights().state_dict(), description, training_state if state else None)

    def _weights(self) -> nn.Module:
        """The model that is validated and kept."""
        return self.ema.module if self.ema else self.bare_model


def make_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer by name, with its groups for weight decay and layer-wise rates."""
    if config.name.lower() not in list_optimizers():
        near = difflib.get_close_matches(config.name.lower(), list_optimizers(), 3, 0.5)
        raise VisionattnError(
            f"unknown optimizer {config.name}" + (f"; did you mean {', '.join(near)}?" if near else "")
        )
    options = {"betas": config.betas, "eps": config.eps, "layer_decay": config.layer_decay}
    with user_input(f"optimizer {config.name}", ValueError, TypeError, RuntimeError, ImportError):
        return create_optimizer_v2(
            model,
            config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **{key: value for key, value in options.items() if value is not None},
        )


def make_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, updates: int) -> Scheduler:
    """timm's schedule by name, a function of the number of the update."""
    schedule = config.schedule
    with user_input(f"schedule {schedule.name}", ValueError, AssertionError):
        return create_scheduler_v2(
            optimizer,
            sched=schedule.name,
            num_epochs=config.epochs,
            warmup_epochs=min(schedule.warmup_epochs, config.epochs),
            warmup_lr=schedule.warmup_lr,
            min_lr=schedule.min_lr,
            decay_epochs=schedule.decay_epochs,
            decay_milestones=list(schedule.decay_milestones),
            decay_rate=schedule.decay_rate,
            step_on_epochs=False,
            updates_per_epoch=updates,
        )[0]


def train(config: TrainConfig, resume: Path | None = None) -> Path:
    """Run train.py: train, tell where the results are, and return the run folder."""
    trainer = Trainer(config, resume)
    try:
        folder = trainer.fit()
    except KeyboardInterrupt:
        if trainer.folder:
            print(f"\ncontinue   python train.py --resume {shlex.quote(str(trainer.folder))}")
        raise
    if trainer.accelerator.is_main_process:
        checkpoint = shlex.quote(str(folder / "checkpoints" / "best.safetensors"))
        print(f"best {trainer.task.metric} {trainer.best:.4f} % in {trainer.epoch} epochs")
        print(f"results    {folder}: metrics.csv, curves.png, config.yaml, checkpoints/")
        print(f"validate   python validate.py --checkpoint {checkpoint}")
        print(f"compare    tensorboard --logdir {shlex.quote(str(folder.parent))}")
    return folder
