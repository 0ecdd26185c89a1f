"""AttNet in plain eager PyTorch, laid out as its authors publish it: what our model is timed against.

"Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency" (arXiv 2510.20092).
No extension is compiled there; kernels of each image are applied by one convolution with the batch in its groups.
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import nn


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RMSNorm2d(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(dim=1, keepdim=True) + self.eps)
        return x * self.weight.view(1, -1, 1, 1)


class ATConv(nn.Module):
    """Depthwise convolution whose kernels are generated from the whole map"""

    def __init__(self, dim, kernel_size, bias):
        super().__init__()
        self.kernel_size = kernel_size
        self.difference_control = nn.Parameter(torch.zeros(dim))
        self.kernel_proj = nn.Conv2d(dim, dim, 1, bias=bias)
        self.pool = nn.AdaptiveAvgPool1d(kernel_size**2)  # over the sequence of rows, not over a grid
        self.act = nn.GELU()
        self.kernel_gen = nn.Linear(kernel_size**2, kernel_size**2)
        self.x_proj = nn.Conv2d(dim, dim, 1, bias=bias)
        self.proj = nn.Conv2d(dim, dim, 1, bias=bias)

    def forward(self, x):
        B, C, H, W = x.shape
        kernel = self.pool(self.kernel_proj(x).flatten(2))
        kernel = self.kernel_gen(self.act(kernel))  # (B, C, K * K)
        inhibition = torch.sigmoid(self.difference_control).view(1, C, 1)
        kernel = kernel - inhibition * kernel.mean(dim=-1, keepdim=True)
        kernel = kernel.reshape(B * C, 1, self.kernel_size, self.kernel_size)
        x = self.x_proj(x).reshape(1, B * C, H, W)
        x = F.conv2d(x, kernel, padding=self.kernel_size // 2, groups=B * C)
        return self.proj(x.reshape(B, C, H, W))


class GLU(nn.Module):
    def __init__(self, dim, exp_rate, dconv, norm, bias):
        super().__init__()
        hidden = int(2 * int(dim * exp_rate) / 3)
        self.fc1 = nn.Conv2d(dim, 2 * hidden, 1, bias=bias)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=bias) if dconv else nn.Identity()
        self.act = nn.GELU()
        self.norm_layer = RMSNorm2d(hidden) if norm else nn.Identity()
        self.fc2 = nn.Conv2d(hidden, dim, 1, bias=bias)

    def forward(self, x):
        gate, value = self.fc1(x).chunk(2, dim=1)
        return self.fc2(self.norm_layer(self.act(self.dwconv(gate)) * value))


class LayerScale(nn.Module):
    def __init__(self, dim, init_value=1e-6):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_value))

    def forward(self, x):
        return x * self.gamma.view(1, -1, 1, 1)


class Block(nn.Module):
    def __init__(self, dim, exp_rate, kernel_size, bias, use_layer_scale, glu_dconv, glu_norm, drop_path):
        super().__init__()
        self.norm_1 = LayerNorm2d(dim, eps=1e-6)
        self.token_mixer = ATConv(dim, kernel_size, bias)
        self.layer_scale_1 = LayerScale(dim) if use_layer_scale else nn.Identity()
        self.norm_2 = LayerNorm2d(dim, eps=1e-6)
        self.channel_mixer = GLU(dim, exp_rate, glu_dconv, glu_norm, bias)
        self.layer_scale_2 = LayerScale(dim) if use_layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x):
        x = x + self.drop_path(self.layer_scale_1(self.token_mixer(self.norm_1(x))))
        return x + self.drop_path(self.layer_scale_2(self.channel_mixer(self.norm_2(x))))


def downsample(in_channels, out_channels):
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class AttNet(nn.Module):
    def __init__(
        self,
        num_classes=1000,
        depths=(2, 3, 12, 3),
        dims=(48, 96, 224, 384),
        exp_rates=(8, 8, 4, 4),
        kernel_sizes=(3, 3, 3, 3),
        conv_bias=True,
        use_layer_scale=True,
        glu_dconv=(True, True, True, True),
        glu_norm=(True, True, True, True),
        drop_path_rate=0.0,
    ):
        super().__init__()
        stem = nn.Sequential(downsample(3, dims[0] // 2), nn.GELU(), downsample(dims[0] // 2, dims[0]))
        self.downsample_layers = nn.ModuleList([stem, *(downsample(dims[i], dims[i + 1]) for i in range(3))])
        rates = torch.linspace(0, drop_path_rate, sum(depths)).split(depths)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    Block(
                        dims[i],
                        exp_rates[i],
                        kernel_sizes[i],
                        conv_bias,
                        use_layer_scale,
                        glu_dconv[i],
                        glu_norm[i],
                        drop_path=rate,
                    )
                    for rate in rates[i].tolist()
                )
            )
            for i in range(4)
        )
        self.norm = nn.LayerNorm(dims[3])
        self.head = nn.Linear(dims[3], num_classes)
        self.apply(self._init_weights)

    def _init_weights(self, m):
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)

    def forward(self, x):
        for downsample_layer, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample_layer(x))
        return self.head(self.norm(x.mean(dim=(2, 3))))


NO_NORM = (False, False, False, False)
VARIANTS: dict[str, dict] = {
    "attnet_xxs": dict(depths=(2, 2, 4, 2), dims=(32, 64, 128, 240), use_layer_scale=False, glu_norm=NO_NORM),
    "attnet_xs": dict(depths=(2, 2, 7, 2), dims=(40, 80, 160, 320), glu_norm=NO_NORM),
    "attnet_s": dict(depths=(2, 3, 10, 3), dims=(40, 80, 160, 320), use_layer_scale=False, glu_norm=NO_NORM),
    "attnet_t1": dict(depths=(2, 3, 12, 3), dims=(48, 96, 224, 384)),
    "attnet_t2": dict(depths=(3, 3, 16, 3), dims=(64, 128, 288, 512)),
    "attnet_t3": dict(depths=(4, 4, 26, 4), dims=(72, 144, 320, 576)),
}


def create_model(name: str, num_classes: int = 1000, **kwargs) -> nn.Module:
    return AttNet(num_classes, **VARIANTS[name] | kwargs)
