"""NAT, DiNAT, DiNAT_s and the isotropic models of the same papers.

"Neighborhood Attention Transformer", arXiv 2204.07143, and "Dilated Neighborhood Attention Transformer", arXiv
2209.15001. NAT is a pyramid on neighbourhood attention with a convolutional stem and downsampling; DiNAT dilates every
second layer; DiNAT_s has Swin's patch embedding and merging; the isotropic models are plain ones for comparison.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, PatchEmbed, calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn

from ..backbone import Hierarchical, Isotropic, Stage
from ..layers import NeighborhoodAttention2d
from ..layers.block import Block
from ..layers.pointwise import Mlp, Pointwise
from ..registry import Family, Variant, Weights, register_family
from ..weights import renumber

# Hugging Face's names, then the official ones.
HF_RULES = [
    (r"^d?i?nat\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^d?i?nat\.embeddings\.norm\.", "patch_embed.norm."),
    (r"^d?i?nat\.encoder\.levels\.(\d+)\.layers\.(\d+)\.", r"levels.\1.blocks.\2."),
    (r"^d?i?nat\.encoder\.levels\.(\d+)\.downsample\.", r"levels.\1.downsample."),
    (r"^d?i?nat\.layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.query\.(\w+)$", r".attn.qkv.\1#0"),
    (r"\.attention\.self\.key\.(\w+)$", r".attn.qkv.\1#1"),
    (r"\.attention\.self\.value\.(\w+)$", r".attn.qkv.\1#2"),
    (r"\.attention\.self\.rpb$", ".attn.rpb"),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale_parameters$", ".{gamma1|gamma2}"),
]
OFFICIAL_RULES = [
    (r"^patch_embed\.", "stem."),
    (r"^(?:levels|layers)\.(\d+)\.downsample\.", renumber("stages.{0}.downsample.", 1)),
    (r"^(?:levels|layers)\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (r"\.attn\.relative_position_index$", ""),
    (r"\.attn\.", ".mixer."),
    (r"gamma(\d)", r"ls\1.gamma"),
]
LAYOUTS = {"official": OFFICIAL_RULES, "hf": HF_RULES + OFFICIAL_RULES}


class ConvStem(nn.Module):
    """Two strided 3 x 3 convolutions with nothing between them, then LayerNorm: (B, C_in, H, W) to a quarter the size."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        )
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class ConvDownsample(nn.Module):
    """Strided 3 x 3 convolution, then LayerNorm: (B, C, H, W) to (B, 2C, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False, device=device, dtype=dtype)
        self.norm = LayerNorm2d(2 * dim, eps=1e-5, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


class PatchStem(nn.Module):
    """Patches of 4 x 4 pixels and LayerNorm, the image zero-padded at the bottom and right: to a quarter the size."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 4, stride=4, device=device, dtype=dtype)
        self.norm = LayerNorm2d(dim, eps=1e-5, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))))


