"""NaLaFormer in plain eager PyTorch, laid out as its authors describe it: what our model is timed against.

"NaLaFormer: Norm-Aware Linear Attention for Transformer Models" (arXiv 2506.21137). What attention calls its parameters
is published, what the rest of the network does is not.
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import nn


class RoPE(nn.Module):
    """Sines and cosines for a map: half of the channels of a head turn by the row, half by the column"""

    def __init__(self, dim, num_heads):
        super().__init__()
        angle = 1.0 / (10000 ** torch.linspace(0, 1, dim // num_heads // 4))
        self.register_buffer("angle", angle.repeat_interleave(2), persistent=False)

    def forward(self, H, W):
        row = torch.arange(H).to(self.angle)[:, None] * self.angle
        col = torch.arange(W).to(self.angle)[:, None] * self.angle
        angles = torch.cat((row[:, None].expand(H, W, -1), col[None].expand(H, W, -1)), dim=-1).reshape(H * W, -1)
        return angles.sin(), angles.cos()


def rotate_every_two(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def theta_shift(x, sin, cos):
    return x * cos + rotate_every_two(x) * sin


class VanillaSelfAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkvg = nn.Linear(dim, dim * 4)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.out_proj = nn.Linear(dim, dim)
        self.ln = nn.LayerNorm(dim)

    def attend(self, q, k, v, sin, cos):
        q, k = theta_shift(q, sin, cos), theta_shift(k, sin, cos)
        attn = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)
        return attn @ v

    def forward(self, x, rope=None):
        B, C, H, W = x.shape
        sin, cos = RoPE(C, self.num_heads).to(x)(H, W) if rope is None else rope
        q, k, v, g = self.qkvg(x.flatten(2).transpose(1, 2)).chunk(4, dim=-1)
        lepe = self.lepe(v.transpose(1, 2).reshape(B, C, H, W))
        dtype = torch.promote_types(x.dtype, torch.float32)
        q, k, v, g = (t.to(dtype) for t in (q, k, v, g))
        q, k, v = (t.reshape(B, H * W, self.num_heads, -1).transpose(1, 2) for t in (q, k, v))
        out = self.attend(q, k, v, sin, cos).transpose(1, 2).reshape(B, H * W, C)
        out = self.ln((out + lepe.flatten(2).transpose(1, 2)).to(x.dtype)) * F.silu(g)
        return self.out_proj(out.to(x.dtype)).transpose(1, 2).reshape(B, C, H, W)


class NormAwareLinearAttn(VanillaSelfAttention):
    def attend(self, q, k, v, sin, cos):
        N = k.shape[-2]
        k = k**3
        norm = q.norm(dim=-1, keepdim=True)
        q = q / norm.clamp(min=1e-12)
        power = 3 * (0.5 + torch.tanh(norm))
        q_pos, q_neg = F.relu(q) ** power, F.relu(-q) ** power
        k_pos, k_neg = F.relu(k), F.relu(-k)
        q, k = torch.cat((q_pos, q_neg), dim=-1), torch.cat((k_pos, k_neg), dim=-1)
        z = 1 / (q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + 1e-6)
        q = torch.cat((theta_shift(q_pos, sin, cos), theta_shift(q_neg, sin, cos)), dim=-1)
        k = torch.cat((theta_shift(k_pos, sin, cos), theta_shift(k_neg, sin, cos)), dim=-1)
        kv = (k.transpose(-2, -1) * N**-0.5) @ (v * N**-0.5)
        return q @ kv * z


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerScale(nn.Module):
    def __init__(self, dim, init_value):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_value))

    def forward(self, x):
        return x * self.gamma[:, None, None]


class DWConv2d(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x):
        return x + self.proj(x)


class FeedForwardNetwork(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DWConv2d(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        x = F.gelu(self.fc1(x.permute(0, 2, 3, 1)))
        x = self.dwconv(x.permute(0, 3, 1, 2))
        return self.fc2(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    def __init__(self, dim, num_heads, linear, mlp_ratio, layer_scale, drop_path):
        super().__init__()
        self.cpe1, self.cpe2 = DWConv2d(dim), DWConv2d(dim)
        self.norm1, self.norm2 = LayerNorm2d(dim, eps=1e-6), LayerNorm2d(dim, eps=1e-6)
        self.mixer = (NormAwareLinearAttn if linear else VanillaSelfAttention)(dim, num_heads)
        self.mlp = FeedForwardNetwork(dim, int(dim * mlp_ratio))
        self.ls1, self.ls2 = LayerScale(dim, layer_scale), LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x, rope):
        x = self.cpe1(x)
        x = x + self.drop_path(self.ls1(self.mixer(self.norm1(x), rope)))
        x = self.cpe2(x)
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class ConvBN(nn.Module):
    def __init__(self, in_dim, dim, stride):
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, 3, stride, 1)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x):
        return self.norm(self.proj(x))


class Stage(nn.Module):
    def __init__(self, in_dim, dim, num_heads, rates, **block):
        super().__init__()
        self.downsample = ConvBN(in_dim, dim, 2) if in_dim else nn.Identity()
        self.rope = RoPE(dim, num_heads)
        self.blocks = nn.ModuleList(Block(dim, num_heads, drop_path=rate, **block) for rate in rates)

    def forward(self, x):
        x = self.downsample(x)
        rope = self.rope(*x.shape[2:])
        for block in self.blocks:
            x = block(x, rope)
        return x


class NaLaFormer(nn.Module):
    def __init__(
        self,
        num_classes=1000,
        embed_dims=(64, 128, 256, 512),
        depths=(2, 2, 6, 2),
        num_heads=(1, 2, 4, 8),
        mlp_ratio=4.0,
        layer_scales=(1.0, 1.0, 1.0, 1.0),
        drop_path_rate=0.0,
    ):
        super().__init__()
        dim = embed_dims[0]
        self.stem = nn.Sequential(
            ConvBN(3, dim // 2, 2), nn.GELU(), ConvBN(dim // 2, dim // 2, 1), nn.GELU(),
            ConvBN(dim // 2, dim // 2, 1), nn.GELU(), ConvBN(dim // 2, dim, 2),
        )  # fmt: skip
        rates = torch.linspace(0, drop_path_rate, sum(depths)).split(depths)
        self.stages = nn.ModuleList(
            Stage(
                embed_dims[i - 1] if i else 0,
                embed_dims[i],
                num_heads[i],
                rates[i].tolist(),
                linear=i < 2,
                mlp_ratio=mlp_ratio,
                layer_scale=layer_scales[i],
            )
            for i in range(4)
        )
        self.norm = nn.ModuleList([nn.Linear(embed_dims[-1], 1024), nn.BatchNorm2d(1024)])
        self.head = nn.Linear(1024, num_classes)
        self.apply(self._init_weights)
        trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def _init_weights(self, m):
        if isinstance(m, nn.Conv2d):
            trunc_normal_(m.weight, std=0.02)
            nn.init.zeros_(m.bias)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        proj, norm = self.norm
        x = F.silu(norm(proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))
        return self.head(x.mean(dim=(2, 3)))


VARIANTS: dict[str, dict] = {
    "nalaformer_xt": dict(embed_dims=(32, 64, 128, 384), depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 12), mlp_ratio=3.5),
    "nalaformer_t": dict(),
    "nalaformer_s": dict(embed_dims=(64, 128, 320, 512), depths=(3, 5, 9, 3), num_heads=(1, 2, 5, 8), mlp_ratio=3.5),
    "nalaformer_b": dict(
        embed_dims=(96, 192, 384, 512),
        depths=(4, 6, 12, 6),
        num_heads=(1, 2, 6, 8),
        layer_scales=(1.0, 1.0, 1e-6, 1e-6),
    ),
}


def create_model(name: str, num_classes: int = 1000, **kwargs) -> nn.Module:
    return NaLaFormer(num_classes, **VARIANTS[name] | kwargs)
