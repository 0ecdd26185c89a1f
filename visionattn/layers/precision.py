"""Arithmetic that must not be rounded to half precision."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def has_autocast(device: torch.device) -> bool:
    """Whether autocast is on there. A meta device has none, which torch does not answer."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Context in which products on the device of `x` keep the precision of their operands under autocast."""
    if has_autocast(x.device):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
