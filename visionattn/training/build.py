"""What a run is made of, from its options: loaders and model."""

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.utils.data import DataLoader

from ..data.images import ImageSet
from ..data.loader import Stream, TrainSampler, derive_seed, eval_loader, train_loader
from ..errors import VisionattnError, user_input
from ..tasks import make_task
from ..tasks.task import Task
from ..weights.description import Described, check_made, read_described
from ..weights.entries import check_model, longest_side
from .config import TrainConfig
from .evaluation import image_mode
from .freeze import freeze
from .signals import leave_group


def make_model(
    task: Task, num_classes: int, accelerator: Accelerator, resumes: bool = False
) -> tuple[nn.Module, list[nn.Module]]:
    """The model on its device, and its parts that stay in eval mode.

    Args:
        task: Which makes it.
        num_classes: Classes of the data.
        accelerator: The run's accelerator.
        resumes: Do without the weights to start from, which need not be there any more: others will be loaded.
    """
    config = task.config
    if resumes:
        task = make_task(replace(config, pretrained=False, checkpoint=""))
    torch.manual_seed(derive_seed(config.seed, Stream.MODEL))
    model = task.create_model(num_classes)
    if config.sync_bn and accelerator.num_processes > 1:
        if accelerator.device.type == "cpu":
            raise VisionattnError("sync_bn needs GPUs: torch shares the statistics of batch norms on those only")
        model = convert_sync_batchnorm(model)
    frozen = freeze(model, config.freeze) if config.freeze else []
    if config.grad_checkpointing:
        with user_input(f"grad_checkpointing of {config.model}", AttributeError, AssertionError):
            model.set_grad_checkpointing()
    model.to(accelerator.device, memory_format=memory_format(config))
    return model, frozen


def check_resumable(task: Task, num_classes: int, folder: Path) -> None:
    """Refuse options of a run whose model is not the one that its last checkpoint holds, before it is made.

    Args:
        task: Of the options.
        num_classes: Of the data.
        folder: Of the run.

    Raises:
        VisionattnError: Says what differs.
    """
    path = folder / "checkpoints" / "last.safetensors"
    if not path.is_file():
        raise VisionattnError(f"cannot resume {folder}: it has no checkpoints/last.safetensors")
    content = read_described(path)[1]
    name, kwargs = task.made
    plain = replace(task.config, model=name, model_kwargs=kwargs, pretrained=False, checkpoint="")
    entries = {"task": plain.task, "model_kwargs": kwargs}
    place = f"cannot resume {folder} with these options"
    check_model(name, kwargs, place, "model_kwargs", longest_side(content))
    check_made(
        Described(place, name, kwargs, {}, entries, path, content), lambda: make_task(plain).create_model(num_classes)
    )


def memory_format(config: TrainConfig) -> torch.memory_format:
    """Layout of images and weights."""
    return torch.channels_last if config.channels_last else torch.preserve_format


def make_loaders(
    task: Task, model: nn.Module, images: tuple[ImageSet, ImageSet], rank: int, processes: int
) -> tuple[TrainSampler, DataLoader, DataLoader]:
    """The order of the training images, and this process's share of the images to train and to validate on."""
    config = task.config
    data, (train_images, val_images), mode = config.data, images, image_mode(model)
    parts = config.optim.accumulation, rank, processes
    sampler = TrainSampler(len(train_images), data.batch_size, config.seed, *parts, config.augment.repeats)
    train_batches = train_loader(
        train_images, task.transform(True), sampler, mode, data.num_workers, data.max_bad_fraction, task.collate(True)
    )
    share = data.eval_batch_size, mode, data.num_workers, rank, processes
    val_batches = eval_loader(val_images, task.transform(False), *share, task.collate(False))
    train_batches.worker_init_fn = val_batches.worker_init_fn = leave_group
    return sampler, train_batches, val_batches
