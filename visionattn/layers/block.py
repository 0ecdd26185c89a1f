"""The pre-norm residual block."""

from collections.abc import Callable

from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from .fuse import fuse_scale


class Block(nn.Module):
    """x + mixer(norm1(x)), then x + mlp(norm2(x)), each branch with optional layer scale and stochastic depth.

    Args:
        dim: channels.
        mixer: mixes positions; called with the normalised input and whatever else the block is called with.
        mlp: mixes channels.
        norm_layer: makes a norm over `dim` channels.
        layer_scale: initial value of the learned scale of each branch, None for no scale.
        drop_path: probability of dropping a branch of a sample.
        scale_layer: makes the scale, from channels and initial value.

    Shape:
        that of the mixer, channels last, in and out.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp: nn.Module,
        *,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        scale_layer: Callable[..., nn.Module] = LayerScale,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.mixer = mixer
        self.ls1 = nn.Identity() if layer_scale is None else scale_layer(dim, layer_scale, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = mlp
        self.ls2 = nn.Identity() if layer_scale is None else scale_layer(dim, layer_scale, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def fuse(self) -> None:
        """Merge the layer scales into the products that the branches end in, for inference."""
        fuse_scale(self, "ls1", self.mixer)
        fuse_scale(self, "ls2", self.mlp)

    def forward(self, x: Tensor, *args) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.mixer(self.norm1(x), *args)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
