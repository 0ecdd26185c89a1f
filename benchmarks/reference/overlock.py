"""OverLoCK as published, to time ours against: "OverLoCK: An Overview-first-Look-Closely-next ConvNet with
Context-Mixing Dynamic Kernels", arXiv 2502.20087.

The published code calls NATTEN's `na2d_av`, which current releases do not have; here, as where NATTEN is missing, the
values of every window are gathered and weighed. Positions of the bias tables are made in every forward pass, as
published.
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

VARIANTS = {
    "overlock_xt": {
        "embed_dim": (56, 112, 256, 336), "depth": (2, 2, 3, 2), "sub_depth": (6, 2), "sub_num_heads": (4, 6),
    },
    "overlock_t": {
        "embed_dim": (64, 128, 256, 512), "depth": (4, 4, 6, 2), "sub_depth": (12, 2), "sub_num_heads": (4, 8),
    },
    "overlock_s": {
        "embed_dim": (64, 128, 320, 512), "depth": (6, 6, 8, 3), "sub_depth": (16, 3), "sub_num_heads": (8, 16),
    },
    "overlock_b": {
        "embed_dim": (80, 160, 384, 576), "depth": (8, 8, 10, 4), "sub_depth": (20, 4), "sub_num_heads": (6, 9),
    },
}  # fmt: skip
BRANCHES = {
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
}
SMALL = 5


def neighbours(length: int, kernel_size: int, device: torch.device) -> Tensor:
    """(length, kernel_size) positions that each one sees along an axis."""
    position = torch.arange(length, device=device)
    start = (position - kernel_size // 2).clamp(0, length - kernel_size)
    return start[:, None] + torch.arange(kernel_size, device=device)


def na2d_av(attn: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """Weights (B, G, H, W, K^2) and values (B, G, H, W, c) to (B, G, H, W, c)."""
    H, W = value.shape[2:4]
    rows, cols = neighbours(H, kernel_size, value.device), neighbours(W, kernel_size, value.device)
    seen = value[:, :, rows[:, None, :, None], cols[None, :, None, :]].flatten(4, 5)
    return torch.einsum("bghwk,bghwkc->bghwc", attn, seen)


class ResDWConv(nn.Conv2d):
    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class LayerNorm2d(nn.LayerNorm):
    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2).contiguous()


class GRN(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        Gx = torch.norm(x, p=2, dim=(-1, -2), keepdim=True)
        Nx = Gx / (Gx.mean(dim=1, keepdim=True) + 1e-6)
        return (self.gamma * Nx + 1) * x + self.beta


class SEModule(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = max(dim // 8, 16)
        self.proj = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, dim, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.proj(x)


class LayerScale(nn.Module):
    def __init__(self, dim: int, init_value: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim, 1, 1, 1), init_value))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, groups=len(self.weight))


class DilatedReparamBlock(nn.Module):
    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.branches = BRANCHES[kernel_size]
        self.lk_origin = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)
        self.origin_bn = nn.BatchNorm2d(dim)
        for k, r in self.branches:
            conv = nn.Conv2d(dim, dim, k, padding=k // 2 * r, dilation=r, groups=dim, bias=False)
            setattr(self, f"dil_conv_k{k}_{r}", conv)
            setattr(self, f"dil_bn_k{k}_{r}", nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        out = self.origin_bn(self.lk_origin(x))
        for k, r in self.branches:
            out = out + getattr(self, f"dil_bn_k{k}_{r}")(getattr(self, f"dil_conv_k{k}_{r}")(x))
        return out


class RepConvBlock(nn.Module):
    def __init__(self, dim: int, kernel_size: int, mlp_ratio: int, ls_init_value: float | None, drop_path: float):
        super().__init__()
        hidden = mlp_ratio * dim
        self.dwconv = ResDWConv(dim)
        self.proj = nn.Sequential(
            LayerNorm2d(dim), DilatedReparamBlock(dim, kernel_size), nn.BatchNorm2d(dim), SEModule(dim),
            nn.Conv2d(dim, hidden, 1), nn.GELU(), ResDWConv(hidden), GRN(hidden), nn.Conv2d(hidden, dim, 1),
        )  # fmt: skip
        self.ls = LayerScale(dim, ls_init_value) if ls_init_value else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(x)
        return self.ls(x) + self.drop_path(self.proj(x))


class DynamicConvBlock(nn.Module):
    def __init__(
        self, dim: int, ctx_dim: int, kernel_size: int, num_heads: int, mlp_ratio: int, drop_path: float,
        is_first: bool, is_last: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        out_dim, mlp_dim, groups = dim + ctx_dim, dim * mlp_ratio, 2 * num_heads
        self.dims, self.kernel_size, self.groups = (dim, ctx_dim), kernel_size, groups
        self.is_first, self.is_last = is_first, is_last
        self.scale = (dim // groups) ** -0.5
        self.rpb1 = nn.Parameter(torch.zeros(groups, 2 * SMALL - 1, 2 * SMALL - 1))
        self.rpb2 = nn.Parameter(torch.zeros(groups, 2 * kernel_size - 1, 2 * kernel_size - 1))
        if not is_first:
            self.x_scale, self.h_scale = LayerScale(ctx_dim), LayerScale(ctx_dim)
        self.dwconv1 = ResDWConv(out_dim)
        self.norm1 = LayerNorm2d(out_dim)
        self.fusion = nn.Sequential(
            nn.Conv2d(out_dim, out_dim, 3, padding=1, groups=out_dim), nn.BatchNorm2d(out_dim), nn.GELU(),
            nn.Conv2d(out_dim, dim, 1), GRN(dim),
        )  # fmt: skip
        self.weight_query = nn.Sequential(nn.Conv2d(dim, dim // 2, 1, bias=False), nn.BatchNorm2d(dim // 2))
        self.weight_key = nn.Sequential(
            nn.AdaptiveAvgPool2d(7), nn.Conv2d(ctx_dim, dim // 2, 1, bias=False), nn.BatchNorm2d(dim // 2)
        )
        self.weight_proj = nn.Conv2d(49, kernel_size**2 + SMALL**2, 1)
        self.dyconv_proj = nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim))
        self.lepe = nn.Sequential(DilatedReparamBlock(dim, kernel_size), nn.BatchNorm2d(dim))
        self.se_layer = SEModule(dim)
        self.gate = nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, out_dim, 1))
        self.dwconv2 = ResDWConv(out_dim)
        self.norm2 = LayerNorm2d(out_dim)
        self.mlp = nn.Sequential(
            nn.Conv2d(out_dim, mlp_dim, 1), nn.GELU(), ResDWConv(mlp_dim), GRN(mlp_dim), nn.Conv2d(mlp_dim, out_dim, 1)
        )
        self.ls1, self.ls2 = LayerScale(out_dim), LayerScale(out_dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def relative_bias(self, rpb: Tensor, H: int, W: int, kernel_size: int) -> Tensor:
        rows, cols = (
            neighbours(n, kernel_size, rpb.device) - torch.arange(n, device=rpb.device)[:, None] + kernel_size - 1
            for n in (H, W)
        )
        return rpb[:, rows[:, None, :, None], cols[None, :, None, :]].flatten(3)

    def dynamic_conv(self, source: Tensor, value: Tensor) -> Tensor:
        size, K = source.shape[2:], self.kernel_size
        H, W = size
        if min(H, W) < K:
            H, W = (K, int(K / H * W)) if H < W else (int(K / W * H), K)
            source = F.interpolate(source, (H, W), mode="bilinear", align_corners=False)
            value = F.interpolate(value, (H, W), mode="bilinear", align_corners=False)
        query, key = source.split(self.dims, 1)
        query = (self.weight_query(query) * self.scale).unflatten(1, (self.groups, -1)).flatten(3)
        key = self.weight_key(key).unflatten(1, (self.groups, -1)).flatten(3)
        affinity = torch.einsum("bgcn,bgcl->bgnl", query, key)
        weights = self.weight_proj(affinity.flatten(0, 1).transpose(1, 2).unflatten(2, (H, W)))  # (B G, T, H, W)
        weights = weights.unflatten(0, (-1, self.groups)).permute(0, 1, 3, 4, 2)
        small, large = weights.split([SMALL**2, K**2], -1)
        small = (small + self.relative_bias(self.rpb1, H, W, SMALL)).softmax(-1)
        large = (large + self.relative_bias(self.rpb2, H, W, K)).softmax(-1)
        first, second = value.unflatten(1, (2, self.groups, -1)).permute(0, 1, 2, 4, 5, 3).unbind(1)
        out = torch.stack([na2d_av(small, first, SMALL), na2d_av(large, second, K)], 1)
        out = out.permute(0, 1, 2, 5, 3, 4).flatten(1, 3)
        return out if tuple(size) == (H, W) else F.adaptive_avg_pool2d(out, size)

    def forward(self, x: Tensor, h_x: Tensor, h_r: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        if not self.is_first:
            h_x = self.x_scale(h_x) + self.h_scale(h_r)
        x = self.dwconv1(torch.cat([x, h_x], 1))
        source = self.norm1(x)
        value = self.fusion(source)
        gate, lepe = self.gate(value), self.lepe(value)
        y = self.dyconv_proj(self.dynamic_conv(source, value))
        y = self.proj(gate * self.se_layer(y + lepe))
        x = self.dwconv2(self.ls1(x) + self.drop_path(y))
        x = self.ls2(x) + self.drop_path(self.mlp(self.norm2(x)))
        return x if self.is_last else x.split(self.dims, 1)


def stem(in_chans: int, dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(dim // 2), nn.GELU(),
        nn.Conv2d(dim // 2, dim // 2, 3, 1, 1, bias=False), nn.BatchNorm2d(dim // 2), nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, 2, 1, bias=False), nn.BatchNorm2d(dim), nn.GELU(),
        nn.Conv2d(dim, dim, 3, 1, 1, bias=False), nn.BatchNorm2d(dim),
    )  # fmt: skip


def downsample(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(dim, out_dim, 3, 2, 1, bias=False), nn.BatchNorm2d(out_dim))


class OverLoCK(nn.Module):
    def __init__(
        self,
        embed_dim: tuple[int, ...],
        depth: tuple[int, ...],
        sub_depth: tuple[int, ...],
        sub_num_heads: tuple[int, ...],
        kernel_size: tuple[int, ...] = (17, 15, 13, 7),
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        ctx_dim = embed_dim[-1] // 4
        rates = iter(torch.linspace(0, drop_path_rate, sum(depth) + sum(sub_depth)).tolist())
        self.patch_embed1 = stem(in_chans, embed_dim[0])
        for i in (1, 2, 3):
            setattr(self, f"patch_embed{i + 1}", downsample(embed_dim[i - 1], embed_dim[i]))
        self.high_level_proj = nn.Conv2d(embed_dim[-1], ctx_dim, 1)
        self.patch_embedx = nn.ModuleDict(
            {"x_proj": downsample(embed_dim[2], embed_dim[3]), "h_proj": downsample(ctx_dim, ctx_dim)}
        )
        for i in range(4):
            scale = 1.0 if i > 1 else None
            blocks = [RepConvBlock(embed_dim[i], kernel_size[i], 4, scale, next(rates)) for _ in range(depth[i])]
            setattr(self, f"blocks{i + 1}", nn.Sequential(*blocks))
        for i in (0, 1):
            blocks = [
                DynamicConvBlock(
                    embed_dim[2 + i], ctx_dim, kernel_size[2 + i], sub_num_heads[i], 3, next(rates),
                    is_first=i == j == 0, is_last=i == 1 and j == sub_depth[1] - 1,
                )
                for j in range(sub_depth[i])
            ]  # fmt: skip
            setattr(self, f"sub_blocks{3 + i}", nn.ModuleList(blocks))
        self.aux_head = nn.Sequential(
            nn.BatchNorm2d(embed_dim[-1]), nn.AdaptiveAvgPool2d(1), nn.Conv2d(embed_dim[-1], num_classes, 1)
        )
        self.head = nn.Sequential(
            nn.Conv2d(embed_dim[-1] + ctx_dim, 1024, 1, bias=False), nn.BatchNorm2d(1024), nn.SiLU(),
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(1024, num_classes, 1),
        )  # fmt: skip
        self.apply(self._init_weights)

    def _init_weights(self, m: nn.Module) -> None:
        if isinstance(m, nn.Conv2d):
            trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits. (The published code adds those of the auxiliary head in training, which this one does not time.)"""
        x = self.blocks1(self.patch_embed1(x))
        x = self.blocks2(self.patch_embed2(x))
        x = self.blocks3(self.patch_embed3(x))
        context = self.high_level_proj(self.blocks4(self.patch_embed4(x)))
        h_r = h_x = F.interpolate(context, x.shape[2:], mode="bilinear", align_corners=False)
        for block in self.sub_blocks3:
            x, h_x = block(x, h_x, h_r)
        x, h_x = self.patch_embedx["x_proj"](x), self.patch_embedx["h_proj"](h_x)
        for block in self.sub_blocks4[:-1]:
            x, h_x = block(x, h_x, context)
        return self.head(self.sub_blocks4[-1](x, h_x, context)).flatten(1)


def create_model(name: str, num_classes: int = 1000, **kwargs) -> nn.Module:
    return OverLoCK(**{**VARIANTS[name], "num_classes": num_classes, **kwargs})
