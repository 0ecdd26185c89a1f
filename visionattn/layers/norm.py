"""Norms that the libraries do not have, and batch norms of a single value."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from .direct import UNSEEING


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over dimension 1: of maps (B, C, H, W) at every position, and of pooled features (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ChannelRmsNorm(nn.RMSNorm):
    """Root mean square norm over dimension 1 of maps (B, C, H, W), at every position."""

    # timm's RmsNorm2d squares in the precision of its input: in float16, values above 256 make the result 0.

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)  # fused kernels want one dtype, also under autocast
        return F.rms_norm(x.movedim(1, -1), self.normalized_shape, weight, self.eps).movedim(-1, 1)


def allow_single_values(model: nn.Module) -> None:
    """Let the batch norms inside `model` train on batches that hold one value for each channel, as pooled features of
    one image do and its map of 1 x 1.

    Such a batch has no variance, and torch refuses it. The norm then uses its running statistics and leaves them, as in
    evaluation and as norms that are frozen for detection do.

    Args:
        model: changed in place; may have been before.
    """
    for norm in model.modules():
        if isinstance(norm, BatchNorm) and norm.track_running_stats and not hasattr(norm, "suspended"):
            norm.suspended = False
            norm.register_forward_pre_hook(_suspend)
            norm.register_forward_hook(_resume)


def _suspend(norm: BatchNorm, args: tuple[Tensor]) -> None:
    if norm.training and args[0].numel() == args[0].shape[1]:
        norm.training, norm.suspended = False, True


def _resume(norm: BatchNorm, args: tuple[Tensor], output: Tensor) -> None:
    if norm.suspended:
        norm.training, norm.suspended = True, False


UNSEEING.update((_suspend, _resume))
