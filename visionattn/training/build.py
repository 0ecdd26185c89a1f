"""What a run is made of, from its options: loaders, and a model of which parts may not learn."""

import re
from dataclasses import replace

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.utils.data import DataLoader

from ..data.images import ImageSet
from ..data.loader import Stream, TrainSampler, choose_workers, derive_seed, eval_loader, train_loader
from ..errors import VisionattnError, user_input
from ..layers.spectral import sigma_reparam
from ..tasks import make_task
from ..tasks.task import Task, image_mode
from ..weights.description import Described, check_made
from ..weights.entries import check_model, longest_side
from .checkpoint import Saved
from .config import TrainConfig
from .guard import leave_group


def make_model(
    task: Task, num_classes: int, accelerator: Accelerator, resumes: bool = False
) -> tuple[nn.Module, list[nn.Module]]:
    """The model on its device, and its parts that stay in eval mode.

    Args:
        task: which makes it.
        num_classes: classes of the data.
        accelerator: the run's accelerator.
        resumes: do without the weights to start from, which need not be there any more: others will be loaded.
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
    if config.sigma_reparam:  # on the device, where decompositions are fast
        with user_input(f"sigma_reparam of {config.model}", ValueError):
            sigma_reparam(model.to(accelerator.device), "norm" if config.sigma_gamma == "norm" else 1.0)
    frozen = freeze(model, config.freeze) if config.freeze else []
    if config.grad_checkpointing:
        with user_input(f"grad_checkpointing of {config.model}", AttributeError, AssertionError):
            model.set_grad_checkpointing()
    model.to(accelerator.device, memory_format=memory_format(config))
    return model, frozen


def check_resumable(task: Task, num_classes: int, saved: Saved) -> None:
    """Refuse options of a run whose model is not the one that its last checkpoint holds, before it is made.

    Args:
        task: of the options.
        num_classes: of the data.
        saved: the last checkpoint of the run.

    Raises:
        VisionattnError: says what differs.
    """
    path, content, _ = saved
    name, kwargs = task.made
    plain = replace(task.config, model=name, model_kwargs=kwargs, pretrained=False, checkpoint="")
    entries = {"task": plain.task, "model_kwargs": kwargs}
    place = f"cannot resume {path.parents[1]} with these options"
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
    workers = choose_workers(data.num_workers, next(model.parameters()).device, processes)
    folder = data.root if data.name == "folder" else None
    sampler = TrainSampler(len(train_images), data.batch_size, config.seed, *parts, config.augment.repeats)
    bad = data.max_bad_fraction
    train_batches = train_loader(
        train_images, task.transform(True), sampler, mode, workers, bad, task.collate(True), folder
    )
    share = data.eval_batch_size, mode, workers, rank, processes
    val_batches = eval_loader(val_images, task.transform(False), *share, task.collate(False), folder)
    train_batches.worker_init_fn = val_batches.worker_init_fn = leave_group
    return sampler, train_batches, val_batches


# timm's freeze puts other modules in place of batch norms, without their count of batches in checkpoints, and leaves
# dropout and drop path on.
def freeze(model: nn.Module, parts: tuple[str, ...]) -> list[nn.Module]:
    """Keep parameters as they are.

    Args:
        model: model to freeze in part.
        parts: names of modules or parameters, "blocks.0-5" for a range; "backbone" for all but the head and the dropout
            before it.

    Returns:
        the frozen modules, which must stay in eval mode for their batch norms to keep their statistics.

    Raises:
        VisionattnError: if a part does not exist, or nothing is left to learn.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    frozen = []
    for part in parts:
        for name in _backbone(model) if part == "backbone" else _expand(part):
            if name not in modules and name not in parameters or not name:
                known = ", ".join(dict.fromkeys(name.partition(".")[0] for name in parameters))
                raise VisionattnError(f"freeze: the model has no {name}; its parts are {known}")
            if name in modules:
                frozen.append(modules[name].requires_grad_(False))
            else:
                parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise VisionattnError(f"freeze: [{', '.join(parts)}] leaves nothing to learn")
    return frozen


def _backbone(model: nn.Module) -> list[str]:
    """Names of what is under a head for detection or segmentation, or of all at the top but a classifier and the
    dropout before it."""
    if hasattr(model, "backbone_name"):
        return [model.backbone_name]
    heads = getattr(model, "classifier", ())
    heads = ("head_drop", *((heads,) if isinstance(heads, str) else heads))
    names = [name for name, _ in model.named_children()] + [name for name, _ in model.named_parameters(recurse=False)]
    return [name for name in names if name not in heads]


def _expand(part: str) -> list[str]:
    """ "blocks.0-2" as blocks.0, blocks.1, blocks.2."""
    numbers = re.search(r"(\d+)-(\d+)", part)
    if numbers is None:
        return [part]
    inside = range(int(numbers[1]), int(numbers[2]) + 1)
    return [part[: numbers.start()] + str(i) + part[numbers.end() :] for i in inside]
