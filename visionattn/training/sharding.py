"""Runs whose weights, gradients and optimizer states are split over the processes: FSDP2, through accelerate.

Checkpoints hold whole tensors, as those of other runs, so that any number of processes can resume them.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import VisionattnError
from .config import TrainConfig

OPTIMIZERS = (
    *("adabelief", "adadelta", "adam", "adamax", "adamc", "adamw", "adamwlegacy", "adan", "adanw", "adopt", "adoptc"),
    *("adoptw", "lamb", "lambc", "lambw", "laprop", "lars", "lion", "madgrad", "momentum", "nadam", "nadamc", "nadamw"),
    *("radam", "rmsprop", "rmsproptf", "sgd", "sgdw"),
)
"""Those of timm's that were seen to do the same with split weights as with whole ones, and to resume. No rule stands in
for it: what timm says of an optimizer is not whether it looks beyond a weight's own part, and only a run tells."""


def check_sharding(config: TrainConfig, accelerator: Accelerator) -> None:
    """Refuse what a run that is split cannot do, or was not seen to do.

    Raises:
        VisionattnError: if accelerate or the options ask for it.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise VisionattnError(
            "train.py does not run under DeepSpeed, which updates the weights before bad gradients can be skipped: "
            "configs/accelerate/fsdp2.yaml splits them too"
        )
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    plugin, optim = accelerator.state.fsdp_plugin, config.optim
    refused = {
        "fsdp_version 1: set it to 2": not accelerator.is_fsdp2,
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing: give --grad_checkpointing": plugin.activation_checkpointing,
        "precision fp16: give bf16": config.precision == "fp16",
        "channels_last": config.channels_last,
        "compile": config.compile,
        "dry_run": config.dry_run,
        "sigma_reparam": config.sigma_reparam,
        "distill.features": config.distill.model and config.distill.features,
        "optim.clip_mode agc: give norm or value": optim.clip_grad and optim.clip_mode == "agc",
        f"optim.name {optim.name}: give one of {', '.join(OPTIMIZERS)}": optim.name.lower() not in OPTIMIZERS,
    }
    if told := next((what for what, asked in refused.items() if asked), None):
        raise VisionattnError(f"a run split by FSDP does not take {told}")


def distribute(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """What accelerate makes of a model and its optimizer, which from then on load whole tensors even if they are split.

    Args:
        accelerator: the run's accelerator.
        model: on its device, with the same weights in every process.
        optimizer: of its parameters.
        average: copy of the model that is to be split alike.
    """
    if not accelerator.is_fsdp2:
        return accelerator.prepare(model, optimizer)
    # Of norms before the pooling; nothing changes these views in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    plugin = accelerator.state.fsdp_plugin
    # Blocks are gathered one by one. By size, accelerate would also take containers, which are never called.
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = sorted(_block_names(model))
    plugin.cpu_ram_efficient_loading = False  # fails for buffers, and every process has made the weights
    plugin.mixed_precision_policy = None  # would also lower batch norms; autocast does as in other runs
    if accelerator.native_amp:
        model.forward = accelerator.autocast()(model.forward)
    prepared = accelerator.prepare(model, optimizer)
    models = [model] if average is None else [model, fsdp2_prepare_model(accelerator, average)]
    for part in models:
        part.register_load_state_dict_pre_hook(_split_weights)
    optimizer.register_load_state_dict_pre_hook(_split_state)
    return prepared


def _block_names(model: nn.Module) -> set[str]:
    """Names of the classes of the model's residual blocks."""
    containers = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "blocks"]
    return {type(block).__name__ for blocks in containers for block in blocks}


def _split_weights(model: nn.Module, weights: dict[str, Tensor], *_: Any) -> None:
    own = model.state_dict()
    weights.update({key: _split(value, own[key]) for key, value in weights.items() if key in own})


def _split_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    states = {
        number: {name: _split(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return state | {"state": states}


def _split(value: Any, like: Tensor) -> Any:
    """This process's part of a tensor that belongs to a parameter, if the parameter is split."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole(state: Any, keep: bool) -> Any:
    """Nested dicts with whole tensors in place of those that are split; all processes call it together.

    Args:
        state: what may hold split tensors.
        keep: whether this process wants them; the others get None.
    """
    if isinstance(state, dict):
        return {key: whole(value, keep) for key, value in state.items()}
    if isinstance(state, DTensor):
        tensor = joined(state)
        return tensor.cpu() if keep else None
    return state


def joined(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be split, on its device; all processes call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathered(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Hold the whole weights in every process, which then may call the model as often as it likes, or fail."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
        for part in parts[1:]:  # the root's weights are needed again at once when it goes backward
            part.set_reshard_after_forward(accelerator.state.fsdp_plugin.reshard_after_forward, recurse=False)
