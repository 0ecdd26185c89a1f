"""LITv2 in plain eager PyTorch, laid out as its authors publish it: what our model is timed against.

"Fast Vision Transformers with HiLo Attention" (arXiv 2205.13213). The deformable convolution of the token merging, an
extension to compile there, is torchvision's, which computes the same.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import nn
from torchvision.ops import deform_conv2d


class DWConv(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x, H, W):
        B, N, C = x.shape
        x = x.transpose(1, 2).reshape(B, C, H, W)
        return self.dwconv(x).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DWConv(hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x, H, W):
        return self.fc2(self.act(self.dwconv(self.fc1(x), H, W)))


class HiLo(nn.Module):
    def __init__(self, dim, num_heads, window_size, alpha):
        super().__init__()
        head_dim = dim // num_heads
        self.scale = head_dim**-0.5
        self.ws = window_size
        self.l_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        self.h_heads = num_heads - self.l_heads
        self.l_dim = self.l_heads * head_dim
        self.h_dim = self.h_heads * head_dim
        if self.l_heads > 0:
            if self.ws > 1:
                self.sr = nn.AvgPool2d(self.ws)
            self.l_q = nn.Linear(dim, self.l_dim)
            self.l_kv = nn.Linear(dim, 2 * self.l_dim)
            self.l_proj = nn.Linear(self.l_dim, self.l_dim)
        if self.h_heads > 0:
            self.h_qkv = nn.Linear(dim, 3 * self.h_dim)
            self.h_proj = nn.Linear(self.h_dim, self.h_dim)

    def hifi(self, x):
        B, H, W, C = x.shape
        h, w, s = H // self.ws, W // self.ws, self.ws
        x = x.reshape(B, h, s, w, s, C).transpose(2, 3).reshape(B, h * w, s * s, C)
        qkv = self.h_qkv(x).reshape(B, h * w, s * s, 3, self.h_heads, -1).permute(3, 0, 1, 4, 2, 5)
        q, k, v = qkv.unbind(0)  # (B, windows, heads, tokens, d)
        attn = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        x = (attn @ v).transpose(2, 3).reshape(B, h, w, s, s, self.h_dim)
        return self.h_proj(x.transpose(2, 3).reshape(B, H, W, self.h_dim))

    def lofi(self, x):
        B, H, W, C = x.shape
        q = self.l_q(x).reshape(B, H * W, self.l_heads, -1).transpose(1, 2)
        if self.ws > 1:
            x = self.sr(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        kv = self.l_kv(x).reshape(B, -1, 2, self.l_heads, self.l_dim // self.l_heads).permute(2, 0, 3, 1, 4)
        k, v = kv.unbind(0)
        attn = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.l_proj((attn @ v).transpose(1, 2).reshape(B, H, W, self.l_dim))

    def forward(self, x, H, W):
        B, N, C = x.shape
        x = x.reshape(B, H, W, C)
        pad_h, pad_w = -H % self.ws, -W % self.ws  # as the detection code has it; never at 224
        if pad_h or pad_w:
            x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
        if self.h_heads == 0:
            x = self.lofi(x)
        elif self.l_heads == 0:
            x = self.hifi(x)
        else:
            x = torch.cat((self.hifi(x), self.lofi(x)), dim=-1)
        if pad_h or pad_w:
            x = x[:, :H, :W]
        return x.reshape(B, N, C)


class Block(nn.Module):
    def __init__(self, dim, num_heads, window_size, alpha, mlp_ratio, has_msa, drop_path):
        super().__init__()
        self.has_msa = has_msa
        if has_msa:
            self.norm1 = nn.LayerNorm(dim)
            self.attn = HiLo(dim, num_heads, window_size, alpha)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x, H, W):
        if self.has_msa:
            x = x + self.drop_path(self.attn(self.norm1(x), H, W))
        return x + self.drop_path(self.mlp(self.norm2(x), H, W))


class DeformConv2d(nn.Conv2d):
    """2x2, stride 2; each tap is shifted by a predicted (y, x)."""

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, 2, stride=2)
        self.conv_offset = nn.Conv2d(in_channels, 8, 2, stride=2)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x):
        dtype = self.weight.dtype  # published to run in float32 under autocast
        return deform_conv2d(x.to(dtype), self.conv_offset(x).to(dtype), self.weight, self.bias, stride=2)


class DTM(nn.Module):
    """Deformable token merging"""

    def __init__(self, dim):
        super().__init__()
        self.dconv = DeformConv2d(dim, 2 * dim)
        self.norm_layer = nn.BatchNorm2d(2 * dim)
        self.act_layer = nn.GELU()

    def forward(self, x, H, W):
        B, N, C = x.shape
        x = x.reshape(B, H, W, C).permute(0, 3, 1, 2).contiguous()
        x = self.act_layer(self.norm_layer(self.dconv(x)))
        return x.flatten(2).transpose(1, 2), *x.shape[2:]


class Layer(nn.Module):
    def __init__(self, dim, rates, downsample, **block):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, drop_path=rate, **block) for rate in rates)
        self.downsample = DTM(dim) if downsample else None

    def forward(self, x, H, W):
        for block in self.blocks:
            x = block(x, H, W)
        return (x, H, W) if self.downsample is None else self.downsample(x, H, W)


class PatchEmbed(nn.Module):
    def __init__(self, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, 4, stride=4)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x):
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), *x.shape[2:]


class LITv2(nn.Module):
    def __init__(
        self,
        num_classes=1000,
        embed_dim=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        alpha=0.9,
        has_msa=(0, 0, 1, 1),
        local_ws=(0, 0, 2, 1),
        mlp_ratio=4.0,
        drop_path_rate=0.0,
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(embed_dim)
        rates = torch.linspace(0, drop_path_rate, sum(depths)).split(depths)
        self.layers = nn.ModuleList(
            Layer(
                embed_dim * 2**i,
                rates[i].tolist(),
                downsample=i < 3,
                num_heads=num_heads[i],
                window_size=local_ws[i],
                alpha=alpha,
                mlp_ratio=mlp_ratio,
                has_msa=has_msa[i],
            )
            for i in range(4)
        )
        self.norm = nn.LayerNorm(embed_dim * 8)
        self.head = nn.Linear(embed_dim * 8, num_classes)
        self.apply(self._init_weights)

    def _init_weights(self, m):
        if isinstance(m, nn.Linear):
            trunc_normal_(m.weight, std=0.02)
            nn.init.zeros_(m.bias)
        elif isinstance(m, DWConv):
            nn.init.normal_(m.dwconv.weight, std=math.sqrt(2 / 9))
            nn.init.zeros_(m.dwconv.bias)

    def forward(self, x):
        x, H, W = self.patch_embed(x)
        for layer in self.layers:
            x, H, W = layer(x, H, W)
        return self.head(self.norm(x).mean(dim=1))


VARIANTS: dict[str, dict] = {
    "litv2_small": dict(),
    "litv2_medium": dict(depths=(2, 2, 18, 2)),
    "litv2_small_alpha00": dict(alpha=0.0),
    "litv2_small_alpha02": dict(alpha=0.2),
    "litv2_small_alpha04": dict(alpha=0.4),
    "litv2_small_alpha05": dict(alpha=0.5),
    "litv2_small_alpha07": dict(alpha=0.7),
    "litv2_small_alpha09": dict(alpha=0.9),
    "litv2_small_alpha10": dict(alpha=1.0),
}


def create_model(name: str, num_classes: int = 1000, **kwargs) -> nn.Module:
    return LITv2(num_classes, **VARIANTS[name] | kwargs)
