"""NAT, DiNAT, DiNAT_s and their isotropic kin as published, to time ours against: "Neighborhood Attention Transformer",
arXiv 2204.07143, and "Dilated Neighborhood Attention Transformer", arXiv 2209.15001.

The published code calls the compiled kernels of NATTEN 0.14; here the keys and values of every query are gathered, and
two einsums and a softmax are taken over them, which needs the square of the kernel size times the memory of the keys.
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

MINI, TINY = {"embed_dim": 64, "depths": (3, 4, 6, 5)}, {"embed_dim": 64, "depths": (3, 4, 18, 5)}
SMALL = {"embed_dim": 96, "depths": (3, 4, 18, 5), "mlp_ratio": 2.0}
DILATED = {"dilations": (8, 4, 2, 1)}
ISOTROPIC = {"embed_dim": 384, "num_heads": 12}
VARIANTS = {
    "nat_mini": MINI,
    "nat_tiny": TINY,
    "nat_small": SMALL | {"layer_scale": 1e-5},
    "dinat_mini": MINI | DILATED,
    "dinat_tiny": TINY | DILATED,
    "dinat_small": SMALL | DILATED,
    "dinat_s_tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2)},
    "dinat_s_small": {"embed_dim": 96, "depths": (2, 2, 18, 2)},
    "nat_isotropic_small": ISOTROPIC,
    "dinat_isotropic_small": ISOTROPIC | {"dilation": 2},
    "vitrpb_small": ISOTROPIC | {"kernel_size": None},
}


def neighbors(length: int, kernel_size: int, dilation: int) -> tuple[Tensor, Tensor]:
    """The keys of every query on an axis, (length, kernel_size), and their places in the table of biases."""
    query = torch.arange(length)
    group, position = query % dilation, query // dilation
    group_length = (length - group + dilation - 1) // dilation
    start = torch.minimum((position - kernel_size // 2).clamp(min=0), group_length - kernel_size)
    key = start[:, None] + torch.arange(kernel_size)
    return key * dilation + group[:, None], key - position[:, None] + kernel_size - 1


class NeighborhoodAttention(nn.Module):
    """(B, H, W, C) to the same."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int, dilation: int = 1) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dim, dim)

    @torch.inference_mode(False)  # what is made under it could not be used in training afterwards
    def indices(self, H: int, W: int) -> Tensor:
        """Of keys and of biases: (2, H * W * kernel_size^2)."""
        name = f"indices_{H}x{W}"
        if not hasattr(self, name):
            rows, bias_rows = neighbors(H, self.kernel_size, self.dilation)
            cols, bias_cols = neighbors(W, self.kernel_size, self.dilation)
            keys = rows[:, None, :, None] * W + cols[None, :, None, :]
            biases = bias_rows[:, None, :, None] * (2 * self.kernel_size - 1) + bias_cols[None, :, None, :]
            indices = torch.stack([keys.flatten(), biases.flatten()]).to(self.rpb.device)
            self.register_buffer(name, indices, persistent=False)
        return getattr(self, name)

    def forward(self, x: Tensor) -> Tensor:
        B, H_in, W_in, C = x.shape
        smallest = self.kernel_size * self.dilation
        pad_h, pad_w = max(0, smallest - H_in), max(0, smallest - W_in)
        if pad_h or pad_w:
            x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
        _, H, W, _ = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]  # (B, heads, H * W, d)
        q = q * self.scale
        keys, biases = self.indices(H, W)
        gathered = (B, self.num_heads, H * W, self.kernel_size**2, C // self.num_heads)
        attn = torch.einsum("bhnd,bhnkd->bhnk", q, k.index_select(2, keys).view(gathered))
        attn = attn + self.rpb.flatten(1).index_select(1, biases).view(attn.shape[1:])
        attn = attn.softmax(dim=-1)
        x = torch.einsum("bhnk,bhnkd->bhnd", attn, v.index_select(2, keys).view(gathered))
        x = x.permute(0, 2, 1, 3).reshape(B, H, W, C)
        if pad_h or pad_w:
            x = x[:, :H_in, :W_in, :]
        return self.proj(x)


class GlobalAttention(nn.Module):
    """Attention of all tokens of a map of a fixed size, with a table of relative biases: the mixer of ViT-rpb."""

    def __init__(self, dim: int, num_heads: int, size: int = 14) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * size - 1, 2 * size - 1))
        trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dim, dim)
        tokens = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
        rows, cols = tokens[:, None, :] - tokens[:, :, None] + size - 1  # key minus query
        self.register_buffer("relative_position_index", rows * (2 * size - 1) + cols)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = attn + self.rpb.flatten(1)[:, self.relative_position_index.flatten()].view(-1, H * W, H * W)
        attn = attn.softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, H, W, C))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(
        self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float = 0.0, layer_scale: float | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.layer_scale = layer_scale is not None
        if self.layer_scale:
            self.gamma1 = nn.Parameter(layer_scale * torch.ones(dim))
            self.gamma2 = nn.Parameter(layer_scale * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if not self.layer_scale:
            x = x + self.drop_path(self.attn(self.norm1(x)))
            return x + self.drop_path(self.mlp(self.norm2(x)))
        x = x + self.drop_path(self.gamma1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x)))


