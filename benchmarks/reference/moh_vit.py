"""MoH-ViT in plain eager PyTorch, as the papers describe it: what our model is timed against.

"MoH: Multi-Head Attention as Mixture-of-Head Attention" (arXiv 2410.11842) on "TransNeXt: Robust Foveal Visual
Perception for Vision Transformers" (arXiv 2311.17132). Keys and values are unfolded to nine copies, local and pooled
logits are put side by side, and the position bias is made of the weights in every pass.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import nn


@cache
@torch.inference_mode(False)  # what is kept may be needed for gradients
def coordinates(size, key_size, pretrain_size, device):
    """Distinct relative coordinates (M, 2), and which of them each pair of query and key has."""
    axes = []
    for n, m in zip(size, key_size, strict=True):
        place = torch.arange(n, device=device, dtype=torch.float32)
        axes.append((place, F.adaptive_avg_pool1d(place[None], m)[0]))
    (qy, ky), (qx, kx) = axes
    query = torch.stack(torch.meshgrid(qy, qx, indexing="ij"), -1).reshape(-1, 1, 2)
    key = torch.stack(torch.meshgrid(ky, kx, indexing="ij"), -1).reshape(1, -1, 2)
    table, index = (query - key).reshape(-1, 2).unique(dim=0, return_inverse=True)
    table = 8 * table / (pretrain_size - 1)
    return table.sign() * torch.log2(table.abs() + 1) / math.log2(8), index


@cache
@torch.inference_mode(False)  # what is kept may be needed for gradients
def in_map(size, device):
    """Whether each of the nine neighbours is in the map: (1, N, 9)."""
    return F.unfold(torch.ones(1, 1, *size, device=device), 3, padding=1).transpose(1, 2) > 0


class MoH(nn.Module):
    """What both kinds of attention share: routing, position bias, learned temperature."""

    def __init__(self, dim, num_heads, pretrain_size, shared, top_k):
        super().__init__()
        self.num_heads, self.head_dim, self.pretrain_size = num_heads, dim // num_heads, pretrain_size
        self.shared, self.routed, self.top_k = shared, num_heads - shared, top_k
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), math.log(math.exp(1 / 0.24) - 1)))
        self.query_embedding = nn.Parameter(trunc_normal_(torch.empty(num_heads, 1, self.head_dim), std=0.02))
        self.proj = nn.Linear(dim, dim)
        self.cpb_fc1 = nn.Linear(2, 512)
        self.cpb_fc2 = nn.Linear(512, num_heads)
        if top_k > 0:
            self.wg = nn.Linear(dim, self.routed, bias=False)
            if shared > 0:
                self.wg_0 = nn.Linear(dim, 2, bias=False)
        if shared > 1:
            self.wg_1 = nn.Linear(dim, shared, bias=False)
        self.aux_loss = None

    def gates(self, x):
        shared = None
        if self.shared > 1:
            shared = self.shared * self.wg_1(x).softmax(-1)
        elif self.shared == 1:
            shared = torch.ones_like(x[..., :1])
        if self.top_k == 0:
            return shared
        p = self.wg(x).softmax(-1)
        mask = torch.zeros_like(p).scatter_(-1, p.topk(self.top_k, dim=-1).indices, 1.0)
        if self.training:
            self.aux_loss = self.routed * (p.mean((0, 1)) * mask.mean((0, 1))).sum()
        kept = p * mask
        routed = self.top_k * kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).eps)
        if shared is None:
            return routed
        weight = 2 * self.wg_0(x).softmax(-1)
        return torch.cat([weight[..., :1] * shared, weight[..., 1:] * routed], dim=-1)

    def position_bias(self, size, key_size, x):
        table, index = coordinates(size, key_size, self.pretrain_size, x.device)
        bias = self.cpb_fc2(F.relu(self.cpb_fc1(table.to(x.dtype))))
        return bias.transpose(0, 1)[:, index].view(self.num_heads, size[0] * size[1], -1)

    def heads(self, x, parts):
        B, N, _ = x.shape
        return x.view(B, N, parts * self.num_heads, self.head_dim).transpose(1, 2).chunk(parts, dim=1)

    def out(self, y, x):
        y = y.transpose(1, 2) * self.gates(x).unsqueeze(-1)
        return self.proj(y.flatten(2))


class Attention(MoH):
    def __init__(self, dim, num_heads, pretrain_size, shared, top_k):
        super().__init__(dim, num_heads, pretrain_size, shared, top_k)
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x, H, W):
        q, k, v = self.heads(self.qkv(x), 3)
        q = (F.normalize(q, dim=-1) + self.query_embedding) * F.softplus(self.temperature) * math.log(H * W)
        attn = q @ F.normalize(k, dim=-1).transpose(-2, -1) + self.position_bias((H, W), (H, W), x)
        return self.out(attn.softmax(dim=-1) @ v, x)


class AggregatedAttention(MoH):
    def __init__(self, dim, num_heads, pretrain_size, shared, top_k, sr_ratio):
        super().__init__(dim, num_heads, pretrain_size, shared, top_k)
        self.sr_ratio = sr_ratio
        self.relative_pos_bias_local = nn.Parameter(trunc_normal_(torch.empty(num_heads, 9), std=0.0004))
        self.learnable_tokens = nn.Parameter(trunc_normal_(torch.empty(num_heads, self.head_dim, 9), std=0.02))
        self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, 9))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x, H, W):
        B, N, C = x.shape
        h, w = H // self.sr_ratio, W // self.sr_ratio
        inside = in_map((H, W), x.device)
        length = torch.log(inside.sum(-1) + h * w).to(x.dtype)[..., None]

        (q,) = self.heads(self.q(x), 1)
        q_norm = F.normalize(q, dim=-1)
        q = (q_norm + self.query_embedding) * F.softplus(self.temperature) * length

        k, v = self.kv(x).chunk(2, dim=-1)
        k = F.normalize(k.reshape(B, N, self.num_heads, -1), dim=-1).reshape(B, N, C)
        kv = torch.cat([k, v], dim=-1).transpose(1, 2).reshape(B, 2 * C, H, W)
        kv = F.unfold(kv, 3, padding=1).view(B, 2 * self.num_heads, self.head_dim, 9, N).permute(0, 1, 4, 2, 3)
        k_local, v_local = kv.chunk(2, dim=1)  # (B, heads, N, d, 9)
        attn_local = (q.unsqueeze(-2) @ k_local).squeeze(-2) + self.relative_pos_bias_local.unsqueeze(1)
        attn_local = attn_local.masked_fill(~inside, float("-inf"))

        z = F.gelu(self.sr(x.transpose(1, 2).reshape(B, C, H, W)))
        z = self.norm(F.adaptive_avg_pool2d(z, (h, w)).flatten(2).transpose(1, 2))
        k_pool, v_pool = self.heads(self.kv(z), 2)
        attn_pool = q @ F.normalize(k_pool, dim=-1).transpose(-2, -1) + self.position_bias((H, W), (h, w), x)

        attn_local, attn_pool = torch.cat([attn_local, attn_pool], dim=-1).softmax(dim=-1).split([9, h * w], dim=-1)
        attn_local = attn_local + q_norm @ self.learnable_tokens + self.learnable_bias
        y = (attn_local.unsqueeze(-2) @ v_local.transpose(-2, -1)).squeeze(-2) + attn_pool @ v_pool
        return self.out(y, x)


class DWConv(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x, H, W):
        B, N, C = x.shape
        x = x.transpose(1, 2).reshape(B, C, H, W)
        return self.dwconv(x).flatten(2).transpose(1, 2)


class ConvGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.dwconv = DWConv(hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x, H, W):
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.act(self.dwconv(gate, H, W)) * value)


class Block(nn.Module):
    def __init__(self, dim, attn, mlp_ratio, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvGLU(dim, int(2 * int(dim * mlp_ratio) / 3))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x, H, W):
        x = x + self.drop_path(self.attn(self.norm1(x), H, W))
        return x + self.drop_path(self.mlp(self.norm2(x), H, W))


class PatchEmbed(nn.Module):
    def __init__(self, in_chans, dim, kernel_size, stride):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride, kernel_size // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), *x.shape[2:]


class MoHViT(nn.Module):
    def __init__(
        self,
        num_classes=1000,
        img_size=224,
        pretrain_size=None,
        embed_dims=(72, 144, 288, 576),
        num_heads=(3, 6, 12, 24),
        depths=(5, 5, 22, 5),
        mlp_ratios=(8, 8, 4, 4),
        sr_ratios=(8, 4, 2, 1),
        shared=(3, 6, 3, 4),
        top_k=(0, 0, 6, 12),
        drop_path_rate=0.0,
    ):
        super().__init__()
        rates = torch.linspace(0, drop_path_rate, sum(depths)).split(depths)
        for i, dim in enumerate(embed_dims):
            args = (dim, num_heads[i], (pretrain_size or img_size) // (4 * 2**i), shared[i], top_k[i])
            embed = PatchEmbed(embed_dims[i - 1], dim, 3, 2) if i else PatchEmbed(3, dim, 7, 4)
            blocks = nn.ModuleList()
            for rate in rates[i].tolist():
                attn = Attention(*args) if sr_ratios[i] == 1 else AggregatedAttention(*args, sr_ratios[i])
                blocks.append(Block(dim, attn, mlp_ratios[i], rate))
            setattr(self, f"patch_embed{i + 1}", embed)
            setattr(self, f"block{i + 1}", blocks)
            setattr(self, f"norm{i + 1}", nn.LayerNorm(dim, eps=1e-6))
        self.head = nn.Linear(embed_dims[-1], num_classes)
        self.apply(self._init_weights)

    def _init_weights(self, m):
        if isinstance(m, nn.Linear):
            trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, std=math.sqrt(2 / (m.kernel_size[0] ** 2 * m.out_channels / m.groups)))
            nn.init.zeros_(m.bias)

    def forward(self, x):
        for i in range(1, 5):
            x, H, W = getattr(self, f"patch_embed{i}")(x)
            for block in getattr(self, f"block{i}"):
                x = block(x, H, W)
            x = getattr(self, f"norm{i}")(x)
            if i < 4:
                x = x.transpose(1, 2).reshape(len(x), -1, H, W)
        return self.head(x.mean(dim=1))


VARIANTS: dict[str, dict] = {
    "moh_vit_small_75": dict(),
    "moh_vit_small_80": dict(shared=(3, 6, 3, 8)),
}


def create_model(name: str, num_classes: int = 1000, **kwargs) -> nn.Module:
    return MoHViT(num_classes, **VARIANTS[name] | kwargs)
