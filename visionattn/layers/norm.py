"""Norms that the libraries do not have."""

import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over dimension 1: of maps (B, C, H, W) at every position, and of pooled features (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ChannelRmsNorm(nn.RMSNorm):
    """Root mean square norm over dimension 1 of maps (B, C, H, W), at every position."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)  # fused kernels want one dtype, also under autocast
        return F.rms_norm(x.movedim(1, -1), self.normalized_shape, weight, self.eps).movedim(-1, 1)
