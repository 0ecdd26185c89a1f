"""Mixers that are no blocks of `layers`: controls, gates after a host, and blocks that a network tells something."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ... import layers
from ...layers.causal_attention import CausalSelfAttention
from ...layers.depthwise import depthwise
from ...layers.pointwise import Pointwise2d

HOSTS = "dw7", "softmax"


class DepthwiseMixer(nn.Module):
    """A depthwise convolution, then a product over channels: (B, C, H, W) to the same. Local, and the host of gates.

    Args:
        dim: channels C.
        kernel_size: of the convolution, odd.
    """

    last_product = "proj"

    def __init__(self, dim: int, kernel_size: int = 7, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = depthwise(dim, kernel_size, device=device, dtype=dtype)
        self.proj = Pointwise2d(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.conv(x))


class NoMixer(nn.Module):
    """Passes on what it gets: the block adds its norm, and no position hears of another."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return x


class PluggedIn(nn.Module):
    """A gate after a mixer, which then is its host: (B, C, H, W) to the same.

    Args:
        dim: channels C.
        host: "dw7" or "softmax".
        gate: class of the gate, which takes maps (B, C, H, W).
        num_heads: attention heads of the host "softmax".
        **kwargs: arguments of the gate.
    """

    def __init__(
        self, dim: int, host: str, gate: Callable[..., nn.Module], num_heads: int, device=None, dtype=None, **kwargs
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if host not in HOSTS:
            raise ValueError(f"expected host one of {', '.join(HOSTS)}, got {host!r}")
        self.tokens = host == "softmax"
        if self.tokens:
            self.host = layers.SelfAttention(dim, num_heads, qkv_bias=True, **dd)
        else:
            self.host = DepthwiseMixer(dim, **dd)
        self.gate = gate(dim, **kwargs, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if not self.tokens:
            return self.gate(self.host(x))
        grid = (x.shape[2], x.shape[3])
        return self.gate(self.host(x.flatten(2).mT, grid=grid).mT.unflatten(2, grid))


class PatchSparseAttention(nn.Module):
    """Sparsifiner's attention without a class token: the mean of the tokens takes its place, as one more key. The
    predictor, which the choice of keys has no gradient for, stays as it is drawn.

    Args:
        dim: channels C.
        num_heads: attention heads.
        grid_size: (height, width) of the map that the predictor is made for; it is resampled for others.
        **kwargs: of `SparseAttention`.

    Attributes:
        onward: classes whose arguments it takes too.
        needs_grid: its tokens are the patches of a grid, and no others.
    """

    onward = layers.SparseAttention, layers.ConnectivityPredictor
    needs_grid = True

    def __init__(self, dim: int, num_heads: int, grid_size: tuple[int, int], **kwargs) -> None:
        super().__init__()
        num_tokens = grid_size[0] * grid_size[1] + 1
        self.attention = layers.SparseAttention(dim, num_tokens, num_heads, grid_size=grid_size, **kwargs)
        self.attention.predictor.requires_grad_(False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.attention(torch.cat([x.mean(1, keepdim=True), x], 1), grid=grid)[:, 1:]


class SoftCausalAttention(CausalSelfAttention):
    """iLLaMA's attention whose mask, in the first epochs of training, is soft. Arguments as for `CausalSelfAttention`.

    Args:
        dim: channels C.
        num_heads: attention heads.
        soft_mask_rate: factor on the attention weights of later tokens; 0 is causal, 1 bidirectional.
        soft_mask_epochs: epochs, at the start of training, in which the rate falls from 1 to 0.
        **kwargs: of `CausalSelfAttention`.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, soft_mask_rate: float = 0.0, soft_mask_epochs: float = 0.0, **kwargs
    ) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.soft_mask_rate, self.soft_mask_epochs = soft_mask_rate, soft_mask_epochs
        self.advance(0.0)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        scheduled = self.training and self.soft_mask_epochs
        return super().forward(x, soft_mask_rate=self.scheduled_rate if scheduled else self.soft_mask_rate)

    def advance(self, epoch: float) -> None:
        """Set the soft mask of training mode. In evaluation mode it stays `soft_mask_rate`."""
        self.scheduled_rate = max(0.0, 1 - epoch / self.soft_mask_epochs) if self.soft_mask_epochs else 0.0


class BalancedHeads(layers.MixtureOfHeadAttention):
    """Mixture-of-head attention that is told the weight of its load-balance loss. Arguments as for the layer.

    Args:
        dim: channels C.
        num_heads: attention heads.
        shared: heads that are always on.
        top_k: heads that a token keeps of the others.
        balance: weight of the loss, 0.01 as published, 0 for none.
        **kwargs: of `MixtureOfHeadAttention`.
    """

    def __init__(self, dim: int, num_heads: int, shared: int, top_k: int, balance: float = 0.0, **kwargs) -> None:
        super().__init__(dim, num_heads, shared, top_k, **kwargs)
        self.balance = balance