class ConvTokenizer(nn.Module):
    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(in_chans, dim // 2, 3, 2, 1), nn.Conv2d(dim // 2, dim, 3, 2, 1))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, 2, 1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        _, _, H, W = x.shape
        if H % self.patch_size or W % self.patch_size:
            x = F.pad(x, (0, -W % self.patch_size, 0, -H % self.patch_size))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        if H % 2 or W % 2:
            x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.reduction(self.norm(x))


class Level(nn.Module):
    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class Network(nn.Module):
    """What the networks share: their head and initialisation, and a list of `levels` or `layers`."""

    trunk = "levels"

    def finish(self, dim: int, num_classes: int) -> None:
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for part in getattr(self, self.trunk):
            x = part(x)
        return self.head(self.norm(x).flatten(1, 2).mean(1))


class NAT(Network):
    downsampler = ConvDownsampler

    def __init__(
        self,
        embed_dim: int,
        depths: tuple[int, ...],
        mlp_ratio: float = 3.0,
        kernel_size: int = 7,
        dilations: tuple[int, ...] = (1, 1, 1, 1),
        layer_scale: float | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch_embed = self.tokenizer(in_chans, embed_dim)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
        levels = nn.ModuleList()
        for s, depth in enumerate(depths):
            dim, blocks = embed_dim * 2**s, []
            for i in range(depth):
                attn = NeighborhoodAttention(dim, dim // 32, kernel_size, dilations[s] if i % 2 else 1)
                blocks.append(Block(dim, attn, mlp_ratio, next(rates), layer_scale))
            levels.append(Level(blocks, self.downsampler(dim) if s < len(depths) - 1 else None))
        setattr(self, self.trunk, levels)
        self.finish(dim, num_classes)

    def tokenizer(self, in_chans: int, dim: int) -> nn.Module:
        return ConvTokenizer(in_chans, dim)


class DiNATs(NAT):
    trunk = "layers"
    downsampler = PatchMerging

    def __init__(self, embed_dim: int, depths: tuple[int, ...], **kwargs) -> None:
        super().__init__(embed_dim, depths, **{"mlp_ratio": 4.0, "dilations": (8, 4, 2, 1), **kwargs})

    def tokenizer(self, in_chans: int, dim: int) -> nn.Module:
        return PatchEmbed(4, in_chans, dim)


class Isotropic(Network):
    trunk = "layers"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        kernel_size: int | None = 7,
        dilation: int = 1,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(16, in_chans, embed_dim)
        self.layers = nn.ModuleList()
        for i, rate in enumerate(torch.linspace(0, drop_path_rate, depth).tolist()):
            if kernel_size is None:
                attn = GlobalAttention(embed_dim, num_heads)
            else:
                attn = NeighborhoodAttention(embed_dim, num_heads, kernel_size, dilation if i % 2 else 1)
            self.layers.append(Block(embed_dim, attn, mlp_ratio, rate))
        self.finish(embed_dim, num_classes)


def create_model(name: str, num_classes: int = 1000, **kwargs) -> nn.Module:
    isotropic = "isotropic" in name or name.startswith("vitrpb")
    network = Isotropic if isotropic else DiNATs if name.startswith("dinat_s_") else NAT
    return network(**{**VARIANTS[name], "num_classes": num_classes, **kwargs})