class PatchMerging(nn.Module):
    """Concatenates the 2 x 2 phases of the map, LayerNorm, linear: (B, C, H, W) to (B, 2C, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, device=device, dtype=dtype)
        self.reduction = Pointwise(4 * dim, 2 * dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)).permute(0, 2, 3, 1)
        x = torch.cat([x[:, row::2, col::2] for col in (0, 1) for row in (0, 1)], 3)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class DiNAT(Hierarchical):
    """NAT and DiNAT.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: pooling before the head.
        embed_dim: channels of the first stage; each further stage has twice those of the one before.
        depths: blocks of each stage.
        num_heads: attention heads of each stage; one per 32 channels if None.
        mlp_ratio: hidden channels of the MLP per channel.
        kernel_size: attention window.
        dilations: dilation of every block of every stage; 1 everywhere if None.
        layer_scale: initial layer scale, None for no layer scale.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor of the attention logits, head_dim**-0.5 if None.
        drop_rate: dropout rate of the MLPs, attention outputs and head.
        attn_drop_rate: dropout rate of the attention weights.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.
    """

    layouts = LAYOUTS
    first_conv = "stem.proj.0"
    stem_layer: type[nn.Module] = ConvStem
    downsample_layer: type[nn.Module] = ConvDownsample

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] | None = None,
        mlp_ratio: float = 3.0,
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        layer_scale: float | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, depth in enumerate(depths):
            dim = embed_dim * 2**i
            blocks = [
                Block(
                    dim,
                    NeighborhoodAttention2d(
                        dim,
                        num_heads[i] if num_heads else dim // 32,
                        kernel_size,
                        dilations[i][j] if dilations else 1,
                        qkv_bias=qkv_bias,
                        qk_scale=qk_scale,
                        attn_drop=attn_drop_rate,
                        proj_drop=drop_rate,
                        **dd,
                    ),
                    Mlp(dim, int(dim * mlp_ratio), drop=drop_rate, **dd),
                    layer_scale=layer_scale,
                    drop_path=rates[i][j],
                    **dd,
                )
                for j in range(depth)
            ]
            downsample = self.downsample_layer(dim // 2, **dd) if i else None
            stages.append(Stage(blocks, dim, downsample, channels_last=True))
        super().__init__(
            self.stem_layer(in_chans, embed_dim, **dd),
            stages,
            LayerNorm2d(stages[-1].dim, eps=1e-5, **dd),
            num_classes,
            in_chans,
            global_pool,
            drop_rate,
            **dd,
        )
        self.apply(_init_weights)


class DiNATs(DiNAT):
    """DiNAT_s: DiNAT with Swin's patch embedding and patch merging. Arguments as for `DiNAT`."""

    first_conv = "stem.proj"
    stem_layer = PatchStem
    downsample_layer = PatchMerging


class TokenNeighborhoodAttention(NeighborhoodAttention2d):
    """Neighbourhood attention on a sequence of patches: (B, H * W, C) and the grid (H, W) to (B, H * W, C)."""

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return super().forward(x.unflatten(1, grid)).flatten(1, 2)


class TokenRelPosAttention(TokenNeighborhoodAttention):
    """Global attention with a relative position bias, which is neighbourhood attention with a window as large as the map.

    The bias table is made for a `kernel_size` map; it is resampled bicubically for others.
    """

    def window(self, height: int, width: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        return (height, 1, 1), (width, 1, 1)

    def table(self, height: int, width: int) -> Tensor:
        size = 2 * height - 1, 2 * width - 1
        if self.rpb.shape[1:] == size:
            return self.rpb
        return F.interpolate(self.rpb[None], size, mode="bicubic", align_corners=False)[0]


class IsotropicDiNAT(Isotropic):
    """Isotropic NAT and DiNAT, and the ViT with relative position bias they are compared with.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: pooling before the head: "avg", "max", "avgmax" or "".
        img_size: image size in pixels that the position bias of the global model is made for.
        patch_size: side of a patch in pixels.
        embed_dim: channels.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: hidden channels of the MLP per channel.
        kernel_size: attention window; None for global attention.
        dilation: dilation of every second block.
        layer_scale: initial layer scale, None for no layer scale.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor of the attention logits, head_dim**-0.5 if None.
        drop_rate: dropout rate of the patch embedding, MLPs, attention outputs and head.
        attn_drop_rate: dropout rate of the attention weights.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.
    """

    layouts = LAYOUTS

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        kernel_size: int | None = 7,
        dilation: int = 1,
        layer_scale: float | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        stem = PatchEmbed(img_size, patch_size, in_chans, embed_dim, nn.LayerNorm, strict_img_size=False, **dd)
        attention = TokenNeighborhoodAttention if kernel_size else TokenRelPosAttention
        blocks = [
            Block(
                embed_dim,
                attention(
                    embed_dim,
                    num_heads,
                    kernel_size or stem.grid_size,
                    dilation if i % 2 else 1,
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    attn_drop=attn_drop_rate,
                    proj_drop=drop_rate,
                    **dd,
                ),
                Mlp(embed_dim, int(embed_dim * mlp_ratio), drop=drop_rate, **dd),
                layer_scale=layer_scale,
                drop_path=rate,
                **dd,
            )
            for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth))
        ]
        norm = nn.LayerNorm(embed_dim, **dd)
        super().__init__(
            stem, blocks, norm, embed_dim, patch_size, img_size, False, None, num_classes, in_chans, global_pool,
            drop_rate, **dd,
        )  # fmt: skip
        self.apply(_init_weights)


