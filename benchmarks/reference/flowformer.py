"""Flowformer in plain eager PyTorch, laid out as its authors publish it: what our model is timed against.

"Flowformer: Linearizing Transformers with Conservation Flows" (arXiv 2202.06258). Each of the six sums is of a product
with a temporary of all tokens.
"""

import torch
from timm.layers import DropPath, trunc_normal_
from torch import nn


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Flow_Attention(nn.Module):  # noqa: N801
    def __init__(self, dim, num_heads=12, qkv_bias=True, eps=1e-6):
        super().__init__()
        self.num_heads = num_heads
        self.eps = eps
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        eps = self.eps
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, heads, N, d)
        q, k = torch.sigmoid(q), torch.sigmoid(k)
        # incoming flow of the sinks and outgoing flow of the sources
        sink_incoming = 1.0 / (((q + eps) * (k.sum(dim=2, keepdim=True) + eps)).sum(dim=3) + eps)
        source_outgoing = 1.0 / (((k + eps) * (q.sum(dim=2, keepdim=True) + eps)).sum(dim=3) + eps)
        # the same, with the other side conserved
        outgoing = (k * source_outgoing[..., None]).sum(dim=2, keepdim=True)
        conserved_sink = ((q + eps) * (outgoing + eps)).sum(dim=3) + eps
        incoming = (q * sink_incoming[..., None]).sum(dim=2, keepdim=True)
        conserved_source = ((k + eps) * (incoming + eps)).sum(dim=3) + eps
        conserved_source = torch.clamp(conserved_source, min=-1.0, max=1.0)
        # competition and allocation
        competition = torch.softmax(conserved_source, dim=-1) * float(k.shape[2])
        allocation = torch.sigmoid(conserved_sink * (float(q.shape[2]) / float(k.shape[2])))
        kv = k.transpose(-2, -1) @ (v * competition[..., None])
        x = (q * sink_incoming[..., None]) @ kv * allocation[..., None]
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    def __init__(self, dim, num_heads, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Flow_Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma = nn.Parameter(1e-5 * torch.ones(dim))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma * self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, in_dim, dim, size):
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, size, stride=size)

    def forward(self, x):
        return self.proj(x)


class Flowformer(nn.Module):
    def __init__(
        self,
        num_classes=1000,
        img_size=224,
        embed_dims=(96, 192, 384, 768),
        depths=(3, 3, 10, 3),
        num_heads=12,
        drop_path_rate=0.0,
    ):
        super().__init__()
        dims = (3, *embed_dims)
        self.patch_embed = nn.ModuleList(PatchEmbed(dims[i], dims[i + 1], 2 if i else 4) for i in range(4))
        self.pos_embed = nn.Parameter(torch.zeros(1, (img_size // 4) ** 2, embed_dims[0]))
        rates = torch.linspace(0, drop_path_rate, sum(depths)).split(depths)
        self.blocks = nn.ModuleList(
            nn.ModuleList(Block(embed_dims[i], num_heads, rate) for rate in rates[i].tolist()) for i in range(4)
        )
        self.norm = nn.LayerNorm(embed_dims[-1], eps=1e-6)
        self.head = nn.Linear(embed_dims[-1], num_classes)
        trunc_normal_(self.pos_embed, std=0.02)
        self.apply(self._init_weights)

    def _init_weights(self, m):
        if isinstance(m, nn.Linear):
            trunc_normal_(m.weight, std=0.02)
            nn.init.zeros_(m.bias)

    def forward(self, x):
        for i, (embed, blocks) in enumerate(zip(self.patch_embed, self.blocks, strict=True)):
            x = embed(x)
            B, C, H, W = x.shape
            x = x.flatten(2).transpose(1, 2)
            if i == 0:
                x = x + self.pos_embed
            for block in blocks:
                x = block(x)
            if i < 3:
                x = x.transpose(1, 2).reshape(B, C, H, W)
        return self.head(self.norm(x).mean(dim=1))


VARIANTS: dict[str, dict] = {"flowformer": dict()}


def create_model(name: str, num_classes: int = 1000, **kwargs) -> nn.Module:
    return Flowformer(num_classes, **VARIANTS[name] | kwargs)
