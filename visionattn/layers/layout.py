"""Layouts of maps."""

from torch import Tensor


class ChannelsLast:
    """Mixin that lets a module of maps (B, C, H, W) take and return (B, H, W, C) views of them, without a copy."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
