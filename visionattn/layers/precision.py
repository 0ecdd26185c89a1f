"""Arithmetic that must not be rounded to half precision."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Context in which products on the device of `x` keep the precision of their operands under autocast."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # meta has none
        return torch.autocast(device, enabled=False)
    return nullcontext()
