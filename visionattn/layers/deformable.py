"""Deformable convolution of patches, without its extension."""

import torch
import torch.nn.functional as F
from torch import Tensor


def deformed_patches(x: Tensor, offset: Tensor, size: int) -> Tensor:
    """Samples of a map at the taps of a convolution whose stride is the side of its kernel, each tap moved.

    Bilinear, of zeros outside the map, as `torchvision.ops.deform_conv2d` has it. The rows of channels that a sample
    lies between are one bag of embeddings, which is many times as fast on CPUs as interpolation channel by channel.

    Args:
        x: map (B, H, W, C).
        offset: (B, 2 size**2, floor(H / size), floor(W / size)) vertical and horizontal shift of each tap.
        size: side of the kernel.

    Returns:
        (B, floor(H / size), floor(W / size), size**2 C), by tap, then channel.
    """
    (B, H, W, C), (h, w) = x.shape, offset.shape[2:]
    shift = offset.permute(0, 2, 3, 1).unflatten(3, (size, size, 2))  # (B, h, w, row of the tap, column of it, axis)
    taps = torch.arange(size, dtype=offset.dtype, device=x.device)
    y = shift[..., 0] + (size * torch.arange(h, device=x.device)[:, None, None, None] + taps[:, None])
    z = shift[..., 1] + (size * torch.arange(w, device=x.device)[:, None, None] + taps)
    (rows, row_weights), (cols, col_weights) = _neighbours(y, H), _neighbours(z, W)
    image = torch.arange(B, device=x.device).view(B, *[1] * 6) * H
    index = (image + rows[..., None]) * W + cols[..., None, :]
    weights = row_weights[..., None] * col_weights[..., None, :]
    samples = F.embedding_bag(
        index.view(-1, 4), x.reshape(-1, C), mode="sum", per_sample_weights=weights.to(x.dtype).view(-1, 4)
    )
    return samples.view(B, h, w, size * size * C)


def _neighbours(place: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The two positions (..., 2) around each place on an axis, and their weights, 0 outside."""
    low = place.detach().floor()
    part = place - low
    position = torch.stack([low, low + 1], -1)
    weights = torch.stack([1 - part, part], -1)
    counts = (position >= 0) & (position < length) | position.isnan()  # what is no number is to be seen
    return position.nan_to_num(0).clamp(0, length - 1).long(), torch.where(counts, weights, 0)
