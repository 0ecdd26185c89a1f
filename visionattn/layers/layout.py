"""The layout of maps: inside a stage they are (B, H, W, C), so that any mixer fits any block.

Linear maps, LayerNorm and attention, most of what is there, want channels last. Convolutions want them first, and so do
batch norms, which a subclass for the other layout would not help: it is lost when norms are synchronised. What is built
around these computes on (B, C, H, W), as `layers` documents, and comes into a stage by `channels_last`. A permutation
is a view: bits and memory are the same, and so is the time of forward and backward passes, within what they vary by.
"""

from collections.abc import Callable
from functools import wraps

from torch import Tensor


def channels_last(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A `forward` that takes and returns (B, H, W, C), of one that computes on (B, C, H, W); also a decorator."""

    @wraps(forward)
    def permuted(self, x: Tensor) -> Tensor:
        return forward(self, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    return permuted
