"""OverLoCK's blocks, and what passes its overview on."""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, SqueezeExcite
from torch import Tensor, nn

from .context_mixing import ContMixBlock, scaled_sum
from .conv_norm import ConvNorm, PointwiseNorm
from .depthwise import depthwise
from .dilated_reparam import ChannelScale, DilatedReparamNorm, GlobalResponseNorm2d, GrnMlp, ResidualDepthwise
from .layout import channels_last
from .pointwise import Pointwise2d
from .symbolic import any_count


class RepConvBlock(nn.Module):
    """A residual block of one branch: large depthwise convolution, squeeze and excitation, MLP.

    Args:
        dim: channels.
        kernel_size: of the large convolution.
        mlp_ratio: hidden channels of the MLP per channel.
        ls_init_value: initial scale, None for none.
        res_scale: scale the shortcut instead of the branch.
        drop_path: probability of dropping the branch of a sample.
        deploy: have the large convolution as it is in inference.

    Shape:
        (B, H, W, C) to (B, H, W, C).
    """

    def __init__(
        self, dim: int, kernel_size: int, mlp_ratio: float, ls_init_value: float | None, res_scale: bool,
        drop_path: float, deploy: bool, device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.res_scale = res_scale
        self.cpe = ResidualDepthwise(dim, **dd)
        self.norm1 = LayerNorm2d(dim, eps=1e-6, **dd)
        self.mixer = DilatedReparamNorm(dim, kernel_size, deploy, **dd)
        self.se = SqueezeExcite(dim, rd_channels=max(16, dim // 8), act_layer=nn.GELU, **dd)
        self.mlp = GrnMlp(dim, int(mlp_ratio * dim), **dd)
        self.ls1 = nn.Identity() if ls_init_value is None else ChannelScale(dim, ls_init_value, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()

    @channels_last
    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe(x)
        y = self.mlp(self.se(self.mixer(self.norm1(x))))
        return scaled_sum(x, y, self.ls1, self.drop_path1, self.res_scale)


class Fusion(nn.Module):
    """Depthwise convolution, norm, GELU, product and global response norm: (B, C_in, H, W) to (B, C_out, H, W)."""

    fused_pairs = (("conv", "norm"),)

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = depthwise(in_dim, 3, **dd)
        self.norm = nn.BatchNorm2d(in_dim, **dd)
        self.act = nn.GELU()
        self.proj = Pointwise2d(in_dim, dim, **dd)
        self.grn = GlobalResponseNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.grn(self.proj(self.act(self.norm(self.conv(x)))))


class FocusBlock(ContMixBlock):
    """`ContMixBlock` under the guidance of a context, which it carries along in its last channels and updates.

    Args:
        dim: channels C, those of the context apart.
        context_dim: channels C_c of the context.
        refresh: add the context of the beginning to that which the blocks before made of it.

    Others as in `ContMixBlock`; shortcuts are scaled.

    Shape:
        (B, C + C_c, H, W) and the context of the beginning (B, C_c, H, W) to (B, C + C_c, H, W).
    """

    def __init__(
        self, dim: int, context_dim: int, num_heads: int, kernel_size: int, smk_size: int = 5, mlp_ratio: float = 3,
        ls_init_value: float | None = 1.0, res_scale: bool = True, drop_path: float = 0.0, deploy: bool = False,
        refresh: bool = True, device=None, dtype=None,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        dd = {"device": device, "dtype": dtype}
        self.dim = dim
        self.context_scale = ChannelScale(context_dim, **dd) if refresh else None
        self.origin_scale = ChannelScale(context_dim, **dd) if refresh else None
        self.fusion = Fusion(dim + context_dim, dim, **dd)
        mixing = num_heads, kernel_size, smk_size
        self._make(dim, context_dim, mixing, mlp_ratio, res_scale, ls_init_value, drop_path, deploy, device, dtype)

    def mix(self, x: Tensor) -> Tensor:
        return self.mixer(self.fusion(x), x)

    def forward(self, x: Tensor, origin: Tensor) -> Tensor:
        if self.context_scale is not None:
            context = self.context_scale(x[:, self.dim :]) + self.origin_scale(origin)
            x = torch.cat([x[:, : self.dim], context], 1)
        return super().forward(x)


@torch.fx.wrap
@any_count
def with_overview(x: Tensor, overview: Tensor) -> Tensor:
    """A map (B, C, H, W) and, in further channels, one of half its size, every position of which is there four times:
    every second is the smaller map again."""
    H, W = x.shape[2:]
    repeated = overview[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).flatten(4).flatten(2, 3)
    return torch.cat([x, repeated[:, :, :H, :W]], 1)


class FocusDownsample(nn.Module):
    """What `LookingStage` returns to map, context, overview and first context at half the resolution, NCHW."""

    def __init__(self, dims: tuple[int, int, int], device=None, dtype=None) -> None:
        super().__init__()
        dim, context_dim, out_dim = dims
        self.dim, self.width = dim, dim + context_dim
        self.x = ConvNorm(dim, out_dim, 3, 2, device=device, dtype=dtype)
        self.h = ConvNorm(context_dim, context_dim, 3, 2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        context = x[:, self.dim : self.width]
        return torch.cat([self.x(x[:, : self.dim]), self.h(context), x[:, self.width :, ::2, ::2]], 1)


class HiddenNorm(PointwiseNorm):
    """The head's hidden layer at every position: product, batch norm, SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class FeatureNorm(LayerNorm2d):
    """LayerNorm of a stage's feature (B, C, H, W), without what the stage returns besides.

    Args:
        dim: channels C of the feature.
        overview_dim: channels C' of the overview behind it, whose norm and projection are added to it; 0 for none.
    """

    def __init__(self, dim: int, overview_dim: int = 0, device=None, dtype=None) -> None:
        super().__init__(dim, device=device, dtype=dtype)
        self.overview = None
        if overview_dim:
            self.overview = nn.Sequential()
            self.overview.norm = LayerNorm2d(overview_dim, device=device, dtype=dtype)
            self.overview.proj = Pointwise2d(overview_dim, dim, device=device, dtype=dtype)
            self.overview.scale = ChannelScale(dim, 1e-5, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        dim = self.normalized_shape[0]
        y = super().forward(x[:, :dim])
        return y if self.overview is None else y + self.overview(x[:, dim:])


class Passing:
    """What a forward pass leaves for the loss. Copies of the model get none."""

    value: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> "Passing":
        return Passing()

    def __reduce__(self) -> tuple:
        return Passing, ()
