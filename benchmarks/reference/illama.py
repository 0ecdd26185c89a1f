"""iLLaMA in plain eager PyTorch, laid out as its authors publish it: what our model is timed against.

"Adapting LLaMA Decoder to Vision Transformer" (arXiv 2404.06773). No extension is compiled there; attention weights are
masked after their softmax, and queries and keys are turned as complex numbers, as in LLaMA.
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, to_2tuple, trunc_normal_
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self._norm(x.float()).type_as(x) * self.weight


def precompute_freqs_cis(dim, length, theta=10000.0):
    """(length, dim / 2) complex64: the turn of each position and pair of channels"""
    freqs = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)
    angles = torch.outer(torch.arange(length).float(), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary_emb(q, k, freqs_cis):
    """q, k: (B, N, heads, d)"""
    q_ = torch.view_as_complex(q.float().reshape(*q.shape[:-1], -1, 2))
    k_ = torch.view_as_complex(k.float().reshape(*k.shape[:-1], -1, 2))
    freqs_cis = freqs_cis[None, :, None, :]
    q_ = torch.view_as_real(q_ * freqs_cis).flatten(3)
    k_ = torch.view_as_real(k_ * freqs_cis).flatten(3)
    return q_.type_as(q), k_.type_as(k)


class Attention(nn.Module):
    def __init__(self, dim, num_heads, qkv_bias):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, freqs_cis, mask):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).unbind(2)
        q, k = apply_rotary_emb(q, k, freqs_cis)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, N, d)
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = attn.softmax(dim=-1) * mask
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class SwiGLU(nn.Module):
    def __init__(self, dim, mlp_ratio, multiple_of=256):
        super().__init__()
        hidden = int(2 * (mlp_ratio * dim) / 3)
        hidden = multiple_of * ((hidden + multiple_of - 1) // multiple_of)
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)
        self.fc3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x):
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio, qkv_bias, drop_path):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, mlp_ratio)

    def forward(self, x, freqs_cis, mask):
        x = x + self.drop_path(self.attn(self.norm1(x), freqs_cis, mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, img_size, patch_size, embed_dim):
        super().__init__()
        self.img_size = to_2tuple(img_size)
        self.num_patches = (self.img_size[0] // patch_size) * (self.img_size[1] // patch_size)
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)

    def forward(self, x):
        assert tuple(x.shape[2:]) == self.img_size, f"expected {self.img_size}, got {tuple(x.shape[2:])}"
        return self.proj(x).flatten(2).transpose(1, 2)


class ILLaMA(nn.Module):
    def __init__(
        self,
        num_classes=1000,
        img_size=224,
        patch_size=16,
        embed_dim=192,
        depth=12,
        num_heads=3,
        mlp_ratio=4.0,
        qkv_bias=True,
        soft_mask_rate=0.0,
        drop_path_rate=0.0,
    ):
        super().__init__()
        self.soft_mask_rate = soft_mask_rate
        self.patch_embed = PatchEmbed(img_size, patch_size, embed_dim)
        length = self.patch_embed.num_patches + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, length, embed_dim))
        # no buffer: a change of the model's type would take the imaginary parts away
        self.freqs_cis = precompute_freqs_cis(embed_dim // num_heads, length)
        rates = torch.linspace(0, drop_path_rate, depth).tolist()
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, qkv_bias, rate) for rate in rates)
        self.norm = RMSNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        self.apply(self._init_weights)

    def _init_weights(self, m):
        if isinstance(m, nn.Linear):
            trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)

    def soft_mask(self, x):
        """1 up to the query, the rate after it"""
        ones = torch.ones(1, 1, x.shape[1], x.shape[1], device=x.device, dtype=x.dtype)
        return self.soft_mask_rate * ones + (1 - self.soft_mask_rate) * ones.tril()

    def forward(self, x):
        x = self.patch_embed(x)
        x = torch.cat((x, self.cls_token.expand(x.shape[0], -1, -1)), dim=1)  # the class token comes last
        x = x + self.pos_embed
        self.freqs_cis = self.freqs_cis.to(x.device)
        mask = self.soft_mask(x)
        for block in self.blocks:
            x = block(x, self.freqs_cis, mask)
        return self.head(self.norm(x)[:, -1])


VARIANTS: dict[str, dict] = {
    "illama_tiny": dict(embed_dim=192, num_heads=3),
    "illama_small": dict(embed_dim=384, num_heads=6),
}


def create_model(name: str, num_classes: int = 1000, **kwargs) -> nn.Module:
    return ILLaMA(num_classes, **VARIANTS[name] | kwargs)
