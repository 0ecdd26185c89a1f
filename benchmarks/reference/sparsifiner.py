"""Sparsifiner as published, to time ours against: "Sparsifiner: Learning Sparse Instance-Dependent Attention for
Efficient Vision Transformers", arXiv 2303.13755.

The published code needs no compiled extension: the chosen keys are a mask of the whole attention matrix. What only
records (second softmax, lists of masks, counts), thresholds in place of top-k and the first phase of training, which
fits the predictor to a teacher, are left out; in training mode the LV-ViT form returns the logits of the class token.
"""

import math

import torch
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

LVVIT = {"mlp_ratio": 3.0, "lvvit": True}
VARIANTS = {
    "sparsifiner_deit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "sparsifiner_lvvit_s": {"embed_dim": 384, "depth": 16, "num_heads": 6} | LVVIT,
    "sparsifiner_lvvit_m": {"embed_dim": 512, "depth": 20, "num_heads": 8} | LVVIT,
}


class MaskPredictor(nn.Module):
    """Which keys each query keeps: queries and keys (B, heads, N, d) to a boolean mask (B, heads, N, N)."""

    def __init__(
        self, head_dim: int, num_tokens: int, num_heads: int, keep_rate: float, reduce_n_factor: int, topk: int
    ) -> None:
        super().__init__()
        self.scale = num_heads**-0.5
        self.budget = math.ceil(keep_rate * num_tokens)
        self.topk = topk
        self.proj_n = nn.Parameter(torch.zeros(num_tokens, num_tokens // reduce_n_factor))
        self.proj_back_n = nn.Parameter(torch.zeros(num_tokens, num_tokens // reduce_n_factor))
        trunc_normal_(self.proj_n, std=0.02)
        trunc_normal_(self.proj_back_n, std=0.02)
        self.proj_c_q = nn.Linear(head_dim, head_dim // 2)
        self.proj_c_k = nn.Linear(head_dim, head_dim // 2)

    def forward(self, q: Tensor, k: Tensor, alive: Tensor | None) -> Tensor:
        q, k = self.proj_c_q(q), self.proj_c_k(k)
        if alive is not None:
            q, k = q * alive[:, None, :, None], k * alive[:, None, :, None]
        k = k.transpose(-2, -1) @ self.proj_n  # (B, heads, c, K)
        coef = ((q @ k) * self.scale)[:, :, 1:].softmax(dim=-1)  # of patches only: the class token attends to all
        basis = self.proj_back_n.transpose(-2, -1).abs()
        basis = torch.where(basis > 0.02, basis, torch.zeros_like(basis))
        values, indices = coef.topk(self.topk, dim=-1)
        coef = torch.zeros_like(coef).scatter(-1, indices, values)
        score = coef @ basis  # (B, heads, N - 1, N)
        budget = self.budget
        if alive is not None:
            score = score.masked_fill(~alive[:, None, None, :], float("-inf"))
            budget = min(budget, int(alive[0, 1:].sum()))
        indices = score.topk(budget, dim=-1).indices
        mask = torch.zeros_like(score, dtype=torch.bool).scatter(-1, indices, True)
        return torch.cat([torch.ones_like(mask[:, :, :1]), mask], dim=2)


class Attention(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool, token_budget: int | None, predictor: nn.Module
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.token_budget = token_budget
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.mask_predictor = predictor

    def forward(self, x: Tensor, alive: Tensor | None) -> tuple[Tensor, Tensor | None]:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        if alive is not None:
            q, k, v = (t * alive[:, None, :, None] for t in (q, k, v))
        mask = self.mask_predictor(q, k, alive)
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = attn.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        if self.token_budget is not None:
            score = attn[:, :, 0].mean(dim=1)
            if alive is not None:
                score = score.masked_fill(~alive, float("-inf"))
            indices = score[:, 1:].topk(self.token_budget, dim=-1).indices + 1
            alive = torch.zeros_like(score, dtype=torch.bool).scatter(-1, indices, True)
            alive[:, 0] = True
        return self.proj(x), alive


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Tokens and which of them are alive (B, N), if not all, to the same."""

    eps = 1e-6

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float, attn: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=self.eps)
        self.attn = attn
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=self.eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, alive: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y, alive = self.attn(self.norm1(x), alive)
        x = x + self.drop_path(y)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        if alive is not None:
            x = x * alive[:, :, None]
        return x, alive


class LVBlock(Block):
    eps = 1e-5
    skip_lam = 2.0

    def forward(self, x: Tensor, alive: None) -> tuple[Tensor, None]:
        y, _ = self.attn(self.norm1(x), None)
        x = x + self.drop_path(y) / self.skip_lam
        x = x + self.drop_path(self.mlp(self.norm2(x))) / self.skip_lam
        return x, None


class PatchEmbed(nn.Module):
    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class PatchEmbedConv(nn.Module):
    """The stem of LV-ViT."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 64, 3, 1, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.proj = nn.Conv2d(64, dim, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.relu(self.bn3(self.conv3(x)))
        return self.proj(x)


class Sparsifiner(nn.Module):
    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        lvvit: bool = False,
        attn_keep_rate: float = 0.25,
        token_keep_rate: float = 1.0,
        token_pruning_loc: tuple[int, ...] = (),
        reduce_n_factor: int = 6,
        basis_coef_topk: int = 8,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        block = LVBlock if lvvit else Block
        num_patches = (img_size // 16) ** 2
        self.patch_embed = (PatchEmbedConv if lvvit else PatchEmbed)(in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + 1, embed_dim))
        self.blocks = nn.ModuleList()
        for i, rate in enumerate(torch.linspace(0, drop_path_rate, depth).tolist()):
            predictor = MaskPredictor(
                embed_dim // num_heads, num_patches + 1, num_heads, attn_keep_rate, reduce_n_factor, basis_coef_topk
            )
            budget = math.ceil(token_keep_rate ** (i // 3) * num_patches) if i in token_pruning_loc else None
            attn = Attention(embed_dim, num_heads, not lvvit, budget, predictor)
            self.blocks.append(block(embed_dim, mlp_ratio, rate, attn))
        self.norm = nn.LayerNorm(embed_dim, eps=block.eps)
        self.head = nn.Linear(embed_dim, num_classes)
        self.aux_head = nn.Linear(embed_dim, num_classes) if lvvit else None
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        self.apply(self._init_weights)

    def _init_weights(self, m: nn.Module) -> None:
        if isinstance(m, nn.Linear):
            trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.pos_embed
        alive = None
        for block in self.blocks:
            x, alive = block(x, alive)
        x = self.norm(x)
        logits = self.head(x[:, 0])
        if self.aux_head is None or self.training:
            return logits
        return logits + 0.5 * self.aux_head(x[:, 1:]).max(dim=1)[0]


def create_model(name: str, num_classes: int = 1000, **kwargs) -> nn.Module:
    return Sparsifiner(**{**VARIANTS[name], "num_classes": num_classes, **kwargs})
