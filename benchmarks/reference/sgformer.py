"""SG-Former in plain eager PyTorch, laid out as its authors publish it: what our model is timed against.

"SG-Former: Self-guided Transformer with Evolving Token Reallocation" (arXiv 2308.12216). Attention is a product, a
softmax and a product; guided blocks sort and merge the map twice, once for each half of the heads, as published.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import nn


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
        x = self.fc1(x)
        return self.fc2(self.act(x + self.dwconv(x, H, W)))


# By ratio: tokens of a group in each section of the sorted sequence; sections are a quarter, a half and a quarter, or
# two halves.
GROUPS = {8: (196, 56, 28), 4: (49, 14, 7), 2: (2, 1)}


class Attention(nn.Module):
    """Hybrid (with `sr`), guided (without, after a hybrid one) or plain attention."""

    def __init__(self, dim, num_heads, sr_ratio, linear):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.sr_ratio = sr_ratio
        self.linear = linear
        self.lepe_linear = nn.Linear(dim, dim)
        self.lepe_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = nn.Linear(dim, dim)
        if sr_ratio == 1:
            self.q = nn.Linear(dim, dim)
            self.kv = nn.Linear(dim, 2 * dim)
        elif linear:
            self.q = nn.Linear(dim, dim)
            self.kv1 = nn.Linear(dim, dim)
            self.kv2 = nn.Linear(dim, dim)
            for i, group in enumerate(GROUPS[sr_ratio], 1):
                self.add_module(f"f{i}", nn.Linear(group, 1))
        else:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim)
            self.act = nn.GELU()
            self.q1 = nn.Linear(dim, dim // 2)
            self.kv1 = nn.Linear(dim, dim)
            self.q2 = nn.Linear(dim, dim // 2)
            self.kv2 = nn.Linear(dim, dim)

    def plain(self, x):
        B, N, C = x.shape
        q = self.q(x).reshape(B, N, self.num_heads, -1).permute(0, 2, 1, 3)
        k, v = self.kv(x).reshape(B, N, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attn = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return (attn @ v).transpose(1, 2).reshape(B, N, C), None

    def hybrid(self, x, H, W):
        B, N, C = x.shape
        heads, ws = self.num_heads // 2, 7

        q1 = self.q1(x).reshape(B, N, heads, -1).permute(0, 2, 1, 3)
        y = self.sr(x.transpose(1, 2).reshape(B, C, H, W))
        h, w = y.shape[2:]
        y = self.act(self.norm(y.flatten(2).transpose(1, 2)))
        k1, v1 = self.kv1(y).reshape(B, -1, 2, heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        attn1 = ((q1 @ k1.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        x1 = (attn1 @ v1).transpose(1, 2).reshape(B, N, C // 2)
        mask = attn1.detach().mean(1).mean(1).reshape(B, 1, h, w)
        mask = F.interpolate(mask, (H, W), mode="nearest")

        def windows(t):
            t = t.reshape(B, H // ws, ws, W // ws, ws, -1).transpose(2, 3)
            return t.reshape(B, (H // ws) * (W // ws), ws * ws, -1)

        q2 = windows(self.q2(x)).unflatten(3, (heads, -1)).transpose(2, 3)
        k2, v2 = windows(self.kv2(x)).unflatten(3, (2, heads, -1)).permute(3, 0, 1, 4, 2, 5)
        attn2 = ((q2 @ k2.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        x2 = (attn2 @ v2).transpose(2, 3).reshape(B, H // ws, W // ws, ws, ws, C // 2)
        x2 = x2.transpose(2, 3).reshape(B, N, C // 2)
        local = attn2.detach().mean(2).mean(2).reshape(B, H // ws, W // ws, ws, ws)
        local = local.transpose(2, 3).reshape(B, 1, H, W)
        return torch.cat([x1, x2], dim=-1), mask + local

    def merged(self, x, mask):
        """Tokens of sorted runs: (B, N, C) by (B, N) to (B, L, C)."""
        B, N, C = x.shape
        order = torch.sort(mask, dim=1)[1]
        ends = (0, N // 2, N) if self.sr_ratio == 2 else (0, N // 4, 3 * N // 4, N)
        out = []
        for i, group in enumerate(GROUPS[self.sr_ratio]):
            index = order[:, ends[i] : ends[i + 1], None].expand(-1, -1, C)
            tokens = torch.gather(x, 1, index).reshape(B, -1, group, C)
            tokens = getattr(self, f"f{i + 1}")(tokens.transpose(2, 3))
            out.append(tokens.squeeze(-1))
        return torch.cat(out, dim=1)

    def guided(self, x, H, W, mask):
        B, N, C = x.shape
        heads = self.num_heads // 2
        q = self.q(x).reshape(B, N, self.num_heads, -1).permute(0, 2, 1, 3)
        first = self.merged(x, mask.reshape(B, N))
        turned = x.reshape(B, H, W, C).transpose(1, 2).reshape(B, N, C)
        second = self.merged(turned, mask.transpose(2, 3).reshape(B, N))
        k1, v1 = self.kv1(first).reshape(B, -1, 2, heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        k2, v2 = self.kv2(second).reshape(B, -1, 2, heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q1, q2 = q[:, :heads], q[:, heads:]
        attn1 = ((q1 @ k1.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        attn2 = ((q2 @ k2.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        x = torch.cat([attn1 @ v1, attn2 @ v2], dim=1)
        return x.transpose(1, 2).reshape(B, N, C), None

    def forward(self, x, H, W, mask):
        B, N, C = x.shape
        lepe = self.lepe_linear(x).transpose(1, 2).reshape(B, C, H, W)
        lepe = self.lepe_conv(lepe).flatten(2).transpose(1, 2)
        if self.sr_ratio == 1:
            x, mask = self.plain(x)
        elif self.linear:
            x, mask = self.guided(x, H, W, mask)
        else:
            x, mask = self.hybrid(x, H, W)
        return self.proj(x + lepe), mask


class Block(nn.Module):
    def __init__(self, dim, num_heads, sr_ratio, linear, mlp_ratio, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, sr_ratio, linear)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x, H, W, mask):
        y, mask = self.attn(self.norm1(x), H, W, mask)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x), H, W)), mask


class ConvNorm(nn.Module):
    def __init__(self, in_dim, dim, kernel, stride=1, padding=0, groups=1):
        super().__init__()
        self.c = nn.Conv2d(in_dim, dim, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.GroupNorm(1, dim)

    def forward(self, x):
        return self.bn(self.c(x))


class Head(nn.Module):
    """Stem"""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Sequential(
            ConvNorm(3, dim, 3, 2, 1), nn.GELU(), ConvNorm(dim, dim, 3, 1, 1), nn.GELU(), ConvNorm(dim, dim, 3, 2, 1)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        x = self.conv(x)
        H, W = x.shape[2:]
        return self.norm(x.flatten(2).transpose(1, 2)), H, W


class PatchMerging(nn.Module):
    def __init__(self, dim, out_dim):
        super().__init__()
        self.conv1 = ConvNorm(dim, out_dim, 1)
        self.conv2 = ConvNorm(out_dim, out_dim, 3, 2, 1, groups=out_dim)
        self.conv3 = ConvNorm(out_dim, out_dim, 1)
        self.act = nn.GELU()

    def forward(self, x):
        x = self.conv3(self.act(self.conv2(self.act(self.conv1(x)))))
        H, W = x.shape[2:]
        return x.flatten(2).transpose(1, 2), H, W


class SGFormer(nn.Module):
    def __init__(
        self,
        num_classes=1000,
        embed_dims=(64, 128, 256, 512),
        depths=(2, 4, 16, 1),
        num_heads=(2, 4, 8, 16),
        sr_ratios=(8, 4, 2, 1),
        mlp_ratio=4.0,
        img_size=224,
        drop_path_rate=0.0,
    ):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, (img_size // 4) ** 2, embed_dims[0]))
        rates = torch.linspace(0, drop_path_rate, sum(depths)).split(depths)
        for i, dim in enumerate(embed_dims):
            self.add_module(f"patch_embed{i + 1}", PatchMerging(embed_dims[i - 1], dim) if i else Head(dim))
            blocks = [
                Block(dim, num_heads[i], sr_ratios[i], bool(j % 2), mlp_ratio, rate)
                for j, rate in enumerate(rates[i].tolist())
            ]
            self.add_module(f"block{i + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{i + 1}", nn.LayerNorm(dim, eps=1e-6))
        self.head = nn.Linear(embed_dims[-1], num_classes)
        self.apply(self._init_weights)
        trunc_normal_(self.pos_embed, std=0.02)

    def _init_weights(self, m):
        if isinstance(m, nn.Linear):
            trunc_normal_(m.weight, std=0.02)
            nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Conv2d):
            fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels // m.groups
            nn.init.normal_(m.weight, std=math.sqrt(2 / fan_out))
            if m.bias is not None:
                nn.init.zeros_(m.bias)

    def _positions(self, H, W):
        N = self.pos_embed.shape[1]
        side = math.isqrt(N)
        if (side, side) == (H, W):
            return self.pos_embed
        table = self.pos_embed.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, (H, W), mode="bicubic", align_corners=False)
        return table.flatten(2).transpose(1, 2)

    def forward(self, x):
        B = x.shape[0]
        for i in range(1, 5):
            x, H, W = getattr(self, f"patch_embed{i}")(x)
            if i == 1:
                x = x + self._positions(H, W)
            mask = None
            for block in getattr(self, f"block{i}"):
                x, mask = block(x, H, W, mask)
            x = getattr(self, f"norm{i}")(x)
            if i < 4:
                x = x.reshape(B, H, W, -1).permute(0, 3, 1, 2).contiguous()
        return self.head(x.mean(dim=1))


VARIANTS: dict[str, dict] = {
    "sgformer_s": dict(),
    "sgformer_m": dict(depths=(2, 6, 28, 2)),
}


def create_model(name: str, num_classes: int = 1000, **kwargs) -> nn.Module:
    return SGFormer(num_classes, **VARIANTS[name] | kwargs)
