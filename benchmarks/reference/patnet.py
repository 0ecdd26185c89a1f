"""PATNet in plain eager PyTorch, laid out as its authors publish it: what our model is timed against.

"Partial Convolution Meets Visual Attention" (arXiv 2503.03148). The relative position bias is looked up in its table by
indexing, which has never needed the compiled operator that its authors offer for other modes.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import nn


class ChannelGate(nn.Module):
    """A gate for each channel from the mean and standard deviation of all"""

    def __init__(self, dim):
        super().__init__()
        self.cfc1 = nn.Conv2d(dim, dim, (1, 2), bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x):
        mean = x.mean(dim=(2, 3), keepdim=True)
        std = x.std(dim=(2, 3), keepdim=True)
        gate = F.hardsigmoid(self.bn(self.cfc1(torch.cat((mean, std), dim=-1))))
        return x * gate


class PartialChannelAttention(nn.Module):
    """3x3 convolution of the first quarter of the channels, channel attention for the others (PAT_ch)"""

    def __init__(self, dim, n_div):
        super().__init__()
        self.split = (dim // n_div, dim - dim // n_div)
        self.partial_conv3 = nn.Conv2d(self.split[0], self.split[0], 3, padding=1, bias=False)
        self.attn = ChannelGate(self.split[1])
        self.norm = nn.BatchNorm2d(self.split[1])

    def forward(self, x):
        x1, x2 = torch.split(x, self.split, dim=1)
        return torch.cat((self.partial_conv3(x1), self.norm(self.attn(x2))), dim=1)


@lru_cache
@torch.inference_mode(False)  # what is kept serves training too
def distance_buckets(H, W, device):
    """(N, N) columns of the table: rounded distances, coarser in steps of their logarithm from 20 on"""
    alpha, beta, gamma = 20, 40, 160
    y, x = torch.meshgrid(torch.arange(H, device=device), torch.arange(W, device=device), indexing="ij")
    p = torch.stack((y.flatten(), x.flatten()), dim=-1).float()
    d = (p[:, None] - p[None]).square().sum(-1).sqrt().round()
    far = alpha + (d.clamp(min=1) / alpha).log() / math.log(gamma / alpha) * (beta - alpha)
    return beta + torch.where(d <= alpha, d, far.round().clamp(max=beta)).long()


class RelativePositionBias(nn.Module):
    def __init__(self, num_heads):
        super().__init__()
        self.lookup_table_bias = nn.Parameter(torch.zeros(num_heads, 81))

    def forward(self, H, W):
        buckets = distance_buckets(H, W, self.lookup_table_bias.device)
        return self.lookup_table_bias[:, buckets.flatten()].view(1, -1, H * W, H * W)


class Attention(nn.Module):
    def __init__(self, dim, num_heads, attn_drop=0.1, proj_drop=0.1):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rpe_k = RelativePositionBias(num_heads)

    def forward(self, x, H, W):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = attn + self.rpe_k(H, W)
        attn = self.attn_drop(attn.softmax(dim=-1))
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))


class PartialSelfAttention(nn.Module):
    """3x3 convolution of the first quarter of the channels, self-attention for the others (PAT_sf)"""

    def __init__(self, dim, n_div, num_heads):
        super().__init__()
        self.split = (dim // n_div, dim - dim // n_div)
        self.partial_conv3 = nn.Conv2d(self.split[0], self.split[0], 3, padding=1, bias=False)
        self.attn = Attention(self.split[1], num_heads)
        self.norm = nn.LayerNorm(self.split[1], eps=1e-6)

    def forward(self, x):
        H, W = x.shape[2:]
        x1, x2 = torch.split(x, self.split, dim=1)
        x2 = self.attn(self.norm(x2.flatten(2).transpose(1, 2)), H, W)
        x2 = x2.transpose(1, 2).reshape(-1, self.split[1], H, W)
        return torch.cat((self.partial_conv3(x1), x2), dim=1)


class PartialSpatialAttention(nn.Module):
    """A gate for each position of half of the channels, 1x1 convolution of the others (PAT_sp)"""

    def __init__(self, dim):
        super().__init__()
        self.split = (dim - dim // 2, dim // 2)
        self.conv = nn.Conv2d(self.split[1], self.split[1], 1, bias=False)
        self.conv_attn = nn.Conv2d(self.split[0], 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(self.split[0])
        self.norm2 = nn.BatchNorm2d(self.split[1])

    def forward(self, x):
        x1, x2 = torch.split(x, self.split, dim=1)
        x1 = self.norm(x1 * F.hardsigmoid(self.conv_attn(x1)))
        return torch.cat((x1, self.conv(self.norm2(x2))), dim=1)


class Block(nn.Module):
    def __init__(self, dim, n_div, mlp_ratio, act_layer, use_spatial_attn, num_heads, drop_path, last):
        super().__init__()
        self.last = last
        self.spatial_mixing = (
            PartialSelfAttention(dim, n_div, num_heads) if last else PartialChannelAttention(dim, n_div)
        )
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            act_layer(),
            nn.Conv2d(hidden, dim, 1, bias=False),
        )
        if use_spatial_attn:
            self.mlp.append(PartialSpatialAttention(dim))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x):
        if self.last:
            x = x + self.spatial_mixing(x)
            return x + self.drop_path(self.mlp(x))
        return x + self.drop_path(self.mlp(self.spatial_mixing(x)))


class Stage(nn.Module):
    def __init__(self, dim, rates, **block):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(dim, drop_path=rate, **block) for rate in rates))

    def forward(self, x):
        return self.blocks(x)


class PatchEmbed(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 4, stride=4, bias=False)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x):
        return self.norm(self.proj(x))


class PatchMerging(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 2, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(2 * dim)

    def forward(self, x):
        return self.norm(self.reduction(x))


class PATNet(nn.Module):
    def __init__(
        self,
        num_classes=1000,
        embed_dim=96,
        depths=(1, 2, 8, 2),
        act_layer="relu",
        use_spatial_attn=True,
        num_heads=4,
        mlp_ratio=2.0,
        n_div=4,
        feature_dim=1280,
        drop_path_rate=0.0,
    ):
        super().__init__()
        act = {"relu": lambda: nn.ReLU(inplace=True), "gelu": nn.GELU}[act_layer]
        self.patch_embed = PatchEmbed(embed_dim)
        rates = torch.linspace(0, drop_path_rate, sum(depths)).split(depths)
        stages = []
        for i in range(4):
            dim = embed_dim * 2**i
            if i > 0:
                stages.append(PatchMerging(dim // 2))
            block = dict(n_div=n_div, mlp_ratio=mlp_ratio, act_layer=act, num_heads=num_heads, last=i == 3)
            stages.append(Stage(dim, rates[i].tolist(), use_spatial_attn=use_spatial_attn, **block))
        self.stages = nn.Sequential(*stages)
        self.avgpool_pre_head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, feature_dim, 1, bias=False), act()
        )
        self.head = nn.Linear(feature_dim, num_classes)
        self.apply(self._init_weights)

    def _init_weights(self, m):
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)

    def forward(self, x):
        x = self.stages(self.patch_embed(x))
        return self.head(self.avgpool_pre_head(x).flatten(1))


T0 = dict(embed_dim=32, depths=(1, 2, 8, 2), act_layer="gelu")
T1 = dict(embed_dim=48, depths=(1, 2, 8, 2), act_layer="gelu")
T2 = dict(embed_dim=64, depths=(2, 2, 6, 4))
S = dict(embed_dim=96, depths=(2, 2, 9, 4))
M = dict(embed_dim=128, depths=(2, 3, 16, 4))
VARIANTS: dict[str, dict] = {
    "patnet_t0": dict(T0, use_spatial_attn=False),
    "patnet_t1": T1,
    "patnet_t2": dict(T2, use_spatial_attn=False),
    "patnet_s": dict(S, use_spatial_attn=False),
    "patnet_m": dict(M, use_spatial_attn=False),
    "patnet_t0_full": T0,
    "patnet_t1_full": dict(T1, num_heads=6),
    "patnet_t2_full": dict(T2, num_heads=6),
    "patnet_s_full": dict(S, num_heads=6),
}


def create_model(name: str, num_classes: int = 1000, **kwargs) -> nn.Module:
    return PATNet(num_classes, **VARIANTS[name] | kwargs)