def _dilations(depths: Sequence[int], dilations: Sequence[int]) -> list[list[int]]:
    """Every second block of a stage has the stage's dilation."""
    return [[d if j % 2 else 1 for j in range(depth)] for depth, d in zip(depths, dilations, strict=True)]


def _pyramid(depths: Sequence[int], embed_dim: int, mlp_ratio: float, dilations: Sequence[int] = (), **kwargs) -> dict:
    return {
        "embed_dim": embed_dim,
        "depths": depths,
        "mlp_ratio": mlp_ratio,
        "dilations": _dilations(depths, dilations) if dilations else None,
    } | kwargs


def _weights(url: str, hf: str | None = None, top1: float | None = None, size: int = 224, **kwargs) -> Weights:
    return Weights(
        (f"https://shi-labs.com/projects/{url}",),
        f"shi-labs/{hf}" if hf else None,
        top1,
        size,
        crop_pct=1.0 if size == 384 else 0.875,
        **kwargs,
    )


def _in1k(name: str, top1: float) -> dict[str, Weights]:
    folder = "nat/checkpoints/CLS/{}.pth" if name.startswith("nat") else "dinat/checkpoints/imagenet1k/{}_in1k_224.pth"
    hf = None if "_s_" in name else f"{name.replace('_', '-')}-in1k-224"
    return {"in1k": _weights(folder.format(name), hf, top1)}


def _isotropic(name: str, top1: float) -> dict[str, Weights]:
    return {"in1k": _weights(f"dinat/checkpoints/isotropic/{name}_in1k_224.pth", None, top1)}


def _large(file: str, tag: str, hf: str | None = None, top1: float | None = None, size: int = 224) -> dict[str, Weights]:
    note = "" if top1 else "head of another width than 1000: pass num_classes as in the file, or another number"
    return {tag: _weights(f"dinat/checkpoints/{file}.pth", hf, top1, size, note=note)}


SMALL, MEDIUM, SWIN_SMALL, SWIN_MEDIUM = (3, 4, 6, 5), (3, 4, 18, 5), (2, 2, 6, 2), (2, 2, 18, 2)
D224, D384 = (8, 4, 2, 1), (13, 6, 3, 1)
ISO_BASE = {"embed_dim": 768, "num_heads": 24}


def _variant(kwargs: dict, gmacs: float, drop_path: float, weights: dict, size: int = 224, model=None) -> Variant:
    return Variant(kwargs, gmacs, weights, {"drop_path_rate": drop_path}, size, model)


