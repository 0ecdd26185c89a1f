"""Focal modulation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .depthwise import depthwise
from .pointwise import Pointwise


class FocalModulation(nn.Module):
    """Multiplies every position by a summary of its surroundings: proj(q * h(sum of gated contexts)).

    "Focal Modulation Networks", arXiv 2203.11926. The contexts are the outputs of a chain of depthwise convolutions,
    each with a larger kernel than the one before, and the mean of the last one over the map. Gates are a number per
    position and level, without a nonlinearity.

    Cost: 4 N C^2 + N C (L + 1) + N C (k_1^2 + ... + k_L^2) multiply-adds for N = H W positions, C channels and L levels
    with kernels k_l, and N C (L + 2) of gating.

    Args:
        dim: channels C.
        focal_window: kernel size of the first level, odd.
        focal_level: number of convolutions L.
        focal_factor: growth of the kernel size per level, even.
        bias: of the projections to query, context and gates and to the modulator.
        proj_drop: dropout rate of the output.
        use_postln_in_modulation: apply LayerNorm before the last projection.
        normalize_modulator: divide the sum of contexts by their number L + 1.

    Raises:
        ValueError: if a kernel size is not odd or there is no level.

    Shape:
        (B, H, W, C) to (B, H, W, C), any H and W.

    Example:
        >>> import torch
        >>> FocalModulation(64, focal_window=3, focal_level=2)(torch.randn(1, 30, 41, 64)).shape
        torch.Size([1, 30, 41, 64])
    """

    last_product = "proj"

    def __init__(
        self,
        dim: int,
        focal_window: int,
        focal_level: int,
        focal_factor: int = 2,
        bias: bool = True,
        proj_drop: float = 0.0,
        use_postln_in_modulation: bool = False,
        normalize_modulator: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if focal_level < 1:
            raise ValueError(f"expected a focal_level of at least 1, got {focal_level}")
        if focal_window % 2 == 0 or focal_factor % 2:
            raise ValueError(
                f"expected odd kernel sizes focal_window + l * focal_factor, got focal_window {focal_window} and "
                f"focal_factor {focal_factor}"
            )
        self.dim, self.focal_level = dim, focal_level
        self.normalize_modulator = normalize_modulator
        self.f = Pointwise(dim, 2 * dim + focal_level + 1, bias=bias, **dd)
        self.focal_layers = nn.ModuleList(
            depthwise(dim, focal_window + focal_factor * level, bias=False, **dd) for level in range(focal_level)
        )
        self.h = Pointwise(dim, dim, bias=bias, **dd)
        self.norm = nn.LayerNorm(dim, **dd) if use_postln_in_modulation else nn.Identity()
        self.proj = Pointwise(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def modulate(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, W, C), modulators (B, H, W, C) and gates (B, H, W, L + 1) of an input (B, H, W, C)."""
        q, context, gates = self.f(x).split([self.dim, self.dim, self.focal_level + 1], -1)
        if self.normalize_modulator:
            gates = gates / (self.focal_level + 1)
        total = None
        for level, conv in enumerate(self.focal_layers):
            # Channels last in shape, too: gradients of both uses then lie alike, or GELU's takes three times as long.
            context = F.gelu(conv(context.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
            gate = gates[..., level : level + 1]
            total = context * gate if total is None else total.addcmul_(context, gate)
        mean = F.gelu(context.mean((1, 2)))[:, None, None]
        return q, self.h(total.addcmul_(mean, gates[..., -1:])), gates

    def forward(self, x: Tensor) -> Tensor:
        q, modulator, _ = self.modulate(x)
        return self.proj_drop(self.proj(self.norm(q * modulator)))


class TokenFocalModulation(FocalModulation):
    """Focal modulation of a sequence of patches: (B, H * W, C) and the grid (H, W) to (B, H * W, C)."""

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return super().forward(x.unflatten(1, grid)).flatten(1, 2)


def fit_tensor(name: str, value: Tensor, own: Tensor) -> Tensor:
    """A tensor of a modulation with other kernel sizes or fewer levels in the shape of `own`.

    Kernels are padded with zeros, which changes nothing, or cropped. The gates of new levels are zero; the global one
    stays the last, though what it gates is then the mean of another level.

    Args:
        name: what the tensor is called in a state dict; tensors of other names are returned as they are.
        value: the tensor.
        own: the one to replace.
    """
    if ".focal_layers." in name:
        return F.pad(value, ((own.shape[-1] - value.shape[-1]) // 2,) * 4)
    if ".mixer.f." in name and len(value) < len(own):
        return torch.cat([value[:-1], value.new_zeros(len(own) - len(value), *value.shape[1:]), value[-1:]])
    return value
