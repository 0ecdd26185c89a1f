"""HorNet as published, to time ours against: "HorNet: Efficient High-Order Spatial Interactions with Recursive Gated
Convolutions", arXiv 2207.14284.

The published classifiers need no compiled extension; maps are NCHW, with a norm written out for them, and NHWC within
the MLP.
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

GLOBAL = {"filter_sizes": (None, None, (14, 8), (7, 4))}
VARIANTS = {
    "hornet_tiny_7x7": {"base_dim": 64},
    "hornet_tiny_gf": {"base_dim": 64} | GLOBAL,
    "hornet_small_7x7": {"base_dim": 96},
    "hornet_small_gf": {"base_dim": 96} | GLOBAL,
}


class LayerNorm(nn.Module):
    """Over channels that come last, or first: (B, C, H, W)."""

    def __init__(self, dim: int, eps: float = 1e-6, data_format: str = "channels_last") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps
        self.data_format = data_format

    def forward(self, x: Tensor) -> Tensor:
        if self.data_format == "channels_last":
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(var + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class GlobalLocalFilter(nn.Module):
    """Half of the channels through a 3x3 convolution, half through a filter of the whole map, interleaved."""

    def __init__(self, dim: int, h: int = 14, w: int = 8) -> None:
        super().__init__()
        self.dw = nn.Conv2d(dim // 2, dim // 2, 3, padding=1, bias=False, groups=dim // 2)
        self.complex_weight = nn.Parameter(torch.randn(dim // 2, h, w, 2) * 0.02)
        self.pre_norm = LayerNorm(dim, data_format="channels_first")
        self.post_norm = LayerNorm(dim, data_format="channels_first")

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre_norm(x)
        local, spread = torch.chunk(x, 2, dim=1)
        local = self.dw(local)
        spread = spread.to(torch.float32)
        B, C, H, W = spread.shape
        spread = torch.fft.rfft2(spread, dim=(2, 3), norm="ortho")
        weight = self.complex_weight
        if weight.shape[1:3] != spread.shape[2:4]:
            weight = weight.permute(3, 0, 1, 2)
            weight = F.interpolate(weight, size=spread.shape[2:4], mode="bilinear", align_corners=True)
            weight = weight.permute(1, 2, 3, 0)
        spread = spread * torch.view_as_complex(weight.contiguous())
        spread = torch.fft.irfft2(spread, s=(H, W), dim=(2, 3), norm="ortho")
        x = torch.cat([local.unsqueeze(2), spread.unsqueeze(2)], dim=2).reshape(B, 2 * C, H, W)
        return self.post_norm(x)


class GnConv(nn.Module):
    """Recursive gated convolution of an order."""

    def __init__(self, dim: int, order: int, filter_size: tuple[int, int] | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self.dims = [dim // 2**i for i in reversed(range(order))]
        total = sum(self.dims)
        self.proj_in = nn.Conv2d(dim, 2 * dim, 1)
        if filter_size is None:
            self.dwconv = nn.Conv2d(total, total, 7, padding=3, groups=total)
        else:
            self.dwconv = GlobalLocalFilter(total, *filter_size)
        self.proj_out = nn.Conv2d(dim, dim, 1)
        self.pws = nn.ModuleList([nn.Conv2d(self.dims[i], self.dims[i + 1], 1) for i in range(order - 1)])
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj_in(x)
        x, filtered = torch.split(x, (self.dims[0], sum(self.dims)), dim=1)
        filtered = self.dwconv(filtered) * self.scale
        gates = torch.split(filtered, self.dims, dim=1)
        x = x * gates[0]
        for pw, gate in zip(self.pws, gates[1:], strict=True):
            x = pw(x) * gate
        return self.proj_out(x)


class Block(nn.Module):
    def __init__(self, dim: int, gnconv: nn.Module, drop_path: float, layer_scale_init_value: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, data_format="channels_first")
        self.gnconv = gnconv
        self.norm2 = LayerNorm(dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        scaled = layer_scale_init_value > 0
        self.gamma1 = nn.Parameter(layer_scale_init_value * torch.ones(dim)) if scaled else None
        self.gamma2 = nn.Parameter(layer_scale_init_value * torch.ones(dim)) if scaled else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.gnconv(self.norm1(x))
        if self.gamma1 is not None:
            x = self.gamma1.view(-1, 1, 1) * x
        x = shortcut + self.drop_path(x)
        shortcut = x
        x = x.permute(0, 2, 3, 1)
        x = self.pwconv2(self.act(self.pwconv1(self.norm2(x))))
        if self.gamma2 is not None:
            x = self.gamma2 * x
        x = x.permute(0, 3, 1, 2)
        return shortcut + self.drop_path(x)


class HorNet(nn.Module):
    def __init__(
        self,
        base_dim: int,
        depths: tuple[int, ...] = (2, 3, 18, 2),
        orders: tuple[int, ...] = (2, 3, 4, 5),
        filter_sizes: tuple[tuple[int, int] | None, ...] = (None, None, None, None),
        scale: float = 1 / 3,
        layer_scale_init_value: float = 1e-6,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        dims = [base_dim * 2**i for i in range(4)]
        stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, 4), LayerNorm(dims[0], data_format="channels_first"))
        self.downsample_layers = nn.ModuleList([stem])
        for i in range(3):
            norm = LayerNorm(dims[i], data_format="channels_first")
            self.downsample_layers.append(nn.Sequential(norm, nn.Conv2d(dims[i], dims[i + 1], 2, 2)))
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.stages = nn.ModuleList()
        for dim, depth, order, size in zip(dims, depths, orders, filter_sizes, strict=True):
            blocks = [
                Block(dim, GnConv(dim, order, size, scale), next(rates), layer_scale_init_value) for _ in range(depth)
            ]
            self.stages.append(nn.Sequential(*blocks))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes)
        self.apply(self._init_weights)

    def _init_weights(self, m: nn.Module) -> None:
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.norm(x.mean([-2, -1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


def create_model(name: str, num_classes: int = 1000, **kwargs) -> nn.Module:
    return HorNet(**{**VARIANTS[name], "num_classes": num_classes, **kwargs})