VARIANTS = {
    "nat_mini": _variant(_pyramid(SMALL, 64, 3), 2.695, 0.2, _in1k("nat_mini", 81.8)),
    "nat_tiny": _variant(_pyramid(MEDIUM, 64, 3), 4.295, 0.2, _in1k("nat_tiny", 83.2)),
    "nat_small": _variant(_pyramid(MEDIUM, 96, 2, layer_scale=1e-5), 7.772, 0.3, _in1k("nat_small", 83.7)),
    "nat_base": _variant(_pyramid(MEDIUM, 128, 2, layer_scale=1e-5), 13.677, 0.5, _in1k("nat_base", 84.3)),
    "dinat_mini": _variant(_pyramid(SMALL, 64, 3, D224), 2.695, 0.2, _in1k("dinat_mini", 81.8)),
    "dinat_tiny": _variant(_pyramid(MEDIUM, 64, 3, D224), 4.295, 0.2, _in1k("dinat_tiny", 82.7)),
    # Unlike nat_small, dinat_small was trained without layer scale.
    "dinat_small": _variant(_pyramid(MEDIUM, 96, 2, D224), 7.772, 0.3, _in1k("dinat_small", 83.8)),
    "dinat_base": _variant(_pyramid(MEDIUM, 128, 2, D224, layer_scale=1e-5), 13.677, 0.5, _in1k("dinat_base", 84.4)),
    "dinat_large": _variant(
        _pyramid(MEDIUM, 192, 2, D224), 30.458, 0.35,
        _large("imagenet1k/dinat_large_in22k_in1k_224", "in22k_ft_in1k", "dinat-large-in22k-in1k-224", 86.6),
    ),
    "dinat_large_384": _variant(
        _pyramid(MEDIUM, 192, 2, D384), 89.505, 0.35,
        _large("imagenet1k/dinat_large_in22k_in1k_384", "in22k_ft_in1k", "dinat-large-in22k-in1k-384", 87.4, 384), 384,
    ),
    "dinat_large_384_11x11": _variant(
        _pyramid(MEDIUM, 192, 2, D224, kernel_size=11), 92.085, 0.35,
        _large("imagenet1k/dinat_large_in22k_in1k_384_11x11", "in22k_ft_in1k", "dinat-large-11x11-in22k-in1k-384", 87.5, 384),
        384,
    ),
    "dinat_large_21k": _variant(
        _pyramid(MEDIUM, 192, 2, D224), 30.458, 0.2, _large("imagenet22k/dinat_large_in22k_224", "in22k")
    ),
    "dinat_large_21k_11x11": _variant(
        _pyramid(MEDIUM, 192, 2, D224, kernel_size=11), 41.043, 0.2,
        _large("imagenet22k/dinat_large_in22k_224_11x11interp", "in22k"),
    ),
    "dinat_s_tiny": _variant(
        _pyramid(SWIN_SMALL, 96, 4, D224), 4.491, 0.2, _in1k("dinat_s_tiny", 81.8), model=DiNATs
    ),
    "dinat_s_small": _variant(
        _pyramid(SWIN_MEDIUM, 96, 4, D224), 8.741, 0.3, _in1k("dinat_s_small", 83.5), model=DiNATs
    ),
    "dinat_s_base": _variant(
        _pyramid(SWIN_MEDIUM, 128, 4, D224), 15.431, 0.5, _in1k("dinat_s_base", 83.8), model=DiNATs
    ),
    "dinat_s_large": _variant(
        _pyramid(SWIN_MEDIUM, 192, 4, D224), 34.476, 0.35,
        _large("imagenet1k/dinat_s_large_in1k_224", "in22k_ft_in1k", None, 86.5), model=DiNATs,
    ),
    "dinat_s_large_384": _variant(
        _pyramid(SWIN_MEDIUM, 192, 4, D384), 101.314, 0.35,
        _large("imagenet1k/dinat_s_large_in1k_384", "in22k_ft_in1k", None, 87.4, 384), 384, DiNATs,
    ),
    "dinat_s_large_21k": _variant(
        _pyramid(SWIN_MEDIUM, 192, 4, D224), 34.476, 0.2, _large("imagenet22k/dinat_s_large_in22k_224", "in22k"),
        model=DiNATs,
    ),
    "nat_isotropic_small": _variant({}, 4.308, 0.1, _isotropic("nat_isotropic_small", 80.0), model=IsotropicDiNAT),
    "dinat_isotropic_small": _variant(
        {"dilation": 2}, 4.308, 0.1, _isotropic("dinat_isotropic_small", 80.8), model=IsotropicDiNAT
    ),
    "vitrpb_small": _variant(
        {"kernel_size": None}, 4.574, 0.1, _isotropic("vitrpb_small", 81.2), model=IsotropicDiNAT
    ),
    "nat_isotropic_base": _variant(ISO_BASE, 16.941, 0.4, _isotropic("nat_isotropic_base", 81.6), model=IsotropicDiNAT),
    "dinat_isotropic_base": _variant(
        {**ISO_BASE, "dilation": 2}, 16.941, 0.4, _isotropic("dinat_isotropic_base", 82.1), model=IsotropicDiNAT
    ),
    "vitrpb_base": _variant(
        {**ISO_BASE, "kernel_size": None}, 17.472, 0.4, _isotropic("vitrpb_base", 82.5), model=IsotropicDiNAT
    ),
    "test_dinat": _variant(
        _pyramid((2, 2, 2, 2), 16, 3, (2, 2, 1, 1), num_heads=(1, 2, 4, 8), kernel_size=3), 0.0, 0.0, {}, 32
    ),
}  # fmt: skip

FAMILY = Family(
    "dinat",
    (
        ("Neighborhood Attention Transformer", "2204.07143"),
        ("Dilated Neighborhood Attention Transformer", "2209.15001"),
    ),
    "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
    "mit",
)
register_family(FAMILY, DiNAT, VARIANTS)
